"""Other implementations of the same steps, timed beside ours in one run.

    pytorch             argsort, index_select, index_add and element by element
    torch.compile       the same by inductor; sums as gather, multiply and add, which it fuses
    transformer_engine  its Triton kernels of permutation: plan, rows as they are, sums
    triton_kernels      its top-k, of the package of this name in Triton's repository (a
                        distribution called so on package indices is another one)

Of TransformerEngine two files are needed, ``pytorch/triton/permutation.py`` and
``common/triton/permutation.py`` in ``transformer_engine``; ``--peers-from FOLDER`` finds them in a
folder with these paths: its unpacked pure Python wheel, or its repository. Importing the whole
package would load libraries that may be missing. ``triton_kernels`` may be in that folder too.

A peer may prepare masks, maps and sorted weights before it is timed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .kernel_cases import EPSILON, Call, Case, Tensors, routed, row_index

NAMES = ("pytorch", "torch.compile", "transformer_engine", "triton_kernels")
PAYLOADS = {
    "int8": (torch.int8, 127.0),
    "e4m3": (torch.float8_e4m3fn, 448.0),
    "group_e4m3": (torch.float8_e4m3fn, 448.0),
}
GROUP = 128

Bind = Callable[[Tensors, Tensors], Call]
Prepare = Callable[[Callable[..., Any]], Callable[..., Any]]


class Peers:
    """Peers that can be imported.

    Attributes:
        missing: why each other peer cannot be imported, by name.
    """

    def __init__(self, folder: Path | None = None, names: tuple[str, ...] = NAMES) -> None:
        self.missing: dict[str, str] = {}
        self._found: dict[str, Callable[[Case], Bind | None]] = {}
        if folder is not None:
            sys.path.append(str(folder))
        make: dict[str, Callable[[], Callable[[Case], Bind | None]]] = {
            "pytorch": lambda: functools.partial(_pytorch, prepare=lambda function: function),
            "torch.compile": lambda: functools.partial(_pytorch, prepare=_compiled),
            "transformer_engine": lambda: functools.partial(
                _transformer_engine, _permutation_of(folder)
            ),
            "triton_kernels": lambda: functools.partial(
                _triton_kernels, importlib.import_module("triton_kernels.topk").topk
            ),
        }
        for name in names:
            try:
                self._found[name] = make[name]()
            except Exception as error:  # noqa: BLE001 - a peer that cannot be imported is reported
                self.missing[name] = f"{type(error).__name__}: {error}"

    def of(self, case: Case) -> dict[str, Bind]:
        """Peers that implement ``case``."""
        bound = {name: make(case) for name, make in self._found.items()}
        return {name: bind for name, bind in bound.items() if bind is not None}


def check(case: Case, actual: Tensors, ours: Tensors) -> None:
    """Raise unless a peer's results equal those of our kernel, up to rounding."""
    for name, theirs in actual.items():
        if name == "row_id_map":
            # The rows of each token, by expert.
            found = theirs[:, : case.shape.top_k].long().sort(dim=1).values
            _, routing = routed(case.shape, case.tokens, theirs.device)
            wanted = row_index(routing, case.shape).sort(dim=1).values
        elif name == "chosen":
            found, wanted = (x.long().sort(dim=1).values for x in (theirs, ours["ids"]))
        else:
            found, wanted = theirs, ours[name]
        if wanted.is_floating_point():
            # One step of e4m3, or the last bits of bf16 sums in another order.
            torch.testing.assert_close(found.float(), wanted.float(), rtol=0.13, atol=0.05)
        else:
            most = int((found.long() - wanted.long()).abs().amax())
            if most > (wanted.dtype == torch.int8):
                raise AssertionError(f"{name} differs by up to {most}")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The number of tokens varies as in serving; each format and model compiles its own code.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True)


def _pytorch(case: Case, *, prepare: Prepare) -> Bind | None:
    if case.kernel == "routing_plan":
        return functools.partial(_torch_plan, case, prepare(_plan))
    if case.kernel == "gather_quant" and case.variant == "bf16":
        return functools.partial(_torch_gather, case, prepare(_select))
    if case.kernel == "gather_quant" and case.variant in PAYLOADS and not _short_group(case):
        return functools.partial(_torch_gather_quant, case, prepare(_select_quantised))
    if case.kernel == "weighted_sum":
        return functools.partial(_torch_weighted_sum, case, prepare)
    if case.kernel == "top_k_gating":
        return functools.partial(_torch_gating, case, prepare(_gate))
    return None


def _short_group(case: Case) -> bool:
    """Whether rows end with a shorter group, which a reshape cannot express."""
    return case.variant.startswith("group") and case.shape.hidden % GROUP > 0


def _plan(
    ids: torch.Tensor, ones: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = ids.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(experts, dtype=torch.int32, device=ids.device)
    counts = counts.scatter_add(0, flat, ones)
    start = counts.cumsum(0) - counts
    position = torch.empty_like(flat).scatter(0, order, torch.arange(len(flat), device=ids.device))
    return counts, position - start[flat], order


def _torch_plan(case: Case, function: Callable[..., Any], inputs: Tensors, _: Tensors) -> Call:
    ids = inputs["ids"]
    ones = torch.ones(ids.numel(), dtype=torch.int32, device=ids.device)

    def call() -> Tensors:
        names = ("counts", "position_in_expert", "sorted_slot_ids")
        return dict(zip(names, function(ids, ones, case.shape.experts), strict=True))

    return call


def _tokens_of_rows(case: Case, device: torch.device) -> torch.Tensor:
    """[n] int64 token of each row."""
    return routed(case.shape, case.tokens, device)[1].sorted_slot_ids.long() // case.shape.top_k


def _select(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, token)


def _torch_gather(case: Case, function: Callable[..., Any], inputs: Tensors, _: Tensors) -> Call:
    x = inputs["x"]
    token = _tokens_of_rows(case, x.device)
    return lambda: {"rows": function(x, token)}


def _select_quantised(
    x: torch.Tensor, token: torch.Tensor, group: int, dtype: torch.dtype, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each token once, then gather codes and scales."""
    grouped = x.float().unflatten(1, (-1, group))
    scale = grouped.abs().amax(dim=2, keepdim=True) / largest
    codes = grouped / scale
    codes = codes.round() if dtype == torch.int8 else codes
    codes = codes.flatten(1).to(dtype).view(torch.uint8)
    return codes.index_select(0, token), scale[..., 0].index_select(0, token)


def _torch_gather_quant(
    case: Case, function: Callable[..., Any], inputs: Tensors, outputs: Tensors
) -> Call:
    x = inputs["x"]
    dtype, largest = PAYLOADS[case.variant]
    token = _tokens_of_rows(case, x.device)
    group = GROUP if case.variant.startswith("group") else case.shape.hidden

    def call() -> Tensors:
        codes, scales = function(x, token, group, dtype, largest)
        return {"rows": codes.view(dtype), "scales": scales.view_as(outputs["scales"])}

    return call


def _add(
    rows: torch.Tensor, token: torch.Tensor, row_weights: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    return zeros.clone().index_add_(0, token, rows.float() * row_weights).to(rows.dtype)


def _gather_add(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (rows[index].float() * weights[..., None]).sum(1).to(rows.dtype)


def _gather_add_norm(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    residual: torch.Tensor,
    gamma: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = (rows[index].float() * weights[..., None]).sum(1) + residual.float()
    rstd = torch.rsqrt(total.square().mean(1, keepdim=True) + EPSILON)
    scaled = (total * rstd).to(rows.dtype)
    return total.to(rows.dtype), scaled * gamma, rstd[:, 0]


def _torch_weighted_sum(case: Case, prepare: Prepare, inputs: Tensors, _: Tensors) -> Call:
    rows, index, weights = inputs["rows"], inputs["index"], inputs["weights"]
    if case.variant:
        function, given = prepare(_gather_add_norm), (inputs["residual"], inputs["gamma"])
        names = ("out", "y", "rstd")
        return lambda: dict(zip(names, function(rows, index, weights, *given), strict=True))
    function = prepare(_gather_add)
    if function is not _gather_add:
        return lambda: {"out": function(rows, index, weights)}
    token = _tokens_of_rows(case, rows.device)
    row_weights = torch.empty((len(rows), 1), device=rows.device)
    row_weights[index.reshape(-1), 0] = weights.reshape(-1)
    zeros = torch.zeros((case.tokens, case.shape.hidden), device=rows.device)
    return lambda: {"out": _add(rows, token, row_weights, zeros)}


def _gate(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = torch.softmax(logits, dim=1)
    weights, ids = scores.topk(top_k, dim=1)
    return weights, ids, scores


def _torch_gating(case: Case, function: Callable[..., Any], inputs: Tensors, _: Tensors) -> Call:
    logits = inputs["logits"]

    def call() -> Tensors:
        weights, _, scores = function(logits, case.shape.top_k)
        return {"weights": weights, "scores": scores}

    return call


def _permutation_of(folder: Path | None) -> types.ModuleType:
    """TransformerEngine's module: from its package, else from its two files."""
    name = "transformer_engine.pytorch.triton.permutation"
    if folder is None or not (folder / "transformer_engine").is_dir():
        return importlib.import_module(name)
    # Stand-ins for the packages, whose __init__ would load everything.
    for package in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton"):
        module = types.ModuleType(f"transformer_engine{package}")
        module.__path__ = [str(folder.joinpath("transformer_engine", *package.split(".")[1:]))]
        sys.modules[module.__name__] = module
    return importlib.import_module(name)


def _transformer_engine(module: types.ModuleType, case: Case) -> Bind | None:
    if case.name in ("routing_plan", "gather_quant bf16", "weighted_sum"):
        return functools.partial(_permutation, module, case)
    return None


def _permutation(module: types.ModuleType, case: Case, inputs: Tensors, _: Tensors) -> Call:
    tokens, hidden, experts = case.tokens, case.shape.hidden, case.shape.experts
    device = next(iter(inputs.values())).device
    ids = routed(case.shape, tokens, device)[0].long()
    mask = torch.zeros((tokens, experts), dtype=torch.int32, device=device).scatter_(1, ids, 1)
    if case.kernel == "routing_plan":
        return lambda: {"row_id_map": module.make_row_id_map(mask, tokens, experts)}
    row_id_map = module.make_row_id_map(mask, tokens, experts)
    sizes = {"num_tokens": tokens, "num_experts": experts, "hidden_size": hidden}
    if case.kernel == "gather_quant":
        extra = {"num_out_tokens": ids.numel(), "scale_hidden_dim": 0}
        permute = _of_one_argument(
            module.permute_with_mask_map, row_id_map=row_id_map, **sizes, **extra
        )
        return lambda: {"rows": permute(inputs["x"])[0]}
    probabilities = torch.zeros((tokens, experts), device=device)
    probabilities.scatter_(1, ids, inputs["weights"])
    unpermute = _of_one_argument(
        module.unpermute_with_mask_map,
        row_id_map=row_id_map,
        merging_probs=probabilities,
        **sizes,
    )
    return lambda: {"out": unpermute(inputs["rows"])[0]}


def _of_one_argument(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    """``function`` of one argument, all others None unless given; versions differ in them."""
    names = list(inspect.signature(function).parameters)[1:]
    return functools.partial(function, **{name: given.get(name) for name in names})


def _triton_kernels(top_k: Callable[..., Any], case: Case) -> Bind | None:
    if case.kernel != "top_k_gating":
        return None

    def bind(inputs: Tensors, _: Tensors) -> Call:
        def call() -> Tensors:
            found = top_k(inputs["logits"], case.shape.top_k)
            return {"chosen": found.indx if hasattr(found, "indx") else found[1]}

        return call

    return bind
