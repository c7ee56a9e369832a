"""Products and their buffer formulas, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from moe_triton import profile
from moe_triton.errors import ArgumentValueError, UnavailableError


def test_portable_has_no_limits():
    portable = profile.get_profile("portable")
    assert portable.max_tokens is portable.max_top_k is portable.world_sizes is None


def test_an_unknown_product_lists_the_known():
    with pytest.raises(UnavailableError, match="portable"):
        profile.get_profile("a9")


@pytest.mark.parametrize(
    "product, expected",
    [
        # 2 * (128 * 8 * 8 * 7168 * 2 bytes + 2 MB) = 228 MB.
        ("a2", 228),
        # 2 * 128 * 2 * (7168 + 128) * (8 * 32 + 8 + 1) bytes = 944.1 MB, rounded up, plus 2.
        ("a3", 947),
    ],
)
def test_buffers_of_deepseek_v3_on_eight_ranks(product, expected):
    shape = {"world_size": 8, "num_experts": 256, "top_k": 8, "hidden": 7168, "max_tokens": 128}
    assert profile.ascend_buffer_mb(product, **shape) == expected


def test_a_product_without_a_formula():
    with pytest.raises(UnavailableError, match="'a2' or 'a3'"):
        profile.ascend_buffer_mb(
            "950", world_size=8, num_experts=8, top_k=1, hidden=8, max_tokens=1
        )


SIZES = {
    "num_tokens": 8,
    "hidden": 64,
    "top_k": 4,
    "world_size": 8,
    "num_experts": 16,
    "experts_per_rank": 2,
}


@pytest.mark.parametrize(
    "limits, argument",
    [
        ({"max_tokens": 7}, "BS"),
        ({"max_hidden": 32}, "H"),
        ({"hidden_multiple": 48}, "H"),
        ({"max_top_k": 3}, "K"),
        ({"max_experts": 15}, "moe_expert_num"),
        ({"max_experts_per_rank": 1}, "moe_expert_num / MoE ranks"),
        ({"world_sizes": (16, 32)}, "ep_world_size"),
    ],
)
def test_a_product_refuses_what_it_does_not_take(limits, argument):
    profile.get_profile("portable").check("op", **SIZES)
    with pytest.raises(ArgumentValueError) as caught:
        profile.Profile("strict", **limits).check("op", **SIZES)
    assert caught.value.argument == argument
    assert "on strict" in str(caught.value)


def test_limits_are_inclusive():
    limits = {"max_tokens": 8, "max_hidden": 64, "hidden_multiple": 32, "max_top_k": 4}
    limits |= {"max_experts": 16, "max_experts_per_rank": 2, "world_sizes": (8,)}
    profile.Profile("strict", **limits).check("op", **SIZES)
