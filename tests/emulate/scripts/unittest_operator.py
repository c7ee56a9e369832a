"""An operator test as torch_npu has them: ranks in processes, results through queues."""

import os

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_npu
from torch_npu.testing.common_distributed import skipIfUnsupportMultiNPU
from torch_npu.testing.common_utils import SupportedDevices, create_common_tensor
from torch_npu.testing.testcase import TestCase, run_tests

world_size, h = 2, 32


class TestDispatch(TestCase):
    @classmethod
    def _rank(cls, rank, x, c2p, p2c):
        torch_npu.npu.set_device(rank)
        address = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
        dist.init_process_group("hccl", rank=rank, world_size=world_size, init_method=address)
        group = dist.distributed_c10d._get_default_group()
        name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
        ids = torch.tensor([[0], [1]], dtype=torch.int32).npu()
        out = torch_npu.npu_moe_distribute_dispatch(
            x=x.npu(),
            expert_ids=ids,
            group_ep=name,
            ep_world_size=world_size,
            ep_rank_id=rank,
            moe_expert_num=world_size,
        )
        c2p.put((rank, out[0][: out[3][0]].cpu()))
        p2c.get()

    @skipIfUnsupportMultiNPU(world_size)
    @SupportedDevices(["Ascend910_93"])
    def test_dispatch(self):
        pairs = [create_common_tensor([np.float16, -1, [2, h]], -1, 1) for _ in range(world_size)]
        for host, device in pairs:
            self.assertRtolEqual(host, device)
        tokens = [host for host, _ in pairs]
        context = mp.get_context("spawn")
        c2p, p2c = context.Queue(), context.Queue()
        ranks = [
            context.Process(target=self._rank, args=(rank, tokens[rank], c2p, p2c))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for _ in ranks:
            rank, output = c2p.get(timeout=60)
            expected = torch.stack([token[rank] for token in tokens])
            self.assertEqual(output, expected, f"rank {rank}")
        for _ in ranks:
            p2c.put(0)
        for process in ranks:
            process.join()

    @skipIfUnsupportMultiNPU(17)
    def test_too_many(self):
        self.fail("npu-run emulates 16")

    def test_comparisons_fail(self):
        x = torch.arange(10.0)
        for compare, y in (
            (self.assertEqual, x + 1e-3),
            (self.assertEqual, x[:5]),
            (self.assertRtolEqual, x + 1),
            (self.assertRtolEqual, x.double()),
            (self.assertRtolEqual, x[:5]),
            (self.assertRtolEqual, x * float("nan")),
        ):
            for left, right in ((x, y), ([x, x], [x, y])):
                with self.assertRaises(AssertionError):
                    compare(left, right)
        with self.assertRaisesRegex(AssertionError, "(?s)which.*0.001"):
            self.assertEqual(x, x + 1e-3, "which")
        self.assertEqual(x, x + 1e-3, 1e-2)
        self.assertEqual({"a": [x, 1]}, {"a": [x, 1]})
        self.assertEqual(None, None)
        self.assertEqual(x, x.double(), 0, "", True, False)
        with self.assertRaisesRegex(AssertionError, "dtype"):
            self.assertEqual(x, x.double(), exact_dtype=True)
        self.assertRtolEqual(x, x.double(), auto_trans_dtype=True)
        with self.assertRaisesRegex(AssertionError, "which\ndtypes differ"):
            self.assertRtolEqual(x, x.double(), message="which")
        self.assertEqual(x * float("nan"), x * float("nan"))
        self.assertRtolEqual(1e6 * x + 1e6, 1e6 * x + 1e6 + 1)
        self.assertRtolEqual(x.half(), x.half() * (1 + 2**-11))


if __name__ == "__main__":
    run_tests()
