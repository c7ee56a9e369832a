"""Record child processes that fail.

``multiprocessing`` prints a child's traceback, but the parent's exit status stays 0 unless the
script checks its children.
"""

from __future__ import annotations

import os
import signal
from multiprocessing import util
from multiprocessing.process import BaseProcess
from pathlib import Path

from . import settings

_started: list[BaseProcess] = []


def install() -> None:
    """Watch processes started from now on, and report failed ones when this process exits."""
    start = BaseProcess.start

    def start_and_remember(process: BaseProcess) -> None:
        start(process)
        _started.append(process)

    BaseProcess.start = start_and_remember  # type: ignore[assignment,method-assign]
    # Finalizers of negative priority run after multiprocessing has joined the children.
    util.Finalize(None, _report, exitpriority=-1)


def _report() -> None:
    with Path(os.environ[settings.FAILURES]).open("a", encoding="utf-8") as file:
        for process in _started:
            failure = _failure(process)
            if failure is not None:
                print(f"{process.name} (pid {process.pid}) {failure}", file=file)


def _failure(process: BaseProcess) -> str | None:
    try:
        code = process.exitcode
    except ValueError:  # closed by the script, which can do so only after its end
        return None
    # None: still running. SIGTERM: ended by its parent.
    if code in (None, 0, -signal.SIGTERM):
        return None
    return f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
