"""The script and its arguments, of the commands that run one."""

from __future__ import annotations

import argparse


def add_script(parser: argparse.ArgumentParser) -> None:
    """Declare the script, or module, and its arguments."""
    parser.add_argument("-m", action="store_true", dest="module", help="SCRIPT is a module's name")
    parser.add_argument("script", metavar="SCRIPT", help="the script")
    parser.add_argument(
        "arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script"
    )


def command(arguments: argparse.Namespace) -> list[str]:
    """The arguments of Python that run the script."""
    return [*(["-m"] if arguments.module else []), arguments.script, *arguments.arguments]
