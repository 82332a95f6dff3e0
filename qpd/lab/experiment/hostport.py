"""What a leaf's host ports do to packets in an experiment: a known flow hash, and a mark where it is wanted.

A tiny program, loaded with bpf(2) directly. `vxlan` makes the outer UDP source port of the packet's flow hash, and the
kernel's own hash is keyed anew at each boot: with a hash of its own key, a run can be repeated. A mark defeats the
outer route that `vxlan` caches for each remote VTEP (ip_tunnel_dst_cache_usable() of linux/include/net/ip_tunnels.h).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from qpd.kernel import bpf
from qpd.lab import namespaces, wires

MARK = 1
_HELPER_SET_HASH = 48
_TC_ACT_UNSPEC = -1
_SKB_MARK = 8
"""Offset in struct __sk_buff (linux/bpf.h)."""
_ETHERTYPE, _SOURCE, _DESTINATION, _PORTS = 12, 26, 30, 34
"""Offsets in an untagged Ethernet frame with an IPv4 header of 20 bytes."""
_MULTIPLIER = 0x9E3779B1

_LD_ABS_H, _LD_ABS_W, _STX_W = 0x28, 0x20, 0x63
_MOV64_IMM, _MOV64_REG, _MOV32_IMM, _MOV32_REG = 0xB7, 0xBF, 0xB4, 0xBC
_XOR32_REG, _MUL32_IMM, _RSH32_IMM, _JNE_IMM, _CALL, _EXIT = 0xAC, 0x24, 0x74, 0x55, 0x85, 0x95


def _instruction(opcode: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, src << 4 | dst, offset, immediate)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def flow_hash(seed: int, source: int, destination: int, ports: int) -> int:
    """The flow hash of an IPv4 packet; `ports` is source port << 16 | destination port."""
    h = seed & 0xFFFFFFFF
    for word in (source, destination, ports):
        h = (h ^ word) * _MULTIPLIER & 0xFFFFFFFF
        h ^= h >> 15
    return h


def code(seed: int, *, mark: bool) -> bytes:
    """r1 is the packet: mark it, set its flow hash where it is IPv4, and let the next program run."""
    steps = [_instruction(_MOV64_REG, dst=6, src=1)]  # loads from the packet want the context in r6
    if mark:
        steps += [
            _instruction(_MOV64_IMM, dst=1, immediate=MARK),
            _instruction(_STX_W, dst=6, src=1, offset=_SKB_MARK),
        ]
    body = [_instruction(_MOV32_IMM, dst=7, immediate=_signed(seed & 0xFFFFFFFF))]
    for offset in (_SOURCE, _DESTINATION, _PORTS):
        body += [
            _instruction(_LD_ABS_W, immediate=offset),
            _instruction(_XOR32_REG, dst=7, src=0),
            _instruction(_MUL32_IMM, dst=7, immediate=_signed(_MULTIPLIER)),
            _instruction(_MOV32_REG, dst=8, src=7),
            _instruction(_RSH32_IMM, dst=8, immediate=15),
            _instruction(_XOR32_REG, dst=7, src=8),
        ]
    body += [
        _instruction(_MOV64_REG, dst=1, src=6),
        _instruction(_MOV32_REG, dst=2, src=7),
        _instruction(_CALL, immediate=_HELPER_SET_HASH),
    ]
    steps += [
        _instruction(_LD_ABS_H, immediate=_ETHERTYPE),
        _instruction(_JNE_IMM, dst=0, offset=len(body), immediate=0x0800),
        *body,
        _instruction(_MOV64_IMM, dst=0, immediate=_TC_ACT_UNSPEC),
        _instruction(_EXIT),
    ]
    return b"".join(steps)


class HostPorts:
    """The program on the host ports of leaves, for as long as this object is not closed.

    Args:
        interfaces: the host ports of each namespace.
        pins: a directory in bpffs that is the lab's own; nothing stays in it.
    """

    def __init__(self, interfaces: Mapping[str, Sequence[str]], seed: int, *, mark: bool, pins: Path) -> None:
        self._links: list[int] = []
        self._filters: dict[str, Sequence[str]] = {}
        text = code(seed, mark=mark)
        words = struct.unpack(f"={len(text) // 8}Q", text)
        program = bpf.prog_load(words, name="host_port", licence="GPL")
        try:
            for namespace, names in interfaces.items():
                if not namespaces.inside(namespace, partial(self._link, program, names)):
                    wires.attach_clsact(program, namespace, names, pins)
                    self._filters[namespace] = names
        except BaseException:
            self.close()
            raise
        finally:
            os.close(program)

    def _link(self, program: int, interfaces: Sequence[str]) -> bool:
        try:
            for name in interfaces:
                index = socket.if_nametoindex(name)
                self._links.append(bpf.link_create(program, index, bpf.AttachType.TCX_INGRESS))
        except OSError as error:
            if error.errno == errno.EINVAL:  # no TCX before kernel 6.6
                return False
            raise
        return True

    def close(self) -> None:
        """Take the program away."""
        for link in self._links:
            os.close(link)
        self._links = []
        for namespace, names in self._filters.items():
            for name in names:
                command = namespaces.enter(namespace, ["tc", "qdisc", "del", "dev", name, "clsact"])
                with contextlib.suppress(OSError):
                    subprocess.run(command, check=False, capture_output=True)
        self._filters = {}
