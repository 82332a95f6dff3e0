"""Learns who speaks with whom from the kernel's maps, tells the kernel, and puts answers on their requests' planes.

:meth:`PairKeeper.look` reads both maps and belongs into a thread; everything else is for the event loop. What is known
is kept in the entries themselves (``peer_qp``), so a new daemon goes on where the last one was.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpd.core.cm import CmBook, Connection
from qpd.core.pairing import Entry, Found, Pair, Pairing, QpName
from qpd.core.sighting import SIGHTING, Look, Records
from qpd.core.symmetry import Directions, follow
from qpd.kernel import layout, marks
from qpd.kernel.maps import Maps, Side
from qpd.kernel.tell import Teller, Told
from qpd.model import NO_PATH, CmMessage, Path, QueuePairKey, Tell

_LOWEST_QP = 2
"""QPs 0 and 1 are for management."""
_TICKS = 0.008
"""The kernel's coarse clock may be two timer ticks late."""
_UNSEEN_MAX = 4096

_PLACE = np.dtype([("home", "u1"), ("wish", "u1"), ("path", "u1"), ("moves", "u4")])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a look has done. ``busy``: another one soon may tell more."""

    busy: bool = False
    events: tuple[Tell, ...] = ()


class PairKeeper:
    """Pairs of one node. ``clock``: CLOCK_MONOTONIC, ns."""

    def __init__(
        self,
        maps: Maps,
        teller: Teller,
        *,
        symmetric: bool,
        idle: float,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._maps = maps
        self._clock = clock
        self._teller = teller
        self._symmetric = symmetric
        self._idle = idle + _TICKS
        self._pairing = Pairing()
        self._cm = CmBook()
        self._heard: deque[CmMessage] = deque(maxlen=_UNSEEN_MAX)
        self._unseen: dict[Connection, None] = {}
        """Connections of which an entry is missing still."""
        self._arriving_first = True

    def hear(self, message: CmMessage) -> None:
        """Take a message of the connection manager; it counts with the next look."""
        self._heard.append(message)

    def close(self) -> None:
        """Nobody is watched any more: nobody looks."""
        for entry in self._pairing.watched():
            self._teller.set_watched(*_placed_at(entry), False)

    def look(self, paths: Sequence[Path]) -> Outcome:
        """Read both maps once, and act on what they tell. ``paths``: all that are known."""
        self._connect()
        first: Side = "arrivals" if self._arriving_first else "qps"
        self._arriving_first = not self._arriving_first
        read = {
            side: self._read(side)
            for side in (("arrivals", "qps") if first == "arrivals" else ("qps", "arrivals"))
        }
        arriving, leaving = read["arrivals"], read["qps"]
        found = self._pairing.observe(arriving[0], leaving[0], (arriving[2], leaving[2]))
        self._tell(found)
        waits = self._follow(arriving, leaving, paths) if self._symmetric else False
        events = tuple(Tell("pair-contradicted", _described(pair)) for pair in found.ended)
        return Outcome(self._pairing.at_work or bool(self._unseen) or waits, events)

    # --- the connection manager -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        while self._heard:
            change = self._cm.take(self._heard.popleft())
            for ended in change.ended:
                self._unseen.pop(ended, None)
                self._set_both(ended, connected=False)
            if change.made is not None:
                self._unseen[change.made] = None
        while len(self._unseen) > _UNSEEN_MAX:
            del self._unseen[next(iter(self._unseen))]
        for connection in list(self._unseen):
            if self._set_both(connection, connected=True):
                del self._unseen[connection]

    def _set_both(self, connection: Connection, *, connected: bool) -> bool:
        """False: an entry is missing; then neither is set."""
        near, far = connection.near, connection.far
        peers = (far.dest_qp, near.dest_qp) if connected else (0, 0)
        if self._teller.set_peer(near, "arrivals", peers[0]) is not Told.DONE:
            return False
        if self._teller.set_peer(far, "qps", peers[1]) is Told.DONE:
            return True
        self._teller.set_peer(near, "arrivals", 0)
        return False

    # --- the maps ---------------------------------------------------------------------------------------------------

    def _read(self, side: Side) -> tuple[Records, npt.NDArray[np.void], Look]:
        """All reliable connections of one map, where they go, and when they were read."""
        begun = self._clock()
        sightings, places = [np.zeros(0, SIGHTING)], [np.zeros(0, _PLACE)]
        # The first is nobody's, as in Look.
        watched, count = [np.zeros(1, layout.QP)], 1
        for keys, values in self._maps.scan(side):
            spoke = (values["next_psn"] | values["acked_psn"]) & layout.PSN_KNOWN != 0
            # The service whose answers tell.
            reliable = values["transport"] == layout.Transport.RC
            wanted = np.flatnonzero(spoke & reliable & (keys["dest_qp"] >= _LOWEST_QP))
            if len(wanted):
                sightings.append(_sighted(keys[wanted], values[wanted], side))
                chosen = np.flatnonzero(values["slot"][wanted] & layout.SLOT_WATCHED)
                sightings[-1]["marks"][chosen] = np.arange(count, count + len(chosen))
                watched.append(values[wanted[chosen]])
                count += len(chosen)
                places.append(_placed(values[wanted]))
        look = Look(begun, self._clock(), *marks.read(np.concatenate(watched)))
        return np.concatenate(sightings), np.concatenate(places), look

    def _tell(self, found: Found) -> None:
        for pair in found.ended:
            self._teller.set_peer(_named(pair.near), "arrivals", 0)
            self._teller.set_peer(_named(pair.far), "qps", 0)
        for half in found.halves:
            self._teller.set_peer(*_placed_at(half), 0)
        for entry in found.unwatch:
            self._teller.set_watched(*_placed_at(entry), False)
        # Before pairs are stated, since whose partner is known is not watched.
        for entry in found.watch:
            self._teller.set_watched(*_placed_at(entry), True)
        for pair in found.stated:
            self._state(pair)

    def _state(self, pair: Pair) -> None:
        """Unless one of the numbers has had a new life since the look."""
        near, far = _named(pair.near), _named(pair.far)
        if self._teller.set_peer(near, "arrivals", pair.far.qp, restarts=pair.restarts[0]) is not Told.DONE:
            return
        if self._teller.set_peer(far, "qps", pair.near.qp, restarts=pair.restarts[1]) is not Told.DONE:
            self._teller.set_peer(near, "arrivals", 0)

    def _follow(
        self,
        arriving: tuple[Records, npt.NDArray[np.void], Look],
        leaving: tuple[Records, npt.NDArray[np.void], Look],
        paths: Sequence[Path],
    ) -> bool:
        """Move answers to their requests' planes; True: some have to wait for a silence."""
        near, far = self._pairing.known
        pairs = Directions(
            near=arriving[0]["local"][near].view(np.uint8).reshape(-1, 16),
            near_qp=arriving[0]["qp"][near],
            far=leaving[0]["remote"][far].view(np.uint8).reshape(-1, 16),
            far_qp=leaving[0]["qp"][far],
            asks=leaving[0]["request_psn"][far] >= 0,
            asked=arriving[0]["request_psn"][near] >= 0,
            home=leaving[1]["home"][far],
            wish=leaving[1]["wish"][far],
            arrives=arriving[1]["path"][near],
            moves=arriving[1]["moves"][near],
        )
        waits = False
        for one in follow(pairs, paths):
            record = leaving[0][far[one.index]]
            name = QpName(int(record["vni"]), record["remote"].tobytes(), int(record["qp"]))
            waits |= self._teller.set_home(_named(name), one.path, self._idle) is Told.WAITS
        return waits


def _sighted(keys: Records, values: Records, side: Side) -> Records:
    sighted = np.zeros(len(keys), SIGHTING)
    ends = ("dst", "src") if side == "arrivals" else ("src", "dst")
    for name, field in zip(("local", "remote"), ends, strict=True):
        addresses = keys[field] if field == "dst" else values[field]
        sighted[name] = np.ascontiguousarray(addresses).view(np.uint64).reshape(-1, 2)
    sighted["vni"], sighted["qp"] = keys["vni"], keys["dest_qp"]
    # The odd factor spreads the restarts over all bits: another life is another number.
    sighted["life"] = values["first_seen_ns"] ^ values["restarts"].astype(np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    sighted["restarts"] = values["restarts"]
    sighted["packets"] = np.minimum(values["packets"], 0xFFFFFFFF)
    sighted["peer_qp"] = values["peer_qp"]
    sighted["request_psn"] = _psn(values["next_psn"], 1)
    asked = values["next_psn"] & layout.PSN_KNOWN != 0
    sighted["first_psn"] = np.where(asked, _psn(values["first_psn"], 0), -1)
    sighted["read_octets"] = np.where(values["next_psn"] & layout.STREAM_READ, values["read_octets"], 0)
    sighted["pmtu"] = values["pmtu"]
    sighted["answered_psn"] = _psn(values["acked_psn"], 0)
    for counter in ("retransmitted", "go_backs", "naks_sequence", "naks_rnr", "naks_remote"):
        sighted["trouble"] += values[counter]
    return sighted


def _psn(words: npt.NDArray[np.uint32], less: int) -> npt.NDArray[np.int64]:
    psns = (words.astype(np.int64) - less) & layout.PSN_MASK
    return np.where(words & layout.PSN_KNOWN, psns, -1)


def _placed(values: Records) -> npt.NDArray[np.void]:
    placed = np.zeros(len(values), _PLACE)
    placed["home"], placed["path"], placed["moves"] = values["home"], values["path"], values["moves"]
    placed["wish"] = np.where(values["wish"] == 0, NO_PATH, values["wish"] - np.uint8(1))
    return placed


def _placed_at(entry: Entry) -> tuple[QueuePairKey, Side]:
    return _named(entry.name), "arrivals" if entry.arrives else "qps"


def _named(name: QpName) -> QueuePairKey:
    return QueuePairKey(name.vni, layout.unpack_address(name.host), name.qp)


def _described(pair: Pair) -> dict[str, object]:
    near, far = _named(pair.near), _named(pair.far)
    return {
        "vni": near.vni,
        "near": str(near.dst),
        "near_qp": near.dest_qp,
        "far": str(far.dst),
        "far_qp": far.dest_qp,
    }
