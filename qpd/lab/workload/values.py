"""The numbers that are reduced: what each rank brings in each iteration, and what their sum must be. Pure.

32-bit integers whose sum wraps: exact whatever the order, and each depends on its position, so that no part can stand
in for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ELEMENT = 4
"""Bytes."""
_BY_POSITION, _BY_RANK, _BY_ITERATION = 2654435761, 40503, 2246822519
_MASK = 0xFFFFFFFF

Values = npt.NDArray[np.uint32]


def _line(begin: int, end: int, slope: int, constant: int) -> Values:
    made = np.arange(begin, end, dtype=np.uint32)
    made *= np.uint32(slope & _MASK)
    made += np.uint32(constant & _MASK)
    return made


def contribution(rank: int, iteration: int, begin: int, end: int) -> Values:
    """What a rank brings for elements [begin, end)."""
    return _line(begin, end, _BY_POSITION, rank * _BY_RANK + iteration * _BY_ITERATION)


def total(ranks: Sequence[int], iteration: int, begin: int, end: int) -> Values:
    """The sum of what these ranks bring."""
    count = len(ranks)
    return _line(begin, end, count * _BY_POSITION, sum(ranks) * _BY_RANK + count * iteration * _BY_ITERATION)
