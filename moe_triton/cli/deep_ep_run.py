"""``moe-triton deep-ep-run``: run a script that imports ``deep_ep`` without DeepEP."""

from __future__ import annotations

import argparse

from ..emulate import bootstrap
from .script import add_script, command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--replace", action="store_true", help="also where another deep_ep can be imported"
    )
    add_script(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the script; returns the exit status of ``bootstrap.run``."""
    standin = bootstrap.deep_ep_standin()
    return bootstrap.run(command(arguments), standin, replace=arguments.replace)
