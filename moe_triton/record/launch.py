"""Start an unmodified script in which the calls of the operators are recorded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .hooks import SETTINGS, Options

STARTUP = Path(__file__).with_name("startup")


def launch(arguments: Sequence[str], options: Options) -> NoReturn:
    """Replace this process by Python with ``arguments``, whose processes record their calls.

    Python runs ``sitecustomize`` when it starts, in the script and in the processes that it
    starts; the one in ``STARTUP`` wraps the operators and then runs the user's own.

    Args:
        arguments: of Python: a script, or ``-m`` and a module, and its arguments.
        options: what to record.
    """
    path = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), SETTINGS: options.as_json()}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)
