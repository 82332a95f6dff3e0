"""Gray paths: found when they are, whoever else loses, and drained by the planner without harm."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.core.gray import GrayBook, GrayConfig, Sample, interval
from qpd.model import (
    DrainAsked,
    Event,
    GrayFound,
    GrayOver,
    LinkChanged,
    PathState,
    Reason,
    RouteChanged,
    Tell,
    Tick,
)

from .test_planner import Leaf, hop, link, route

BOUNDS = np.array([0.001, 0.002, 0.004, 0.1])
ALL = 0b1111


class Wire:
    """Four paths with a loss of their own each; looked at ten times a second."""

    def __init__(self, loss: Mapping[int, float], rate: int = 100, seed: int = 1, **config: object) -> None:
        self.book = GrayBook(GrayConfig(**config), BOUNDS)  # type: ignore[arg-type]
        self.loss = dict(loss)
        self.rate = rate
        self.random = random.Random(seed)
        self.packets = [0] * 4
        self.lost = [0] * 4
        self.rtt = [np.zeros(len(BOUNDS), np.uint64) for _ in range(4)]
        self.bucket = [0] * 4
        self.serving = set(range(4))
        self.now = 100.0

    def look(self, direction: str = "out", groups: tuple[int, ...] = (ALL,)) -> list[Event]:
        self.now += 0.1
        samples = {}
        for path in range(4):
            if path in self.serving:
                self.packets[path] += self.rate
                chance = self.loss.get(path, 0.0)
                self.lost[path] += sum(self.random.random() < chance for _ in range(self.rate))
                self.rtt[path][self.bucket[path]] += np.uint64(self.rate)
            packets, lost = self.packets[path], self.lost[path]
            # What was lost goes once more, and is counted as sent again.
            both = (
                (packets + lost, lost, lost, 0, 0) if direction == "out" else (packets, 0, 0, packets, lost)
            )
            samples[path] = Sample(*both, self.rtt[path].copy())
        return self.book.observe(samples, self.serving, groups, self.now)

    def looks(self, count: int, direction: str = "out") -> list[Event]:
        return [event for _ in range(count) for event in self.look(direction)]


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_path_with_five_percent_is_found_within_a_second(direction: str) -> None:
    (found,) = Wire({2: 0.05}).looks(10, direction)
    assert isinstance(found, GrayFound)
    assert found.path == 2
    assert found.detail["direction"] == direction
    assert 0.02 < found.detail["loss"] < 0.12
    assert found.detail["siblings_loss"] == 0


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("rate", [40, 1000])
def test_what_went_well_before_hides_no_loss(direction: str, rate: int) -> None:
    """Forty packets in a tenth of a second are few, a thousand without loss before it are many."""
    wire = Wire({}, rate)
    assert wire.looks(100, direction) == []
    wire.loss[2] = 0.05
    assert [type(event) for event in wire.looks(10, direction)] == [GrayFound]


def test_a_delay_is_found_as_soon_as_a_loss() -> None:
    wire = Wire({}, delay=0.01)
    wire.looks(100)
    wire.bucket[1] = 3
    assert [type(event) for event in wire.looks(10)] == [GrayFound]


@pytest.mark.parametrize("window", [1, 16, 256])
def test_the_loss_is_the_wires_however_much_is_sent_again(window: int) -> None:
    """Go-back-N with so many packets on their way: each loss has all of them sent again."""
    rolls = random.Random(window)
    book = GrayBook(GrayConfig(), BOUNDS)
    packets = resent = lost = 0
    found: list[Event] = []
    for look in range(40):
        for _ in range(100):
            failed = rolls.random() < 0.05
            packets += 1 + failed * window
            resent += failed * window
            lost += failed
        samples = {0: Sample(packets, resent, lost, 0, 0), 1: Sample(100 * look, 0, 0, 0, 0)}
        found += book.observe(samples, [0, 1], [0b11], look / 10)
    (gray,) = found
    assert isinstance(gray, GrayFound)
    assert gray.path == 0
    assert 0.02 < gray.detail["loss"] < 0.1


def test_each_direction_is_news_of_its_own() -> None:
    book = GrayBook(GrayConfig(), BOUNDS)
    found: list[Event] = []
    for look in range(60):
        arriving, leaving = 10 * look, 10 * max(look - 30, 0)
        bad = Sample(200 * look + leaving, leaving, leaving, 200 * look, arriving)
        good = Sample(200 * look, 0, 0, 200 * look, 0)
        found += book.observe({0: bad, 1: good}, [0, 1], [0b11], look / 10)
    assert len(found) == 2
    assert [event.detail["direction"] for event in found if isinstance(event, GrayFound)] == ["in", "out"]


def test_what_all_lose_speaks_against_none() -> None:
    assert Wire(dict.fromkeys(range(4), 0.05)).looks(100) == []


def test_a_little_loss_is_none() -> None:
    assert Wire({2: 0.005}).looks(100) == []


def test_few_packets_say_nothing() -> None:
    assert Wire({2: 0.5}, rate=2, min_samples=256).looks(50) == []


def test_only_siblings_compare() -> None:
    """Two paths to one place and two to another, which loses everywhere on its way."""
    wire = Wire({2: 0.05, 3: 0.05})
    assert [event for _ in range(50) for event in wire.look(groups=(0b0011, 0b1100))] == []


def test_alone_it_has_nobody_to_be_worse_than() -> None:
    wire = Wire({2: 0.05})
    assert [event for _ in range(50) for event in wire.look(groups=(0b0100, 0b0011))] == []


def test_it_is_over_when_the_loss_is() -> None:
    wire = Wire({2: 0.05})
    wire.looks(20)
    wire.loss.clear()
    assert wire.looks(100) == [GrayOver(2)]


@pytest.mark.parametrize("seconds", [0.4, 0.5, 1.0])
def test_a_short_loss_is_told_once_and_over_once(seconds: float) -> None:
    """Of a whole window it is little from the first: that alone would end it at once, and find it again."""
    wire = Wire({}, rate=300)
    wire.looks(100)
    wire.loss[2] = 0.05
    told = wire.looks(round(seconds * 10))
    wire.loss.clear()
    begun = wire.now
    while GrayOver(2) not in told:
        told += wire.look()
        assert wire.now < begun + 12
    assert wire.now >= begun + GrayConfig().window - seconds
    told += wire.looks(100)
    assert [type(event) for event in told] == [GrayFound, GrayOver]


def test_a_path_that_came_back_is_judged_anew() -> None:
    wire = Wire({2: 0.05})
    wire.looks(20)
    wire.serving.discard(2)
    assert wire.looks(20) == []
    wire.serving.add(2)
    assert [type(event) for event in wire.looks(20)] == [GrayFound]


def test_delay_counts_where_it_is_configured() -> None:
    wire = Wire({}, delay=0.01)
    wire.bucket[1] = 3
    (found,) = wire.looks(20)
    assert isinstance(found, GrayFound)
    assert (found.path, found.detail["rtt_ms"], found.detail["siblings_rtt_ms"]) == (1, 100, 1)
    wire = Wire({})
    wire.bucket[1] = 3
    assert wire.looks(20) == []


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([0.0, 0.001, 0.005, 0.009]))
def test_equal_paths_are_hardly_ever_gray(seed: int, loss: float) -> None:
    assert Wire(dict.fromkeys(range(4), loss), seed=seed).looks(50) == []


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_the_interval_holds_what_was_seen(events: int, trials: int) -> None:
    low, high = interval(min(events, trials), trials)
    part = min(events, trials) / trials
    assert 0 <= low <= part + 1e-12
    assert part - 1e-12 <= high <= 1


# --- what the planner does about it ---------------------------------------------------------------------------------

LOSS = {"direction": "out", "loss": 0.05, "siblings_loss": 0.0, "samples": 500}


def leaf(**options: Any) -> Leaf:
    made = Leaf(gray_drain=True, gray_hold=30.0, **options)
    made.up()
    return made


def state(made: Leaf, index: int) -> tuple[PathState, Reason, bool]:
    path = made.path(index)
    return path.state, path.reason, path.gray


SERVES = (PathState.UP, Reason.NONE)


def kinds(made: Leaf) -> list[str]:
    return [tell.kind for tell in made.kernel.tells]


def test_reported_and_left_in_service_by_default() -> None:
    made = Leaf()
    made.up()
    made.handle(GrayFound(made.path(1).id, LOSS))
    assert state(made, 1) == (*SERVES, True)
    told = made.kernel.tells[-1]
    assert told == Tell("path-gray", {**told.detail, "path": "eth1", "loss": 0.05, "action": "report"})
    made.handle(GrayOver(made.path(1).id))
    assert state(made, 1) == (*SERVES, False)
    assert kinds(made)[-1] == "path-gray-over"


def test_drained_at_once_and_back_after_its_time() -> None:
    made = leaf()
    made.handle(GrayFound(made.path(1).id, LOSS))
    assert state(made, 1) == (PathState.DRAINED, Reason.GRAY, True)
    assert not made.kernel.living >> made.path(1).id & 1
    assert kinds(made)[-2:] == ["path-gray", "path-drained"]
    assert made.planner.deadline == made.now + 30
    assert made.planner.drained == frozenset(), "the operator has drained nothing"
    made.handle(Tick(), after=29.9)
    assert state(made, 1)[0] is PathState.DRAINED
    made.handle(Tick(), after=0.1)
    assert state(made, 1) == (*SERVES, False)
    assert kinds(made)[-2:] == ["path-gray-over", "path-up"]


def test_each_relapse_doubles_the_time_out_of_service() -> None:
    made = leaf(gray_hold_max=100.0)
    for hold in (30, 60, 100, 100):
        made.handle(GrayFound(made.path(1).id, LOSS), after=1.0)
        assert made.planner.deadline == made.now + hold
        made.handle(Tick(), after=hold)
        assert state(made, 1) == (*SERVES, False)
    made.handle(GrayFound(made.path(1).id, LOSS), after=made.planner.config.stable_after)
    assert made.planner.deadline == made.now + 30, "it was well for long"


def test_the_last_living_path_stays() -> None:
    made = leaf()
    for index in (1, 2, 3):
        made.handle(LinkChanged(link(index, up=False)))
    made.handle(GrayFound(made.path(0).id, LOSS))
    assert state(made, 0) == (*SERVES, True)
    assert made.kernel.tells[-1].detail["action"] == "kept: no other path"


def test_what_a_path_alone_reaches_does_not_keep_it() -> None:
    """As its neighbour's own loopback: the kernel's own choice is the same path."""
    made = leaf()
    made.handle(RouteChanged(route("198.51.100.1/32", hop(1))))
    made.handle(GrayFound(made.path(1).id, LOSS))
    assert state(made, 1) == (PathState.DRAINED, Reason.GRAY, True)


def test_gray_paths_serve_again_when_nothing_else_is_left() -> None:
    made = leaf()
    made.handle(GrayFound(made.path(0).id, LOSS))
    made.handle(GrayFound(made.path(1).id, LOSS))
    assert {state(made, index)[1] for index in (0, 1)} == {Reason.GRAY}
    made.handle(LinkChanged(link(2, up=False)))
    assert {state(made, index)[1] for index in (0, 1)} == {Reason.GRAY}
    made.handle(DrainAsked("eth3", drain=True))
    assert {state(made, index)[:2] for index in (0, 1)} == {SERVES}
    made.handle(DrainAsked("eth3", drain=False))
    assert {state(made, index)[1] for index in (0, 1)} == {Reason.GRAY}


def test_all_are_never_gray_at_once() -> None:
    made = leaf()
    for index in range(4):
        made.handle(GrayFound(made.path(index).id, LOSS))
    assert made.kernel.living


def test_loss_of_what_arrives_is_the_far_ends_to_act_on() -> None:
    made = leaf()
    made.handle(GrayFound(made.path(1).id, {**LOSS, "direction": "in"}))
    assert state(made, 1) == (*SERVES, True)
    assert made.kernel.tells[-1].detail["action"] == "report"


def test_what_leaves_being_lost_drains_a_path_that_was_gray_already() -> None:
    made = leaf()
    made.handle(GrayFound(made.path(1).id, {**LOSS, "direction": "in"}))
    made.handle(GrayFound(made.path(1).id, LOSS))
    assert state(made, 1) == (PathState.DRAINED, Reason.GRAY, True)


def test_a_path_that_goes_down_is_not_gray() -> None:
    made = Leaf()
    made.up()
    made.handle(GrayFound(made.path(1).id, LOSS))
    made.handle(LinkChanged(link(1, up=False)))
    assert state(made, 1) == (PathState.DOWN, Reason.LINK_DOWN, False)


def test_a_gray_path_that_could_not_be_spared_is_drained_when_it_can() -> None:
    made = leaf()
    for index in (1, 2, 3):
        made.handle(LinkChanged(link(index, up=False)))
    made.handle(GrayFound(made.path(0).id, LOSS))
    made.handle(Tick(), after=31)
    assert state(made, 0) == (*SERVES, True)
    made.handle(LinkChanged(link(1)))
    made.handle(Tick(), after=1.0)
    assert state(made, 1)[0] is PathState.UP
    assert state(made, 0) == (PathState.DRAINED, Reason.GRAY, True)
