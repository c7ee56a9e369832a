"""Cases of ``bench kernels``: shapes of models, and inputs, bytes and check of each kernel.

One rank: rows of experts are in (expert, token) order, and every slot is sent. Bytes follow from
the formula of the kernel's docstring, which ``FORMULAS`` repeats; a test compares the two.

Letters: T tokens, H hidden size, E experts, K experts per token, S slots of a token, n rows,
b bytes of an element, N = T * K.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from .. import kernels, ref, testing
from ..kernels import launch_config
from ..layout import Norm, RoutingPlan, RowFormat
from .models import Shape

BF16, FP32 = torch.bfloat16, torch.float32
EPSILON = 1e-6
# RMSNorm sums squares in another order, and bf16 has 8 bits. Libraries differ in the last bits of
# exp, so scores of gating differ too.
CLOSE = {"y": 1.6e-2, "rstd": 1e-5, "scores": 2e-6}


TINY = Shape("tiny", 128, 8, 2)

FORMULAS = {
    "routing_plan": "few: reads N * 4 for each program; many: about N * 16 + B * E * 12",
    "gather_quant": (
        "reads T * H * x.itemsize, writes n * (H * b + C * scale bytes) for the n rows that are "
        "named"
    ),
    "weighted_sum": (
        "reads T * S * H * b, and T * H * b for each of tokens, addend and residual; writes "
        "T * H * b, with a norm twice that"
    ),
    "gather_rows": "2 * n * (H * b + scale bytes), b bytes an element",
    "top_k_gating": "gating reads and writes T * E numbers",
}

Tensors = dict[str, torch.Tensor]
Call = Callable[[], Tensors]


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    Attributes:
        kernel: its name in ``moe_triton.kernels``.
        variant: the format or option, or "".
        shape: of the model.
        tokens: T.
        inputs: tensors by name.
        outputs: makes the output tensors of the kernel, poisoned; none for a kernel that returns
            new ones.
        bind: ``bind(steps, inputs, outputs)`` returns a function that makes one launch and returns
            the results by name; ``steps`` is ``kernels`` or ``ref``.
        num_bytes: that the kernel reads and writes.
    """

    kernel: str
    variant: str
    shape: Shape
    tokens: int
    inputs: Tensors
    outputs: Callable[[], Tensors]
    bind: Callable[[Any, Tensors, Tensors], Call]
    num_bytes: int

    world_size = 1

    @property
    def name(self) -> str:
        """Kernel and variant."""
        return f"{self.kernel} {self.variant}".strip()

    def sets(self, count: int) -> list[tuple[Tensors, Tensors]]:
        """``count`` sets of inputs and outputs, each in memory of its own."""
        sets = [(self.inputs, self.outputs())]
        while len(sets) < count:
            sets.append(({name: x.clone() for name, x in self.inputs.items()}, self.outputs()))
        return sets


def check(case: Case) -> None:
    """Raise unless the kernel equals ``ref``, bit for bit where that is promised."""
    actual = case.bind(kernels, case.inputs, case.outputs())()
    expected = case.bind(ref, case.inputs, case.outputs())()
    where = f"{case.name}, {case.shape.model}, {case.tokens} tokens"
    if case.kernel == "top_k_gating":
        # The last bit of a score may decide between two experts: compare with the choice that
        # follows from the kernel's own scores.
        order = actual["scores"].argsort(dim=1, descending=True, stable=True)
        ids = order[:, : case.shape.top_k]
        expected = {
            "scores": expected["scores"],
            "ids": ids.int(),
            "weights": actual["scores"].gather(1, ids),
        }
    for name, wanted in expected.items():
        if name in CLOSE:
            torch.testing.assert_close(actual[name], wanted, rtol=CLOSE[name], atol=1e-6)
        elif not torch.equal(_bytes(actual[name]), _bytes(wanted)):
            raise AssertionError(f"{where}: {name} differs from the definition")


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device=device)
    x.view(torch.uint8).fill_(0xA5)
    return x


@functools.lru_cache(maxsize=2)
def routed(shape: Shape, tokens: int, device: torch.device) -> tuple[torch.Tensor, RoutingPlan]:
    """[T, K] int32 ids of equally popular experts, and their plan."""
    ids = testing.routing_uniform(tokens, shape.experts, shape.top_k).to(device)
    return ids, ref.routing_plan(ids, shape.experts)


def row_index(plan: RoutingPlan, shape: Shape) -> torch.Tensor:
    """[T, K] int64 row of each slot, for rows in (expert, token) order."""
    row = torch.empty(
        len(plan.sorted_slot_ids), dtype=torch.int64, device=plan.sorted_slot_ids.device
    )
    row[plan.sorted_slot_ids.long()] = torch.arange(len(row), device=row.device)
    return row.view(-1, shape.top_k)


def row_bytes(fmt: RowFormat) -> int:
    """Bytes of a row and its scales."""
    scales = 0 if fmt.scale_offset is None else fmt.num_scales * fmt.scale_dtype.itemsize
    return fmt.hidden * fmt.dtype.itemsize + scales


def numbers(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = BF16
) -> torch.Tensor:
    """Standard normal, made on the device: a CPU takes seconds for the largest cases."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def _rows(fmt: RowFormat, count: int, device: torch.device) -> Tensors:
    """Poisoned rows and scales, separate tensors."""
    tensors = {"rows": _poisoned((count, fmt.hidden), fmt.dtype, device)}
    if fmt.scale_offset is not None:
        tensors["scales"] = _poisoned(fmt.scale_shape(count), fmt.scale_dtype, device)
    return tensors


def routing_plan(shape: Shape, tokens: int, device: torch.device) -> Case:
    """The plan of all slots."""
    ids, _ = routed(shape, tokens, device)
    num_bytes = routing_plan_bytes(shape, tokens, launch_config.plan_launch(device, ids.numel()))

    def bind(steps: Any, inputs: Tensors, _: Tensors) -> Call:
        return lambda: cast("Tensors", steps.routing_plan(inputs["ids"], shape.experts)._asdict())

    return Case("routing_plan", "", shape, tokens, {"ids": ids}, dict, bind, num_bytes)


def routing_plan_bytes(shape: Shape, tokens: int, how: launch_config.PlanLaunch) -> int:
    """Bytes by the formula of the launch that is chosen."""
    positions = tokens * shape.top_k
    if how.compare:
        programs = min(-(-max(positions, shape.experts) // how.own), how.num_programs)
        return positions * 4 * programs
    return positions * 16 + -(-positions // how.own) * shape.experts * 12


def gather_quant(shape: Shape, tokens: int, device: torch.device, *, quant: str | None) -> Case:
    """Rows for the experts from tokens, quantised on the way."""
    fmt = RowFormat.quantized(quant, BF16, shape.hidden)
    ids, plan = routed(shape, tokens, device)
    x = numbers((tokens, shape.hidden), device)
    inputs = {"x": x, "index": row_index(plan, shape)}

    def bind(steps: Any, inputs: Tensors, outputs: Tensors) -> Call:
        x, index, rows, scales = (
            inputs["x"],
            inputs["index"],
            outputs["rows"],
            outputs.get("scales"),
        )

        def call() -> Tensors:
            steps.gather_quant(x, index, fmt, None, None, rows, scales)
            return outputs

        return call

    outputs = functools.partial(_rows, fmt, ids.numel(), device)
    num_bytes = gather_quant_bytes(shape, tokens, fmt)
    return Case("gather_quant", quant or "bf16", shape, tokens, inputs, outputs, bind, num_bytes)


def gather_quant_bytes(shape: Shape, tokens: int, fmt: RowFormat) -> int:
    """Bytes by the formula."""
    return tokens * shape.hidden * 2 + tokens * shape.top_k * row_bytes(fmt)


def weighted_sum(shape: Shape, tokens: int, device: torch.device, *, normalised: bool) -> Case:
    """The sum of combine, with the residual and RMSNorm behind it if ``normalised``."""
    fmt = RowFormat.tight(BF16, shape.hidden)
    ids, plan = routed(shape, tokens, device)
    inputs = {
        "rows": numbers((ids.numel(), shape.hidden), device),
        "index": row_index(plan, shape),
        "weights": testing.weights(tokens, shape.top_k).to(device),
    }
    if normalised:
        inputs["residual"] = numbers((tokens, shape.hidden), device)
        inputs["gamma"] = numbers((shape.hidden,), device)

    def outputs() -> Tensors:
        size = (tokens, shape.hidden)
        tensors = {"out": _poisoned(size, BF16, device)}
        if normalised:
            tensors["y"], tensors["rstd"] = (
                _poisoned(size, BF16, device),
                _poisoned((tokens,), FP32, device),
            )
        return tensors

    def bind(steps: Any, inputs: Tensors, outputs: Tensors) -> Call:
        rows, index, weights = inputs["rows"].view(torch.uint8), inputs["index"], inputs["weights"]
        norm = None
        if normalised:
            norm = Norm(inputs["residual"], inputs["gamma"], EPSILON, outputs["y"], outputs["rstd"])

        def call() -> Tensors:
            steps.weighted_sum(rows, index, fmt, weights, None, None, outputs["out"], norm)
            return outputs

        return call

    num_bytes = weighted_sum_bytes(shape, tokens, normalised=normalised)
    variant = "and norm" if normalised else ""
    return Case("weighted_sum", variant, shape, tokens, inputs, outputs, bind, num_bytes)


def weighted_sum_bytes(shape: Shape, tokens: int, *, normalised: bool) -> int:
    """Bytes by the formula."""
    return tokens * (shape.top_k + (3 if normalised else 1)) * shape.hidden * 2


def gather_rows(shape: Shape, tokens: int, device: torch.device, *, quant: str | None) -> Case:
    """Rows for the experts from a window."""
    fmt = RowFormat.quantized(quant, BF16, shape.hidden)
    ids, plan = routed(shape, tokens, device)
    window = torch.zeros((tokens, fmt.stride), dtype=torch.uint8, device=device)
    ref.encode(numbers((tokens, shape.hidden), device), fmt, window)
    inputs = {"window": window, "index": plan.sorted_slot_ids.long() // shape.top_k}

    def bind(steps: Any, inputs: Tensors, outputs: Tensors) -> Call:
        window, index, rows = inputs["window"], inputs["index"], outputs["rows"]

        def call() -> Tensors:
            steps.gather_rows(window, index, fmt, rows, outputs.get("scales"))
            return outputs

        return call

    outputs = functools.partial(_rows, fmt, ids.numel(), device)
    num_bytes = 2 * ids.numel() * row_bytes(fmt)
    return Case("gather_rows", quant or "bf16", shape, tokens, inputs, outputs, bind, num_bytes)


def top_k_gating(shape: Shape, tokens: int, device: torch.device) -> Case:
    """Softmax and top-k of router logits."""
    logits = numbers((tokens, shape.experts), device, FP32)

    def bind(steps: Any, inputs: Tensors, _: Tensors) -> Call:
        logits = inputs["logits"]

        def call() -> Tensors:
            weights, ids, scores = steps.top_k_gating(logits, shape.top_k)
            return {"weights": weights, "ids": ids, "scores": scores}

        return call

    num_bytes = tokens * shape.experts * (4 + 4)
    return Case("top_k_gating", "", shape, tokens, {"logits": logits}, dict, bind, num_bytes)


# Cases with a target first.
KINDS: dict[str, Callable[[Shape, int, torch.device], Case]] = {
    "gather_quant int8": functools.partial(gather_quant, quant="int8"),
    "weighted_sum": functools.partial(weighted_sum, normalised=False),
    "routing_plan": routing_plan,
    "gather_quant bf16": functools.partial(gather_quant, quant=None),
    "gather_quant e4m3": functools.partial(gather_quant, quant="e4m3"),
    "gather_quant group_e4m3": functools.partial(gather_quant, quant="group_e4m3"),
    "gather_quant mx_e4m3": functools.partial(gather_quant, quant="mx_e4m3"),
    "weighted_sum and norm": functools.partial(weighted_sum, normalised=True),
    "gather_rows int8": functools.partial(gather_rows, quant="int8"),
    "gather_rows bf16": functools.partial(gather_rows, quant=None),
    "top_k_gating": top_k_gating,
}
