"""Ways in which a link can fail, each ready beforehand, so that both directions fail within a millisecond."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from dataclasses import dataclass
from enum import Enum

from qpd.kernel import bpf
from qpd.lab import rtnetlink
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint, Link

# Opcodes from linux/bpf_common.h; a pseudo source tells the loader that the immediate is a map (linux/bpf.h).
_LD_IMM64, _LDX_W, _JEQ_IMM, _MOV64_IMM, _EXIT = 0x18, 0x61, 0x15, 0xB7, 0x95
_PSEUDO_MAP_VALUE = 2
_XDP_DROP, _XDP_PASS = 1, 2


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

    Every end of a link carries an XDP program from the start, which loses all packets while its word in a map is not 0:
    one write to the map, and all directions that shall fail do so within the same microsecond.
    """

    def __init__(self, fabric: Fabric, near: str, links: list[Link]) -> None:
        self._near = near
        self._stack = contextlib.ExitStack()
        self._words: dict[Endpoint, int] = {}
        self._sockets: dict[Endpoint, rtnetlink.Socket] = {}
        self._cut: list[Endpoint] = []
        ends = [end for link in links for end in link.ends]
        self._map = bpf.map_create(bpf.MapType.ARRAY, 4, 4 * len(ends), 1, name="lost")
        self._stack.callback(os.close, self._map)
        for number, end in enumerate(ends):
            self._words[end] = 0
            code = _losing_code(self._map, 4 * number)
            program = bpf.prog_load(code, kind=bpf.PROG_TYPE_XDP, name="lost", licence="GPL")
            self._stack.callback(os.close, program)
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
        words = [end in ends for end in self._words]
        bpf.update(self._map, struct.pack("=I", 0), struct.pack(f"={len(words)}I", *words))


def _losing_code(descriptor: int, offset: int) -> tuple[int, ...]:
    """Drop while the word at this offset of the map's one value is not 0, else pass."""

    def instruction(opcode: int, registers: int = 0, jump: int = 0, immediate: int = 0) -> bytes:
        return struct.pack("<BBhi", opcode, registers, jump, immediate)

    code = (
        instruction(_LD_IMM64, _PSEUDO_MAP_VALUE << 4 | 1, 0, descriptor)
        + instruction(0, 0, 0, offset)
        + instruction(_LDX_W, 1 << 4 | 2)
        + instruction(_MOV64_IMM, 0, 0, _XDP_PASS)
        + instruction(_JEQ_IMM, 2, 1, 0)
        + instruction(_MOV64_IMM, 0, 0, _XDP_DROP)
        + instruction(_EXIT)
    )
    return struct.unpack(f"={len(code) // 8}Q", code)
