"""Pairs by one look: where a's newest answer and b's newest request are the same PSN, or nearly so. Pure.

Where first PSNs are drawn from all 2^24, two directions that have nothing to do with each other meet within ``spread``
PSNs by a chance of ``spread`` / 2^24. And a pair whose two directions pass this leaf always meets, but for the packets
that are on their way: a wrong pair takes two *strangers*, an answering and an asking direction whose partners are both
out of sight (programs attached or entries evicted amid traffic, or a direction that does not pass this leaf), who meet
by chance, and nobody else. Directions that answer, or ask, and meet nobody are strangers, or to be taken for some. With
n and m of them the chance that one look states a wrong pair is

    (n + 1) * (m + 1) * spread / 2^24,

and strangers who are at work are somewhere else at every look, so it is multiplied by the looks at which the two have
changed. No pair is stated where that exceeds ``CHANCE_MAX``: one in 65 536, so that strangers end up as a pair by one
in 10 000 (1 + 1/2 + 1/3 … + 1/256 times as often), and only if there are such who hide by meeting; a leaf that sees
both directions of its hosts has none. After ``YOUNG`` packets of an entry nothing is told by this any more.

All of it counts on PSNs that were drawn: see :func:`drawn`. Where they were not, or where too much is on its way, time
tells instead (:mod:`qpd.core.pairing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import numpy as np
import numpy.typing as npt

from qpd.core.sighting import PSN_MASK, READ_LEAST, Bools, Numbers, Records, newer, newest_asked

NEAR = 256
"""Who is so many PSNs apart, or fewer, meets."""
CHANCE_MAX = 2.0**-16
YOUNG = 1 << 16
CHOSEN = 1024
"""First PSNs that are so close to 0 may have been chosen instead of drawn."""
CLOSE = (8, 64, 512, 4096)
"""Within these distances …"""
CLOSE_CHANCE = 2e-4
"""… more first PSNs than drawing leaves there but for this chance are no accident."""


@dataclass(frozen=True, slots=True)
class Way:
    """One direction's answers and the other's questions."""

    near: Bools
    """[answering, asking]: who meets whom."""
    silent: Bools
    """Of all who could answer, those who never have."""
    spread: Numbers
    """[…]: PSNs from an answer to the newest request, both included, of those who meet one other only: in so many
    places the answer could be as well. By who answers."""
    strangers: int
    """(n + 1) * (m + 1)"""


def meetings(answers: Records, questions: Records, recent: tuple[Bools, Bools]) -> Way:
    """Look at one direction's answers and the other's questions; ``answers`` must have been read first.

    Args:
        answers: array of SIGHTING.
        questions: array of SIGHTING.
        recent: of answers and questions, those who were at work a moment ago: only such are strangers.
    """
    to, newest = answers["answered_psn"].copy(), questions["request_psn"].copy()
    pmtu = np.where(answers["pmtu"], answers["pmtu"], READ_LEAST)
    near = newest - to[:, None] & PSN_MASK < NEAR
    # Behind a READ the newest PSN asked for is known by the path MTU, and that by the answers.
    reads = np.flatnonzero(questions["read_octets"])
    near[:, reads] = newest_asked(questions[reads][None, :], pmtu[:, None]) - to[:, None] & PSN_MASK < NEAR
    near &= (to >= 0)[:, None] & (newest >= 0)
    only = np.flatnonzero(np.count_nonzero(near, axis=1) == 1)
    met = near[only].argmax(axis=1)
    spread = np.full(len(answers), NEAR, np.int64)
    spread[only] = (newest_asked(questions[met], pmtu[only]) - to[only] & PSN_MASK) + 1
    # An answer to what was asked before the first request that was seen.
    early = only[newer(to[only], questions["first_psn"][met] - 1) < 0]
    near[early] = False
    lonely = (
        np.count_nonzero(recent[0] & (to >= 0) & ~near.any(axis=1)),
        np.count_nonzero(recent[1] & (newest >= 0) & ~near.any(axis=0)),
    )
    strangers = (int(lonely[0]) + 1) * (int(lonely[1]) + 1)
    return Way(near, to < 0, spread, strangers)


@dataclass(frozen=True, slots=True)
class Met:
    """Rows and columns who meet each other and nobody else."""

    rows: Numbers
    columns: Numbers
    chances: npt.NDArray[np.float64]
    """[way, …]: the chance that they do so without being a pair; infinite where they do not meet this way."""


def only_each_other(rows_answer: Way, columns_answer: Way) -> Met:
    """Who meets each other and nobody else. Where there is data both ways, both have to meet."""
    near = rows_answer.near | columns_answer.near.T
    rows = np.flatnonzero(np.count_nonzero(near, axis=1) == 1)
    columns = near[rows].argmax(axis=1)
    alone = np.count_nonzero(near, axis=0)[columns] == 1
    alone &= rows_answer.near[rows, columns] | rows_answer.silent[rows]
    alone &= columns_answer.near[columns, rows] | columns_answer.silent[columns]
    rows, columns = rows[alone], columns[alone]
    chances = np.full((2, len(rows)), np.inf)
    for chance, way, answering, asking in (
        (chances[0], rows_answer, rows, columns),
        (chances[1], columns_answer, columns, rows),
    ):
        met = way.near[answering, asking]
        chance[met] = way.spread[answering[met]] * way.strangers / (PSN_MASK + 1)
    return Met(rows, columns, chances)


class Firsts:
    """First PSNs of many directions."""

    def __init__(self, psns: Numbers) -> None:
        known = np.sort(psns[psns >= 0])
        self.count = len(known)
        self._round = np.concatenate((known - PSN_MASK - 1, known, known + PSN_MASK + 1))

    def around(self, psns: Numbers, distance: int) -> Numbers:
        """How many are no farther from each of these than so."""
        upto = np.searchsorted(self._round, psns + distance, "right")
        return upto - np.searchsorted(self._round, psns - distance, "left")


def drawn(psns: Numbers, of_partners: Numbers, of_hosts: Firsts, of_map: Firsts) -> Bools:
    """Whether first PSNs seem to have been drawn, and not chosen alike for all.

    Args:
        psns: first PSNs, one for each meeting.
        of_partners: those of the other direction of the same pairs, -1: it has none.
        of_hosts: those of all directions between the two hosts.
        of_map: those of all directions in the same map.
    """
    seems: Bools = (np.abs(newer(psns, np.zeros_like(psns))) > CHOSEN) & (of_map.around(psns, 0) == 1)
    for distance in CLOSE:
        own = 1 + ((of_partners >= 0) & (np.abs(newer(of_partners, psns)) <= distance))
        usual = _at_most(of_hosts.count * (2 * distance + 1) / (PSN_MASK + 1))
        seems &= of_hosts.around(psns, distance) - own <= usual
    return seems


def _at_most(mean: float) -> int:
    """What a Poisson variable of this mean (at most some hundreds) does not exceed but for CLOSE_CHANCE."""
    count, term = 0, exp(-mean)
    left = 1 - term
    while left > CLOSE_CHANCE:
        count += 1
        term *= mean / count
        left -= term
    return count
