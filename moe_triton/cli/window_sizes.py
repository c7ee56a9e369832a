"""Window memory of models, for ``moe-triton doctor``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, cast

from ..ascend import required_buffsize_mb
from ..ascend.op_names import DISPATCH
from ..bench.models import PRESETS
from ..layout import QUANTS
from ..ops import window_bytes
from .terminal import Terminal, positive, size

_QUANTS = {"none": "bf16", **{quant: quant for quant in QUANTS}}  # option -> dispatched rows
_DEFAULT = ("none", "int8")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its windows: E, K and H."""

    num_experts: int
    top_k: int
    hidden: int


MODELS = {name: Shape(shape.experts, shape.top_k, shape.hidden) for name, shape in PRESETS.items()}


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
    add(
        "--max-recv-tokens",
        type=positive,
        metavar="N",
        help="tokens to have room for on each rank (default: the worst case)",
    )
    add(
        "--quant",
        choices=(*_QUANTS, "all"),
        metavar="FORMAT",
        help=f"of dispatched rows: {', '.join(_QUANTS)} or all (default: {' and '.join(_DEFAULT)})",
    )


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
        limit = arguments.max_recv_tokens
        windows.append(
            {
                "model": name,
                **sizes,
                "max_recv_tokens": limit,
                "problem": problem,
                "bytes": {} if problem else _window_bytes(sizes, arguments, limit),
                "even_share_bytes": {} if problem else _twice_an_even_share(sizes, arguments),
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


def _twice_an_even_share(sizes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, int]:
    """Total bytes by format if no rank may receive more than twice an even share of the rows."""
    limit = 2 * sizes["max_tokens"] * sizes["top_k"]
    windows = _window_bytes(sizes, arguments, limit)
    return {quant: numbers["total"] for quant, numbers in windows.items()}


def _window_bytes(
    sizes: dict[str, Any], arguments: argparse.Namespace, limit: int | None
) -> dict[str, dict[str, int]]:
    windows = {}
    chosen = {None: _DEFAULT, "all": _QUANTS}.get(arguments.quant, (arguments.quant,))
    for quant in chosen:
        size_of = window_bytes(
            **sizes,
            max_recv_tokens=limit,
            quant=cast("Any", None if quant == "none" else quant),
        )
        windows[quant] = {name: getattr(size_of, name) for name in ("dispatch", "combine", "total")}
    return windows


def _ascend_buffers(sizes: dict[str, Any]) -> dict[str, int]:
    return {product: required_buffsize_mb(product, DISPATCH, **sizes) for product in ("a2", "a3")}


def show(terminal: Terminal, windows: list[dict[str, Any]]) -> None:
    """Print a line per model and format."""
    terminal.line(
        f"  {'model':<13}{'E/K/H':<11}{'rows':<12}{'dispatch':>10}{'combine':>10}{'total':>10}"
        f"{'a2':>6}{'a3':>6}"
    )
    for window in windows:
        shape = f"{window['num_experts']}/{window['top_k']}/{window['hidden']}"
        label = f"  {window['model']:<13}{shape:<11}"
        if window["problem"]:
            terminal.line(f"{label}{window['problem']}")
        buffers = "".join(f"{mb:>6}" for mb in window["hccl_buffsize_mb"].values())
        for quant, sizes in window["bytes"].items():
            cells = "".join(f"{size(number):>10}" for number in sizes.values())
            terminal.line(f"{label}{_QUANTS[quant]:<12}{cells}{buffers}")
            label, buffers = " " * len(label), ""
    terminal.line("  E experts, top K, hidden size H; a2, a3: HCCL_BUFFSIZE there, in MB")
    limits = {window["max_recv_tokens"] for window in windows}
    sized = "the worst case (see --max-recv-tokens)"
    if limits != {None}:
        sized = f"max_recv_tokens = {limits.pop()}"
    terminal.line(f"  sized for {sized}; pages are allocated on use")
    first = next((window for window in windows if window["bytes"]), None)
    if first is not None and first["max_recv_tokens"] is None:
        limit = 2 * first["max_tokens"] * first["top_k"]
        quant, total = next(iter(first["even_share_bytes"].items()))
        worst = size(first["bytes"][quant]["total"])
        terminal.line(f"  --max-recv-tokens {limit}, twice an even share, takes {size(total)}")
        terminal.line(f"  in place of {worst} for {first['model']}, {_QUANTS[quant]}")
