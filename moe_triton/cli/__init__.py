"""The command line: ``moe-triton`` and its commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import bench, compare, deep_ep_run, demo, doctor, npu_run, record

# Exit codes of shells for a program ended by a signal.
_INTERRUPTED = 128 + 2
_BROKEN_PIPE = 128 + 13

_DEMO = """
Run a DeepSeek-V3-shaped MoE layer, scaled to one machine, over many processes, in bf16 and with
int8 rows, and compare each with the dense layer in one process. Prints loads, times, traffic and
errors. The last line begins with OK, or with WRONG and exit code 1.
"""
_BENCH = """
Measure kernels, layers, transports and planning on this machine. Every bench checks its results
before it times them.
"""
_DOCTOR = """
Print devices, versions, whether each back end and transport works here or why not, and the window
memory that models need, next to the HCCL_BUFFSIZE of Ascend's operators.
"""
_NPU_RUN = """
Run an unmodified Ascend script without an NPU. The script and its children import stand-ins for
torch_npu and torchair: npu devices are aliases of the CPU, hccl is gloo, and the npu_moe_*
operators are those of moe_triton. Other operators raise an error with their name. Reports the
emulation on stderr; if torch_npu can be imported, the script gets that instead. The exit status is
the script's, and 1 if that is 0 but a process that it started through multiprocessing failed.
"""
_COMPARE = """
Run the calls of a dump from Ascend, or of a record from any machine, here on as many local ranks,
and compare every output: an msprobe dump, converted kernel dumps (.npy), torch.save files that a
YAML file names, or a record of moe-triton record. Only memory that the operators define is
compared. Exit status 1 when something is out of its rule or could not be used, 2 when nothing could
be compared.
"""
_RECORD = """
Run an unmodified script and record its calls of the npu_moe_* operators, inputs and outputs, for
moe-triton compare: on an NPU with torch_npu, under moe-triton npu-run -m moe_triton.record, or with
moe_triton.compat.torch_npu anywhere. A folder per rank, bounded in size; torchrun and processes
that the script starts are recorded too. The exit status is the script's.
"""
_DEEP_EP_RUN = """
Run an unmodified script that imports deep_ep, the package of DeepEP, without it: the script and its
children import moe_triton.compat.deep_ep under that name, which works on CPUs too. Reports it on
stderr; if deep_ep can be imported, the script gets that instead. The exit status is that of
npu-run.
"""
_COMMANDS = (
    (demo, "demo", "run an MoE layer over 8 processes and check it", _DEMO),
    (bench, "bench", "measure kernels, layers and transports", _BENCH),
    (doctor, "doctor", "report what works on this machine, and the size of windows", _DOCTOR),
    (npu_run, "npu-run", "run an Ascend script without an NPU", _NPU_RUN),
    (deep_ep_run, "deep-ep-run", "run a script that imports deep_ep", _DEEP_EP_RUN),
    (compare, "compare", "compare results from Ascend with the same calls here", _COMPARE),
    (record, "record", "record a script's calls of the operators", _RECORD),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments, by default those of the process.

    Returns:
        The exit code: 0, or 1 if the demo finds an error; for npu-run, deep-ep-run
        and record the script's; for compare 1 out of rule, 2 nothing compared.

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
        # The reader of the pipe, such as `head`, has exited; Python would report it again at exit.
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
