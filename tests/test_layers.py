"""Imports point one way, the links at the root stand aside, and importing does no work."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_triton"

# layer -> the layers it may import, beside itself. A layer is a file or a package directly below
# moe_triton; "" is moe_triton/__init__.py. comm gets its device steps from ops with each call, and
# so imports neither ref nor kernels.
ALLOWED = {
    "errors": set(),
    "root_links": set(),
    "topology": {"errors"},
    "profile": {"errors"},
    "backend": {"errors"},
    "layout": {"errors"},
    "signatures": set(),
    "eplb": {"errors"},
    "training": {"errors"},
    "ref": {"errors", "layout"},
    "kernels": {"errors", "layout", "signatures"},
    "comm": {"errors", "layout", "topology"},
    "ops": {"backend", "comm", "errors", "kernels", "layout", "profile", "ref", "topology"},
    "expert_parallel": {"comm", "errors", "layout", "ops", "signatures"},
    "ascend": {"comm", "errors", "layout", "ops", "profile", "ref", "topology"},
    "testing": {"comm", "errors", "ref", "topology"},
    "compat": {"ascend", "comm", "errors", "layout", "ops"},
    "integrations": {"errors", "expert_parallel", "ops"},
    "record": {"ascend", "compat", "errors"},
    "compare": {
        *("ascend", "backend", "bench", "compat", "errors", "profile", "record", "testing"),
        *("topology", ""),
    },
    "emulate": {"ascend", "compat", "errors", "ops", "profile"},
    # A user of the package, who also times steps alone.
    "bench": {
        "",
        "compat",
        "eplb",
        "errors",
        "integrations",
        "kernels",
        "layout",
        "ref",
        "testing",
    },
    "": {"ascend", "backend", "comm", "errors", "expert_parallel", "ops", "profile"},
}
ALLOWED["cli"] = {*ALLOWED, "cli"}
ALLOWED["__main__"] = {"cli"}

# Scripts are users: what they may import is what users may import; those of bench/ are doors to
# moe_triton/bench.
PUBLIC = {"", "compat", "eplb", "errors", "integrations", "testing", "training"}
SCRIPTS = {"bench": {"bench", "cli"}, "examples": PUBLIC}


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """The dotted names below moe_triton that ``source`` imports, wherever in the file."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*base, *filter(None, [node.module])])
                names.update(f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]
            ):
                names.add(name)
    return {name for name in names if name.split(".")[0] == "moe_triton"}


def layer_of(name: str) -> str:
    """The layer of a dotted name; a name that is no module comes from moe_triton/__init__.py."""
    first = name.split(".")[1] if "." in name else ""
    exists = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if exists else ""


def sources(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=module_of)
def test_imports_point_one_way(path):
    layer = layer_of(module_of(path))
    assert layer in ALLOWED, f"{path}: add the new layer {layer!r} to the table and to the docs"
    names = imported(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py")
    wrong = {name for name in names if layer_of(name) not in ALLOWED[layer] | {layer}}
    assert not wrong, f"{path}: {layer or 'the package'} may not import {sorted(wrong)}"


def test_the_core_does_not_know_ascend():
    """Nor does any layer that it may import, directly or not."""
    reached, new = set(), {"expert_parallel", "ops"}
    while new:
        reached |= new
        new = set().union(*(ALLOWED[layer] for layer in new)) - reached
    assert not reached & {"ascend", "compat", "emulate", "cli"}


def owner_of(name: str) -> str:
    """The module that defines a dotted name."""
    path = ROOT / name.replace(".", "/")
    if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
        return name
    return owner_of(name.rpartition(".")[0])


def test_no_import_cycle():
    """Between modules, imports in functions and for type checkers included."""
    graph = {}
    for path in sources(PACKAGE):
        module = module_of(path)
        names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        graph[module] = {owner_of(name) for name in names} - {module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("directory", SCRIPTS)
def test_scripts_use_the_public_package(directory):
    for path in sources(ROOT / directory):
        wrong = {
            name
            for name in imported(path.read_text(encoding="utf-8"), module_of(path))
            if layer_of(name) not in SCRIPTS[directory] or name.rpartition(".")[2].startswith("_")
        }
        assert not wrong, f"{path}: {sorted(wrong)} is not public"


def test_tests_use_private_names_of_their_own_file_only():
    for path in sources(ROOT / "tests"):
        mirror = PACKAGE / path.relative_to(ROOT / "tests")
        mirror = mirror.with_name(mirror.name.removeprefix("test_"))
        for name in imported(path.read_text(encoding="utf-8"), module_of(path)):
            owner, _, last = name.rpartition(".")
            if last.startswith("_") and not last.endswith("__"):
                assert owner == module_of(mirror), f"{path} imports {name}"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import moe_triton.comm.window as w", {"moe_triton.comm.window"}),
        ("import torch, moe_triton_extras", set()),
        ("from moe_triton import errors, recover", {"moe_triton.errors", "moe_triton.recover"}),
        ("def f():\n    from ..errors import MoeError", {"moe_triton.errors.MoeError"}),
        ("from . import window", {"moe_triton.comm.window"}),
        ("importlib.import_module('moe_triton.ref')", {"moe_triton.ref"}),
    ],
)
def test_imported_finds(source, expected):
    assert imported(source, "moe_triton.comm.shm") == expected


def test_layer_of():
    assert layer_of("moe_triton.errors.MoeError") == "errors"
    assert layer_of("moe_triton.kernels.routing_plan") == "kernels"
    assert layer_of("moe_triton.ExpertParallel") == layer_of("moe_triton") == ""


@pytest.mark.parametrize("path", sources(PACKAGE / "kernels"), ids=module_of)
def test_kernels_know_no_processes_and_no_environment(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    banned = ("torch.distributed", "os", "multiprocessing")
    wrong = {n for n in names if any(n == b or n.startswith(f"{b}.") for b in banned)}
    assert not wrong, f"{path}: {sorted(wrong)}"


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


links = pytest.mark.parametrize("name", ["kernels", "comm"])


@links
@pytest.mark.parametrize("statement", ["import {}", "from {} import thing", "import {}.thing"])
def test_root_link_is_relative_and_cannot_be_imported(name, statement):
    """Without another distribution; ``-S -E``: a path without site-packages."""
    link = ROOT / name
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert link.readlink() == Path("moe_triton") / name
    command = [sys.executable, "-S", "-E", "-c", statement.format(name)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"ModuleNotFoundError: No module named {name!r}" in result.stderr
    assert f"import moe_triton.{name}" in result.stderr


_OTHER = """
import sys
sys.path.append({folder!r})
assert sys.path[0] == ""
import NAME
from NAME import thing
import NAME.part, importlib.util
assert (NAME.value, thing.value, NAME.part.value) == (7, 8, 9)
assert sys.modules["NAME"] is NAME and NAME.__file__.startswith({folder!r}), NAME.__file__
assert importlib.util.find_spec("NAME").origin == NAME.__file__
assert not any(name.startswith("moe_triton") for name in sys.modules)
import moe_triton.NAME
assert moe_triton.NAME is not NAME and sys.modules["NAME"] is NAME
"""


@links
def test_another_distribution_is_loaded_in_place_of_a_root_link(name, tmp_path):
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("value = 7\nfrom . import thing\n")
    (package / "thing.py").write_text("value = 8\n")
    (package / "part.py").write_text("value = 9\n")
    code = _OTHER.replace("NAME", name).format(folder=str(tmp_path))
    result = python(code, ROOT)
    assert result.returncode == 0, result.stderr


@links
def test_an_error_of_the_other_distribution_is_its_own(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("raise OSError('own')\n")
    result = python(f"import sys; sys.path.append({str(tmp_path)!r}); import {name}", ROOT)
    assert result.returncode == 1
    assert "OSError: own" in result.stderr


_ENGINE = """
import sys
assert sys.path[0] == ""
import torch, transformers
from transformers.utils import is_kernels_available
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
config = transformers.MixtralConfig(
    vocab_size=32, num_key_value_heads=2, num_local_experts=4, **sizes
)
model = transformers.AutoModelForCausalLM.from_config(config)
assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 32)
assert not is_kernels_available()
try:
    from kernels import get_kernel
except ImportError as error:
    assert error.name == "kernels"
else:
    raise AssertionError
"""


def test_an_engine_starts_in_the_root():
    """transformers imports what ``find_spec("kernels")`` has found, for its version."""
    pytest.importorskip("transformers")
    if any(metadata.distributions(name="kernels")):
        pytest.skip("the distribution called kernels is installed")
    result = python(_ENGINE, ROOT)
    assert result.returncode == 0, result.stderr


def test_no_package_below_tests():
    actual = [str(path) for path in (ROOT / "tests").rglob("__init__.py")]
    assert not actual, "tests/kernels/__init__.py would hide the distribution called `kernels`"


_IMPORT_CHECK = """
import logging, os, sys, threading, time
import torch
before = set(sys.modules), dict(os.environ), torch.get_num_threads(), dict(vars(torch))
handlers = list(logging.root.handlers)
start = time.process_time()
import moe_triton
seconds = time.process_time() - start
new = set(sys.modules) - before[0]
tops = {name.partition(".")[0] for name in new}
heavy = tops & {"triton", "torch_npu", "torchair", "transformers", "vllm", "sglang", "matplotlib"}
assert not heavy, f"imports {heavy}"
assert not torch.distributed.is_initialized(), "made a process group"
assert not torch.cuda.is_initialized(), "initialised a device"
assert threading.active_count() == 1, "started a thread"
assert dict(os.environ) == before[1], "changed the environment"
assert torch.get_num_threads() == before[2], "changed the number of threads"
changed = [k for k, v in before[3].items() if vars(torch).get(k) is not v]
assert not changed, f"changed torch: {changed}"
log = logging.getLogger("moe_triton")
assert (log.handlers, log.level, log.propagate) == ([], logging.NOTSET, True), "set up logging"
assert logging.root.handlers == handlers, "set up logging"
assert seconds < 3, f"took {seconds} s"
"""


def test_importing_does_no_work(tmp_path):
    result = python(_IMPORT_CHECK, tmp_path)
    assert result.returncode == 0, result.stderr
