"""When single PSNs were asked for and answered, to a microsecond: what tells QPs in lockstep apart. Pure.

QPs that go through the same PSNs at the same pace look alike whenever they are looked at. But a host sends to them one
after the other, and an answer may be back before the next one's turn: an answer of PSN x came to a, and only then was
PSN x sent to b. That rules b out as a's partner, however small the time between. The kernel notes such times, of some
PSNs, in the entries of QPs whose partners are not known (ebpf/marks.h).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpd.core.sighting import Bools, Look, Numbers, Records
from qpd.model import NO_PSN

_NEVER = np.int32(2**31 - 1)
_WHOLE = 8
"""To compare everybody with everybody is cheaper where it is one part in so many of that anyway."""

_Times = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """Of entries, [entry, class]: PSNs, NO_PSN where none is known; their times; and whether that is news."""

    psns: npt.NDArray[np.int32]
    times: npt.NDArray[np.uint32]
    fresh: Bools

    def after(self, before: Marks, place: Numbers) -> Marks:
        """With what was known at an earlier look, where entries were at ``place``, -1: nowhere."""
        if not len(before.psns):
            return self
        same = (before.psns[place] == self.psns) & (before.times[place] == self.times)
        return Marks(self.psns, self.times, self.fresh & ~((place >= 0)[:, None] & same))


def marks_of(records: Records, look: Look) -> tuple[Marks, Marks]:
    """Of requests and of answers; ``records``: some entries of this look."""
    psns, times = look.psns[records["marks"]], look.times[records["marks"]]
    asked, answered = (Marks(psns[:, which], times[:, which], psns[:, which] != NO_PSN) for which in range(2))
    return asked, answered


def answered_before_asked(answers: Marks, questions: Marks) -> Bools:
    """[answering, asking]: whether any PSN was answered to one before it was sent to the other, as is news."""
    early: Bools = np.zeros((len(answers.psns), len(questions.psns)), np.bool_)
    for one in range(answers.psns.shape[1]):
        psns = np.intersect1d(answers.psns[:, one], questions.psns[:, one])
        for psn in psns[psns != NO_PSN].tolist():
            rows, columns = answers.psns[:, one] == psn, questions.psns[:, one] == psn
            # Reckoned from any of them: that times begin anew after 18 minutes is in nobody's way then.
            zero = questions.times[columns, one][0]
            here, there = ((side.times[:, one] - zero).view(np.int32) for side in (answers, questions))
            fresh, news = answers.fresh[:, one], questions.fresh[:, one]
            if fresh[rows].all() or news[columns].all():
                _note(early, (here, rows), (there, columns))
            else:
                _note(early, (here, rows & fresh), (there, columns))
                _note(early, (here, rows), (there, columns & news))
    return early


def _note(early: Bools, answers: tuple[_Times, Bools], questions: tuple[_Times, Bools]) -> None:
    """Compare the times of one PSN, of the entries that are chosen."""
    (here, rows), (there, columns) = answers, questions
    if np.count_nonzero(rows) * np.count_nonzero(columns) > early.size / _WHOLE:
        early |= np.where(rows, here, _NEVER)[:, None] < np.where(columns, there, -_NEVER)
    else:
        early[np.ix_(rows, columns)] |= here[rows][:, None] < there[columns]
