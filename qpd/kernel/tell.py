"""Sets fields of a QP's entry in the kernel, by the program ``tell`` (ebpf/tell.h): no packet's count is undone.

To write an entry from here would put back all its counters, and the moment of its last packet, as they were when it was
read. One run of the program is one system call of microseconds.
"""

from __future__ import annotations

import os
from enum import IntEnum
from pathlib import Path

import numpy as np

from qpd.kernel import bpf, layout
from qpd.kernel.maps import Side
from qpd.model import NO_PATH, Hook, QueuePairKey

_PEER, _HOME, _LIFE, _WATCHED = 1, 2, 4, 8
"""``enum tell_fields`` of maps.h."""
_HEADER = bytes(14)
"""PROG_TEST_RUN takes no less than an Ethernet header."""


class Told(IntEnum):
    """``enum told`` of maps.h. WAITS: the QP is not silent; it moves in its first silence that is long enough."""

    DONE = 0
    WAITS = 1
    NO_ENTRY = 2
    REFUSED = 3
    MALFORMED = 4


class Teller:
    """The pinned program. Close it, once. Raises OSError where it is not there."""

    def __init__(self, pin: Path) -> None:
        self._fd = bpf.obj_get(pin)

    def set_peer(self, key: QueuePairKey, side: Side, peer_qp: int, *, restarts: int | None = None) -> Told:
        """The QP that speaks with this one, from the entry's ``src``; 0: none is known (any more).

        ``restarts``: the entry's, when this was learned. Told.REFUSED: the number has had a new life since.
        """
        fields = _PEER if restarts is None else _PEER | _LIFE
        return self._tell(key, side, fields, peer_qp=peer_qp, restarts=restarts or 0)

    def set_home(self, key: QueuePairKey, path: int, idle: float) -> Told:
        """Give a QP that leaves another home, once it has sent nothing for ``idle`` seconds (at most 4 294).

        Told.REFUSED: the path is not in the QP's group. NO_PATH takes back a wish that still waits. A QP that has been
        silent long enough moves at once (DONE), another in its first such silence (WAITS).
        """
        return self._tell(key, "qps", _HOME, home=path, idle=idle)

    def set_watched(self, key: QueuePairKey, side: Side, watched: bool) -> Told:
        """Whether the entry notes when PSNs come by (ebpf/marks.h); what it has noted is forgotten either way.

        To tell its peer ends it as well.
        """
        return self._tell(key, side, _WATCHED, watched=watched)

    def close(self) -> None:
        """Close the file descriptor; the program stays pinned."""
        os.close(self._fd)

    def _tell(
        self,
        key: QueuePairKey,
        side: Side,
        fields: int,
        *,
        peer_qp: int = 0,
        home: int = NO_PATH,
        idle: float = 0.0,
        restarts: int = 0,
        watched: bool = False,
    ) -> Told:
        record = np.zeros(1, layout.TELL)
        record["key"] = np.frombuffer(layout.pack_qp_key(key), layout.QP_KEY)
        record["hook"] = Hook.STEER if side == "qps" else Hook.OBSERVE
        record["fields"] = fields
        record["peer_qp"], record["home"] = peer_qp, home
        record["idle_us"], record["restarts"] = round(idle * 1e6), restarts
        record["watched"] = watched
        return Told(bpf.prog_test_run(self._fd, _HEADER + record.tobytes(), room=0).retval)
