"""Times of PSNs: who was answered before another was asked, against a comparison of each with each."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qpd.core.marks import Marks, answered_before_asked
from qpd.model import NO_PSN

TOP = 1 << 32


def marks(psns: list[list[int]], times: list[list[int]], fresh: list[list[bool]] | None = None) -> Marks:
    shape = (len(psns), len(psns[0]) if psns else 1)
    return Marks(
        np.array(psns, np.int32).reshape(shape),
        (np.array(times, np.int64) % TOP).astype(np.uint32).reshape(shape),
        np.ones(shape, np.bool_) if fresh is None else np.array(fresh, np.bool_).reshape(shape),
    )


@st.composite
def sides(draw: st.DrawFn, zero: int) -> Marks:
    count, classes = draw(st.integers(1, 12)), 2
    table = st.lists(
        st.lists(st.integers(0, 6), min_size=classes, max_size=classes), min_size=count, max_size=count
    )
    psns = [[one - 1 for one in row] for row in draw(table)]
    times = [[zero + one for one in row] for row in draw(table)]
    return marks(psns, times, [[one > 2 for one in row] for row in draw(table)])


@given(st.sampled_from([5, TOP - 3]).flatmap(lambda zero: st.tuples(sides(zero), sides(zero))))
def test_each_with_each(both: tuple[Marks, Marks]) -> None:
    """Also where times begin anew."""
    answers, questions = both
    early = answered_before_asked(answers, questions)
    for row, column in np.ndindex(early.shape):
        wanted = False
        for one in range(answers.psns.shape[1]):
            same = NO_PSN != answers.psns[row, one] == questions.psns[column, one]
            news = answers.fresh[row, one] or questions.fresh[column, one]
            after = (int(questions.times[column, one]) - int(answers.times[row, one])) % TOP
            wanted |= bool(same and news and 0 < after < TOP // 2)
        assert early[row, column] == wanted


def test_news_is_told_once() -> None:
    """What was the same at the look before is none, unless it is another entry's."""
    before = marks([[5], [6]], [[100], [200]])
    now = marks([[6], [5], [6]], [[200], [101], [200]]).after(before, np.array([1, 0, -1]))
    assert now.fresh.tolist() == [[False], [True], [True]]
    assert now.after(marks([], []), np.array([-1, -1, -1])).fresh.tolist() == now.fresh.tolist()
