"""Two tiny programs that make a veth pair a wire, loaded with bpf(2) directly: no compiler, no library.

`forget_hash` runs at the ingress of every underlay interface: a veth carries `skb->hash` of the sender's socket or
inner flow across what would be a wire, and the receiver's multipath hash would use it.
`lossy` runs as generic XDP, before any tc hook and before any packet tap sees the packet, as if the wire had lost it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

# bpf(2) commands and types, from linux/bpf.h.
_PROG_LOAD, _OBJ_PIN, _PROG_ATTACH = 5, 6, 8
_PROG_TYPE_SCHED_CLS, _PROG_TYPE_XDP = 3, 6
_TCX_INGRESS = 46
_F_BEFORE = 1 << 3
_SYS_BPF = {"x86_64": 321, "aarch64": 280}

_HELPER_GET_PRANDOM_U32, _HELPER_SET_HASH_INVALID = 7, 41
_XDP_DROP, _XDP_PASS = 1, 2
_TC_ACT_UNSPEC = -1
"""Tells TCX and clsact alike to go on with the next program."""

# Opcodes: class, operation and source together, from linux/bpf_common.h.
_MOV64_IMM, _RSH64_IMM, _JGE_IMM, _CALL, _EXIT = 0xB7, 0x77, 0x35, 0x85, 0x95

_libc = ctypes.CDLL(None, use_errno=True)


def _instruction(opcode: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, src << 4 | dst, offset, immediate)


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


def _bpf(command: int, attributes: bytes) -> int:
    number = _SYS_BPF[os.uname().machine]
    buffer = ctypes.create_string_buffer(attributes, 128)
    result = int(_libc.syscall(number, command, buffer, len(buffer)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"bpf({command}): {os.strerror(error)}")
    return result


def load(program_type: int, code: bytes, name: str) -> int:
    """Load a program and return its file descriptor, which the caller closes.

    Raises:
        OSError: the kernel's refusal; EPERM where CAP_BPF and CAP_NET_ADMIN are missing.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "<IIQQIIQII16s",
        program_type,
        len(code) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        0,
        0,
        0,
        0,
        0,
        name.encode()[:15],
    )
    return _bpf(_PROG_LOAD, attributes)


def load_forget_hash() -> int:
    """The program that clears skb->hash."""
    return load(_PROG_TYPE_SCHED_CLS, forget_hash_code(), "forget_hash")


def load_lossy(probability: float) -> int:
    """The program that loses packets."""
    return load(_PROG_TYPE_XDP, lossy_code(probability), "lossy")


def pin(program: int, path: Path) -> None:
    """Give a program a name in bpffs."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, struct.pack("<QII", ctypes.addressof(name), program, 0))


def attach_forget_hash(program: int, interfaces: Sequence[str]) -> bool:
    """Attach before every other TCX ingress program of these interfaces of the thread's own namespace.

    The attachment lives and dies with the interface. False where the kernel has no TCX (before 6.6).
    """
    try:
        for interface in interfaces:
            index = socket.if_nametoindex(interface)
            _bpf(_PROG_ATTACH, struct.pack("<IIII", index, program, _TCX_INGRESS, _F_BEFORE))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True
