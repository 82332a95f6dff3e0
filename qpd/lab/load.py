"""How evenly links are loaded: shares, max/mean, and Jain's index. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def shares(loads: Sequence[float]) -> list[float]:
    """Each load's part of the sum; zeros where nothing was carried."""
    total = sum(loads)
    return [load / total if total else 0.0 for load in loads]


def max_to_mean(loads: Sequence[float]) -> float:
    """The busiest link's load over the mean: 1 is even, n is all on one of n. 0 where nothing was carried."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 0.0


def jain(loads: Sequence[float]) -> float:
    """Jain's fairness index, from 1/n (all on one) to 1 (even); Jain, Chiu and Hawe, DEC-TR-301, 1984."""
    squares = sum(load * load for load in loads)
    return sum(loads) ** 2 / (len(loads) * squares) if squares else 0.0
