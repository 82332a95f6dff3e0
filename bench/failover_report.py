"""The table and the picture of failover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

mpl.use("Agg")

from matplotlib import pyplot as plt

COLOURS = {
    "without qpd": "#d55e00",
    "with qpd": "#0072b2",
    "qpd stopped (SIGSTOP)": "#009e73",
    "qpd killed (SIGKILL)": "#cc79a7",
}
"""Okabe and Ito's palette: told apart by readers with any colour vision."""


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that is not exceeded in this part of all trials: of 30, p99 is the largest."""
    return sorted(values)[max(0, ceil(part * len(values)) - 1)]


def summarise(result: dict[str, Any]) -> None:
    """Add what follows from the trials to every row."""
    for row in result["rows"]:
        trials = row["trials"]
        figures = [trial["extra"].get("down_to_last_ms") for trial in trials if trial.get("extra")]
        known = [figure for figure in figures if figure is not None]
        row["figure"] = "last packet after Down" if known else "outage" if row["kind"] else "lag"
        row["summary"] = _summary(known or [trial["outage_ms"] for trial in trials])
        for name in ("detected_ms", "moved_ms", "unhurt_gap_ms"):
            values = [trial[name] for trial in trials if trial.get(name) is not None and trial.get("lost", 1)]
            if values:
                row[name.removesuffix("_ms")] = _summary(values)
        row["reached"] = {name: row["summary"][name] <= limit for name, limit in row["limits"].items()}


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "count": len(values),
        "p50": round(quantile(values, 0.5), 3),
        "p99": round(quantile(values, 0.99), 3),
        "max": round(max(values), 3),
    }


def show(console: Console, result: dict[str, Any]) -> None:
    """What was measured, against what was to be reached."""
    loads = [trial["load"] for row in result["rows"] for trial in row["trials"]]
    table = Table(
        title=f"Failover, BFD {result['bfd']}; milliseconds; load of the machine {min(loads):.1f} to {max(loads):.1f}",
        title_justify="left",
    )
    left = {"what", "qpd"}
    for heading in (
        "what",
        "qpd",
        "trials",
        "p50",
        "p99",
        "max",
        "target",
        "",
        "detected",
        "moved",
        "of unhurt",
    ):
        table.add_column(heading, justify="left" if heading in left else "right")
    name = ""
    for row in sorted(result["rows"], key=lambda row: _place(result["rows"], row["name"])):
        if name not in {"", row["name"]}:
            table.add_section()
        table.add_row("" if row["name"] == name else row["name"], *_cells(row))
        name = row["name"]
    console.print(table)
    console.print(
        "p99 of fewer than 100 trials is the largest. detected: from the fault to the kernel's word that the path is "
        "dead (p50); moved: from that word to the last QP's next packet (p50, max); of unhurt: longest gap of QPs that "
        "lost nothing (max), which is what the machine itself adds."
    )
    for row in result["rows"]:
        for reason in row.get("void", ()):
            console.print(f"a trial of {row['name']}, {row['mood']}, was void: {reason}", markup=False)
    for soak in result["soaks"]:
        console.print(
            f"{soak['seconds']:.0f} s without a fault under {soak['stress']}: {soak['failovers']} failovers, "
            f"{soak['declared_by_bfdd']} downs declared by bfdd"
        )


def _place(rows: Iterable[dict[str, Any]], name: str) -> int:
    return next(index for index, row in enumerate(rows) if row["name"] == name)


def _cells(row: dict[str, Any]) -> list[str]:
    summary = row["summary"]
    targets = ", ".join(f"{name} {limit:g}" for name, limit in row["limits"].items())
    verdict = ""
    if row["limits"]:
        verdict = "[green]reached[/]" if all(row["reached"].values()) else "[red]not reached[/]"
    detected, moved, unhurt = (row.get(name) for name in ("detected", "moved", "unhurt_gap"))
    return [
        row["mood"],
        str(summary["count"]),
        *(f"{summary[name]:.1f}" for name in ("p50", "p99", "max")),
        targets,
        verdict,
        f"{detected['p50']:.1f}" if detected else "",
        f"{moved['p50']:.1f}, {moved['max']:.1f}" if moved else "",
        f"{unhurt['max']:.1f}" if unhurt else "",
    ]


def draw(result: dict[str, Any], file: Path) -> None:
    """Each trial's outage, case by case, on a logarithmic axis; what was to be reached as a line."""
    rows = [row for row in result["rows"] if row["figure"] == "outage"]
    if not rows:
        return
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.75 * len(names)), dpi=130, layout="constrained")
    random = np.random.default_rng(1)
    for row in rows:
        moods = [other["mood"] for other in rows if other["name"] == row["name"]]
        place = names.index(row["name"]) + 0.7 * ((moods.index(row["mood"]) + 0.5) / len(moods) - 0.5)
        outages = [max(trial["outage_ms"], 0.1) for trial in row["trials"]]
        spread = place + random.uniform(-0.05, 0.05, len(outages))
        colour = COLOURS[row["mood"]]
        axes.plot(outages, spread, "o", color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0)
        axes.plot([row["summary"]["p50"]] * 2, [place - 0.08, place + 0.08], color=colour, linewidth=2.2)
        for limit in row["limits"].values():
            height = 0.35 / len(moods)
            axes.plot(
                [limit] * 2, [place - height, place + height], color="#444444", linewidth=0.9, linestyle=":"
            )
    for mood, colour in COLOURS.items():
        if any(row["mood"] == mood for row in rows):
            axes.plot([], [], "o", color=colour, label=mood)
    axes.plot([], [], color="#444444", linewidth=0.9, linestyle=":", label="targets (p50, p99)")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("outage at the receiver: longest gap of the slowest QP less the nominal one (ms)")
    axes.set_title(f"Failover without and with qpd, BFD {result['bfd']}: every trial, median as a bar")
    axes.grid(axis="x", which="both", alpha=0.25)
    for place in range(1, len(names)):
        axes.axhline(place - 0.5, color="#cccccc", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(file)
    plt.close(figure)
