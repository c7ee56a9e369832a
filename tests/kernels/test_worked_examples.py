"""The worked examples of the contract through the kernels, with their numbers as literals.

One process plays all ranks: it stages the rows of each, gathers them for the others and sums what
the experts return. These are the steps of dispatch and combine in the order of the transports,
without transports, windows or flags. Test ids are the numbers of the examples.
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
from moe_triton.layout import NOWHERE, DispatchHeader, RowFormat, ZeroComputationExperts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16 = torch.bfloat16
POISON = 0xAA


class Plane:
    """All ranks of one expert-parallel group; lists go by rank.

    Attributes:
        fmt: how tokens travel.
        ids: (BS, K), ``NOWHERE`` where a slot is not active.
        rows: staged by each rank.
        headers: by destination, then source.
        permutations: the order of the rows that each rank receives.
    """

    def __init__(self, group, tokens, device):
        self.group, self.tokens, self.device = group, tokens, device
        self.dtype = definition.TORCH_DTYPES[group.dtype]
        quant = "int8" if group.quant_mode else None
        self.fmt = RowFormat.quantized(quant, self.dtype, group.hidden)
        self.num_slots = group.top_k + group.num_shared
        self.ids = [self.on_device(self.active_ids(mine)) for mine in tokens]
        self.headers = [[self.header() for _ in tokens] for _ in tokens]
        self.rows = [self.stage_tokens(source) for source in range(group.world_size)]
        self.permutations = [
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

    def stage_tokens(self, source):
        """This rank's rows, and its header at every rank."""
        group, mine, ids = self.group, self.tokens[source], self.ids[source]
        smooth_scales = self.on_device(mine.scales)
        rows = self.empty(len(ids) * self.num_slots, self.fmt.stride, dtype=torch.uint8)
        kernels.stage_tokens(
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
        """[L, W] counts of the headers of a rank."""
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
        headers, permutation = self.headers[rank], self.permutations[rank]
        rows = zip(permutation.source.tolist(), permutation.index_in_source.tolist(), strict=True)
        return [(s, int(headers[s].slot_ids[c]), float(headers[s].weights[c])) for s, c in rows]

    def gather_rows(self, rank):
        """expand_x and dynamic_scales of a rank."""
        index, before = [], torch.tensor([0, *map(len, self.rows)]).cumsum(0)
        for source, slot_id, _ in self.slot_ids(rank):
            # With factors for each expert every slot has a row, else every token.
            row = slot_id if self.tokens[source].scales is not None else slot_id // self.num_slots
            index.append(int(before[source]) + row)
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
            for row, (source, slot_id, _) in enumerate(self.slot_ids(rank)):
                index[source].view(-1)[slot_id] = before + row
            before += len(window)
        outs = []
        for rank, mine in enumerate(self.tokens):
            out = self.empty(len(mine.ids), group.hidden, dtype=self.dtype)
            weights, where = self.on_device(mine.weights), index[rank].to(self.device)
            kernels.weighted_sum(
                torch.cat(windows), where, fmt, weights, self.zero_computation(rank), None, out
            )
            outs.append(out)
        return outs

    def zero_computation(self, rank):
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
            plane.permutations[rank].recv_counts_cumsum.tolist()
            == example.ep_recv_counts[world_rank][:size]
        )
        triples = [(s, *divmod(slot_id, plane.num_slots)) for s, slot_id, _ in plane.slot_ids(rank)]
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
    for actual, wanted in zip(
        plane.combine([plane.floats(expert_bits(example, rank)) for rank in ranks]),
        example.combined,
        strict=True,
    ):
        assert actual.tolist() == wanted


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
        for ep, actual in enumerate(plane.combine(sums)):
            assert actual.tolist() == example.combined[2 * ep + tp]
