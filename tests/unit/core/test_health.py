"""Hold-up and flap damping."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpd.core.config import PlannerConfig
from qpd.core.health import Health
from qpd.model import Reason

CONFIG = PlannerConfig(hold_up=1.0, hold_up_max=16.0, stable_after=60.0)
WELL, DOWN = Reason.NONE, Reason.LINK_DOWN


def held(health: Health, now: float) -> float:
    assert health.hold_until is not None
    return health.hold_until - now


def test_a_path_that_is_well_when_first_seen_serves_at_once() -> None:
    health = Health(CONFIG)
    health.judge(WELL, 5.0)
    assert health.serving


def test_a_path_that_is_down_when_first_seen_is_held_when_it_comes() -> None:
    health = Health(CONFIG)
    health.judge(DOWN, 5.0)
    health.judge(WELL, 6.0)
    assert held(health, 6.0) == 1.0
    health.judge(WELL, 6.9)
    assert not health.serving
    health.judge(WELL, 7.0)
    assert health.serving


def test_each_fall_soon_after_the_last_doubles_the_hold_up_to_the_cap() -> None:
    health = Health(CONFIG)
    health.judge(WELL, 0.0)
    holds, now = [], 1000.0
    for _ in range(7):
        health.judge(DOWN, now)
        health.judge(WELL, now + 0.1)
        holds.append(round(held(health, now + 0.1), 6))
        now += 0.5
    assert holds == [1, 2, 4, 8, 16, 16, 16]


def test_long_service_forgives() -> None:
    health = Health(CONFIG)
    health.judge(WELL, 0.0)
    for now in (10.0, 20.0, 30.0):
        health.judge(DOWN, now)
        health.judge(WELL, now + 1)
    assert held(health, 31.0) == 4.0
    # The timer's end was 35.0, whenever it is looked at: 60 s later the path counts as stable.
    health.judge(DOWN, 95.0)
    health.judge(WELL, 96.0)
    assert held(health, 96.0) == 1.0


def test_a_fall_during_the_hold_counts() -> None:
    health = Health(CONFIG)
    health.judge(WELL, 0.0)
    health.judge(DOWN, 100.0)
    health.judge(WELL, 101.0)
    health.judge(DOWN, 101.5)
    assert not health.serving
    assert health.hold_until is None
    health.judge(WELL, 102.0)
    assert held(health, 102.0) == 2.0


def test_a_change_of_reason_is_no_fall() -> None:
    health = Health(CONFIG)
    health.judge(WELL, 0.0)
    health.judge(Reason.BFD_DOWN, 10.0)
    health.judge(Reason.LINK_DOWN, 11.0)
    health.judge(WELL, 12.0)
    assert held(health, 12.0) == 1.0


def test_without_hold_up_it_serves_at_once() -> None:
    health = Health(PlannerConfig(hold_up=0.0))
    health.judge(DOWN, 0.0)
    health.judge(WELL, 1.0)
    assert health.serving


@given(st.lists(st.tuples(st.sampled_from([WELL, DOWN, Reason.BFD_SILENT]), st.floats(0, 100)), min_size=1))
def test_it_never_serves_while_something_speaks_against_it_and_always_ends_serving(
    steps: list[tuple[Reason, float]],
) -> None:
    health, now = Health(CONFIG), 0.0
    for failure, seconds in steps:
        now += seconds
        health.judge(failure, now)
        assert not (failure is not WELL and health.serving)
        if health.hold_until is not None:
            assert now < health.hold_until <= now + CONFIG.hold_up_max
    health.judge(WELL, now + 1)
    health.judge(WELL, now + 1 + CONFIG.hold_up_max)
    assert health.serving
