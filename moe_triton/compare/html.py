"""A report as one HTML file: no scripts, no other files, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape

from .. import __version__
from .report import CallResult, OutputResult, Report, bin_names
from .rules import Verdict
from .terminal import conclusion, number, percent

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; --good: #2e7d32; --bad: #c62828;
  --known: #8e24aa; --warn: #b26a00; }
@media (prefers-color-scheme: dark) { :root { --good: #81c784; --bad: #ef9a9a; --known: #ce93d8;
  --warn: #ffcc80; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child, td.text, th.text { text-align: left }
.scroll { overflow-x: auto } figure { margin: 1rem 0 } figcaption, .dim { color: var(--dim) }
.in-rule { color: var(--good) } .out-of-rule { color: var(--bad); font-weight: 600 }
.known { color: var(--known) } .warning { color: var(--warn) } .undefined { color: var(--dim) }
summary { cursor: pointer; margin: .4rem 0 } img { max-width: 100% } li { margin: .2rem 0 }
code { font-size: .95em; overflow-wrap: anywhere }
"""
CAPTIONS = {
    "steps": "Elements by their distance from the expected value; codes, scales and sums only.",
    "experts": "Rows with a difference, by the expert that they are for.",
    "ranks": "Elements that differ, by rank.",
    "times": "Measured times beside those of other systems; workloads differ where a name says so.",
}


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML file with a title and the parts of its body."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<p class="dim">moe_triton {escape(__version__)}</p>\n</body></html>\n'
    )


def picture(name: str, svg: bytes) -> str:
    """A chart as part of the page."""
    data = base64.b64encode(svg).decode()
    caption = escape(CAPTIONS[name.partition("-")[0]])
    return (
        f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]], text: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already; ``text`` are columns aligned to the left."""
    left = set(text)

    def cells(kind: str, row: Iterable[str]) -> str:
        return "".join(
            f"<{kind}{' class=text' if i in left else ''}>{cell}</{kind}>"
            for i, cell in enumerate(row)
        )

    lines = [f"<tr>{cells('th', header)}</tr>"] + [f"<tr>{cells('td', row)}</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def body(report: Report, charts: Mapping[str, bytes]) -> list[str]:
    """The body of the page of a report with its charts."""
    style = "in-rule" if report.exit_code == 0 else "out-of-rule"
    about = (
        f"<p>{escape(report.source)}; calls run here on {escape(report.where)}; standard "
        f"<b>{escape(report.standard)}</b>.</p>"
    )
    parts = [
        f"<h1>Comparison of <code>{escape(report.path)}</code></h1>",
        f"<p class={style}>{escape(conclusion(report).plain)}</p>",
        about,
    ]
    if report.problems:
        items = (f"<li><b>{escape(p)}</b>: {escape(text)}</li>" for p, text in report.problems)
        parts.append(f"<h2>Not usable</h2><ul>{''.join(items)}</ul>")
    parts += [picture(name, svg) for name, svg in charts.items()]
    parts += [part for call in report.calls for part in _call(call)]
    return parts


def _call(call: CallResult) -> Iterable[str]:
    open_ = " open" if call.problem or call.verdict > Verdict.IN_RULE else ""
    verdict = "out of rule" if call.problem else call.verdict.words
    yield (
        f"<details{open_}><summary><b>{escape(call.place)}</b> "
        f'<span class="{verdict.replace(" ", "-")}">{verdict}</span> '
        f"<span class=dim>{escape(', '.join(filter(None, [call.world, call.sizes])))}</span>"
        "</summary>"
    )
    if call.problem:
        yield f"<p class=out-of-rule>not compared: {escape(call.problem)}</p>"
    if call.outputs:
        yield _outputs(call.outputs)
    items = [f"{o.name}: {line}" for o in call.outputs for line in o.lines]
    items += [f"{o.name}: {o.note}" for o in call.outputs if o.note]
    items += call.notes
    if items:
        yield "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
    yield "</details>"


def _outputs(outputs: Iterable[OutputResult]) -> str:
    header = ["output", "dtype", "values", "equal", "1 apart", "largest step", "Cosine"]
    header += ["MaxAbsErr", "MaxRelativeErr", "One Thousandth", "Five Thousandths", "verdict"]
    header.append("rule")
    rows = []
    for output in outputs:
        e, verdict = output.errors, output.verdict
        if verdict is Verdict.UNDEFINED:
            continue
        steps = dict(zip(bin_names(), e.histogram, strict=True))
        title = ", ".join(f"{name}: {n}" for name, n in steps.items() if n)
        rows.append(
            [
                escape(output.name),
                escape(output.dtype),
                str(e.elements),
                percent(e.exact, e.elements),
                str(e.off_by_one),
                f'<span title="elements by distance: {escape(title)}">{e.max_step}</span>',
                number(e.cosine, e.elements),
                number(e.max_abs, e.elements),
                number(e.max_relative, e.elements),
                percent(e.below_thousandth, e.elements),
                percent(e.below_five_thousandths, e.elements),
                f'<span class="{verdict.words.replace(" ", "-")}">{verdict.words}</span>',
                escape(output.rule),
            ]
        )
    return table(header, rows, text=(0, 1, 11, 12)) if rows else ""
