"""``moe-triton bench``: one command per bench of ``moe_triton.bench``."""

from __future__ import annotations

import argparse
import textwrap

from ..bench import kernels, load, overlap, transformers_model, transport

_BENCHES = (
    (kernels, "kernels", "single kernels and layers of one device, beside a copy and peers"),
    (transport, "transport", "dispatch and combine between processes, beside by hand"),
    (load, "load", "the balance of replicas of experts"),
    (overlap, "overlap", "split phases, with work between setup and teardown"),
    (transformers_model, "transformers", "a model of transformers, beside its own all_to_all"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a command for each bench."""
    names = ",".join(name for _, name, _ in _BENCHES)
    benches = parser.add_subparsers(title="benches", metavar=f"{{{names}}}", required=True)
    for module, name, summary in _BENCHES:
        bench = benches.add_parser(
            name,
            help=summary,
            description=textwrap.dedent(module.__doc__ or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(bench)
        bench.set_defaults(bench=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen bench."""
    code: int = arguments.bench(arguments)
    return code
