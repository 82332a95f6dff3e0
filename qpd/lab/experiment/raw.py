"""The raw data of a run: one CSV file a table, written as trials end; everything else is made from these files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpd.lab.errors import LabError
from qpd.lab.experiment.measures import MEASURES

DIRECTORY = "raw"

TABLES: Mapping[str, tuple[str, ...]] = {
    "trials": (
        "trial",
        "condition",
        "sweep",
        "repetition",
        "seed",
        "status",
        "error",
        "seconds",
        "at_least",
        *(measure.name for measure in MEASURES),
    ),
    "loads": ("trial", "time_s", "tier", "group", "link", "tx_bytes", "tx_packets"),
    "qps": (
        "trial",
        "source",
        "destination",
        "qp",
        "source_port",
        "sent_packets",
        "received_packets",
        "lost_packets",
        "retransmitted_packets",
        "timeouts",
        "naks",
        "silence_s",
        "silence_at_s",
        "hurt",
        "error",
    ),
    "paths": ("trial", "time_s", "destination", "qp", "link", "samples"),
    "faults": ("trial", "fault", "links", "planned_s", "begin_s", "end_s"),
    "iterations": (
        "trial",
        "number",
        "begin_s",
        "end_s",
        "seconds",
        "communication_s",
        "straggler",
        "lag_s",
        "wrong_values",
    ),
}
"""Columns by table; docs/experiments.md says what they mean. Times count from the begin of the trial's observation."""

_TEXT = {
    "condition",
    "sweep",
    "status",
    "error",
    "tier",
    "group",
    "link",
    "links",
    "source",
    "destination",
    "fault",
    "straggler",
    "at_least",
}

Row = dict[str, Any]


@dataclass
class Trial:
    """Everything of one trial: its rows by table."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in TABLES})

    def add(self, table: str, **values: Any) -> None:
        """One more row; a value that is None stands as nothing in the file."""
        self.rows[table].append(values)


class Writer:
    """Appends trials to the files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / DIRECTORY
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, columns in TABLES.items():
            with self._file(name).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(columns)

    def add(self, number: int, trial: Trial) -> None:
        """Write a trial's rows under its number."""
        for name, rows in trial.rows.items():
            with self._file(name).open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, TABLES[name], restval="")
                writer.writerows({"trial": number, **_plain(row)} for row in rows)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.csv"


def _plain(row: Row) -> Row:
    return {
        key: "" if value is None else round(value, 6) if isinstance(value, float) else value
        for key, value in row.items()
    }


def load(directory: Path) -> dict[str, list[Row]]:
    """The tables of a run's directory; numbers are numbers, what is missing is None.

    Raises:
        LabError: where a table is not there.
    """
    return {
        name: list(_rows(directory / DIRECTORY / f"{name}.csv", columns)) for name, columns in TABLES.items()
    }


def _rows(file: Path, columns: Sequence[str]) -> Iterable[Row]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                # A run of an older release lacks what is measured since.
                yield dict.fromkeys(columns) | {key: _value(key, text) for key, text in row.items()}
    except OSError as error:
        raise LabError(f"{file}: {error.strerror}; give the directory of a run of `qplab run`") from error


def _value(key: str, text: str) -> int | float | str | None:
    if key in _TEXT:
        return text
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
