"""Two tiny programs that make a veth pair a wire, loaded with bpf(2) directly: no compiler, no library.

`forget_hash` runs at the ingress of every underlay interface: a veth carries `skb->hash` of the sender's socket or
inner flow across what would be a wire, and the receiver's multipath hash would use it.
`lossy` runs as generic XDP, before any tc hook and before any packet tap sees the packet, as if the wire had lost it; a
`LossSwitch` lets several of them begin at one moment.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

from qpd.kernel import bpf

_HELPER_GET_PRANDOM_U32, _HELPER_SET_HASH_INVALID = 7, 41
_XDP_DROP, _XDP_PASS = 1, 2
_TC_ACT_UNSPEC = -1
"""Tells TCX and clsact alike to go on with the next program."""

# Opcodes (class, operation and source) from linux/bpf_common.h; a pseudo source says that the immediate is a map.
_LD_IMM64, _LDX_W, _MOV64_IMM, _RSH64_IMM, _JGE, _CALL, _EXIT = 0x18, 0x61, 0xB7, 0x77, 0x3D, 0x85, 0x95
_PSEUDO_MAP_VALUE = 2


def _instruction(opcode: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, src << 4 | dst, offset, immediate)


def _words(code: bytes) -> tuple[int, ...]:
    return struct.unpack(f"={len(code) // 8}Q", code)


def forget_hash_code() -> bytes:
    """r1 is the packet: bpf_set_hash_invalid(skb); return TC_ACT_UNSPEC."""
    return (
        _instruction(_CALL, immediate=_HELPER_SET_HASH_INVALID)
        + _instruction(_MOV64_IMM, dst=0, immediate=_TC_ACT_UNSPEC)
        + _instruction(_EXIT)
    )


def lossy_code(table: int, offset: int) -> bytes:
    """Drop where 31 random bits are less than the u32 at this offset of the map's one value, else pass."""
    return (
        _instruction(_LD_IMM64, dst=1, src=_PSEUDO_MAP_VALUE, immediate=table)
        + _instruction(0, immediate=offset)
        + _instruction(_LDX_W, dst=6, src=1)
        + _instruction(_CALL, immediate=_HELPER_GET_PRANDOM_U32)
        + _instruction(_RSH64_IMM, dst=0, immediate=1)
        + _instruction(_JGE, dst=0, src=6, offset=2)
        + _instruction(_MOV64_IMM, dst=0, immediate=_XDP_DROP)
        + _instruction(_EXIT)
        + _instruction(_MOV64_IMM, dst=0, immediate=_XDP_PASS)
        + _instruction(_EXIT)
    )


def load_forget_hash() -> int:
    """The program that clears skb->hash."""
    return bpf.prog_load(_words(forget_hash_code()), name="forget_hash", licence="GPL")


def loss_word(probability: float) -> int:
    """What `lossy` finds in the map where it is to lose with this probability (1.0: everything, 0.0: nothing)."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability {probability}: give 0 to 1")
    return int(probability * 2**31)


class LossSwitch:
    """A program for each of some ends, which all change what they lose by one write: within the same microsecond.

    Attached programs live on after `close`, and go on losing what they lost.
    """

    def __init__(self, ends: int) -> None:
        self.programs: list[int] = []
        """Descriptors, one an end."""
        self._table = bpf.map_create(bpf.MapType.ARRAY, 4, 4 * ends, 1, name="lost")
        try:
            for end in range(ends):
                code = _words(lossy_code(self._table, 4 * end))
                self.programs.append(bpf.prog_load(code, kind=bpf.PROG_TYPE_XDP, name="lossy", licence="GPL"))
        except BaseException:
            self.close()
            raise

    def set(self, probabilities: Sequence[float]) -> None:
        """Lose with these probabilities from now on, one for each end."""
        words = [loss_word(probability) for probability in probabilities]
        bpf.update(self._table, bytes(4), struct.pack(f"={len(self.programs)}I", *words))

    def close(self) -> None:
        """Give the descriptors back; idempotent."""
        for descriptor in (*self.programs, *([self._table] if self._table >= 0 else [])):
            os.close(descriptor)
        self.programs, self._table = [], -1


def attach_forget_hash(program: int, interfaces: Sequence[str]) -> bool:
    """Attach before every other TCX ingress program of these interfaces of the thread's own namespace.

    The attachment lives and dies with the interface. False where the kernel has no TCX (before 6.6).
    """
    try:
        for interface in interfaces:
            bpf.prog_attach(program, socket.if_nametoindex(interface), bpf.AttachType.TCX_INGRESS, first=True)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True
