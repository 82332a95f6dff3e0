"""Samples, their medians, ratios of interleaved rounds, and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Literal


class BenchError(Exception):
    """A measurement is void or impossible: one line that says which and why."""


@dataclass(frozen=True)
class Spread:
    """Of one series: the median, the middle half, the ends."""

    median: float
    low: float
    high: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """At least one value; ``low`` and ``high`` are the quartiles."""
        if len(values) < 2:
            return cls(*[values[0]] * 5)
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high, min(values), max(values))

    def json(self) -> dict[str, float]:
        """For the result file."""
        return {name: round(value, 5) for name, value in vars(self).items()}


def ratios(subject: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round: both were measured within the same moment."""
    return [one / other for one, other in zip(subject, reference, strict=True)]


@dataclass(frozen=True)
class Target:
    """A row of the table of figures to reach. ``figure``: what was measured, in the limit's unit."""

    name: str
    figure: float
    limit: float
    sense: Literal["at most", "at least"]
    unit: str = ""
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether the figure is within the limit; the limit itself is."""
        return self.figure <= self.limit if self.sense == "at most" else self.figure >= self.limit

    def json(self) -> dict[str, Any]:
        """For the result file."""
        return {**vars(self), "figure": round(self.figure, 4), "reached": self.reached}
