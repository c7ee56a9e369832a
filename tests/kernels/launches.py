"""Launches of every kernel: each format, sizes of real layers.

Nothing runs here: ``compiling.py`` compiles the launches for GPUs, and ``ascend/lowering.py`` for
NPUs. In a "wide" case rows begin at multiples of 16 bytes, so that accesses must be 128 bits wide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from moe_triton import kernels, ref
from moe_triton.layout import (
    NOWHERE,
    ExchangeLayout,
    Norm,
    Ring,
    RoutingCopies,
    RowFormat,
    SlotPositions,
    Windows,
    ZeroComputationExperts,
)

HIDDEN, EXPERTS, TOP_K, TOKENS = 7168, 256, 8, 64
# Cases whose launches move most of the bytes of a layer: rows of 7168.
HOT = (
    *(
        f"encode {name}, many"
        for name in (
            "bf16", "int8", "per_row_div", "e4m3", "e5m2", "group e4m3", "group_pow2 e4m3",
            "mx e4m3", "block8 torch.bfloat16",
        )
    ),
    "weighted_sum, wide",
    "weighted_sum block8 torch.bfloat16, wide",
    "weighted_sum and norm, wide",
    "gather_rows bf16, wide",
    "windows dispatch_send int8, wide",
    "windows combine_recv bf16, wide",
    "windows combine_recv bf16 and norm, aligned",
)  # fmt: skip
BF16, INT8, E4M3, E5M2 = torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2


def formats(hidden: int) -> dict[str, RowFormat]:
    """Each format of dispatched rows."""
    tight = RowFormat.tight
    formats = {
        "bf16": tight(BF16, hidden),
        "int8": tight(INT8, hidden, "per_row"),
        "per_row_div": tight(INT8, hidden, "per_row_div"),
        "static": tight(INT8, hidden, "static"),
    }
    for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
        formats[name] = tight(dtype, hidden, "per_row")
        formats[f"group {name}"] = tight(dtype, hidden, "group", block=128)
        formats[f"group_pow2 {name}"] = tight(dtype, hidden, "group_pow2", block=128)
        formats[f"mx {name}"] = tight(dtype, hidden, "mx", torch.uint8, 32)
    return formats


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of each case."""
    yield from _routing()
    yield from _moves("wide", HIDDEN)
    yield from _moves("odd", 33)
    yield from _encodes("tiny", torch.zeros((1, 1), dtype=BF16))
    yield from _encodes("narrow", torch.zeros((3, 520), dtype=BF16))
    yield from _encodes("many", torch.zeros((4096, HIDDEN), dtype=BF16))
    yield from _sums("wide", HIDDEN)
    yield from _sums("odd", 33)
    yield from _experts()
    yield from _windows()
    yield from _shared_windows()


def small_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Sizes at which compilers of NPUs failed: one of everything, nothing, many short rows."""
    one, none = torch.zeros((1, 1), dtype=torch.int32), torch.zeros((0, 1), dtype=torch.int32)
    for name, ids in (("one slot", one), ("no slots", none)):
        weights = torch.ones(ids.shape)
        yield f"routing_plan of {name}", lambda ids=ids: kernels.routing_plan(ids, 1)
        for alignment in (1, 4):
            yield (
                f"local_permutation of {name}, aligned to {alignment}",
                lambda ids=ids, weights=weights, alignment=alignment: kernels.local_permutation(
                    ids, 1, weights, alignment=alignment, capacity=4
                ),
            )
    yield (
        "eplb of one slot",
        lambda: kernels.eplb_map(one, torch.ones((1, 2), dtype=torch.int32), rank=0, world_size=1),
    )
    x = torch.zeros((4096, 64), dtype=BF16)
    for scheme, dtype in (("static", INT8), ("per_row", INT8), ("per_row", E4M3)):
        fmt = RowFormat.tight(dtype, 64, scheme)
        rows = torch.zeros((len(x), fmt.stride), dtype=torch.uint8)
        for shape in ((1,), (64,), (len(x), 64)):
            yield (
                f"encode {scheme} {dtype} with factors {shape}",
                lambda fmt=fmt, rows=rows, shape=shape: kernels.encode(
                    x, fmt, rows, torch.ones(shape)
                ),
            )


def _ids(tokens: int = TOKENS) -> torch.Tensor:
    step = torch.arange(tokens)[:, None] + torch.arange(TOP_K) * 31
    return (step % EXPERTS).int()


def _copies(tokens: int) -> RoutingCopies:
    weights = torch.zeros((2, tokens, TOP_K))
    return RoutingCopies(torch.zeros((tokens, TOP_K), dtype=torch.int32), weights[0], weights[1])


def _routing() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "routing_plan tile", lambda: kernels.routing_plan(_ids(), EXPERTS)
    yield "routing_plan blocks", lambda: kernels.routing_plan(_ids(4096), EXPERTS)
    for name, tokens in (("tile", TOKENS), ("blocks", 4096)):
        yield (
            f"routing_plan {name} with copies",
            lambda tokens=tokens: kernels.routing_plan(
                _ids(tokens).long(), EXPERTS, _copies(tokens)
            ),
        )
    counts = torch.full((EXPERTS // 8, 8), 2, dtype=torch.int32)
    yield "recv_permutation", lambda: kernels.recv_permutation(counts, capacity=4096)
    yield "recv_permutation aligned", lambda: kernels.recv_permutation(counts, 128, capacity=4096)
    slot_ids, weights = torch.zeros((8, 4096), dtype=torch.int32), torch.zeros((8, 4096))
    table = torch.zeros((8, 512), dtype=torch.int64)
    yield (
        "recv_row_index",
        lambda: kernels.recv_row_index(
            counts, slot_ids, weights, table=table, slots_per_row=TOP_K, capacity=4096
        ),
    )
    load = torch.zeros(len(counts), dtype=torch.int64)
    yield (
        "recv_row_index with load",
        lambda load=load: kernels.recv_row_index(
            counts, slot_ids, None, slots_per_row=TOP_K, capacity=4096, table=table, load=load
        ),
    )
    ids, ones = _ids(), torch.ones((TOKENS, TOP_K))
    plan = ref.routing_plan(ids, EXPERTS)
    rows = TOKENS * TOP_K
    load = torch.zeros(EXPERTS, dtype=torch.int64)
    for name, tokens in (("tile", TOKENS), ("blocks", 4096)):
        yield (
            f"local_permutation {name}",
            lambda tokens=tokens: kernels.local_permutation(
                _ids(tokens), EXPERTS, torch.ones((tokens, TOP_K)), capacity=rows
            ),
        )
        yield (
            f"local_permutation {name} with copies and load",
            lambda tokens=tokens: kernels.local_permutation(
                _ids(tokens).long(),
                EXPERTS,
                torch.ones((tokens, TOP_K)),
                _copies(tokens),
                capacity=rows,
                load=load,
            ),
        )
    yield (
        "local_permutation aligned",
        lambda: kernels.local_permutation(ids, EXPERTS, ones, alignment=16, capacity=rows),
    )
    group_starts = torch.zeros((EXPERTS, 2), dtype=torch.int32)
    yield "combine_row_index", lambda: kernels.combine_row_index(group_starts, plan, ids)


def _moves(kind: str, hidden: int) -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.zeros((TOKENS, hidden), dtype=BF16)
    ids = _ids()
    smooth_scales = torch.ones((EXPERTS, hidden))
    index = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K)
    row_index = torch.arange(TOKENS)
    yield from _encodes(kind, x)
    for name, fmt in formats(hidden).items():
        rows = torch.zeros((TOKENS * TOP_K, fmt.stride), dtype=torch.uint8)
        factors = torch.ones(1) if fmt.scheme == "static" else None
        out = torch.zeros((TOKENS * TOP_K, hidden), dtype=fmt.dtype)
        scales = None
        if fmt.scale_offset is not None:
            shape = (len(out), fmt.num_scales) if fmt.block else (len(out),)
            scales = torch.zeros(shape, dtype=fmt.scale_dtype)
        yield (
            f"gather_quant {name}, {kind}",
            lambda fmt=fmt, out=out, scales=scales, factors=factors: kernels.gather_quant(
                x, index, fmt, factors, None, out, scales
            ),
        )
        if fmt.scheme in ("per_row", "per_row_div", "group"):
            yield (
                f"gather_quant {name} with factors, {kind}",
                lambda fmt=fmt, out=out, scales=scales: kernels.gather_quant(
                    x, index, fmt, smooth_scales, ids, out, scales
                ),
            )
        if name == "int8":
            yield (
                f"zero_padding {name}, {kind}",
                lambda out=out: kernels.zero_padding(out, row_index),
            )
        if not fmt.block:
            yield (
                f"gather_rows {name}, {kind}",
                lambda fmt=fmt, rows=rows, out=out, scales=scales: kernels.gather_rows(
                    rows, row_index, fmt, out, scales
                ),
            )
    one = torch.ones(1)
    yield f"affine, {kind}", lambda: kernels.quantize_affine(x, one, one)


def _encodes(kind: str, x: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    hidden = x.shape[1]
    block8 = {
        f"block8 {dtype}": RowFormat.tight(INT8, hidden, "block8", dtype, 8)
        for dtype in (BF16, torch.float16)
        if hidden % 8 == 0
    }
    for name, fmt in (formats(hidden) | block8).items():
        rows = torch.zeros((len(x), fmt.stride), dtype=torch.uint8)
        factors = torch.ones(1) if fmt.scheme == "static" else None
        tokens = x.half() if name == "block8 torch.float16" else x
        yield (
            f"encode {name}, {kind}",
            lambda fmt=fmt, rows=rows, factors=factors, tokens=tokens: kernels.encode(
                tokens, fmt, rows, factors
            ),
        )


def _sums(kind: str, hidden: int) -> Iterator[tuple[str, Callable[[], object]]]:
    plain = formats(hidden)["bf16"]
    rows = torch.zeros((TOKENS * TOP_K, plain.stride), dtype=torch.uint8)
    index = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K)
    weights = torch.ones((TOKENS, TOP_K))
    out = torch.zeros((TOKENS, hidden), dtype=BF16)
    tokens = torch.zeros_like(out)
    alphas = (torch.zeros(2, dtype=BF16), torch.zeros(2, dtype=BF16))
    value = torch.zeros((2, hidden), dtype=BF16)
    zero_computation = ZeroComputationExperts(
        _ids(), EXPERTS, EXPERTS + 1, EXPERTS + 3, tokens, *alphas, value
    )
    norm = Norm(tokens, value[0], 1e-6, torch.zeros_like(out), torch.zeros(TOKENS))
    missing = index.clone()
    missing[0, 0] = NOWHERE
    for name, extra in (
        ("", (weights, None, None)),
        (" without weights", (None, None, None)),
        (" and addend", (weights, None, tokens)),
        (" and zero-computation experts", (weights, zero_computation, None)),
    ):
        yield (
            f"weighted_sum{name}, {kind}",
            lambda extra=extra: kernels.weighted_sum(rows, missing, plain, *extra, out),
        )
    yield (
        f"weighted_sum and norm, {kind}",
        lambda: kernels.weighted_sum(rows, index, plain, weights, None, None, out, norm),
    )
    double = RowFormat.tight(torch.float64, hidden)
    yield (
        f"weighted_sum fp64, {kind}",
        lambda: kernels.weighted_sum(
            torch.zeros((TOKENS * TOP_K, double.stride), dtype=torch.uint8), index, double,
            weights, None, None, out.double(),
        ),
    )  # fmt: skip
    if hidden % 8 == 0:
        for dtype in (BF16, torch.float16):
            fmt = RowFormat.tight(INT8, hidden, "block8", dtype, 8)
            coded = torch.zeros((TOKENS * TOP_K, fmt.stride), dtype=torch.uint8)
            yield (
                f"weighted_sum block8 {dtype}, {kind}",
                lambda fmt=fmt, coded=coded, dtype=dtype: kernels.weighted_sum(
                    coded, index, fmt, weights, None, None, out.to(dtype)
                ),
            )
    experts = torch.zeros(index.shape, dtype=torch.int32)
    gathered = torch.zeros((TOKENS * TOP_K, hidden), dtype=BF16)
    for name, extra in (
        ("", (None, None, None, (None, None))),
        (" with all", (weights.to(BF16), value, experts, (tokens, tokens))),
    ):
        yield (
            f"finalize_routing{name}, {kind}",
            lambda extra=extra: kernels.finalize_routing(gathered, missing, *extra, out),
        )
    yield f"add_rows, {kind}", lambda: kernels.add_rows(tokens, tokens, out)


def _experts() -> Iterator[tuple[str, Callable[[], object]]]:
    logits = torch.zeros((TOKENS, EXPERTS))
    yield "gating softmax", lambda: kernels.top_k_gating(logits, TOP_K)
    yield (
        "gating sigmoid groups",
        lambda: kernels.top_k_gating(
            logits, TOP_K, bias=logits[0], groups=8, top_groups=4, group_by_two=True,
            scoring="sigmoid",
        ),
    )  # fmt: skip
    yield (
        "gating chosen",
        lambda: kernels.top_k_gating(logits.bfloat16(), TOP_K, scoring="chosen"),
    )
    yield "gating of chosen experts", lambda: kernels.top_k_gating(logits, TOP_K, chosen_ids=_ids())
    table = torch.ones((EXPERTS, 4), dtype=torch.int32)
    yield "eplb rank", lambda: kernels.eplb_map(_ids(), table, rank=1, world_size=8)
    yield "eplb token", lambda: kernels.eplb_map(_ids(), table, rank=None, world_size=8)
    weights = torch.ones((TOKENS, TOP_K))
    yield "keep", lambda: kernels.keep_experts(weights, weights[0], None)


def _windows() -> Iterator[tuple[str, Callable[[], object]]]:
    """The steps over windows of 8 ranks, for rank 1."""
    rows = {"wide": HIDDEN, "odd": 33}
    ids, weights = _ids(), torch.ones((TOKENS, TOP_K))
    for name, kind in (("int8", "wide"), ("int8", "odd"), ("group e4m3 with factors", "aligned")):
        hidden = rows.get(kind, HIDDEN)
        x = torch.zeros((TOKENS, hidden), dtype=BF16)
        per_expert = name.endswith("factors")
        factors = torch.ones((EXPERTS, hidden)) if per_expert else None
        fmt = formats(hidden)[name.removesuffix(" with factors")]
        layout = _layout(fmt, RowFormat.tight(BF16, hidden), per_expert=per_expert)
        windows = _opened(layout.dispatch_ring(2))
        yield (
            f"windows dispatch_send {name}, {kind}",
            lambda windows=windows, layout=layout, x=x, factors=factors: kernels.dispatch_send(
                windows, layout, x, ids, weights, factors, _copies(TOKENS),
                digest=1,
            ),
        )  # fmt: skip
        yield (
            f"windows dispatch_recv {name}, {kind}",
            lambda windows=windows, layout=layout: kernels.dispatch_recv(
                windows, layout, 512, None, totals_dtype=torch.int64, digest=1, timeout=1.0
            ),
        )
    positions = SlotPositions(ids[0], ids.view(-1))
    for name, kind, what in (
        ("bf16", "wide", ""),
        ("bf16", "aligned", " and norm"),
        ("bf16", "aligned", " apart"),
        ("bf16", "odd", ""),
        ("block8", "aligned", ""),
    ):
        hidden = rows.get(kind, HIDDEN)
        fmt = RowFormat.tight(BF16, hidden)
        if name == "block8":
            fmt = RowFormat.tight(INT8, hidden, "block8", BF16, 8)
        x = torch.zeros((TOKENS, hidden), dtype=BF16)
        layout = _layout(formats(hidden)["int8"], fmt)
        windows = _opened(layout.combine_ring(2))
        group_starts = torch.zeros((EXPERTS // 8, 9), dtype=torch.int32)
        if not what:
            yield (
                f"windows combine_send {name}, {kind}",
                lambda windows=windows, layout=layout, x=x, group_starts=group_starts: (
                    kernels.combine_send(
                        windows, layout, x, group_starts, group_starts[0, :1], digest=1
                    )
                ),
            )
        norm = Norm(x, x[0], 1e-6, torch.zeros_like(x), torch.zeros(TOKENS))
        result, factors, epilogue = (
            x,
            weights,
            norm if what == " and norm" else None,
        )
        if what == " apart":
            result, factors = torch.zeros((TOKENS, TOP_K, hidden), dtype=BF16), None
        yield (
            f"windows combine_recv {name}{what}, {kind}",
            lambda windows=windows, layout=layout, result=result, factors=factors,
            epilogue=epilogue: kernels.combine_recv(
                windows, layout, ids, positions, factors, None, None, result, epilogue,
                digest=1, timeout=1.0,
            ),
        )  # fmt: skip


def _shared_windows() -> Iterator[tuple[str, Callable[[], object]]]:
    """Shared experts, many tokens, and what does not depend on the format of rows."""
    fmt = formats(HIDDEN)["int8"]
    layout = dataclasses.replace(
        _layout(fmt, RowFormat.tight(BF16, HIDDEN), max_tokens=4096),
        experts_per_rank=64,
        num_shared_experts=1,
        num_shared_ranks=4,
        shared_capacity=4096,
        alignment=128,
    )
    x, ids = torch.zeros((4096, HIDDEN), dtype=BF16), _ids(4096)
    weights = torch.ones(ids.shape)
    for rank in (1, 5):
        windows = _opened(layout.dispatch_ring(2), rank)
        yield (
            f"windows dispatch_recv of rank {rank}",
            lambda windows=windows: kernels.dispatch_recv(
                windows, layout, 512, None, totals_dtype=torch.int64, digest=1, timeout=1.0
            ),
        )
    yield (
        "windows dispatch_send after a plan",
        lambda: kernels.dispatch_send(
            windows, layout, x, ids, weights, None, _copies(4096), digest=1
        ),
    )
    yield (
        "windows dispatch_totals",
        lambda: kernels.dispatch_totals(windows, layout, digest=1, timeout=1.0),
    )
    positions = SlotPositions(ids[0], ids.view(-1))
    combine = _opened(layout.combine_ring(2))
    yield (
        "windows combine_recv of shared experts",
        lambda: kernels.combine_recv(
            combine, layout, ids, positions, weights, None, None, torch.zeros_like(x), None,
            digest=1, timeout=1.0,
        ),
    )  # fmt: skip
    yield "windows record", lambda: kernels.send_record(windows, digest=1, status=1)
    yield "windows wait", lambda: kernels.recv_records(windows, digest=1, timeout=1.0)


def _layout(
    fmt: RowFormat, returned: RowFormat, *, per_expert: bool = False, max_tokens: int = TOKENS
) -> ExchangeLayout:
    return ExchangeLayout(
        world_size=8,
        num_experts=EXPERTS,
        experts_per_rank=EXPERTS // 8,
        top_k=TOP_K,
        max_tokens=max_tokens,
        row_format=fmt,
        return_format=returned,
        capacity=max_tokens * TOP_K,
        per_expert=per_expert,
        weight_dtype=torch.float32,
    )


def _opened(ring: Ring, rank: int = 1) -> Windows:
    """Windows without memory."""
    words = torch.zeros(32, dtype=torch.int32)
    bases = torch.zeros(8, dtype=torch.int64)
    return Windows(0, rank, ring, bases, words[:8], words[8:16], words[16:17])
