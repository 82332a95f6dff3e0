"""Who meets whom at one look, by chance how likely, and which first PSNs were drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.core.meeting import NEAR, Firsts, Met, drawn, meetings, only_each_other
from qpd.core.sighting import PSN_MASK, SIGHTING, Bools, Records


def seen(*entries: dict[str, int]) -> Records:
    """Entries of which nothing was seen but what is named."""
    records = np.zeros(len(entries), SIGHTING)
    for name in ("first_psn", "request_psn", "answered_psn"):
        records[name] = -1
    for record, entry in zip(records, entries, strict=True):
        for name, value in entry.items():
            record[name] = value
    return records


def asked(first: int, newest: int, **more: int) -> dict[str, int]:
    return {"first_psn": first & PSN_MASK, "request_psn": newest & PSN_MASK, **more}


def answered(psn: int, **more: int) -> dict[str, int]:
    return {"answered_psn": psn & PSN_MASK, **more}


def all_of(records: Records) -> Bools:
    return np.ones(len(records), np.bool_)


def meet(rows: Records, columns: Records) -> Met:
    recent = all_of(rows), all_of(columns)
    return only_each_other(meetings(rows, columns, recent), meetings(columns, rows, (recent[1], recent[0])))


def places(met: Met) -> list[tuple[int, int]]:
    return list(zip(met.rows.tolist(), met.columns.tolist(), strict=True))


@given(st.integers(0, PSN_MASK), st.integers(1, 1000), st.integers(-600, 1600))
def test_an_answer_meets_what_was_asked_last(first: int, count: int, at: int) -> None:
    """From the one before the first request, which a NAK of the first one names, to the newest one."""
    met = meet(seen(answered(first + at)), seen(asked(first, first + count - 1)))
    meets = at >= -1 and 0 <= count - 1 - at < NEAR
    assert places(met) == ([(0, 0)] if meets else [])
    if meets:
        assert met.chances[0, 0] == (count - at) / 2**24


def test_who_meets_two_meets_none() -> None:
    columns = seen(asked(1000, 1100), asked(900, 1150), asked(9000, 9100))
    assert places(meet(seen(answered(1090), answered(9100)), columns)) == [(1, 2)]
    assert places(meet(seen(answered(9090), answered(9100)), columns)) == []


def test_strangers_make_it_less_sure() -> None:
    rows = seen(answered(5100), answered(100_000), answered(200_000), {})
    columns = seen(asked(5000, 5100), asked(300_000, 300_100), {})
    met = meet(rows, columns)
    assert places(met) == [(0, 0)]
    assert met.chances[0, 0] == 3 * 2 / 2**24
    at_rest = meetings(rows, columns, (np.array([True, False, False, True]), all_of(columns)))
    assert at_rest.strangers == 1 * 2


@pytest.mark.parametrize(("pmtu", "psns"), [(8, 256), (10, 64), (12, 16)])
def test_a_read_asks_for_as_many_as_its_answers_path_mtu_says(pmtu: int, psns: int) -> None:
    columns = seen(asked(5000, 6000, read_octets=65536))
    met = meet(seen(answered(6000 + psns - 1, pmtu=pmtu)), columns)
    assert met.chances.tolist() == [[1 / 2**24], [np.inf]]
    assert places(meet(seen(answered(6000 + psns, pmtu=pmtu)), columns)) == []


def test_with_data_both_ways_both_have_to_meet() -> None:
    row, column = asked(70_000, 70_100) | answered(5100), asked(5000, 5100) | answered(70_100)
    met = meet(seen(row), seen(column))
    assert met.chances.tolist() == [[1 / 2**24], [1 / 2**24]]
    assert places(meet(seen(row), seen(column | answered(80_000)))) == []
    assert places(meet(seen(row | answered(6000)), seen(column))) == []


@pytest.mark.parametrize(
    ("first", "partner", "others", "seems"),
    [
        pytest.param(5_000_000, -1, [9_000_000], True, id="apart"),
        pytest.param(5_000_000, -1, [5_000_000 + 520], True, id="far enough"),
        pytest.param(5_000_000, -1, [5_000_000 - 500], False, id="close to another"),
        pytest.param(5_000_000, 5_000_000, [5_000_000], True, id="alike for the two ways of one pair"),
        pytest.param(0, -1, [], False, id="0"),
        pytest.param(1, -1, [], False, id="1"),
        pytest.param(PSN_MASK, -1, [], False, id="the last one"),
        pytest.param(2000, -1, [PSN_MASK], True, id="over the end"),
        pytest.param(5_000_000, -1, list(range(5_001_000, 5_004_000, 1000)), False, id="some not far"),
        pytest.param(
            5_000_000, -1, list(range(0, 1 << 24, 1 << 14)), True, id="as close as among a thousand"
        ),
        pytest.param(
            5_000_000, -1, [5_000_004, 4_999_998, *range(0, 1 << 24, 1 << 14)], False, id="closer than that"
        ),
    ],
)
def test_what_was_drawn(first: int, partner: int, others: list[int], seems: bool) -> None:
    hosts = Firsts(np.array([first, *others, -1]))
    assert drawn(np.array([first]), np.array([partner]), hosts, Firsts(np.array([first]))).tolist() == [seems]


def test_what_others_of_the_map_began_with_was_not_drawn() -> None:
    first = np.array([5_000_000])
    everybody = Firsts(np.array([5_000_000, 5_000_000]))
    assert drawn(first, np.array([-1]), Firsts(first), everybody).tolist() == [False]


@given(st.lists(st.integers(0, PSN_MASK), max_size=20), st.integers(0, PSN_MASK), st.integers(0, 5000))
def test_how_many_are_around(psns: list[int], at: int, distance: int) -> None:
    def apart(one: int) -> int:
        return min((one - at) & PSN_MASK, (at - one) & PSN_MASK)

    found = Firsts(np.array(psns, np.int64)).around(np.array([at]), distance)
    assert found.tolist() == [sum(apart(one) <= distance for one in psns)]
