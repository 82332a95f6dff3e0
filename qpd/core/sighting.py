"""What one look at the kernel's maps shows of queue pairs, and the arithmetic of packet sequence numbers. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qpd.model import NO_PSN

Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]

PSN_MASK = 0xFFFFFF
_PSN_HALF = 1 << 23

SIGHTING = np.dtype(
    [
        ("local", "u8", 2),
        ("remote", "u8", 2),
        ("vni", "u4"),
        ("qp", "u4"),
        ("life", "u8"),
        ("restarts", "u4"),
        ("packets", "u4"),
        ("peer_qp", "u4"),
        ("first_psn", "i4"),
        ("request_psn", "i4"),
        ("answered_psn", "i4"),
        ("read_octets", "u4"),
        ("pmtu", "u1"),
        ("trouble", "u4"),
        ("marks", "u4"),
    ]
)
"""What is known of one direction of a QP at one look.

``local``, ``remote``: the host at this leaf and the other one (16 octets each). ``qp``: the number that its packets
carry, of a QP at ``remote`` where they leave and at ``local`` where they arrive. ``life``: another value means
another QP of the same number; ``restarts``: how often the kernel has seen that in this entry, and ``packets``: of all
its lives, or as many as 32 bits hold. ``peer_qp``: the partner, where it is known already; else 0. ``first_psn``,
``request_psn``: of the first and the newest request of this life; ``answered_psn``: up to where its packets answer the
other direction's requests; -1: none was seen. ``read_octets``: the newest request is a READ of so many octets, and
takes more PSNs than are known; else 0. ``pmtu``: the path MTU of its packets as a power of two; 0: not known.
``trouble``: a count that moves with retransmissions and NAKs. ``marks``: where in the look's marks is when its PSNs
came by, which the kernel notes of those that are watched; 0: it is not.
"""

READ_LEAST = 8
"""The smallest path MTU (256 octets) as a power of two: a READ takes the most PSNs with it."""


_NO_MARKS = np.full((1, 2, 1), NO_PSN, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """When a map was read: CLOCK_MONOTONIC, ns, before the first entry and after the last.

    ``psns``, ``times``: marks of entries that are watched, [entry, requests and answers, class]: PSNs (NO_PSN: none),
    and when each was first asked for, or answered, in units of 256 ns modulo 2^32. The first is nobody's: empty.
    """

    begun_ns: int
    over_ns: int
    psns: npt.NDArray[np.int32] = field(default_factory=_NO_MARKS.copy)
    times: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(_NO_MARKS.shape, np.uint32))


_Psn = TypeVar("_Psn", int, npt.NDArray[Any])


def newer(psn: _Psn, than: _Psn) -> _Psn:
    """How far a PSN is beyond another in 24-bit serial arithmetic: negative where it is older (RFC 1982's way)."""
    distance: _Psn = ((psn - than + _PSN_HALF) & PSN_MASK) - _PSN_HALF
    return distance


def newest_asked(questions: Records, pmtu: int | npt.NDArray[Any] = READ_LEAST) -> Numbers:
    """The newest PSN that may have been asked for, a READ of unknown length in PSNs being one of ``pmtu``."""
    octets = questions["read_octets"].astype(np.int64)
    more: Numbers = np.where(octets > 0, octets - 1 >> pmtu, 0)
    return questions["request_psn"] + more
