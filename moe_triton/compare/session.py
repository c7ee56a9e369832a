"""Compare all calls of a dump with the same calls run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from ..errors import ArgumentValueError, MoeError
from ..record.calls import FileError, RankCall, StoredTensor
from ..record.operators import OUTPUTS, is_collective
from .deviations import CONTIGUOUS, DEVIATIONS, contiguous_dispatch, recognise, regular_combine
from .explain import explains_sums, first_difference, sum_hint
from .metrics import differing, errors
from .outputs import Geometry, Region, region
from .readers import read
from .replay import RankInputs, Tensors, Where, check_product, run, too_large
from .report import CallResult, OutputResult, RankResult, Report
from .rules import STANDARDS, Standard, Verdict, judge
from .worlds import WorldCall, group_calls

Progress = Callable[[int, int, str], None]


def compare(
    path: str | Path,
    *,
    standard: Standard = "cann",
    where: Where | None = None,
    accept: Collection[str] = (),
    settings: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare the calls of a dump with the same calls run here.

    Args:
        path: an msprobe dump, a folder of converted kernel dumps, a YAML file that names
            ``torch.save`` files, or a record of ``moe-triton record``.
        standard: the rules, one of ``rules.STANDARDS``.
        where: device, back end and product limits; by default the definitions on the CPU.
        accept: names of ``deviations.DEVIATIONS`` that count as in rule.
        settings: arguments by name that the files do not hold, for kernel dumps.
        progress: called with the calls done, their number, and the next call.

    Returns:
        A row for each call and output. What cannot be used is among its problems.

    Raises:
        ArgumentValueError: an unknown standard or deviation.
        FileError: ``path`` is nothing of this.
    """
    if standard not in STANDARDS:
        raise ArgumentValueError("compare", "standard", f"be one of {[*STANDARDS]}", standard)
    for name in accept:
        if name not in DEVIATIONS:
            raise ArgumentValueError("compare", "accept", f"name one of {[*DEVIATIONS]}", name)
    where = where or Where()
    problems: list[tuple[str, str]] = []

    def report(place: str, problem: str) -> None:
        problems.append((place, problem))

    source, calls = read(Path(path), report, settings or {})
    worlds = group_calls(calls, report)
    results = []
    session = _Session(standard, where, frozenset(accept), report)
    with where.chosen():
        for done, world in enumerate(worlds):
            if progress is not None:
                progress(done, len(worlds), world.place)
            results.append(session.compare_call(world))
    if progress is not None:
        progress(len(worlds), len(worlds), "")
    backend = where.backend or ("the definitions" if where.device.type == "cpu" else "its kernels")
    return Report(
        str(path),
        source,
        standard,
        f"{where.device.type}, {backend}",
        tuple(results),
        tuple(problems),
        tuple(accept),
        *_group_sizes(worlds),
    )


@dataclasses.dataclass(frozen=True)
class _Session:
    standard: Standard
    where: Where
    accept: frozenset[str]
    report: Callable[[str, str], None]

    def compare_call(self, world: WorldCall) -> CallResult:
        """Run a call and compare its outputs; what cannot be run says why."""
        try:
            return self._compare_call(world)
        except Exception as error:  # noqa: BLE001 - torch can raise anything for a hostile dump
            text = str(error).partition("\n")[0]
            problem = f"its arguments fit no call: {type(error).__name__}: {text}"
            words = _world_words(world)
            return CallResult(world.op, world.name, world.step, words, "", problem=problem)

    def _compare_call(self, world: WorldCall) -> CallResult:
        notes = [*dict.fromkeys(note for call in world.calls for note in call.notes)]
        result = CallResult(
            world.op, world.name, world.step, _world_words(world), "", notes=tuple(notes)
        )
        try:
            inputs = [RankInputs.load(call) for call in world.calls]
            result = dataclasses.replace(result, sizes=_sizes(world, inputs))
            if problem := too_large(world, inputs):
                return dataclasses.replace(result, problem=problem)
            geometry = Geometry.of(world, inputs) if is_collective(world.op) else None
            forbidden = check_product(world, inputs, self.where)
            if forbidden:
                notes.append(f"the limits of {self.where.product} forbid this call: {forbidden}")
            regular = regular_combine(geometry) if geometry is not None else None
            if regular is not None:
                notes.append(f"{CONTIGUOUS}: {DEVIATIONS[CONTIGUOUS]}")
            expected = run(world, regular or inputs, self.where)
        except MoeError as error:
            kind = "" if isinstance(error, FileError) else "refused here: "
            return dataclasses.replace(result, notes=tuple(notes), problem=f"{kind}{error}")
        found, broken = self._outputs(world)
        contiguous = None
        if geometry is not None:
            contiguous = contiguous_dispatch(geometry, found, expected)
        outputs = []
        for name in OUTPUTS[world.op]:
            ranks = self._output(world, geometry, contiguous, inputs, found, broken, expected, name)
            if ranks is not None:
                outputs.append(ranks)
        names = sorted({name for output in outputs for name in output.deviations})
        notes += [f"{name}: {DEVIATIONS[name]}" for name in names]
        return dataclasses.replace(result, outputs=tuple(outputs), notes=tuple(notes))

    def _outputs(self, world: WorldCall) -> tuple[list[Tensors], list[dict[str, str]]]:
        """The outputs of the dump that can be read, and the problems of the others."""
        found: list[Tensors] = []
        broken: list[dict[str, str]] = []
        for call in world.calls:
            tensors: Tensors = {}
            problems: dict[str, str] = {}
            for name, stored in call.outputs.items():
                if stored is None:
                    continue
                try:
                    tensors[name] = stored.load()
                except FileError as error:
                    problems[name] = str(error)
            found.append(tensors)
            broken.append(problems)
        return found, broken

    def _output(
        self,
        world: WorldCall,
        geometry: Geometry | None,
        contiguous: tuple[Geometry, list[Tensors]] | None,
        inputs: list[RankInputs],
        found: list[Tensors],
        broken: list[dict[str, str]],
        expected: list[Tensors],
        name: str,
    ) -> OutputResult | None:
        """The results of one output; None where neither side has it."""
        results, rule, note, dtype = [], "", "", ""
        for rank, call in enumerate(world.calls):
            if name not in expected[rank]:
                continue
            dtype = str(expected[rank][name].dtype).removeprefix("torch.")
            part = region(world, geometry, rank, inputs[rank], name, expected[rank])
            note = note or part.undefined or part.note
            if name in broken[rank] and not part.undefined:
                results.append(
                    RankResult(rank, call.rank, Verdict.OUT_OF_RULE, problem=broken[rank][name])
                )
                continue
            if part.undefined:
                results.append(RankResult(rank, call.rank, Verdict.UNDEFINED))
                continue
            one, rule_of_rank = self._tensor(world, geometry, rank, part, found, expected, name)
            if contiguous is not None and one.verdict is not Verdict.IN_RULE:
                other, outputs = contiguous
                part = region(world, other, rank, inputs[rank], name, outputs[rank])
                again, _ = self._tensor(world, other, rank, part, found, outputs, name)
                if again.verdict is Verdict.IN_RULE:
                    one = self._known(again, CONTIGUOUS)
            rule = rule or rule_of_rank
            results.append(one)
        if not results:
            return None
        return OutputResult(name, dtype, rule, note, tuple(results))

    def _known(self, result: RankResult, deviation: str) -> RankResult:
        verdict = Verdict.IN_RULE if deviation in self.accept else Verdict.KNOWN
        return dataclasses.replace(result, verdict=verdict, deviation=deviation)

    def _tensor(
        self,
        world: WorldCall,
        geometry: Geometry | None,
        rank: int,
        part: Region,
        found: list[Tensors],
        expected: list[Tensors],
        name: str,
    ) -> tuple[RankResult, str]:
        """The result of one output on one rank, and its rule."""
        call = world.calls[rank]
        reference = part.take(expected[rank][name])
        assert reference is not None, "what runs here has the documented shapes"
        if name not in found[rank]:
            if not reference.numel():
                return RankResult(rank, call.rank, Verdict.IN_RULE), ""
            problem = f"the dump has no {name}" + (
                ": the operator returned None" if name in call.outputs else ""
            )
            # A dump of inputs alone, or None for an output without a meaning, is no deviation.
            verdict = Verdict.OUT_OF_RULE if call.outputs else Verdict.UNDEFINED
            return RankResult(rank, call.rank, verdict, problem=problem), ""
        actual, problem = _fitting(found[rank][name], call, name, part, reference)
        if actual is None:
            return RankResult(rank, call.rank, Verdict.OUT_OF_RULE, problem=problem), ""
        measured = errors(actual, reference)
        judgement = judge(self.standard, part.kind, reference.dtype, measured)
        difference = first_difference(rank, call.rank, part, actual, reference)
        # Not reshape: a rank may have no rows.
        differs = differing(actual, reference)[..., None].flatten(1).any(1)
        by_expert = {}
        if part.experts is not None and len(part.experts) == len(differs):
            for expert in part.experts.unique().tolist():
                mine = part.experts == expert
                by_expert[expert] = (int(mine.sum()), int(differs[mine].sum()))
        result = RankResult(
            rank,
            call.rank,
            judgement.verdict,
            measured,
            (len(actual), int(differs.sum())),
            by_expert,
            difference,
            problem,
        )
        if judgement.verdict is Verdict.OUT_OF_RULE:
            deviation = recognise(world, rank, name, actual, reference)
            if deviation is not None:
                return self._known(result, deviation), judgement.rule
            if difference is not None and geometry is not None:
                result = self._with_sum_hint(result, geometry, found[rank][name], expected[rank])
        return result, judgement.rule

    def _with_sum_hint(
        self, result: RankResult, geometry: Geometry, found: torch.Tensor, expected: Tensors
    ) -> RankResult:
        rows = [rank.tensor("expand_x") for rank in geometry.inputs]
        difference = result.difference
        if not explains_sums(geometry.world.op, expected) or difference is None or difference.hint:
            return result
        if any(x is None for x in rows) or not geometry.rows:
            return result
        known = [x for x in rows if x is not None]
        if any(len(x) < len(r) for x, r in zip(known, geometry.rows, strict=True)):
            return result
        hint = sum_hint(geometry, known, difference, found)
        return dataclasses.replace(result, difference=dataclasses.replace(difference, hint=hint))


def _fitting(
    tensor: torch.Tensor, call: RankCall, name: str, part: Region, reference: torch.Tensor
) -> tuple[torch.Tensor | None, str]:
    """The compared part of the dump's tensor, in the dtype and shape of ``reference``; or why not.

    Bytes may come as uint8 or int8; float32 may hold what was bfloat16 before a conversion.
    """
    stored = call.outputs.get(name)
    widened = isinstance(stored, StoredTensor) and stored.widened
    kind = reference.dtype
    if tensor.dtype != kind:
        if kind.itemsize == 1 and tensor.dtype in (torch.uint8, torch.int8):
            tensor = tensor.contiguous().view(kind)
        elif widened and tensor.dtype == torch.float32 and kind == torch.bfloat16:
            tensor = tensor.to(kind)
        else:
            return None, (
                f"{name} fits no documented variant: it must be {kind} with these arguments, "
                f"got {tensor.dtype}"
            )
    actual = part.take(tensor)
    if actual is None:
        return None, (
            f"{name} fits no documented variant: it must have at least {len(reference)} rows, "
            f"got shape {tuple(tensor.shape)}"
        )
    if actual.shape != reference.shape:
        if actual.numel() == reference.numel():
            return actual.reshape(reference.shape), ""
        return None, (
            f"{name} fits no documented variant: it must have rows of shape "
            f"{tuple(reference.shape)}, got {tuple(tensor.shape)}"
        )
    return actual, ""


def _group_sizes(worlds: list[WorldCall]) -> tuple[int | None, int | None]:
    """W and E of the first collective call."""
    for world in worlds:
        if is_collective(world.op):
            return world.ep_world, world.calls[0].number("moe_expert_num") or None
    return None, None


def _world_words(world: WorldCall) -> str:
    if not is_collective(world.op):
        ranks = len(world.calls)
        return f"{ranks} rank" + ("s apart" if ranks > 1 else "")
    words = f"{world.ep_world} rank" + ("s" if world.ep_world > 1 else "")
    return words if world.tp_world == 1 else f"{words} x TP {world.tp_world}"


def _sizes(world: WorldCall, inputs: list[RankInputs]) -> str:
    """BS, H, K, E, shared experts and quantisation."""
    call = world.calls[0]
    ids = [rank.tensor("expert_ids") for rank in inputs]
    if not is_collective(world.op) or any(i is None or i.dim() != 2 for i in ids):
        return ""
    tokens = sorted({len(i) for i in ids if i is not None})
    first = ids[0]
    assert first is not None
    rows = inputs[0].tensor("x" if "x" in inputs[0].arguments else "expand_x")
    words = ["BS " + (f"{tokens[0]}-{tokens[-1]}" if len(tokens) > 1 else str(tokens[0]))]
    if rows is not None and rows.dim() == 2:
        words.append(f"H {rows.shape[1]}")
    words += [f"K {first.shape[1]}", f"E {call.number('moe_expert_num')}"]
    shared = call.number("shared_expert_rank_num")
    if shared:
        words.append(f"{call.number('shared_expert_num', 1)} shared on {shared}")
    for name in ("quant_mode", "comm_quant_mode"):
        if call.number(name):
            words.append(f"{name} {call.number(name)}")
    if inputs[0].tensor("x_active_mask") is not None:
        words.append("masked")
    return ", ".join(words)
