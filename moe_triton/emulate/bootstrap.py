"""Start a script with the stand-ins on its path, and wait for its end."""

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
    """The path of the real torch_npu, and why it cannot be imported; None for each if not."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None or STANDINS in Path(spec.origin).parents:
        return None, None
    probe = [sys.executable, "-c", "import torch_npu"]
    result = subprocess.run(probe, capture_output=True, text=True, check=False)
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    return spec.origin, lines[-1] if result.returncode else None


def _report(text: str) -> None:
    sys.stderr.write(f"moe-triton npu-run: {text}\n")
    sys.stderr.flush()


def run(arguments: Sequence[str], *, host: str, devices: int) -> int:
    """Run Python with the stand-ins, unless the real torch_npu can be imported.

    Reports on stderr which of the two it does.

    Args:
        arguments: of Python: a script or ``-m`` and a module, and its arguments.
        host: the device that replaces the NPUs, "cpu" or "cuda".
        devices: number of NPUs.

    Returns:
        The exit status of the script, or 128 + the signal that ended it; 1 instead of 0 if
        processes that the script started through multiprocessing failed.
    """
    environment = dict(os.environ)
    origin, cause = _installed()
    if origin is not None and cause is None:
        _report(f"torch_npu is installed ({origin}); nothing is emulated")
        return _supervise(arguments, environment)
    if origin is not None:
        _report(f"torch_npu ({origin}) cannot be imported: {cause}")
        # torch itself would import it to load its device.
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    _report(
        f"no NPU here: torch_npu and torchair are stand-ins, {devices} NPUs on the {host} device"
    )
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
        _report(report)
    return status or int(bool(reports))


def _supervise(arguments: Sequence[str], environment: dict[str, str]) -> int:
    with subprocess.Popen([sys.executable, *arguments], env=environment) as process:
        # The terminal sends Ctrl-C to the script too; forward signals sent to this process alone.
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
