"""`qplab run`, `qplab report` and `qplab compare`."""

from __future__ import annotations

import json
import signal
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qpd.lab.errors import LabError
from qpd.lab.experiment import model, raw
from qpd.lab.experiment.measures import BY_NAME
from qpd.lab.experiment.repeat import Common, common
from qpd.lab.experiment.run import SUMMARY, redraw
from qpd.lab.experiment.run import run as run_experiment
from qpd.lab.experiment.runner import Ended, plans
from qpd.lab.experiment.summary import compare as compare_summaries
from qpd.lab.fabric import Fabric
from qpd.yamlfile import SettingsError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_TOLD = (
    "communication_s",
    "outage_s",
    "stall_s",
    "left_s",
    "leaf_max_to_mean",
    "spine_max_to_mean",
    "goodput_bps",
)


def run(  # noqa: PLR0917 - one parameter an option
    file: Annotated[
        Path, typer.Argument(help="An experiment file, such as configs/experiments/distribution.yaml.")
    ],
    directory: Annotated[
        Path | None, typer.Option("--out", help="Where results go; by default results/NAME-DATE-TIME.")
    ] = None,
    small: Annotated[bool, typer.Option(help="The small form that the file describes: seconds.")] = False,
    seed: Annotated[int | None, typer.Option(help="Another seed than the file's.", min=0)] = None,
    repetitions: Annotated[int | None, typer.Option(help="Another number than the file's.", min=1)] = None,
    lab: Annotated[
        str | None, typer.Option(help="A lab that is up, without qpd; by default one is made and removed.")
    ] = None,
) -> None:
    """Run an experiment: raw data, summary.json and report.html; exit status 1 where a trial failed."""
    try:
        experiment = model.read(file, small=small, seed=seed, repetitions=repetitions)
    except SettingsError as error:
        for problem in error.problems:
            err.print(f"[red]qplab:[/red] {problem}", soft_wrap=True)
        raise typer.Exit(2) from None
    now = datetime.now(timezone.utc).astimezone()
    target = directory or Path("results") / f"{experiment.name}-{now:%Y%m%d-%H%M%S}"
    fabric = Fabric.attach(lab) if lab is not None else None
    before = signal.signal(signal.SIGTERM, _interrupt)
    # A shell's background jobs ignore Ctrl-C, and SIGTERM would be ignored with it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task(experiment.name, total=len(plans(experiment)))

            def on_end(ended: Ended) -> None:
                bar.print(_line(ended), soft_wrap=True)
                bar.advance(task)

            summary = run_experiment(
                experiment,
                target,
                small=small,
                fabric=fabric,
                progress=lambda line: bar.print(f"[dim]{line}[/dim]", soft_wrap=True),
                on_end=on_end,
            )
    except KeyboardInterrupt:
        err.print(
            f"[red]qplab:[/red] interrupted; raw data of the trials that ended are in {target}",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    _tell(summary, target)
    if summary["trials"]["failed"]:
        raise typer.Exit(1)


def _interrupt(*_: object) -> None:
    # As Ctrl-C: asyncio then cancels what is under way, instead of being torn out of the middle of it.
    signal.raise_signal(signal.SIGINT)


def _line(ended: Ended) -> str:
    if ended.error:
        return f"[red]failed[/red]  {ended.plan}: {ended.error}"
    told = ", ".join(
        f"{BY_NAME[name].label} {BY_NAME[name].show(ended.measures[name])} {BY_NAME[name].unit}".rstrip()
        for name in _TOLD
        if name in ended.measures
    )
    return f"{ended.plan}: {told} [dim]({ended.seconds:.0f} s)[/dim]"


def _tell(summary: dict[str, Any], target: Path) -> None:
    used = [name for name in _TOLD if name in summary["measures"]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in (summary["experiment"]["sweep_label"], "condition", "n"):
        table.add_column(head)
    for name in used:
        table.add_column(BY_NAME[name].axis, justify="right", max_width=18)
    for group in summary["groups"]:
        cells = []
        for name in used:
            found = group["measures"].get(name)
            measure = BY_NAME[name]
            cells.append(
                "-" if found is None else f"{'≥ ' if found['at_least'] else ''}{measure.show(found['mean'])}"
            )
        table.add_row(group["sweep"], group["condition"], str(len(group["trials"])), *cells)
    out.print(table)
    out.print(f"{target / 'report.html'}", soft_wrap=True)


def report(directory: Annotated[Path, typer.Argument(help="The directory of a run.")]) -> None:
    """Make summary.json and report.html of a run's raw data anew."""
    redraw(directory)
    out.print(f"{directory / 'report.html'}", soft_wrap=True)


def compare(
    one: Annotated[Path, typer.Argument(help="The directory of a run.")],
    other: Annotated[Path, typer.Argument(help="Another run of the same experiment.")],
) -> None:
    """Say where two runs of an experiment agree within their intervals; exit status 1 where they do not."""
    first, second = _summary(one), _summary(other)
    if first["experiment"]["name"] != second["experiment"]["name"]:
        names = f"{first['experiment']['name']} and {second['experiment']['name']}"
        raise LabError(f"{names} are two experiments; give two runs of one")
    differences = compare_summaries(first, second)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in (first["experiment"]["sweep_label"], "condition", "measure", str(one), str(other), "agree"):
        table.add_column(head)
    words = {True: "yes", False: "[red]no[/red]", None: "one repetition: no interval"}
    for found in differences:
        measure = BY_NAME[found.measure]
        shown = (measure.show(found.one.mean), measure.show(found.other.mean))
        table.add_row(found.sweep, found.condition, measure.axis, *shown, words[found.agrees])
    out.print(table)
    if first["experiment"]["seed"] == second["experiment"]["seed"]:
        _tell_common(common(raw.load(one), raw.load(other)))
    if any(found.agrees is False for found in differences):
        raise typer.Exit(1)


def _tell_common(by_condition: dict[str, Common]) -> None:
    out.print("\nBoth have the same seed:")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in (
        "condition",
        "trials",
        "same queue pairs and ports",
        "same times of faults",
        "queue pairs on the same uplink",
    ):
        table.add_column(head)
    for condition, found in by_condition.items():
        paths = f"{found.same_path} of {found.seen}"
        table.add_row(condition, str(found.trials), str(found.queue_pairs), str(found.fault_times), paths)
    out.print(table)


def _summary(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise LabError(
            f"{directory / SUMMARY}: {error}; give the directory of a run of `qplab run`"
        ) from error
