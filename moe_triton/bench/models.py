"""Shapes of models, and the options that choose one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """The mixture-of-experts layer of a model.

    Attributes:
        model: its name.
        hidden: H, elements of a token.
        experts: E, routed experts.
        top_k: K, routed experts of a token.
    """

    model: str
    hidden: int
    experts: int
    top_k: int


PRESETS = {
    "deepseek-v3": Shape("DeepSeek-V3", 7168, 256, 8),
    "qwen3-235b": Shape("Qwen3-235B", 4096, 128, 8),
    "kimi-k2": Shape("Kimi-K2", 7168, 384, 8),
    "gpt-oss-120b": Shape("gpt-oss-120b", 2880, 128, 4),
    "mixtral": Shape("Mixtral-8x7B", 4096, 8, 2),
}


def add_arguments(
    parser: argparse.ArgumentParser,
    default: Sequence[str] = ("deepseek-v3",),
    otherwise: str = "",
) -> None:
    """Add the options that choose shapes.

    Args:
        parser: of the bench.
        default: the models without an option.
        otherwise: what the bench has without an option, to be printed in place of ``default``.
    """
    add = parser.add_argument_group("shapes").add_argument
    add(
        "--preset",
        nargs="+",
        choices=PRESETS,
        default=[*default],
        metavar="NAME",
        help=f"models: {', '.join(PRESETS)} (default: {otherwise or ', '.join(default)})",
    )
    add("--hidden", type=int, metavar="H", help="hidden size, instead of the models'")
    add("--experts", type=int, metavar="E", help="routed experts, instead of the models'")
    add("--top-k", type=int, metavar="K", help="experts of a token, instead of the models'")


def chosen(arguments: argparse.Namespace) -> list[Shape]:
    """The shapes that the options choose, one called "custom" where a size is given."""
    sizes = {
        name: value
        for name in ("hidden", "experts", "top_k")
        if (value := getattr(arguments, name)) is not None
    }
    shapes = [PRESETS[name] for name in arguments.preset]
    base = shapes[0] if shapes else PRESETS["deepseek-v3"]
    return [base._replace(model="custom", **sizes)] if sizes else shapes
