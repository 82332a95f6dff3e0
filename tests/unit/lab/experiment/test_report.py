"""Raw data, summary and report of a run that is made up: what goes in comes out, and no plot is empty."""

from __future__ import annotations

import base64
import csv
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qpd.lab.errors import LabError
from qpd.lab.experiment import raw
from qpd.lab.experiment.measures import BY_NAME
from qpd.lab.experiment.repeat import Common, common
from qpd.lab.experiment.report.page import page
from qpd.lab.experiment.report.plots import Data, all_plots
from qpd.lab.experiment.run import META, SUMMARY, redraw
from qpd.lab.experiment.summary import compare, summarize

CONDITIONS = ["ecmp-ports", "balanced"]


def meta(**changes: Any) -> dict[str, Any]:
    experiment = {
        "name": "made-up",
        "title": "A <made-up> run",
        "question": "Is 1 < 2 & 2 > 1?",
        "small": False,
        "seed": 1,
        "repetitions": 3,
        "conditions": CONDITIONS,
        "baseline": "ecmp-ports",
        "figures": [
            "outage_s",
            "stall_s",
            "communication_s",
            "leaf_max_to_mean",
            "leaf_jain",
            "wrong_values",
        ],
        "sweep_label": "",
        "sweep_values": [""],
        "file": {"workload": {"kind": "allreduce"}},
    } | changes
    return {
        "experiment": experiment,
        "begin": "2026-01-01T00:00:00+00:00",
        "seconds": 60.0,
        "machine": {"kernel": "k"},
    }


def trial(condition: str, repetition: int, sweep: str = "", *, bound: bool = False) -> raw.Trial:
    made = raw.Trial()
    slow = 2.0 if condition == "ecmp-ports" else 1.0
    made.add(
        "trials",
        condition=condition,
        sweep=sweep,
        repetition=repetition,
        seed=7,
        status="ok",
        error="",
        seconds=9.0,
        at_least="outage_s" if bound else "",
        outage_s=0.1 * slow + 0.001 * repetition,
        stall_s=0.2 * slow,
        communication_s=slow + 0.01 * repetition,
        leaf_max_to_mean=1.5 if slow > 1 else 1.0,
        leaf_jain=0.9 if slow > 1 else 1.0,
        wrong_values=0,
    )
    for step in range(20):
        for number, link in enumerate(("leaf1:eth1", "leaf1:eth2")):
            made.add(
                "loads",
                time_s=0.1 * (step + 1),
                tier="leaf",
                group="leaf1",
                link=link,
                tx_bytes=1000.0 * (number + 1),
                tx_packets=1,
            )
            made.add("paths", time_s=0.1 * step, destination="10.0.0.1", qp=9 + number, link=link, samples=2)
    made.add(
        "faults", fault="loss leaf1--spine1 100", links="leaf1:eth1", planned_s=0.5, begin_s=0.5, end_s=1.5
    )
    for number, hurt in enumerate((1, 0)):
        made.add(
            "qps",
            source="host1",
            destination="10.0.0.1",
            qp=9 + number,
            source_port=49152,
            sent_packets=10,
            silence_s=0.1,
            silence_at_s=0.6,
            hurt=hurt,
        )
    for number in range(4):
        made.add(
            "iterations",
            number=number,
            begin_s=0.5 * number,
            end_s=0.5 * number + 0.45,
            seconds=0.45,
            communication_s=0.4 * slow,
            straggler="host1",
            lag_s=0.0,
            wrong_values=0,
        )
    return made


def failed() -> raw.Trial:
    made = raw.Trial()
    made.add(
        "trials",
        condition="balanced",
        sweep="",
        repetition=3,
        seed=7,
        status="failed",
        error="qpd <ended>",
        seconds=1.0,
        at_least="",
    )
    return made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    writer = raw.Writer(tmp_path)
    trials = [trial(condition, repetition) for repetition in range(3) for condition in CONDITIONS]
    for number, one in enumerate([*trials, failed()]):
        writer.add(number, one)
    (tmp_path / META).write_text(json.dumps(meta()))
    return tmp_path


def tables(*trials: raw.Trial, directory: Path) -> dict[str, list[raw.Row]]:
    writer = raw.Writer(directory)
    for number, one in enumerate(trials):
        writer.add(number, one)
    return raw.load(directory)


def test_raw_data_are_read_back_as_they_were(directory: Path) -> None:
    found = raw.load(directory)
    assert [row["trial"] for row in found["trials"]] == list(range(7))
    first = found["trials"][0]
    assert (first["condition"], first["outage_s"], first["sweep"]) == ("ecmp-ports", 0.2, "")
    assert first["spine_jain"] is None, "not measured is not zero"
    assert found["loads"][1]["tx_bytes"] == 2000
    with pytest.raises(LabError, match=r"trials\.csv: No such file.*give the directory of a run"):
        raw.load(directory / "raw")


def test_a_run_of_an_older_release_lacks_what_is_measured_since(directory: Path) -> None:
    file = directory / "raw" / "trials.csv"
    rows = list(csv.reader(file.read_text().splitlines()))
    at = rows[0].index("lost_time_s")
    with file.open("w", newline="") as old:
        csv.writer(old).writerows([*row[:at], *row[at + 1 :]] for row in rows)
    assert raw.load(directory)["trials"][0]["lost_time_s"] is None
    assert redraw(directory)["trials"]["done"] == 7


def test_the_summary_has_intervals_and_savings_and_names_what_failed(directory: Path) -> None:
    summary = summarize(meta(), raw.load(directory))
    (base, other) = summary["groups"]
    assert base["measures"]["outage_s"]["mean"] == pytest.approx(0.201)
    assert base["measures"]["outage_s"]["low"] < 0.2 < base["measures"]["outage_s"]["high"]
    assert other["trials"] == [1, 3, 5]
    saved = {one["measure"]: one["saving"]["mean"] for one in summary["savings"]}
    assert saved["communication_s"] == pytest.approx((1 / 2.00 + 1 / 2.01 + 1 / 2.02) / 3)
    assert summary["trials"]["failed"] == [
        {"trial": 6, "condition": "balanced", "sweep": "", "repetition": 3, "error": "qpd <ended>"}
    ]


def test_lower_bounds_are_counted_and_not_compared(tmp_path: Path) -> None:
    rows = tables(trial("ecmp-ports", 0, bound=True), trial("balanced", 0), directory=tmp_path)
    summary = summarize(meta(), rows)
    assert summary["groups"][0]["measures"]["outage_s"]["at_least"] == 1
    assert "outage_s" not in {one["measure"] for one in summary["savings"]}
    assert "≥ 200.0" in page(summary, rows)


def test_two_runs_are_compared_by_their_intervals(directory: Path) -> None:
    summary = summarize(meta(), raw.load(directory))
    assert {one.agrees for one in compare(summary, summary)} == {True}
    changed = json.loads(json.dumps(summary))
    for name in ("mean", "low", "high"):
        changed["groups"][0]["measures"]["communication_s"][name] *= 2
    wrong = [(one.condition, one.measure) for one in compare(summary, changed) if one.agrees is False]
    assert wrong == [("ecmp-ports", "communication_s")]


def test_two_runs_of_one_seed_are_compared_trial_by_trial(directory: Path) -> None:
    one, other = raw.load(directory), raw.load(directory)
    found = common(one, other)
    assert found == {name: Common(3, 3, 3, 6, 6) for name in CONDITIONS}, (
        "two queue pairs in each of three trials"
    )
    other["faults"][0]["planned_s"] = 0.6
    other["qps"][0]["source_port"] = 1
    for row in other["paths"]:
        if row["trial"] == 0 and row["qp"] == 9:
            row["link"] = "leaf1:eth2"
    assert common(one, other)["ecmp-ports"] == Common(3, 2, 2, 5, 6)
    assert common(one, other)["balanced"] == found["balanced"]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.text: list[str] = []
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            kind, _, data = (values["src"] or "").partition(",")
            assert kind == "data:image/svg+xml;base64"
            assert values["alt"]
            self.images.append(base64.b64decode(data))
        self.elsewhere += [values[key] or "" for key in ("href", "src") if key in values and tag != "img"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_needs_nothing_else_and_has_every_plot(directory: Path) -> None:
    summary = redraw(directory)
    assert summary == json.loads((directory / SUMMARY).read_text())
    read = Page()
    read.feed((directory / "report.html").read_text())
    assert read.elsewhere == []
    text = " ".join(read.text)
    for title in (
        "Results",
        "Times of iterations",
        "Faults, outage and stall",
        "Evenness",
        "Load of links",
        "Path of",
    ):
        assert title in text
    assert len(read.images) == 6
    assert "A <made-up> run" in text, "escaped where it is markup"
    assert "qpd <ended>" in text
    assert "0 in every trial." in text, "what did not happen is said once"
    for image in read.images:
        ET.fromstring(image)


def test_every_axis_has_a_label_and_something_to_show(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qpd.lab.experiment.report import figure, plots

    figures = []

    def keep(made: Any, title: str, caption: str) -> Any:
        figures.append((title, made))
        return figure.Plot(title, caption, b"")

    monkeypatch.setattr(plots, "finish", keep)
    rows = raw.load(directory)
    list(all_plots(Data(summarize(meta(), rows), rows)))
    assert len(figures) == 6
    for title, made in figures:
        for axes in made.axes:
            if not axes.axison:
                continue
            assert axes.has_data() or axes.patches or axes.collections, title
            labelled = axes.get_xlabel() or [tick.get_text() for tick in axes.get_xticklabels()]
            assert labelled, title
            assert axes.get_ylabel() or title == "Faults, outage and stall" or "links" in title, title
    units = re.compile(r"\((ms|s|Mbit/s|MB)\)$")
    results = next(made for title, made in figures if title == "Results")
    assert all(units.search(axes.get_ylabel()) for axes in results.axes if axes.axison)


def test_a_plot_without_data_is_not_made(tmp_path: Path) -> None:
    bare = trial("balanced", 0)
    for name in ("faults", "iterations", "paths"):
        bare.rows[name].clear()
    rows = tables(bare, directory=tmp_path)
    summary = summarize(meta(conditions=["balanced"], figures=["leaf_jain"], baseline="balanced"), rows)
    assert [plot.title for plot in all_plots(Data(summary, rows))] == [
        "Evenness of link loads",
        "Load of links over time",
    ]
    nothing = tables(failed(), directory=tmp_path / "nothing")
    assert "No trial went well" in page(summarize(meta(), nothing), nothing)


def test_a_sweep_is_an_axis(tmp_path: Path) -> None:
    made = [trial(c, r, sweep) for r in range(2) for sweep in ("4", "8") for c in CONDITIONS]
    rows = tables(*made, directory=tmp_path)
    summary = summarize(meta(sweep_label="queue pairs", sweep_values=["4", "8"]), rows)
    assert [(one["sweep"], one["condition"]) for one in summary["groups"]] == [
        (sweep, condition) for sweep in ("4", "8") for condition in CONDITIONS
    ]
    data = Data(summary, rows)
    assert data.sweeps == ["4", "8"]
    assert {row["sweep"] for row in data.shown} == {"8"}, "one trial of each condition, of one value"
    assert list(all_plots(data))


def test_measures_are_shown_in_their_units() -> None:
    assert BY_NAME["outage_s"].show(0.0305) == "30.5"
    assert BY_NAME["outage_s"].axis == "outage (ms)"
    assert BY_NAME["leaf_jain"].show(None) == "-"
