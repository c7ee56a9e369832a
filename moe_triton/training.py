"""Data-parallel wrappers beside experts that live on one rank each."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ArgumentValueError

_MARK = "local_experts"


def ignore_experts(model: nn.Module) -> set[nn.Parameter]:
    """Make ``DistributedDataParallel`` leave each rank's experts alone.

    It would overwrite them with those of rank 0, and average gradients of different experts. A
    module with the attribute ``local_experts = True`` declares that its parameters and buffers, and
    those of its submodules, differ between ranks. Call this before wrapping ``model``. Names that
    ``model`` already has ignored stay ignored.

    Args:
        model: the module to be wrapped.

    Returns:
        The experts' parameters, as ``ignored_params`` of ``fully_shard`` takes them.

    Raises:
        ArgumentValueError: no module of ``model`` has ``local_experts = True``.
    """
    experts = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if getattr(module, _MARK, None) is True
    }
    if not experts:
        contract = f"have a module with {_MARK} = True"
        raise ArgumentValueError("ignore_experts", "model", contract, type(model).__name__)
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, module in experts.items():
        names.update(name for name, _ in module.named_parameters(prefix, remove_duplicate=False))
        names.update(name for name, _ in module.named_buffers(prefix, remove_duplicate=False))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return {parameter for module in experts.values() for parameter in module.parameters()}
