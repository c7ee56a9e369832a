"""Products: each range at both of its edges, by the rows of the constraints in the documents."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_triton import profile
from moe_triton.errors import ArgumentTypeError, ArgumentValueError, UnavailableError

# Accepted by every product, with any algorithm.
USUAL: dict[str, Any] = {
    "num_tokens": 16,
    "max_tokens": 16,
    "hidden": 7168,
    "top_k": 4,
    "world_size": 16,
    "num_experts": 32,
    "experts_per_rank": 2,
}

# The argument that carries a fact, in dispatch and in combine; None if the op has none.
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
    "mask_dims": ("x_active_mask", "x_active_mask"),
    "index_dims": (None, "expand_idx"),
    "comm_type": ("comm_type", "comm_type"),
    "token_nums_type": ("expert_token_nums_type", None),
    "elastic": ("elastic_info", "elastic_info"),
    "quant_mode": ("quant_mode", None),
    "with_scales": ("scales", None),
    "with_expert_scales": ("expert_scales", None),
    "comm_quant_mode": (None, "comm_quant_mode"),
    "with_expand_scales": (None, "expand_scales"),
    "with_shared_expert_x": (None, "shared_expert_x"),
}

# The row of the documents' constraints, by which a test is found.
ROW = {
    "world_size": 3,
    "tp_world_size": 5,
    "num_shared_ranks": 8,
    "num_shared_experts": 9,
    "num_experts": 11,
    "experts_per_rank": 12,
    "quant_mode": 13,
    "with_scales": 15,
    "hidden": 16,
    "num_tokens": 17,
    "top_k": 18,
    "max_tokens": 19,
    "mask_dims": 20,
    "index_dims": 1,
    "with_expert_scales": 21,
    "with_expand_scales": 21,
    "comm_quant_mode": 23,
    "comm_type": 25,
    "num_zero_experts": 26,
    "num_copy_experts": 26,
    "num_const_experts": 26,
    "elastic": 27,
    "with_shared_expert_x": 30,
    "token_nums_type": 31,
}

EITHER = ((False, True), ())
ANY_MASK = ((None, 1, 2), ())
FIRST_TOKENS = ((None, 1), (2,))
NO_MASK = ((None,), (1, 2))
ANY_INDEX, FLAT_INDEX = ((None, 1, 2, 3), ()), ((None, 1), (0, 2))
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
    "mask_dims": NO_MASK,
    "index_dims": ANY_INDEX,
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
    "mask_dims": ANY_MASK,
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
    "mask_dims": NO_MASK,
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
    "mask_dims": NO_MASK,
    "index_dims": FLAT_INDEX,
    "with_scales": EITHER,
    "with_expert_scales": NEVER,
    "comm_quant_mode": ((0, 2), (1, 3)),
    "with_expand_scales": EITHER,
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
    "mask_dims": ANY_MASK,
    "elastic": EITHER,
    "with_expert_scales": EITHER,
    "with_expand_scales": EITHER,
}
A3_V2_HIERARCHY = A3_V2 | {
    "num_tokens": ((1, 256), (0, 257)),
    "max_tokens": ((16, 256), (257,)),
    "world_size": ((16, 32, 144, 256), (8, 15, 17, 40, 272)),
    "num_experts": ((1, 512), (0, 513)),
    "mask_dims": NO_MASK,
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
    "comm_quant_mode": ((0, 2, 3, 4), (1, 5)),
    "elastic": NEVER,
}
PORTABLE_V1 = {fact: EITHER for fact in ARGUMENTS if fact.startswith("with")} | {
    "mask_dims": ANY_MASK,
    "index_dims": ANY_INDEX,
    "with_shared_expert_x, S > 0": EITHER,
    "num_tokens": ((0, 1, 10**6), ()),
    "max_tokens": ((16, 10**6), ()),
    "hidden": ((1, 10**6), ()),
    "top_k": ((1, 16), (0, 17)),
    "world_size": ((1, 10**4), ()),
    "num_experts": ((1, 10**6), ()),
    "experts_per_rank": ((1, 10**6), ()),
    "num_shared_ranks": ((0, 15), ()),
    "num_shared_experts, S > 0": ((1, 9), ()),
    "tp_world_size": WITH_TP,
    "quant_mode": EVERY_MODE,
    "comm_quant_mode": ((0, 2), (1, 3)),
}
_WITHOUT_MX = PORTABLE_V1 | {
    "num_zero_experts": SOME,
    "num_copy_experts": SOME,
    "num_const_experts": SOME,
    "elastic": EITHER,
}
A3_RMS = A3_V2 | {"comm_quant_mode": ((0,), (1, 2))}
NOT_IN_SPLIT = {
    *("num_zero_experts", "num_copy_experts", "num_const_experts", "tp_world_size"),
    *("elastic", "with_expert_scales", "with_expand_scales"),
}
A3_SPLIT = {fact: values for fact, values in A3_V2.items() if fact not in NOT_IN_SPLIT} | {
    "world_size": ((2, 3, 384), (1, 385)),
    "num_experts": ((1, 512), (0, 513)),
    "experts_per_rank": ((1, 128, 129, 512), ()),
    "mask_dims": FIRST_TOKENS,
    "comm_quant_mode": ((0,), (1, 2)),
    "comm_type": ((0,), (-1, 1, 2)),
    "token_nums_type": ((0, 1), (-1, 2)),
}
_950_RMS = _950_V2 | {"comm_quant_mode": ((0,), (1, 2))}
_950_SPLIT = A3_SPLIT | {
    "quant_mode": ((0, 4), (-1, 1, 2, 3, 5)),
    "comm_type": ((2,), (0, 1, 3)),
    "token_nums_type": ((1,), (0, 2)),
}
PORTABLE_V2 = _WITHOUT_MX | {"comm_quant_mode": ((0, 2, 3, 4), (1, 5))}
PORTABLE_SPLIT = {fact: values for fact, values in _WITHOUT_MX.items() if fact not in NOT_IN_SPLIT}
PORTABLE_SPLIT |= {"comm_type": ((0, 1, 2), (-1, 3)), "token_nums_type": ((0, 1), (-1, 2))}
UP_TO_12 = {"top_k": ((1, 12), (0, 13))}

# Product, family and algorithm. "by environment" is the algorithm that the two switches choose.
RANGES = {
    ("portable", "v1", ""): PORTABLE_V1,
    ("portable", "v2", ""): PORTABLE_V2,
    ("portable", "v2", "fullmesh"): PORTABLE_V2,
    ("portable", "v2", "fullmesh_v1"): PORTABLE_V2,
    ("portable", "v2", "fullmesh_v2"): PORTABLE_V2 | UP_TO_12,
    ("portable", "v2", "hierarchy"): PORTABLE_V2,
    ("portable", "rms", ""): _WITHOUT_MX,
    ("portable", "split", ""): PORTABLE_SPLIT,
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
    ("a3", "rms", ""): A3_RMS,
    ("a3", "split", ""): A3_SPLIT,
    ("950", "v1", ""): _950_V1,
    ("950", "v2", ""): _950_V2,
    ("950", "v2", "fullmesh_v1"): _950_V2,
    ("950", "v2", "fullmesh_v2"): _950_V2 | UP_TO_12,
    ("950", "rms", ""): _950_RMS,
    ("950", "split", ""): _950_SPLIT,
}
# comm_alg of a product's combine; its dispatch accepts all of the above.
COMBINE_ALGORITHMS = {
    "portable": ("", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy"),
    "a2": ("", "fullmesh", "hierarchy"),
    "a3": ("", "hierarchy"),
    "950": ("",),
}


def dispatch_and_combine(product: str, family: str, algorithm: str) -> list[str]:
    """The ops of the family that take the algorithm."""
    if family == "rms":
        return ["combine"]
    takes = family == "v1" or algorithm in (*COMBINE_ALGORITHMS[product], "by environment")
    return ["dispatch", "combine"] if takes else ["dispatch"]


def row_of(fact: str) -> str:
    """The row of a fact, as ids show it."""
    return f"row{ROW[fact.partition(',')[0]]:02}"


ROWS = [
    pytest.param(
        product,
        family,
        algorithm,
        op,
        fact,
        *values,
        id=f"{row_of(fact)}-{product}-{family}-{algorithm}-{op}-{fact}",
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
        got = {True: "a tensor", False: "None"}[value] if isinstance(value, bool) else str(value)
        if fact == "mask_dims" and family != "split":
            got = "a tensor"
        if fact == "experts_per_rank" and family != "v1":
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
def test_row24_algorithms(product):
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


@pytest.mark.parametrize("product", ["a3", "950"])
def test_row11_places_for_experts(product):
    """L * W is at most 2048, counting shared ranks as if they had routed experts."""
    check = profile.PROFILES[product].check
    check("v2", "dispatch", **USUAL | {"world_size": 4, "experts_per_rank": 512})
    with pytest.raises(ArgumentValueError, match=r"an L \* ep_world_size .*, got 2049$"):
        check("v2", "dispatch", **USUAL | {"world_size": 3, "experts_per_rank": 683})


REPLICAS = {
    "a3-eplb": {
        "num_tokens": ((1, 512), (0, 513)),
        "top_k": ((1, 16), (0, 17)),
        "num_experts": ((1, 512), (0, 513)),
        "world_size": ((2, 384), (1, 385)),
        "balance_mode": ((0,), (1,)),
    },
    "a3-update_expert": {
        "num_tokens": ((1, 512), (0, 513)),
        "top_k": ((1, 16), (0, 17)),
        "num_experts": ((1, 1024), (0, 1025)),
        "world_size": ((2, 768, None), (1, 769)),
        "balance_mode": ((0, 1), (-1, 2)),
    },
    "portable-eplb": {"balance_mode": ((0,), (1,)), "top_k": ((1, 1000), ())},
    "portable-update_expert": {"balance_mode": ((0, 1), (-1, 2)), "num_tokens": ((0, 10**6), ())},
}
REPLICA_ARGUMENTS = {"num_tokens": "expert_ids", "top_k": "expert_ids", "num_experts": "eplb_table"}


@pytest.mark.parametrize(
    "name, fact, inside, outside",
    [
        pytest.param(name, fact, *values, id=f"row28-{name}-{fact}")
        for name, ranges in REPLICAS.items()
        for fact, values in ranges.items()
    ],
)
def test_a_range_of_the_replicas(name, fact, inside, outside):
    product, family = name.split("-")
    facts = {"num_tokens": 8, "top_k": 4, "num_experts": 64, "world_size": 8, "balance_mode": 0}
    for value in inside:
        profile.PROFILES[product].check(family, "op", **facts | {fact: value})
    for value in outside:
        with pytest.raises(ArgumentValueError, match=f"on {product}, got {value}$") as caught:
            profile.PROFILES[product].check(family, "op", **facts | {fact: value})
        assert caught.value.argument == REPLICA_ARGUMENTS.get(fact, fact)


FAMILIES = {
    "portable": ["v1", "v2", "rms", "split", "eplb", "update_expert"],
    "a2": ["v1", "v2"],
    "a3": ["v1", "v2", "rms", "split", "eplb", "update_expert"],
    "950": ["v1", "v2", "rms", "split"],
}


@pytest.mark.parametrize("product", FAMILIES)
def test_the_ops_of_a_product(product):
    for family in FAMILIES["portable"]:
        if family in FAMILIES[product]:
            profile.PROFILES[product].check(
                family, "combine", with_expand_scales=True if product == "a2" else None
            )
        else:
            with pytest.raises(UnavailableError, match=f"combine: is not an operator of {product}"):
                profile.PROFILES[product].check(family, "combine")


@pytest.mark.parametrize("product", FAMILIES)
def test_dtypes(product):
    """They come first: of two faults, the documents report that of the lower code."""
    check = profile.PROFILES[product].check
    wrong = {"world_size": 10**5} if product != "portable" else {}
    for family in FAMILIES[product]:
        if family in ("v1", "v2", "split") and product in ("a2", "a3"):
            with pytest.raises(ArgumentTypeError, match="y_dtype must not be a float8") as caught:
                check(family, "dispatch", float8="y_dtype", **wrong)
            assert caught.value.code == 161002
        elif family in ("v1", "v2", "split"):
            check(family, "dispatch", float8="y_dtype")
        if family == "rms" and product != "portable":
            with pytest.raises(ArgumentTypeError, match="expand_x must be bfloat16"):
                check(family, "combine", float16=True, **wrong)
        elif family not in ("eplb", "update_expert"):
            check(family, "combine", float16=True, with_expand_scales=product == "a2" or None)


@pytest.mark.parametrize(
    "product, world, tokens, spare",
    [("a2", 16, 8, 2 * 8 * 16 * 4 * 2), ("a2", 7, 8, 0), ("a3", 16, 8, 0), ("portable", 16, 8, 0)],
)
def test_words_behind_the_counts(product, world, tokens, spare):
    """2 * G * K * (W / 8) on a2: the indices that its hierarchical algorithm keeps there."""
    assert profile.PROFILES[product].spare_counts(world, tokens, 4) == spare
