"""From an experiment file to a directory with raw data, summary and report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qpd.lab import labfolder
from qpd.lab.errors import LabError
from qpd.lab.experiment import machine, raw
from qpd.lab.experiment.model import Experiment
from qpd.lab.experiment.runner import Ended, Runner
from qpd.lab.experiment.summary import summarize
from qpd.lab.fabric import Fabric

META, SUMMARY = "run.json", "summary.json"


def run(
    experiment: Experiment,
    directory: Path,
    *,
    small: bool = False,
    fabric: Fabric | None = None,
    progress: Callable[[str], None] = lambda _: None,
    on_end: Callable[[Ended], None] = lambda _: None,
) -> dict[str, Any]:
    """Run an experiment and return its summary; the directory then has raw/, run.json, summary.json, report.html.

    Args:
        experiment: what `model.read` has read.
        directory: is made; what an earlier run left there is overwritten.
        small: whether it is the small form, for the report.
        fabric: one that is up, without qpd, and is left as it was; by default one is made and removed.
        progress: told of the fabric's steps.
        on_end: told of each trial's end.

    Raises:
        LabError: where the fabric does not come up or does not fit the experiment.
    """
    directory.mkdir(parents=True, exist_ok=True)
    begin, start = datetime.now(timezone.utc), time.monotonic()
    facts = machine.facts()

    def write_meta() -> None:
        meta = _meta(experiment, small, begin, time.monotonic() - start, facts)
        (directory / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    if fabric is not None:
        write_meta()
        Runner(experiment, fabric, directory, on_end=on_end).run()
    else:
        own = Fabric.load(topology_of(experiment, directory), f"qpx-{os.getpid()}")
        own.check_free()
        try:
            own.up(qpd=False, deadline=experiment.fabric.deadline, progress=progress)
            write_meta()

            def rebuild() -> None:
                progress("the fabric does not come back by itself: a new one")
                own.down()
                own.up(qpd=False, deadline=experiment.fabric.deadline, progress=progress)

            Runner(experiment, own, directory, on_end=on_end, rebuild=rebuild).run()
        finally:
            own.down()
    write_meta()
    return redraw(directory)


def topology_of(experiment: Experiment, directory: Path) -> Path:
    """The experiment's topology; where it is a description for `qplab generate`, the lab is made in the directory.

    Raises:
        LabError: where the description is wrong.
    """
    source = experiment.topology
    if source.is_dir() or ".clab." in source.name:
        return source
    return labfolder.make(source, directory / "fabric", force=True)[1]


def redraw(directory: Path) -> dict[str, Any]:
    """Make summary and report of a run's raw data anew, and return the summary."""
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(f"{directory / META}: {error}; give the directory of a run of `qplab run`") from error
    tables = raw.load(directory)
    summary = summarize(meta, tables)
    (directory / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    # matplotlib takes seconds to load, and every other command of qplab does without it.
    from qpd.lab.experiment import report  # noqa: PLC0415

    report.write(directory, summary, tables)
    return summary


def _meta(
    experiment: Experiment, small: bool, begin: datetime, seconds: float, facts: dict[str, str]
) -> dict[str, Any]:
    sweep = experiment.sweep
    return {
        "experiment": {
            "name": experiment.name,
            "title": experiment.title,
            "question": experiment.question,
            "small": small,
            "seed": experiment.seed,
            "repetitions": experiment.repetitions,
            "conditions": [condition.name for condition in experiment.conditions],
            "baseline": experiment.base,
            "figures": list(experiment.figures),
            "sweep_label": sweep.label if sweep else "",
            "sweep_values": [str(value) for value in sweep.values] if sweep else [""],
            "file": {key: value for key, value in experiment.raw.items() if key not in {"title", "question"}},
        },
        "begin": begin.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": facts,
    }
