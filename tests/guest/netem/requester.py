"""The near end of reliable connections: sends requests of one packet each, in order, and goes back to what was lost."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from qpd.lab import namespaces
from qpd.lab.mmsg import Inbox, Outbox, sockaddr

from .responder import NAK_SEQUENCE, RC_ACKNOWLEDGE, RC_SEND_ONLY, RESPONSE_TO

PORT = 4791
PAYLOAD = bytes(64)
_BTH = struct.Struct("!BBHII")
_RESPONSE = struct.Struct("!BBHIIB")
_ASKS = 1 << 31
_SO_NO_CHECK, _SO_RCVBUFFORCE = 11, 33
_BATCH = 256
_NAP = 0.005


@dataclass
class Connection:
    """A connection of a queue pair here to QP ``dest_qp``. Its PSNs must not reach 2**24."""

    destination: str
    dest_qp: int
    psn: int
    """The first one."""

    def __post_init__(self) -> None:
        self.due = self.next = self.newest = self.psn
        """The first PSN that is not acknowledged, the one to be sent next, and the first that was never sent."""
        self.moved = 0.0
        """When ``due`` moved on, or the timer went off."""
        address = sockaddr(self.destination, PORT)
        self.name = ctypes.create_string_buffer(address, len(address))

    @property
    def qp(self) -> int:
        """The number of the queue pair here."""
        return self.dest_qp + RESPONSE_TO


@dataclass(frozen=True)
class Manner:
    """How connections send."""

    window: int = 1
    """Packets of one that may be on their way."""
    ask_every: int = 1
    """One in so many asks for an acknowledgement, and so does the last of a full window."""
    timeout: float = 1.0
    """Seconds without progress after which one goes back."""
    rate: float | None = None
    """Packets a second of all together; None: as fast as they can."""


class Requester:
    """The connections of one address."""

    def __init__(
        self, namespace: str, source: str, connections: Sequence[Connection], manner: Manner | None = None
    ) -> None:
        self.connections = {connection.qp: connection for connection in connections}
        self._manner = manner or Manner()
        self._socket = namespaces.inside(
            namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        # The responder changes packets: no checksum could be right both ways.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        self._socket.bind((source, PORT))
        self._inbox, self._outbox = Inbox(_BATCH, 256), Outbox(_BATCH, _BTH.size + len(PAYLOAD))
        self._budget = (0.0, time.monotonic())
        self.sent = 0
        """Packets."""

    def close(self) -> None:
        self._socket.close()

    def exchange(self, count: int, deadline: float = 120.0) -> None:
        """Until so many more requests of every connection are acknowledged."""
        ends = {qp: connection.due + count for qp, connection in self.connections.items()}
        limit = time.monotonic() + deadline
        while any(self.connections[qp].due < end for qp, end in ends.items()):
            assert time.monotonic() < limit, f"after {deadline:.0f} s: {self.connections}"
            self._turn(ends)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send all the time, in a thread."""
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                self._turn({})

        thread = threading.Thread(target=work, name="requester")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _turn(self, ends: dict[int, int]) -> None:
        """Take what has come, send what may be sent, and wait for more."""
        lengths, _ = self._inbox.receive(self._socket.fileno())
        now = time.monotonic()
        for row in self._inbox.rows[: len(lengths)]:
            self._take(_RESPONSE.unpack_from(row), now)
        allowed, since = self._budget
        rate = self._manner.rate
        allowed = float(_BATCH) if rate is None else min(allowed + rate * (now - since), float(_BATCH))
        for connection in self.connections.values():
            if connection.due < connection.next and now - connection.moved > self._manner.timeout:
                connection.next, connection.moved = connection.due, now
            end = min(connection.due + self._manner.window, ends.get(connection.qp, 1 << 24))
            while connection.next < end and allowed >= 1:
                self._ask(connection, end, now)
                allowed -= 1
        self._budget = (allowed, now)
        sent = self._outbox.used
        self._outbox.send(self._socket.fileno())
        self.sent += sent
        if not lengths and not sent:
            select.select([self._socket], [], [], _NAP)

    def _take(self, response: tuple[int, ...], now: float) -> None:
        opcode, _, _, qp, psn, syndrome = response
        assert opcode == RC_ACKNOWLEDGE
        connection = self.connections[qp]
        due = psn if syndrome == NAK_SEQUENCE else psn + 1
        if due > connection.due:
            connection.due, connection.moved = due, now
        if syndrome == NAK_SEQUENCE:
            connection.next = connection.due
        connection.next = max(connection.next, connection.due)

    def _ask(self, connection: Connection, end: int, now: float) -> None:
        psn = connection.next
        asks = psn % self._manner.ask_every == 0 or psn + 1 == end
        bth = (RC_SEND_ONLY, 0, 0xFFFF, connection.dest_qp, psn | (_ASKS if asks else 0))
        _BTH.pack_into(self._outbox.rows[self._outbox.used], 0, *bth)
        self._outbox.add(_BTH.size + len(PAYLOAD), connection.name)
        if connection.due == connection.next:
            connection.moved = now
        connection.next = psn + 1
        connection.newest = max(connection.newest, connection.next)
