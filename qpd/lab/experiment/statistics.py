"""What repeated measurements tell: means with intervals of confidence, quantiles, agreement of two runs. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` independent measurements and its 95 % confidence interval (Student's t)."""

    n: int
    mean: float
    low: float | None
    """None where one measurement alone tells nothing of the spread."""
    high: float | None
    median: float
    minimum: float
    maximum: float
    at_least: int = 0
    """How many of the measurements are lower bounds: what was measured lasted longer than it was watched."""

    def to_json(self) -> dict[str, Any]:
        """For summary.json."""
        return asdict(self)


def estimate(values: Sequence[float], at_least: int = 0) -> Estimate | None:
    """The estimate from one value a repetition; None where there is none."""
    if not values:
        return None
    mean = fmean(values)
    half = None if len(values) < 2 else t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(
        n=len(values),
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        median=quantile(values, 0.5),
        minimum=min(values),
        maximum=max(values),
        at_least=at_least,
    )


def quantile(values: Sequence[float], part: float) -> float:
    """The quantile of a sample, linear between order statistics (Hyndman and Fan's type 7)."""
    if not values or not 0.0 <= part <= 1.0:
        raise ValueError(f"quantile {part} of {len(values)} values: give some values and a part from 0 to 1")
    ordered = sorted(values)
    position = part * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t: half of the interval's width in standard errors.

    Hill, Algorithm 396, CACM 13 (1970): six figures and more from three degrees of freedom on; exact below.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: give 1 or more")
    tail = 1.0 - confidence
    if degrees == 1:
        return 1.0 / math.tan(tail * math.pi / 2)
    if degrees == 2:
        return math.sqrt(2.0 / (tail * (2.0 - tail)) - 2.0)
    n = float(degrees)
    a = 1.0 / (n - 0.5)
    b = 48.0 / (a * a)
    c = ((20700.0 * a / b - 98.0) * a - 16.0) * a + 96.36
    d = ((94.5 / (b + c) - 3.0) / b + 1.0) * math.sqrt(a * math.pi / 2) * n
    y = (d * tail) ** (2.0 / n)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(tail / 2)
        y = x * x
        if degrees < 5:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5.0) * x - 7.0) * x - 2.0) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36.0) * y + 94.5) / c - y - 3.0) / b + 1.0) * x
        y = math.expm1(a * y * y)
    else:
        y = (
            (1.0 / (((n + 6.0) / (n * y) - 0.089 * d - 0.822) * (n + 2.0) * 3.0) + 0.5 / (n + 4.0)) * y - 1.0
        ) * (n + 1.0) / (n + 2.0) + 1.0 / y
    return math.sqrt(n * y)


def agree(one: Estimate, other: Estimate) -> bool | None:
    """Whether the means of two runs agree within their stated intervals; None where an interval is missing.

    The difference of two means must lie within the root of the sum of the squares of both half widths: intervals
    that merely touch would pass too easily, and one mean inside the other's interval too seldom.
    """
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    half = math.hypot(one.high - one.mean, other.high - other.mean)
    return abs(one.mean - other.mean) <= half + 1e-9 * max(abs(one.mean), abs(other.mean))


def saving(base: float, other: float) -> float | None:
    """The part of `base` that `other` saves: 0.2 is 20 % less; None where there is nothing to save."""
    return None if base <= 0 else 1.0 - other / base
