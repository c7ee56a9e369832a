"""The command line: ``moe-triton demo``, ``moe-triton doctor`` and ``moe-triton npu-run``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import demo, doctor, npu_run

# What shells report for a program that the signal ended.
_INTERRUPTED = 128 + 2
_BROKEN_PIPE = 128 + 13

_DEMO = """
Run a DeepSeek-V3-shaped MoE layer, scaled to one machine, over many processes, in bf16 and with
int8 rows, and hold each against the dense layer of one process. Prints loads, times, traffic and
errors. The last line begins with OK; or with WRONG, and then the exit code is 1.
"""
_DOCTOR = """
Print devices, versions, which back ends and transports work here or why not, and the window memory
that a model needs, beside the HCCL_BUFFSIZE of Ascend's operators.
"""
_NPU_RUN = """
Run an Ascend script, unmodified, where there is no NPU. torch_npu and torchair are stand-ins there,
for the script and all its children: npu devices are other names of the CPU, hccl is gloo, and the
npu_moe_distribute_* operators are those of moe_triton. Other operators raise an error with their
name. Says on stderr that it emulates; where torch_npu can be imported, that one is used instead.
The exit status is the script's, and 1 if that is 0 but a process that the script started through
multiprocessing failed: no rank can go missing unseen.
"""
_COMMANDS = (
    (demo, "demo", "run an MoE layer over 8 processes and check it", _DEMO),
    (doctor, "doctor", "say what works on this machine, and what windows take", _DOCTOR),
    (npu_run, "npu-run", "run an Ascend script where there is no NPU", _NPU_RUN),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments, by default those of the process.

    Returns:
        The exit code: 0, or 1 when the demo finds something wrong; that of the script of npu-run.

    Raises:
        SystemExit: with 0 after ``--help`` and ``--version``, with 2 for wrong arguments.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away, such as `head`. Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-triton",
        description="Mixture-of-experts dispatch and combine between expert-parallel ranks.",
    )
    parser.add_argument("--version", action="version", version=f"moe_triton {__version__}")
    names = ",".join(name for _, name, *_ in _COMMANDS)
    commands = parser.add_subparsers(title="commands", metavar=f"{{{names}}}", required=True)
    for module, name, summary, description in _COMMANDS:
        command = commands.add_parser(name, help=summary, description=description)
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)
    return parser
