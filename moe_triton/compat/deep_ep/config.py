"""Tuning parameters, which clients set and pass on, and sizes that they ask for.

SMs, queue pairs and chunk sizes belong to the kernels of the original: they are kept for the
client, and change nothing here.
"""

from __future__ import annotations

import dataclasses

import torch

from ...errors import UnavailableError
from ...ops import window_bytes

#: dtype of expert ids; int32 is accepted too.
topk_idx_t = torch.int64

NUM_SMS = 20
TIMEOUT = 100.0  # seconds, the original's limit of waits


@dataclasses.dataclass
class Config:
    """Chunk sizes of the original's high-throughput kernels.

    Attributes:
        num_sms: SMs of a kernel.
        num_max_nvl_chunked_send_tokens: tokens of a chunk sent over NVLink.
        num_max_nvl_chunked_recv_tokens: tokens of a receive queue.
        num_max_rdma_chunked_send_tokens: tokens of a chunk sent over RDMA.
        num_max_rdma_chunked_recv_tokens: tokens of a receive queue.
    """

    num_sms: int = NUM_SMS
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:  # noqa: ARG002
        """0: windows have the size that calls need, and grow."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:  # noqa: ARG002
        """0: windows have the size that calls need, and grow."""
        return 0


def low_latency_bytes(num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes of a rank's windows for low-latency calls in bfloat16, for any top-k.

    Raises:
        ArgumentTypeError, ArgumentValueError: a size out of range.
    """
    return window_bytes(
        world_size=num_ranks,
        num_experts=num_experts,
        top_k=num_experts,
        hidden=hidden,
        max_tokens=num_max_tokens,
        in_flight=2,
    ).total


def unavailable(op: str, problem: str) -> UnavailableError:
    """The error of a name that exists for clients to find, and cannot do its work here."""
    return UnavailableError(f"deep_ep.{op}", problem)
