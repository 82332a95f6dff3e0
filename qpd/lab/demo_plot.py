"""The demonstration's picture: each uplink's load over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

from qpd.lab.counters import Series
from qpd.lab.topology import Endpoint

mpl.use("Agg")

from matplotlib import pyplot as plt

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Okabe and Ito's palette: told apart by readers with any colour vision."""


@dataclass(frozen=True)
class Mark:
    """Something that happened, at CLOCK_MONOTONIC ns."""

    time_ns: int
    label: str


def draw(
    series: Series, names: Mapping[Endpoint, str], marks: Sequence[Mark], file: Path, title: str
) -> None:
    """Write a PNG: transmitted Mbit/s of every endpoint, one on the other, with the marks as lines."""
    begin = series.times_ns[0]
    middle = [(a + b) / 2 for a, b in zip(series.times_ns, series.times_ns[1:], strict=False)]
    seconds = (np.array(middle) - begin) / 1e9
    figure, axes = plt.subplots(figsize=(10, 4.2), dpi=130, layout="constrained")
    axes.stackplot(
        seconds,
        [series.rates(endpoint, "tx_bytes") * 8 / 1e6 for endpoint in names],
        labels=[f"{endpoint.interface} to {name}" for endpoint, name in names.items()],
        colors=COLOURS[: len(names)],
    )
    # What a sender makes up for after a stall of a busy machine would dwarf all else.
    total = np.sum([series.rates(endpoint, "tx_bytes") for endpoint in names], axis=0) * 8 / 1e6
    top = 1.6 * float(np.median(total[total > 0.05 * total.max()])) if total.max() else 1.0
    axes.set_ylim(0, top)
    for number, mark in enumerate(marks):
        at = (mark.time_ns - begin) / 1e9
        axes.axvline(at, color="#777777", linewidth=0.9, linestyle="--")
        height = top * (0.985 - 0.06 * (number % 2))
        axes.text(at, height, f" {mark.label}", va="top", ha="left", fontsize=9, color="#333333")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("sent (Mbit/s)")
    axes.set_title(title)
    axes.set_xlim(0, float(seconds[-1]))
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file)
    plt.close(figure)
