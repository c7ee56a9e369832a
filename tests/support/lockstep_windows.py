"""All ranks of a group in one process and one tensor of windows, for tests of the window steps.

The expected results come from loops over tokens and slots, one at a time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from moe_triton import ref
from moe_triton.layout import (
    NOWHERE,
    ExchangeLayout,
    Norm,
    Ring,
    RoutingCopies,
    RowFormat,
    Windows,
    ZeroComputationExperts,
)
from moe_triton.layout.windows import (
    DATA_SLOT,
    PROBLEM_WORDS,
    RECEIVED,
    SENT,
    STATE_WORDS,
)

POISON = 0xA5
DIGEST = 77
KINDS = ("dispatch", "combine")


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of an exchange; attributes as in ``ExchangeLayout`` and ``MoeConfig``."""

    world_size: int = 3
    experts_per_rank: int = 2
    top_k: int = 3
    max_tokens: int = 6
    hidden: int = 40
    num_shared_experts: int = 0
    num_shared_ranks: int = 0
    dtype: torch.dtype = torch.bfloat16
    quant: str | None = None
    per_expert: bool = False
    with_weights: bool = True
    alignment: int = 1
    max_rows: int | None = None
    quant_return: bool = False
    num_copy: int = 0
    num_constant: int = 0
    seed: int = 0

    @property
    def num_experts(self) -> int:
        return self.experts_per_rank * (self.world_size - self.num_shared_ranks)

    @property
    def num_slots(self) -> int:
        return self.top_k + self.num_shared_experts

    def layout(self) -> ExchangeLayout:
        replicas = self.num_shared_ranks // max(self.num_shared_experts, 1) or 1
        most = self.max_tokens * self.world_size * min(self.experts_per_rank, self.top_k)
        shared = self.max_tokens * -(-self.world_size // replicas)
        if self.max_rows is not None:
            most, shared = min(most, self.max_rows), min(shared, self.max_rows)
        returned = RowFormat.tight(self.dtype, self.hidden)
        if self.quant_return:
            returned = RowFormat.tight(torch.int8, self.hidden, "block8", self.dtype, 8)
        return ExchangeLayout(
            world_size=self.world_size,
            num_experts=self.num_experts,
            experts_per_rank=self.experts_per_rank,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            row_format=RowFormat.quantized(self.quant, self.dtype, self.hidden),
            return_format=returned,
            capacity=most + self.experts_per_rank * (self.alignment - 1),
            shared_capacity=shared + self.alignment - 1,
            num_shared_experts=self.num_shared_experts,
            num_shared_ranks=self.num_shared_ranks,
            alignment=self.alignment,
            per_expert=self.per_expert,
            weight_dtype=torch.promote_types(self.dtype, torch.float32)
            if self.with_weights
            else None,
        )


@dataclasses.dataclass
class Tokens:
    """The input of one rank."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    smooth_scales: torch.Tensor | None


class Group:
    """The windows of all ranks, poisoned, in one tensor.

    Attributes:
        case: the sizes.
        windows: by kind, then rank.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        slots: int = 2,
        data_slots: int = 1,
        epoch: int = 0,
        hard: bool = False,
    ) -> None:
        self.case, self.device, self.layout = case, device, case.layout()
        rings = self.layout.dispatch_ring(slots), self.layout.combine_ring(slots, data_slots)
        problems = [self.words(PROBLEM_WORDS) for _ in range(case.world_size)]
        self.windows = {
            kind: self._open(number, ring, problems, epoch, hard)
            for number, (kind, ring) in enumerate(zip(KINDS, rings, strict=True))
        }

    def words(self, number: int) -> torch.Tensor:
        return torch.zeros(number, dtype=torch.int32, device=self.device)

    def _open(
        self, number: int, ring: Ring, problems: list[torch.Tensor], epoch: int, hard: bool
    ) -> list[Windows]:
        world, gap = self.case.world_size, 48
        size = ring.num_bytes + gap
        span = torch.full((world * size + 16,), POISON, dtype=torch.uint8, device=self.device)
        span = span[-span.data_ptr() % 16 :][: world * size]
        # Neighbours in memory are not neighbours in rank.
        places = torch.randperm(world, generator=torch.Generator().manual_seed(world)).tolist()
        blocks = [span[place * size : place * size + ring.num_bytes] for place in places]
        bases = torch.tensor(
            [block.data_ptr() for block in blocks], dtype=torch.int64, device=self.device
        )
        opened = []
        for rank, block in enumerate(blocks):
            ring.clear(block, world, epoch)
            state = self.words(STATE_WORDS)
            state[SENT] = state[RECEIVED] = epoch
            state[DATA_SLOT] = 0
            notice = torch.zeros(1, dtype=torch.int32)

            span_of = span if self.device.type == "cpu" else None
            windows = Windows(
                number, rank, ring, bases, state, problems[rank], notice, block, hard, span_of,
            )  # fmt: skip
            opened.append(windows)
        return opened

    # Inputs.

    def draw(self, number: int = 0) -> list[Tokens]:
        """The tokens of every rank in one round."""
        case = self.case
        generator = torch.Generator().manual_seed(1000 * case.seed + number)
        smooth = None
        if case.per_expert:
            shape = (case.num_shared_experts + case.num_experts, case.hidden)
            smooth = 0.5 + torch.rand(shape, generator=generator)
        elif case.quant == "int8_static":
            smooth = 50 * torch.rand(case.hidden, generator=generator)
        tokens = []
        last = case.num_experts + 1 + case.num_copy + case.num_constant  # one zero expert
        for _ in range(case.world_size):
            most = case.max_tokens
            n = int(torch.randint(0, most + 1, (1,), generator=generator))
            ids = torch.full((n, case.top_k), NOWHERE)
            for t in range(n):
                width = max(last, case.top_k)
                ids[t] = torch.randperm(width, generator=generator)[: case.top_k]
            ids[ids >= last] = NOWHERE
            ids[torch.rand(n, generator=generator) < 0.2] = NOWHERE
            tokens.append(
                Tokens(
                    torch.randn((n, case.hidden), generator=generator).to(case.dtype),
                    ids.int(),
                    torch.rand((n, case.top_k), generator=generator).to(
                        torch.promote_types(case.dtype, torch.float32)
                    ),
                    smooth,
                )
            )
        return [
            Tokens(
                *(
                    None if value is None else value.to(self.device)
                    for value in dataclasses.astuple(mine)
                )
            )
            for mine in tokens
        ]

    # Expectations: (source, token, slot) of each row, or None for padding.

    def expected_rows(self, tokens: list[Tokens], rank: int) -> list[list[tuple[int, int, int]]]:
        """The rows of each local expert, without padding."""
        case, first = self.case, self.layout.first_expert(rank)
        if first < 0:
            slot = case.top_k + rank // self.layout.shared_replicas
            return [
                [
                    (source, t, slot)
                    for source, mine in enumerate(tokens)
                    if rank in self.layout.shared_ranks_of(source)
                    for t, ids in enumerate(mine.ids.tolist())
                    if any(i != NOWHERE for i in ids)
                ]
            ]
        return [
            [
                (source, t, k)
                for source, mine in enumerate(tokens)
                for t, ids in enumerate(mine.ids.tolist())
                for k, expert in enumerate(ids)
                if expert == first + local
            ]
            for local in range(case.experts_per_rank)
        ]

    def encoded(self, mine: Tokens) -> torch.Tensor:
        """[T, K + NS, stride] the row of every slot."""
        case, fmt = self.case, self.layout.row_format
        slots = torch.zeros((len(mine.x), case.num_slots, fmt.stride), dtype=torch.uint8)
        x = mine.x.cpu()
        smooth = None if mine.smooth_scales is None else mine.smooth_scales.cpu()
        for k in range(case.num_slots):
            factors = smooth
            if case.per_expert and smooth is not None:
                if k < case.top_k:
                    expert = mine.ids[:, k].cpu().long().clamp(0, case.num_experts - 1)
                    factors = smooth[case.num_shared_experts + expert]
                else:
                    factors = smooth[k - case.top_k].expand(len(x), -1)
            ref.encode(x, fmt, slots[:, k], factors)
        return slots

    def check_received(
        self, received: Any, tokens: list[Tokens], rank: int, num_rows: int
    ) -> list[tuple[int, int, int] | None]:
        """Compare the output of ``dispatch_recv``; the origin of each of its rows."""
        case, layout, fmt = self.case, self.layout, self.layout.row_format
        by_expert = self.expected_rows(tokens, rank)
        counts = torch.tensor(
            [[sum(s == source for s, _, _ in rows) for source in range(case.world_size)]
             for rows in by_expert], dtype=torch.int32,
        )  # fmt: skip
        room = min(num_rows, layout.rank_capacity(rank))
        permutation = ref.recv_permutation(counts, layout.alignment, room)
        exact = {
            "counts": counts,
            "recv_counts_cumsum": permutation.recv_counts_cumsum,
            "offsets": permutation.offsets,
            "group_starts": permutation.group_starts,
            "totals": counts.sum(1),
            "source": permutation.source,
        }
        for name, wanted in exact.items():
            got = getattr(received, name)
            assert got.tolist() == wanted.tolist(), name
            dtypes = {"source": torch.int64, "totals": torch.int64}
            assert got.dtype == dtypes.get(name, torch.int32), name
        order: list[tuple[int, int, int] | None] = []
        for rows in by_expert:
            order += rows
            order += [None] * (-len(rows) % layout.alignment)
        order = order[:room]
        slot_ids = [NOWHERE if row is None else row[1] * case.num_slots + row[2] for row in order]
        assert received.slot_ids.tolist() == slot_ids + [NOWHERE] * (room - len(slot_ids))
        encoded = [self.encoded(mine) for mine in tokens]
        empty = torch.zeros(fmt.stride, dtype=torch.uint8)
        sent = [empty if row is None else encoded[row[0]][row[1], row[2]] for row in order]
        wanted = torch.stack(sent) if sent else empty.new_empty((0, fmt.stride))
        assert same_bits(received.x[: len(order)], fmt.payload(wanted))
        assert received.x.shape == (num_rows, case.hidden)
        if fmt.scale_offset is not None:
            scales = received.scales[: len(order)].reshape(len(order), fmt.num_scales)
            assert same_bits(scales, fmt.scales(wanted))
        if case.with_weights:
            for i, row in enumerate(order):
                weight = 0.0
                if row is not None:
                    source, t, k = row
                    weight = float(tokens[source].weights[t, k]) if k < case.top_k else 1.0
                assert float(received.weights[i]) == weight
        return order

    def expert_output(self, rank: int, order: list, number: int) -> torch.Tensor:
        """[n, H] random rows, NaN where nothing is sent back."""
        generator = torch.Generator().manual_seed(17 * number + rank)
        shape = (max(len(order), 1), self.case.hidden)
        y = torch.randn(shape, generator=generator).to(self.case.dtype)[: len(order)]
        for i, row in enumerate(order):
            if row is None:
                y[i] = math.nan
        return y.to(self.device)

    def zero_computation(self, mine: Tokens) -> ZeroComputationExperts | None:
        """Copy and constant experts of a rank's tokens."""
        case = self.case
        if not case.num_copy + case.num_constant:
            return None
        generator = torch.Generator().manual_seed(case.seed)
        alphas = value = (None, None), None
        if case.num_constant:
            alpha = torch.randn((2, case.num_constant), generator=generator).to(case.dtype)
            value = torch.randn((case.num_constant, case.hidden), generator=generator)
            alphas, value = alpha.to(self.device).unbind(), value.to(case.dtype).to(self.device)
        else:
            alphas, value = (None, None), None
        first = case.num_experts + 1
        return ZeroComputationExperts(
            mine.ids,
            first,
            first + case.num_copy,
            first + case.num_copy + case.num_constant,
            mine.x,
            *alphas,
            value,
        )

    def expected_slots(
        self, orders: list[list], outputs: list[torch.Tensor], tokens: list[Tokens], rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of all ranks as they travel, [N, stride], and the index of each slot's row."""
        fmt = self.layout.return_format
        index = torch.full((len(tokens[rank].ids), self.case.num_slots), NOWHERE)
        rows, number = [], 0
        for order, y in zip(orders, outputs, strict=True):
            encoded = torch.zeros((len(y), fmt.stride), dtype=torch.uint8)
            ref.encode(y.cpu(), fmt, encoded)
            for i, row in enumerate(order):
                if row is not None and row[0] == rank:
                    index[row[1], row[2]] = number + i
            rows.append(encoded)
            number += len(order)
        return torch.cat(rows), index

    # A round of all ranks in lockstep.

    def round(self, steps: Any, number: int = 0, *, in_place: bool = False) -> None:
        """A dispatch and a combine of every rank, each result compared."""
        case, layout = self.case, self.layout
        tokens, ranks = self.draw(number), range(case.world_size)
        dispatch, combine = self.windows["dispatch"], self.windows["combine"]
        sent = []
        for rank, mine in enumerate(tokens):
            copies = RoutingCopies(
                torch.empty_like(mine.ids), mine.weights, torch.empty_like(mine.weights)
            )
            positions = steps.dispatch_send(
                dispatch[rank], layout, mine.x, mine.ids, mine.weights, mine.smooth_scales, copies,
                digest=DIGEST,
            )  # fmt: skip
            plan = ref.routing_plan(mine.ids.cpu(), case.num_experts)
            assert positions.counts.tolist() == plan.counts.tolist()
            assert positions.position_in_expert.tolist() == plan.position_in_expert.tolist()
            assert torch.equal(copies.expert_ids, mine.ids)
            assert torch.equal(copies.weights_copy, mine.weights)
            sent.append(positions)
        orders, received = [], []
        for rank in ranks:
            totals = steps.dispatch_totals(dispatch[rank], layout, digest=DIGEST, timeout=0)
            rows = [sum(map(len, self.expected_rows(tokens, r))) for r in ranks]
            own = sum(
                len(expert) + -len(expert) % case.alignment
                for expert in self.expected_rows(tokens, rank)
            )
            assert totals.tolist() == [*rows, own]
            num_rows = layout.rank_capacity(rank) + 2 * (number % 2)
            load = torch.full((layout.num_local_experts(rank),), 5, device=self.device)
            result = steps.dispatch_recv(
                dispatch[rank], layout, num_rows, load,
                totals_dtype=torch.int64, digest=DIGEST, timeout=0,
            )  # fmt: skip
            orders.append(self.check_received(result, tokens, rank, num_rows))
            assert (load - 5).tolist() == result.totals.tolist()
            received.append(result)
        outputs = [self.expert_output(rank, orders[rank], number) for rank in ranks]
        for rank, y in enumerate(outputs):
            group_starts, count = received[rank].group_starts, received[rank].offsets[-1:]
            place = None
            if in_place:
                layout.output_rows(combine[rank], len(y))[:] = y
            else:
                place = torch.cat([y, y.new_full((1, case.hidden), math.nan)])
            steps.combine_send(combine[rank], layout, place, group_starts, count, digest=DIGEST)
        for rank, mine in enumerate(tokens):
            self._check_combine(steps, rank, mine, sent[rank], orders, outputs, tokens)
        for kind in KINDS:
            for windows in self.windows[kind]:
                assert not windows.problem.any()

    def exchanged(self, steps: Any, number: int = 0) -> tuple[list, list, list]:
        """Tokens of all ranks, and what their dispatch returns where they are sent and received."""
        tokens, dispatch, layout = self.draw(number), self.windows["dispatch"], self.layout
        positions = [
            steps.dispatch_send(
                windows, layout, mine.x, mine.ids, mine.weights, None, None, digest=DIGEST
            )
            for windows, mine in zip(dispatch, tokens, strict=True)
        ]
        received = [
            steps.dispatch_recv(
                windows, layout, layout.capacity, None,
                totals_dtype=torch.int64, digest=DIGEST, timeout=0,
            )
            for windows in dispatch
        ]  # fmt: skip
        return tokens, positions, received

    def returned(self, steps: Any, received: list) -> None:
        """All ranks send back what they received."""
        for windows, rows in zip(self.windows["combine"], received, strict=True):
            starts, count = rows.group_starts, rows.offsets[-1:]
            steps.combine_send(windows, self.layout, rows.x, starts, count, digest=DIGEST)

    def _check_combine(self, steps, rank, mine, positions, orders, outputs, tokens) -> None:
        case, layout = self.case, self.layout
        combine = self.windows["combine"][rank]
        rows, index = self.expected_slots(orders, outputs, tokens, rank)
        shape, fmt = mine.x.shape, layout.return_format
        special, weights = self.zero_computation(mine), mine.weights
        addend = mine.x if case.seed % 3 == 1 else None
        norm = None
        if case.seed % 2 and case.dtype in (torch.bfloat16, torch.float16) and not case.quant:
            gamma = torch.ones(case.hidden, dtype=case.dtype, device=self.device)
            norm = Norm(
                mine.x, gamma, 1e-6, torch.empty_like(mine.x),
                torch.empty(len(mine.x), device=self.device),
            )  # fmt: skip
        out = torch.full(shape, math.nan, dtype=case.dtype, device=self.device)
        steps.combine_recv(
            combine, layout, mine.ids, positions, weights, special, addend, out, norm,
            digest=DIGEST, timeout=0,
        )  # fmt: skip
        wanted = torch.full(shape, math.nan, dtype=case.dtype)
        cpu = [None if part is None else _to_cpu(part) for part in (special, norm)]
        if cpu[1] is not None:
            fresh = torch.empty_like(cpu[1].y), torch.empty_like(cpu[1].rstd)
            cpu[1] = cpu[1]._replace(y=fresh[0], rstd=fresh[1])
        ref.weighted_sum(
            rows, index, fmt, weights.cpu(), cpu[0], None if addend is None else addend.cpu(),
            wanted, cpu[1],
        )  # fmt: skip
        assert same_bits(out, wanted)
        if norm is not None:
            torch.testing.assert_close(norm.rstd.cpu(), cpu[1].rstd, rtol=1e-5, atol=0)


def _to_cpu(part: Any) -> Any:
    values = [value.cpu() if isinstance(value, torch.Tensor) else value for value in part]
    return type(part)(*values)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors have equal dtypes and bytes."""
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
