"""Notice child processes that fail: a script that does not look ends well although its ranks died.

``multiprocessing`` prints the traceback of a child, and the exit status of the parent says nothing.
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
    """Watch what this process starts from now on, and report it when this process ends."""
    start = BaseProcess.start

    def start_and_remember(process: BaseProcess) -> None:
        start(process)
        _started.append(process)

    BaseProcess.start = start_and_remember  # type: ignore[assignment,method-assign]
    # A negative priority comes after multiprocessing has joined the children.
    util.Finalize(None, _report, exitpriority=-1)


def _report() -> None:
    with Path(os.environ[settings.FAILURES]).open("a", encoding="utf-8") as file:
        for process in _started:
            how = _failure(process)
            if how is not None:
                print(f"{process.name} (pid {process.pid}) {how}", file=file)


def _failure(process: BaseProcess) -> str | None:
    try:
        code = process.exitcode
    except ValueError:  # the script closed it, and so it had looked at it
        return None
    # None is still running; SIGTERM is how a parent ends the children that it no longer needs.
    if code in (None, 0, -signal.SIGTERM):
        return None
    return f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
