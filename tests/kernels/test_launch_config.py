"""Launches: what any choice has to keep, and that tiles get taller and shorter with the work."""

from __future__ import annotations

import pytest
import torch

from moe_triton.kernels import launch_config


def is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("width", [0, 1, 7, 7168, 8192, 100_000])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 128, 10**6])
def test_tiles(num_rows, width, indexed, device):
    actual = launch_config.tiles(device, num_rows, width, indexed=indexed)
    assert is_power_of_two(actual.rows)
    assert is_power_of_two(actual.block)
    assert is_power_of_two(actual.num_warps)
    assert actual.num_programs >= 1
    assert actual.block <= launch_config.widest(device)
    assert actual.block < max(2 * width, 2), "a row shorter than a tile gets a tile of its size"
    assert actual.rows < max(2 * num_rows, 2), "no more rows than there are"


def test_short_rows_share_a_tile(device):
    assert launch_config.tiles(device, 10**6, 64).rows > 1
    assert launch_config.tiles(device, 1, 64).rows == 1


def test_a_grid_has_no_more_programs_than_tiles(device):
    actual = launch_config.tiles(device, 1, launch_config.widest(device))
    assert actual.num_programs == 1
    assert launch_config.line(device, 1).num_programs == 1


def test_lines_share_the_programs(device):
    alone = launch_config.line(device, 10**9)
    shared = launch_config.line(device, 10**9, others=10**6)
    assert alone.num_programs > shared.num_programs == 1


@pytest.mark.parametrize("num_rows, width", [(0, 1), (5, 9), (1000, 17), (3, 10**5)])
def test_one_program_holds_a_row(num_rows, width, device):
    actual = launch_config.one_program(device, num_rows, width)
    assert actual.num_programs == 1
    assert is_power_of_two(actual.rows)
    assert is_power_of_two(actual.block)
    assert actual.block >= width
    assert actual.rows < max(2 * num_rows, 2)


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU of 4 processors with warps of 64 lanes, whatever device is asked for."""
    monkeypatch.setattr(launch_config, "policy", lambda device: launch_config.gpu_policy(4, 64))
    return torch.device("cpu")


def test_a_warp_of_64_lanes_does_the_work_of_two(small_gpu):
    assert launch_config.tiles(small_gpu, 4096, 8192).num_warps == 4
    assert launch_config.tiles(small_gpu, 1, 2048).num_warps == 1


def test_a_token_is_summed_in_parts_that_fit_registers(small_gpu):
    parts = launch_config.token_tiles(small_gpu, 2, 7168)
    assert (parts.rows, parts.block, parts.num_programs) == (1, 1024, 14)
    assert launch_config.token_tiles(small_gpu, 100, 7168).num_programs == 700


def test_programs_that_wait_run_at_a_time(small_gpu):
    # Of 2**16 registers, 64 for each of 256 lanes.
    assert launch_config.at_a_time(small_gpu, 100, 4) == 4 * 4
    assert launch_config.at_a_time(small_gpu, 100, 4, registers=128) == 4 * 2
    assert launch_config.at_a_time(small_gpu, 5, 4) == 5
    assert launch_config.at_a_time(small_gpu, 100, 32) == 4


def test_a_grid_of_an_npu_is_small(npu):
    assert launch_config.tiles(npu, 10**6, 7168).num_programs == 40
    assert launch_config.at_a_time(npu, 7, 8) == 7


def test_one_program_sums_a_whole_row(small_gpu):
    fits = launch_config.token_tiles(small_gpu, 2, 7168, whole_rows=True)
    assert (fits.block, fits.num_programs) == (8192, 2)
    longer = launch_config.token_tiles(small_gpu, 2, 8193, whole_rows=True)
    assert (longer.block, longer.num_programs) == (1024, 2)


def test_the_tile_of_one_program_fits_registers(small_gpu):
    tile = launch_config.one_program(small_gpu, 256, 64)
    assert tile.rows * tile.block == 2**13 // 4


def test_an_indexed_row_is_a_tile_without_gather(monkeypatch):
    monkeypatch.setattr(launch_config, "policy", lambda device: launch_config.npu_policy(48))
    device = torch.device("cpu")
    assert launch_config.tiles(device, 10**6, 64, indexed=True).rows == 1
    assert launch_config.tiles(device, 10**6, 64).rows > 1
    assert launch_config.tiles(device, 10**6, 64).num_programs == 48


@pytest.fixture
def npu(monkeypatch):
    """An NPU of 40 vector cores, whatever device is asked for."""
    limits = launch_config.npu_policy(40)
    monkeypatch.setattr(launch_config, "policy", lambda device: limits)
    return torch.device("cpu")


def test_tiles_of_an_npu_fit_its_buffer_twice(npu):
    for tile in (
        launch_config.tiles(npu, 10**6, 7168),
        launch_config.tiles(npu, 10**6, 64),
        launch_config.token_tiles(npu, 4096, 7168),
        launch_config.token_tiles(npu, 4096, 7168, whole_rows=True),
        launch_config.one_program(npu, 10**6, 64),
        launch_config.line(npu, 10**6),
    ):
        assert tile.rows * tile.block <= 2048
        assert tile.num_programs <= 40


@pytest.mark.parametrize("size", [0, 1, 5])
def test_an_npu_has_no_tiny_blocks(size, npu):
    assert launch_config.tiles(npu, size, size).block == 16
    assert launch_config.token_tiles(npu, size, size).block == 16
    assert launch_config.one_program(npu, size, size).block == 16
    assert launch_config.line(npu, size).block == 16


@pytest.fixture
def policies(monkeypatch):
    """Devices of other kinds, as torch and Triton would describe them."""

    class Properties:
        multi_processor_count = 132
        major, minor = 9, 0
        gpu_subslice_count = 64

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    launch_config.policy.cache_clear()
    yield
    launch_config.policy.cache_clear()


def test_arithmetic_is_what_a_device_has(policies, monkeypatch):
    cuda = launch_config.policy(torch.device("cuda", 0))
    assert cuda.arithmetic == "ptx"
    assert launch_config.cuda_arithmetic(89) == "ptx"
    assert launch_config.cuda_arithmetic(86) == "fma"
    assert launch_config.npu_policy(40).arithmetic == "plain"
    assert launch_config.INTERPRETER.arithmetic == "plain"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    launch_config.policy.cache_clear()
    assert launch_config.policy(torch.device("cuda", 0)).arithmetic == "fma"


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_devices_are_kept_busy(kind, policies):
    device = torch.device(kind, 0)
    few = launch_config.tiles(device, 128, 1024)
    assert few.rows == 1
    assert few.num_programs == 128
    many = launch_config.tiles(device, 16384, 1024)
    assert many.rows == 8
    assert launch_config.tiles(device, 16384, 7168).num_warps == 8
    assert launch_config.plan_launch(device, 1024).compare
    assert not launch_config.plan_launch(device, 32768).compare
