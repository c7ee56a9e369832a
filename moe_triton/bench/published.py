"""Published times of dispatch and combine of other systems, with the workload of each.

The figures are the projects' own unless a note says "secondary". Bandwidth is whatever each project
counts: compare times first, and only rows of one workload.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources

# What makes a workload, in the order in which differences are named.
WORKLOAD = ("tokens", "hidden", "top_k", "experts", "ranks")


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One published measurement; None where the source says nothing.

    Attributes:
        system: what was measured.
        hardware: it ran on.
        source: ``owner/name:path``, ``owner/name PR 1`` or an arXiv number.
        mode: "low_latency" (decode), "normal" (prefill, throughput), "all_to_all" (no routing) or
            "one_device" (no communication).
        tokens: of each rank.
        hidden: elements of a token.
        top_k: routed experts of a token.
        experts: routed experts in all.
        ranks: of the expert-parallel group.
        dispatch_format: of the rows that dispatch sends: "bf16", "fp8", "int8", ...
        combine_format: of the rows that combine sends.
        dispatch_us: microseconds of dispatch.
        combine_us: microseconds of combine.
        dispatch_gbs: GB/s of dispatch, in the sense of ``bandwidth``.
        combine_gbs: GB/s of combine.
        bandwidth: which bytes the source counts, or over which link.
        note: what is special, or "".
    """

    system: str
    hardware: str
    source: str
    mode: str
    tokens: int | None = None
    hidden: int | None = None
    top_k: int | None = None
    experts: int | None = None
    ranks: int | None = None
    dispatch_format: str | None = None
    combine_format: str | None = None
    dispatch_us: float | None = None
    combine_us: float | None = None
    dispatch_gbs: float | None = None
    combine_gbs: float | None = None
    bandwidth: str | None = None
    note: str = ""

    def differences(self, **workload: int | None) -> tuple[str, ...]:
        """Where the row has another workload: "ranks 16, not 8".

        Args:
            workload: ``tokens``, ``hidden``, ``top_k``, ``experts`` or ``ranks``; None and those
                left out are not compared, nor is what the source does not say.
        """
        return tuple(
            f"{name} {getattr(self, name)}, not {workload[name]}"
            for name in WORKLOAD
            if None not in (workload.get(name), getattr(self, name))
            and getattr(self, name) != workload[name]
        )

    def unknown(self, **workload: int | None) -> tuple[str, ...]:
        """The sizes of ``workload`` that the source does not say."""
        return tuple(
            name for name in WORKLOAD if workload.get(name) and getattr(self, name) is None
        )


@functools.cache
def published() -> tuple[PublishedRow, ...]:
    """All rows, in the order of ``published.jsonl``."""
    text = resources.files(__package__).joinpath("published.jsonl").read_text(encoding="utf-8")
    return tuple(PublishedRow(**json.loads(line)) for line in text.splitlines())


def same_workload(**workload: int | None) -> tuple[PublishedRow, ...]:
    """Rows of dispatch and combine that say all of ``workload`` but ``experts``, and the same.

    Args:
        workload: as for :meth:`PublishedRow.differences`. The number of experts has little to do
            with the time, and many sources leave it out: a row without it counts as the same.
    """
    return tuple(
        row
        for row in published()
        if row.mode in ("low_latency", "normal")
        and not row.differences(**workload)
        and set(row.unknown(**workload)) <= {"experts"}
    )


def figure(time_us: float | None, gb_s: float | None) -> str:
    """The published time and bandwidth of a half, "-" without either."""
    texts = (f"{time_us:g} us" if time_us else "", f"{gb_s:g} GB/s" if gb_s else "")
    return ", ".join(filter(None, texts)) or "-"


def cells(row: PublishedRow) -> Mapping[str, str]:
    """The cells of a row in a table."""

    def number(value: int | None) -> str:
        return "?" if value is None else str(value)

    sizes = (row.tokens, row.hidden, row.top_k, row.experts)
    return {
        "system": row.system,
        "hardware": row.hardware,
        "tokens/hidden/top-k/experts": "/".join(map(number, sizes)),
        "ranks": number(row.ranks),
        "rows": " / ".join(filter(None, (row.dispatch_format, row.combine_format))) or "?",
        "dispatch": figure(row.dispatch_us, row.dispatch_gbs),
        "combine": figure(row.combine_us, row.combine_gbs),
        "GB/s counts": row.bandwidth or "",
        "note": row.note,
        "source": row.source,
    }
