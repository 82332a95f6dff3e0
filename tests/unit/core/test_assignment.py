"""Certain pairs against all ways there are to assign."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qpd.core.assignment import certain
from qpd.core.sighting import Bools


def of(*rows: str) -> Bools:
    return np.array([[mark == "x" for mark in row] for row in rows])


def pairs(possible: Bools) -> set[tuple[int, int]]:
    everybody = (np.ones(len(possible), np.bool_), np.ones(possible.shape[1], np.bool_))
    return {(int(row), int(column)) for row, column in np.argwhere(certain(possible, *everybody))}


def test_one_after_the_other() -> None:
    """The last row has one candidate, then the one before it has, and so on."""
    assert pairs(of("xxxx", ".xxx", "..xx", "...x")) == {(n, n) for n in range(4)}


def test_two_that_cannot_be_told_apart_are_in_nobody_s_way() -> None:
    assert pairs(of("x...x", "xxx..", "xxx..", "xxxxx", "....x")) == {(0, 0), (3, 3), (4, 4)}


def test_chains_that_know_nothing_of_each_other() -> None:
    assert pairs(of("x.....", "xx....", "..xx..", "..xx..", "....x.", "....xx")) == {
        (0, 0),
        (1, 1),
        (4, 4),
        (5, 5),
    }


def test_what_columns_tell() -> None:
    assert pairs(of("xxx", "x.x", "x.x")) == {(0, 1)}


def test_where_two_have_one_candidate_nothing_is_certain() -> None:
    assert pairs(of("x..", "x..", "..x")) == set()


def test_who_may_have_none_claims_nothing() -> None:
    possible = of("x.", "xx")
    assert not certain(possible, np.array([False, True]), np.array([False, False])).any()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Bools, Bools, Bools]:
    count = draw(st.integers(1, 5))
    bits = st.lists(st.booleans(), min_size=count, max_size=count)
    possible = np.array(draw(st.lists(bits, min_size=count, max_size=count)))
    if draw(st.booleans()):
        possible |= np.eye(count, dtype=np.bool_)
    return possible, np.array(draw(bits)), np.array(draw(bits))


@given(cases())
def test_nothing_is_certain_that_is_not_so_in_every_way(case: tuple[Bools, Bools, Bools]) -> None:
    """Rows and columns that claim nothing may stay alone."""
    possible, rows, columns = case
    count = len(possible)
    every: set[tuple[int, int]] | None = None
    for order in permutations(range(2 * count), count):
        chosen = {(row, column) for row, column in enumerate(order) if column < count}
        if any(not possible[pair] for pair in chosen):
            continue
        if {row for row in range(count) if rows[row]} - {row for row, _ in chosen}:
            continue
        if {column for column in range(count) if columns[column]} - {column for _, column in chosen}:
            continue
        every = chosen if every is None else every & chosen
    found = {(int(row), int(column)) for row, column in np.argwhere(certain(possible, rows, columns))}
    assert found <= (every or set())
