"""Wide-area links: what a shape says to netem, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.lab import wan
from qpd.lab.errors import LabError
from qpd.lab.wan import PLAIN, PROFILES, Shape

THOUSANDTHS = st.integers(0, 500_000).map(lambda value: value / 1000)


@given(
    delay=THOUSANDTHS,
    part=st.integers(0, 4),
    loss=st.integers(0, 9999).map(lambda value: value / 100),
    rate=st.none() | st.integers(8, 10**7).map(lambda value: value * 1000),
)
def test_words_are_read_back(delay: float, part: int, loss: float, rate: int | None) -> None:
    shape = Shape(delay, round(delay * part / 4, 3), loss, rate)
    assert wan.of_words(shape.words()) == shape
    assert (shape.words() == []) == (shape == PLAIN)


def test_the_words_are_netems() -> None:
    shape = Shape(11.0, 1.0, 0.01, 1_000_000_000)
    assert " ".join(shape.words()) == "limit 5166 delay 11ms 1ms loss 0.01% rate 1gbit"
    assert Shape(rate=20_000_000).words() == ["limit", "1000", "rate", "20mbit"]
    assert "rate" not in Shape(5.0).words()
    assert Shape(5.0, 1.0).words()[-2:] == ["rate", "100gbit"], "without a rate netem would reorder"


def test_a_link_holds_what_is_on_its_way() -> None:
    shape = Shape(100.0, rate=1_000_000_000)
    assert shape.limit * 1500 * 8 >= 1_000_000_000 * 0.1


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_a_shape_with_a_source(name: str) -> None:
    profile = PROFILES[name]
    assert 2 * profile.shape.delay_ms == profile.rtt_ms
    assert profile.source
    assert wan.parse({"profile": name}, "x") == profile.shape


def test_the_papers_round_trip_is_22_ms() -> None:
    shape = wan.parse({"profile": "paper", "rate": "1gbit"}, "x")
    assert (2 * shape.delay_ms, shape.jitter_ms, shape.rate) == (22.0, 1.0, 10**9)


def test_what_is_given_goes_over_the_profile() -> None:
    assert wan.parse({"profile": "paper", "rtt_ms": 75, "jitter_ms": 0}, "x") == Shape(37.5)
    assert wan.parse({"loss_percent": 2}, "x") == Shape(loss_percent=2.0)
    assert wan.parse({}, "x") == PLAIN


def test_more_delay_comes_on_top() -> None:
    assert Shape(11.0, 1.0, 0.5, 10**9).later(20, 2) == Shape(31.0, 3.0, 0.5, 10**9)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"rtt": 5}, "x: 'rtt' is not among profile, rtt_ms"),
        ({"rtt_ms": "5ms"}, "x: rtt_ms: '5ms': give a number"),
        ({"rtt_ms": -1}, "x: delay -0.5 ms"),
        ({"loss_percent": 100}, "x: loss 100 %: give 0 or more, below 100"),
        ({"rate": "1gbps"}, "x: rate: '1gbps': write it as tc does"),
        ({"rate": "1kbit"}, "x: rate 1000 bit/s: give 8000 or more"),
    ],
)
def test_what_is_wrong_is_one_line(raw: dict[str, object], says: str) -> None:
    with pytest.raises(LabError, match=says):
        wan.parse(raw, "x")


@pytest.mark.parametrize("words", ["delay 5s", "loss 5", "rate", "duplicate 1%", "delay"])
def test_words_that_are_not_ours_are_refused(words: str) -> None:
    with pytest.raises(LabError):
        wan.of_words(words.split())
