"""A bit changed anywhere in a dump: found at its place if it is defined, else not reported."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from ascend_dumps import COMBINE, DISPATCH, Dump

from moe_triton.compare import Verdict, compare

OUTPUTS = {
    "expand_x": DISPATCH,
    "dynamic_scales": DISPATCH,
    "assist_info_for_combine": DISPATCH,
    "expert_token_nums": DISPATCH,
    "ep_recv_counts": DISPATCH,
    "x": COMBINE,
}
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A comparison of four ranks takes a while.
EXAMPLES = max(6, hypothesis.settings.default.max_examples // 5)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return Dump(tmp_path_factory.mktemp("places"))


def defined_place(dump, rank, layer, name, element):
    """Words that name the place of an element, or None if it is undefined."""
    received = int(dump.read(rank, DISPATCH, layer, "ep_recv_counts")[-1])
    row, column = divmod(element, 64)
    if name == "expand_x":
        return f"row {row} (token", f"column {column}" if row < received else None
    if name == "dynamic_scales":
        return f"row {element} (token", "" if element < received else None
    if name == "assist_info_for_combine":
        row, word = divmod(element, 3)
        return f"of row {row} (token", f"column {word}" if row < received else None
    if name == "x":
        # Layer 0 masks the fifth token of each rank.
        return f"token {row} (experts", None if (layer, row) == (0, 4) else f"column {column}"
    return f"element {element}", ""


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.data())
def test_a_changed_bit(dump, data):
    name = data.draw(st.sampled_from([*OUTPUTS]))
    op, rank, layer = OUTPUTS[name], data.draw(st.integers(0, 3)), data.draw(st.integers(0, 1))
    tensor = dump.read(rank, op, layer, name)
    element = data.draw(st.integers(0, tensor.numel() - 1))
    changed = tensor.clone()
    bits = changed.view(INTEGER[tensor.itemsize]).reshape(-1)
    bits[element] ^= 1 << data.draw(st.integers(0, 6))
    words, defined = defined_place(dump, rank, layer, name, element)
    dump.write(changed, rank, op, layer, name)
    try:
        report = compare(dump.path, standard="exact")
    finally:
        dump.write(tensor, rank, op, layer, name)
    bad = [(call, o) for call in report.calls for o in call.outputs if o.verdict > Verdict.IN_RULE]
    if defined is None or torch.equal(changed, tensor):  # a zero's sign
        assert bad == []
        return
    ((call, output),) = bad
    assert (call.op, call.name.split(".")[2], output.name) == (op, str(layer), name)
    (line,) = output.lines
    assert line.startswith(f"rank {rank}, ")
    assert words in line
    assert defined in line
