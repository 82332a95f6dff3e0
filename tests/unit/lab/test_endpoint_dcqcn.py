"""Rate control: what a notification costs, how the rate comes back, how often notifications go out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.lab.endpoint.dcqcn import NotificationPoint, Parameters, ReactionPoint

P = Parameters()
LINE = 100e6


def test_without_notifications_the_line_rate_stays() -> None:
    point = ReactionPoint(P, LINE)
    point.sent(10**9, 5.0)
    assert point.rate(100.0) == LINE


def test_the_first_notification_halves_and_the_rate_comes_back() -> None:
    point = ReactionPoint(P, LINE)
    point.notified(1.0)
    assert point.rate(1.0) == LINE / 2
    rates = [point.rate(1.0 + step * P.increase_interval) for step in range(1, 4)]
    assert rates == [LINE * 3 / 4, LINE * 7 / 8, LINE * 15 / 16], "fast recovery: half of what is missing"
    assert point.rate(10.0) == LINE


def test_bytes_bring_the_rate_back_as_time_does() -> None:
    point = ReactionPoint(P, LINE)
    point.notified(1.0)
    point.sent(2 * P.byte_counter, 1.0)
    assert point.rate(1.0) == LINE * 7 / 8


def test_a_second_notification_after_calm_costs_less() -> None:
    """Alpha has fallen meanwhile: the cut is smaller than a half."""
    point = ReactionPoint(P, LINE)
    point.notified(1.0)
    before = point.rate(1.0 + 3 * P.increase_interval)
    point.notified(1.0 + 3 * P.increase_interval)
    assert before / 2 < point.rate(1.0 + 3 * P.increase_interval) < before


@given(st.lists(st.tuples(st.floats(0, 0.1), st.booleans(), st.integers(0, 10**6)), max_size=60))
def test_the_rate_stays_between_minimum_and_line_rate(events: list[tuple[float, bool, int]]) -> None:
    point, now = ReactionPoint(P, LINE), 0.0
    for step, notified, count in events:
        now += step
        before = point.rate(now)
        if notified:
            point.notified(now)
            assert point.rate(now) <= before
        else:
            point.sent(count, now)
        assert P.minimum <= point.rate(now) <= LINE
    assert point.rate(now + 1000) == pytest.approx(LINE)


def test_notifications_have_their_interval() -> None:
    point = NotificationPoint(P)
    sent = [point.marked(1.0 + index * P.cnp_interval / 4) for index in range(9)]
    assert sent == [True, False, False, False] * 2 + [True]
