"""Start a script with the stand-ins on its path, and wait for it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import settings

STANDINS = Path(__file__).with_name("standins")


def _installed() -> tuple[str | None, str | None]:
    """Where the real torch_npu is, and why it cannot be imported."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None or STANDINS in Path(spec.origin).parents:
        return None, None
    probe = [sys.executable, "-c", "import torch_npu"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False)
    lines = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
    return spec.origin, lines[-1] if found.returncode else None


def _say(text: str) -> None:
    sys.stderr.write(f"moe-triton npu-run: {text}\n")
    sys.stderr.flush()


def run(arguments: Sequence[str], *, host: str, devices: int) -> int:
    """Run Python with the stand-ins, unless the real torch_npu can be imported.

    Says on stderr which of the two it is.

    Args:
        arguments: of Python: a script or ``-m`` and a module, and its arguments.
        host: the device that stands for the NPUs, "cpu" or "cuda".
        devices: number of NPUs.

    Returns:
        The exit status: that of the script, or 128 and the signal that ended it. Where it is 0
        although processes that the script started through multiprocessing failed, 1.
    """
    environment = dict(os.environ)
    origin, cause = _installed()
    if origin is not None and cause is None:
        _say(f"torch_npu is installed ({origin}); nothing is emulated")
        return _supervise(arguments, environment)
    if origin is not None:
        _say(f"torch_npu ({origin}) cannot be imported: {cause}")
        # It would be torch itself that imports it, for the devices that it brings.
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    _say(f"no NPU here: torch_npu and torchair are stand-ins, {devices} NPUs on the {host} device")
    path = [str(STANDINS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment[settings.HOST] = host
    environment[settings.DEVICES] = str(devices)
    with tempfile.TemporaryDirectory(prefix="moe_triton-npu-run-") as folder:
        failures = Path(folder) / "failures"
        failures.touch()
        environment[settings.FAILURES] = str(failures)
        status = _supervise(arguments, environment)
        reports = failures.read_text(encoding="utf-8").splitlines()
    for report in reports:
        _say(report)
    return status or int(bool(reports))


def _supervise(arguments: Sequence[str], environment: dict[str, str]) -> int:
    with subprocess.Popen([sys.executable, *arguments], env=environment) as process:
        # Ctrl-C reaches the script by itself, which may take its time to end. What is sent to this
        # process alone is passed on.
        handlers: dict[int, Any] = {
            signal.SIGINT: signal.SIG_IGN,
            signal.SIGTERM: lambda number, _: process.send_signal(number),
            signal.SIGHUP: lambda number, _: process.send_signal(number),
        }
        before = {number: signal.signal(number, new) for number, new in handlers.items()}
        try:
            status = process.wait()
        finally:
            for number, old in before.items():
                signal.signal(number, old)
    return status if status >= 0 else 128 - status
