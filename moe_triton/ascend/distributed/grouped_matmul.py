"""The ops behind ``npu_alltoallv_gmm`` and ``npu_gmm_alltoallv``: an exchange around experts.

Rows travel by ``comm.all_to_all_v`` through host memory; torch multiplies. Shapes and errors are
documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations and never raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import comm
from ...errors import MoeError
from ...ops import checks
from ...ops.custom_op import Operator
from ..local.gather import gather
from ..local.grouped_matmul import Scales, products
from ..op_names import ALLTOALLV_GMM, GMM_ALLTOALLV

_KIND = "exchange"  # the operation in which the peers wait


def alltoallv_gmm(
    *,
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    send_counts_tensor: Tensor | None = None,
    recv_counts_tensor: Tensor | None = None,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Exchange rows, bring them into the order of the experts, multiply."""
    del comm_mode
    op = ALLTOALLV_GMM
    group = comm.resolve(op, hcom, argument="hcom")
    communicator = comm.default_communicator(group)
    try:
        checks.flags(op, permute_out_flag=permute_out_flag)
        weight = _check(
            op,
            gmm_x,
            gmm_weight,
            trans_gmm_weight,
            group.size,
            ep_world_size,
            send_counts,
            recv_counts,
            (send_counts_tensor, recv_counts_tensor),
        )
        shared = _shared(op, mm_x, mm_weight, trans_mm_weight)
    except MoeError as error:
        communicator.abort_peers(_KIND, op, error)
        raise
    received = _exchange(op, gmm_x, send_counts, recv_counts, hcom, ep_world_size)
    # From (rank, expert) to (expert, rank).
    counts = torch.tensor(recv_counts).view(ep_world_size, -1)
    rows = gather(received, _transposed(counts).to(received.device))
    ends = counts.sum(0).cumsum(0).to(rows.device)
    y = products(rows, weight, ends, Scales(), rows.dtype)
    return y, shared, rows if permute_out_flag else None


def gmm_alltoallv(
    *,
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    send_counts_tensor: Tensor | None = None,
    recv_counts_tensor: Tensor | None = None,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply, bring rows into the order of the ranks, exchange."""
    del comm_mode
    op = GMM_ALLTOALLV
    group = comm.resolve(op, hcom, argument="hcom")
    communicator = comm.default_communicator(group)
    try:
        weight = _check(
            op,
            gmm_x,
            gmm_weight,
            trans_gmm_weight,
            group.size,
            ep_world_size,
            send_counts,
            recv_counts,
            (send_counts_tensor, recv_counts_tensor),
        )
        shared = _shared(op, mm_x, mm_weight, trans_mm_weight)
    except MoeError as error:
        communicator.abort_peers(_KIND, op, error)
        raise
    counts = torch.tensor(send_counts).view(ep_world_size, -1)
    ends = counts.sum(0).cumsum(0).to(gmm_x.device)
    y = products(gmm_x, weight, ends, Scales(), gmm_x.dtype)
    y = gather(y, _transposed(counts.T).to(y.device))
    return _exchange(op, y, send_counts, recv_counts, hcom, ep_world_size), shared


def alltoallv_gmm_outputs(
    *,
    gmm_x: Tensor,
    gmm_weight: Tensor,
    recv_counts: Sequence[int],
    mm_x: Tensor | None,
    mm_weight: Tensor | None,
    trans_gmm_weight: bool,
    trans_mm_weight: bool,
    permute_out_flag: bool,
    **_: object,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fake outputs of ``alltoallv_gmm``."""
    y, shared = gmm_alltoallv_outputs(
        gmm_x=gmm_x,
        gmm_weight=gmm_weight,
        recv_counts=recv_counts,
        mm_x=mm_x,
        mm_weight=mm_weight,
        trans_gmm_weight=trans_gmm_weight,
        trans_mm_weight=trans_mm_weight,
    )
    rows = gmm_x.new_empty((sum(recv_counts), *gmm_x.shape[1:])) if permute_out_flag else None
    return y, shared, rows


def gmm_alltoallv_outputs(
    *,
    gmm_x: Tensor,
    gmm_weight: Tensor,
    recv_counts: Sequence[int],
    mm_x: Tensor | None,
    mm_weight: Tensor | None,
    trans_gmm_weight: bool,
    trans_mm_weight: bool,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Fake outputs of ``gmm_alltoallv``."""
    columns = gmm_weight.shape[-2 if trans_gmm_weight else -1]
    shared = None
    if mm_x is not None and mm_weight is not None:
        shared = mm_x.new_empty((mm_x.shape[0], mm_weight.shape[-2 if trans_mm_weight else -1]))
    return gmm_x.new_empty((sum(recv_counts), columns)), shared


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    group_size: int,
    world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    on_device: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Check the arguments that both share; return the matrices as [E, K, N]."""
    checks.required(op, gmm_x=x, gmm_weight=weight)
    checks.integers(op, ep_world_size=world_size)
    checks.flags(op, trans_gmm_weight=transposed)
    checks.dtype(op, "gmm_x", x, (*checks.FLOATS, torch.float32))
    checks.dtype(op, "gmm_weight", weight, (x.dtype,))
    checks.shape(op, "gmm_x", x, (None, None), "(rows, H1)", x.device)
    checks.shape(op, "gmm_weight", weight, (None,) * 3, "(E, H1, N1)", x.device)
    matrices = weight.transpose(1, 2) if transposed else weight
    depth = matrices.shape[1]
    fits = x.shape[1] == depth > 0
    contract = f"have as many columns as gmm_weight has rows, {depth}, and at least one"
    checks.value(op, "gmm_x", fits, contract, f"shape {tuple(x.shape)}")
    contract = f"be the size of the group, {group_size}"
    checks.value(op, "ep_world_size", world_size == group_size, contract, world_size)
    number = len(weight) * world_size
    for name, counts, total in (
        ("send_counts", send_counts, len(x)),
        ("recv_counts", recv_counts, None),
    ):
        checks.integer_list(op, name, counts)
        fits = len(counts) == number and min(counts, default=0) >= 0
        contract = f"be E * ep_world_size = {number} counts"
        if total is not None:
            fits = fits and sum(counts) == total
            contract += f" that add up to the rows of gmm_x, {total}"
        checks.value(op, name, fits, contract, [*counts])
    send, recv = on_device
    checks.reserved(op, send_counts_tensor=send, recv_counts_tensor=recv)
    return matrices


def _shared(op: str, x: Tensor | None, weight: Tensor | None, transposed: bool) -> Tensor | None:
    """The product of the shared expert, or None."""
    checks.flags(op, trans_mm_weight=transposed)
    contract = "be given if and only if {} is"
    both = (x is None) == (weight is None)
    checks.value(op, "mm_weight", both, contract.format("mm_x"), "one of them")
    if x is None or weight is None:
        return None
    checks.dtype(op, "mm_x", x, (*checks.FLOATS, torch.float32))
    checks.dtype(op, "mm_weight", weight, (x.dtype,))
    checks.shape(op, "mm_x", x, (None, None), "(BS, H2)", x.device)
    shape = (None, x.shape[1]) if transposed else (x.shape[1], None)
    checks.shape(op, "mm_weight", weight, shape, "(H2, N2)", x.device)
    return x @ (weight.T if transposed else weight)


def _exchange(
    op: str,
    rows: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: str,
    world_size: int,
) -> Tensor:
    """The rows that this rank receives, in the order of their ranks."""
    to_ranks = torch.tensor(send_counts).view(world_size, -1).sum(1)
    received, from_ranks = comm.all_to_all_v(rows.cpu(), to_ranks, group=group)
    expected = torch.tensor(recv_counts).view(world_size, -1).sum(1).tolist()
    contract = "be what the peers send"
    checks.value(op, "recv_counts", from_ranks == expected, contract, f"{from_ranks} rows")
    return received.to(rows.device)


def _transposed(counts: Tensor) -> Tensor:
    """[n] the rows of [A, B] counts of consecutive rows in the order of (b, a)."""
    flat = counts.reshape(-1)
    starts = (flat.cumsum(0) - flat).view(counts.shape)
    parts = [
        torch.arange(int(start), int(start + count))
        for start, count in zip(starts.T.reshape(-1), counts.T.reshape(-1), strict=True)
    ]
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


_COMMON = (
    "Tensor gmm_x, Tensor gmm_weight, str hcom, int ep_world_size, int[] send_counts, "
    "int[] recv_counts, *, Tensor? send_counts_tensor=None, Tensor? recv_counts_tensor=None, "
    "Tensor? mm_x=None, Tensor? mm_weight=None, bool trans_gmm_weight=False, "
    "bool trans_mm_weight=False"
)

npu_alltoallv_gmm = Operator(
    ALLTOALLV_GMM,
    f"{_COMMON}, bool permute_out_flag=False, str? comm_mode=None",
    "(Tensor gmm_y, Tensor mm_y, Tensor permute_out)",
    run=alltoallv_gmm,
    outputs=alltoallv_gmm_outputs,
)

npu_gmm_alltoallv = Operator(
    GMM_ALLTOALLV,
    f"{_COMMON}, str? comm_mode=None",
    "(Tensor y, Tensor mm_y)",
    run=gmm_alltoallv,
    outputs=gmm_alltoallv_outputs,
)
