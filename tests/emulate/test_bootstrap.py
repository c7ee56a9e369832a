"""npu-run: its messages, its exit status, and that it changes nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_triton.emulate import bootstrap

NOTICE = (
    "moe-triton npu-run: no NPU here: torch_npu and torchair are stand-ins, 16 NPUs on the cpu "
    "device\n"
)


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_arguments_reach_the_script(npu_run, tmp_path):
    path = script(tmp_path, "import sys; print(sys.argv, __name__)")
    run = npu_run(path, "--devices", "4", "-m", "x y")
    assert run.status == 0
    assert run.out == f"{[str(path), '--devices', '4', '-m', 'x y']} __main__\n"
    assert run.err == NOTICE


def test_a_module_runs_as_with_python(npu_run):
    run = npu_run("-m", "this")
    assert run.status == 0
    assert run.out.startswith("The Zen of Python")


@pytest.mark.parametrize(
    "text, status",
    [
        ("raise SystemExit(3)", 3),
        ("raise ValueError", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_exit_status_is_that_of_the_script(npu_run, tmp_path, text, status):
    assert npu_run(script(tmp_path, text)).status == status


def test_no_such_script(npu_run, tmp_path):
    run = npu_run(tmp_path / "absent.py")
    assert run.status == 2
    assert "No such file" in run.err


_CHILDREN = """
import multiprocessing, os, signal, sys, time
import torch_npu

def child(kind):
    if kind == "raises":
        time.sleep(0.5)  # until after the end of the script
        raise ValueError("a rank went wrong")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "waits":
        time.sleep(60)

if __name__ == "__main__":
    print(torch_npu.npu.device_count())
    context = multiprocessing.get_context("fork")
    children = {}
    for kind in sys.argv[1:]:
        children[kind] = context.Process(target=child, args=(kind,), name=kind)
    for process in children.values():
        process.start()
    if "waits" in children:
        children["waits"].terminate()
    # Not joined: multiprocessing does so when the script ends.
"""


def test_a_child_that_failed_shows_in_the_status(npu_run, tmp_path):
    run = npu_run(script(tmp_path, _CHILDREN), "raises", "dies", "ends")
    assert run.status == 1
    assert "ValueError: a rank went wrong" in run.err
    reports = [line for line in run.err.splitlines() if line.startswith("moe-triton npu-run: ")]
    assert len(reports) == 3
    assert reports[1].startswith("moe-triton npu-run: raises (pid ")
    assert reports[1].endswith(") ended with exit code 1")
    assert reports[2].endswith(") was ended by signal 11")


def test_children_terminated_by_the_script_do_not_count_as_failed(npu_run, tmp_path):
    run = npu_run("--devices", "32", script(tmp_path, _CHILDREN), "waits", "ends")
    assert (run.status, run.out) == (0, "32\n")
    assert run.err == NOTICE.replace("16", "32")


def test_termination_is_passed_on(npu_run, tmp_path):
    ready = tmp_path / "ready"
    path = script(
        tmp_path,
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)",
    )

    def terminate():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=terminate)
    thread.start()
    assert npu_run(path).status == 5
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


# The real torch_npu.


def real(tmp_path, monkeypatch, text):
    package = tmp_path / "site" / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    return package / "__init__.py"


def test_an_installed_torch_npu_is_used(npu_run, tmp_path, monkeypatch):
    path = real(tmp_path, monkeypatch, "")
    run = npu_run(script(tmp_path, "import torch_npu; print(torch_npu.__file__)"))
    assert run.status == 0
    assert run.err == f"moe-triton npu-run: torch_npu is installed ({path}); nothing is emulated\n"
    assert run.out == f"{path}\n"


def test_a_torch_npu_that_cannot_be_imported_is_replaced(npu_run, tmp_path, monkeypatch):
    path = real(tmp_path, monkeypatch, "raise ImportError('libascendcl.so: not found')")
    run = npu_run(script(tmp_path, _SHOW_IMPORTS))
    assert run.status == 0
    cause = f"torch_npu ({path}) cannot be imported: ImportError: libascendcl.so: not found"
    assert run.err == f"moe-triton npu-run: {cause}\n{NOTICE}"
    origin, autoload, search = run.out.splitlines()
    assert origin == str(bootstrap.NPU_STANDINS / "torch_npu" / "__init__.py")
    assert autoload == "0"
    assert str(path.parents[1]) in search


_SHOW_IMPORTS = """
import importlib.util, os, sys
print(importlib.util.find_spec("torch_npu").origin)
print(os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
print(sys.path)
"""


def test_the_standins_are_not_taken_for_the_real_one(npu_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(bootstrap.NPU_STANDINS)
    run = npu_run(script(tmp_path, _SHOW_IMPORTS))
    assert run.err == NOTICE
    assert run.out.splitlines()[1] == "None"


# Emulation stays inside the command.


def test_nothing_leaks(npu_run, tmp_path):
    environment, path = dict(os.environ), [*sys.path]
    npu_run(script(tmp_path, ""))
    assert (dict(os.environ), sys.path) == (environment, path)
    check = (
        "import moe_triton.cli, sys, torch\n"
        "assert not hasattr(torch, 'npu')\n"
        "assert not {'torch_npu', 'torchair', 'moe_triton.emulate.device'} & set(sys.modules)\n"
        "assert not torch.overrides._get_current_function_mode_stack()\n"
    )
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)


_REFUSED = """
for package in ("torch_npu", "torchair"):
    try:
        __import__(package)
    except ImportError as error:
        print(error.name, error)
"""


def test_the_standins_refuse_other_processes(tmp_path):
    path = os.pathsep.join([str(bootstrap.NPU_STANDINS), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", _REFUSED],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    first, second = result.stdout.splitlines()
    assert first.startswith("torch_npu this torch_npu is a stand-in")
    assert second.startswith("torchair this torchair is a stand-in")
    assert first.endswith("`moe-triton npu-run`")
