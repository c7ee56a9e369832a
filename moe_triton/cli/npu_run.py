"""``moe-triton npu-run``: run an unmodified Ascend script without an NPU."""

from __future__ import annotations

import argparse

from .. import backend
from ..emulate import bootstrap
from .terminal import positive

DEVICES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--devices",
        type=positive,
        default=DEVICES,
        metavar="N",
        help=f"number of emulated NPUs (default: {DEVICES})",
    )
    parser.add_argument("-m", action="store_true", dest="module", help="SCRIPT is a module's name")
    parser.add_argument("script", metavar="SCRIPT", help="the script")
    parser.add_argument(
        "arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the script; returns the exit status of ``bootstrap.run``."""
    host = "cuda" if backend.unavailable_because("cuda") is None else "cpu"
    command = [*(["-m"] if arguments.module else []), arguments.script, *arguments.arguments]
    return bootstrap.run(command, host=host, devices=arguments.devices)
