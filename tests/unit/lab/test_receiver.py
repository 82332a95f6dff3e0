"""What the receiver says of arrivals, against a plain count."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.lab.receiver import _RECORD, Arrivals, Tracker

MODULUS = 1 << 24


def records(rows: list[tuple[int, int, int, int]]) -> npt.NDArray[np.void]:
    return np.array(rows, dtype=_RECORD)


@settings(deadline=None)
@given(
    first=st.integers(0, MODULUS - 1),
    offsets=st.lists(st.integers(0, 300), min_size=1, max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=4),
)
def test_missing_duplicates_and_order(first: int, offsets: list[int], cuts: list[int]) -> None:
    """PSNs near each other in any order, over the fold at 2^24, in any division into chunks."""
    offsets = [0, *offsets]
    rows = [(5, (first + offset) % MODULUS, 1000 * (i + 1), 100) for i, offset in enumerate(offsets)]
    tracker = Tracker()
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    for begin, end in pairwise(edges):
        tracker.add(records(rows[begin:end]))
    known = tracker.finish()[5]
    assert known.packets == len(offsets)
    assert known.bytes == 100 * len(offsets)
    assert known.missing == max(offsets) + 1 - len(set(offsets))
    assert known.duplicates == len(offsets) - len(set(offsets))
    assert known.out_of_order == sum(offset < max(offsets[: i + 1]) for i, offset in enumerate(offsets))
    assert known.last_psn == first + max(offsets)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=50), st.integers(1, 49))
def test_the_longest_gap_and_when_it_began(steps: list[int], cut: int) -> None:
    times = np.cumsum(steps).tolist()
    rows = [(1, i, time, 10) for i, time in enumerate(times)]
    tracker = Tracker()
    tracker.add(records(rows[:cut]))
    tracker.add(records(rows[cut:]))
    known = tracker.finish()[1]
    gaps = [b - a for a, b in pairwise(times)]
    assert known.gap_ns == max(gaps)
    assert known.gap_begin_ns == times[gaps.index(max(gaps))]
    assert [length for _, length in known.gaps] == sorted(gaps, reverse=True)[:16]
    assert all(begin in times and begin + length in times for begin, length in known.gaps)
    assert (known.first_ns, known.last_ns) == (times[0], times[-1])


def test_qps_are_kept_apart() -> None:
    tracker = Tracker()
    tracker.add(records([(1, 0, 10, 50), (2, 100, 11, 60), (1, 1, 12, 50), (2, 102, 15, 60)]))
    found = tracker.finish()
    assert found[1] == Arrivals(2, 100, 10, 12, 2, 10, 0, 1, 0, 0, 0, [(10, 2)])
    assert found[2] == Arrivals(2, 120, 11, 15, 4, 11, 100, 102, 1, 0, 0, [(11, 4)])


def test_a_packet_from_before_the_first_is_late_and_nothing_else() -> None:
    tracker = Tracker()
    tracker.add(records([(1, 5, 10, 1), (1, 4, 11, 1), (1, 6, 12, 1)]))
    known = tracker.finish()[1]
    assert (known.packets, known.missing, known.duplicates, known.out_of_order) == (3, 0, 0, 1)


def test_a_long_run_grows_its_memory() -> None:
    tracker = Tracker()
    psns = [p for p in range(20_000) if p % 1000 != 999]
    tracker.add(records([(1, p, p + 1, 1) for p in psns]))
    assert tracker.finish()[1].missing == 19, "the last of them is above the highest that came"
