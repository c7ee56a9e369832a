"""Hugging Face transformers: its MoE layers over ``ExpertParallel``.

    from moe_triton.integrations import transformers as moe_triton_transformers
    moe_triton_transformers.register()

adds the name "moe_triton" to both public registries of transformers; nothing is patched:

``DistributedConfig(ep_size=W, ep_implementation="moe_triton", ...)`` keeps the weights of E / W
experts on each rank and sends the tokens there; the experts run as the model says. The result is
that of the unmodified model with its default ``experts_implementation``, rounding included, if
matrix products do not depend on the number of rows. With ``fsdp_size=W`` each rank has a batch of
its own; with ``tp_size=W`` the ranks of a TP group share one, and each sends its part.

``experts_implementation="moe_triton"`` is for ranks that hold all weights: each runs its share of
the experts, in the module's eager forward, for all ranks. The result is that of "eager", rounding
included, under the same condition. On one rank it groups the tokens by expert.

``torch.compile`` breaks the graph at each experts module, because exact row counts need the host.
Ranks wait for each other in every layer, so all must run the same number of forward passes, as with
any expert parallelism (``generate`` has ``synced_gpus=True`` for that).

transformers is imported by ``register`` and not before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from ..errors import UnavailableError
from ..ops.layer_config import QuantGradient, QuantName, TransportName
from .expert_rows import Options, close_exchanges, exchange_for

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["close_exchanges", "register"]

_OLDEST = "5.23"


def register(
    name: str = "moe_triton",
    *,
    quant: QuantName | None = None,
    max_tokens: int | None = None,
    transport: TransportName = "auto",
    timeout: float = 30.0,
    group: dist.ProcessGroup | None = None,
    quant_gradient: QuantGradient | None = None,
) -> None:
    """Register ``name`` as an ``ep_implementation`` and an ``experts_implementation``.

    The same call again changes nothing. Names can have different options. New options of a name
    apply to models loaded later, and at once where it is the ``experts_implementation``.

    Args:
        name: the name that models use.
        quant: None, or "int8" to send tokens quantised.
        max_tokens: most tokens a rank passes to one layer; an ``experts_implementation`` counts a
            token once for each of its experts. None: the ranks agree on it in every layer by a
            small all-reduce.
        transport: a name of ``comm.TRANSPORTS``, as for ``ExpertParallel``.
        timeout: limit in seconds of each wait for peers.
        group: of the ranks that share the work in an ``experts_implementation``; None for the
            default process group. An ``ep_implementation`` gets its group from transformers.
        quant_gradient: None, or "straight_through", as for ``ExpertParallel``.

    Raises:
        UnavailableError: transformers is missing or too old.
    """
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        problem = f"needs transformers {_OLDEST} or later: {error}"
        raise UnavailableError("integrations.transformers.register", problem) from error
    options = Options(quant, max_tokens, transport, timeout, quant_gradient)
    implementation = functools.partial(_implementation_class(), options=options)
    EPImplementationInterface.register(name, implementation)
    experts_function = functools.partial(_experts_function(), group=group, options=options)
    ALL_EXPERTS_FUNCTIONS.register(name, experts_function)


@functools.cache
def _implementation_class() -> type:
    """The class of ``ep_implementation``; its base exists once transformers is imported."""
    from transformers.distributed.expert_parallel import EPImplementation

    class MoETritonEP(EPImplementation):
        """The expert-parallel forward of one experts module.

        Args:
            experts: the module, with the weights of this rank's experts.
            ep_mesh: of the ranks that together hold all experts.
            tp_mesh: of the ranks that hold the same tokens.
            options: how rows are sent.
        """

        def __init__(
            self,
            experts: torch.nn.Module,
            ep_mesh: DeviceMesh,
            tp_mesh: DeviceMesh,
            *,
            options: Options,
        ) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            num_experts = self.num_local_experts * ep_mesh.size()
            self._exchange = exchange_for(ep_mesh.get_group(), num_experts, options)

        @torch.compiler.disable
        def __call__(
            self,
            hidden_states: torch.Tensor,
            top_k_index: torch.Tensor,
            top_k_weights: torch.Tensor,
        ) -> torch.Tensor:
            """The weighted sum of the experts' outputs for each token.

            Args:
                hidden_states: [T, H].
                top_k_index: [T, K] int64, global ids.
                top_k_weights: [T, K].

            Returns:
                [T, H].
            """
            inputs = [hidden_states, top_k_index, top_k_weights]
            if self.tp_mesh.size() > 1:
                inputs = [_part_of(tensor, self.tp_mesh) for tensor in inputs]
            rows = self._exchange.dispatch(*inputs)
            # A model with 16-bit routing weights rounds each weighted row before the sum, so its
            # experts apply the weights. With fp32 weights it rounds the sum only, as combine does.
            rounded = top_k_weights.dtype.itemsize < torch.float32.itemsize
            weights = rows.weights if rounded else rows.x.new_ones(len(rows.x))
            assert weights is not None
            y = self.experts_forward(rows.x, rows.experts[:, None], weights[:, None])
            out = self._exchange.combine(y, rows, weighted=rounded)
            if self.tp_mesh.size() > 1:
                out = _whole_of(out, self.tp_mesh, hidden_states.shape)
            return out

    return MoETritonEP


def _part_of(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's rows of a tensor that all ranks of ``mesh`` have; differentiable."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(0)]).to_local()


def _whole_of(part: torch.Tensor, mesh: DeviceMesh, shape: torch.Size) -> torch.Tensor:
    """The rows of all ranks of ``mesh``, [T, H]; the inverse of ``_part_of``."""
    from torch.distributed.tensor import DTensor, Shard

    stride = (shape[1], 1)
    parts = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return parts.full_tensor()


@functools.cache
def _experts_function() -> Callable[..., torch.Tensor]:
    """``_run_experts`` behind a graph break; the decorator imports the compiler."""
    return torch.compiler.disable(_run_experts)


def _run_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    options: Options,
) -> torch.Tensor:
    """The forward of an experts module that has the weights of all experts.

    Args:
        module: the experts module.
        hidden_states: [T, H].
        top_k_index: [T, K] int64, global ids.
        top_k_weights: [T, K].
        group: of the ranks that share the work.
        options: how rows are sent.

    Returns:
        [T, H] of the dtype of ``hidden_states``.
    """
    eager = inspect.unwrap(type(module).forward)
    if module._is_expert_parallel:
        # An ep_implementation has sent these tokens here; the ids are local ones.
        return eager(module, hidden_states, top_k_index, top_k_weights)
    dtype = hidden_states.dtype
    row_dtype, sum_dtype = _eager_dtypes(eager, module, hidden_states, top_k_weights.dtype)
    # Each slot travels as a token with one expert, so that its row comes back alone: the eager
    # forward weighs a row, rounds it, and adds it to those of experts with a smaller id.
    num_tokens, top_k = top_k_index.shape
    slots = hidden_states.to(row_dtype).repeat_interleave(top_k, dim=0)
    exchange = exchange_for(group, module.num_experts, options)
    rows = exchange.dispatch(slots, top_k_index.reshape(-1, 1))
    ids = rows.experts[:, None] + rows.layer.local_experts.start
    y = eager(module, rows.x, ids, torch.ones_like(ids, dtype=row_dtype))
    pending = exchange.combine_setup(y, rows)
    order = top_k_index.argsort(dim=1)
    returned = exchange.combine_teardown(pending).view(num_tokens, top_k, hidden_states.shape[1])
    weighted = (returned * top_k_weights[..., None]).to(sum_dtype)
    out = torch.zeros_like(hidden_states, dtype=sum_dtype)
    for k in range(top_k):
        out = out + weighted.take_along_dim(order[:, k, None, None], dim=1).squeeze(1)
    return out.to(dtype)


class _DtypeRecorder(TorchFunctionMode):
    """Records the dtypes of the last matrix product and of the tensor that rows are added to."""

    _PRODUCTS = (torch.nn.functional.linear, torch.Tensor.__matmul__, torch.Tensor.matmul)

    def __init__(self) -> None:
        super().__init__()
        self.product: torch.dtype | None = None
        self.total: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._PRODUCTS:
            self.product = out.dtype
        elif func is torch.Tensor.index_add_:
            self.total = out.dtype
        return out


_dtypes: dict[tuple[type, torch.dtype, torch.dtype], tuple[torch.dtype, torch.dtype]] = {}


def _eager_dtypes(
    eager: Callable[..., torch.Tensor],
    module: Any,
    hidden_states: torch.Tensor,
    weight_dtype: torch.dtype,
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which a class's eager forward computes rows and sums them.

    Most classes do both in the dtype of the tokens; some sum in float32, and some compute in it.
    Found by running expert 0 on one row, once per class and dtypes.
    """
    dtype = hidden_states.dtype
    key = type(module), dtype, weight_dtype
    if key not in _dtypes:
        row = hidden_states.new_zeros(1, hidden_states.shape[1])
        ids = row.new_zeros((1, 1), dtype=torch.int64)
        with torch.no_grad(), _DtypeRecorder() as recorder:
            eager(module, row, ids, row.new_ones((1, 1), dtype=weight_dtype))
        _dtypes[key] = recorder.product or dtype, recorder.total or dtype
    return _dtypes[key]
