"""Typed views of the classifier's pinned maps: the only place where the daemon reads and writes them.

All calls are system calls of microseconds, but ``qps``, ``arrivals``, ``scan`` and ``recount_active``: those read
whole hash maps in chunks (about 1 ms a chunk, with the GIL released) and belong into a thread where QPs are many.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from qpd.kernel import layout
from qpd.kernel.layout import MAPS
from qpd.kernel.table import CHUNK, Records, Table
from qpd.model import (
    NO_PATH,
    PATHS_MAX,
    SLOTS,
    TABLES_MAX,
    Address,
    Group,
    Hook,
    Network,
    NextHopKey,
    Placement,
    QueuePairKey,
)
from qpd.model import (
    Path as UplinkPath,
)

_FAMILY_IPV4, _FAMILY_IPV6 = 2, 10
_NOT_OURS = {"locks", "events"}
"""Locks are the kernel's own affair; the ring is read by kernel/ring.py."""
Side = Literal["qps", "arrivals"]


@dataclass(frozen=True, slots=True)
class PinnedPath:
    """A ``paths`` entry as an earlier daemon wrote it."""

    id: int
    ifindex: int
    interface: str
    next_hop: Address
    sole: bool

    @property
    def key(self) -> NextHopKey:
        """Interface and next hop: what makes it the same path."""
        return NextHopKey(self.interface, self.next_hop)


@dataclass(frozen=True, slots=True)
class PinnedGroup:
    """A ``groups`` entry as an earlier daemon wrote it. ``weights``: path ids to weights."""

    id: int
    weights: Mapping[int, int]
    table: int


@dataclass(frozen=True, slots=True, eq=False)
class Counters:
    """The classifier's counters, summed over CPUs; all uint64, indexed by Hook first."""

    verdicts: npt.NDArray[np.uint64]
    """[Hook, Verdict]"""
    packets: npt.NDArray[np.uint64]
    """[Hook, path id]"""
    bytes: npt.NDArray[np.uint64]
    """[Hook, path id]"""
    faults: Records = field(default_factory=lambda: np.zeros((len(Hook), PATHS_MAX), layout.PATH_FAULTS))
    """[Hook, path id], of type PATH_FAULTS: what QPs counted on the path, by the names that QP has for it"""


@dataclass(frozen=True, slots=True, eq=False)
class RoundTrips:
    """Round-trip times of the requests of each path, since the path has its id; indexed by path id."""

    samples: npt.NDArray[np.uint64]
    sum_ns: npt.NDArray[np.uint64]
    buckets: npt.NDArray[np.uint64]
    """[path id, bucket]; bounds: ``layout.rtt_bounds_ns``"""


@dataclass(frozen=True, slots=True, eq=False)
class Recount:
    """Active QPs that send by path id, and for which paths the count was certain and so written."""

    active: npt.NDArray[np.uint64]
    certain: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TapSession:
    """A BFD session as the kernel's tap knows it. ``detection``: seconds (RFC 5880, 6.8.4), None: not negotiated."""

    detection: float | None
    downs: int
    """How often it left Up or fell silent."""


class Maps:
    """The pinned maps of one layout folder (``Pins.directory``). Close it, or use it in a ``with`` statement.

    Raises OSError where a map is missing and LayoutMismatchError where one has other sizes.
    """

    def __init__(self, directory: Path) -> None:
        self._tables: dict[str, Table] = {}
        try:
            for name, map_layout in MAPS.items():
                if name not in _NOT_OURS:
                    self._tables[name] = Table(directory / name, map_layout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all file descriptors; the maps stay pinned."""
        for table in self._tables.values():
            table.close()

    def __enter__(self) -> Maps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- queue pairs --------------------------------------------------------------------------------------------

    def qps(self) -> Records:
        """All QPs that leave: records with ``key`` (QP_KEY) and ``value`` (QP)."""
        return self._pairs("qps")

    def arrivals(self) -> Records:
        """All QPs that arrive: records with ``key`` (QP_KEY) and ``value`` (QP)."""
        return self._pairs("arrivals")

    def scan(self, side: Side = "qps") -> Iterator[tuple[Records, Records]]:
        """Keys and values in chunks, overwritten by the next step: for whoever needs no whole picture in memory."""
        return self._tables[side].scan()

    def qp(self, key: QueuePairKey, side: Side = "qps") -> np.void | None:
        """One QP's record (QP), or None. A look-up makes it the most recently used."""
        return self._tables[side].get(layout.pack_qp_key(key))

    def qps_max(self) -> int:
        """How many QPs the maps hold in each direction."""
        return self._tables["qps"].entries

    # --- paths, groups, tables, destinations --------------------------------------------------------------------

    def write_path(self, path: UplinkPath) -> None:
        """Write the next hop that this path's id stands for.

        What the BFD tap knows of the path, and its round-trip times, are kept where the next hop is the same, or was
        known for another address of this path, and forgotten where the id goes to another neighbour.
        """
        record = np.zeros(1, layout.PATH)
        record["ifindex"] = path.ifindex
        record["family"] = _FAMILY_IPV4 if path.next_hop.version == 4 else _FAMILY_IPV6
        record["sole"] = path.sole
        record["next_hop"] = np.void(layout.pack_address(path.next_hop))
        record["interface"] = path.interface.encode()
        before = self._tables["paths"].get(path.id)
        if (
            before is not None
            and before["ifindex"] == path.ifindex
            and (
                before["next_hop"] == record["next_hop"][0]
                or self._path_of(path.ifindex, path.next_hop) == path.id
            )
        ):
            record["deadline_ns"] = before["deadline_ns"]
        else:
            self._tables["living"].set(
                layout.LIVING_TAP, np.uint64(self.tap_dead() & ~(1 << path.id)).tobytes()
            )
            self._tables["rtts"].set(path.id, np.zeros(1, layout.PATH_RTT))
        self._tables["paths"].set(path.id, record)

    def erase_path(self, path_id: int) -> None:
        """Clear a path's entry; its id is unused then."""
        self._tables["paths"].set(path_id, np.zeros(1, layout.PATH))

    def paths(self) -> dict[int, PinnedPath]:
        """The paths in use, by id."""
        _, records = self._tables["paths"].all()
        return {
            index: PinnedPath(
                index,
                int(record["ifindex"]),
                record["interface"].decode(errors="replace"),
                layout.unpack_address(bytes(record["next_hop"])),
                bool(record["sole"]),
            )
            for index, record in enumerate(records)
            if record["ifindex"]
        }

    def write_group(self, group: Group) -> None:
        """Write a group's members, weights and slot table."""
        record = np.zeros(1, layout.GROUP)
        record["members"] = group.members
        record["table"] = group.table
        for path, weight in group.weights.items():
            record["weight"][0, path] = weight
        self._tables["groups"].set(group.id, record)

    def erase_group(self, group_id: int) -> None:
        """Clear a group's entry."""
        self._tables["groups"].set(group_id, np.zeros(1, layout.GROUP))

    def groups(self) -> dict[int, PinnedGroup]:
        """The groups in use, by id."""
        _, records = self._tables["groups"].all()
        return {
            index: PinnedGroup(
                index,
                {
                    path: int(record["weight"][path])
                    for path in range(PATHS_MAX)
                    if int(record["members"]) >> path & 1
                },
                int(record["table"]),
            )
            for index, record in enumerate(records)
            if record["members"]
        }

    def write_table(self, table: int, orders: npt.NDArray[np.uint8]) -> None:
        """Write a slot table: uint8[SLOTS, PATHS_MAX], path ids best first, padded with NO_PATH."""
        if orders.shape != (SLOTS, PATHS_MAX) or orders.dtype != np.uint8 or not 0 <= table < TABLES_MAX:
            raise ValueError(
                f"slot table {table}: {orders.dtype}{orders.shape}, not uint8({SLOTS}, {PATHS_MAX})"
            )
        keys = np.arange(table * SLOTS, (table + 1) * SLOTS, dtype=layout.INDEX)
        self._tables["slots"].write(keys, np.ascontiguousarray(orders))

    def table(self, table: int) -> npt.NDArray[np.uint8]:
        """A slot table: uint8[SLOTS, PATHS_MAX]. All zeros: never written."""
        orders = np.empty((SLOTS, PATHS_MAX), np.uint8)
        for keys, values in self._tables["slots"].scan():
            slots = keys.view(layout.INDEX).astype(np.int64) - table * SLOTS
            mine = (slots >= 0) & (slots < SLOTS)
            orders[slots[mine]] = values["path"][mine]
        return orders

    def write_destinations(self, groups: Mapping[Network, int]) -> None:
        """Write prefixes with their group ids. OSError ENOSPC where there are more than DESTINATIONS_MAX."""
        keys = _destination_keys(groups)
        self._tables["destinations"].write(keys, np.fromiter(groups.values(), layout.INDEX, len(groups)))

    def erase_destinations(self, prefixes: Iterable[Network]) -> None:
        """Delete prefixes; those that are not there are passed over."""
        self._tables["destinations"].erase(_destination_keys(list(prefixes)))

    def destinations(self) -> dict[Network, int]:
        """All prefixes with their group ids."""
        keys, values = self._tables["destinations"].all()
        return {layout.unpack_destination(key): int(value) for key, value in zip(keys, values, strict=True)}

    # --- the words of life and of control -----------------------------------------------------------------------

    def living(self) -> int:
        """The daemon's word of living paths."""
        return int.from_bytes(self._tables["living"].octets(layout.LIVING_DAEMON) or b"", sys.byteorder)

    def tap_dead(self) -> int:
        """The paths that the kernel's BFD tap holds down: a bit set for a dead path. Only the kernel writes it."""
        return int.from_bytes(self._tables["living"].octets(layout.LIVING_TAP) or b"", sys.byteorder)

    def set_living(self, word: int) -> None:
        """Set the daemon's word of living paths: one store of 64 bits, seen by the next packet."""
        self._tables["living"].set(layout.LIVING_DAEMON, np.uint64(word).tobytes())

    def usable(self) -> int:
        """The paths that serve: living as the daemon wants it, and not held down by the tap."""
        return self.living() & ~self.tap_dead()

    def set_hold_up(self, seconds: float) -> None:
        """Set how long a BFD session has to be Up before the tap lets its dead path serve again."""
        record = self._control()
        record["hold_up_ns"] = round(seconds * 1e9)
        self._tables["control"].set(0, record)

    def generation(self) -> int:
        """The generation of groups, destinations and tables."""
        return int(self._control()["generation"][0])

    def raise_generation(self) -> int:
        """Tell every cached QP to look its group up again; gives the new generation (never 0)."""
        record = self._control()
        record["generation"] = (int(record["generation"][0]) % 0xFFFFFFFF) + 1
        self._tables["control"].set(0, record)
        return int(record["generation"][0])

    def placement(self) -> Placement:
        """How new QPs are placed."""
        return Placement(int(self._control()["placement"][0]))

    def set_placement(self, placement: Placement) -> None:
        """Set how new QPs are placed; those that have a home keep it."""
        record = self._control()
        record["placement"] = placement
        self._tables["control"].set(0, record)

    def replace_neighbours(self, paths: Mapping[tuple[int, str], int]) -> None:
        """Make the map of (ifindex, MAC) to path id hold exactly these."""
        keys = np.zeros(len(paths), layout.NEIGHBOUR_KEY)
        for record, (ifindex, mac) in zip(keys, paths, strict=True):
            record["ifindex"] = ifindex
            record["mac"] = np.void(layout.pack_mac(mac))
        self._replace("neighbours", keys, paths.values())

    def replace_next_hops(self, paths: Mapping[tuple[int, Address], int]) -> None:
        """Make the map of (ifindex, next hop or BFD peer) to path id hold exactly these."""
        keys = [np.zeros(0, layout.NEIGHBOUR_ADDRESS), *(_neighbour(*at) for at in paths)]
        self._replace("path_of_next_hop", np.concatenate(keys), paths.values())

    def _path_of(self, ifindex: int, address: Address) -> int | None:
        """The id of the path of a next hop or BFD peer."""
        found = self._tables["path_of_next_hop"].octets(_neighbour(ifindex, address).tobytes())
        return None if found is None else int.from_bytes(found, sys.byteorder)

    def next_hops(self) -> dict[tuple[int, Address], int]:
        """(ifindex, next hop or BFD peer) to path id."""
        keys, values = self._tables["path_of_next_hop"].all()
        return {
            (int(key["ifindex"]), layout.unpack_address(bytes(key["address"]))): int(value)
            for key, value in zip(keys, values, strict=True)
        }

    def sessions(self) -> dict[tuple[int, Address], TapSession]:
        """What the BFD tap knows of sessions, by ifindex and peer."""
        keys, values = self._tables["bfd_sessions"].all()
        return {
            (int(key["ifindex"]), layout.unpack_address(bytes(key["address"]))): TapSession(
                int(value["detection_ns"]) / 1e9 or None, int(value["downs"])
            )
            for key, value in zip(keys, values, strict=True)
        }

    def forget_sessions(self, ifindex: int) -> None:
        """Forget what the tap knows of the BFD sessions of an interface that is no uplink any more."""
        table = self._tables["bfd_sessions"]
        keys, _ = table.all()
        table.erase(keys[keys["ifindex"] == ifindex])

    def _replace(self, name: str, keys: Records, values: Collection[int]) -> None:
        """Make a hash map hold exactly these: new ones come before old ones go, where there is room for both."""
        table = self._tables[name]
        wanted = {key.tobytes() for key in keys}
        old, _ = table.all()
        surplus = np.array([key for key in old if key.tobytes() not in wanted], keys.dtype)
        if len(wanted) + len(surplus) > table.entries:
            table.erase(surplus)
            surplus = surplus[:0]
        table.write(keys, np.fromiter(values, layout.INDEX, len(keys)))
        table.erase(surplus)

    def neighbours(self) -> dict[tuple[int, str], int]:
        """(ifindex, MAC) to path id."""
        keys, values = self._tables["neighbours"].all()
        return {
            (int(key["ifindex"]), layout.unpack_mac(bytes(key["mac"]))): int(value)
            for key, value in zip(keys, values, strict=True)
        }

    # --- counters and load --------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """Verdicts by hook, and packets and octets by hook and path, since the maps were made."""
        per_cpu = self._tables["counters"].get_per_cpu(0)
        faults = np.zeros((len(Hook), PATHS_MAX), layout.PATH_FAULTS)
        for name in layout.PATH_FAULTS.names or ():
            faults[name] = per_cpu["faults"][name].sum(axis=0)
        return Counters(
            per_cpu["verdicts"].sum(axis=0),
            per_cpu["path"]["packets"].sum(axis=0),
            per_cpu["path"]["bytes"].sum(axis=0),
            faults,
        )

    def round_trips(self) -> RoundTrips:
        """Round-trip times by path."""
        _, records = self._tables["rtts"].all()
        return RoundTrips(records["samples"], records["sum_ns"], records["buckets"])

    def placed(self) -> npt.NDArray[np.uint64]:
        """QPs that send ever placed, by path id; only the kernel writes it."""
        return self._load("placed")

    def gone(self) -> npt.NDArray[np.uint64]:
        """QPs counted in ``placed`` that are no longer active, by path id; only ``recount_active`` writes it."""
        return self._load("gone")

    def recount_active(self, now_ns: int, idle_ns: int) -> Recount:
        """Count the QPs at home on each path that sent within ``idle_ns``; make ``placed - gone`` that number.

        QPs that have only answered are not among them, as in ``placed``: the entry's ``counted`` tells of both.

        ``now_ns``: CLOCK_MONOTONIC. A path's ``gone`` is written only where nothing was placed on it during the
        scan: else a QP that came meanwhile might be missed, and would be taken for gone until the next count.
        """
        before = self.placed()
        active = np.zeros(PATHS_MAX, np.uint64)
        oldest = max(now_ns - idle_ns, 0)
        for _, values in self._tables["qps"].scan():
            homes = values["home"][(values["last_seen_ns"] >= oldest) & (values["counted"] != 0)]
            active += np.bincount(homes, minlength=NO_PATH + 1)[:PATHS_MAX].astype(np.uint64)
        certain = self.placed() == before
        gone = np.maximum(before, active) - active
        changed = np.flatnonzero(certain & (gone != self.gone()))
        if len(changed):
            self._tables["gone"].write(changed.astype(layout.INDEX), gone[changed])
        return Recount(active, certain)

    def _control(self) -> Records:
        return np.frombuffer(bytearray(self._tables["control"].octets(0) or b""), layout.CONTROL)

    def _load(self, name: str) -> npt.NDArray[np.uint64]:
        _, values = self._tables[name].all()
        qps: npt.NDArray[np.uint64] = values["qps"]
        return qps

    def _pairs(self, side: Side) -> Records:
        pair = np.dtype([("key", layout.QP_KEY), ("value", layout.QP)])
        records = np.empty(CHUNK, pair)
        filled = 0
        for keys, values in self._tables[side].scan():
            if filled + len(keys) > len(records):
                # In place: 100 000 QPs are 11 MB, and joining chunks would need that twice.
                records.resize(max(2 * len(records), filled + len(keys)), refcheck=False)
            records["key"][filled : filled + len(keys)] = keys
            records["value"][filled : filled + len(keys)] = values
            filled += len(keys)
        records.resize(filled, refcheck=False)
        return records


def _destination_keys(prefixes: Iterable[Network]) -> Records:
    return np.array([layout.pack_destination(prefix) for prefix in prefixes], layout.DESTINATION_KEY)


def _neighbour(ifindex: int, address: Address) -> Records:
    """The key of a next hop or BFD peer, as an array of one."""
    return np.array([(ifindex, layout.pack_address(address))], layout.NEIGHBOUR_ADDRESS)
