"""Launches: what any choice has to keep, and that tiles get taller and shorter with the work."""

from __future__ import annotations

import pytest
import torch

from moe_triton.kernels import launch


def is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("width", [0, 1, 7, 7168, 8192, 100_000])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 128, 10**6])
def test_tiles(num_rows, width, indexed, device):
    found = launch.tiles(device, num_rows, width, indexed=indexed)
    assert is_power_of_two(found.rows)
    assert is_power_of_two(found.block)
    assert is_power_of_two(found.num_warps)
    assert found.num_programs >= 1
    assert found.block <= launch.widest(device)
    assert found.block < max(2 * width, 2), "a row shorter than a tile gets a tile of its size"
    assert found.rows < max(2 * num_rows, 2), "no more rows than there are"


def test_short_rows_share_a_tile(device):
    assert launch.tiles(device, 10**6, 64).rows > 1
    assert launch.tiles(device, 1, 64).rows == 1


def test_a_grid_has_no_more_programs_than_tiles(device):
    found = launch.tiles(device, 1, launch.widest(device))
    assert found.num_programs == 1
    assert launch.line(device, 1).num_programs == 1


def test_lines_share_the_programs(device):
    alone = launch.line(device, 10**9)
    shared = launch.line(device, 10**9, others=10**6)
    assert alone.num_programs > shared.num_programs == 1


@pytest.mark.parametrize("num_rows, width", [(0, 1), (5, 9), (1000, 17), (3, 10**5)])
def test_one_program_holds_a_row(num_rows, width, device):
    found = launch.one_program(device, num_rows, width)
    assert found.num_programs == 1
    assert is_power_of_two(found.rows)
    assert is_power_of_two(found.block)
    assert found.block >= width
    assert found.rows < max(2 * num_rows, 2)


@pytest.fixture
def policies(monkeypatch):
    """Devices of other kinds, as torch and Triton would describe them."""

    class Properties:
        multi_processor_count = 132
        gpu_subslice_count = 64

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    launch.policy.cache_clear()
    yield
    launch.policy.cache_clear()


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_devices_are_kept_busy(kind, policies):
    device = torch.device(kind, 0)
    few = launch.tiles(device, 128, 1024)
    assert few.rows == 1
    assert few.num_programs == 128
    many = launch.tiles(device, 16384, 1024)
    assert many.rows == 8
    assert launch.tiles(device, 16384, 7168).num_warps == 8
    assert launch.plan_launch(device, 1024).compare
    assert not launch.plan_launch(device, 32768).compare
