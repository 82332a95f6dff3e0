"""Figures, tables and rates, without a terminal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.cli.table import Column, lines
from qpd.cli.top import Picture, path_rates, picture, qp_rates
from qpd.cli.units import duration, microseconds, plural, si
from tests.unit.api.fake_state import FakeState

COLUMNS = (
    Column("NAME", lambda row: row[0]),
    Column("LEAST", lambda row: row[1], rank=9),
    Column("LESS", lambda row: row[2], rank=5, right=True),
    Column("HIDDEN", lambda row: row[0], wide=True),
)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "-"),
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00k"),
        (12345, "12.3k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (47_049_000, "47.0M"),
        (2**63, "9.22E"),
        (0.5, "0.50"),
        (99.96, "100"),
    ],
)
def test_si(value: float | None, said: str) -> None:
    assert si(value) == said


@given(st.integers(0, 2**64))
def test_si_is_short_and_right_to_a_half_percent(value: int) -> None:
    text = si(value)
    match = re.fullmatch(r"([\d.]+)([kMGTPE]?)", text)
    assert match is not None
    factor = 1000 ** ("kMGTPE".index(match[2]) + 1 if match[2] else 0)
    assert abs(float(match[1]) * factor - value) <= 0.005 * value
    assert len(text) <= 5 + (value >= 10**21)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0.04, "0.0s"),
        (9.9, "9.9s"),
        (45, "45s"),
        (119, "119s"),
        (720, "12m"),
        (11100, "3h05m"),
        (183600, "2d03h"),
    ],
)
def test_durations(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said


def test_round_trip_times_and_plurals() -> None:
    assert [microseconds(value) for value in (None, 85, 2_000, 75_300, 1_500_000)] == [
        "-",
        "85.0us",
        "2.00ms",
        "75.3ms",
        "1.50s",
    ]
    assert (plural(1, "path"), plural(0, "path"), plural(2, "prefix", "es")) == (
        "1 path",
        "0 paths",
        "2 prefixes",
    )


def test_columns_are_left_out_by_rank_and_named() -> None:
    rows = [("spine1", "aaaa", "1"), ("s", "b", "22")]

    def shown(width: int | None, wide: bool = False) -> list[str]:
        return [line.plain for line in lines(COLUMNS, rows, width, wide)]

    assert shown(None) == ["NAME    LEAST  LESS", "spine1  aaaa      1", "s       b        22"]
    assert shown(19) == shown(None)
    assert shown(18) == [
        "NAME    LESS",
        "spine1     1",
        "s         22",
        "(no room for LEAST:",
        "-o wide shows all)",
    ]
    assert shown(3)[:3] == ["NAME", "spine1", "s"], "what identifies a row is never left out"
    assert shown(10, wide=True)[0] == "NAME    LEAST  LESS  HIDDEN"


def pictures(state: FakeState, packets: int, seconds: float) -> tuple[Picture, Picture]:
    before = Picture(10.0, state.status(), state.paths(), state.table_rows())
    state.traffic(packets)
    return before, Picture(10.0 + seconds, state.status(), state.paths(), state.table_rows())


def test_rates_are_differences_over_time() -> None:
    state = FakeState(count=40)
    before, _ = pictures(state, packets=0, seconds=2.0)
    state.values["lost_behind"][2] += 8
    _, after = pictures(state, packets=1000, seconds=2.0)
    assert path_rates(before, after)["dc1-spine1"] == (5000.0, 5000.0 * 4174 * 8, 0.0)
    assert path_rates(before, after)["dc1-spine3"][2] == 4.0
    assert qp_rates(before, after)[10010, "10.1.0.21", 0x11] == (500.0, 500.0 * 4174 * 8, 0.0)
    assert qp_rates(before, after)[10010, "10.1.0.21", 0x12][2] == 4.0


def test_a_qp_that_counts_from_zero_again_has_no_negative_rate() -> None:
    before, after = pictures(FakeState(count=4), packets=1000, seconds=1.0)
    assert set(qp_rates(after, Picture(20.0, before.status, before.paths, before.qps)).values()) == {
        (0.0, 0.0, 0.0)
    }


def test_what_is_new_has_no_rate_yet() -> None:
    before, after = pictures(FakeState(count=4), packets=10, seconds=1.0)
    assert qp_rates(Picture(9.0, before.status, [], []), after) == {}
    assert path_rates(before, before) == {}, "no time has passed"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50), (80, 5), (60, 12)])
def test_the_live_picture_fits_its_screen(width: int, height: int) -> None:
    before, after = pictures(FakeState(count=100), packets=100, seconds=1.0)
    shown = picture(before, after, width, height).plain.splitlines()
    assert len(shown) <= height
    assert all(len(line) <= width for line in shown if "paths up" not in line)
