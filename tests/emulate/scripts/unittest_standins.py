"""Modules of torch_npu around the operators, in one process."""

import csv
import json
import pathlib
import pickle
import sys
import tempfile

import torch
import torch_npu
import torchair
from torch_npu._C._distributed_c10d import ProcessGroupHCCL
from torch_npu.testing.common_utils import create_common_tensor
from torch_npu.testing.testcase import TestCase, run_tests
from torch_npu.utils import collect_env, register_asd_hook

import moe_triton
from moe_triton.emulate import coverage

NZ = 29


def route():
    """One operator, which CANN runs as the kernel MoeInitRoutingV3."""
    ids = torch.tensor([[0], [1]], dtype=torch.int32).npu()
    torch_npu.npu_moe_init_routing_v2(torch.ones(2, 8).npu(), ids, expert_num=2)


class TestStandIns(TestCase):
    def test_memory(self):
        free, total = torch.npu.mem_get_info()
        assert 0 < free <= total == torch.npu.get_device_properties(0).total_memory
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        tensor = torch.ones(64 << 20, dtype=torch.int8, device="npu")
        assert torch.npu.memory_allocated() > before + (32 << 20)
        assert torch.npu.max_memory_allocated() >= torch.npu.memory_allocated() - (1 << 20)
        del tensor
        torch.npu.empty_cache()
        stats = torch.npu.memory_stats()
        assert stats["allocated_bytes.all.peak"] > before + (32 << 20)
        assert stats["reserved_bytes.all.current"] > 0
        torch.npu.reset_max_memory_allocated()
        assert torch.npu.max_memory_reserved() < before + (32 << 20)
        assert torch.npu.memory is torch_npu.npu.memory

    def test_properties_name_the_product_of_the_profile(self):
        properties = torch.npu.get_device_properties("npu:3")
        assert properties.name == torch.npu.get_device_name(3)
        assert properties.vector_core_num == 2 * properties.cube_core_num
        assert torch.npu.get_soc_version() == 250
        for profile, name, number in (
            ("a2", "Ascend910B", 220),
            ("a3", "Ascend910_93", 250),
            ("950", "Ascend950", 260),
        ):
            moe_triton.set_profile(profile)
            try:
                assert torch.npu.get_device_name().startswith(name)
                assert torch.npu.get_device_name().endswith("emulated by moe_triton on cpu)")
                assert torch.npu.get_soc_version() == number
            finally:
                moe_triton.set_profile("portable")

    def test_options_can_be_set_and_read(self):
        torch_npu.npu.config.allow_internal_format = True
        assert torch.npu.config.allow_internal_format
        torch.npu.matmul.allow_hf32 = True
        torch.npu.set_compile_mode(jit_compile=False)
        torch.npu.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})

    def test_formats_are_noted_and_change_no_value(self):
        x = torch.arange(6.0).view(2, 3).npu()
        assert torch_npu.get_npu_format(x) == 2
        cast = torch_npu.npu_format_cast(x, NZ)
        assert torch.equal(cast, x)
        weight = torch.nn.Parameter(torch.empty(2, 3))
        weight.data = cast
        assert torch_npu.get_npu_format(weight) == torch_npu.Format.FRACTAL_NZ == NZ
        assert torch_npu.get_npu_format(x) == torch_npu.Format.ND
        like = torch.ops.npu.npu_format_cast(x, weight)
        assert torch_npu.get_npu_format(like) == NZ
        torch_npu.npu_format_cast_(x, NZ)
        assert torch_npu.get_npu_format(x) == NZ
        host, on_npu = create_common_tensor((torch.ones(1).numpy().dtype, NZ, (4, 4)), -1, 1)
        assert torch.equal(host, on_npu) and torch_npu.get_npu_format(on_npu) == NZ
        with self.assertRaisesRegex(ValueError, "acl_format must be a number"):
            torch_npu.npu_format_cast(x, 1000)

    def test_graphs_are_refused_by_name(self):
        assert not torch.npu.is_current_stream_capturing()
        for name in ("NPUGraph", "graph", "graph_pool_handle", "graph_task_group_begin"):
            with self.assertRaisesRegex(RuntimeError, rf"^torch\.npu\.{name}: is not emulated"):
                getattr(torch.npu, name)()
        assert isinstance(torch.npu.NPUGraph, type)  # annotations need a type

    def test_functions_that_libraries_import_are_refused_when_called(self):
        from torch_npu import npu_fusion_attention

        with self.assertRaisesRegex(RuntimeError, r"^torch_npu\.npu_fusion_attention: is not"):
            npu_fusion_attention(torch.ones(1))

    def test_operators_raise_runtime_errors_of_their_kind(self):
        for operator in (torch_npu.npu_moe_token_permute, torch.ops.npu.npu_moe_token_permute):
            with self.assertRaisesRegex(RuntimeError, "indices must be int32 or int64") as caught:
                operator(torch.ones(2, 3), torch.ones(2))
            error = pickle.loads(pickle.dumps(caught.exception))
            assert isinstance(error, TypeError) and isinstance(error, RuntimeError)
            assert error.code == 161002

    def test_autocast(self):
        x = torch.ones(2, 2).npu()
        for autocast in (
            torch.autocast("npu", dtype=torch.bfloat16),
            torch.autocast(device_type="npu", dtype=torch.bfloat16),
            torch.npu.amp.autocast(dtype=torch.bfloat16),
        ):
            with autocast:
                assert (x @ x).dtype == torch.bfloat16
        scaler = torch.npu.amp.GradScaler(enabled=False)
        assert scaler.scale(x) is x

    def test_random_numbers_of_all_devices(self):
        states = torch.npu.random.get_rng_state_all()
        first = torch.rand(2, device="npu")
        torch.npu.random.set_rng_state_all(states)
        assert torch.equal(torch.rand(2, device="npu"), first)
        assert len(states) == len(torch.npu.default_generators) == torch.npu.device_count()
        torch.npu.seed_all()
        assert not torch.equal(torch.rand(2), first)
        torch.npu.manual_seed_all(3)
        assert torch.npu.initial_seed() == 3

    def test_accelerator(self):
        torch.accelerator.set_device_index(4)
        assert torch.accelerator.current_device_index() == torch.npu.current_device() == 4
        torch.accelerator.set_device_index(0)
        assert torch.accelerator.device_count() == 16
        torch.accelerator.synchronize()
        assert torch.accelerator.memory_allocated() > 0

    def test_small_modules(self):
        options = ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": 400}
        assert options.hccl_config["hccl_buffer_size"] == 400
        assert options._timeout.total_seconds() > 0
        register_asd_hook(None, None)
        assert collect_env.get_cann_version() == "not known"
        assert torch_npu._C._distributed_c10d.ProcessGroupHCCL is ProcessGroupHCCL

    def test_every_module_refuses_other_names_by_name(self):
        modules = [
            module
            for name, module in sys.modules.items()
            if name.startswith(("torch_npu", "torchair")) and module.__spec__.origin is not None
        ]
        assert torch.npu.memory in modules and torch_npu.testing.testcase in modules
        for module in modules:
            name = module.__name__.replace("torch_npu.npu", "torch.npu").replace(".", r"\.")
            with self.assertRaisesRegex(RuntimeError, rf"^{name}\.absent: is not emulated"):
                module.absent  # noqa: B018 - asking for it is the test

    def test_streams_are_told_apart(self):
        default, other = torch.npu.default_stream(), torch.npu.Stream(priority=-1)
        assert torch.npu.current_stream() == default and default.device == torch.device("npu:0")
        assert other != default and other.npu_stream != default.npu_stream
        with torch.npu.stream(other):
            assert torch.npu.current_stream() == other and other.priority == -1
            assert torch.npu.default_stream() == default
        assert torch.npu.default_stream(1) != default
        torch.ones(2).npu().record_stream(other)

    def test_generators_of_npus(self):
        for generator in (torch.Generator("npu:1"), torch.Generator(device=torch.device("npu"))):
            first = torch.rand(3, generator=generator.manual_seed(3), device="npu")
            assert torch.equal(torch.rand(3, generator=generator.manual_seed(3)), first)
            assert isinstance(generator, torch.Generator)
        assert isinstance(torch.default_generator, torch.Generator)
        assert not isinstance(first, torch.Generator)
        assert torch.Generator().device == torch.device("cpu")


class TestCoverage(TestCase):
    """The table of docs/ascend.md."""

    def value(self, name):
        """What a program gets that writes the name, after the imports that it needs."""
        package, *attributes = name.split(".")
        value = {"torch": torch, "torch_npu": torch_npu, "torchair": torchair}[package]
        for attribute in attributes:
            value = getattr(value, attribute)
        return value

    def test_names_exist(self):
        for entry in (*coverage.EXACTLY, *coverage.IN_PART):
            for name in entry.names:
                if name != "torch_npu.contrib.transfer_to_npu":  # its import changes the process
                    assert self.value(name) is not None

    def test_refused_names_raise_when_called(self):
        for entry in coverage.NOT_AT_ALL:
            for name in entry.names:
                with self.assertRaisesRegex(RuntimeError, f"^{name}: is not emulated"):
                    self.value(name)()


class TestProfiler(TestCase):
    def test_trace_has_the_kernels_of_cann(self):
        schedule = torch_npu.profiler.schedule(wait=1, warmup=0, active=1, repeat=1)
        activities = [torch_npu.profiler.ProfilerActivity.NPU]
        config = torch_npu.profiler._ExperimentalConfig(
            profiler_level=torch_npu.profiler.ProfilerLevel.Level1,
            aic_metrics=torch_npu.profiler.AiCMetrics.PipeUtilization,
        )
        with torch_npu.profiler.profile(
            activities=activities, schedule=schedule, experimental_config=config
        ) as profiler:
            for _ in range(2):
                route()
                profiler.step()
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "trace.json"
            profiler.export_chrome_trace(path)
            events = json.loads(path.read_text())
        kernels = [event for event in events if "MoeInitRoutingV3" in event["name"]]
        assert len(kernels) == 1 and kernels[0]["dur"] > 0 and kernels[0]["pid"] == "NPU"

    def test_handler_writes_a_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            with torch_npu.profiler.profile(
                on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(folder, "worker")
            ):
                route()
            (output,) = pathlib.Path(folder).glob("worker_*_ascend_pt/ASCEND_PROFILER_OUTPUT")
            assert "MoeInitRoutingV3" in (output / "trace_view.json").read_text()
            with (output / "kernel_details.csv").open() as file:
                (row,) = csv.DictReader(file)
            assert row["Type"] == "MoeInitRoutingV3" and float(row["Duration(us)"]) > 0


if __name__ == "__main__":
    run_tests()
