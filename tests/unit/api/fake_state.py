"""A leaf with a few uplinks and any number of QPs, in place of the daemon: all of the API but the kernel is real."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpd import __version__
from qpd.api import explain, rows
from qpd.api.events import EventRing, rfc3339
from qpd.api.queries import ExplainQuery, QpFilter
from qpd.api.schemas import BfdInfo, Explanation, GroupRow, PathRow, QpRow, StatusInfo
from qpd.api.server import ApiServer
from qpd.api.state import QueryError, UnknownPath
from qpd.core.slots import qp_hash, slot_of, slot_table, source_port_of
from qpd.kernel.layout import PSN_KNOWN, QP, QP_KEY, pack_address
from qpd.metrics import (
    BfdSample,
    Distribution,
    FaultSample,
    MetricsSnapshot,
    Native,
    PathSample,
    QpSample,
)
from qpd.model import (
    NO_PATH,
    Address,
    Group,
    Hook,
    PathState,
    Placement,
    QueuePairKey,
    Reason,
    Verdict,
)
from qpd.model import (
    Path as QpdPath,
)
from qpd.settings import Settings

VNI = 10010
SECOND = 1_000_000_000
ROUND_TRIPS = Distribution((0.0001, 0.001), (50, 9, 1), 0.006, Native(2, {-54: 50, -44: 9, -39: 1}))


class FakeState:
    """``spines`` uplinks (the one that ``down`` names is down) and ``count`` QPs to two VTEPs."""

    def __init__(self, count: int = 32, spines: int = 4, down: str = "") -> None:
        self.events = EventRing()
        self.started = time.time() - 3725.5
        self.paths_by_id = {
            number: QpdPath(
                id=number,
                name=f"dc1-spine{number + 1}",
                interface=f"eth{number + 1}",
                ifindex=number + 10,
                next_hop=ip_address(f"fe80::a8c1:abff:fe00:{number + 1:x}")
                if number % 2
                else ip_address(f"10.0.{number}.1"),
                plane=f"spine{number + 1}",
                weight=1,
                state=PathState.UP,
                reason=Reason.NONE,
                since=3600.0,
                sole=True,
            )
            for number in range(spines)
        }
        self.prefixes = [ip_network("10.255.2.1/32"), ip_network("10.255.2.2/32")]
        self.group = Group(
            id=0, weights=dict.fromkeys(self.paths_by_id, 1), table=0, destinations=tuple(self.prefixes)
        )
        self.orders = slot_table({path.plane: 1 for path in self.paths_by_id.values()})
        self.failovers: dict[str, dict[str, int]] = {}
        self.now_ns = 5000 * SECOND
        self.arrived = 1200
        self._fill(count)
        if down:
            self.fail(down, Reason.BFD_DOWN)

    def _fill(self, count: int) -> None:
        self.keys = np.zeros(count, QP_KEY)
        self.values = np.zeros(count, QP)
        number = np.arange(count)
        self.keys["vni"] = VNI
        self.keys["dest_qp"] = 0x11 + number // 2
        hosts = [pack_address(ip_address(f"10.1.0.{21 + host}")) for host in range(2)]
        vteps = [pack_address(net.network_address) for net in self.prefixes]
        self.keys["dst"] = np.array(hosts, dtype="V16")[number % 2]
        values = self.values
        values["destination"] = np.array(vteps, dtype="V16")[number % 2]
        values["src"] = np.void(pack_address(ip_address("10.1.0.11")))
        values["packets"] = 1000 + number * 7
        values["bytes"] = values["packets"] * 4174
        values["first_seen_ns"] = self.now_ns - 90 * SECOND
        values["last_seen_ns"] = self.now_ns - (number % 5) * SECOND // 10
        for position in range(min(count, 5000)):
            key = QueuePairKey(
                VNI, ip_address(f"10.1.0.{21 + position % 2}"), int(self.keys["dest_qp"][position])
            )
            hash_ = qp_hash(key)
            values["slot"][position] = slot_of(hash_)
            values["source_port"][position] = source_port_of(hash_)
        values["home"] = number % len(self.paths_by_id)
        values["path"] = values["home"]
        # Reliable connections, but for the last QP, which sends datagrams; every fourth has not shown its peer yet.
        values["next_psn"] = PSN_KNOWN | 1000
        values["acked_psn"] = PSN_KNOWN | 990
        paired = number % 4 != 3
        values["peer_qp"][paired] = 0x41 + number[paired]
        values["rtt_samples"][paired] = 60
        values["rtt_last_ns"], values["rtt_min_ns"] = 84_200 + 100 * number % 9000, 79_100
        values["rtt_sum_ns"][paired] = 60 * 86_500
        lossy = number % 8 == 2
        values["lost_behind"][lossy], values["retransmitted"][lossy] = 2, 17
        values["missing"][lossy], values["out_of_order"][lossy] = 4, 1
        if count > 1:
            for name in ("next_psn", "acked_psn", "peer_qp", "rtt_samples", "rtt_sum_ns", "lost_behind"):
                values[name][-1] = 0
            values["transport"][-1] = 3

    # --- what happens to the leaf

    def fail(self, name: str, reason: Reason) -> None:
        """A path dies: its QPs take the next one."""
        id_ = self._id(name)
        self._set(id_, PathState.DRAINED if reason is Reason.DRAINED else PathState.DOWN, reason)
        there = self.values["path"] == id_
        self.values["path"][there] = self._next()[there]
        self.values["moves"][there] += 1
        causes = self.failovers.setdefault(name, {})
        causes[reason.value] = causes.get(reason.value, 0) + 1
        self.events.add("path-down", {"path": name, "reason": reason.value, "qps": int(there.sum())})

    def _next(self) -> npt.NDArray[np.uint8]:
        """The first living path in the order of each QP's slot."""
        living = np.array([path.state is PathState.UP for path in self.paths_by_id.values()])
        order = self.orders[self.values["slot"]]
        first = np.take_along_axis(order, living[order].argmax(axis=1)[:, None], axis=1)[:, 0]
        return first if living.any() else np.full_like(first, NO_PATH)

    def heal(self, name: str) -> None:
        """A path serves again: its QPs come home."""
        id_ = self._id(name)
        self._set(id_, PathState.UP, Reason.NONE)
        home = self.values["home"] == id_
        self.values["path"][home] = id_
        self.events.add("path-up", {"path": name})

    def traffic(self, packets: int) -> None:
        """Every QP sends as many packets; as many arrive by each path."""
        self.arrived += packets
        self.values["packets"] += np.uint64(packets)
        self.values["bytes"] += np.uint64(packets * 4174)

    def _set(self, id_: int, state: PathState, reason: Reason) -> None:
        old = self.paths_by_id[id_]
        fields = {name: getattr(old, name) for name in QpdPath.__slots__}
        self.paths_by_id[id_] = QpdPath(**{**fields, "state": state, "reason": reason})

    def _id(self, name: str) -> int:
        for id_, path in self.paths_by_id.items():
            if path.name == name:
                return id_
        raise UnknownPath(name, tuple(path.name for path in self.paths_by_id.values()))

    # --- the State protocol

    def status(self) -> StatusInfo:
        return {
            "state": "steering",
            "node": "dc1-leaf1",
            "version": __version__,
            "pid": 4242,
            "started": rfc3339(self.started),
            "uptime_s": 3725.5,
            "placement": "balanced",
            "pin_dir": "/sys/fs/bpf/qpd",
            "uplinks": [
                {
                    "name": path.interface,
                    "ifindex": path.ifindex,
                    "up": path.state is PathState.UP,
                    "attach": "tcx",
                }
                for path in self.paths_by_id.values()
            ],
            "paths": {
                "total": len(self.paths_by_id),
                "up": sum(path.state is PathState.UP for path in self.paths_by_id.values()),
            },
            "groups": 1,
            "destinations": len(self.prefixes),
            "qps": {"known": len(self.keys), "active": len(self.keys), "max": 131072},
            "failovers": sum(sum(causes.values()) for causes in self.failovers.values()),
            "overrides": 0,
            "frr": {"bfdd": True, "bgpd": True},
            "verdicts": {
                hook.name.lower(): {
                    verdict.name.lower(): count
                    for (of, verdict), count in self._verdicts().items()
                    if of is hook
                }
                for hook in Hook
            },
            "warnings": [],
        }

    def _verdicts(self) -> dict[tuple[Hook, Verdict], int]:
        counts = {(hook, verdict): 0 for hook in Hook for verdict in Verdict}
        sent = int(self.values["packets"].sum())
        counts[Hook.STEER, Verdict.OWN_PATH] = sent // 2
        counts[Hook.STEER, Verdict.REDIRECTED] = sent - sent // 2
        counts[Hook.STEER, Verdict.SECOND_PASS] = sent - sent // 2
        counts[Hook.STEER, Verdict.NOT_ROCE] = 812
        counts[Hook.OBSERVE, Verdict.OBSERVED] = sent // 16
        return counts

    def paths(self) -> list[PathRow]:
        result: list[PathRow] = []
        for id_, path in self.paths_by_id.items():
            up = path.state is PathState.UP or path.reason is Reason.DRAINED
            there = self.values["path"] == id_
            bfd: BfdInfo = {
                "state": "up" if up else "down",
                "remote_state": "up" if up else "down",
                "detection_time_s": 0.03,
                "diagnostic": "" if up else "control detection time expired",
            }
            result.append(
                {
                    "id": id_,
                    "name": path.name,
                    "interface": path.interface,
                    "next_hop": str(path.next_hop),
                    "plane": path.plane,
                    "weight": path.weight,
                    "state": path.state.value,
                    "reason": path.reason.value,
                    "qps": int(there.sum()),
                    "packets": int(self.values["packets"][there].sum()),
                    "bytes": int(self.values["bytes"][there].sum()),
                    "lost": self._sum("lost_behind", there),
                    "rtt_us": 86.5 if there.any() else None,
                    "bfd": bfd,
                    "homes": int((self.values["home"] == id_).sum()),
                    "packets_in": self.arrived + id_,
                    "bytes_in": (self.arrived + id_) * 78,
                    "since_s": 1400.0,
                    "lost_in": id_,
                    "lost_at_host": self._sum("missing", there) - self._sum("out_of_order", there),
                    "retransmitted": self._sum("retransmitted", there),
                    "out_of_order_in": 0,
                    "ecn_marked_in": 3 * id_,
                    "rtt_p99_us": 131.2 if there.any() else None,
                    "rtt_samples": self._sum("rtt_samples", there),
                    "gray": path.gray,
                }
            )
        return result

    def _sum(self, name: str, which: npt.NDArray[np.bool_]) -> int:
        return int(self.values[name][which].sum())

    def groups(self) -> list[GroupRow]:
        return [
            {
                "id": self.group.id,
                "table": self.group.table,
                "members": [
                    {"path": path.name, "weight": path.weight, "state": path.state.value}
                    for path in self.paths_by_id.values()
                ],
                "destinations": [str(prefix) for prefix in self.prefixes],
            }
        ]

    def table(self) -> rows.QpTable:
        names = {id_: path.name for id_, path in self.paths_by_id.items()}
        return rows.QpTable(self.keys, self.values, names, self.now_ns, 30 * SECOND)

    def table_rows(self) -> list[QpRow]:
        """All rows."""
        return rows.rows(self.table(), np.arange(len(self.keys)))

    async def qps(self, wanted: QpFilter) -> AsyncIterator[list[QpRow]]:
        path = None if wanted.path is None else self._id(wanted.path)
        if wanted.direction == "in":
            return
        async for chunk in rows.stream([self.table()], wanted, path):
            yield chunk

    async def explain(self, query: ExplainQuery) -> Explanation:
        found = rows.select(self.table(), QpFilter(dst=query.dst, qp=query.qp, vni=query.vni))
        row = rows.rows(self.table(), found[:1])[0] if len(found) else None
        via: Address | None = query.via or (ip_address(row["destination"]) if row else None)
        if via is None or (query.vni is None and row is None):
            raise QueryError(
                f"QP {query.qp} of {query.dst} has not been seen; say its VNI and outer destination (--vni, --via)"
            )
        key = QueuePairKey(row["vni"] if row else query.vni or 0, query.dst, query.qp)
        prefix = next((prefix for prefix in self.prefixes if via in prefix), None)
        return explain.explain(
            explain.Case(
                key=key,
                destination=via,
                prefix=prefix,
                group=None if prefix is None else self.group,
                order=self.orders[slot_of(qp_hash(key))].tolist(),
                paths=self.paths_by_id,
                living=sum(1 << id_ for id_, path in self.paths_by_id.items() if path.state is PathState.UP),
                homes={id_: int((self.values["home"] == id_).sum()) for id_ in self.paths_by_id},
                placement=Placement.BALANCED,
                row=row,
                home_id=int(self.values["home"][found[0]]) if row else None,
            )
        )

    async def drain(self, name: str, drain: bool) -> PathRow:
        if drain:
            self.fail(name, Reason.DRAINED)
        else:
            self._id(name)
            self.heal(name)
        return next(row for row in self.paths() if row["name"] == name)

    async def metrics(self) -> MetricsSnapshot:
        wanted = rows.select(self.table(), QpFilter(limit=200))
        busiest = rows.rows(self.table(), wanted)
        return MetricsSnapshot(
            version=__version__,
            node="dc1-leaf1",
            placement="balanced",
            paths=tuple(
                PathSample(
                    name=row["name"],
                    interface=row["interface"],
                    next_hop=row["next_hop"],
                    plane=row["plane"],
                    state=row["state"],
                    weight=row["weight"],
                    qps=row["qps"],
                    homes=row["homes"],
                    packets_out=row["packets"],
                    bytes_out=row["bytes"],
                    packets_in=row["packets_in"],
                    bytes_in=row["bytes_in"],
                    failovers=self.failovers.get(row["name"], {}),
                    faults_out=FaultSample(row["lost"] or 0, 3, 1, row["retransmitted"], 0),
                    faults_in=FaultSample(row["lost_in"], 0, row["out_of_order_in"], 5, row["ecn_marked_in"]),
                    rtt=ROUND_TRIPS if row["rtt_samples"] else None,
                    gray=row["gray"],
                )
                for row in self.paths()
            ),
            bfd_sessions=tuple(
                BfdSample(row["name"], row["interface"], row["next_hop"], row["bfd"]["state"] == "up", 0.03)
                for row in self.paths()
                if row["bfd"] is not None
            ),
            verdicts={
                (hook.name.lower(), verdict.name.lower()): count
                for (hook, verdict), count in self._verdicts().items()
            },
            busiest=tuple(
                QpSample(
                    row["vni"],
                    row["src"],
                    row["dst"],
                    row["dest_qp"],
                    row["path"] or "",
                    row["packets"],
                    row["bytes"],
                    row["lost"],
                    row["lost_at_host"],
                    row["retransmitted"],
                    row["out_of_order"],
                    row["naks"],
                    row["cnps"],
                    row["ecn_marked"],
                    None if row["rtt_us"] is None else row["rtt_us"] / 1e6,
                    None if row["rtt_min_us"] is None else row["rtt_min_us"] / 1e6,
                )
                for row in busiest
            ),
            qps_known=len(self.keys),
            qps_active=len(self.keys),
            qps_paired=int(np.count_nonzero(self.values["peer_qp"])),
            qps_max=131072,
            groups=1,
            destinations=len(self.prefixes),
            uplinks={path.interface: True for path in self.paths_by_id.values()},
            frr={"bfdd": True, "bgpd": True},
        )


def free_port(family: socket.AddressFamily = socket.AF_INET) -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(("::1" if family is socket.AF_INET6 else "127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def serving(state: FakeState, directory: Path, **metrics: object) -> AsyncIterator[ApiServer]:
    """An API server on ``directory``/qpd.sock and on a free port of loopback."""
    settings = Settings(
        api={"socket": str(directory / "qpd.sock")},
        metrics={"listen": "127.0.0.1:0", **metrics},
    )
    server = ApiServer(state, settings)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def host(number: int) -> IPv4Address:
    """A destination host of the fake's QPs."""
    return IPv4Address(f"10.1.0.{21 + number}")
