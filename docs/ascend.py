"""Write docs/ascend.md: the operators of Ascend as this library has them, from the code's tables.

``make pages`` runs it, and a test fails while the page is not what it would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_triton import errors, profile
from moe_triton.ascend.op_names import (
    ALLTOALLV_GMM,
    EPLB_UPDATE_EXPERT,
    FAMILIES,
    GMM_ALLTOALLV,
    UPDATE_EXPERT,
)
from moe_triton.compat import aclnn, torch_npu
from moe_triton.emulate import coverage
from moe_triton.errors import MoeError
from moe_triton.profile import buffers
from moe_triton.profile.limits import Limits, is_combine, rules, words

PAGE = Path(__file__).with_name("ascend.md")

MEANING = "dtype, shape, meaning"

PRODUCTS = {name: one for name, one in profile.PROFILES.items() if name != "portable"}

HEAD = f"""\
# Ascend operators

<!-- Made by `make pages` from the code: do not edit. -->

`moe_triton.compat.torch_npu` has the functions of torch_npu under their names, with their
argument order and defaults, for CPUs and every other back end of this library. This page lists
each function with its arguments, and the values that each product accepts. `docs/ascend.py` makes
it from docstrings and profiles. [npu-run](npu-run.md) runs unmodified scripts on a CPU, and
[aclnn](aclnn.md) introduces the C interface.

## Products

`moe_triton.set_profile(name)`, or `{profile.ENVIRONMENT}` in the environment, chooses whose
limits hold. `portable`, the default, has this library's own limits. The others refuse what a
product's operators refuse, with the status that these return: a script that runs here under the
profile of a product stays within that product's limits. A profile changes no result, and does not
limit the operators on one device.
"""

PORTABLE = """\
## How the portable profile differs

The documents' limits of sizes come from a device's memory and kernels. The portable profile lifts
them:

- BS may be 0, on one rank or on all. H, W, E, the number of shared experts in v1 and the experts
  of a rank are free. K is at most 16, the largest limit of any product, and 12 with `fullmesh_v2`.
- All quantisations, float8 rows, quantised combine and both dtypes, in all operators.
- `global_bs` may be any multiple of W from W * maxBS on.
- `x_active_mask` in v1 too, and with a column for each slot in the split-phase operators.
- `shared_expert_x` beside shared ranks: both are added.
- `elastic_info`, zero-computation experts and pairs of tensor-parallel ranks in every operator
  that has the argument.
- In the split-phase operators, `scales` with a row more than there are experts, as a documented
  example has it.

With every profile:

- Outputs that torch_npu allocates but does not write have values: `out` of gating_top_k and the
  counts of init_routing_v2 are always computed, unused scales are zeros. Of dispatch,
  `dynamic_scales` without quantisation, `tp_recv_counts` without tensor parallelism and
  `expand_scales` without `expert_scales` are zeros. The documents call some of these outputs
  optional or empty; the shapes and dtypes are those that op-plugin allocates. In the C interface
  their tensors may be null, and are not written. Combine takes them back, also `expand_scales` in
  version 1 on a3 and 950, which the C interface reserves and torch_npu passes back.
- Rows of inactive tokens are zeros, where the documents leave them open.
- Values in tensors are checked on the CPU, where that costs no synchronisation: ids out of range
  or repeated in a row, masks with gaps, and metadata of dispatch that combine gets back changed.
- An error is raised on all ranks when ranks disagree, a rank refuses its call, or a rank is
  missing.
- Outputs of the operators that communicate have no gradients. Each warns once where inputs of an
  eager call require them; compiled calls do not warn.

## Without effect, and not supported

- `comm_alg` and `comm_type` are checked, and change no result. The hierarchical algorithm rounds
  once more for each server on a2, and this library does not. With the profile a2,
  `ep_recv_counts` has room behind its prefix sums for that algorithm's words, and leaves it
  unwritten.
- `expand_scales` of combine, and `group_tp` where T = 1, are not used.
- `quant_expand_x` and `comm_cmd_info` are handles for the second half of an operator; no other
  operator reads them.
- int4 packed in int32, HiFloat8 and fp4 are refused with 161002; `quant_mode` 5 and
  `comm_quant_mode` 3 and 4 with 561002, except in combine_v2. There they round rows as MX does, and
  send them in 16 bits.
- Arguments that the documents reserve must have their defaults.
"""

COLUMNS = """\
A product's column has the product's own limits of an argument, in addition to its description; an
empty cell adds none. Limits of one algorithm follow after a semicolon. Version 1 has no argument
for the algorithm: on a2, the environment chooses `hierarchy`.
"""

STATUSES = """\
An operator of torch_npu raises an exception with the status as its `code`. A function of
`moe_triton.compat.aclnn` returns the status, and `aclnn_last_error()` returns its text. 0 is
ACLNN_SUCCESS.
"""

EMULATED = """\
[npu-run](npu-run.md) lets programs import torch_npu where there is no NPU. The operators on this
page are emulated exactly, within what their sections say. Names around them:
"""

NOT_EMULATED = """\
Every other name of torch_npu and torchair raises an error with its name. `npu-run --list-missing`
lists those that a program asks for.
"""

TWO_PHASES = """\
`moe_triton.compat.aclnn` has the functions in two phases. The first takes the parameters below,
in the order of the documents, with tensors for the outputs at the end, and returns status, size
of the workspace and executor. The second takes workspace, size, executor and stream. An executor
serves one launch.
"""


HELPERS = """\
Two functions have one phase: they compute output sizes of the split-phase operators.
"""


class Docstring(NamedTuple):
    """The parts of a docstring in Google's form.

    Attributes:
        text: before the first section.
        arguments: what is said of each.
        returns: the same of each output; under "" what is said of none by name.
    """

    text: str
    arguments: dict[str, str]
    returns: dict[str, str]


def parse(function: Callable[..., object]) -> Docstring:
    """The docstring of ``function``."""
    doc = inspect.getdoc(function) or ""
    parts = re.split(r"^(Args|Returns|Raises):\n", doc, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    arguments, returns = (entries(sections.get(name, "")) for name in ("Args", "Returns"))
    return Docstring(parts[0].strip().replace("``", "`"), arguments, returns)


def entries(section: str) -> dict[str, str]:
    """The entries of a section, each in one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        match = re.match(r"^    (\w+): (.*)$", line)
        name, said = match.groups() if match else (name, line.strip())
        found[name] = f"{found.get(name, '')} {said}".strip()
    return {name: text.replace("``", "`") for name, text in found.items() if text}


def table(*rows: list[str]) -> str:
    """Rows of cells, the first of which are the headings."""
    head, *body = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def label(contract: str) -> str:
    """The letter in a rule's contract: "BS" of "have a BS", nothing of "be"."""
    return contract.split(" ", 2)[2] if " " in contract else ""


def limits_of(limits: Limits, family: str, op: str) -> dict[tuple[str, str], str]:
    """What is taken of each argument: by its name and the letter, or "", the values in words."""
    found: dict[tuple[str, str], str] = {}
    for rule in rules(family, op):
        values = getattr(limits, rule.limit)
        if values is not None:
            letter = label(rule.contract)
            found[rule.argument, letter] = f"{letter} {words(values)}".strip()
    if not is_combine(op) and not limits.float8:
        found["x", "float8"] = found["y_dtype", "float8"] = "no float8"
    if is_combine(op) and not limits.float16:
        found["expand_x", "float16"] = "bfloat16"
    refused = {"shared_expert_x": "None, if S > 0"}
    found |= {
        (argument, "None"): refused.get(argument, "None")
        for argument in limits.refused
        if not (is_combine(op) and argument == "expert_scales")  # there it is what rows are times
    }
    found |= {(argument, "needed"): "needed" for argument in limits.required}
    return found


def cells(product: str, op: str) -> dict[str, str]:
    """What a product takes of each argument of an op: of all algorithms, then what is special."""
    family = FAMILIES[op]
    algorithms = {
        name: limits_of(limits, family, op)
        for name, limits in PRODUCTS[product].families[family].items()
        if limits.in_combine or not is_combine(op)
    }
    free = limits_of(profile.PROFILES["portable"].families[family][""], family, op)
    base = algorithms[""]
    found: dict[str, list[str]] = {}
    for name, limited in algorithms.items():
        texts: dict[str, list[str]] = {}
        for argument, letter in {**base, **limited}:
            every = {one.get((argument, letter)) for one in algorithms.values()}
            # The text has what portable says too, except K, which it limits as products do.
            text = limited.get((argument, letter), f"any {letter}")
            usual = name and text == base.get((argument, letter))
            if not usual and (letter == "K" or every != {free.get((argument, letter))}):
                texts.setdefault(argument, []).append(text)
        for argument, parts in texts.items():
            said = "None" if "None" in parts else ", ".join(parts)
            found.setdefault(argument, []).append(f"{name}: {said}" if name else said)
    if family == "v2":
        found["comm_alg"] = [", ".join(f'"{name}"' for name in algorithms)]
    return {argument: "; ".join(texts) for argument, texts in found.items()}


def operator(op: str) -> Iterator[str]:
    """The section of an op."""
    function = getattr(torch_npu, op)
    doc = parse(function)
    family = FAMILIES.get(op)
    products = [name for name, one in PRODUCTS.items() if family in one.families]
    yield f"### {op}\n\n{doc.text}\n\n"
    if family is not None:
        without = [name for name in PRODUCTS if name not in products]
        if without:
            yield f"Not on {', '.join(without)}.\n\n"
    limits = [cells(product, op) for product in products]
    rows = [["argument", "default", MEANING, *products]]
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        shown = "" if default is parameter.empty else f"`{default!r}`"
        said = doc.arguments.get(name, "")
        said = re.sub(r"`(npu_moe_\w+)`", lambda match: link(match[1]), said)
        rows.append([f"`{name}`", shown, said, *(found.get(name, "") for found in limits)])
    yield table(*rows)
    yield "\n#### Returns\n\n"
    if "" in doc.returns:
        yield f"{doc.returns['']}\n\n"
    outputs = [[f"`{name}`", said] for name, said in doc.returns.items() if name]
    if outputs:
        yield table(["output", MEANING], *outputs)


def availability() -> str:
    """Which op is on which product."""
    rows = [["operator", *PRODUCTS]]
    for op in FAMILIES:
        if op in torch_npu.__all__:
            here = [FAMILIES[op] in one.families for one in PRODUCTS.values()]
            rows.append([link(op), *("yes" if yes else "–" for yes in here)])
    return table(*rows)


def statuses() -> str:
    """The exceptions, and what they are through ``compat.aclnn``."""
    names = {getattr(aclnn, name): name for name in aclnn.__all__ if name.startswith("ACLNN_")}
    kinds = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, MoeError)
    ]
    kinds = [kind for kind in kinds if kind not in (MoeError, errors.ArgumentError)]
    rows = [["exception", "when", "`code`", "status"]]
    for code in (errors.NULL_POINTER, errors.INVALID_PARAM, errors.TILING_ERROR, None):
        status = aclnn.ACLNN_ERR_RUNTIME_ERROR if code is None else code
        for kind in kinds:
            if kind.code == code:
                said = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
                shown = f"{status} {names[status]}"
                rows.append([f"`{kind.__name__}`", said.replace("``", "`"), str(code), shown])
    inner = aclnn.ACLNN_ERR_INNER
    rows.append(["any other", "A defect of this library.", "", f"{inner} {names[inner]}"])
    return table(*rows)


def two_phases() -> str:
    """The functions of the C interface, each with the op that it stands for, and what else it has.

    That is the helpers that tell sizes, and the limits of the one op that torch_npu has not.
    """
    rows = [["function", "operator", "parameters of the first phase"]]
    suffix = "GetWorkspaceSize"
    for name in aclnn.__all__:
        if f"{name}{suffix}" in aclnn.__all__:
            first = getattr(aclnn, f"{name}{suffix}")
            (op,) = set(re.findall(r"npu_moe_\w+", parse(first).text)) or {""}
            parameters = ", ".join(f"`{one}`" for one in inspect.signature(first).parameters)
            rows.append([f"`{name}`", link(op), parameters])
    helpers = [["helper", "parameters", "returns"]]
    for name in aclnn.__all__:
        if name.endswith("CalcOutputSize"):
            helper = getattr(aclnn, name)
            parameters = ", ".join(f"`{one}`" for one in inspect.signature(helper).parameters)
            helpers.append([f"`{name}`", parameters, parse(helper).returns[""]])
    return f"{table(*rows)}\n{HELPERS}\n{table(*helpers)}\n{first_of_replicas()}"


def first_of_replicas() -> str:
    """What aclnnMoeEPLBUpdateExpert takes, which its successor, the one in torch_npu, extends."""
    taken = [
        f"on {name}, "
        + ", ".join(
            f"`{argument}` {said}" for argument, said in cells(name, EPLB_UPDATE_EXPERT).items()
        )
        for name, one in PRODUCTS.items()
        if FAMILIES[EPLB_UPDATE_EXPERT] in one.families
    ]
    return (
        f"`aclnnMoeEPLBUpdateExpert` takes less than {link(UPDATE_EXPERT)}: ids are int32, and "
        f"`balanceMode` is 0; {'; '.join(taken)}.\n"
    )


def link(op: str) -> str:
    """A link to the section of an op."""
    return f"[`{op}`](#{op})"


def buffer_formulas() -> str:
    """The formula of each product, family and algorithm."""
    rows = [["product", "operators", "`comm_alg`", "bytes"]]
    for name, one in PRODUCTS.items():
        for family, algorithms in one.families.items():
            ops = [op for op, its in FAMILIES.items() if its == family]
            seen: dict[str, list[str]] = {}
            for algorithm, limits in algorithms.items():
                if limits.buffer is not None:
                    formula = (inspect.getdoc(limits.buffer) or "").partition("\n")[0].rstrip(".")
                    seen.setdefault(formula, []).append(f'"{algorithm}"')
            shown = ", ".join(op.removeprefix("npu_moe_distribute_") for op in ops)
            rows += [[name, shown, ", ".join(names), formula] for formula, names in seen.items()]
    letters = (inspect.getdoc(buffers) or "").partition("\nLetters: ")[2].partition("\nSource")[0]
    return f"{table(*rows)}\n{letters.replace('``', '`')}\n"


def environment() -> str:
    """What variables of the environment do."""
    switches = [
        f"- {' and '.join(f'`{key}={value}`' for key, value in one.switches.items())} choose the "
        f'hierarchical algorithm on {name} where `comm_alg` is "" or not there: its limits, and '
        "its buffer. They mean nothing elsewhere.\n"
        for name, one in PRODUCTS.items()
        if one.switches
    ]
    return (
        f"- `{profile.ENVIRONMENT}`: the profile, unless `set_profile` chose one.\n"
        f"{''.join(switches)}"
        f"- `{buffers.ENVIRONMENT}`: MB of a group's communication buffer. Under the profile of a "
        "product it is checked where it is set; the memory that is really used is "
        "`moe_triton.window_bytes`. `moe_triton.required_buffsize_mb(product, op, ...)` computes "
        "what it has to be.\n"
    )


def emulated() -> str:
    """How far npu-run emulates other names, a table for each extent."""
    extents = {
        "exactly": coverage.EXACTLY,
        "in part": coverage.IN_PART,
        "not at all": coverage.NOT_AT_ALL,
    }
    rows = [
        f"| {', '.join(f'`{name}`' for name in entry.names)} | {extent} | {entry.note} |"
        for extent, entries in extents.items()
        for entry in entries
    ]
    return "\n".join(["| name | emulated | how |", "| --- | --- | --- |", *rows]) + "\n"


def page() -> str:
    """The whole page."""
    distributed = [op for op in FAMILIES if op in torch_npu.__all__]
    exchanged = [ALLTOALLV_GMM, GMM_ALLTOALLV]
    local = [op for op in torch_npu.__all__ if op not in {*FAMILIES, *exchanged}]
    letters = (inspect.getdoc(torch_npu) or "").partition("\n\n")[2].partition("\n\nEach ")[0]
    parts = [
        HEAD,
        availability(),
        PORTABLE,
        f"## Statuses\n\n{STATUSES}\n{statuses()}",
        f"## The C interface\n\n{TWO_PHASES}\n{two_phases()}",
        f"## What npu-run emulates\n\n{EMULATED}\n{emulated()}\n{NOT_EMULATED}",
        f"## The environment\n\n{environment()}",
        f"## Buffers\n\n`{buffers.ENVIRONMENT}` times 2^20 must be at least\n\n{buffer_formulas()}",
        f"## Operators of experts on several ranks\n\n{letters.replace('``', '`')}\n\n{COLUMNS}",
        *("".join(operator(op)).rstrip() + "\n" for op in distributed),
        "## Matrix products around an exchange\n",
        *("".join(operator(op)).rstrip() + "\n" for op in exchanged),
        "## Operators on one device\n",
        *("".join(operator(op)).rstrip() + "\n" for op in local),
    ]
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
