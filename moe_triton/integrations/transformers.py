"""Hugging Face transformers: its MoE layers over ``ExpertParallel``.

    from moe_triton.integrations import transformers as moe_triton_transformers
    moe_triton_transformers.register()

makes the name "moe_triton" known to both of its public registries, for which nothing is patched:

``DistributedConfig(ep_size=W, ep_implementation="moe_triton", ...)`` holds the weights of E / W
experts on each rank, and sends the tokens to them, whose experts run as the model says. The result
is that of the unmodified model with its default ``experts_implementation``, rounding included, if
matrix products do not depend on how many rows they get. With ``fsdp_size=W`` each rank has a batch
of its own; with ``tp_size=W`` the ranks of a TP group share one, and each sends its part of it.

``experts_implementation="moe_triton"`` is for ranks that hold all weights: each runs its share of
the experts, in the module's eager forward, for all ranks. The result is that of "eager", in the
same sense. Alone, without torch.distributed, it groups the tokens by expert.

Ranks wait for each other in every layer: all must run the same number of forward passes, as with
any expert parallelism (``generate`` takes ``synced_gpus=True`` for that).

transformers is imported by ``register`` and not before.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..errors import UnavailableError
from ..ops.layer_config import QuantName, TransportName
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
) -> None:
    """Make ``name`` an ``ep_implementation`` and an ``experts_implementation`` of transformers.

    The same call again changes nothing. Several names can have different options; a name that is
    given new ones has them in models loaded later, and in ``experts_implementation`` at once.

    Args:
        name: what models ask for.
        quant: None, or "int8" to send tokens quantised, for inference.
        max_tokens: most tokens a rank brings to one layer, copies for several experts counted
            apart in an ``experts_implementation``. None: ranks tell each other in every layer, by a
            small all-reduce.
        transport: a name of ``comm.TRANSPORTS``, as for ``ExpertParallel``.
        timeout: seconds any wait for peers may take.
        group: of the ranks that share the work in an ``experts_implementation``; None for the
            default process group. An ``ep_implementation`` has its group from transformers.

    Raises:
        UnavailableError: transformers is missing or too old.
    """
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        problem = f"needs transformers {_OLDEST} or later: {error}"
        raise UnavailableError("integrations.transformers.register", problem) from error
    options = Options(quant, max_tokens, transport, timeout)
    implementation = functools.partial(_implementation_class(), options=options)
    EPImplementationInterface.register(name, implementation)
    experts_function = functools.partial(_experts_function, group=group, options=options)
    ALL_EXPERTS_FUNCTIONS.register(name, experts_function)


@functools.cache
def _implementation_class() -> type:
    """The class of ``ep_implementation``; its base exists once transformers is imported."""
    from transformers.distributed.expert_parallel import EPImplementation

    class MoETritonEP(EPImplementation):
        """One experts module: its tokens to other ranks and back.

        Args:
            experts: the module, with the weights of this rank's experts.
            ep_mesh: of the ranks that together hold all experts.
            tp_mesh: of the ranks that hold the same tokens.
            options: how tokens travel.
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
            given = [hidden_states, top_k_index, top_k_weights]
            if self.tp_mesh.size() > 1:
                given = [_part_of(tensor, self.tp_mesh) for tensor in given]
            rows = self._exchange.dispatch(*given)
            # A model whose weights are as narrow as its tokens rounds each weighted row before the
            # sum; so do its experts here. With wider weights it rounds the sum, as combine does.
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


def _experts_function(
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
        options: how tokens travel.

    Returns:
        [T, H] of the dtype of ``hidden_states``.
    """
    eager = inspect.unwrap(type(module).forward)
    if module._is_expert_parallel:
        # An ep_implementation has brought these tokens here; the ids are local ones.
        return eager(module, hidden_states, top_k_index, top_k_weights)
    # Copies travel as tokens of one expert each, so that their rows come back one by one: the eager
    # forward weighs a row, rounds it, and adds it to those of experts with a smaller id.
    num_tokens, top_k = top_k_index.shape
    copies = hidden_states.repeat_interleave(top_k, dim=0)
    exchange = exchange_for(group, module.num_experts, options)
    rows = exchange.dispatch(copies, top_k_index.reshape(-1, 1))
    ids = rows.experts[:, None] + rows.layer.local_experts.start
    y = eager(module, rows.x, ids, torch.ones_like(ids, dtype=rows.x.dtype))
    pending = exchange.combine_setup(y, rows)
    order = top_k_index.argsort(dim=1)
    returned = exchange.combine_teardown(pending)
    returned = returned.view(num_tokens, top_k, hidden_states.shape[1])
    weighted = (returned * top_k_weights[..., None]).to(hidden_states.dtype)
    out = torch.zeros_like(hidden_states)
    for k in range(top_k):
        out = out + weighted.take_along_dim(order[:, k, None, None], dim=1).squeeze(1)
    return out
