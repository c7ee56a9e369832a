"""Products: each range at its edges, and buffers against numbers worked out by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

import moe_triton
from moe_triton import profile
from moe_triton.errors import ArgumentValueError, UnavailableError

# What every product takes, with any algorithm.
USUAL: dict[str, Any] = {
    "num_tokens": 16,
    "max_tokens": 16,
    "hidden": 7168,
    "top_k": 4,
    "world_size": 16,
    "num_experts": 32,
    "experts_per_rank": 2,
}

# The argument that carries a fact, in dispatch and in combine; None where the op does not have it.
ARGUMENTS: dict[str, tuple[str | None, str | None]] = {
    "num_tokens": ("x", "expert_ids"),
    "max_tokens": ("global_bs", "global_bs"),
    "hidden": ("x", "expand_x"),
    "top_k": ("expert_ids", "expert_ids"),
    "world_size": ("ep_world_size", "ep_world_size"),
    "num_experts": ("moe_expert_num", "moe_expert_num"),
    "experts_per_rank": ("moe_expert_num", "moe_expert_num"),
    "num_shared_ranks": ("shared_expert_rank_num", "shared_expert_rank_num"),
    "num_shared_experts": ("shared_expert_num", "shared_expert_num"),
    "num_zero_experts": ("zero_expert_num", "zero_expert_num"),
    "num_copy_experts": ("copy_expert_num", "copy_expert_num"),
    "num_const_experts": ("const_expert_num", "const_expert_num"),
    "tp_world_size": ("tp_world_size", "tp_world_size"),
    "masked": ("x_active_mask", "x_active_mask"),
    "elastic": ("elastic_info", "elastic_info"),
    "quant_mode": ("quant_mode", None),
    "with_scales": ("scales", None),
    "with_expert_scales": ("expert_scales", None),
    "comm_quant_mode": (None, "comm_quant_mode"),
    "with_expand_scales": (None, "expand_scales"),
    "with_shared_expert_x": (None, "shared_expert_x"),
}

EITHER = ((False, True), ())
NEVER = ((False,), (True,))
ALWAYS = ((True,), (False,))
NONE = ((0,), (1,))
SOME = ((0, 1, 1000), ())
WITH_TP, WITHOUT_TP = ((0, 1, 2), (-1, 3)), ((0, 1), (2,))
LISTED_ON_A3 = (8, 16, 32, 64, 128, 144, 256, 288)

EVERY_MODE = ((0, 1, 2, 3, 4), (-1, 5))
ON_PRODUCTS = {
    "quant_mode": ((0, 2), (-1, 1, 3, 4, 5)),
    "with_shared_expert_x": EITHER,
    "with_shared_expert_x, S > 0": NEVER,
}
A2_V1 = {
    "num_tokens": ((1, 256), (0, 257)),
    "max_tokens": ((16, 256), (257,)),
    "hidden": ((32, 64, 7168), (0, 16, 48, 7167, 7200)),
    "top_k": ((1, 16), (0, 17)),
    "world_size": ((16, 32, 64), (8, 15, 17, 48, 128)),
    "num_experts": ((1, 512), (0, 513)),
    "experts_per_rank": ((1, 24), (25,)),
    "num_shared_ranks": NONE,
    "tp_world_size": WITHOUT_TP,
    "masked": NEVER,
    "quant_mode": ON_PRODUCTS["quant_mode"],
    "with_scales": EITHER,
    "with_expert_scales": EITHER,
    "comm_quant_mode": ((0,), (1, 2)),
    "with_expand_scales": ALWAYS,
    "with_shared_expert_x": EITHER,
}
A2_V1_HIERARCHY = A2_V1 | {
    "experts_per_rank": ((1, 24, 25, 512), ()),
    "with_scales": NEVER,
    "comm_quant_mode": ((0, 2), (1, 3)),
}
A2_V2 = A2_V1 | {
    "world_size": (
        (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 192, 256, 384),
        (1, 9, 15, 17, 191, 383, 385),
    ),
    "num_experts": ((1, 1024), (0, 1025)),
    "experts_per_rank": ((1, 24, 25, 512), ()),
    "num_zero_experts": SOME,
    "num_copy_experts": SOME,
    "num_const_experts": NONE,
    "masked": EITHER,
    "elastic": NEVER,
}
A2_V2_HIERARCHY = A2_V2 | {
    "num_tokens": ((1, 512), (0, 513)),
    "max_tokens": ((16, 512), (513,)),
    "hidden": ((32, 7200, 10240), (0, 48, 10272)),
    "world_size": A2_V1["world_size"],
    "num_experts": ((1, 512), (0, 513)),
    "num_zero_experts": NONE,
    "num_copy_experts": NONE,
    "masked": NEVER,
    "with_scales": NEVER,
    "comm_quant_mode": ((0, 2), (1, 3)),
}
A3_V1 = ON_PRODUCTS | {
    "num_tokens": ((1, 512), (0, 513)),
    "max_tokens": ((16, 512), (513,)),
    "hidden": ((7168,), (7136, 7167, 7169, 7200)),
    "top_k": ((1, 8), (0, 9)),
    "world_size": (LISTED_ON_A3, (2, 4, 12, 143, 145, 287, 289)),
    "num_experts": ((1, 512), (0, 513)),
    "experts_per_rank": ((1, 24, 25, 512), ()),
    "num_shared_ranks": ((0, 1, 15), ()),
    "num_shared_experts": ((0, 1), ()),
    "num_shared_experts, S > 0": ((1,), (0, 2)),
    "tp_world_size": WITH_TP,
    "masked": NEVER,
    "with_scales": EITHER,
    "with_expert_scales": NEVER,
    "comm_quant_mode": ((0, 2), (1, 3)),
    "with_expand_scales": NEVER,
}
A3_V2 = A3_V1 | {
    "hidden": ((1024, 1025, 8192), (1023, 8193)),
    "top_k": ((1, 16), (0, 17)),
    "world_size": ((2, 3, 768), (1, 769)),
    "num_experts": ((1, 1024), (0, 1025)),
    "experts_per_rank": ((1, 128), (129,)),  # times 16 ranks: 2048
    "num_shared_experts, S > 0": ((1, 4), (0, 5)),
    "num_zero_experts": SOME,
    "num_copy_experts": SOME,
    "num_const_experts": SOME,
    "masked": EITHER,
    "elastic": EITHER,
    "with_expert_scales": EITHER,
    "with_expand_scales": EITHER,
}
A3_V2_HIERARCHY = A3_V2 | {
    "num_tokens": ((1, 256), (0, 257)),
    "max_tokens": ((16, 256), (257,)),
    "world_size": ((16, 32, 144, 256), (8, 15, 17, 40, 272)),
    "num_experts": ((1, 512), (0, 513)),
    "masked": NEVER,
}
_950_V1 = A3_V1 | {
    "hidden": ((1, 7168, 10000), ()),
    "world_size": ((4, *LISTED_ON_A3), (2, 12, 143, 145, 287, 289)),
    "tp_world_size": WITHOUT_TP,
    "quant_mode": EVERY_MODE,
    "comm_quant_mode": ((0,), (1, 2)),
}
_950_V2 = A3_V2 | {
    "world_size": ((2, 3, 1024), (1, 1025)),
    "quant_mode": EVERY_MODE,
    "tp_world_size": WITHOUT_TP,
    "elastic": NEVER,
}
PORTABLE_V1 = {
    fact: EITHER for fact in ARGUMENTS if fact.startswith("with") or fact == "masked"
} | {
    "with_shared_expert_x, S > 0": EITHER,
    "num_tokens": ((0, 1, 10**6), ()),
    "max_tokens": ((16, 10**6), ()),
    "hidden": ((1, 10**6), ()),
    "top_k": ((1, 1000), ()),
    "world_size": ((1, 10**4), ()),
    "num_experts": ((1, 10**6), ()),
    "experts_per_rank": ((1, 10**6), ()),
    "num_shared_ranks": ((0, 15), ()),
    "num_shared_experts, S > 0": ((1, 9), ()),
    "tp_world_size": WITH_TP,
    "quant_mode": EVERY_MODE,
    "comm_quant_mode": ((0, 2), (1, 3)),
}
PORTABLE_V2 = PORTABLE_V1 | {
    "num_zero_experts": SOME,
    "num_copy_experts": SOME,
    "num_const_experts": SOME,
    "elastic": EITHER,
}
UP_TO_12 = {"top_k": ((1, 12), (0, 13))}

# Product, family and algorithm. "by environment" is the algorithm that the two switches choose.
RANGES = {
    ("portable", "v1", ""): PORTABLE_V1,
    ("portable", "v2", ""): PORTABLE_V2,
    ("portable", "v2", "fullmesh"): PORTABLE_V2,
    ("portable", "v2", "fullmesh_v1"): PORTABLE_V2,
    ("portable", "v2", "fullmesh_v2"): PORTABLE_V2 | UP_TO_12,
    ("portable", "v2", "hierarchy"): PORTABLE_V2,
    ("a2", "v1", ""): A2_V1,
    ("a2", "v1", "by environment"): A2_V1_HIERARCHY,
    ("a2", "v2", ""): A2_V2,
    ("a2", "v2", "fullmesh"): A2_V2,
    ("a2", "v2", "hierarchy"): A2_V2_HIERARCHY,
    ("a2", "v2", "by environment"): A2_V2_HIERARCHY,
    ("a3", "v1", ""): A3_V1,
    ("a3", "v1", "by environment"): A3_V1,
    ("a3", "v2", ""): A3_V2,
    ("a3", "v2", "fullmesh_v1"): A3_V2,
    ("a3", "v2", "fullmesh_v2"): A3_V2
    | UP_TO_12
    | {"num_tokens": ((1, 256), (0, 257)), "max_tokens": ((16, 256), (257,))},
    ("a3", "v2", "hierarchy"): A3_V2_HIERARCHY,
    ("950", "v1", ""): _950_V1,
    ("950", "v2", ""): _950_V2,
    ("950", "v2", "fullmesh_v1"): _950_V2,
    ("950", "v2", "fullmesh_v2"): _950_V2 | UP_TO_12,
}
# What the combine of a product takes as comm_alg; dispatch takes all of the above.
COMBINE_ALGORITHMS = {
    "portable": ("", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy"),
    "a2": ("", "fullmesh", "hierarchy"),
    "a3": ("", "hierarchy"),
    "950": ("",),
}


def dispatch_and_combine(product: str, family: str, algorithm: str) -> list[str]:
    """The ops that take the algorithm."""
    takes = family == "v1" or algorithm in (*COMBINE_ALGORITHMS[product], "by environment")
    return ["dispatch", "combine"] if takes else ["dispatch"]


ROWS = [
    pytest.param(
        product,
        family,
        algorithm,
        op,
        fact,
        *values,
        id=f"{product}-{family}-{algorithm}-{op}-{fact}",
    )
    for (product, family, algorithm), ranges in RANGES.items()
    for op in dispatch_and_combine(product, family, algorithm)
    for fact, values in ranges.items()
    if ARGUMENTS[fact.partition(",")[0]][op == "combine"] is not None
]


@pytest.mark.parametrize("product, family, algorithm, op, fact, inside, outside", ROWS)
def test_a_range_at_its_edges(product, family, algorithm, op, fact, inside, outside, monkeypatch):
    facts = dict(USUAL)
    if op == "combine":
        facts["with_expand_scales"] = product == "a2"
    if algorithm == "by environment":
        monkeypatch.setenv("HCCL_INTRA_PCIE_ENABLE", "1")
        monkeypatch.setenv("HCCL_INTRA_ROCE_ENABLE", "0")
    elif algorithm:
        facts["comm_alg"] = algorithm
    fact, _, shared = fact.partition(", ")
    if shared:
        facts |= {"num_shared_ranks": 4, "num_shared_experts": 1}
    if fact == "num_shared_ranks":
        facts["num_shared_experts"] = 1
    if fact == "world_size":
        facts |= {"num_experts": 1, "experts_per_rank": 1}
    check = profile.PROFILES[product].check
    argument = ARGUMENTS[fact][op == "combine"]
    for value in inside:
        check(family, op, **facts | {fact: value})
    for value in outside:
        with pytest.raises(ArgumentValueError) as caught:
            check(family, op, **facts | {fact: value})
        assert caught.value.code == 561002
        assert caught.value.argument == argument
        got = "a tensor" if value is True else "None" if value is False else str(value)
        if fact == "experts_per_rank" and family == "v2":
            got = str(16 * value)
        assert re.fullmatch(
            rf"{op}: {argument} must .* on {product}\b.*, got {got}", str(caught.value)
        )


@pytest.mark.parametrize(
    "product, facts, contract",
    [
        ("a3", {"hidden": 512}, "x must have an H in [1024, 8192] on a3, got 512"),
        (
            "a2",
            {"hidden": 100, "comm_alg": "hierarchy"},
            "x must have an H in [32, 10240] in steps of 32 on a2 with hierarchy, got 100",
        ),
        (
            "a2",
            {"num_shared_ranks": 2},
            "shared_expert_rank_num must be equal to 0 on a2, got 2",
        ),
        ("950", {"tp_world_size": 2}, "tp_world_size must be one of [0, 1] on 950, got 2"),
        (
            "950",
            {"comm_alg": "x"},
            "comm_alg must be one of ['', 'fullmesh_v1', 'fullmesh_v2'] on 950, got 'x'",
        ),
    ],
)
def test_a_refusal_names_argument_range_and_value(product, facts, contract):
    with pytest.raises(ArgumentValueError, match=f"^op_dispatch: {re.escape(contract)}$"):
        profile.PROFILES[product].check("v2", "op_dispatch", **USUAL | facts)


@pytest.mark.parametrize("product", profile.PROFILES)
def test_algorithms(product):
    known = {
        "dispatch": {name for p, family, name in RANGES if p == product and family == "v2"},
        "combine": set(COMBINE_ALGORITHMS[product]),
    }
    facts = USUAL | {"with_expand_scales": product == "a2"}
    for op, names in known.items():
        for name in ("", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy", "Fullmesh", "ring"):
            if name in names:
                profile.PROFILES[product].check("v2", op, **facts, comm_alg=name)
            else:
                with pytest.raises(ArgumentValueError, match=f"got '{name}'") as caught:
                    profile.PROFILES[product].check("v2", op, **facts, comm_alg=name)
                assert caught.value.argument == "comm_alg"


@pytest.mark.parametrize("pcie, roce", [("1", None), (None, "0"), ("1", "1"), ("0", "0")])
def test_one_switch_alone_chooses_nothing(pcie, roce, monkeypatch):
    for name, value in (("PCIE", pcie), ("ROCE", roce)):
        if value is None:
            monkeypatch.delenv(f"HCCL_INTRA_{name}_ENABLE", raising=False)
        else:
            monkeypatch.setenv(f"HCCL_INTRA_{name}_ENABLE", value)
    with pytest.raises(ArgumentValueError, match="an L in"):
        profile.PROFILES["a2"].check("v1", "dispatch", **USUAL | {"experts_per_rank": 25})


def test_a_named_algorithm_beats_the_switches(monkeypatch):
    monkeypatch.setenv("HCCL_INTRA_PCIE_ENABLE", "1")
    monkeypatch.setenv("HCCL_INTRA_ROCE_ENABLE", "0")
    with pytest.raises(ArgumentValueError, match=r"on a2 with fullmesh, got 2$"):
        profile.PROFILES["a2"].check(
            "v2",
            "combine",
            **USUAL,
            comm_alg="fullmesh",
            comm_quant_mode=2,
            with_expand_scales=True,
        )


@pytest.fixture
def no_choice(monkeypatch):
    monkeypatch.delenv("MOE_TRITON_PROFILE", raising=False)
    yield
    moe_triton.set_profile(None)


@pytest.mark.usefixtures("no_choice")
def test_the_default_the_environment_and_the_process(monkeypatch):
    assert moe_triton.get_profile() == "portable"
    monkeypatch.setenv("MOE_TRITON_PROFILE", "a2")
    assert moe_triton.get_profile() == "a2"
    moe_triton.set_profile("950")
    assert moe_triton.get_profile() == profile.active_profile().name == "950"
    moe_triton.set_profile(None)
    assert moe_triton.get_profile() == profile.active_profile().name == "a2"


@pytest.mark.usefixtures("no_choice")
def test_an_unknown_profile_lists_the_known(monkeypatch):
    known = r"one of \['portable', 'a2', 'a3', '950'\], got 'a9'"
    with pytest.raises(UnavailableError, match=known):
        moe_triton.set_profile("a9")
    assert moe_triton.get_profile() == "portable"
    monkeypatch.setenv("MOE_TRITON_PROFILE", "a9")
    with pytest.raises(UnavailableError, match=known):
        profile.active_profile()


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


# W 16, E 32 (L 2), K 4, H 2048, 64 tokens; for rows of 4096 bytes.
BUFFERS = [
    ("a2", "v1", "", 2 * (64 * 16 * 2 * 4096 + 2 * 2**20)),
    ("a2", "v1", "hierarchy", 32 * 64 * (4096 + 128) + 104 * 2**20),
    ("a2", "v2", "fullmesh", 2 * (64 * 16 * 2 * 4096 + 2 * 2**20)),
    ("a2", "v2", "hierarchy", 36 * 64 * (4096 + 128) + 8 * 2**20),
    ("a3", "v1", "", 2 * 64 * 2 * 2176 * 37 + 2 * 2**20),
    ("a3", "v2", "", 2 * (2 * 64 * 16 * 4608 + 4 * 64 * 4096)),
    ("a3", "v2", "fullmesh_v2", 2 * (2 * 64 * 16 * 4608 + 4 * 64 * 4096)),
    ("a3", "v2", "hierarchy", 32 * 64 * (4096 + 128) + 404 * 2**20),
    ("a3", "rms", "", 2 * 64 * 2 * 2176 * 37 + 2 * 2**20),
    ("a3", "split", "", 2 * (2 * 64 * 16 * 4608 + 4 * 64 * 4096)),
    ("950", "v2", "", 2 * (2 * 64 * 16 * 4608 + 4 * 64 * 4096)),
    ("950", "split", "", 4 * (2 * 64 * 16 * 4608 + 4 * 64 * 4096)),
]


@pytest.mark.parametrize("product, family, algorithm, num_bytes", BUFFERS)
def test_bytes_of_a_buffer(product, family, algorithm, num_bytes):
    limits = profile.PROFILES[product].families[family][algorithm]
    assert limits.buffer(profile.Sizes(16, 32, 2, 4, 2048, 64)) == num_bytes


def test_rows_of_fullmesh_v2_leave_room_for_flags():
    # 14336 + 64 bytes are 30 times 480, where 14848 would be 29 times 512.
    limits = profile.PROFILES["a3"].families["v2"]["fullmesh_v2"]
    sizes = profile.Sizes(2, 2, 1, 1, 7168, 1, 3)
    assert limits.buffer(sizes) == 2 * (2 * 30 * 512 + 4 * 14336)


def test_a_product_without_a_formula():
    with pytest.raises(UnavailableError, match="'a2' or 'a3'"):
        profile.ascend_buffer_mb(
            "950", world_size=8, num_experts=8, top_k=1, hidden=8, max_tokens=1
        )
