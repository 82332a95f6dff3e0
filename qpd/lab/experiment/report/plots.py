"""The plots of a report, from the raw data. A plot for which there are no data is not made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from qpd.lab.experiment.measures import BY_NAME, Measure
from qpd.lab.experiment.raw import Row
from qpd.lab.experiment.report.figure import COLOURS, FAULT, Plot, colour, finish, panels
from qpd.lab.experiment.statistics import estimate

TIERS = {"leaf": "leaf uplinks", "spine": "inter-site links"}
EVENNESS = {f"{tier}_{what}" for tier in TIERS for what in ("max_to_mean", "jain")}
_BIN = 0.1
"""Seconds: the width of a row's bin in raw/paths.csv."""
_LOGARITHMIC = 50
"""Times so far apart stand on a logarithmic axis: the short ones would all be 0."""
_MOST_GROUPS = 3
_MOST_QPS = 64
"""Most rows of a path strip: with more nothing could be told apart."""


@dataclass(frozen=True)
class Data:
    """A run's summary and raw data."""

    summary: Mapping[str, Any]
    tables: Mapping[str, Sequence[Row]]

    @cached_property
    def trials(self) -> list[Row]:
        """The trials that went well."""
        return [row for row in self.tables["trials"] if row["status"] == "ok"]

    @cached_property
    def conditions(self) -> list[str]:
        """The conditions in the order of the file."""
        present = {row["condition"] for row in self.trials}
        return [name for name in self.summary["experiment"]["conditions"] if name in present]

    @cached_property
    def sweeps(self) -> list[str]:
        """The values of the sweep in the order of the file; [''] where nothing is swept."""
        present = {row["sweep"] for row in self.trials}
        return [value for value in self.summary["experiment"]["sweep_values"] if value in present]

    @property
    def figures(self) -> list[str]:
        """The names of the measures that the experiment is about."""
        return list(self.summary["experiment"]["figures"])

    @property
    def sweep_label(self) -> str:
        """What is swept."""
        return str(self.summary["experiment"]["sweep_label"])

    @cached_property
    def shown(self) -> list[Row]:
        """One trial of each condition, all with one seed, that stands for the others: where they have most to tell."""
        sweep = self.sweeps[len(self.sweeps) // 2] if self.sweeps else ""
        best: list[Row] = []
        for repetition in sorted({row["repetition"] for row in self.trials}):
            own = [row for row in self.trials if (row["repetition"], row["sweep"]) == (repetition, sweep)]
            if len(own) > len(best):
                best = own
        return sorted(best, key=lambda row: self.conditions.index(row["condition"]))

    @cached_property
    def groups(self) -> dict[tuple[str, str], list[str]]:
        """The links of each group (tier, name), in the order of the topology."""
        found: dict[tuple[str, str], dict[str, None]] = {}
        for row in self.tables["loads"]:
            found.setdefault((row["tier"], row["group"]), {})[row["link"]] = None
        return {group: list(links) for group, links in found.items()}

    def of(self, table: str, trial: Row) -> list[Row]:
        """A trial's rows of a table."""
        return self._by_trial[table].get(trial["trial"], [])

    @cached_property
    def _by_trial(self) -> dict[str, dict[int, list[Row]]]:
        found: dict[str, dict[int, list[Row]]] = {}
        for name, rows in self.tables.items():
            own = found.setdefault(name, {})
            for row in rows:
                own.setdefault(row["trial"], []).append(row)
        return found

    def values(self, measure: str, condition: str, sweep: str) -> list[float]:
        """A measure's values, one a repetition."""
        return [
            float(row[measure])
            for row in self.trials
            if (row["condition"], row["sweep"]) == (condition, sweep) and row[measure] is not None
        ]

    def has(self, measure: str) -> bool:
        """Whether any trial gave the measure."""
        return any(row[measure] is not None for row in self.trials)

    def span(self, trial: Row) -> tuple[float, float]:
        """When traffic ran in a trial, with a moment before and after it."""
        rows = [row for row in self.of("loads", trial) if row["tier"] == "leaf"]
        busy = max((float(row["tx_bytes"]) for row in rows), default=0.0) * 0.02
        times = [float(row["time_s"]) for row in rows if float(row["tx_bytes"]) > busy]
        return (max(0.0, min(times) - 0.3), max(times) + 0.2) if times else (0.0, 1.0)

    def happened(self, measure: str) -> bool:
        """Whether the measure is anything but 0 in any trial: a plot of zeros is none."""
        return any(row[measure] for row in self.trials)

    def which(self) -> str:
        """Which trials are shown, in words."""
        if not self.shown:
            return ""
        first = self.shown[0]
        swept = f", {self.sweep_label}: {first['sweep']}" if first["sweep"] else ""
        return f"Repetition {first['repetition'] + 1}{swept}; all conditions have the same seed."


def all_plots(data: Data) -> Iterator[Plot]:
    """Every plot for which there are data."""
    if not data.trials:
        return
    makers = (outcomes, iteration_times, timeline, evenness, loads, strips)
    for maker in makers:
        plot = maker(data)
        if plot is not None:
            yield plot


# -- measures -------------------------------------------------------------------------------------------------------


def outcomes(data: Data) -> Plot | None:
    """What the experiment is about, apart from evenness: each repetition a dot, means with intervals."""
    present = [BY_NAME[name] for name in data.figures if name not in EVENNESS and data.happened(name)]
    return _dots(data, present, "Results") if present else None


def evenness(data: Data) -> Plot | None:
    """How even the loads of links are."""
    present = [BY_NAME[name] for name in data.figures if name in EVENNESS and data.has(name)]
    return _dots(data, present, "Evenness of link loads") if present else None


def _dots(data: Data, measures: Sequence[Measure], title: str) -> Plot:
    columns = min(2, len(measures))
    rows = -(-len(measures) // columns)
    figure, axes = panels(rows, columns, 3.0)
    cells = [cell for row in axes for cell in row]
    for cell, measure in zip(cells, measures, strict=False):
        _dot_panel(cell, data, measure)
    for cell in cells[len(measures) :]:
        cell.set_axis_off()
    if data.sweeps != [""]:
        handles = [Patch(color=colour(data.conditions, name), label=name) for name in data.conditions]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    caption = (
        "Each repetition is a dot; the bar is the mean with its 95 % confidence interval (Student's t)."
        " Hollow dots are lower bounds: what was measured lasted until the fault was undone."
    )
    return finish(figure, title, caption)


def _dot_panel(axes: Axes, data: Data, measure: Measure) -> None:
    swept = data.sweeps != [""]
    count = len(data.conditions)
    for index, condition in enumerate(data.conditions):
        tint = colour(data.conditions, condition)
        for at, sweep in enumerate(data.sweeps):
            rows = [
                row
                for row in data.trials
                if (row["condition"], row["sweep"]) == (condition, sweep) and row[measure.name] is not None
            ]
            if not rows:
                continue
            middle = at + (index - (count - 1) / 2) * 0.8 / count if swept else float(index)
            values = np.array([float(row[measure.name]) for row in rows]) * measure.scale
            spread = (np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(1)) * (
                0.25 / count if swept else 0.2
            )
            bounds = np.array([measure.name in (row["at_least"] or "").split() for row in rows])
            axes.scatter(
                middle + spread,
                values,
                s=14,
                alpha=0.6,
                facecolors=np.where(bounds, "none", tint),
                edgecolors=tint,
                linewidths=0.8,
            )
            _bar(axes, middle, values, 0.35 / count if swept else 0.3)
    if swept:
        axes.set_xticks(range(len(data.sweeps)), data.sweeps)
        axes.set_xlabel(data.sweep_label)
    else:
        axes.set_xticks(range(count), [name.replace(", ", ",\n") for name in data.conditions])
        if count > 3:
            axes.tick_params(axis="x", labelrotation=20)
        axes.set_xlim(-0.6, count - 0.4)
    axes.set_ylabel(measure.axis)
    _limit(axes, measure, data)


def _limit(axes: Axes, measure: Measure, data: Data) -> None:
    """Limits within which values are possible: an interval may reach beyond them."""
    values = [
        float(row[measure.name]) * measure.scale for row in data.trials if row[measure.name] is not None
    ]
    _, high = axes.get_ylim()
    top = min(max(high, 1.08 * max(values)), 1.5 * max(values))
    if measure.unit in {"ms", "s"} and min(values) > 0 and max(values) > _LOGARITHMIC * min(values):
        axes.set_yscale("log")
        axes.set_ylim(0.7 * min(values), 1.5 * max(values))
        return
    if measure.name.endswith("_max_to_mean"):
        axes.set_ylim(0.95, max(1.1, top))
    elif measure.name.endswith("_jain"):
        axes.set_ylim(min(0.9, 0.95 * min(values)), 1.02)
    else:
        axes.set_ylim(0, top or 1.0)


def _bar(axes: Axes, middle: float, values: Any, half: float) -> None:  # noqa: ANN401 - an array
    found = estimate(values.tolist())
    if found is None:
        return
    axes.plot([middle - half, middle + half], [found.mean, found.mean], color="#222222", linewidth=1.6)
    if found.low is not None and found.high is not None:
        axes.plot([middle, middle], [found.low, found.high], color="#222222", linewidth=1.0)


# -- iterations -----------------------------------------------------------------------------------------------------


def iteration_times(data: Data) -> Plot | None:
    """How long iterations communicate: all of them, as a distribution, with the mean and its interval."""
    chosen = [(sweep, _communication(data, sweep)) for sweep in data.sweeps]
    chosen = [(sweep, times) for sweep, times in chosen if times]
    if not chosen:
        return None
    columns = min(2, len(chosen))
    figure, axes = panels(-(-len(chosen) // columns), columns, 3.0)
    cells = [cell for row in axes for cell in row]
    for cell, (sweep, times) in zip(cells, chosen, strict=False):
        for index, (condition, by_trial) in enumerate(times.items()):
            tint = colour(data.conditions, condition)
            every = np.sort(np.concatenate([np.array(values) for values in by_trial]))
            share = np.arange(1, len(every) + 1) / len(every)
            cell.step(
                np.concatenate([every[:1], every]), np.concatenate([[0.0], share]), color=tint, where="post"
            )
            mean = estimate([float(np.mean(values)) for values in by_trial])
            if mean is None:
                continue
            height = -0.06 - 0.07 * index
            cell.plot(mean.mean, height, "o", color=tint, markersize=4)
            if mean.low is not None and mean.high is not None:
                cell.plot([mean.low, mean.high], [height, height], color=tint, linewidth=2)
        cell.set_ylim(-0.06 - 0.07 * len(times), 1.02)
        cell.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        cell.set_xlabel("communication of an iteration (s)")
        cell.set_ylabel("part of iterations")
        if sweep:
            cell.set_title(f"{data.sweep_label}: {sweep}")
    for cell in cells[len(chosen) :]:
        cell.set_axis_off()
    handles = [Patch(color=colour(data.conditions, name), label=name) for name in data.conditions]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    caption = (
        "Distribution over all iterations of all repetitions. Below it, the mean with its 95 % confidence interval; "
        "a repetition counts as one measurement, since its iterations share their paths."
    )
    return finish(figure, "Times of iterations", caption)


def _communication(data: Data, sweep: str) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for row in data.trials:
        values = [float(one["communication_s"]) for one in data.of("iterations", row)]
        if row["sweep"] == sweep and values:
            found.setdefault(row["condition"], []).append(values)
    return {name: found[name] for name in data.conditions if name in found}


# -- faults ---------------------------------------------------------------------------------------------------------


def timeline(data: Data) -> Plot | None:
    """The faults of a trial, and on the same axis what they did."""
    shown = [row for row in data.shown if data.of("faults", row)]
    if not shown:
        return None
    figure, axes = panels(len(shown), 1, 1.1)
    for (axes_row,), trial in zip(axes, shown, strict=True):
        _timeline_panel(axes_row, data, trial)
    axes[-1][0].set_xlabel("time (s)")
    handles = [
        Patch(color=FAULT, alpha=0.25, label="fault"),
        Patch(color=COLOURS[0], label="longest silence of a hurt queue pair"),
        Patch(color="#555555", label="of an unhurt one"),
    ]
    if any(data.of("iterations", row) for row in shown):
        handles += [
            Patch(color=COLOURS[2], label="iteration"),
            Patch(color=COLOURS[1], label="iteration that a fault touched"),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    caption = (
        "Silence: for packets at a constant rate, the longest gap at the receiver; for queue pairs that wait for "
        f"answers, the longest time without progress. {data.which()}"
    )
    return finish(figure, "Faults, outage and stall", caption)


def _timeline_panel(axes: Axes, data: Data, trial: Row) -> None:
    faults, qps, iterations = (data.of(name, trial) for name in ("faults", "qps", "iterations"))
    first, last = data.span(trial)
    for fault in faults:
        end = last if fault["end_s"] is None else float(fault["end_s"])
        axes.axvspan(float(fault["begin_s"]), end, color=FAULT, alpha=0.18, linewidth=0)
        axes.text(float(fault["begin_s"]), 1.02, fault["fault"], color=FAULT, fontsize=8, va="bottom")
    rows = []
    for hurt, tint, label in ((1, COLOURS[0], "hurt QPs"), (0, "#555555", "unhurt QPs")):
        own = [
            row for row in qps if row["hurt"] == hurt and row["silence_s"] and row["silence_at_s"] is not None
        ]
        if own:
            worst = max(own, key=lambda row: float(row["silence_s"]))
            rows.append((label, [(float(worst["silence_at_s"]), float(worst["silence_s"]), tint)]))
    if iterations:
        bars = []
        for row in iterations:
            begin, end = float(row["begin_s"]), float(row["end_s"])
            touched = any(
                begin < (last if f["end_s"] is None else float(f["end_s"])) and float(f["begin_s"]) < end
                for f in faults
            )
            bars.append((begin, end - begin, COLOURS[1] if touched else COLOURS[2]))
        rows.append(("iterations", bars))
    height = 1.0 / max(1, len(rows))
    for index, (_, bars) in enumerate(rows):
        low = 1.0 - (index + 1) * height
        for begin, length, tint in bars:
            gap = min(0.004 * last, length / 4)
            axes.broken_barh([(begin, length - gap)], (low + 0.15 * height, 0.7 * height), color=tint)
            if len(bars) == 1:
                text = f" {length * 1e3:,.0f} ms"
                axes.text(begin + length, low + 0.5 * height, text, fontsize=8, va="center")
    axes.set_ylim(0, 1)
    axes.set_xlim(first, last)
    axes.set_yticks(
        [1.0 - (index + 0.5) * height for index in range(len(rows))], [label for label, _ in rows], fontsize=8
    )
    axes.set_title(trial["condition"], loc="right")
    axes.grid(visible=False, axis="y")


# -- links ----------------------------------------------------------------------------------------------------------


def loads(data: Data) -> Plot | None:
    """Load of the compared links over time: a row a condition, a column a group of links."""
    groups = list(data.groups)
    shown = [row for row in data.shown if data.of("loads", row)]
    if not shown or not groups:
        return None
    leaves, sites = ([group for group in groups if group[0] == tier] for tier in TIERS)
    chosen = [*leaves[: _MOST_GROUPS - min(1, len(sites))], *sites[:1]]
    figure, axes = panels(len(shown), len(chosen), 1.65)
    top = dict.fromkeys(chosen, 0.0)
    for cells, trial in zip(axes, shown, strict=True):
        for cell, group in zip(cells, chosen, strict=True):
            rows = [row for row in data.of("loads", trial) if (row["tier"], row["group"]) == group]
            top[group] = max(top[group], _load_panel(cell, rows))
            # The condition above, the links below it: beside each other they are wider than a panel.
            condition = trial["condition"] if cell is cells[0] else ""
            cell.set_title(f"{condition}\n{TIERS[group[0]]} of {group[1]}", loc="left", fontsize=9)
            cell.set_xlim(*data.span(trial))
    for cells in axes:
        for cell, group in zip(cells, chosen, strict=True):
            cell.set_ylim(0, top[group] * 1.08 or 1.0)
        cells[0].set_ylabel("Mbit/s")
    for cell in axes[-1]:
        cell.set_xlabel("time (s)")
    left_out = (
        f" {len(groups) - len(chosen)} more groups are in raw/loads.csv." if len(groups) > len(chosen) else ""
    )
    caption = f"What each link sent, from the kernel's interface counters ten times a second.{left_out} {data.which()}"
    return finish(figure, "Load of links over time", caption)


def _load_panel(axes: Axes, rows: Sequence[Row]) -> float:
    links = list(dict.fromkeys(row["link"] for row in rows))
    top = 0.0
    for index, link in enumerate(links):
        times, rates = _rates([row for row in rows if row["link"] == link])
        label = link.partition(":")[2] if len({one.partition(":")[0] for one in links}) == 1 else link
        # Ever thinner: of links that carry the same, all are seen.
        axes.plot(
            times, rates, color=colour(links, link), linewidth=max(0.8, 2.2 - 0.45 * index), label=label
        )
        top = max(top, max(rates, default=0.0))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)
    return top


def _rates(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Times and Mbit/s of a link. Readings that a busy machine took close together are one: alone they make spikes."""
    times, rates = [], []
    begin, octets = 0.0, 0.0
    for row in rows:
        octets += float(row["tx_bytes"])
        length = float(row["time_s"]) - begin
        if length >= 0.8 * _BIN:
            times.append(float(row["time_s"]))
            rates.append(octets * 8e-6 / length)
            begin, octets = float(row["time_s"]), 0.0
    return times, rates


def strips(data: Data) -> Plot | None:
    """Which queue pair takes which uplink, over time."""
    places = {
        link: (leaf, index)
        for leaf, ((tier, _), links) in enumerate(data.groups.items())
        if tier == "leaf"
        for index, link in enumerate(links)
    }
    shown = [row for row in data.shown if any(one["link"] in places for one in data.of("paths", row))]
    if not shown:
        return None
    columns = min(2, len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, 2.4)
    cells = [cell for row in axes for cell in row]
    for cell, trial in zip(cells, shown, strict=False):
        data_qps = {(row["destination"], row["qp"]) for row in data.of("qps", trial)}
        seen = [row for row in data.of("paths", trial) if (row["destination"], row["qp"]) in data_qps]
        _strip_panel(cell, [row for row in seen if row["link"] in places], places)
        for fault in data.of("faults", trial):
            for time in (fault["begin_s"], fault["end_s"]):
                if time is not None:
                    cell.axvline(float(time), color=FAULT, linewidth=1.0, linestyle="--")
        cell.set_title(trial["condition"], loc="left")
        cell.set_xlim(*data.span(trial))
    for cell in cells[len(shown) :]:
        cell.set_axis_off()
    names: dict[int, dict[str, None]] = {}
    for link, (_, index) in places.items():
        names.setdefault(index, {})[link.partition(":")[2]] = None
    handles = [
        Patch(color=COLOURS[index % len(COLOURS)], label=" / ".join(names[index])) for index in sorted(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)))
    caption = (
        "Each row is a queue pair that sends data, its colour the uplink of its leaf on which its packets were seen: "
        "one packet of sixteen, taken from the wire at the uplink's far end; pale until it is seen again. "
        f"{data.which()}"
    )
    return finish(figure, "Path of each queue pair", caption)


def _strip_panel(axes: Axes, rows: Sequence[Row], places: Mapping[str, tuple[int, int]]) -> None:
    sightings: dict[tuple[str, int], list[tuple[float, tuple[int, int]]]] = {}
    for row in sorted(rows, key=lambda row: float(row["time_s"])):
        seen = sightings.setdefault((row["destination"], row["qp"]), [])
        seen.append((float(row["time_s"]), places[row["link"]]))
    every = sorted(sightings, key=lambda key: (sightings[key][0][1], key))
    # Of many, some at even distances: the first ones would all be of one link.
    keys = every[:: -(-len(every) // _MOST_QPS)]
    bars: dict[tuple[int, float], list[tuple[float, float, int]]] = {}
    for height, key in enumerate(keys):
        seen = sightings[key]
        for (time, (_, index)), (until, _) in pairwise([*seen, (seen[-1][0], seen[-1][1])]):
            bars.setdefault((index, 1.0), []).append((time, _BIN, height))
            if until > time + 1.5 * _BIN:
                bars.setdefault((index, 0.3), []).append((time + _BIN, until - time - _BIN, height))
    for (index, alpha), own in bars.items():
        begins, widths, heights = zip(*own, strict=True)
        tint = COLOURS[index % len(COLOURS)]
        axes.barh(heights, widths, left=begins, height=0.8, color=tint, alpha=alpha, linewidth=0)
    axes.set_ylim(-0.6, len(keys) - 0.4)
    axes.set_yticks([])
    axes.set_ylabel(f"{len(keys)} of {len(every)} QPs" if len(every) > len(keys) else f"{len(keys)} QPs")
    axes.set_xlabel("time (s)")
    axes.grid(visible=False)
