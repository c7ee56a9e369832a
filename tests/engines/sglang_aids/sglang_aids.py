"""A plug-in for SGLang: what its attention in PyTorch lacks on CPUs."""

from __future__ import annotations


def register() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
