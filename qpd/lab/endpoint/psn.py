"""Packet sequence numbers: 24 bits, compared in serial arithmetic. Pure.

Inside the endpoint packets are counted without end; only what goes over the wire is folded.
"""

from __future__ import annotations

from qpd.lab.roce import PSN_MODULUS as MODULUS

__all__ = ["MODULUS", "distance", "unfold"]
_HALF = MODULUS // 2


def distance(a: int, b: int) -> int:
    """How far PSN `a` is ahead of `b`: from -2**23 (behind) to 2**23 - 1."""
    return (a - b + _HALF) % MODULUS - _HALF


def unfold(psn: int, near: int) -> int:
    """The number without end that folds to `psn` and is nearest to `near`."""
    return near + distance(psn, near % MODULUS)
