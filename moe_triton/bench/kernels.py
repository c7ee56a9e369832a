"""How fast are the kernels, relative to a copy of their bytes and to peers?

Each kernel is compared with the reference, then timed over rotating inputs: one call at a time, and
as a graph with one call per set of inputs. Bytes follow the formula in the kernel's docstring. The
share is relative to the rate of a plain device copy of as many bytes in the same run.

Then follow whole dispatch and combine, of one rank and of 8 ranks that share the device
(``layer_cases.py``). Peers with the same function (``kernel_peers.py``) are timed for DeepSeek-V3
at 128 and 4096 tokens. The most important cases run first; ``--seconds`` limits the run, which
reports how many cases it left out.

    moe-triton bench kernels [--seconds 300] [--peers-from FOLDER] [--only TEXT] [--plot a.svg]
    moe-triton bench kernels --dry-run    # a CPU: checks only, on tiny shapes, and no times
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import moe_triton

from . import kernel_plot, models, output, results, tables

if TYPE_CHECKING:
    from . import gpu_timing, kernel_cases, layer_cases
    from .models import Shape

TOKENS = (1, 8, 32, 128, 512, 2048, 4096, 16384)
FIRST_TOKENS = (4096, 128)
FIRST_MODEL = "DeepSeek-V3"
RANKS = 8  # that share the device
MOST_TOKENS_OF_RANKS = 4096
# First model, one rank: minimum share of the copy, maximum time of a call in a graph.
TARGETS: dict[tuple[str, int], dict[str, float]] = {
    ("gather_quant int8", 4096): {"target_share": 0.92},
    ("weighted_sum", 4096): {"target_share": 0.92},
    ("dispatch int8", 128): {"target_us": 12},
    ("combine int8", 128): {"target_us": 9},
}


def run(options: argparse.Namespace) -> int:
    """Run the bench; returns 1 if a kernel is wrong."""
    output.check_arguments(options)
    if options.dry_run:
        moe_triton.set_backend("interpret")
        # numpy warns about intended zeros and infinities.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        options.device = torch.device("cpu")
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit(
            "PyTorch sees no GPU here. --dry-run checks the kernels on this CPU, without times"
        )
    else:
        options.device = torch.device("cuda", 0)
        torch.cuda.set_device(options.device)
    cases = Run(options)
    cases.all()
    cases.summary()
    if cases.rows and not options.dry_run:
        cases.finish()
    return 1 if cases.wrong else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--seconds", type=float, default=300, help="no case begins later")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    models.add_arguments(parser, tuple(models.PRESETS), "all of them")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"{list(TOKENS)} by default")
    parser.add_argument("--peers-from", type=Path, help="folder with peers, see kernel_peers.py")
    parser.add_argument("--no-peers", action="store_true", help="time only our kernels")
    parser.add_argument("--dry-run", action="store_true", help="check on a CPU without timing")
    output.add_arguments(parser, plot="the share of a copy over tokens", record=True)


def say(text: str) -> None:
    """Report progress on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Run:
    """A run: its cases in order, and a result line per case and implementation."""

    def __init__(self, options: argparse.Namespace) -> None:
        # Imports Triton, which by now knows whether it interprets.
        from .. import kernels as steps
        from . import gpu_timing, kernel_cases, kernel_peers, layer_cases

        self.cases, self.layer_cases, self.peers_module = kernel_cases, layer_cases, kernel_peers
        self.steps = steps
        self.options, self.device = options, options.device
        self.start = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.left_out = 0
        self.timer: gpu_timing.Timer | None = None
        self.clocks: gpu_timing.Clocks | None = None
        self.path = options.json
        if not options.dry_run:
            self.timer = gpu_timing.Timer(self.device)
            self.clocks = gpu_timing.Clocks(device_uuid(self.device))
            folder = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
            self.folder = folder
        names: tuple[str, ...] = () if options.no_peers else kernel_peers.NAMES
        if options.dry_run:
            names = tuple(name for name in names if name == "pytorch")
        self.peers = kernel_peers.Peers(options.peers_from, names)
        self.facts = results.machine() | {"dry_run": options.dry_run}
        for name, why in self.peers.missing.items():
            say(f"{name} is missing: {why}")
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def order(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """(label, function) of each case, most important first, without repeats."""
        options = self.options
        dry = options.dry_run
        shapes = [self.cases.TINY] if dry else models.chosen(options)
        sizes = options.tokens or ((1, 5) if dry else TOKENS)
        worlds = (1, 2) if dry else (1, RANKS)
        first = [tokens for tokens in ((5,) if dry else FIRST_TOKENS) if tokens in sizes]
        others = [tokens for tokens in sizes if tokens not in first]
        for group in (first, others):
            for shape in shapes:
                leading = shape is shapes[0]
                for tokens in group:
                    yield from self.kernels(shape, tokens, group is first and leading)
                for tokens in group if leading or group is first else ():
                    yield from self.layers(shape, tokens, worlds)

    def kernels(
        self, shape: Shape, tokens: int, with_peers: bool
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """The cases of single kernels."""
        for kind in self.cases.KINDS:
            if self.options.only in kind:
                what = f"{kind}, {shape.model}, {tokens} tokens"
                yield what, functools.partial(self.case, what, kind, shape, tokens, with_peers)

    def layers(
        self, shape: Shape, tokens: int, worlds: Sequence[int]
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """The cases of whole layers."""
        for world in worlds:
            if world > 1 and tokens > MOST_TOKENS_OF_RANKS:
                continue
            for quant in (None, "int8"):
                kind = f"dispatch and combine {quant or 'bf16'}"
                if self.options.only in kind:
                    what = f"{kind}, {shape.model}, {tokens} tokens on {world} ranks"
                    yield what, functools.partial(self.layer, what, shape, tokens, world, quant)

    def all(self) -> None:
        """Run the cases, until the time is spent."""
        todo = list(self.order())
        for number, (what, work) in enumerate(todo, start=1):
            spent = time.monotonic() - self.start
            if spent > self.options.seconds:
                self.left_out = len(todo) - number + 1
                say(f"{spent:.0f} s have passed: {self.left_out} of {len(todo)} cases are left out")
                return
            say(f"[{number}/{len(todo)}, {spent:.0f} s] {what}")
            work()

    def num_sets(self, num_bytes: int) -> int:
        """Sets of inputs of this size to time over."""
        return 2 if self.timer is None else self.timer.num_sets(num_bytes)

    def layer(self, what: str, shape: Shape, tokens: int, world: int, quant: str | None) -> None:
        """Check and time dispatch and combine of a layer."""
        layer = self.layer_cases.layer(
            shape, tokens, self.device, world_size=world, quant=quant, num_sets=self.num_sets
        )
        try:
            with layer as halves:
                for half in halves:
                    self.measure(half, "moe_triton", half.calls)
        except Exception as error:  # noqa: BLE001 - report it and run the others
            self.refuse(what, "moe_triton", error)

    def case(self, what: str, kind: str, shape: Shape, tokens: int, with_peers: bool) -> None:
        """Check and time a kernel, and its peers beside it."""
        try:
            case = self.cases.KINDS[kind](shape, tokens, self.device)
            self.cases.check(case)
            sets = case.sets(self.num_sets(case.num_bytes))
            calls = [case.bind(self.steps, *tensors) for tensors in sets]
            self.measure(case, "moe_triton", calls)
        except Exception as error:  # noqa: BLE001 - report it and run the others
            self.refuse(what, "moe_triton", error)
            return
        if not with_peers:
            return
        ours = calls[0]()
        for name, bind in self.peers.of(case).items():
            try:
                theirs = [bind(*tensors) for tensors in sets]
                self.peers_module.check(case, theirs[0](), ours)
                self.measure(case, name, theirs)
            except Exception as error:  # noqa: BLE001 - report it and run the others
                self.refuse(what, name, error)

    def refuse(self, what: str, name: str, error: Exception) -> None:
        """Report a case without results."""
        why = f"{what}, {name}: {type(error).__name__}: {error}"
        say(f"no results of {why}")
        if name == "moe_triton":
            self.wrong.append(why)

    def measure(
        self,
        case: kernel_cases.Case | layer_cases.LayerCase,
        name: str,
        calls: Sequence[Callable[[], object]],
    ) -> None:
        """Time a checked case and keep its row."""
        row = {
            "bench": "kernels",
            "kernel": case.name,
            "implementation": name,
            "world_size": case.world_size,
            **case.shape._asdict(),
            "tokens": case.tokens,
            "bytes": case.num_bytes,
        }
        if self.timer is not None and self.clocks is not None:
            row |= figures(self.timer, case.num_bytes, calls)
            row |= self.clocks.read()
        if case.shape.model == FIRST_MODEL and case.world_size == 1:
            row |= TARGETS.get((case.name, case.tokens), {})
        self.rows.append(row | self.facts)
        if self.path:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.rows[-1]) + "\n")

    def finish(self) -> None:
        """Draw, compare and record the results, which ``measure`` has written."""
        output.finish(self.options, self.rows, kernel_plot.plot, record=f"{self.folder}/kernels")

    def summary(self) -> None:
        """Print the tables, the targets and what is missing."""
        if self.options.dry_run:
            print(f"{len(self.rows)} checks passed on a CPU, in Triton's interpreter: no times")
        else:
            print(tables.kernels(self.rows))
            for row in self.rows:
                if row["implementation"] == "moe_triton":
                    print(*targets(row), sep="", end="")
        for name, why in self.peers.missing.items():
            print(f"missing: {name} ({why})")
        for what in self.wrong:
            print(f"WRONG: {what}")
        if self.left_out:
            print(f"{self.left_out} cases were left out by the time limit")


def targets(row: tables.Row) -> Iterator[str]:
    """A line per target of a row."""
    where = f"{row['kernel']}, {row['tokens']} tokens of {row['model']}"
    if "target_share" in row:
        share, wanted = row["share_of_copy"], row["target_share"]
        verdict = "met" if share >= wanted else "MISSED"
        yield f"target {verdict}: {where}: {share:.0%} of the copy, at least {wanted:.0%} wanted\n"
    if "target_us" in row:
        time_, wanted = row.get("graph_us", row["eager_us"]), row["target_us"]
        verdict = "met" if time_ <= wanted else "MISSED"
        yield f"target {verdict}: {where}: {time_:.1f} us, at most {wanted} us wanted\n"


def figures(
    timer: gpu_timing.Timer, num_bytes: int, calls: Sequence[Callable[[], object]]
) -> dict[str, Any]:
    """Microseconds eager and as a graph, and the rates that follow."""
    eager, host = timer.eager(calls), timer.host(calls)
    copy = timer.copy(num_bytes)
    row: dict[str, Any] = {
        "eager_us": eager.median,
        "eager_iqr_us": eager.spread,
        "host_us": host,
        "copy_us": copy.median,
        "copy_gb_s": num_bytes / copy.median / 1e3,
        "sets": len(calls),
        "larger_than_cache": len(calls) * num_bytes > timer.cache_bytes,
    }
    try:
        graph = timer.graph(calls)
    except Exception as error:  # noqa: BLE001 - some peers synchronise, which a graph cannot capture
        best = eager.median
        row["no_graph"] = f"{type(error).__name__}: {error}"
        torch.cuda.synchronize()
    else:
        best = graph.median
        row |= {"graph_us": graph.median, "graph_iqr_us": graph.spread, "samples": graph.samples}
    return row | {"gb_s": num_bytes / best / 1e3, "share_of_copy": copy.median / best}


def device_uuid(device: torch.device) -> str | None:
    """The name by which NVML finds a GPU."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"
