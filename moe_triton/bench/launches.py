"""Launches of Triton kernels: counted, or replaced by nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock


@dataclasses.dataclass
class Count:
    """Launches so far."""

    value: int = 0


@contextlib.contextmanager
def counted(*, replaced: bool = False) -> Iterator[Count]:
    """Count the launches of all threads.

    Args:
        replaced: let a launch do nothing, so that only the time of the host remains. Needs no
            device; outputs stay unwritten.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    count = Count()

    def counting(run: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            count.value += 1
            return None if replaced else run(self, *args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for kind in (JITFunction, InterpretedFunction):
            patches.enter_context(mock.patch.object(kind, "run", counting(kind.run)))
        yield count
