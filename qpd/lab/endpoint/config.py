"""What a queue pair's transport is set to. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qpd.lab.errors import LabError

MTUS = (256, 512, 1024, 2048, 4096)
"""The path MTUs that RDMA knows: bytes of data in a packet."""

TIMEOUT_UNIT = 4.096e-6
"""Seconds; an ACK timeout of n means this times 2**n (IBA volume 1, 9.7.6.1.3)."""

INFINITE_RNR = 7
"""The RNR retry count that means: try for ever (IBA volume 1, 9.7.5.2.8)."""

NCCL_TIMEOUT, NCCL_RETRY_COUNT = 20, 7
"""What NCCL sets by default (NCCL_IB_TIMEOUT, NCCL_IB_RETRY_CNT): 4.3 s, and death after eight times that."""


@dataclass(frozen=True)
class Transport:
    """Settings of an RC queue pair, named as the verbs have them; timeout and retry count are NCCL's defaults."""

    mtu: int = 4096
    """Bytes of data in a packet."""
    window: int = 64
    """Packets that may be on their way unacknowledged: what an adapter's congestion control would bound."""
    timeout: int = NCCL_TIMEOUT
    """ACK timeout: 4.096 us * 2**timeout; 0 never expires."""
    retry_count: int = NCCL_RETRY_COUNT
    """Trials (by timeout or NAK) without any progress after which the queue pair goes to the error state."""
    rnr_retry: int = 7
    """Trials after a receiver-not-ready; 7 is without end."""
    rnr_timer: int = 12
    """The timer that a receiver-not-ready answer asks for (IBA volume 1, table 45); 12 is 0.64 ms, as NCCL sets it."""
    ack_every: int = 16
    """Every n-th packet asks for an acknowledgement, besides the last of each message."""
    rate: float | None = None
    """Bits of data per second that a queue pair sends at most; None: no limit."""
    dcqcn: bool = False
    """Slow down when congestion notifications (CNP) arrive; they are sent for marked packets in any case."""
    check_icrc: bool = True
    """Check the ICRC of what arrives and drop (and count) what is wrong."""

    def __post_init__(self) -> None:
        _check(self.mtu in MTUS, "mtu", self.mtu, f"give one of {', '.join(map(str, MTUS))}")
        for name, low, high in (
            ("window", 1, 1 << 20),
            ("timeout", 0, 31),
            ("retry_count", 0, 7),
            ("rnr_retry", 0, 7),
            ("rnr_timer", 0, 31),
            ("ack_every", 1, 1 << 20),
        ):
            value: object = getattr(self, name)
            fine = isinstance(value, int) and low <= value <= high
            _check(fine, name, value, f"give {low} to {high}, whole")
        rate: object = self.rate
        fine = rate is None or (isinstance(rate, (int, float)) and rate > 0)
        _check(fine, "rate", rate, "give bits per second, or leave it out")
        for name in ("dcqcn", "check_icrc"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "give true or false")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Transport:
        """The settings in a mapping (of a YAML file, say); what is not there has its default.

        Raises:
            LabError: for a key that is not known or a value that is none.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise LabError(f"transport.{key}: there is no such key; known are {', '.join(known)}")
        return cls(**values)

    @property
    def ack_timeout(self) -> float | None:
        """Seconds without progress after which the requester sends again; None: never."""
        return TIMEOUT_UNIT * 2**self.timeout if self.timeout else None

    @property
    def ack_interval(self) -> int:
        """Packets between two that ask for an acknowledgement: the window must not close without one."""
        return min(self.ack_every, max(1, self.window // 2))


# IBA volume 1, table 45: 5-bit codes, in milliseconds.
_RNR_MILLISECONDS = (
    655.36, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.96, 1.28, 1.92,
    2.56, 3.84, 5.12, 7.68, 10.24, 15.36, 20.48, 30.72, 40.96, 61.44, 81.92, 122.88, 163.84, 245.76, 327.68, 491.52,
)  # fmt: skip


def rnr_seconds(code: int) -> float:
    """How long a receiver-not-ready answer asks to wait, by the five bits in its syndrome."""
    return _RNR_MILLISECONDS[code & 31] / 1000


def _check(fine: bool, key: str, value: object, advice: str) -> None:
    if not fine:
        raise LabError(f"transport.{key}: {value!r}: {advice}")
