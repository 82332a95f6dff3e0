"""Both directions of a queue pair on one plane, without a word between the leaves. Pure.

Of a pair one direction leads, and both ends know which: the one that has requests where the other only answers, so that
data stay where they were placed; where both have, that of the lesser end (by host, then QP). The leaf at the other end
sees on which plane it arrives, and moves the answer there. It is moved at most once: only after a leading direction
that has never changed its path, so its home. The move itself is the kernel's, in the first silence of the QP that is
long enough for nothing of it to be under way (``struct tell`` of maps.h): no packet overtakes another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpd.model import NO_PATH, Path, PathState


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """Known pairs, one an index. Hosts: uint8[n, 16], network byte order.

    ``near``, ``near_qp``: the end at this leaf; ``far``, ``far_qp``: the other. ``asks``: whether the direction that
    leaves has shown requests; ``asked``: whether the other has. ``home``: path id of the direction that leaves;
    ``wish``: path id that it waits to move to, NO_PATH for none. ``arrives``: path id by which the other direction
    comes, NO_PATH where that is not known; ``moves``: how often it has changed.
    """

    near: npt.NDArray[np.uint8]
    near_qp: npt.NDArray[np.uint32]
    far: npt.NDArray[np.uint8]
    far_qp: npt.NDArray[np.uint32]
    asks: npt.NDArray[np.bool_]
    asked: npt.NDArray[np.bool_]
    home: npt.NDArray[np.uint8]
    wish: npt.NDArray[np.uint8]
    arrives: npt.NDArray[np.uint8]
    moves: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Follow:
    """The direction that leaves of pair number ``index`` belongs to this path."""

    index: int
    path: int


def leads(pairs: Directions) -> npt.NDArray[np.bool_]:
    """Whether the direction that leaves here leads: it alone has requests, or its sender is the lesser end."""
    size = len(pairs.near_qp)
    ends = np.zeros((2, size, 20), np.uint8)
    for end, host, qp in ((0, pairs.near, pairs.near_qp), (1, pairs.far, pairs.far_qp)):
        ends[end, :, :16] = host
        ends[end, :, 16:] = np.ascontiguousarray(qp.astype(">u4")).view(np.uint8).reshape(size, 4)
    differs = ends[0] != ends[1]
    at = differs.argmax(axis=1)
    index = np.arange(size)
    first: npt.NDArray[np.bool_] = ends[0, index, at] < ends[1, index, at]
    lesser = first & differs.any(axis=1)
    leading: npt.NDArray[np.bool_] = np.where(pairs.asks == pairs.asked, lesser, pairs.asks)
    return leading


def follow(pairs: Directions, paths: Sequence[Path]) -> list[Follow]:
    """Which answers have to be moved: those whose home is on another plane than what they answer arrives on.

    Only to paths that serve. Where several share the plane, QPs spread over them by their numbers.
    """
    if not len(pairs.near_qp):
        return []
    planes = sorted({path.plane for path in paths})
    plane_of = np.full(NO_PATH + 1, -1, np.int64)
    serving: Mapping[int, list[int]] = {number: [] for number in range(len(planes))}
    for path in sorted(paths, key=lambda path: path.id):
        number = planes.index(path.plane)
        plane_of[path.id] = number
        if path.state is PathState.UP:
            serving[number].append(path.id)
    here, there = plane_of[pairs.home], plane_of[pairs.arrives]
    other = (here >= 0) & (there >= 0) & (here != there)
    asked = plane_of[pairs.wish] == there
    moving = np.flatnonzero(other & ~asked & (pairs.moves == 0) & ~leads(pairs))
    found = []
    for index in moving.tolist():
        choice = serving[int(there[index])]
        if choice:
            found.append(Follow(index, choice[int(pairs.near_qp[index]) % len(choice)]))
    return found
