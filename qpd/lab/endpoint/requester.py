"""The sending half of an RC queue pair: messages in, packets out, go-back-N. Pure; times are seconds.

InfiniBand Architecture Specification volume 1, 9.7.3 to 9.7.6: the PSN sequence, ACK and NAK, timeout and retries.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from qpd.lab.endpoint import psn
from qpd.lab.endpoint.config import INFINITE_RNR, Transport, rnr_seconds
from qpd.lab.endpoint.dcqcn import ReactionPoint

BURST = 16
"""Most packets that a paced queue pair sends at once."""


@dataclass
class Request:
    """A message to be sent.

    `source` and `length` say where its bytes are in the sender's memory; `destination` is the address in the
    receiver's memory that a WRITE goes to, None for a SEND.
    """

    source: int
    length: int
    destination: int | None = None
    immediate: int | None = None
    tag: int = 0
    """Whatever the caller likes."""
    first: int = field(default=0, init=False)
    """The number of its first packet."""
    packets: int = field(default=1, init=False)


@dataclass(frozen=True)
class Segment:
    """Packets of one message that follow each other."""

    request: Request
    offset: int
    """The first packet, counted from the message's first."""
    count: int

    @property
    def number(self) -> int:
        """The number of the first packet; its PSN when folded."""
        return self.request.first + self.offset


@dataclass
class RequesterCounters:
    """What a requester has done and met; packets, unless it says otherwise."""

    packets: int = 0
    """Sent, again or not."""
    bytes: int = 0
    """Of data, sent, again or not."""
    retransmitted: int = 0
    messages: int = 0
    """Completed messages."""
    timeouts: int = 0
    naks: int = 0
    """Answers of a sequence error."""
    rnr_naks: int = 0
    cnps: int = 0
    stall: float = 0.0
    """The longest time, in seconds, without an acknowledgement of anything new while something was on its way."""
    stall_begin: float = 0.0
    """When that began."""


class Requester:
    """One queue pair's requester.

    `una`: the first packet that is not acknowledged; `next`: the one that is sent next; `highest`: the first that
    was never sent; `end`: the first that no message has yet. Always una <= next <= highest <= end.
    """

    def __init__(self, transport: Transport, first_psn: int) -> None:
        self.transport = transport
        self.una = self.next = self.highest = self.end = first_psn
        self.counters = RequesterCounters()
        self.error: str | None = None
        """Why the queue pair is in the error state; None while it works."""
        self.reaction: ReactionPoint | None = None
        self._rate = transport.rate
        self._requests: deque[Request] = deque()
        self._position = 0
        """The index in the queue of the request that `next` belongs to."""
        self._retries = transport.retry_count
        self._rnr_retries = transport.rnr_retry
        self._expiry: float | None = None
        self._resume = 0.0
        """Nothing is sent before: a receiver was not ready, or the rate does not allow it."""
        self._progress = 0.0

    # -- what the application does ----------------------------------------------------------------------------------

    def post(self, request: Request) -> None:
        """Queue a message."""
        request.first = self.end
        request.packets = max(1, -(-request.length // self.transport.mtu))
        self.end += request.packets
        self._requests.append(request)

    @property
    def outstanding(self) -> bool:
        """True while anything is sent and not acknowledged."""
        return self.highest > self.una

    @property
    def idle(self) -> bool:
        """True when every message is completed."""
        return not self._requests

    # -- sending ----------------------------------------------------------------------------------------------------

    def ready(self, now: float) -> bool:
        """True where `transmit` would send."""
        return (
            self.error is None
            and self.next < self.end
            and self.next - self.una < self.transport.window
            and now >= self._resume
        )

    def deadline(self, now: float) -> float | None:
        """When `on_time` and `ready` must be asked next; None: not before something else happens."""
        if self.error is not None:
            return None
        if self._resume > now and self.next < self.end and self.next - self.una < self.transport.window:
            return self._resume if self._expiry is None else min(self._resume, self._expiry)
        return self._expiry

    def transmit(self, now: float, budget: int) -> list[Segment]:
        """What is to be sent now: at most `budget` packets, and what window and rate allow."""
        if not self.ready(now):
            return []
        left = min(budget, self.una + self.transport.window - self.next, self.end - self.next)
        rate = self._limit(now)
        if rate is not None:
            left = min(left, BURST)
        if not self.outstanding:
            self._progress = now
        segments = []
        sent = 0
        while left > 0:
            request = self._requests[self._position]
            offset = self.next - request.first
            count = min(left, request.packets - offset)
            segments.append(Segment(request, offset, count))
            mtu = self.transport.mtu
            sent += min(request.length - offset * mtu, count * mtu)
            self.counters.packets += count
            self.counters.retransmitted += min(count, max(0, self.highest - self.next))
            self.next += count
            left -= count
            if self.next == request.first + request.packets:
                self._position += 1
        self.highest = max(self.highest, self.next)
        self.counters.bytes += sent
        if rate is not None:
            # From when the last burst was due, not from now: a late turn must not lower the rate.
            self._resume = max(self._resume, now - BURST * self.transport.mtu * 8 / rate) + sent * 8 / rate
            if self.reaction is not None:
                self.reaction.sent(sent, now)
        if self._expiry is None and self.transport.ack_timeout is not None:
            self._expiry = now + self.transport.ack_timeout
        return segments

    def asks(self, number: int, *, last: bool) -> bool:
        """Whether a packet asks for an acknowledgement; `last`: of its message."""
        return last or (number + 1) % self.transport.ack_interval == 0

    def _limit(self, now: float) -> float | None:
        if self.reaction is None:
            return self._rate
        return self.reaction.rate(now)

    # -- answers ----------------------------------------------------------------------------------------------------

    def acknowledge(self, acked: int, now: float) -> list[Request]:
        """An ACK: all packets up to PSN `acked` have arrived. Returns the messages that are completed by it."""
        number = psn.unfold(acked, self.una)
        if self.error is not None or not self.una <= number < self.highest:
            return []
        return self._advance(number + 1, now)

    def sequence_error(self, expected: int, now: float) -> list[Request]:
        """A NAK: everything before PSN `expected` has arrived; that one is missing and all after it were dropped."""
        number = psn.unfold(expected, self.una)
        if self.error is not None or not self.una <= number < self.highest:
            return []
        done = self._advance(number, now)
        self.counters.naks += 1
        self._retry(now)
        return done

    def not_ready(self, expected: int, timer: int, now: float) -> list[Request]:
        """An RNR NAK: PSN `expected` found no receive request; `timer` is the code of the time to wait."""
        number = psn.unfold(expected, self.una)
        if self.error is not None or not self.una <= number < self.highest:
            return []
        done = self._advance(number, now)
        self.counters.rnr_naks += 1
        if self._rnr_retries == 0:
            self._fail("receiver not ready: retries exceeded")
            return done
        if self.transport.rnr_retry != INFINITE_RNR:
            self._rnr_retries -= 1
        self._go_back()
        self._resume = now + rnr_seconds(timer)
        self._expiry = None
        return done

    def refused(self, reason: str) -> None:
        """A NAK that ends the queue pair: the peer cannot do what was asked."""
        self._fail(reason)

    def congested(self, now: float) -> None:
        """A CNP."""
        self.counters.cnps += 1
        if self.reaction is not None:
            self.reaction.notified(now)

    def on_time(self, now: float) -> None:
        """Let timers expire."""
        if self.error is None and self._expiry is not None and now >= self._expiry:
            self.counters.timeouts += 1
            self._expiry = None
            self._retry(now)

    def _advance(self, number: int, now: float) -> list[Request]:
        """Everything before `number` is acknowledged."""
        if number == self.una:
            return []
        self._note_stall(now)
        self._progress = now
        self.una = number
        self.next = max(self.next, number)
        self._retries = self.transport.retry_count
        self._rnr_retries = self.transport.rnr_retry
        timeout = self.transport.ack_timeout
        self._expiry = now + timeout if timeout is not None and self.outstanding else None
        done = []
        while self._requests and self._requests[0].first + self._requests[0].packets <= number:
            done.append(self._requests.popleft())
        self._position = max(0, self._position - len(done))
        self._seek()
        self.counters.messages += len(done)
        return done

    def _note_stall(self, now: float) -> None:
        if now - self._progress > self.counters.stall:
            self.counters.stall = now - self._progress
            self.counters.stall_begin = self._progress

    def _retry(self, now: float) -> None:
        if self._retries == 0:
            self._note_stall(now)
            self._fail("transport retry counter exceeded")
            return
        self._retries -= 1
        self._go_back()
        timeout = self.transport.ack_timeout
        self._expiry = now + timeout if timeout is not None else None

    def _go_back(self) -> None:
        self.next = self.una
        self._position = 0

    def _seek(self) -> None:
        """An acknowledgement of what was sent before going back may have passed `next` over messages."""
        while (
            self._position < len(self._requests)
            and self._requests[self._position].first + self._requests[self._position].packets <= self.next
        ):
            self._position += 1

    def _fail(self, reason: str) -> None:
        self.error = reason
        self._expiry = None
