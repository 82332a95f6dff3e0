"""The node as the API and Prometheus see it: the planner's picture joined with what the kernel has counted."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Literal, Protocol

import numpy as np

import qpd
from qpd.api.events import EventRing, rfc3339
from qpd.api.explain import Case, explain
from qpd.api.queries import ExplainQuery, QpFilter
from qpd.api.rows import QpTable, rows, select, stream, top
from qpd.api.schemas import BfdInfo, Explanation, GroupRow, PathRow, QpRow, StatusInfo, UplinkRow
from qpd.api.state import QueryError, UnknownPath
from qpd.census import NOWHERE, Census, Steering, take_census
from qpd.core.planner import Planner
from qpd.core.slots import qp_hash, slot_of
from qpd.kernel.layout import QP_KEY, pack_qp_key, unpack_address
from qpd.kernel.maps import Counters, Maps, RoundTrips, TapSession
from qpd.metrics import (
    BfdSample,
    Distribution,
    FaultSample,
    MetricsSnapshot,
    NeverFalling,
    PathSample,
    QpSample,
)
from qpd.model import (
    NO_GROUP,
    Address,
    BfdSession,
    BfdState,
    DrainAsked,
    Event,
    Hook,
    Path,
    PathState,
    Placement,
    QueuePairKey,
    Verdict,
)
from qpd.rtt import Recent, distribution, quantile_ns
from qpd.settings import Settings

_SMALL = 4096
"""So many QPs are counted when somebody asks (2 ms); of more, the last census is shown."""


class Rooms(Protocol):
    """What the view reads of the rest of the daemon."""

    planner: Planner
    maps: Maps
    settings: Settings
    attached: Mapping[int, Literal["tcx", "clsact"]]
    """By ifindex."""

    @property
    def events(self) -> EventRing:
        """The history."""
        ...

    @property
    def failovers(self) -> Mapping[str, Counter[str]]:
        """Path name to cause to times."""
        ...

    def handle(self, event: Event) -> None:
        """Give an event to the planner and carry out what follows."""
        ...

    def troubles(self) -> list[str]:
        """What the operator should mend, one sentence each."""
        ...

    def frr(self) -> Mapping[str, bool]:
        """FRR daemon to whether it answers."""
        ...

    def overrides(self) -> int:
        """Routes in qpd's own table."""
        ...

    def resyncs(self) -> int:
        """Times that the kernel's state was read anew because events were lost."""
        ...

    def reactions(self) -> Distribution | None:
        """Seconds from events that changed which paths live to the change applied."""
        ...


@dataclass
class View:
    """The :class:`qpd.api.state.State` of a running daemon."""

    rooms: Rooms
    started: float = field(default_factory=time.time)
    steering: bool = False
    """True once the first full picture of the kernel has been applied."""
    census: Census = field(default_factory=Census)
    _recent: Recent = field(default_factory=Recent)
    _never_falling: NeverFalling = field(default_factory=NeverFalling)

    # --- what the API asks

    @property
    def events(self) -> EventRing:
        """The history, which the daemon writes."""
        return self.rooms.events

    def status(self) -> StatusInfo:
        """The node at a glance."""
        rooms = self.rooms
        paths = rooms.planner.paths
        census = self._census()
        counters = rooms.maps.counters()
        return {
            "state": "steering" if self.steering else "starting",
            "node": rooms.settings.node,
            "version": qpd.__version__,
            "pid": os.getpid(),
            "started": rfc3339(self.started),
            "uptime_s": round(time.time() - self.started, 3),
            "placement": rooms.settings.placement,
            "pin_dir": str(rooms.settings.bpf.pin_dir),
            "uplinks": self._uplinks(),
            "paths": {"total": len(paths), "up": sum(path.state is PathState.UP for path in paths)},
            "groups": len(rooms.planner.groups),
            "destinations": sum(len(group.destinations) for group in rooms.planner.groups),
            "qps": {"known": census.known, "active": census.active, "max": rooms.maps.qps_max()},
            "failovers": sum(causes.total() for causes in rooms.failovers.values()),
            "overrides": rooms.overrides(),
            "frr": dict(rooms.frr()),
            "verdicts": _verdicts(counters),
            "warnings": rooms.troubles(),
        }

    def paths(self) -> list[PathRow]:
        """All paths, by id."""
        census, counters, now = self._census(), self.rooms.maps.counters(), time.monotonic()
        out, in_ = (_faults(counters, hook) for hook in Hook)
        counted = self.rooms.maps.round_trips()
        trips = {path.id: self._recent.of(path.id, counted) for path in self.rooms.planner.paths}
        return [
            {
                "id": path.id,
                "name": path.name,
                "interface": path.interface,
                "next_hop": str(path.next_hop),
                "plane": path.plane,
                "weight": path.weight,
                "state": path.state.value,
                "reason": path.reason.value,
                "qps": census.by_path.get(path.id, 0),
                "packets": int(counters.packets[Hook.STEER, path.id]),
                "bytes": int(counters.bytes[Hook.STEER, path.id]),
                "lost": out[path.id].lost,
                "rtt_us": _microseconds(quantile_ns(trips[path.id], 0.5)),
                "bfd": self._bfd(path),
                "homes": census.by_home.get(path.id, 0),
                "packets_in": int(counters.packets[Hook.OBSERVE, path.id]),
                "bytes_in": int(counters.bytes[Hook.OBSERVE, path.id]),
                "since_s": round(max(0.0, now - path.since), 3),
                "lost_in": in_[path.id].lost,
                "lost_at_host": out[path.id].lost_at_host + in_[path.id].lost_at_host,
                "retransmitted": out[path.id].retransmitted,
                "out_of_order_in": in_[path.id].out_of_order,
                "ecn_marked_in": in_[path.id].ecn_marked,
                "rtt_p99_us": _microseconds(quantile_ns(trips[path.id], 0.99)),
                "rtt_samples": int(trips[path.id].sum()),
                "gray": path.gray,
            }
            for path in self.rooms.planner.paths
        ]

    def groups(self) -> list[GroupRow]:
        """All groups, by id."""
        paths = {path.id: path for path in self.rooms.planner.paths}
        return [
            {
                "id": group.id,
                "table": group.table,
                "members": [
                    {"path": paths[id_].name, "weight": weight, "state": paths[id_].state.value}
                    for id_, weight in sorted(group.weights.items())
                    if id_ in paths
                ],
                "destinations": [str(prefix) for prefix in group.destinations],
            }
            for group in self.rooms.planner.groups
        ]

    async def qps(self, wanted: QpFilter) -> AsyncIterator[list[QpRow]]:
        """The wanted QPs, with the path that each one's next packet takes."""
        path = None if wanted.path is None else self._named(wanted.path).id
        async for chunk in stream(self._parts(wanted.direction), wanted, path):
            yield chunk

    async def explain(self, query: ExplainQuery) -> Explanation:
        """Why a QP uses its path, or which one it would use."""
        seen = await asyncio.to_thread(_seen, self._parts("out"), query)
        row, home, counted, reverse = None, None, True, None
        if seen is None:
            networks = await asyncio.to_thread(_networks, self._parts("out"), query.dst)
            key, destination = _unseen(query, networks)
        else:
            key = QueuePairKey(int(seen.keys["vni"][0]), query.dst, query.qp)
            destination = unpack_address(bytes(seen.values["destination"][0]))
            home, counted = int(seen.values["home"][0]), bool(seen.values["counted"][0])
            row = rows(seen, np.arange(1))[0]
            reverse = self._reverse(row)
        planner = self.rooms.planner
        found = planner.explain_destination(destination)
        placed, gone = self.rooms.maps.placed(), self.rooms.maps.gone()
        paths = {path.id: path for path in planner.paths}
        return explain(
            Case(
                key=key,
                destination=destination,
                prefix=None if found is None else found.prefix,
                group=None if found is None else found.group,
                order=[] if found is None else found.orders[slot_of(qp_hash(key))].tolist(),
                paths=paths,
                living=self.rooms.maps.usable(),
                homes={id_: int(placed[id_]) - int(gone[id_]) for id_ in paths},
                placement=Placement[self.rooms.settings.placement.upper()],
                row=row,
                home_id=home,
                counted=counted,
                reverse=reverse,
            )
        )

    async def drain(self, name: str, drain: bool) -> PathRow:
        """Take a path out of service or put it back."""
        path = self._named(name)
        self.rooms.handle(DrainAsked(path.name, drain))
        return next(row for row in self.paths() if row["id"] == path.id)

    async def metrics(self) -> MetricsSnapshot:
        """All that Prometheus sees, at one moment."""
        rooms = self.rooms
        census, counters = self._census(), rooms.maps.counters()
        most = rooms.settings.metrics.qp_series_max
        qps = await asyncio.to_thread(_busiest, self._parts("out"), most) if most else ()
        paths = self.rooms.planner.paths
        faults, trips = [_faults(counters, hook) for hook in Hook], rooms.maps.round_trips()
        tapped = rooms.maps.sessions()
        sessions = [
            (path, session) for path in paths if (session := self.rooms.planner.session_of(path)) is not None
        ]
        return MetricsSnapshot(
            version=qpd.__version__,
            node=rooms.settings.node,
            placement=rooms.settings.placement,
            paths=self._never_falling.paths(
                replace(
                    self._sample(path, census, counters),
                    faults_out=faults[Hook.STEER][path.id],
                    faults_in=faults[Hook.OBSERVE][path.id],
                    rtt=_distribution(trips, path.id),
                )
                for path in paths
            ),
            bfd_sessions=tuple(self._bfd_sample(path, session, tapped) for path, session in sessions),
            verdicts={
                (hook, verdict): count
                for hook, verdicts in _verdicts(counters).items()
                for verdict, count in verdicts.items()
            },
            busiest=self._never_falling.qps(qps),
            qps_known=census.known,
            qps_active=census.active,
            qps_paired=census.paired,
            qps_max=rooms.maps.qps_max(),
            groups=len(rooms.planner.groups),
            destinations=sum(len(group.destinations) for group in rooms.planner.groups),
            overrides=rooms.overrides(),
            uplinks={row["name"]: row["attach"] is not None for row in self._uplinks()},
            frr=rooms.frr(),
            resyncs=rooms.resyncs(),
            reactions=rooms.reactions(),
        )

    # --- what the daemon asks

    def steering_now(self) -> Steering:
        """What decides where packets go at this moment."""
        planner = self.rooms.planner
        if not self.steering:
            return NOWHERE
        living = self.rooms.maps.usable()

        def group_of(destination: Address) -> int:
            found = planner.explain_destination(destination)
            return NO_GROUP if found is None else found.group.id

        return Steering(
            {group.id: group.members & living for group in planner.groups},
            {group.id: planner.orders(group.table) for group in planner.groups},
            group_of,
        )

    def count(self, steering: Steering) -> None:
        """Take the census; for a thread, with the steering of the moment."""
        self.census = take_census(self.rooms.maps, steering, time.monotonic_ns(), self._idle_ns())
        self._recent.take(time.monotonic(), self.rooms.maps.round_trips())

    # --- helpers

    def _census(self) -> Census:
        if self.census.known <= _SMALL:
            self.count(self.steering_now())
        return self.census

    def _idle_ns(self) -> int:
        return int(self.rooms.settings.idle_after * 1e9)

    def _named(self, name: str) -> Path:
        paths = self.rooms.planner.paths
        for path in paths:
            if path.name == name:
                return path
        raise UnknownPath(name, tuple(path.name for path in paths))

    def _reverse(self, row: QpRow) -> QpRow | None:
        """The other direction of a QP that leaves, where it is known and has arrived."""
        if row["peer_qp"] is None:
            return None
        key = QueuePairKey(row["vni"], ip_address(row["src"]), row["peer_qp"])
        record = self.rooms.maps.qp(key, "arrivals")
        if record is None:
            return None
        keys = np.frombuffer(pack_qp_key(key), QP_KEY)
        names = {path.id: path.name for path in self.rooms.planner.paths}
        arrived = QpTable(keys, np.array([record]), names, time.monotonic_ns(), self._idle_ns(), "in")
        return rows(arrived, np.arange(1))[0]

    def _bfd(self, path: Path) -> BfdInfo | None:
        session = self.rooms.planner.session_of(path)
        if session is None:
            return None
        remote = session.remote_state
        return {
            "state": session.state.name.lower().replace("_", "-"),
            "remote_state": None if remote is None else remote.name.lower().replace("_", "-"),
            "detection_time_s": session.detection_time,
            "diagnostic": session.diagnostic,
        }

    def _uplinks(self) -> list[UplinkRow]:
        attached = self.rooms.attached
        return [
            {"name": link.name, "ifindex": link.ifindex, "up": link.up, "attach": attached.get(link.ifindex)}
            for link in self.rooms.planner.uplinks
        ]

    @staticmethod
    def _bfd_sample(
        path: Path, session: BfdSession, tapped: Mapping[tuple[int, Address], TapSession]
    ) -> BfdSample:
        heard = tapped.get((path.ifindex, session.peer))
        detection = session.detection_time
        return BfdSample(
            path=path.name,
            interface=path.interface,
            peer=str(session.peer),
            up=session.state is BfdState.UP,
            detection_seconds=heard.detection if heard is not None and detection is None else detection,
            downs=None if heard is None else heard.downs,
        )

    def _sample(self, path: Path, census: Census, counters: Counters) -> PathSample:
        return PathSample(
            name=path.name,
            interface=path.interface,
            next_hop=str(path.next_hop),
            plane=path.plane,
            state=path.state.value,
            weight=path.weight,
            qps=census.by_path.get(path.id, 0),
            homes=census.by_home.get(path.id, 0),
            gray=path.gray,
            packets_out=int(counters.packets[Hook.STEER, path.id]),
            bytes_out=int(counters.bytes[Hook.STEER, path.id]),
            packets_in=int(counters.packets[Hook.OBSERVE, path.id]),
            bytes_in=int(counters.bytes[Hook.OBSERVE, path.id]),
            failovers=dict(self.rooms.failovers.get(path.name, {})),
        )

    def _parts(self, direction: Literal["out", "in"]) -> Iterator[QpTable]:
        """The QPs of one direction, part by part; those that leave with the path of their next packet.

        What decides is that of the moment of the call; the reading may go on in a thread.
        """
        steering = self.steering_now()
        names = {path.id: path.name for path in self.rooms.planner.paths}
        return self._read(direction, steering, names)

    def _read(
        self, direction: Literal["out", "in"], steering: Steering, names: Mapping[int, str]
    ) -> Iterator[QpTable]:
        for keys, values in self.rooms.maps.scan("qps" if direction == "out" else "arrivals"):
            if direction == "out":
                steering.bring_up_to_date(values)
            yield QpTable(keys, values, names, time.monotonic_ns(), self._idle_ns(), direction)


def _faults(counters: Counters, hook: Hook) -> list[FaultSample]:
    """What went wrong with the packets of one direction, by path id.

    A gap here tells of a loss before this leaf, a sender's step back that no gap explains of one behind it.
    """
    counted = counters.faults[hook]
    late = counted["out_of_order"].astype(np.int64)
    before = np.maximum(counted["missing"].astype(np.int64) - late, 0)
    behind = counted["lost_behind"].astype(np.int64)
    fabric, host = (behind, before) if hook is Hook.STEER else (before, behind)
    columns = (fabric, host, late, counted["retransmitted"], counted["ecn_marked"])
    return [FaultSample(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _distribution(trips: RoundTrips, path: int) -> Distribution | None:
    return distribution(trips.buckets[path], int(trips.sum_ns[path])) if trips.samples[path] else None


def _microseconds(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else round(nanoseconds / 1e3, 3)


def _seconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds / 1e6


def _verdicts(counters: Counters) -> dict[str, dict[str, int]]:
    return {
        hook.name.lower(): {
            verdict.name.lower(): int(counters.verdicts[hook, verdict]) for verdict in Verdict
        }
        for hook in Hook
    }


def _seen(parts: Iterable[QpTable], query: ExplainQuery) -> QpTable | None:
    """The QP that is asked for, alone; the busiest where the VNI is left open and several fit. None: not seen."""
    found = top(parts, QpFilter(qp=query.qp, vni=query.vni, dst=query.dst, limit=1))
    return found if found is not None and len(found.keys) else None


def _networks(parts: Iterable[QpTable], host: Address) -> set[tuple[int, Address]]:
    """VNI and outer destination of all QPs to this host."""
    networks: set[tuple[int, bytes]] = set()
    for part in parts:
        positions = select(part, QpFilter(dst=host))
        vnis, destinations = part.keys["vni"][positions], part.values["destination"][positions]
        networks.update((int(vni), bytes(packed)) for vni, packed in zip(vnis, destinations, strict=True))
    return {(vni, unpack_address(packed)) for vni, packed in networks}


def _unseen(query: ExplainQuery, known: set[tuple[int, Address]]) -> tuple[QueuePairKey, Address]:
    """Key and outer destination of a QP without an entry; the host's other QPs tell what the query leaves open.

    Raises:
        QueryError: nothing tells, or the host is known in several networks.
    """
    fitting = {
        (vni, destination)
        for vni, destination in known
        if query.vni in {None, vni} and query.via in {None, destination}
    }
    if len(fitting) == 1:
        vni, destination = fitting.pop()
        return QueuePairKey(vni, query.dst, query.qp), destination
    if len(fitting) > 1:
        raise QueryError(f"{query.dst} is known in several networks; say which with --vni and --via")
    if query.via is not None:
        if query.vni is None and query.via != query.dst:
            raise QueryError(f"no QP of {query.dst} has been seen, so its VNI is unknown; give --vni")
        return QueuePairKey(query.vni or 0, query.dst, query.qp), query.via
    if not query.vni:
        return QueuePairKey(0, query.dst, query.qp), query.dst
    raise QueryError(f"no QP of {query.dst} in VNI {query.vni} has been seen; give its VTEP with --via")


def _busiest(parts: Iterable[QpTable], most: int) -> tuple[QpSample, ...]:
    best = top(parts, QpFilter(limit=most))
    if best is None:
        return ()
    return tuple(
        QpSample(
            vni=row["vni"],
            src=row["src"],
            dst=row["dst"],
            dest_qp=row["dest_qp"],
            path=row["path"] or "",
            packets=row["packets"],
            bytes=row["bytes"],
            lost=row["lost"],
            lost_at_host=row["lost_at_host"],
            retransmitted=row["retransmitted"],
            out_of_order=row["out_of_order"],
            naks=row["naks"],
            cnps=row["cnps"],
            ecn_marked=row["ecn_marked"],
            rtt_seconds=_seconds(row["rtt_us"]),
            rtt_min_seconds=_seconds(row["rtt_min_us"]),
        )
        for row in rows(best, np.arange(len(best.keys)))
    )
