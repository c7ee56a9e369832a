"""``moe-triton bench``: one command per bench of ``moe_triton.bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

from ..bench import (
    device,
    host,
    kernels,
    layer,
    load,
    output,
    overlap,
    published,
    ranks,
    transformers_model,
    transport,
    vllm_serving,
)
from ..bench.extras import MissingPackageError
from ..bench.results import ResultsError

_BENCHES = (
    (kernels, "kernels", "single kernels and layers of one device, beside a copy and peers"),
    (layer, "layer", "dispatch and combine of a model's layer, beside a copy and published rows"),
    (transport, "transport", "dispatch and combine between processes, beside by hand"),
    (host, "host", "the time of the host alone, launches replaced by nothing"),
    (load, "load", "the balance of replicas of experts"),
    (device, "device", "whether windows between processes work on a device"),
    (overlap, "overlap", "split phases, with work between setup and teardown"),
    (transformers_model, "transformers", "a model of transformers, beside its own all_to_all"),
    (vllm_serving, "vllm", "vLLM on CPUs, one process and expert-parallel ranks"),
)
# Benches whose ranks can be those of torchrun; the others are one process, or start their own.
_TORCHRUN = (layer, transport)
_ABOUT = """
Rows of other systems, as published. Compare rows of one workload only, and times before bandwidths:
each project counts bytes in its own way. "?" is what a source does not say.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a command for each bench."""
    parser.add_argument(
        "--published", action="store_true", help="print the published times of other systems"
    )
    names = ",".join(name for _, name, _ in _BENCHES)
    benches = parser.add_subparsers(title="benches", metavar=f"{{{names}}}")
    for module, name, summary in _BENCHES:
        bench = benches.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(bench)
        bench.set_defaults(bench=module.run, error=bench.error, torchrun=module in _TORCHRUN)
    parser.set_defaults(bench=None)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen bench."""
    if arguments.published:
        rows = [published.cells(row) for row in published.published()]
        output.show(rows, {name: _cell(name) for name in rows[0]}, _ABOUT.strip())
        return 0
    if arguments.bench is None:
        arguments.error("a bench is required, or --published")
    if not arguments.torchrun and (world := ranks.of_torchrun()) > 1:
        arguments.error(f"must run without torchrun, got WORLD_SIZE={world}")
    try:
        code: int = arguments.bench(arguments)
    except (MissingPackageError, ResultsError) as error:
        print(f"moe-triton bench: {error}", file=sys.stderr)
        return 2
    return code


def _cell(name: str) -> Callable[[Mapping[str, str]], str]:
    return lambda row: row[name]
