"""Records without data: prepare windows, abort a call, wait early, end an aborted epoch."""

from __future__ import annotations

from ..layout import Windows
from ..layout.windows import RECEIVED, SENT
from ._windows import host


def send_record(windows: Windows, *, digest: int, status: int, extra: int = 0) -> None:
    """Send every rank a record without data.

    Does nothing in a broken group; the same holds for all steps of windows.

    Args:
        windows: of the kind.
        digest: of the arguments, int32.
        status: ``DATA`` or ``ABORT``.
        extra: word of the record.
    """
    memory = host(windows)
    if not memory.broken:
        epoch = memory.next_epoch(SENT)
        memory.send(epoch, None, 0, digest=digest, extra=extra, status=status)


def recv_records(
    windows: Windows,
    *,
    digest: int,
    timeout: float,  # noqa: ARG001 - the host has waited
    peek: bool = False,
) -> None:
    """Wait for the records of all ranks.

    Args:
        windows: of the kind; a problem is reported in ``windows.problem``.
        digest: of the arguments, int32.
        timeout: seconds to wait. Here the host has waited already: the records are read once.
        peek: whether the epoch still has to be received.
    """
    memory = host(windows)
    if memory.broken:
        return
    epoch = memory.next_epoch(RECEIVED)
    memory.records(epoch, digest)
    if not peek:
        memory.received(epoch)
