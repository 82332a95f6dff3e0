"""The receiving half of an RC queue pair: packets in, where their data goes, and what is answered. Pure.

InfiniBand Architecture Specification volume 1, 9.7.4 and 9.7.5: what a responder does with each PSN.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum

from qpd.lab.endpoint import psn
from qpd.lab.roce import FIRSTS, LASTS, REQUESTS, WITH_IMMEDIATE, Opcode

INVALID_CREDITS = 31
"""The credit count of an ACK whose sender does not limit the requester (IBA volume 1, 9.7.7.2.1)."""


class Syndrome(IntEnum):
    """The AETH's syndrome without an ACK's credits or an RNR NAK's timer (IBA volume 1, table 44)."""

    ACK = 0x00 | INVALID_CREDITS
    RNR_NAK = 0x20
    SEQUENCE_ERROR = 0x60
    INVALID_REQUEST = 0x61
    REMOTE_ACCESS_ERROR = 0x62
    REMOTE_OPERATIONAL_ERROR = 0x63


REASONS = {
    Syndrome.INVALID_REQUEST: "remote invalid request",
    Syndrome.REMOTE_ACCESS_ERROR: "remote access error",
    Syndrome.REMOTE_OPERATIONAL_ERROR: "remote operation error",
}


@dataclass(frozen=True)
class Reply:
    """What is to be answered: an ACK or NAK of this (folded) PSN."""

    psn: int
    syndrome: int
    msn: int

    @property
    def is_ack(self) -> bool:
        """True for an ACK."""
        return self.syndrome == Syndrome.ACK


@dataclass(frozen=True)
class Arrived:
    """A message that is complete: where its data is and the immediate data that came with it."""

    address: int
    length: int
    immediate: int | None


@dataclass
class ResponderCounters:
    """What has arrived; packets, unless it says otherwise."""

    packets: int = 0
    """In order, taken."""
    bytes: int = 0
    """Of data, taken."""
    messages: int = 0
    out_of_sequence: int = 0
    """Dropped: an earlier one was missing."""
    duplicates: int = 0
    """Dropped: they had come before."""
    acks: int = 0
    naks: int = 0
    """Answers of a sequence error."""
    rnr_naks: int = 0


class Responder:
    """One queue pair's responder.

    Args:
        mtu: bytes of data in a packet that is not the last of its message.
        first_psn: the PSN that the peer begins with.
        memory: the length of the memory that the peer may write to; addresses begin at 0.
        rnr_timer: the code of the time that a peer shall wait when no receive request is there.
    """

    def __init__(self, mtu: int, first_psn: int, memory: int, rnr_timer: int = 12) -> None:
        self.expected = first_psn
        self.counters = ResponderCounters()
        self.reply: Reply | None = None
        """What is to be answered. Whoever sends it sets it to None; until then, answers are coalesced in it."""
        self.arrived: list[Arrived] = []
        """Completed messages that had immediate data or were SENDs; whoever takes them empties the list."""
        self._mtu = mtu
        self._memory = memory
        self._rnr_timer = rnr_timer
        self._receives: deque[tuple[int, int]] = deque()
        self._msn = 0
        self._asked_again = False
        self._begin = self._cursor = self._end = 0
        """Address of the current message's first byte, of the next byte, and of the byte after the last."""
        self._within: bool | None = None
        """Whether the current message is a WRITE; None between messages."""

    def post_receive(self, address: int, length: int) -> None:
        """Let a message with immediate data, or a SEND (whose data goes to `address`), come in."""
        self._receives.append((address, length))

    def receive(
        self,
        opcode: int,
        number: int,
        length: int,
        *,
        ask: bool,
        address: int = 0,
        total: int = 0,
        immediate: int = 0,
    ) -> int | None:
        """Take a packet.

        Args:
            opcode: the BTH's.
            number: the PSN.
            length: bytes of data.
            ask: the acknowledgement is requested.
            address: the RETH's, where the packet has one.
            total: the RETH's length of the whole message.
            immediate: the immediate data, where the packet has any.

        Returns:
            The address where the packet's data goes; None where it goes nowhere.
        """
        ahead = psn.distance(number, self.expected % psn.MODULUS)
        if ahead > 0:
            self.counters.out_of_sequence += 1
            # One NAK for a gap (9.7.5.2.8): the packets behind it were on their way already.
            if not self._asked_again:
                self._asked_again = True
                self.counters.naks += 1
                self._answer(Syndrome.SEQUENCE_ERROR)
            return None
        if ahead < 0:
            self.counters.duplicates += 1
            # The ACK may have been lost; it says where the responder really is. A NAK says more.
            if self.reply is None or self.reply.is_ack:
                self._acknowledge()
            return None
        refusal = self._refusal(opcode, length, address, total)
        if refusal is not None:
            if refusal is Syndrome.RNR_NAK:
                self.counters.rnr_naks += 1
                self._asked_again = True
                self._answer(Syndrome.RNR_NAK | self._rnr_timer)
            else:
                self._answer(refusal)
            return None
        return self._take(opcode, length, ask, address, total, immediate)

    def _take(  # noqa: PLR0917 - the hot path: no keywords
        self, opcode: int, length: int, ask: bool, address: int, total: int, immediate: int
    ) -> int:
        is_write = opcode >= Opcode.WRITE_FIRST
        if opcode in FIRSTS:
            self._within = is_write
            if not is_write:
                address, total = self._receives[0]
            self._begin = self._cursor = address
            self._end = address + total
        place = self._cursor
        self._cursor += length
        self.expected += 1
        self._asked_again = False
        counters = self.counters
        counters.packets += 1
        counters.bytes += length
        if opcode in LASTS:
            self._complete(is_write, immediate if opcode in WITH_IMMEDIATE else None)
        if ask or (self.reply is not None and not self.reply.is_ack):
            self._acknowledge()
        return place

    def _complete(self, is_write: bool, immediate: int | None) -> None:
        self._within = None
        self._msn = (self._msn + 1) % psn.MODULUS
        self.counters.messages += 1
        if immediate is not None or not is_write:
            self._receives.popleft()
            self.arrived.append(Arrived(self._begin, self._cursor - self._begin, immediate))

    def _refusal(self, opcode: int, length: int, address: int, total: int) -> Syndrome | None:
        """Why the expected packet cannot be taken; None where it can."""
        if opcode not in REQUESTS or (opcode in FIRSTS) != (self._within is None):
            return Syndrome.INVALID_REQUEST
        is_write = opcode >= Opcode.WRITE_FIRST
        if self._within is not None and self._within != is_write:
            return Syndrome.INVALID_REQUEST
        last = opcode in LASTS
        if length > self._mtu or (not last and length != self._mtu):
            return Syndrome.INVALID_REQUEST
        if not self._receives and (opcode in WITH_IMMEDIATE or (not is_write and opcode in FIRSTS)):
            return Syndrome.RNR_NAK
        if opcode in FIRSTS:
            if is_write and not 0 <= address <= address + total <= self._memory:
                return Syndrome.REMOTE_ACCESS_ERROR
            room = total if is_write else self._receives[0][1]
        else:
            room = self._end - self._cursor
        if length > room or (is_write and last and length != room):
            return Syndrome.INVALID_REQUEST
        return None

    def _acknowledge(self) -> None:
        self.reply = Reply((self.expected - 1) % psn.MODULUS, Syndrome.ACK, self._msn)

    def _answer(self, syndrome: int) -> None:
        self.reply = Reply(self.expected % psn.MODULUS, syndrome, self._msn)
