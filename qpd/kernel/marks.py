"""What the times of PSNs in entries mean (ebpf/marks.h): which PSN each is of, and whether it can be believed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qpd.kernel import layout
from qpd.model import NO_PSN

Psns = npt.NDArray[np.int32]
Times = npt.NDArray[np.uint32]

_ODD = 1 << np.array(layout.MARK_EXPONENTS, np.int64)


def read(values: npt.NDArray[np.void]) -> tuple[Psns, Times]:
    """PSNs and when they were first [asked for, answered], by entry and class.

    Args:
        values: array of ``layout.QP``.

    Returns:
        Two arrays [entry, 2, class]: the PSN, NO_PSN where none is known, and CLOCK_MONOTONIC in units of 256 ns,
        modulo 2^32.
    """
    asked = _of(values["next_psn"], 1, values["asked_at"])
    answered = _of(values["acked_psn"], 0, values["answered_at"])
    return np.stack((asked, answered), axis=1), np.stack((values["asked_at"], values["answered_at"]), axis=1)


def _of(words: npt.NDArray[np.uint32], less: int, times: Times) -> Psns:
    """The newest PSN of each class, where it has a time; ``words``: with PSN_KNOWN, the newest PSN and ``less``."""
    newest = (words.astype(np.int64) - less & layout.PSN_MASK)[:, None]
    back = (newest - _ODD) % (2 * _ODD)
    known = (words & layout.PSN_KNOWN != 0)[:, None] & (times != 0)
    # The newest PSN has the latest time. Else the entry changed while it was read.
    last = np.where(known, back, layout.PSN_MASK).argmin(axis=1)
    latest = np.take_along_axis(times, last[:, None], axis=1)
    known &= (((latest - times).astype(np.int32) >= 0) | ~known).all(axis=1)[:, None]
    return np.where(known, newest - back & layout.PSN_MASK, NO_PSN).astype(np.int32)
