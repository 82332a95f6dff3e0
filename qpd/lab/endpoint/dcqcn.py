"""DCQCN: the rate of a queue pair falls when congestion is notified and rises again by steps. Pure; seconds, bits.

Zhu et al., Congestion Control for Large-Scale RDMA Deployments, SIGCOMM 2015, section 5: the names are that paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

LINE_RATE = 10e9
"""Bits per second that a queue pair without a rate of its own begins with: more than any emulated link carries."""


@dataclass(frozen=True)
class Parameters:
    """The paper's, with times for links a thousand times slower than its own."""

    g: float = 1 / 256
    """How fast alpha follows."""
    alpha_interval: float = 0.001
    """Seconds without a CNP after which alpha falls."""
    increase_interval: float = 0.005
    """Seconds between two increases (T)."""
    byte_counter: int = 1_000_000
    """Bytes sent between two increases (B)."""
    fast_recovery: int = 5
    """Increases that go half the way back to the rate before the cut (F)."""
    additive: float = 4e6
    """Bits per second that the target grows by afterwards (R_AI)."""
    hyper: float = 40e6
    """The same once timer and byte counter both are past fast recovery (R_HAI)."""
    minimum: float = 1e6
    """Bits per second that are always left."""
    cnp_interval: float = 0.0005
    """Seconds between two CNPs of one queue pair (N), at least."""


class ReactionPoint:
    """The sender's rate.

    Args:
        parameters: of the algorithm.
        line_rate: bits per second of the sender when nothing is congested.
    """

    def __init__(self, parameters: Parameters, line_rate: float = LINE_RATE) -> None:
        self._parameters = parameters
        self._line_rate = line_rate
        self._current = self._target = line_rate
        self._alpha = 1.0
        self._alpha_at: float | None = None
        """When alpha falls next; None: never was a CNP."""
        self._increase_at = 0.0
        self._bytes = 0
        self._by_time = self._by_bytes = 0

    def notified(self, now: float) -> None:
        """A CNP: cut the rate."""
        self._catch_up(now)
        p = self._parameters
        self._target = self._current
        self._current = max(p.minimum, self._current * (1 - self._alpha / 2))
        self._alpha = (1 - p.g) * self._alpha + p.g
        self._alpha_at = now + p.alpha_interval
        self._increase_at = now + p.increase_interval
        self._bytes = self._by_time = self._by_bytes = 0

    def sent(self, count: int, now: float) -> None:
        """`count` bytes have been sent."""
        if self._alpha_at is None:
            return
        self._catch_up(now)
        self._bytes += count
        while self._bytes >= self._parameters.byte_counter:
            self._bytes -= self._parameters.byte_counter
            self._by_bytes += 1
            self._increase()

    def rate(self, now: float) -> float:
        """Bits per second at which to send."""
        self._catch_up(now)
        return self._current

    def _catch_up(self, now: float) -> None:
        if self._alpha_at is None:
            return
        p = self._parameters
        while self._alpha_at <= now and self._alpha > 1e-9:
            self._alpha *= 1 - p.g
            self._alpha_at += p.alpha_interval
        while self._increase_at <= now and self._current < self._line_rate:
            self._increase_at += p.increase_interval
            self._by_time += 1
            self._increase()
        if self._current >= self._line_rate:
            self._alpha_at = None
            self._alpha = 1.0

    def _increase(self) -> None:
        p = self._parameters
        if min(self._by_time, self._by_bytes) > p.fast_recovery:
            self._target += p.hyper
        elif max(self._by_time, self._by_bytes) > p.fast_recovery:
            self._target += p.additive
        self._target = min(self._target, self._line_rate)
        self._current = (self._current + self._target) / 2
        # Halves never meet: what is nearly the line rate is the line rate.
        if self._target == self._line_rate and self._current > 0.999 * self._line_rate:
            self._current = self._line_rate


class NotificationPoint:
    """The receiver's side: when a packet that came in marked is answered by a CNP."""

    def __init__(self, parameters: Parameters) -> None:
        self._interval = parameters.cnp_interval
        self._next = 0.0

    def marked(self, now: float) -> bool:
        """A packet came in with congestion experienced; True where a CNP goes out."""
        if now < self._next:
            return False
        self._next = now + self._interval
        return True
