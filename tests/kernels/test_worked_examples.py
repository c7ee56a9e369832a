"""The worked examples of the contract through the kernels alone, with their numbers as literals.

One process plays all ranks: what one pushes the others pack, what they return it sums. So these are
the steps of dispatch and combine as the transports string them together, each by its kernel, and
nothing of transports, windows or flags. Ids are the numbers of the examples.
"""

from __future__ import annotations

import definition
import pytest
import torch
from worked_examples import (
    BASIC,
    COMM_QUANTISED_BF16,
    COMM_QUANTISED_FP16,
    QUANTISED,
    SHARED,
    TENSOR_PARALLEL,
    TWO_SHARED,
    ZERO_COMPUTATION,
    dynamic_scales,
    expert_bits,
)

from moe_triton import kernels
from moe_triton.layout import NOWHERE, DispatchHeader, Norm, RowFormat, ZeroComputationExperts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16 = torch.bfloat16
POISON = 0xAA


class Plane:
    """All ranks of one expert-parallel group; lists go by rank.

    Attributes:
        fmt: how tokens travel.
        ids: (BS, K), ``NOWHERE`` where a slot is not active.
        rows: what each rank pushed.
        headers: by destination, then source.
        found: what each rank numbered of the rows that it receives.
    """

    def __init__(self, group, tokens, device):
        self.group, self.tokens, self.device = group, tokens, device
        self.dtype = definition.TORCH_DTYPES[group.dtype]
        quant = "int8" if group.quant_mode else None
        self.fmt = RowFormat.quantized(quant, self.dtype, group.hidden)
        self.num_slots = group.top_k + group.num_shared
        self.ids = [self.on_device(self.active_ids(mine)) for mine in tokens]
        self.headers = [[self.header() for _ in tokens] for _ in tokens]
        self.rows = [self.dispatch_send(source) for source in range(group.world_size)]
        self.found = [
            kernels.recv_permutation(self.counts(rank)) for rank in range(group.world_size)
        ]

    def on_device(self, values):
        return None if values is None else torch.as_tensor(values).to(self.device)

    def floats(self, bits):
        return (
            None if bits is None else definition.to_tensor(bits, self.group.dtype).to(self.device)
        )

    def empty(self, *shape, dtype):
        bytes_ = torch.full((*shape[:-1], shape[-1] * dtype.itemsize), POISON, dtype=torch.uint8)
        return bytes_.view(dtype).to(self.device)

    def active_ids(self, mine):
        if mine.mask is None:
            return mine.ids
        return torch.from_numpy(mine.ids).masked_fill(~torch.from_numpy(mine.mask), NOWHERE)

    def header(self):
        slot_ids = max(mine.ids.size for mine in self.tokens)
        sizes = (1, self.group.num_experts, slot_ids)
        numbers = [self.empty(size, dtype=torch.int32) for size in sizes]
        return DispatchHeader(*numbers, self.empty(slot_ids, dtype=torch.float32))

    def dispatch_send(self, source):
        """This rank's rows, and its header at every rank."""
        group, mine, ids = self.group, self.tokens[source], self.ids[source]
        smooth_scales = self.on_device(mine.scales)
        rows = self.empty(len(ids) * self.num_slots, self.fmt.stride, dtype=torch.uint8)
        kernels.dispatch_send(
            self.floats(mine.x),
            ids,
            self.on_device(mine.weights),
            smooth_scales,
            self.fmt,
            kernels.routing_plan(ids, group.num_experts),
            rows,
            [headers[source] for headers in self.headers],
            experts_per_rank=group.experts_per_rank,
            shared_targets=[group.shared_home(j, source) for j in range(group.num_shared)],
            num_shared_ranks=group.shared_ranks,
        )
        return rows

    def counts(self, rank):
        """[L, W] of the headers that a rank has got."""
        group, headers = self.group, self.headers[rank]
        if rank >= group.shared_ranks:
            first = (rank - group.shared_ranks) * group.experts_per_rank
            all_counts = torch.stack([header.counts for header in headers], dim=1)
            return all_counts[first : first + group.experts_per_rank]
        served = [
            any(group.shared_home(j, source) == rank for j in range(group.num_shared))
            for source in range(group.world_size)
        ]
        num_tokens = torch.cat([header.num_tokens for header in headers])
        return (num_tokens * self.on_device(served))[None].int()

    def slot_ids(self, rank):
        """Per received row its source, its token * (K + NS) + slot there, and its weight."""
        headers, found = self.headers[rank], self.found[rank]
        rows = zip(found.source.tolist(), found.copy.tolist(), strict=True)
        return [(s, int(headers[s].slot_ids[c]), float(headers[s].weights[c])) for s, c in rows]

    def gather_rows(self, rank):
        """expand_x and dynamic_scales of a rank."""
        index, before = [], torch.tensor([0, *map(len, self.rows)]).cumsum(0)
        for source, copy, _ in self.slot_ids(rank):
            # A row for each slot, where each has factors of its own; else one for a token.
            place = copy if self.tokens[source].scales is not None else copy // self.num_slots
            index.append(int(before[source]) + place)
        index = torch.tensor(index, dtype=torch.int64, device=self.device)
        x = self.empty(len(index), self.group.hidden, dtype=self.fmt.dtype)
        scales = None
        if self.group.quant_mode:
            scales = self.empty(len(index), dtype=torch.float32)
        kernels.gather_rows(torch.cat(self.rows), index, self.fmt, x, scales)
        return x, scales

    def combine(self, returned):
        """The sums of every rank's tokens, from the [n, H] rows that each rank returns."""
        group, fmt = self.group, RowFormat.tight(self.dtype, self.group.hidden)
        if group.comm_quant_mode:
            fmt = RowFormat.tight(torch.int8, group.hidden, "block8", self.dtype, 8)
        windows = []
        for rows in returned:
            windows.append(self.empty(len(rows), fmt.stride, dtype=torch.uint8))
            kernels.encode(rows, fmt, windows[-1])
        index = [torch.full((len(ids), self.num_slots), NOWHERE) for ids in self.ids]
        before = 0
        for rank, window in enumerate(windows):
            for row, (source, copy, _) in enumerate(self.slot_ids(rank)):
                index[source].view(-1)[copy] = before + row
            before += len(window)
        outs = []
        for rank, mine in enumerate(self.tokens):
            out = self.empty(len(mine.ids), group.hidden, dtype=self.dtype)
            weights, where = self.on_device(mine.weights), index[rank].to(self.device)
            kernels.weighted_sum(
                torch.cat(windows), where, fmt, weights, self.special(rank), None, out
            )
            outs.append(out)
        return outs

    def special(self, rank):
        group, mine = self.group, self.tokens[rank]
        first_copy = group.num_experts + group.zero_experts
        first_constant = first_copy + group.copy_experts
        end = first_constant + group.const_experts
        if end == group.num_experts:
            return None
        tensors = map(self.floats, (mine.ori_x, mine.alpha_1, mine.alpha_2, mine.const_v))
        return ZeroComputationExperts(self.ids[rank], first_copy, first_constant, end, *tensors)


def check_dispatch(plane, example, ranks):
    """What each rank received; ``ranks`` are the world ranks of the plane."""
    for rank, world_rank in enumerate(ranks):
        x, scales = plane.gather_rows(rank)
        own = len(example.rows[world_rank])
        assert x.tolist() == example.expand_x[world_rank][:own]
        if scales is not None:
            assert scales.tolist() == dynamic_scales(example, world_rank).tolist()
        size = plane.group.world_size * plane.group.num_local(rank)
        assert (
            plane.found[rank].recv_counts_cumsum.tolist()
            == example.ep_recv_counts[world_rank][:size]
        )
        triples = [(s, *divmod(copy, plane.num_slots)) for s, copy, _ in plane.slot_ids(rank)]
        assert triples == example.rows[world_rank]
        if example.expand_scales is not None:
            weights = [weight for *_, weight in plane.slot_ids(rank)]
            assert weights == example.expand_scales[world_rank]


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(BASIC, id="12.1"),
        pytest.param(SHARED, id="12.2"),
        pytest.param(TWO_SHARED, id="12.2, two shared experts"),
        pytest.param(QUANTISED, id="12.3"),
        pytest.param(COMM_QUANTISED_BF16, id="12.6, bf16"),
        pytest.param(COMM_QUANTISED_FP16, id="12.6, fp16"),
        pytest.param(ZERO_COMPUTATION, id="12.8"),
    ],
)
def test_dispatch_and_combine(example, device):
    ranks = range(example.group.world_size)
    plane = Plane(example.group, example.tokens, device)
    check_dispatch(plane, example, ranks)
    for found, wanted in zip(
        plane.combine([plane.floats(expert_bits(example, rank)) for rank in ranks]),
        example.combined,
        strict=True,
    ):
        assert found.tolist() == wanted


def test_tensor_parallel(device):
    """12.4: two planes, whose ranks exchange rows and add up what their halves return."""
    example = TENSOR_PARALLEL
    planes = [Plane(example.group, example.tokens[tp::2], device) for tp in range(2)]
    own = [[len(example.rows[2 * ep + tp]) for ep in range(2)] for tp in range(2)]
    for tp, plane in enumerate(planes):
        check_dispatch(plane, example, [tp, 2 + tp])
    for tp, plane in enumerate(planes):
        sums = []
        for ep in range(2):
            mine, peers = (
                plane.floats(expert_bits(example, world_rank))
                for world_rank in (2 * ep + tp, 2 * ep + 1 - tp)
            )
            num_mine, num_peers = own[tp][ep], own[1 - tp][ep]
            sums.append(plane.empty(num_mine, 2, dtype=BF16))
            # A rank's own rows come first, so that they follow the peer's own rows there.
            kernels.add_rows(mine[:num_mine], peers[num_peers : num_peers + num_mine], sums[-1])
        for ep, found in enumerate(plane.combine(sums)):
            assert found.tolist() == example.combined[2 * ep + tp]


@pytest.mark.parametrize(
    "quant, scales, codes, values",
    [
        pytest.param(
            "mx_e4m3",
            [121, 0],
            "7a fe 5a 32 70 68",
            [320, -448, 20, 0.625, 128, 64],
            id="12.7, MX e4m3",
        ),
        pytest.param(
            "mx_e5m2",
            [114, 0],
            "79 fb 69 55 74 70",
            [40960, -57344, 2560, 80, 16384, 8192],
            id="12.7, MX e5m2",
        ),
        pytest.param(
            "group_e4m3",
            [0.0167410708963871],
            "79 fe 59 32 6f 67",
            [288, -448, 18, 0.625, 120, 60],
            id="12.7, group e4m3",
        ),
        pytest.param(
            "group_e5m2",
            [0.00013078961637802422],
            "79 fb 68 55 73 6f",
            [40960, -57344, 2048, 80, 14336, 7168],
            id="12.7, group e5m2",
        ),
    ],
)
def test_float8(quant, scales, codes, values, device):
    """Written to a window and packed from there, and gathered at once on a rank alone."""
    row = [5, -7.5, 0.30078125, 0.010009765625, 2, 1] + [0] * 58
    x = torch.tensor([row], dtype=BF16, device=device)
    fmt = RowFormat.quantized(quant, BF16, 64)
    window = torch.full((1, fmt.stride), POISON, dtype=torch.uint8, device=device)
    kernels.encode(x, fmt, window)
    here = torch.zeros((1, 1), dtype=torch.int64, device=device)
    for step in ("gather_rows", "gather_quant"):
        bytes_ = torch.full((1, 64), POISON, dtype=torch.uint8, device=device)
        out = bytes_.view(fmt.dtype)
        found = torch.empty((1, fmt.num_scales), dtype=fmt.scale_dtype, device=device)
        if step == "gather_rows":
            kernels.gather_rows(window, here[0], fmt, out, found)
        else:
            kernels.gather_quant(x, here, fmt, None, None, out, found)
        assert found.tolist() == [scales]
        assert bytes(bytes_[0, :6].tolist()) == bytes.fromhex(codes)
        assert out[0].float().tolist() == values + [0.0] * 58


def test_residual_and_norm(device):
    """12.9: one rank, one expert that changes nothing."""

    def bf16(*numbers):
        return torch.tensor(numbers, dtype=BF16, device=device)

    x, fmt = bf16([1, 2, 3, 4]), RowFormat.tight(BF16, 4)
    returned, total, y = (torch.full_like(x, float("nan")) for _ in range(3))
    here = torch.zeros((1, 1), dtype=torch.int64, device=device)
    kernels.gather_quant(x, here, fmt, None, None, returned)
    window = torch.full((1, fmt.stride), POISON, dtype=torch.uint8, device=device)
    kernels.encode(returned, fmt, window)
    weights, rstd = torch.ones((1, 1), device=device), torch.zeros(1, device=device)
    norm = Norm(bf16([1, 1, -1, 0]), bf16(1, 0.5, 2, 1), 1e-6, y, rstd)
    kernels.weighted_sum(window, here, fmt, weights, None, None, total, norm)
    assert total.tolist() == [[2, 3, 2, 4]]
    assert rstd.tolist() == [pytest.approx(0.34815528988838196, rel=1e-6)]
    assert y.tolist() == [[0.6953125, 0.5234375, 1.390625, 1.390625]]
