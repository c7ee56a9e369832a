"""The arguments of ``moe-triton record`` and ``python -m moe_triton.record``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from .hooks import Options
from .launch import launch
from .operators import OUTPUTS

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size(text: str) -> int:
    """Parse bytes such as 512M."""
    unit = _UNITS.get(text[-1:].upper(), 1)
    number = float(text[:-1] if unit > 1 else text)
    if not 0 < number < 2**50:
        raise argparse.ArgumentTypeError(f"must be a size such as 512M, got {text!r}")
    return int(number * unit)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "-o", "--output", default="moe_record", metavar="DIR", help="folder (moe_record)"
    )
    parser.add_argument(
        "--op",
        action="append",
        default=[],
        choices=[*OUTPUTS],
        metavar="NAME",
        help="operator to record, such as npu_moe_distribute_dispatch_v2; may be repeated "
        "(default: the whole family)",
    )
    parser.add_argument(
        "--skip",
        type=_count,
        default=0,
        metavar="N",
        help="leave out the first N calls of each operator, such as a warm-up (0)",
    )
    parser.add_argument(
        "--calls",
        type=_count,
        default=8,
        metavar="N",
        help="record at most N calls of each operator on a rank (8)",
    )
    parser.add_argument(
        "--max-bytes",
        type=size,
        default="2G",
        metavar="SIZE",
        help="record at most this much on a rank (2G)",
    )
    parser.add_argument("-m", action="store_true", dest="module", help="SCRIPT is a module's name")
    parser.add_argument("script", metavar="SCRIPT", help="the script")
    parser.add_argument(
        "arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script"
    )


def run(arguments: argparse.Namespace) -> NoReturn:
    """Replace this process by the script; its exit status is the script's."""
    options = Options(
        str(Path(arguments.output).absolute()),
        tuple(arguments.op),
        arguments.skip,
        arguments.calls,
        arguments.max_bytes,
    )
    command = [*(["-m"] if arguments.module else []), arguments.script, *arguments.arguments]
    launch(command, options)
