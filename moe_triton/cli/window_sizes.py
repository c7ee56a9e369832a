"""Window memory of models, for ``moe-triton doctor``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, cast

from ..ascend import required_buffsize_mb
from ..ascend.op_names import DISPATCH
from ..ops import window_bytes
from .terminal import Terminal, positive, size

_QUANTS = {"none": "bf16", "int8": "int8"}  # option -> dtype of dispatched rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its windows: E, K and H."""

    num_experts: int
    top_k: int
    hidden: int


MODELS = {
    "deepseek-v3": Shape(256, 8, 7168),
    "kimi-k2": Shape(384, 8, 7168),
    "qwen3-235b": Shape(128, 8, 4096),
    "gpt-oss-120b": Shape(128, 4, 2880),
    "mixtral": Shape(8, 2, 4096),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select models and sizes."""
    add = parser.add_argument_group("models and sizes of windows").add_argument
    add(
        "--model",
        choices=MODELS,
        metavar="NAME",
        help=f"one model instead of all: {', '.join(MODELS)}",
    )
    add("--experts", type=positive, metavar="E", help="routed experts, instead of the model's")
    add("--top-k", type=positive, metavar="K", help="experts per token, instead of the model's")
    add("--hidden", type=positive, metavar="H", help="hidden size, instead of the model's")
    add("--world-size", type=positive, default=8, metavar="W", help="ranks (default: 8)")
    add("--tokens", type=positive, default=128, metavar="T", help="maximum per rank (default: 128)")
    add("--quant", choices=_QUANTS, help="one format of dispatched rows instead of both")


def examine(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Window sizes per model and format.

    A model that does not fit the ranks has a problem instead of sizes; if the user asked for that
    model, the program ends with exit code 2.
    """
    changes = {"num_experts": arguments.experts}
    changes |= {"top_k": arguments.top_k, "hidden": arguments.hidden}
    changes = {name: value for name, value in changes.items() if value is not None}
    requested = arguments.model is not None or changes
    shapes = MODELS
    if requested:
        model = arguments.model or "deepseek-v3"
        shapes = {"custom" if changes else model: dataclasses.replace(MODELS[model], **changes)}
    windows = []
    for name, shape in shapes.items():
        sizes: dict[str, Any] = dataclasses.asdict(shape)
        sizes |= {"world_size": arguments.world_size, "max_tokens": arguments.tokens}
        problem = _problem(shape, arguments.world_size)
        if problem and requested:
            arguments.error(problem)
        windows.append(
            {
                "model": name,
                **sizes,
                "problem": problem,
                "bytes": {} if problem else _window_bytes(sizes, arguments.quant),
                "hccl_buffsize_mb": {} if problem else _ascend_buffers(sizes),
            }
        )
    return windows


def _problem(shape: Shape, world_size: int) -> str | None:
    if shape.top_k > shape.num_experts:
        return f"a token cannot choose {shape.top_k} of {shape.num_experts} experts"
    if shape.num_experts % world_size:
        return f"{shape.num_experts} experts cannot be divided over {world_size} ranks"
    return None


def _window_bytes(sizes: dict[str, Any], chosen: str | None) -> dict[str, dict[str, int]]:
    windows = {}
    for quant in [chosen] if chosen else _QUANTS:
        size_of = window_bytes(**sizes, quant=cast("Any", None if quant == "none" else quant))
        windows[quant] = {name: getattr(size_of, name) for name in ("dispatch", "combine", "total")}
    return windows


def _ascend_buffers(sizes: dict[str, Any]) -> dict[str, int]:
    return {product: required_buffsize_mb(product, DISPATCH, **sizes) for product in ("a2", "a3")}


def show(terminal: Terminal, windows: list[dict[str, Any]]) -> None:
    """Print a line per model and format."""
    terminal.line(
        f"  {'model':<14}{'E/K/H':<12}{'rows':<5}{'dispatch':>10}{'combine':>10}{'total':>10}"
        f"{'a2':>7}{'a3':>7}"
    )
    for window in windows:
        shape = f"{window['num_experts']}/{window['top_k']}/{window['hidden']}"
        label = f"  {window['model']:<14}{shape:<12}"
        if window["problem"]:
            terminal.line(f"{label}{window['problem']}")
        buffers = "".join(f"{mb:>7}" for mb in window["hccl_buffsize_mb"].values())
        for quant, sizes in window["bytes"].items():
            cells = "".join(f"{size(number):>10}" for number in sizes.values())
            terminal.line(f"{label}{_QUANTS[quant]:<5}{cells}{buffers}")
            label, buffers = " " * len(label), ""
    terminal.line("  E experts, top K, hidden size H; a2, a3: HCCL_BUFFSIZE there, in MB")
    terminal.line("  sized for the worst case (see max_recv_tokens); pages are allocated on use")
