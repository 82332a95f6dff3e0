"""How many queue pairs there are, are active, and take which path: one pass over the map, for a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.core.current import current_paths
from qpd.kernel.layout import unpack_address
from qpd.kernel.maps import Maps
from qpd.model import NO_GROUP, NO_PATH, PATHS_MAX, SLOTS, Address


@dataclass(frozen=True, slots=True)
class Steering:
    """What decides where packets go, as of one moment; safe to hand to a thread.

    ``usable``: living members as bits, by group id. ``tables``: slot table by group id. ``group_of``: the id of the
    group whose prefix covers an outer destination best, NO_GROUP where none does.
    """

    usable: Mapping[int, int]
    tables: Mapping[int, npt.NDArray[np.uint8]]
    group_of: Callable[[Address], int]

    def bring_up_to_date(self, values: npt.NDArray[Any]) -> None:
        """Set ``path`` and ``group`` of ``struct qp`` records, in place, to what their next packet would get."""
        if not len(values):
            return
        words = np.ascontiguousarray(values["destination"]).view(np.uint64).reshape(len(values), 2)
        high, position = np.unique(words[:, 0], return_inverse=True)
        low, at = np.unique(words[:, 1], return_inverse=True)
        both, position = np.unique(position * len(low) + at, return_inverse=True)
        distinct = np.stack((high[both // len(low)], low[both % len(low)]), axis=1)
        groups = np.array([self.group_of(unpack_address(packed.tobytes())) for packed in distinct], np.uint8)
        values["group"] = groups[position.ravel()]
        values["path"] = current_paths(
            values["home"],
            values["slot"] & SLOTS - 1,
            values["group"],
            usable=self.usable,
            tables=self.tables,
        )


@dataclass(frozen=True, slots=True)
class Census:
    """QPs that leave this node. ``paired``: whose peer is known. ``by_home``, ``by_path``: active ones, by path id."""

    known: int = 0
    active: int = 0
    paired: int = 0
    by_home: Mapping[int, int] = field(default_factory=dict)
    by_path: Mapping[int, int] = field(default_factory=dict)


def take_census(maps: Maps, steering: Steering, now_ns: int, idle_ns: int) -> Census:
    """Count all QPs; active are those that sent within ``idle_ns`` before ``now_ns`` (CLOCK_MONOTONIC)."""
    known = active = paired = 0
    homes = np.zeros(NO_PATH + 1, np.int64)
    paths = np.zeros(NO_PATH + 1, np.int64)
    oldest = max(now_ns - idle_ns, 0)
    for _, chunk in maps.scan():
        known += len(chunk)
        paired += int(np.count_nonzero(chunk["peer_qp"]))
        values = chunk[chunk["last_seen_ns"] >= oldest]
        active += len(values)
        steering.bring_up_to_date(values)
        homes += np.bincount(values["home"], minlength=NO_PATH + 1)
        paths += np.bincount(values["path"], minlength=NO_PATH + 1)
    return Census(known, active, paired, _counts(homes), _counts(paths))


def _counts(numbers: npt.NDArray[np.int64]) -> dict[int, int]:
    return {path: count for path, count in enumerate(numbers[:PATHS_MAX].tolist()) if count}


NOWHERE = Steering({}, {}, lambda _: NO_GROUP)
"""Before anything is known."""
