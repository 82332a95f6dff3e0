"""Who belongs together for certain, from who may: what is the same in every way to give each his own. Pure."""

from __future__ import annotations

import numpy as np

from qpd.core.sighting import Bools


def certain(possible: Bools, rows: Bools, columns: Bools) -> Bools:
    """Pairs that must be, as far as sets of few candidates tell; all False where there is no way at all.

    Not all that follow: to look through all sets of rows would take too long.

    Args:
        possible: [row, column], not changed.
        rows: those that are sure to have a column; others may have none.
        columns: those that are sure to have a row.
    """
    left = possible.copy()
    before = -1
    while before != (before := int(np.count_nonzero(left))):
        _narrow(left, rows)
        _narrow(left.T, columns)
        if not (left[rows].any(axis=1).all() and left[:, columns].any(axis=0).all()):
            return np.zeros_like(left)
    alone_in_row, alone_in_column = left.sum(axis=1) == 1, left.sum(axis=0) == 1
    pairs: Bools = left & alone_in_row[:, None] & alone_in_column & (rows[:, None] | columns)
    return pairs


def _narrow(left: Bools, claims: Bools) -> None:
    """Where all candidates of some k rows are k columns, leave these columns to them (Hall, 1935).

    Such sets are looked for among the rows with the fewest candidates, one more each time.
    """
    order = np.flatnonzero(claims & left.any(axis=1))
    order = order[np.argsort(left[order].sum(axis=1), kind="stable")]
    reach = np.logical_or.accumulate(left[order], axis=0)
    full = np.flatnonzero(reach.sum(axis=1) == np.arange(1, len(order) + 1))
    if not len(full):
        return
    of_rows, of_columns = np.full(len(left), -1), np.full(left.shape[1], -1)
    of_rows[order] = np.searchsorted(full, np.arange(len(order)))
    owned = reach[full].any(axis=0)
    of_columns[owned] = reach[full][:, owned].argmax(axis=0)
    left &= (of_rows[:, None] == of_columns) | ~owned
