"""``install`` and ``deep-ep-run``."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from moe_triton import UnavailableError
from moe_triton.cli import main
from moe_triton.compat import deep_ep


@pytest.fixture
def _no_deep_ep(monkeypatch):
    if importlib.util.find_spec("deep_ep") is not None:
        pytest.skip("another deep_ep is installed")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "deep_ep":
            del sys.modules[name]


@pytest.mark.usefixtures("_no_deep_ep")
def test_install():
    module = deep_ep.install()
    assert deep_ep.install() is module
    import deep_ep as imported
    from deep_ep.utils import EventHandle, EventOverlap
    from deep_ep.utils.event import EventOverlap as Same

    assert imported is module
    assert importlib.util.find_spec("deep_ep").name == "deep_ep"
    assert importlib.util.find_spec("deep_ep.utils") is not None
    assert EventOverlap is Same is module.EventOverlap
    assert module.EventHandle is EventHandle
    assert module.Buffer is deep_ep.Buffer
    for name in ("Config", "EPBuffer", "EPHandle", "ElasticBuffer", "topk_idx_t", "utils"):
        assert hasattr(module, name), name


@pytest.mark.usefixtures("_no_deep_ep")
def test_another_deep_ep_is_not_shadowed_unasked(tmp_path, monkeypatch):
    (tmp_path / "deep_ep.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnavailableError, match=rf"another deep_ep is installed \({tmp_path}"):
        deep_ep.install()
    assert "deep_ep" not in sys.modules
    assert deep_ep.install(replace=True).Buffer is deep_ep.Buffer


_SCRIPT = """
import multiprocessing, sys
import deep_ep
def child():
    import deep_ep
    from deep_ep.utils import EventOverlap
    assert deep_ep.Buffer.__module__.startswith("moe_triton"), deep_ep
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    print(deep_ep.__version__, sys.argv[1:])
    sys.exit(3 * process.exitcode)
"""


def test_deep_ep_run(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    assert main(["deep-ep-run", str(script), "--option", "x"]) == 0
    out, err = capfd.readouterr()
    assert out == "2.1.0 ['--option', 'x']\n"
    assert err == "moe-triton deep-ep-run: deep_ep is that of moe_triton\n"


@pytest.mark.parametrize("replace", [False, True])
def test_deep_ep_run_beside_another(tmp_path, capfd, monkeypatch, replace):
    other = tmp_path / "other"
    other.mkdir()
    (other / "deep_ep.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(other)
    monkeypatch.setenv("PYTHONPATH", str(other))
    script = tmp_path / "script.py"
    script.write_text("import deep_ep\nprint(hasattr(deep_ep, 'value'))\n")
    options = ["--replace"] if replace else []
    assert main(["deep-ep-run", *options, str(script)]) == 0
    out, err = capfd.readouterr()
    assert out == f"{not replace}\n"
    assert ("nothing is emulated" in err) == (not replace)


def test_the_stand_in_refuses_other_processes():
    from moe_triton.emulate import settings

    with pytest.raises(ImportError, match="started by `moe-triton deep-ep-run`"):
        settings.check_started_by("deep-ep-run", "deep_ep")
