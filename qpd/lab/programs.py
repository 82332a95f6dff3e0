"""Two tiny programs that make a veth pair a wire, loaded with bpf(2) directly: no compiler, no library.

`forget_hash` runs at the ingress of every underlay interface: a veth carries `skb->hash` of the sender's socket or
inner flow across what would be a wire, and the receiver's multipath hash would use it.
`lossy` runs as generic XDP, before any tc hook and before any packet tap sees the packet, as if the wire had lost it.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence

from qpd.kernel import bpf

_HELPER_GET_PRANDOM_U32, _HELPER_SET_HASH_INVALID = 7, 41
_XDP_DROP, _XDP_PASS = 1, 2
_TC_ACT_UNSPEC = -1
"""Tells TCX and clsact alike to go on with the next program."""

# Opcodes: class, operation and source together, from linux/bpf_common.h.
_MOV64_IMM, _RSH64_IMM, _JGE_IMM, _CALL, _EXIT = 0xB7, 0x77, 0x35, 0x85, 0x95


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


def lossy_code(probability: float) -> bytes:
    """Drop with this probability (1.0: everything), else pass."""
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability {probability}: give more than 0, at most 1")
    if probability == 1.0:
        return _instruction(_MOV64_IMM, dst=0, immediate=_XDP_DROP) + _instruction(_EXIT)
    threshold = int(probability * 2**31)
    return (
        _instruction(_CALL, immediate=_HELPER_GET_PRANDOM_U32)
        # An immediate is signed: compare 31 bits, or half of the range would be negative.
        + _instruction(_RSH64_IMM, dst=0, immediate=1)
        + _instruction(_JGE_IMM, dst=0, offset=2, immediate=threshold)
        + _instruction(_MOV64_IMM, dst=0, immediate=_XDP_DROP)
        + _instruction(_EXIT)
        + _instruction(_MOV64_IMM, dst=0, immediate=_XDP_PASS)
        + _instruction(_EXIT)
    )


def load_forget_hash() -> int:
    """The program that clears skb->hash."""
    return bpf.prog_load(_words(forget_hash_code()), name="forget_hash", licence="GPL")


def load_lossy(probability: float) -> int:
    """The program that loses packets."""
    code = _words(lossy_code(probability))
    return bpf.prog_load(code, kind=bpf.PROG_TYPE_XDP, name="lossy", licence="GPL")


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
