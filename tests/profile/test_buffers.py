"""Communication buffers, against numbers worked out by hand; ids are the cases of the documents."""

from __future__ import annotations

import pytest

import moe_triton
from moe_triton import profile
from moe_triton.errors import ArgumentTypeError, ArgumentValueError, UnavailableError
from moe_triton.profile import buffers

MB = 2**20
DISPATCH, COMBINE = "npu_moe_distribute_dispatch", "npu_moe_distribute_combine"
RMS = "npu_moe_distribute_combine_add_rms_norm"

# W 16, E 32 (L 2), K 4, H 2048, 64 tokens; for rows of 4096 bytes.
SHAPE = {"world_size": 16, "num_experts": 32, "top_k": 4, "hidden": 2048, "max_tokens": 64}
ROWS = 2 * 64 * 16 * 4608 + 4 * 64 * 4096  # of A3 and 950, except v1

BUFFERS = {
    "a2-v1": ("a2", DISPATCH, {}, 2 * (64 * 16 * 2 * 4096 + 2 * MB)),
    "a2-v1-combine": ("a2", COMBINE, {}, 2 * (64 * 16 * 2 * 4096 + 2 * MB)),
    "a2-v1-k-1": ("a2", DISPATCH, {"top_k": 1}, 2 * (64 * 16 * 1 * 4096 + 2 * MB)),
    "a2-v1-hierarchy": (
        "a2",
        DISPATCH,
        {"comm_alg": "hierarchy"},
        32 * 64 * (4096 + 4 * 8 * 4) + 104 * MB,
    ),
    "a2-v2": ("a2", f"{DISPATCH}_v2", {}, 2 * (64 * 16 * 2 * 4096 + 2 * MB)),
    "a2-v2-fullmesh": (
        "a2",
        f"{COMBINE}_v2",
        {"comm_alg": "fullmesh"},
        2 * (64 * 16 * 2 * 4096 + 2 * MB),
    ),
    "a2-v2-int4": (
        "a2",
        f"{DISPATCH}_v2",
        {"itemsize": 4},
        2 * (64 * 16 * 2 * (8192 + 32) + 2 * MB),
    ),
    "a2-v2-hierarchy": (
        "a2",
        f"{DISPATCH}_v2",
        {"comm_alg": "hierarchy", "top_k": 9},
        (32 + 4) * 64 * (4096 + 16 * 16) + 8 * MB,
    ),
    "a3-v1": ("a3", DISPATCH, {}, 2 * 64 * 2 * 2176 * 37 + 2 * MB),
    # L 1 and A 1024: rows of Align512(4096 + 44) and 4096 bytes.
    "a3-v1-tp": (
        "a3",
        DISPATCH,
        {"tp_world_size": 2, "num_experts": 16},
        2 * 1024 * (4608 + 4096),
    ),
    # L is that of the twelve ranks with routed experts.
    "a3-v1-shared": (
        "a3",
        DISPATCH,
        {"num_experts": 24, "num_shared_ranks": 4},
        2 * 64 * 2 * 2176 * 37 + 2 * MB,
    ),
    "a3-v2": ("a3", f"{DISPATCH}_v2", {}, 2 * ROWS),
    "a3-v2-shared": (
        "a3",
        f"{DISPATCH}_v2",
        {"num_experts": 24, "num_shared_ranks": 4, "num_shared_experts": 2},
        2 * (ROWS + 2 * 64 * 4096),
    ),
    "a3-v2-fullmesh_v1": ("a3", f"{DISPATCH}_v2", {"comm_alg": "fullmesh_v1"}, 2 * ROWS),
    "a3-v2-fullmesh_v2": ("a3", f"{DISPATCH}_v2", {"comm_alg": "fullmesh_v2"}, 2 * ROWS),
    # 14336 + 64 bytes are 30 times 480, where 14848 would be 29 times 512.
    "a3-v2-fullmesh_v2-7168": (
        "a3",
        f"{DISPATCH}_v2",
        {"comm_alg": "fullmesh_v2", "hidden": 7168},
        2 * (2 * 64 * 16 * 30 * 512 + 4 * 64 * 14336),
    ),
    "a3-v2-hierarchy": (
        "a3",
        f"{COMBINE}_v2",
        {"comm_alg": "hierarchy"},
        32 * 64 * (4096 + 4 * 8 * 4) + 404 * MB,
    ),
    "a3-rms": ("a3", RMS, {}, 2 * 64 * 2 * 2176 * 37 + 2 * MB),
    "a3-split": ("a3", f"{DISPATCH}_setup", {}, 2 * ROWS),
    "a3-split-least": ("a3", f"{DISPATCH}_setup", {"max_tokens": 1, "hidden": 32}, 2 * MB),
    "950-v1": (
        "950",
        DISPATCH,
        {"vector_cores": 40},
        40 * 32 + 2 * 16 * 64 * 2048 * 2 * 2,
    ),
    "950-v2": ("950", f"{DISPATCH}_v2", {}, 2 * ROWS),
    "950-v2-fullmesh_v2": ("950", f"{DISPATCH}_v2", {"comm_alg": "fullmesh_v2"}, 2 * ROWS),
    "950-v2-fullmesh_v2-7168": (
        "950",
        f"{DISPATCH}_v2",
        {"comm_alg": "fullmesh_v2", "hidden": 7168},
        2 * (2 * 64 * 16 * 30 * 512 + 4 * 64 * 14336),
    ),
    "950-split": ("950", f"{COMBINE}_setup", {}, 4 * ROWS),
    "950-split-least": ("950", f"{COMBINE}_setup", {"max_tokens": 1, "hidden": 32}, 2 * MB),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_the_buffer_that_an_op_requires(case):
    product, op, changes, num_bytes = BUFFERS[case]
    actual = moe_triton.required_buffsize_mb(product, op, **SHAPE | changes)
    assert actual == -(-num_bytes // MB)


@pytest.mark.parametrize(
    "product, expected",
    [
        # 2 * (128 * 8 * 8 * 7168 * 2 bytes + 2 MB) = 228 MB.
        ("a2", 228),
        # 2 * 128 * 2 * (7168 + 128) * (8 * 32 + 8 + 1) bytes = 944.1 MB, rounded up, plus 2.
        ("a3", 947),
    ],
)
def test_deepseek_v3_on_eight_ranks(product, expected):
    shape = {"world_size": 8, "num_experts": 256, "top_k": 8, "hidden": 7168, "max_tokens": 128}
    assert moe_triton.required_buffsize_mb(product, DISPATCH, **shape) == expected


# Where a byte decides, which megabytes do not show.
BYTES = [
    ("a3_v2", {"hidden": 2272}, 2 * (2 * 64 * 16 * 4608 + 4 * 64 * 4608)),
    ("a3_v2", {"hidden": 2273}, 2 * (2 * 64 * 16 * 5120 + 4 * 64 * 4608)),
    ("a3_split", {"hidden": 2272}, 2 * (2 * 64 * 16 * 4608 + 4 * 64 * 4608)),
    ("a3_split", {"hidden": 2273}, 2 * (2 * 64 * 16 * 5120 + 4 * 64 * 4608)),
    ("a3_fullmesh_v2", {"hidden": 2144}, 2 * (2 * 64 * 16 * 10 * 512 + 4 * 64 * 4608)),
    ("a2_v1_hierarchy", {}, 32 * 64 * (4096 + 4 * 8 * 4) + 104 * MB),
    ("a2_v2_hierarchy", {"tokens": 63, "hidden": 2049}, (32 + 4) * 266240 + 8 * MB),
    ("a950_v1", {}, 2 * 16 * 64 * 2048 * 2 * 2),
    ("a950_v1", {"vector_cores": 40}, 1280 + 2 * 16 * 64 * 2048 * 2 * 2),
]


@pytest.mark.parametrize("formula, changes, num_bytes", BYTES)
def test_bytes(formula, changes, num_bytes):
    sizes = buffers.Sizes(16, 32, 2, 4, 2048, 64)._replace(**changes)
    assert getattr(buffers, formula)(sizes) == num_bytes


@pytest.mark.parametrize(
    "product, op, changes, error, problem",
    [
        (
            "portable",
            DISPATCH,
            {},
            UnavailableError,
            "the documents give no buffer size for .* on portable",
        ),
        ("a9", DISPATCH, {}, UnavailableError, r"product must be one of \['portable', 'a2'"),
        ("a2", RMS, {}, UnavailableError, "is not an operator of a2"),
        ("950", RMS, {}, UnavailableError, "the documents give no buffer size for .* on 950"),
        ("950", DISPATCH, {}, UnavailableError, "vector_cores must be given"),
        ("a3", "npu_moe", {}, ArgumentValueError, "op must be one of"),
        ("a3", DISPATCH, {"num_experts": 33}, ArgumentValueError, "num_experts must be"),
        ("a3", DISPATCH, {"num_shared_ranks": 16}, ArgumentValueError, "num_shared_ranks must be"),
        ("a3", DISPATCH, {"hidden": 0}, ArgumentValueError, "hidden must be positive, got 0"),
        ("a3", DISPATCH, {"hidden": 1.5}, ArgumentTypeError, "hidden must be an integer"),
        ("a3", DISPATCH, {"comm_alg": "fullmesh"}, ArgumentValueError, "comm_alg must be one of"),
    ],
)
def test_what_has_no_answer(product, op, changes, error, problem):
    with pytest.raises(error, match=problem):
        moe_triton.required_buffsize_mb(product, op, **SHAPE | changes)


def test_the_environment_chooses_the_algorithm_on_a2(monkeypatch):
    monkeypatch.setenv("HCCL_INTRA_PCIE_ENABLE", "1")
    monkeypatch.setenv("HCCL_INTRA_ROCE_ENABLE", "0")
    chosen = moe_triton.required_buffsize_mb("a2", DISPATCH, **SHAPE)
    named = moe_triton.required_buffsize_mb("a2", DISPATCH, **SHAPE, comm_alg="hierarchy")
    assert chosen == named == 113


# Product, family, algorithm, H, and the MB that a call otherwise of that SHAPE needs.
LEAST = [
    ("a2", "v1", "", 2048, 20),
    ("a2", "v1", "hierarchy", 2048, 113),
    ("a2", "v2", "hierarchy", 2048, 18),
    ("a3", "v1", "", 7168, 68),
    ("a3", "v2", "", 2048, 20),
    ("a3", "v2", "hierarchy", 2048, 413),
    ("a3", "rms", "", 2048, 22),
    ("a3", "split", "", 2048, 20),
    ("950", "v1", "", 2048, 16),
    ("950", "v2", "", 2048, 20),
    ("950", "split", "", 2048, 40),
]


@pytest.mark.parametrize(
    "product, family, algorithm, hidden, least",
    [pytest.param(*case, id=f"row22-{'-'.join(case[:3])}") for case in LEAST],
)
def test_a_buffer_too_small(product, family, algorithm, hidden, least, monkeypatch):
    facts = SHAPE | {"hidden": hidden, "experts_per_rank": 2, "comm_alg": algorithm}
    facts["with_expand_scales"] = True if product == "a2" else None
    check = profile.PROFILES[product].check
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    check(family, "combine", **facts)
    for enough in (str(least), "200000"):
        monkeypatch.setenv("HCCL_BUFFSIZE", enough)
        check(family, "combine", **facts)
    for wrong in (str(least - 1), "0", "-1", "many"):
        monkeypatch.setenv("HCCL_BUFFSIZE", wrong)
        with pytest.raises(ArgumentValueError) as caught:
            check(family, "combine", **facts)
        assert caught.value.argument == "HCCL_BUFFSIZE"
        contract = f"HCCL_BUFFSIZE must be at least {least} MB on {product}"
        assert str(caught.value).startswith(f"combine: {contract}")
        assert str(caught.value).endswith(f", got {wrong}")
