"""A workload: which collective operation, on which hosts, over which queue pairs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from qpd.lab.endpoint.config import Transport
from qpd.lab.endpoint.connections import Connection, Numbering, SourcePorts
from qpd.lab.errors import LabError
from qpd.lab.workload import schedule
from qpd.lab.workload.schedule import Schedule
from qpd.lab.workload.values import ELEMENT

ALLREDUCE, PARAMETER_SERVER = "allreduce", "parameter-server"
ALGORITHMS = ("ring", "tree", "hierarchical")


@dataclass(frozen=True)
class Workload:
    """What trains, as far as the network sees it."""

    kind: str
    """allreduce or parameter-server."""
    workers: tuple[str, ...]
    """Hosts; the order is that of the ranks, and so the placement."""
    bytes: int
    """Of the vector that is reduced in each iteration; rounded up to whole elements of 4 bytes."""
    algorithm: str = "ring"
    """Of an AllReduce: ring, tree or hierarchical."""
    servers: tuple[str, ...] = ()
    """Hosts of a Parameter Server, each with its part of the vector; not workers as well."""
    iterations: int = 5
    compute: float = 0.0
    """Seconds that each worker computes before it communicates."""
    jitter: float = 0.0
    """Each worker computes up to this many seconds longer, other ones in each iteration (by the seed)."""
    qps: int = 4
    """Queue pairs from each rank to each that it sends to; messages take them in turn."""
    message: int = 1 << 19
    """Bytes of one RDMA WRITE, a multiple of 4."""
    chunks: int = 1
    """Parts of the vector that go through the schedule independently, so that one is reduced while another travels."""
    source_ports: SourcePorts = SourcePorts.LINUX
    sites: Mapping[str, str] | None = None
    """The site of each worker, for hierarchical; None: its name up to the first hyphen."""
    family: int = 4
    """IPv4 or IPv6 between the hosts."""
    seed: int = 0
    """Of queue pair numbers, PSNs, source ports and jitter."""
    transport: Transport = field(default_factory=Transport)

    def __post_init__(self) -> None:
        _check(
            self.kind in {ALLREDUCE, PARAMETER_SERVER},
            "kind",
            self.kind,
            "give allreduce or parameter-server",
        )
        _check(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, f"give {', '.join(ALGORITHMS)}")
        hosts = self.hosts
        twice = sorted({host for host in hosts if hosts.count(host) > 1})
        _check(not twice, "workers, servers", ", ".join(twice), "name each host once")
        least = 2 if self.kind == ALLREDUCE else 1
        _check(len(self.workers) >= least, "workers", list(self.workers), f"name {least} hosts at least")
        if self.kind == PARAMETER_SERVER:
            _check(len(self.servers) >= 1, "servers", list(self.servers), "name a host that is no worker")
        else:
            _check(not self.servers, "servers", list(self.servers), "an allreduce has none; leave them out")
        for key in ("bytes", "iterations", "qps", "chunks", "message"):
            value = getattr(self, key)
            _check(isinstance(value, int) and value >= 1, key, value, "give a whole number from 1 on")
        _check(self.message % ELEMENT == 0, "message", self.message, "give a multiple of 4")
        for key in ("compute", "jitter"):
            seconds = getattr(self, key)
            _check(
                isinstance(seconds, (int, float)) and seconds >= 0, key, seconds, "give seconds, 0 or more"
            )
        _check(
            self.sites is None or isinstance(self.sites, Mapping), "sites", self.sites, "map hosts to sites"
        )
        _check(self.family in {4, 6}, "family", self.family, "give 4 or 6")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Workload:
        """The workload in a mapping (of a YAML file, say); what is not there has its default.

        Raises:
            LabError: with the key that is not known, missing, or has a value that is none.
        """
        known = [one.name for one in fields(cls)]
        for key in values:
            _check(key in known, key, values[key], f"there is no such key; known are {', '.join(known)}")
        for key in ("kind", "workers", "bytes"):
            _check(key in values, key, None, "it is missing")
        made = dict(values)
        for key in ("workers", "servers"):
            if key in made:
                hosts = made[key] or []
                _check(isinstance(hosts, (list, tuple)), key, hosts, "give a list of hosts")
                made[key] = tuple(map(str, hosts))
        ports = made.get("source_ports") or SourcePorts.LINUX
        policies = [one.value for one in SourcePorts]
        _check(ports in policies, "source_ports", ports, f"give {', '.join(policies)}")
        made["source_ports"] = SourcePorts(ports)
        transport = made.get("transport") or {}
        _check(isinstance(transport, (Transport, Mapping)), "transport", transport, "give a mapping")
        made["transport"] = (
            transport if isinstance(transport, Transport) else Transport.from_mapping(transport)
        )
        return cls(**made)

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` takes, and JSON."""
        return asdict(self) | {
            "workers": list(self.workers),
            "servers": list(self.servers),
            "source_ports": self.source_ports.value,
        }

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts by rank: workers, then servers."""
        return self.workers + self.servers

    @property
    def elements(self) -> int:
        """Of the vector."""
        return -(-self.bytes // ELEMENT)

    def schedule(self) -> Schedule:
        """The transfers of one iteration."""
        workers, elements, chunks = len(self.workers), self.elements, self.chunks
        if self.kind == PARAMETER_SERVER:
            return schedule.parameter_server(workers, len(self.servers), elements, chunks)
        if self.algorithm == "hierarchical":
            return schedule.hierarchical(self._sites(), elements, chunks)
        return (schedule.ring if self.algorithm == "ring" else schedule.tree)(workers, elements, chunks)

    def _sites(self) -> list[list[int]]:
        sites: dict[str, list[int]] = {}
        for rank, host in enumerate(self.workers):
            site = host.partition("-")[0] if self.sites is None else self.sites.get(host)
            if site is None:
                raise LabError(f"workload.sites: {host} is not there; give each worker its site")
            sites.setdefault(site, []).append(rank)
        return list(sites.values())

    def connections(self) -> dict[tuple[int, int], list[Connection]]:
        """The queue pairs, by the ranks of source and destination."""
        numbering = Numbering(self.seed, self.source_ports)
        return {
            (source, destination): numbering.connect(self.hosts[source], self.hosts[destination], self.qps)
            for source, destination in self.schedule().pairs
        }


def _check(fine: bool, key: str, value: object, advice: str) -> None:
    if not fine:
        raise LabError(f"workload.{key}: {value!r}: {advice}")
