"""Slots: which position a QP hashes to, and in which order a position prefers the planes.

Everything here is integer arithmetic on names and weights, so that two leaves with other CPUs, other numpy
releases and another history compute the same tables.
"""

from __future__ import annotations

from ipaddress import IPv4Address

from qpd.model import SLOTS, Address, QueuePairKey

_MASK32 = 0xFFFFFFFF
_FIRST_DYNAMIC_PORT = 49152


def _words(address: Address) -> tuple[int, int, int, int]:
    """The address as four big-endian words; IPv4 is mapped (RFC 4291, 2.5.5.2)."""
    value = int(address)
    if isinstance(address, IPv4Address):
        value |= 0xFFFF << 32
    return value >> 96, value >> 64 & _MASK32, value >> 32 & _MASK32, value & _MASK32


def qp_hash(key: QueuePairKey) -> int:
    """The 32-bit hash of a QP, as ``ebpf/place.h`` computes it (docs/architecture.md, Hash of a QP)."""
    h = 0x71706431
    for word in (key.vni, key.dest_qp, *_words(key.dst)):
        h = (h ^ word) * 0x9E3779B1 & _MASK32
        h ^= h >> 15
    h ^= h >> 16
    h = h * 0x85EBCA6B & _MASK32
    h ^= h >> 13
    h = h * 0xC2B2AE35 & _MASK32
    return h ^ h >> 16


def slot_of(h: int) -> int:
    """The slot of a QP with this hash."""
    return h & (SLOTS - 1)


def source_port_of(h: int) -> int:
    """The outer UDP source port of a QP with this hash: dynamic range (RFC 7348, 5), bits that the slot leaves unused."""
    return _FIRST_DYNAMIC_PORT + (h >> 18)
