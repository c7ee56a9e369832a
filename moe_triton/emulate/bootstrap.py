"""Start a script with stand-ins on its path, and wait for its end."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import missing, settings

_STANDINS = Path(__file__).with_name("standins")
NPU_STANDINS = _STANDINS / "npu"
DEEP_EP_STANDIN = _STANDINS / "deep_ep"


@dataclasses.dataclass(frozen=True)
class Standins:
    """Packages that replace missing ones in a script and its children.

    Attributes:
        command: of ``moe-triton``, for messages.
        folder: that holds them.
        package: the one whose real counterpart makes them superfluous.
        notice: what is said of them on stderr.
        environment: further variables for the script.
    """

    command: str
    folder: Path
    package: str
    notice: str
    environment: Mapping[str, str]

    def report(self, text: str) -> None:
        """Say something on stderr."""
        sys.stderr.write(f"moe-triton {self.command}: {text}\n")
        sys.stderr.flush()

    def installed(self) -> tuple[str | None, str | None]:
        """The path of the real package, and why it cannot be imported; None for each if not."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None or self.folder in Path(spec.origin).parents:
            return None, None
        probe = [sys.executable, "-c", f"import {self.package}"]
        result = subprocess.run(probe, capture_output=True, text=True, check=False)
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return spec.origin, lines[-1] if result.returncode else None


def npu_standins(*, host: str, devices: int) -> Standins:
    """Those of ``npu-run``: torch_npu and torchair.

    Args:
        host: the device that replaces the NPUs, "cpu" or "cuda".
        devices: number of NPUs.
    """
    return Standins(
        "npu-run",
        NPU_STANDINS,
        "torch_npu",
        f"no NPU here: torch_npu and torchair are stand-ins, {devices} NPUs on the {host} device",
        {settings.HOST: host, settings.DEVICES: str(devices)},
    )


def deep_ep_standin() -> Standins:
    """That of ``deep-ep-run``: deep_ep."""
    notice = "deep_ep is that of moe_triton"
    return Standins("deep-ep-run", DEEP_EP_STANDIN, "deep_ep", notice, {})


def run(
    arguments: Sequence[str],
    standins: Standins,
    *,
    replace: bool = False,
    list_missing: bool = False,
) -> int:
    """Run Python with the stand-ins, unless the real package can be imported.

    Reports on stderr which of the two it does.

    Args:
        arguments: of Python: a script or ``-m`` and a module, and its arguments.
        standins: for the script and its children.
        replace: use them also where the real package can be imported.
        list_missing: run on at names that are not emulated, and report them at the end.

    Returns:
        The exit status of the script, or 128 + the signal that ended it; 1 instead of 0 if
        processes that the script started through multiprocessing failed.
    """
    environment = dict(os.environ)
    origin, cause = standins.installed()
    if origin is not None and cause is None and not replace:
        standins.report(f"{standins.package} is installed ({origin}); nothing is emulated")
        return _supervise(arguments, environment)
    if cause is not None:
        standins.report(f"{standins.package} ({origin}) cannot be imported: {cause}")
        # torch itself would import a device's package to load the device.
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    standins.report(standins.notice)
    path = [str(standins.folder), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment.update(standins.environment)
    with tempfile.TemporaryDirectory(prefix=f"moe_triton-{standins.command}-") as folder:
        failures, names = Path(folder) / "failures", Path(folder) / "missing"
        for file in (failures, names):
            file.touch()
        environment[settings.FAILURES] = str(failures)
        if list_missing:
            environment[settings.MISSING] = str(names)
        status = _supervise(arguments, environment)
        reports = failures.read_text(encoding="utf-8").splitlines()
        asked_for = missing.report(names.read_text(encoding="utf-8"))
    for report in reports:
        standins.report(report)
    if list_missing:
        standins.report(f"{len(asked_for)} names were asked for that are not emulated")
        sys.stderr.writelines(f"  {line}\n" for line in asked_for)
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
