"""What a product accepts, and how large a communication buffer it would ask for.

A profile changes only validation ranges and the sizes of outputs; arithmetic is the same for all.
``portable`` is this library's own: no limit beyond what correctness needs.
Source: the constraint sections of the aclnnMoeDistribute* operator documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from .errors import ArgumentValueError, UnavailableError

_MB = 2**20


@dataclasses.dataclass(frozen=True)
class Profile:
    """Ranges of one product; None means no limit.

    Attributes:
        name: "portable", or a product.
        max_tokens: largest BS.
        max_top_k: largest K.
        max_hidden: largest H.
        hidden_multiple: H must be a multiple of this.
        world_sizes: allowed W.
        max_experts: largest E.
        max_experts_per_rank: largest L.
        quant_modes: allowed modes of dispatch.
    """

    name: str
    max_tokens: int | None = None
    max_top_k: int | None = None
    max_hidden: int | None = None
    hidden_multiple: int = 1
    world_sizes: Collection[int] | None = None
    max_experts: int | None = None
    max_experts_per_rank: int | None = None
    quant_modes: Collection[int] = (0, 2)

    def check(
        self,
        op: str,
        *,
        num_tokens: int,
        hidden: int,
        top_k: int,
        world_size: int,
        num_experts: int,
        experts_per_rank: int,
    ) -> None:
        """Raise ``ArgumentValueError`` for the first size that the product does not take."""
        for argument, got, most in (
            ("BS", num_tokens, self.max_tokens),
            ("H", hidden, self.max_hidden),
            ("K", top_k, self.max_top_k),
            ("moe_expert_num", num_experts, self.max_experts),
            ("moe_expert_num / MoE ranks", experts_per_rank, self.max_experts_per_rank),
        ):
            if most is not None and got > most:
                raise ArgumentValueError(op, argument, f"be at most {most} on {self.name}", got)
        if hidden % self.hidden_multiple:
            contract = f"be a multiple of {self.hidden_multiple} on {self.name}"
            raise ArgumentValueError(op, "H", contract, hidden)
        if self.world_sizes is not None and world_size not in self.world_sizes:
            contract = f"be one of {[*self.world_sizes]} on {self.name}"
            raise ArgumentValueError(op, "ep_world_size", contract, world_size)


PROFILES = {"portable": Profile("portable")}


def get_profile(name: str) -> Profile:
    """The profile of that name, or an ``UnavailableError`` that lists what there is."""
    if name not in PROFILES:
        raise UnavailableError(
            "get_profile", f"name must be one of {[*PROFILES]}, got {name!r}", argument="name"
        )
    return PROFILES[name]


def ascend_buffer_mb(
    product: str,
    *,
    world_size: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    num_shared_ranks: int = 0,
) -> int:
    """HCCL_BUFFSIZE in MB that the v1 dispatch and combine would need on an Ascend product.

    Args:
        product: "a2" (no shared ranks there) or "a3".
        world_size: W.
        num_experts: E.
        top_k: K.
        hidden: H.
        max_tokens: largest BS of a rank.
        num_shared_ranks: S.

    Raises:
        UnavailableError: a product without a formula.
    """
    local = num_experts // (world_size - num_shared_ranks)
    if product == "a2":
        rows = max_tokens * world_size * min(local, top_k)
        return -(-2 * (rows * hidden * 2 + 2 * _MB) // _MB)
    if product == "a3":
        half = max_tokens * 2 * (hidden + 128) * (world_size * local + top_k + 1)
        return -(-2 * half // _MB) + 2
    raise UnavailableError(
        "ascend_buffer_mb", f"product must be 'a2' or 'a3', got {product!r}", argument="product"
    )
