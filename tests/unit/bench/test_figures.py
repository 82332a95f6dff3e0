"""Medians, ratios and verdicts on targets."""

from __future__ import annotations

import pytest

from bench.figures import Spread, Target, ratios


def test_a_spread_is_median_quartiles_and_ends() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 1.0, 5.0)


def test_a_single_value_is_its_own_spread() -> None:
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0)


def test_ratios_compare_within_a_round() -> None:
    assert ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("figure", "sense", "reached"),
    [(1.2, "at most", True), (1.21, "at most", False), (1.2, "at least", True), (1.19, "at least", False)],
)
def test_a_target_is_reached_up_to_its_limit(figure: float, sense: str, reached: bool) -> None:
    target = Target("what", figure, 1.2, sense)  # type: ignore[arg-type]
    assert target.reached is reached
    assert target.json()["reached"] is reached
