"""What a run has found, as numbers for machines: summary.json, made from the raw data and nothing else. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpd.lab.experiment.measures import BY_NAME, MEASURES
from qpd.lab.experiment.raw import Row
from qpd.lab.experiment.statistics import Estimate, agree, estimate

VERSION = 1
"""Of the file's form; goes up when a program that reads it must change."""

COMPARED = (
    "communication_s",
    "iteration_s",
    "outage_s",
    "stall_s",
    "lost_time_s",
    "goodput_bps",
    "leaf_max_to_mean",
    "left_s",
)
"""Measures of which the summary says how much less a condition needs than the baseline."""


@dataclass(frozen=True)
class Group:
    """All repetitions of a condition at one value of the sweep."""

    condition: str
    sweep: str
    trials: tuple[int, ...]
    measures: Mapping[str, Estimate]


def groups(trials: Sequence[Row]) -> list[Group]:
    """The groups of the trials that went well, in the order of their first trial."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(trials, key=lambda row: int(row["trial"])):
        if row["status"] == "ok":
            rows.setdefault((row["sweep"], row["condition"]), []).append(row)
    return [
        Group(condition, sweep, tuple(int(row["trial"]) for row in own), _estimates(own))
        for (sweep, condition), own in rows.items()
    ]


def _estimates(rows: Sequence[Row]) -> dict[str, Estimate]:
    found = {}
    for measure in MEASURES:
        values = [float(row[measure.name]) for row in rows if row[measure.name] is not None]
        bounds = sum(measure.name in (row["at_least"] or "").split() for row in rows)
        made = estimate(values, bounds)
        if made is not None:
            found[measure.name] = made
    return found


def savings(trials: Sequence[Row], baseline: str) -> list[dict[str, Any]]:
    """How much less (as a part) each condition needs than the baseline, repetition by repetition.

    Both have the same seed in a repetition, so their difference is not that of two draws: the interval is narrower
    than that of the difference of the means. A repetition of which one is a lower bound is left out.
    """
    well = {
        (row["sweep"], row["condition"], row["repetition"]): row for row in trials if row["status"] == "ok"
    }
    found: dict[tuple[str, str, str], list[float]] = {}
    for (sweep, condition, repetition), row in well.items():
        base = well.get((sweep, baseline, repetition))
        if condition == baseline or base is None:
            continue
        for name in COMPARED:
            pair = (base[name], row[name])
            bounded = any(name in (one["at_least"] or "").split() for one in (base, row))
            if None not in pair and not bounded and float(base[name]) > 0:
                found.setdefault((sweep, condition, name), []).append(
                    1 - float(row[name]) / float(base[name])
                )
    return [
        {
            "sweep": sweep,
            "condition": condition,
            "baseline": baseline,
            "measure": name,
            "saving": made.to_json(),
        }
        for (sweep, condition, name), values in found.items()
        if (made := estimate(values)) is not None
    ]


def summarize(meta: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        meta: what the run is: experiment (its raw keys), machine, times.
        tables: the raw data.
    """
    trials = tables["trials"]
    failed = [
        {key: row[key] for key in ("trial", "condition", "sweep", "repetition", "error")}
        for row in trials
        if row["status"] != "ok"
    ]
    experiment = meta["experiment"]
    # In the order of the file, also where the first trial of a group has failed.
    made = sorted(
        groups(trials),
        key=lambda group: (
            experiment["sweep_values"].index(group.sweep),
            experiment["conditions"].index(group.condition),
        ),
    )
    used = {name for group in made for name in group.measures}
    return {
        "version": VERSION,
        **meta,
        "trials": {"done": len(trials), "failed": failed},
        "measures": {
            name: {
                "label": BY_NAME[name].label,
                "better": BY_NAME[name].better,
                "meaning": BY_NAME[name].meaning,
            }
            for name in BY_NAME
            if name in used
        },
        "groups": [
            {
                "condition": group.condition,
                "sweep": group.sweep,
                "trials": list(group.trials),
                "measures": {name: one.to_json() for name, one in group.measures.items()},
            }
            for group in made
        ],
        "savings": savings(trials, experiment["baseline"]),
    }


@dataclass(frozen=True)
class Difference:
    """A measure in two runs' summaries."""

    condition: str
    sweep: str
    measure: str
    one: Estimate
    other: Estimate
    agrees: bool | None


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """What two summaries say of the same things, and whether it agrees within the stated intervals."""
    theirs = {
        (group["condition"], group["sweep"], name): Estimate(**values)
        for group in other["groups"]
        for name, values in group["measures"].items()
    }
    return [
        Difference(group["condition"], group["sweep"], name, mine, theirs[key], agree(mine, theirs[key]))
        for group in one["groups"]
        for name, values in group["measures"].items()
        if (key := (group["condition"], group["sweep"], name)) in theirs
        for mine in [Estimate(**values)]
    ]
