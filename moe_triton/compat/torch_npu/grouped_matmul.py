"""Grouped matmul before or after an exchange of rows between the ranks of experts.

Letters: W ranks of the group, E experts of this rank, H1 and N1 their sizes. Without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ascend.distributed import grouped_matmul


def npu_alltoallv_gmm(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    send_counts_tensor: Tensor | None = None,
    recv_counts_tensor: Tensor | None = None,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Send rows to the ranks of their experts, sort them by expert, and multiply.

    Collective: every rank of the group calls it. Rows travel through host memory.

    Args:
        gmm_x: (rows, H1) float16, bfloat16, or float32, which torch_npu has not; in the order of
            (rank, expert of that rank).
        gmm_weight: (E, H1, N1) of its dtype, or (E, N1, H1) with trans_gmm_weight.
        hcom: name of the group, or a ``ProcessGroup``.
        ep_world_size: W.
        send_counts: W * E rows for each (rank, expert of that rank), as many as gmm_x has.
        recv_counts: W * E rows from each rank for each expert of this one, (rank, expert).
        send_counts_tensor: None.
        recv_counts_tensor: None.
        mm_x: (BS, H2) of the shared expert, or None.
        mm_weight: (H2, N2) of its dtype, or (N2, H2) with trans_mm_weight; with mm_x.
        trans_gmm_weight: see gmm_weight.
        trans_mm_weight: see mm_weight.
        permute_out_flag: whether to return permute_out.
        comm_mode: ignored.

    Returns:
        gmm_y: (A, N1), the products of the A received rows in the order of (expert, rank).
        mm_y: (BS, N2), mm_x @ mm_weight; None without them.
        permute_out: (A, H1), the received rows in that order; None without permute_out_flag.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentNameError: 161002, the group is not registered.
        ArgumentValueError: 561002, a shape or value; recv_counts that are not what the peers send.
        PeerAbortError, PeerTimeoutError: a peer refused its call, or is missing.
    """
    return grouped_matmul.npu_alltoallv_gmm(**_plain(locals()))


def npu_gmm_alltoallv(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    send_counts_tensor: Tensor | None = None,
    recv_counts_tensor: Tensor | None = None,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply rows that are sorted by expert, and send the products back to their ranks.

    The inverse of the exchange of ``npu_alltoallv_gmm``; collective likewise.

    Args:
        gmm_x: (A, H1) in the order of (expert of this rank, rank).
        gmm_weight: as there.
        hcom: as there.
        ep_world_size: W.
        send_counts: W * E rows for each rank from each expert of this one, (rank, expert), A in
            all.
        recv_counts: W * E rows from each (rank, expert of that rank).
        send_counts_tensor: None.
        recv_counts_tensor: None.
        mm_x: as there.
        mm_weight: as there.
        trans_gmm_weight: as there.
        trans_mm_weight: as there.
        comm_mode: ignored.

    Returns:
        y: (rows, N1) in the order of (rank, expert of that rank).
        mm_y: as there.

    Raises:
        The errors of ``npu_alltoallv_gmm``.
    """
    return grouped_matmul.npu_gmm_alltoallv(**_plain(locals()))


def _plain(arguments: dict[str, object]) -> dict[str, object]:
    """Counts as lists of Python's integers, and the group by its name."""
    for name in ("send_counts", "recv_counts"):
        counts = arguments[name]
        if hasattr(counts, "tolist"):
            arguments[name] = counts.tolist()
    group = arguments["hcom"]
    arguments["hcom"] = getattr(group, "group_name", group)
    return arguments
