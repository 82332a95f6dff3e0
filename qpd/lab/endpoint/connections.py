"""Connections between hosts: queue pair numbers, first PSNs, UDP source ports. Pure, and the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from qpd.lab import roce
from qpd.lab.errors import LabError

FIXED_PORT = 49152
FIRST_PORT, LAST_PORT = 0xC000, 0xFFFF
"""The range that RoCEv2 source ports are taken from (IBA annex A17; RFC 6335's dynamic ports)."""
BINS = 4


class SourcePorts(str, Enum):
    """Where the UDP source port of a queue pair's packets comes from."""

    LINUX = "linux"
    """From both queue pair numbers, the same at both ends: rdma_get_udp_sport()."""
    FIXED = "fixed"
    """One port for all: what low entropy looks like."""
    RANDOM = "random"
    """Any port of the dynamic range for each queue pair."""
    BINS = "bins"
    """The dynamic range in four equal bins; a connection's queue pairs take them in turn, any port inside."""


@dataclass(frozen=True)
class End:
    """One end's queue pair."""

    host: str
    qp: int
    first_psn: int
    """The PSN of its first request."""
    source_port: int


@dataclass(frozen=True)
class Connection:
    """Two connected queue pairs; requests go from `source` to `destination`, and back where somebody says so."""

    source: End
    destination: End


class Numbering:
    """Deals numbers as adapters and drivers do: a host's queue pairs in sequence from somewhere, PSNs at random."""

    def __init__(self, seed: int | str, policy: SourcePorts = SourcePorts.LINUX) -> None:
        self._seed = seed
        self._policy = policy
        self._next: dict[str, int] = {}
        self._random = random.Random(f"{seed}/connections")

    def connect(self, source: str, destination: str, count: int) -> list[Connection]:
        """Queue pairs between two hosts."""
        made = []
        for index in range(count):
            near, far = self._qp(source), self._qp(destination)
            made.append(
                Connection(
                    End(source, near, self._psn(), self._port(index, near, far)),
                    End(destination, far, self._psn(), self._port(index, far, near)),
                )
            )
        return made

    def _qp(self, host: str) -> int:
        if host not in self._next:
            self._next[host] = random.Random(f"{self._seed}/{host}").randrange(0x100, 0xF00000)
        self._next[host] += 1
        return self._next[host]

    def _psn(self) -> int:
        return self._random.randrange(roce.PSN_MODULUS)

    def _port(self, index: int, own: int, peer: int) -> int:
        if self._policy is SourcePorts.LINUX:
            return roce.linux_source_port(own, peer)
        if self._policy is SourcePorts.FIXED:
            return FIXED_PORT
        if self._policy is SourcePorts.RANDOM:
            return self._random.randint(FIRST_PORT, LAST_PORT)
        width = (LAST_PORT + 1 - FIRST_PORT) // BINS
        return FIRST_PORT + index % BINS * width + self._random.randrange(width)


def connect(
    source: str,
    destination: str,
    count: int = 1,
    *,
    seed: int = 0,
    source_ports: SourcePorts | str = SourcePorts.LINUX,
) -> list[Connection]:
    """Queue pairs between two hosts; for several pairs of hosts use one `Numbering`, so that no number comes twice."""
    return Numbering(seed, SourcePorts(source_ports)).connect(source, destination, count)


def numbered(
    source: str,
    destination: str,
    numbers: Iterable[tuple[int, int]],
    *,
    source_port: int | None = None,
    first_psn: int = 0,
) -> list[Connection]:
    """Queue pairs of given numbers (source's, destination's), all from one PSN; without a port: as Linux derives it."""
    made = []
    for near, far in numbers:
        port = roce.linux_source_port(near, far) if source_port is None else source_port
        made.append(Connection(End(source, near, first_psn, port), End(destination, far, first_psn, port)))
    return made


def check(connections: Sequence[Connection]) -> None:
    """Raise LabError where a number is none, or a host has it twice."""
    seen: set[tuple[str, int]] = set()
    for connection in connections:
        for end in (connection.source, connection.destination):
            if not 1 < end.qp < roce.PSN_MODULUS:
                raise LabError(
                    f"QP {end.qp} of {end.host}: give 2 to {roce.PSN_MODULUS - 1} (24 bits; 0 and 1 are management's)"
                )
            if (end.host, end.qp) in seen:
                raise LabError(
                    f"QP {end.qp:#x} of {end.host} is in two connections; give each its own number"
                )
            seen.add((end.host, end.qp))
