"""Gating against its definition, and against numbers worked out by hand."""

from __future__ import annotations

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels.launch_config import Launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAN, INF = float("nan"), float("inf")
# exp differs in the last bits from one library to another, and sums of it in their order.
SCORES = {"rtol": 2e-6, "atol": 1e-30, "equal_nan": True}


@pytest.fixture(params=[None, Launch(3, 1, 4, 1), Launch(2, 4, 8, 1)], ids=["own", "low", "tall"])
def launch(request, monkeypatch):
    """Every shape of tile that a device may get."""
    if request.param is not None:
        module = importlib.import_module("moe_triton.kernels.gating")
        monkeypatch.setattr(module, "tiles", lambda *args: request.param)
    return request.param


def check_choice(result, top_k, bias, groups, top_groups, group_by_two, scoring, scaling):
    """Ids and weights are exactly those that follow from the scores."""
    weights, ids, scores = result
    choice = scores if bias is None else scores + bias.float()
    grouped = choice.unflatten(1, (groups, -1))
    if groups > 1:
        best = grouped.topk(2, dim=2).values.sum(2) if group_by_two else grouped.amax(2)
        kept = best.argsort(dim=1, descending=True, stable=True)[:, :top_groups]
        usable = torch.zeros_like(best).scatter_(1, kept, 1.0) > 0
        grouped = grouped.masked_fill(~usable[..., None], -INF)
    order = grouped.flatten(1).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :top_k].int())
    expected = scores.gather(1, ids.long())
    if scoring == "sigmoid":
        total = torch.zeros_like(expected[:, :1])
        for column in expected.split(1, dim=1):
            total = total + column
        expected = expected / (total + 1e-20)
    tolerance = {"rtol": 0, "atol": 0, "equal_nan": True}
    if scoring == "chosen":
        expected, tolerance = torch.softmax(expected, dim=1), SCORES
    torch.testing.assert_close(weights, expected * scaling, **tolerance)


@hypothesis.given(data=st.data())
def test_gating_of_any_sizes(data, device):
    draw = data.draw
    groups, members = draw(st.sampled_from([1, 2, 3, 8])), draw(st.sampled_from([1, 2, 5, 32]))
    num_experts = groups * members
    options = {
        "groups": groups,
        "top_groups": draw(st.integers(1, groups), "top_groups"),
        "group_by_two": members > 1 and draw(st.booleans(), "by two"),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid", "chosen"])),
        "scaling": draw(st.sampled_from([1.0, 2.5])),
    }
    top_k = draw(st.integers(1, min(num_experts, 12)), "K")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99), "seed"))
    logits = 3 * torch.randn(
        (draw(st.sampled_from([0, 1, 5, 40])), num_experts), generator=generator
    )
    if draw(st.booleans(), "ties"):
        logits.round_()
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    logits = logits.to(device=device, dtype=dtype)
    bias = None
    if draw(st.booleans(), "bias"):
        bias = torch.randn(num_experts, generator=generator).to(device)
    result = kernels.top_k_gating(logits, top_k, bias=bias, **options)
    expected = ref.top_k_gating(logits, top_k, bias=bias, **options)
    for actual, wanted in zip(result, expected, strict=True):
        assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    torch.testing.assert_close(result[2], expected[2], **SCORES)
    check_choice(result, top_k, bias, **options)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "chosen"])
@pytest.mark.parametrize("num_experts", [7, 8, 9])
def test_gating_with_every_shape_of_tile(num_experts, scoring, launch, device):
    logits = torch.randn((11, num_experts + 2), device=device)[:, :num_experts]
    options = {"groups": 1, "top_groups": 1, "group_by_two": False, "scoring": scoring}
    result = kernels.top_k_gating(logits, 3, **options)
    torch.testing.assert_close(result[2], ref.top_k_gating(logits, 3, **options)[2], **SCORES)
    check_choice(result, 3, None, **options, scaling=1.0)


def test_many_experts(device):
    logits = torch.randn((2, 2048), device=device)
    options = {"groups": 1, "top_groups": 1, "group_by_two": False, "scoring": "softmax"}
    result = kernels.top_k_gating(logits, 64, **options)
    check_choice(result, 64, None, **options, scaling=1.0)


def test_example(steps, device):
    """The numbers of the kernel's docstring."""
    logits = torch.tensor([[1.0, 2, 3, 4], [4, 4, 1, 1]], device=device).log()
    weights, ids, scores = steps.top_k_gating(logits, 2)
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.4, 0.3], [0.4, 0.4]]))
    assert ids.tolist() == [[3, 2], [0, 1]]
    torch.testing.assert_close(scores.sum(1).cpu(), torch.ones(2))


def test_bias_chooses_but_does_not_weigh(steps, device):
    bias = torch.tensor([0.0, 0.0, 5.0, 1.0], device=device)
    logits = torch.zeros((1, 4), device=device)
    weights, ids, _ = steps.top_k_gating(logits, 2, bias=bias, scoring="sigmoid", scaling=3.0)
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("by_two, expected", [(False, [2, 3]), (True, [0, 1])])
def test_groups_limit_the_choice(by_two, expected, steps, device):
    # Group 0 has the better pair, group 1 the best expert.
    logits = torch.logit(torch.tensor([[0.6, 0.5, 0.9, 0.1]], device=device))
    options = {"groups": 2, "group_by_two": by_two, "scoring": "sigmoid"}
    assert steps.top_k_gating(logits, 2, **options)[1].tolist() == [expected]


def test_experts_of_other_groups_follow_where_there_are_too_few(device):
    logits = torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.3, 0.4]], device=device)
    _, ids, _ = kernels.top_k_gating(logits, 4, groups=3)
    assert ids.tolist() == [[2, 3, 0, 1]]


def test_a_negative_choice_is_a_choice(device):
    bias = torch.tensor([-3.0, -1.0, -4.0, -2.0], device=device)
    _, ids, _ = kernels.top_k_gating(torch.zeros((1, 4), device=device), 4, bias=bias)
    assert ids.tolist() == [[1, 3, 0, 2]]


def test_the_two_best_of_a_group_may_be_equal(device):
    logits = torch.logit(torch.tensor([[0.6, 0.3, 0.2, 0.5, 0.5, 0.1]], device=device))
    options = {"groups": 2, "group_by_two": True, "scoring": "sigmoid"}
    assert kernels.top_k_gating(logits, 2, **options)[1].tolist() == [[3, 4]]


def test_large_logits(device):
    logits = torch.tensor([[1000.0, 999.0, -1000.0]], device=device)
    weights, _, scores = kernels.top_k_gating(logits, 2)
    torch.testing.assert_close(scores, logits.double().softmax(1).float(), **SCORES)
    torch.testing.assert_close(weights, scores[:, :2], rtol=0, atol=0)


@pytest.mark.parametrize("chosen_id", [5, -1])
def test_chosen_ids_out_of_range_are_errors(chosen_id, asserting, device):
    ids = torch.tensor([[0, chosen_id]], dtype=torch.int32, device=device)
    with pytest.raises(Exception, match="chosen id out of range"):
        kernels.top_k_gating(torch.zeros((1, 5), device=device), 2, chosen_ids=ids)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_bias_comes_first(sign, device):
    bias = torch.tensor([0.0, 1.0, 0.0, 0.5], device=device)
    bias[2] = torch.copysign(torch.tensor(NAN), torch.tensor(sign))
    _, ids, _ = kernels.top_k_gating(torch.zeros((1, 4), device=device), 3, bias=bias)
    assert ids.tolist() == [[2, 1, 3]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "chosen"])
def test_weights_of_chosen_experts(scoring, device):
    """With a duplicate, other than the best experts, in another order."""
    logits = torch.randn((4, 5), device=device)
    chosen_ids = torch.tensor([[0, 4, 2], [3, 3, 1], [4, 3, 2], [2, 0, 0]], dtype=torch.int32).to(
        device
    )
    found = kernels.top_k_gating(logits, 3, chosen_ids=chosen_ids, scoring=scoring, scaling=2.0)
    wanted = ref.top_k_gating(logits, 3, chosen_ids=chosen_ids, scoring=scoring, scaling=2.0)
    assert torch.equal(found[1], chosen_ids) and torch.equal(wanted[1], chosen_ids)
    torch.testing.assert_close(found[0], wanted[0], **SCORES)


def test_zeros_of_either_sign_are_equal(device):
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]], device=device)
    weights, ids, _ = kernels.top_k_gating(logits, 3, scoring="chosen")
    assert ids.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(weights.cpu(), torch.full((1, 3), 1 / 3))


def test_chosen_logits_may_be_alike_to_a_softmax_over_all(device):
    """Both small logits underflow in a softmax over all; "chosen" still ranks them."""
    logits = torch.tensor([[0.0, -300.0, -200.0]], device=device)
    assert kernels.top_k_gating(logits, 2)[1].tolist() == [[0, 1]]
    assert kernels.top_k_gating(logits, 2, scoring="chosen")[1].tolist() == [[0, 2]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "chosen"])
@pytest.mark.parametrize("groups", [1, 2])
def test_nan_and_infinite_logits_stay_with_their_token(scoring, groups, device):
    logits = torch.arange(24.0, device=device).view(4, 6) / 8
    logits[0, 4], logits[1, 2], logits[2] = NAN, INF, -INF
    options = {"scoring": scoring, "groups": groups}
    weights, ids, scores = kernels.top_k_gating(logits, 3, **options)
    wanted, wanted_ids, wanted_scores = ref.top_k_gating(logits, 3, **options)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted, **SCORES)
    torch.testing.assert_close(scores, wanted_scores, **SCORES)
    assert scores[3].isfinite().all()


LOGITS = torch.zeros((2, 6))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"logits": LOGITS.int()}, TypeError, "logits must be one of"),
        ({"logits": LOGITS[0]}, ValueError, "logits must have the shape"),
        ({"logits": LOGITS.T}, ValueError, "logits must be contiguous"),
        ({"top_k": 0}, ValueError, "top_k must be from 1 to 6, got 0"),
        ({"top_k": 7}, ValueError, "top_k must be from 1 to 6, got 7"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have the shape \(6\)"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias must be on cpu"),
        ({"groups": 4}, ValueError, "groups must divide 6 experts, got 4"),
        ({"groups": 0}, ValueError, "groups must divide 6 experts, got 0"),
        ({"groups": 3, "top_groups": 4}, ValueError, "top_groups must be from 1 to 3, got 4"),
        ({"groups": 6, "group_by_two": True}, ValueError, "group_by_two must be False for groups"),
        ({"scoring": "tanh"}, ValueError, "scoring must be .* got 'tanh'"),
    ],
)
def test_gating_rejects(changed, error, message):
    arguments = {"logits": LOGITS, "top_k": 2} | changed
    with pytest.raises(error, match=f"top_k_gating: {message}") as caught:
        kernels.top_k_gating(**arguments)
    assert isinstance(caught.value, MoeError)
