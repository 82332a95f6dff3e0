"""The page: what was asked, what was found, the plots, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from qpd.lab.experiment.measures import BY_NAME, MEASURES
from qpd.lab.experiment.raw import Row
from qpd.lab.experiment.report.plots import Data, all_plots

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c2328; background: #fff;
       max-width: 1060px; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin-bottom: .3rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.question { font-size: 1.08rem; color: #3b4650; margin-top: 0; }
.facts { color: #5a6570; font-size: .9rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; } .wide { overflow-x: auto; }
th, td { padding: .3rem .65rem; border-bottom: 1px solid #d9dfe4; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } td { white-space: nowrap; }
table.words td { white-space: normal; }
.ci { color: #6b7680; } .warn { background: #fdf0e6; border-left: 4px solid #d55e00; padding: .5rem 1rem; }
figure { margin: 1rem 0 2rem; } figure img { width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #4a545d; }
pre { background: #f4f6f8; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
"""


_MANIFOLD = -2.0
"""Savings below this, three times as much, are told as such."""


def write(directory: Path, summary: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]) -> Path:
    """Write report.html into a run's directory."""
    file = directory / "report.html"
    file.write_text(page(summary, tables), encoding="utf-8")
    return file


def page(summary: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]) -> str:
    """The text of the page."""
    title = escape(summary["experiment"]["title"])
    body = "\n".join(_sections(summary, tables))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _sections(summary: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    experiment, data = summary["experiment"], Data(summary, tables)
    yield f"<h1>{escape(experiment['title'])}</h1>"
    yield f'<p class="question">{escape(experiment["question"])}</p>'
    yield f'<p class="facts">{escape(_facts(summary))}</p>'
    yield from _failed(summary)
    if not data.trials:
        yield '<p class="warn">No trial went well: there is nothing to show.</p>'
        return
    yield "<h2>What was found</h2>"
    yield _results(data)
    yield from _savings(summary)
    for plot in all_plots(data):
        caption = escape(plot.caption)
        yield f"<h2>{escape(plot.title)}</h2>"
        yield f'<figure><img alt="{escape(plot.title)}" src="{plot.uri}"><figcaption>{caption}</figcaption></figure>'
    yield "<h2>What the figures mean</h2>"
    yield _meanings(data)
    yield "<h2>The experiment</h2>"
    yield f"<pre>{escape(yaml.safe_dump(experiment['file'], sort_keys=False, allow_unicode=True, width=100))}</pre>"
    yield _machine(summary)


def _facts(summary: Mapping[str, Any]) -> str:
    experiment, trials = summary["experiment"], summary["trials"]
    words = [
        f"{experiment['name']}{', small form' if experiment['small'] else ''}",
        f"begun {summary['begin']}",
        f"{summary['seconds'] / 60:.1f} min",
        f"{trials['done']} trials, {len(trials['failed'])} failed",
        f"{experiment['repetitions']} repetitions, seed {experiment['seed']}",
        f"compared with: {experiment['baseline']}",
    ]
    return " · ".join(words)


def _failed(summary: Mapping[str, Any]) -> Iterator[str]:
    failed = summary["trials"]["failed"]
    if failed:
        lines = "".join(
            f"<li>trial {one['trial']} ({escape(one['condition'])} {escape(one['sweep'])}, repetition "
            f"{one['repetition'] + 1}): {escape(one['error'])}</li>"
            for one in failed
        )
        yield f'<div class="warn">Failed trials; nothing of them is in the figures.<ul>{lines}</ul></div>'


def _results(data: Data) -> str:
    names = [BY_NAME[name] for name in data.figures if data.has(name)]
    swept = data.sweeps != [""]
    head = (
        f'<th class="n">{escape(data.sweep_label)}</th>' if swept else ""
    ) + "<th>condition</th><th class=n>n</th>"
    head += "".join(f'<th class="n">{escape(measure.axis)}</th>' for measure in names)
    lines = []
    for group in data.summary["groups"]:
        cells = f'<td class="n">{escape(group["sweep"])}</td>' if swept else ""
        cells += f'<td>{escape(group["condition"])}</td><td class="n">{len(group["trials"])}</td>'
        for measure in names:
            cells += f'<td class="n">{_cell(measure.name, group["measures"].get(measure.name))}</td>'
        lines.append(f"<tr>{cells}</tr>")
    note = "Mean, below it the 95 % confidence interval. ≥: some or all values are lower bounds."
    return (
        f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div><p class="facts">{note}</p>'
    )


def _cell(name: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    measure = BY_NAME[name]
    sign = "≥ " if found["at_least"] else ""
    text = sign + measure.show(found["mean"])
    if found["low"] is not None:
        text += f'<br><span class="ci">{measure.show(found["low"])} – {measure.show(found["high"])}</span>'  # noqa: RUF001
    return text


def _savings(summary: Mapping[str, Any]) -> Iterator[str]:
    chosen = [
        one
        for one in summary["savings"]
        if one["measure"] in {"communication_s", "outage_s", "stall_s", "lost_time_s", "left_s"}
    ]
    if not chosen:
        return
    baseline = escape(summary["experiment"]["baseline"])
    yield f"<h2>How much less than {baseline}</h2>"
    label = summary["experiment"]["sweep_label"]
    swept = any(one["sweep"] for one in chosen)
    lines = []
    for one in chosen:
        saving = one["saving"]
        # Of many times as much, a part of the baseline says nothing.
        plain = saving["low"] is not None and saving["mean"] > _MANIFOLD
        interval = f" ({saving['low']:.0%} – {saving['high']:.0%})" if plain else ""  # noqa: RUF001
        first = f'<td class="n">{escape(one["sweep"])}</td>' if swept else ""
        lines.append(
            f"<tr>{first}<td>{escape(one['condition'])}</td><td>{escape(BY_NAME[one['measure']].label)}</td>"
            f'<td class="n">{_part(saving["mean"])}<span class="ci">{interval}</span></td></tr>'
        )
    head = f'<th class="n">{escape(label)}</th>' if swept else ""
    head += '<th>condition</th><th>of</th><th class="n">less, mean (95 %)</th>'
    yield f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    yield '<p class="facts">Repetition by repetition: both have the same seed there. Negative: it needs more.</p>'


def _part(saving: float) -> str:
    return f"{saving:.0%}" if saving > _MANIFOLD else f"{1 - saving:.1f} times as much"


def _meanings(data: Data) -> str:
    lines = []
    for measure in MEASURES:
        if not data.has(measure.name):
            continue
        note = "" if data.happened(measure.name) else " <b>0 in every trial.</b>"
        lines.append(f"<tr><td>{escape(measure.label)}</td><td>{escape(measure.meaning)}{note}</td></tr>")
    return f'<table class="words">{"".join(lines)}</table>'


def _machine(summary: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>"
        for key, value in summary["machine"].items()
    )
    return (
        f"<h2>The machine</h2><table>{lines}</table>"
        '<p class="facts">An emulation in network namespaces: ratios and intervals carry over to other machines, '
        "times of its own processing do not, and nothing here speaks of switch chips.</p>"
    )
