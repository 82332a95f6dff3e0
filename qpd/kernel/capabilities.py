"""Which capabilities this process has (capabilities(7)), for messages that name the missing one."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path


class Capability(IntEnum):
    """Bits of CapEff that qpd needs (include/uapi/linux/capability.h)."""

    CAP_NET_ADMIN = 12
    CAP_SYS_ADMIN = 21
    CAP_PERFMON = 38
    CAP_BPF = 39


_NEEDED = (Capability.CAP_BPF, Capability.CAP_PERFMON, Capability.CAP_NET_ADMIN)
"""CAP_BPF: maps and programs. CAP_PERFMON: the verifier's rules for pointers. CAP_NET_ADMIN: tc programs, routes."""


def effective() -> int:
    """The word of this process's effective capabilities."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def missing(word: int | None = None) -> list[str]:
    """Names of the capabilities that the classifier needs and ``word`` (default: this process's) lacks."""
    have = effective() if word is None else word
    # Before CAP_BPF and CAP_PERFMON there was CAP_SYS_ADMIN, and it still implies both.
    implied = {Capability.CAP_BPF, Capability.CAP_PERFMON} if have >> Capability.CAP_SYS_ADMIN & 1 else set()
    return [need.name for need in _NEEDED if not have >> need & 1 and need not in implied]
