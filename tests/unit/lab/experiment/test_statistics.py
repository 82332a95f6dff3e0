"""Statistics of repetitions, against printed tables and by simulation."""

from __future__ import annotations

import random

import pytest

from qpd.lab.experiment.statistics import agree, estimate, quantile, saving, t_quantile


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (9, 2.26216),
        (29, 2.04523),
        (120, 1.97993),
    ],
)
def test_students_t_is_that_of_the_printed_tables(degrees: int, printed: float) -> None:
    assert t_quantile(degrees) == pytest.approx(printed, abs=2e-4)


def test_99_percent_too() -> None:
    assert t_quantile(9, 0.99) == pytest.approx(3.24984, abs=2e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(2000):
        found = estimate([draw.gauss(5.0, 2.0) for _ in range(6)])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 5.0 <= found.high
    assert 0.93 < held / 2000 < 0.97


def test_one_measurement_has_no_interval_and_none_has_no_estimate() -> None:
    one = estimate([3.0])
    assert one is not None
    assert (one.mean, one.low, one.high) == (3.0, None, None)
    assert estimate([]) is None


def test_quantiles_lie_between_order_statistics() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([4, 1, 3, 2], 0.0) == 1
    assert quantile([4, 1, 3, 2], 1.0) == 4
    with pytest.raises(ValueError, match="give some values"):
        quantile([], 0.5)


def test_runs_agree_where_their_difference_is_noise() -> None:
    a, b, c = estimate([1.0, 1.1, 0.9]), estimate([1.05, 1.15, 0.95]), estimate([2.0, 2.1, 1.9])
    assert a is not None
    assert b is not None
    assert c is not None
    assert agree(a, b) is True
    assert agree(a, c) is False
    single = estimate([1.0])
    assert single is not None
    assert agree(a, single) is None
    same = estimate([1.25, 1.25])
    assert same is not None
    assert agree(same, same) is True


def test_saving_is_a_part_of_the_base() -> None:
    assert saving(10.0, 7.0) == pytest.approx(0.3)
    assert saving(0.0, 7.0) is None
