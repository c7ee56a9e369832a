"""``moe-triton npu-run``: run an unmodified Ascend script without an NPU."""

from __future__ import annotations

import argparse

from .. import backend
from ..emulate import bootstrap
from .script import add_script, command
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
    parser.add_argument(
        "--list-missing",
        action="store_true",
        help="run on at names of torch_npu that are not emulated, and list them at the end, with "
        "the lines that asked for them",
    )
    add_script(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the script; returns the exit status of ``bootstrap.run``."""
    host = "cuda" if backend.unavailable_because("cuda") is None else "cpu"
    standins = bootstrap.npu_standins(host=host, devices=arguments.devices)
    return bootstrap.run(command(arguments), standins, list_missing=arguments.list_missing)
