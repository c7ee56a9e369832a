"""vllm-ascend's token dispatchers and its MoE method, unmodified, on 4 processes.

Run by ``run.py`` of this folder, which starts it through npu-run with the checkout on its path, in
an environment that has vLLM. Arguments are the product, A2, A3 or A5, and a part of the names of
the cases to run. vLLM's state of a whole engine (configuration, groups, forward context) is
replaced; the code under test is not.
"""

from __future__ import annotations

import datetime as dt
import itertools
import socket
import sys
import traceback
import types
import typing
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


U = 2.0**-8  # the largest relative error of rounding to bfloat16


class Format(typing.NamedTuple):
    """A format of quantised rows: the dtype, and how many elements share a power of two.

    Without such blocks a row has one scale, its largest magnitude over that of the dtype.
    """

    dtype: torch.dtype
    block: int = 0

    def values(self, x, scale):
        """What rows of a dispatch stand for, in float32."""
        assert x.dtype == self.dtype, x.dtype
        if scale.dtype == torch.uint8:  # npu_dynamic_mx_quant returns the bytes
            scale = scale.view(torch.float8_e8m0fnu)
        block = self.block or x.shape[1]
        return x.float() * scale.float().repeat_interleave(block, dim=1)[:, : x.shape[1]]

    def bounds(self, x):
        """The least and the largest value that each element of float32 rows may be rounded to.

        They differ where an element lies halfway between two codes up to the error of float32.
        """
        if self.block:
            largest = x.abs().unflatten(-1, (-1, self.block)).amax(-1, keepdim=True)
            exponent = torch.frexp(largest).exponent - 1 - 8  # float8_e4m3fn ends below 2**9
            scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
            scale = scale.expand(*exponent.shape[:-1], self.block).flatten(-2)
        else:
            scale = x.abs().amax(-1, keepdim=True) / self.most
        rounded = [self._rounded(x * near / scale) * scale for near in (1 - 1e-6, 1 + 1e-6)]
        return torch.minimum(*rounded), torch.maximum(*rounded)

    @property
    def most(self):
        """The largest magnitude of a code."""
        return 127 if self.dtype == torch.int8 else torch.finfo(self.dtype).max

    def _rounded(self, codes):
        if self.dtype == torch.int8:
            return codes.round()
        return codes.clamp(-self.most, self.most).to(self.dtype).float()


INT8, E4M3 = Format(torch.int8), Format(torch.float8_e4m3fn)
MX = Format(torch.float8_e4m3fn, 32)
FORMATS = {
    "NONE": None,
    "W8A8": INT8,
    "W4A8": INT8,
    "W8A8FP": E4M3,
    "W4A8MXFP": MX,
    "W8A8MXFP": MX,
}


def format_of(dispatcher, quantisation):
    """The format in which a dispatcher delivers rows; None for bfloat16."""
    if (dispatcher, quantisation) == ("AllGather", "W8A8FP"):
        return None  # vllm-ascend quantises behind this dispatcher
    return FORMATS[quantisation]


def scale_by_expert(output, fmt, rank):
    """Multiply each received row by 1 + its expert, in bfloat16: an expert that names itself."""
    counts = output.group_list.long()
    if output.group_list_type == 0:
        counts = counts.diff(prepend=counts.new_zeros(1))
    ends = counts.cumsum(0)
    rows = torch.zeros(output.hidden_states.shape, dtype=torch.bfloat16)
    for expert, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        part = slice(end - count, end)
        values = output.hidden_states[part]
        if fmt is None:
            assert values.dtype == torch.bfloat16, values.dtype
        else:
            values = fmt.values(values, output.dynamic_scale.reshape(len(rows), -1)[part])
        rows[part] = ((1 + rank * L + expert) * values.float()).bfloat16()
    return rows


def scaled_bounds(layer, fmt, sent):
    """The least and the largest value of what ``scale_by_expert`` should sum up to.

    Args:
        layer: one rank's tokens.
        fmt: of the rows that dispatch delivers, or None.
        sent: of the rows that combine sends, or None.
    """
    x = layer.x.float()
    low, high = (x, x) if fmt is None else fmt.bounds(x)
    factors = 1 + layer.ids.float().unsqueeze(-1)
    rows = [factors * bound.unsqueeze(1) for bound in (low, high)]  # (N, K, H)
    if sent is not None:
        rows = [
            sent.bounds(rows[0].bfloat16().float())[0],
            sent.bounds(rows[1].bfloat16().float())[1],
        ]
    return [(bound * layer.weights.unsqueeze(-1)).sum(1) for bound in rows]


def check_within(actual, low, high, error):
    """Each element lies between the bounds, or beside them by no more than ``error``."""
    beside = torch.maximum(low - actual, actual - high)
    assert bool((beside <= error).all()), f"{(beside / error).max().item():.3f} times the bound"


def check_routing(logits, weights, ids):
    """The K largest logits of each token, and their softmax."""
    chosen = logits.gather(1, ids.long())
    assert torch.equal(chosen.sort(descending=True).values, logits.topk(K).values), "other experts"
    assert bool((ids.sort(1).values.diff(dim=1) > 0).all()), "an expert twice"
    wanted = chosen.softmax(-1)
    # In bfloat16 the probabilities, their sum and the quotient are rounded.
    error = 4 * U * wanted if weights.dtype == torch.bfloat16 else 1e-5
    assert bool(((weights.float() - wanted).abs() <= error).all()), "other weights"


def dense_layer(x, weights, ids, w1, w2, fmt):
    """A layer in float32, and how far one with roundings may be from it, element by element.

    The bound follows each rounding to first order, and adds 10 % for the higher ones.

    Args:
        x: (N, H) tokens.
        weights: (N, K) of their experts.
        ids: (N, K) their experts.
        w1: (E, H, 2 F) weights, those of the gates first.
        w2: (E, F, H) weights.
        fmt: in which both matrix products take their rows; None for bfloat16.
    """
    low, high = (x, x) if fmt is None else fmt.bounds(x)
    gate_up = torch.einsum("nh,nkhf->nkf", (low + high) / 2, w1[ids])
    gate_up_error = torch.einsum("nh,nkhf->nkf", (high - low) / 2, w1[ids].abs())
    gate, up = gate_up.chunk(2, dim=-1)
    gate_error, up_error = (gate_up_error + U * gate_up.abs()).chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    hidden = silu * up
    error = (slope * up).abs() * gate_error + silu.abs() * up_error
    error += 2 * U * hidden.abs()  # of the activation, and of its product
    if fmt is not None:
        error += hidden.abs().amax(-1, keepdim=True) / fmt.most / 2  # half a step
    rows = torch.einsum("nkf,nkfh->nkh", hidden, w2[ids])
    error = torch.einsum("nkf,nkfh->nkh", error, w2[ids].abs())
    error += 2 * U * rows.abs()  # of a row, and of the sum or each rank's part of it
    shares = weights.unsqueeze(-1)
    return (rows * shares).sum(1), 1.1 * (error * shares).sum(1) + 1e-6


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
        # scale_alg of MX quantisation depends on the model, here on none in particular.
        model = namespace(hf_text_config=None, architectures=None)
        ascend_config = namespace(vllm_config=namespace(model_config=model))
        self.ragged = False
        self.patches = [
            *(mock.patch.object(token_dispatcher, name, new) for name, new in replaced.items()),
            mock.patch(
                "vllm_ascend.ops.fused_moe.moe_utils.get_ep_group", lambda: group, create=True
            ),
            mock.patch("vllm_ascend.ascend_config.get_ascend_config", lambda: ascend_config),
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
        rows = scale_by_expert(output, format_of(name, quantisation), self.rank)
        return dispatcher.token_combine(rows, output.combine_metadata)

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
        sent = MX if (name, quantisation) == ("MC2", "W8A8MXFP") else None
        bounds, active = scaled_bounds(layer, format_of(name, quantisation), sent), layer.mask
        actual = self.run_dispatcher(name, quantisation, layer).float()
        if name == "AllGather":
            dist.all_reduce(actual)
        # Two roundings to bfloat16: of the experts' rows, and of their sum (or each rank's part).
        error = 2.02 * U * torch.maximum(*(bound.abs() for bound in bounds)) + 1e-6
        check_within(actual[active], *(t[active] for t in (*bounds, error)))

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
        check_routing(layer.logits.float(), weights, ids)
        generator = torch.Generator().manual_seed(5)
        w1 = (torch.randn(E, H, 2 * F, generator=generator) / H**0.5).bfloat16()
        w2 = (torch.randn(E, F, H, generator=generator) / F**0.5).bfloat16()

        local = slice(self.rank * L, (self.rank + 1) * L)
        parts, scales = {"w1": w1[local], "w2": w2[local]}, {}
        dense = [w1.float(), w2.float()]
        if quantisation == "W8A8":
            for index, key in enumerate(parts):
                scale = (dense[index].abs().amax(1) / 127).bfloat16()  # one for each column
                codes = (dense[index] / scale.float().unsqueeze(1)).round().clamp(-127, 127)
                dense[index] = codes * scale.float().unsqueeze(1)
                parts[key] = [codes[local].to(torch.int8)]
                scales[f"{key}_scale"] = [scale[local]]
        wanted, error = dense_layer(
            layer.x.float(), weights.float(), ids.long(), *dense, fmt=FORMATS[quantisation]
        )
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
        check_within(actual, wanted, wanted, error)


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
        "hccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=dt.timedelta(minutes=10),
    )
    client = Client(product, rank)
    failures = 0
    for name, check in cases(product):
        if wanted and wanted not in name:
            continue
        error = None
        try:
            with torch.inference_mode():
                check(client)
        except Exception:  # the other cases run on, and rank 0 hears of it
            error = traceback.format_exc()
        errors = [None] * WORLD
        dist.all_gather_object(errors, error)
        failed = [error for error in errors if error]
        failures += bool(failed)
        if rank == 0:
            print("FAIL" if failed else "PASS", product, name, flush=True)
            if failed:
                print(failed[0], flush=True)
    dist.destroy_process_group()
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free_port = listener.getsockname()[1]
    chosen = sys.argv[2] if len(sys.argv) > 2 else ""
    torch.multiprocessing.spawn(run_rank, args=(free_port, sys.argv[1], chosen), nprocs=WORLD)
