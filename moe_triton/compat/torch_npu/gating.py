"""Gating on one device: choose each token's experts. Letters: N tokens, E experts, k of a token."""

from __future__ import annotations

from torch import Tensor

from ...ascend.local import schemas


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k experts with the largest score + bias, from the best groups; with gradients.

        p = softmax(x) or sigmoid(x);  s = p + bias;  y = p of the chosen, without bias

    in float32. Of equal scores, of experts or of groups, the lower id comes first, and NaN comes
    before all numbers. Sigmoid scores are divided by their sum + eps. The products' own limits of
    the groups (such as more than 2 experts each) are not imposed.

    Args:
        x: (N, E) float16, bfloat16 or float32, E at most 2048. Gradients go to it, through the
            scores of the chosen experts.
        k: from 1 to the experts of k_group groups.
        bias: (E,) of the dtype of x.
        input_ids: (N,) int32 or int64 rows of tid2eid, which choose instead of the scores.
        tid2eid: (any, k) int32 or int64 in [0, E), with input_ids.
        k_group: groups that a token may use, from 1 to group_count.
        group_count: equal groups of consecutive experts, a divisor of E.
        group_select_mode: score of a group, 0 its best expert, 1 the sum of its best two.
        renorm: 0.
        norm_type: 0 softmax, 1 sigmoid.
        out_flag: whether torch_npu computes out; here it always holds p.
        routed_scaling_factor: factor of y.
        eps: added to the sum, so that the division stays finite.

    Returns:
        y: (N, k) of the dtype of x, largest score + bias first.
        expert_idx: (N, k) int32.
        out: (N, E) float32, p.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value; values in tensors are checked on the CPU.
    """
    return schemas.gating_top_k(**locals())


def npu_moe_gating_top_k_backward(
    x_norm: Tensor,
    grad_y: Tensor,
    expertIdx: Tensor,
    *,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> Tensor:
    """The gradient of the x of ``npu_moe_gating_top_k``, in float32 and rounded once.

    Args:
        x_norm: (N, E) float32, its output out: softmax or sigmoid of x.
        grad_y: (N, K) float16, bfloat16 or float32, the gradient of its output y.
        expertIdx: (N, K) int32, its output expert_idx.
        renorm: 0.
        norm_type: 0 softmax, 1 sigmoid.
        routed_scaling_factor: as there.
        eps: as there.

    Returns:
        (N, E) of the dtype of grad_y.

    Raises:
        The errors of ``npu_moe_gating_top_k``.
    """
    return schemas.gating_top_k_backward(
        x_norm=x_norm,
        grad_y=grad_y,
        expert_idx=expertIdx,
        renorm=renorm,
        norm_type=norm_type,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    )


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k experts with the largest softmax, in float32; ties go to the lower id.

    Args:
        x: (N, E), or (B, N, E), float16, bfloat16 or float32.
        finished: bool, (N,) or (B, N), True for tokens without experts.
        k: from 1 to E, at most 1024.

    Returns:
        y: (.., k) of the dtype of x, the softmax of the chosen, largest first.
        expert_idx: (.., k) int32; E for finished tokens.
        row_idx: (.., k) int32: j * (number of tokens) + i for choice j of token i.

    Raises:
        The errors of ``npu_moe_gating_top_k``.
    """
    return schemas.gating_top_k_softmax(**locals())


def npu_moe_gating_top_k_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k experts with the largest softmax, or the softmax of the k largest.

    Args:
        x: as in ``npu_moe_gating_top_k_softmax``.
        k: see there.
        finished: see there.
        renorm: 0 softmax over all experts, 1 over the chosen ones; None is 0.
        output_softmax: whether to return the softmax, with renorm 0; None is False.

    Returns:
        y: as in ``npu_moe_gating_top_k_softmax``.
        expert_idx: see there.
        softmax_result: float32 of the shape of x; (0,) without output_softmax.

    Raises:
        The errors of ``npu_moe_gating_top_k``.
    """
    return schemas.gating_top_k_softmax_v2(**locals())
