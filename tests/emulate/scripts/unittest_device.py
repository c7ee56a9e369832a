"""The npu device, streams, events and names, in one process."""

import concurrent.futures
import io
import threading

import torch
import torch_npu
import torchair
from torch_npu.testing.testcase import TestCase, run_tests


def move_and_write(x):
    y = x.npu()
    y += 1
    return y


def with_devices(x):
    y = torch.zeros(3, device="npu") + x.to("npu:0") + torch.ones(3).npu()
    return (y * 2 + torch.ones_like(x, device="npu")).cpu()


class TestDevice(TestCase):
    def test_names(self):
        assert torch.device("npu:3") == torch.device("npu", 3)
        assert torch.device("npu").type == "npu"
        assert torch_npu.npu is torch.npu
        assert torch_npu.__version__.startswith(torch.__version__.partition("+")[0])

    def test_devices_count(self):
        assert torch.npu.is_available() and torch.npu.device_count() == 16
        assert torch.npu.current_device() == 0
        for device in (3, "npu:3", torch.device("npu", 3)):
            torch.npu.set_device(device)
            assert torch.npu.current_device() == 3
        torch.npu.set_device("npu")
        assert torch.npu.current_device() == 3
        with torch.npu.device(1):
            assert torch.npu.current_device() == 1
        assert torch.npu.current_device() == 3
        assert torch.npu.get_device_name(device_name=2).startswith("npu:2, emulated")
        for no_device in (None, -1):
            with torch.npu.device(no_device):
                assert torch.npu.current_device() == 3
        with concurrent.futures.ThreadPoolExecutor() as pool:
            assert pool.submit(torch.npu.current_device).result() == 0
        for wrong in (16, -1, "npu:16"):
            with self.assertRaisesRegex(ValueError, r"\[0, 16\)"):
                torch.npu.set_device(wrong)

    def test_tensors(self):
        for tensor in (
            torch.empty(3, device="npu"),
            torch.tensor([1, 2], device=torch.device("npu", 5)),
            torch.arange(3, device=1),
            torch.ones(3, pin_memory=True),
            torch.rand_like(torch.ones(3), device="npu:2"),
            torch.ones(3).new_zeros(2, device="npu"),
            torch.ones(3).npu(),
            torch.ones(3).npu(7),
            torch.ones(3).npu("npu:7", non_blocking=True),
            torch.ones(3).to("npu", torch.float16),
            torch.ones(3).to(device="npu:4", non_blocking=True),
            torch.ones(3).to(2),
            torch.ones(3).pin_memory(),
            torch.nn.Linear(2, 2, device="npu").weight,
            torch.nn.Linear(2, 2).npu().weight,
            torch.nn.Linear(2, 2).to("npu:1").bias,
        ):
            assert tensor.is_npu and tensor.device.type == "cpu"

    def test_moves_copy(self):
        x = torch.zeros(2)
        moves = [
            torch.Tensor.npu,
            torch.Tensor.cpu,
            torch.Tensor.pin_memory,
            lambda x: x.to("npu"),
            lambda x: x.to("cpu"),
            lambda x: x.to(device=torch.device("npu", 1)),
        ]
        for move in moves:
            moved = move(x)
            moved += 1
            assert not x.any()
        assert not x.pin_memory().is_pinned()
        assert x.to(torch.float32) is x
        assert x.to(moved) is x
        assert x.to("npu", torch.float32, False, False) is x

    def test_histc_of_integers(self):
        ids = torch.tensor([0, 3, 3, 1, 7]).npu()
        for dtype in (torch.int32, torch.int64, torch.float32):
            for histc in (torch.histc, torch.Tensor.histc):
                counts = histc(ids.to(dtype), bins=4, min=0, max=3)
                assert counts.dtype == dtype and counts.tolist() == [1, 1, 0, 2]
        out = torch.empty(4, dtype=torch.int64).npu()
        assert torch.histc(input=ids, bins=4, min=0, max=3, out=out) is out
        assert out.tolist() == [1, 1, 0, 2]

    def test_dtype_constants(self):
        for name, number in (
            ("int4", 285),
            ("hifloat8", 290),
            ("float8_e5m2", 291),
            ("float8_e4m3fn", 292),
            ("float8_e8m0fnu", 293),
            ("float4_e2m1fn_x2", 296),
            ("float4_e1m2fn_x2", 297),
            ("bfloat16", 283),
            ("int8", 258),
            ("float32", 256),
        ):
            assert getattr(torch_npu, name) == number

    def test_threads(self):
        tensors = []
        own_run = {"run": lambda _: tensors.append(torch.ones(2).to(0))}
        threads = [
            threading.Thread(target=lambda: tensors.append(torch.ones(2, device="npu"))),
            type("Own", (threading.Thread,), own_run)(),
        ]
        for thread in threads:
            thread.start()
            thread.join()
        assert [tensor.tolist() for tensor in tensors] == [[1, 1], [1, 1]]

    def test_default_device(self):
        with torch.device("npu:1"):
            assert torch.ones(1).is_npu

    def test_load(self):
        file = io.BytesIO()
        torch.save({"weight": torch.ones(2)}, file)
        for location in ("npu", "npu:3", torch.device("npu", 1)):
            file.seek(0)
            assert torch.load(file, map_location=location)["weight"].tolist() == [1, 1]

    def test_random_numbers(self):
        torch.manual_seed(1)
        first = torch.rand(3, device="npu")
        torch.npu.manual_seed(1)
        assert torch.equal(torch.rand(3, device="npu"), first)
        state = torch.npu.get_rng_state()
        second = torch.rand(3)
        torch.npu.set_rng_state(state)
        assert torch.equal(torch.rand(3), second)

    def test_streams_and_events(self):
        stream = torch.npu.Stream()
        before = torch.npu.current_stream()
        start, end = (torch.npu.Event(True, False, interprocess=False) for _ in range(2))
        with self.assertRaisesRegex(RuntimeError, "recorded"):
            start.elapsed_time(end)
        with torch.npu.stream(stream):
            assert torch.npu.current_stream() is stream
            start.record()
            stream.wait_stream(before)
            stream.record_event(end)
        assert torch.npu.current_stream() is not stream
        end.synchronize()
        torch.npu.synchronize()
        assert 0 <= start.elapsed_time(end) < 1000
        assert stream.query() and end.query()

    def test_names_that_are_not_emulated(self):
        for call, name in (
            (lambda: torch_npu.npu_absent(torch.ones(2)), "torch_npu.npu_absent"),
            (lambda: torch.ops.npu.npu_absent(torch.ones(2)), "torch.ops.npu.npu_absent"),
            (lambda: torch.npu.stop_device, "torch.npu.stop_device"),
            (lambda: torchair.dynamo_export, "torchair.dynamo_export"),
        ):
            with self.assertRaisesRegex(RuntimeError, f"^{name}: is not emulated"):
                call()
        assert not hasattr(torch_npu, "npu_absent")
        with self.assertRaisesRegex(ImportError, "npu_absent"):
            from torch_npu import npu_absent  # noqa: F401 - it has to fail

    def test_operators(self):
        for name in ("npu_moe_distribute_dispatch", "_npu_distribute_barrier"):
            operator = getattr(torch.ops.npu, name)
            assert operator.default is operator
            assert operator.__doc__ == getattr(torch_npu, name).__doc__
        library = torch.library.Library("npu", "FRAGMENT")
        library.define("npu_own(Tensor x) -> Tensor")
        library.impl("npu_own", lambda x: x + 1, "CPU")
        assert torch.ops.npu.npu_own(torch.ones(1)).item() == 2

    def test_compile(self):
        backend = torchair.get_npu_backend()
        compiled = torch.compile(with_devices, backend=backend, fullgraph=True, dynamic=False)
        assert compiled(torch.ones(3)).tolist() == [5, 5, 5]
        compiled = torch.compile(move_and_write, backend=backend, fullgraph=True, dynamic=False)
        x = torch.zeros(2)
        assert compiled(x).tolist() == [1, 1] and not x.any()


if __name__ == "__main__":
    run_tests()
