"""vllm-ascend's token dispatchers and its MoE method, unmodified, on 4 processes.

Run by ``python tests/support/clients vllm-ascend CHECKOUT``, which starts it through npu-run with
the checkout on its path, in an environment that has vLLM. The product is the only argument: A2, A3
or A5. vLLM's state of a whole engine (configuration, groups, forward context) is replaced; the code
under test is not.
"""

from __future__ import annotations

import itertools
import socket
import sys
import traceback
import types
from importlib.machinery import ModuleSpec
from unittest import mock

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 - makes the device npu

N, H, E, K, WORLD, F, CAPACITY = 12, 128, 8, 2, 4, 64, 16
L = E // WORLD


def namespace(**values):
    """An object with these attributes."""
    return types.SimpleNamespace(**values)


class Layer:
    """One rank's tokens and routing, and what a dense computation makes of them."""

    def __init__(self, rank):
        generator = torch.Generator().manual_seed(20 + rank)
        self.x = torch.randn(N, H, generator=generator).bfloat16()
        logits = torch.randn(N, E, generator=generator)
        self.logits = logits.bfloat16()
        weights, ids = logits.softmax(-1).topk(K)
        self.weights, self.ids = weights, ids.int()
        self.expert_map = torch.full((E,), -1, dtype=torch.int32)
        self.expert_map[rank * L : (rank + 1) * L] = torch.arange(L, dtype=torch.int32)
        self.mask = torch.ones(N, dtype=torch.bool)


def dequantized(x, scale):
    """Rows of a dispatch in float32; scale is (rows, 1), or (rows, blocks of 32)."""
    if x.dtype == torch.bfloat16:
        return x.float()
    block = 32 if scale.shape[1] > 1 else x.shape[1]
    return x.float() * scale.float().repeat_interleave(block, dim=1)[:, : x.shape[1]]


def scale_by_expert(output, rank):
    """Multiply each received row by 1 + its expert, in bfloat16: an expert that names itself."""
    counts = output.group_list.long()
    if output.group_list_type == 0:
        counts = counts.diff(prepend=counts.new_zeros(1))
    ends = counts.cumsum(0)
    rows = torch.zeros(output.hidden_states.shape, dtype=torch.bfloat16)
    scale = output.dynamic_scale
    for expert, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        part = slice(end - count, end)
        part_scale = scale.reshape(len(rows), -1)[part] if scale is not None else None
        values = dequantized(output.hidden_states[part], part_scale)
        rows[part] = ((1 + rank * L + expert) * values).bfloat16()
    return rows


def scaled_dense(layer):
    """What ``scale_by_expert`` should sum up to."""
    factors = ((1 + layer.ids.float()) * layer.weights).sum(1, keepdim=True)
    return layer.x.float() * factors


def close(actual, wanted, tolerance):
    """Compare relatively to the largest magnitude of a row."""
    error = (actual.float() - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp_min(1e-6)
    assert bool((error <= tolerance).all()), f"relative error {error.max().item():.4f}"


# Relative to the largest value of a row. float8 rounds to 1/16, and MX scales clip up to 1/8.
TOLERANCE = {"NONE": 0.02, "W8A8": 0.03, "W4A8": 0.03, "W8A8FP": 0.08}


class Client:
    """vllm-ascend's modules with the engine's state replaced."""

    def __init__(self, product, rank):
        info = types.ModuleType("vllm_ascend._build_info")
        info.__device_type__ = product
        info.__spec__ = ModuleSpec(info.__name__, None)
        sys.modules[info.__name__] = info
        from vllm_ascend.ops.fused_moe import moe_comm_method, moe_mlp, token_dispatcher
        from vllm_ascend.ops.fused_moe.dataclass import fused_experts, moe_quant, router_input
        from vllm_ascend.ops.fused_moe.dataclass import token_dispatcher as data
        from vllm_ascend.ops.fused_moe.router.fused_topk_router import AscendFusedTopKRouter
        from vllm_ascend.ops.fused_moe.router.grouped_topk_router import AscendGroupedTopKRouter
        from vllm_ascend.quantization.quant_type import QuantType

        self.product, self.rank = product, rank
        self.dispatchers, self.data = token_dispatcher, data
        self.quant, self.routing, self.types = moe_quant, router_input, QuantType
        self.comm, self.mlp, self.experts = moe_comm_method, moe_mlp, fused_experts
        self.router = AscendFusedTopKRouter if product == "A5" else AscendGroupedTopKRouter
        group = namespace(
            device_group=dist.group.WORLD, rank_in_group=rank, world_size=WORLD, rank=rank
        )
        config = namespace(parallel_config=namespace(tensor_parallel_size=1))
        replaced = {
            "get_ep_group": lambda: group,
            "get_mc2_group": lambda: group,
            "get_current_vllm_config": lambda: config,
            "get_mc2_tokens_capacity": lambda: CAPACITY,
            "get_ascend_config": lambda: namespace(enable_mc2_hierarchy_comm=False),
            "is_hierarchical_communication_enabled": lambda: False,
            "should_skip_allreduce_across_dp_group": lambda _: self.ragged,
        }
        self.ragged = False
        self.patches = [
            *(mock.patch.object(token_dispatcher, name, new) for name, new in replaced.items()),
            mock.patch(
                "vllm_ascend.ops.fused_moe.moe_utils.get_ep_group", lambda: group, create=True
            ),
        ]
        for patch in self.patches:
            patch.start()

    def quantisation(self, name):
        """Parameters of a quantisation by its name, W4A8 with scales per channel."""
        mxfp = None
        if name.endswith("MXFP"):
            mxfp = self.quant.MoEMxfpParams(
                act_quant_type=torch.float8_e4m3fn,
                weight_quant_type=torch.float8_e4m3fn,
                scale_dtype=torch.float8_e8m0fnu,
                per_token_scale_dtype=torch.float8_e8m0fnu,
            )
        kind = self.types[name]
        return self.quant.MoEQuantParams(
            quant_type=kind, mxfp=mxfp, is_per_channel_weight=name == "W4A8"
        )

    def dispatch_input(self, layer, quantisation):
        """The input of ``token_dispatch``."""
        return self.data.MoETokenDispatchInput(
            hidden_states=layer.x,
            topk_weights=layer.weights,
            topk_ids=layer.ids,
            routing=self.routing.MoeRouterInput(
                expert_map=layer.expert_map,
                global_redundant_expert_num=0,
                mc2_mask=layer.mask,
                apply_router_weight_on_input=False,
            ),
            quant=self.quantisation(quantisation),
        )

    def run_dispatcher(self, name, quantisation, layer):
        """Dispatch, scale by expert, combine."""
        classes = {
            "MC2": self.dispatchers.TokenDispatcherWithMC2,
            "AllGather": self.dispatchers.TokenDispatcherWithAllGather,
            "All2AllV": self.dispatchers.TokenDispatcherWithAll2AllV,
        }
        dispatcher = classes[name](top_k=K, num_experts=E, num_local_experts=L)
        output = dispatcher.token_dispatch(self.dispatch_input(layer, quantisation))
        return dispatcher.token_combine(scale_by_expert(output, self.rank), output.combine_metadata)

    def check_dispatcher(self, name, quantisation, *, ragged=False):
        """One dispatcher against the dense computation."""
        self.ragged = ragged
        layers = [Layer(rank) for rank in range(WORLD)]
        if ragged:
            for rank, layer in enumerate(layers):
                for field in ("x", "ids", "weights", "mask"):
                    setattr(layer, field, getattr(layer, field)[: N - rank])
        layer = layers[self.rank]
        if name == "MC2" and not ragged:
            layer.mask[N - 3 :] = False
        if name == "AllGather":  # every rank has all tokens, and its experts' share of the sums
            for field in ("x", "ids", "weights", "mask"):
                setattr(layer, field, torch.cat([getattr(part, field) for part in layers]))
        wanted, active = scaled_dense(layer), layer.mask.clone()
        actual = self.run_dispatcher(name, quantisation, layer).float()
        if name == "AllGather":
            dist.all_reduce(actual)
        close(actual[active], wanted[active], TOLERANCE.get(quantisation, 0.14))

    def moe_method(self, name):
        """The communication method with its dispatcher; prepare and finalize belong to vLLM."""
        method = {
            "MC2": self.comm.MC2CommImpl,
            "AllGather": self.comm.AllGatherCommImpl,
            "All2AllV": self.comm.AlltoAllCommImpl,
        }[name]
        config = namespace(experts_per_token=K, num_experts=E, num_local_experts=L)
        with mock.patch.object(method, "_get_prepare_finalize", lambda self: None):
            return method(config)

    def check_method(self, name, quantisation):
        """Gating, dispatch, grouped matmul with swiglu, combine, against a dense layer."""
        self.ragged = False
        layers = [Layer(rank) for rank in range(WORLD)]
        layer = layers[self.rank]
        if name == "AllGather":
            for field in ("x", "logits", "mask"):
                setattr(layer, field, torch.cat([getattr(part, field) for part in layers]))
        router = self.router(
            top_k=K,
            global_num_experts=E,
            num_expert_group=1,
            topk_group=1,
            scoring_func="softmax",
            renormalize=True,
        )
        weights, ids = router._compute_routing(layer.x, layer.logits, torch.int32)
        generator = torch.Generator().manual_seed(5)
        w1 = (torch.randn(E, H, 2 * F, generator=generator) / H**0.5).bfloat16()
        w2 = (torch.randn(E, F, H, generator=generator) / F**0.5).bfloat16()
        gate_up = torch.einsum("nh,nkhf->nkf", layer.x.float(), w1.float()[ids.long()])
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        rows = torch.einsum("nkf,nkfh->nkh", hidden, w2.float()[ids.long()])
        wanted = (rows * weights.float().unsqueeze(-1)).sum(1)

        local = slice(self.rank * L, (self.rank + 1) * L)
        parts, scales = {"w1": w1[local], "w2": w2[local]}, {}
        if quantisation == "W8A8":
            for key, weight in parts.items():
                scale = weight.float().abs().amax(1) / 127  # (L, N), one for each column
                parts[key] = (weight.float() / scale.unsqueeze(1)).round().to(torch.int8)
                scales[f"{key}_scale"] = [scale.bfloat16()]
            parts = {key: [weight] for key, weight in parts.items()}
        method = self.moe_method(name)
        context = namespace(
            moe_comm_method=method,
            moe_comm_type=self.comm.MoECommType[
                {"MC2": "MC2", "AllGather": "ALLGATHER", "All2AllV": "ALLTOALL"}[name]
            ],
        )
        experts_input = self.experts.build_fused_experts_input(
            hidden_states=layer.x.clone(),
            topk_weights=weights,
            topk_ids=ids,
            quant_type=self.types[quantisation],
            dynamic_eplb=False,
            expert_map=layer.expert_map,
            mc2_mask=layer.mask,
            **parts,
            **scales,
        )
        with (
            mock.patch.object(self.comm, "_EXTRA_CTX", context),
            mock.patch.object(self.mlp, "_EXTRA_CTX", context),
            mock.patch(
                "vllm_ascend.ops.fused_moe.dataclass.moe_mlp.enable_fusion_gmmswigluquant",
                lambda: False,
            ),
        ):
            actual = method.fused_experts(experts_input).routed_out.float()
        if name == "AllGather":
            dist.all_reduce(actual)
        close(actual, wanted, 0.03 if quantisation == "NONE" else 0.06)


def cases(product):
    """(name, check) of a product."""
    quantisations = ["NONE", "W8A8", "W4A8"]
    if product == "A5":
        quantisations += ["W8A8FP", "W4A8MXFP", "W8A8MXFP"]
    for dispatcher, quantisation in itertools.product(
        ("MC2", "AllGather", "All2AllV"), quantisations
    ):
        yield (
            f"{dispatcher} {quantisation}",
            lambda client, d=dispatcher, q=quantisation: client.check_dispatcher(d, q),
        )
    yield (
        "MC2 NONE, ranks with different numbers of tokens",
        lambda client: client.check_dispatcher("MC2", "NONE", ragged=True),
    )
    for method, quantisation in itertools.product(
        ("MC2", "AllGather", "All2AllV"), ("NONE", "W8A8")
    ):
        # This calls vllm-ascend's own kernels, torch.ops._C_ascend, which are not torch_npu's.
        if (method, quantisation) == ("MC2", "W8A8"):
            continue
        yield (
            f"MoE method {method} {quantisation}",
            lambda client, m=method, q=quantisation: client.check_method(m, q),
        )


def run_rank(rank, port, product, wanted):
    """All cases on one rank; rank 0 prints the results."""
    torch.npu.set_device(rank)
    dist.init_process_group(
        "hccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    client = Client(product, rank)
    for name, check in cases(product):
        if wanted and wanted not in name:
            continue
        error = None
        try:
            with torch.inference_mode():
                check(client)
        except Exception:
            error = traceback.format_exc()
        errors = [None] * WORLD
        dist.all_gather_object(errors, error)
        if rank == 0:
            failed = [error for error in errors if error]
            print("FAIL" if failed else "PASS", product, name, flush=True)
            if failed:
                print(failed[0], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free_port = listener.getsockname()[1]
    chosen = sys.argv[2] if len(sys.argv) > 2 else ""
    torch.multiprocessing.spawn(run_rank, args=(free_port, sys.argv[1], chosen), nprocs=WORLD)
