"""Ways in which a link can fail, each ready beforehand, so that both directions fail within a millisecond."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from enum import Enum

from qpd.lab import programs, rtnetlink
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint, Link


class Kind(Enum):
    """What happens to the link of a leaf, in the words of the report."""

    BOTH = "silent, both ways"
    FROM_LEAF = "silent, leaf to spine"
    TO_LEAF = "silent, spine to leaf"
    CUT_HERE = "carrier, down at the leaf"
    CUT_THERE = "carrier, down at the spine"

    @property
    def silent(self) -> bool:
        """Packets are lost and the carrier stays."""
        return self in {Kind.BOTH, Kind.FROM_LEAF, Kind.TO_LEAF}


@dataclass(frozen=True)
class Injected:
    """When a fault was made: before the first and after the last direction failed. CLOCK_MONOTONIC ns."""

    begin_ns: int
    end_ns: int


class Faults:
    """Makes and heals faults of these links, as seen from one of their nodes.

    Every end of a link carries the program from the start, so that all directions that shall fail do so at once.
    """

    def __init__(self, fabric: Fabric, near: str, links: list[Link]) -> None:
        self._near = near
        self._stack = contextlib.ExitStack()
        self._sockets: dict[Endpoint, rtnetlink.Socket] = {}
        self._cut: list[Endpoint] = []
        self._ends = [end for link in links for end in link.ends]
        self._switch = self._stack.enter_context(contextlib.closing(programs.LossSwitch(len(self._ends))))
        for end, program in zip(self._ends, self._switch.programs, strict=True):
            netlink = self._stack.enter_context(rtnetlink.Socket(fabric.namespace(end.node)))
            self._sockets[end] = netlink
            netlink.set_xdp(end.interface, program)
            self._stack.callback(netlink.set_xdp, end.interface, -1)
        self._stack.callback(self.heal)

    def close(self) -> None:
        """Give everything back; idempotent."""
        self._stack.close()

    def make(self, kind: Kind, *links: Link) -> Injected:
        """Let it happen."""
        begin = time.monotonic_ns()
        if kind.silent:
            self._lose([end for link in links for end in self._deaf(kind, link)])
        else:
            for link in links:
                end = link.end(self._near) if kind is Kind.CUT_HERE else link.other(self._near)
                self._cut.append(end)
                self._sockets[end].set_up(end.interface, up=False)
        return Injected(begin, time.monotonic_ns())

    def heal(self) -> None:
        """Undo all."""
        self._lose([])
        while self._cut:
            end = self._cut.pop()
            self._sockets[end].set_up(end.interface, up=True)

    def _deaf(self, kind: Kind, link: Link) -> list[Endpoint]:
        """The ends that hear nothing any more."""
        near, far = link.end(self._near), link.other(self._near)
        return {Kind.BOTH: [near, far], Kind.FROM_LEAF: [far], Kind.TO_LEAF: [near]}[kind]

    def _lose(self, ends: list[Endpoint]) -> None:
        self._switch.set([float(end in ends) for end in self._ends])
