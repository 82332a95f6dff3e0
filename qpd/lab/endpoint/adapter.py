"""The thin shell around the queue pairs of a process: one raw socket that sends, one UDP socket that receives.

A raw socket, since each queue pair has a source port of its own: thousands of them, and one system call for a batch.
"""

from __future__ import annotations

import ctypes
import heapq
import select
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpd.lab import mmsg, roce
from qpd.lab.endpoint import dcqcn, frames
from qpd.lab.endpoint.config import Transport
from qpd.lab.endpoint.connections import End
from qpd.lab.endpoint.requester import Request, Requester
from qpd.lab.endpoint.responder import REASONS, Arrived, Responder, Syndrome
from qpd.lab.roce import Opcode

_BATCH = 128
"""Packets of one system call; few enough for the 1 000 that a kernel queue between interfaces holds."""
_TURN = 16
"""Most packets that a queue pair sends before it is the next one's turn."""
_ROOM = 256
"""Bytes of a row beside the data: headers and ICRC."""
_RECEIVE_BUFFER = 1 << 28
_CONGESTION_EXPERIENCED = 0b11
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE, _SO_MEMINFO = 33, 32, 55
_IPV6_RECVTCLASS, _UDP_NO_CHECK6_RX = 66, 102


@dataclass(eq=False)
class QueuePair:
    """A queue pair of this adapter."""

    own: End
    peer: End
    requester: Requester
    responder: Responder
    writer: frames.Writer
    reverse: frames.Prefix
    """The headers of what comes from the peer."""
    name: ctypes.Array[ctypes.c_char]
    """The peer's address for the kernel."""
    notification: dcqcn.NotificationPoint
    queued: bool = False
    """Waits for its turn to send."""
    armed: float = float("inf")
    """The earliest time at which the adapter looks at its timers."""


@dataclass
class AdapterCounters:
    """What concerns no queue pair."""

    bad_icrc: int = 0
    unknown_qp: int = 0
    malformed: int = 0
    unsendable: int = 0
    """Packets that the host could not send: no route, or its link is down."""
    overflows: int = 0
    """Packets that the socket's buffer had no room for: the process was late; brought up to date by `tell`."""


class Adapter:
    """Queue pairs of one address, and the memory that all of them read and write.

    Args:
        address: the host's.
        memory: bytes; what a peer writes to address n lands at index n.
        transport: settings of every queue pair.
    """

    def __init__(self, address: str, memory: npt.NDArray[np.uint8], transport: Transport) -> None:
        self.address = address
        self.transport = transport
        self.counters = AdapterCounters()
        self.sent: list[tuple[QueuePair, Request]] = []
        """Completed requests; whoever takes them empties the list."""
        self.arrived: list[tuple[QueuePair, Arrived]] = []
        """Messages that came in; whoever takes them empties the list."""
        self.failed: list[QueuePair] = []
        """Queue pairs that went to the error state."""
        self.qps: dict[int, QueuePair] = {}
        self._memory = memoryview(memory)  # type: ignore[arg-type]
        self._outbox = mmsg.Outbox(_BATCH, transport.mtu + _ROOM)
        self._inbox = mmsg.Inbox(_BATCH, transport.mtu + _ROOM)
        self._ready: deque[QueuePair] = deque()
        self._timers: list[tuple[float, int]] = []
        self._out = _raw_socket(address)
        self._in = _udp_socket(address)
        self._poll = select.poll()
        self._poll.register(self._in, select.POLLIN)

    def close(self) -> None:
        """Close the sockets."""
        self._out.close()
        self._in.close()

    def tell(self) -> AdapterCounters:
        """The counters as they are now."""
        # SO_MEMINFO's ninth figure is the socket's drops (linux/sock_diag.h).
        raw = self._in.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
        self.counters.overflows = int(struct.unpack("9I", raw)[8])
        return self.counters

    def watch(self, descriptor: int) -> None:
        """Let `step` return, too, when there is something to read from this descriptor."""
        self._poll.register(descriptor, select.POLLIN)

    def add(self, own: End, peer: End, peer_address: str) -> QueuePair:
        """Make a queue pair that is connected to the peer's."""
        transport = self.transport
        qp = QueuePair(
            own=own,
            peer=peer,
            requester=Requester(transport, own.first_psn),
            responder=Responder(transport.mtu, peer.first_psn, len(self._memory), transport.rnr_timer),
            writer=frames.Writer(
                frames.Prefix(self.address, peer_address, own.source_port), peer.qp, transport.mtu
            ),
            reverse=frames.Prefix(peer_address, self.address, peer.source_port),
            name=ctypes.create_string_buffer(raw := mmsg.sockaddr(peer_address, 0), len(raw)),
            notification=dcqcn.NotificationPoint(dcqcn.Parameters()),
        )
        if transport.dcqcn:
            qp.requester.reaction = dcqcn.ReactionPoint(dcqcn.Parameters(), transport.rate or dcqcn.LINE_RATE)
        self.qps[own.qp] = qp
        return qp

    def post(self, qp: QueuePair, request: Request) -> None:
        """Queue a message."""
        qp.requester.post(request)
        self._schedule(qp, time.monotonic())

    def step(self, timeout: float) -> bool:
        """Receive, let timers expire, send; where there was nothing to do, wait for at most `timeout` seconds.

        Returns:
            True where anything was received or sent.
        """
        # No timer expires while what arrived before may still wait to be read: the process was late, not the network.
        before = time.monotonic()
        received = self._receive()
        if received < _BATCH:
            self._expire(before)
        now = time.monotonic()
        busy = self._transmit(now) or received > 0
        if not busy and timeout > 0:
            if self._timers:
                timeout = min(timeout, max(0.0, self._timers[0][0] - now))
            self._poll.poll(timeout * 1000)
        return busy

    # -- receiving --------------------------------------------------------------------------------------------------

    def _receive(self) -> int:
        lengths, classes = self._inbox.receive(self._in.fileno())
        if not lengths:
            return 0
        now = time.monotonic()
        touched: dict[int, QueuePair] = {}
        marked = (classes & 0b11) == _CONGESTION_EXPERIENCED
        for row, length, congested in zip(self._inbox.rows, lengths, marked.tolist(), strict=False):
            packet = frames.read(row, length)
            if packet is None:
                self.counters.malformed += 1
                continue
            qp = self.qps.get(packet.qp)
            if qp is None:
                self.counters.unknown_qp += 1
                continue
            if qp.requester.error is not None:
                # In the error state nothing is taken and nothing answered (IBA volume 1, 10.3.1.7).
                continue
            if self.transport.check_icrc and not frames.check(row, length, qp.reverse):
                self.counters.bad_icrc += 1
                continue
            if packet.opcode == Opcode.ACKNOWLEDGE:
                self._answered(qp, packet, now)
                continue
            if packet.opcode == Opcode.CNP:
                qp.requester.congested(now)
                continue
            place = qp.responder.receive(
                packet.opcode,
                packet.psn,
                packet.end - packet.begin,
                ask=packet.ask,
                address=packet.address,
                total=packet.total,
                immediate=packet.immediate,
            )
            if place is not None:
                self._memory[place : place + packet.end - packet.begin] = row[packet.begin : packet.end]
            touched[packet.qp] = qp
            if congested and qp.notification.marked(now):
                self._add(qp, qp.writer.cnp(self._row()))
        for qp in touched.values():
            self._reply(qp)
        self._flush()
        return len(lengths)

    def _reply(self, qp: QueuePair) -> None:
        responder = qp.responder
        if responder.arrived:
            self.arrived += [(qp, arrived) for arrived in responder.arrived]
            responder.arrived.clear()
        if responder.reply is not None:
            responder.counters.acks += responder.reply.is_ack
            self._add(qp, qp.writer.reply(self._row(), responder.reply))
            responder.reply = None

    def _answered(self, qp: QueuePair, packet: frames.Packet, now: float) -> None:
        requester, syndrome = qp.requester, packet.syndrome
        kind = syndrome >> 5
        done: list[Request] = []
        if kind == Syndrome.ACK >> 5:
            done = requester.acknowledge(packet.psn, now)
        elif kind == Syndrome.RNR_NAK >> 5:
            done = requester.not_ready(packet.psn, syndrome & 31, now)
        elif syndrome == Syndrome.SEQUENCE_ERROR:
            done = requester.sequence_error(packet.psn, now)
        else:
            reason = next((text for code, text in REASONS.items() if code == syndrome), "an unknown NAK")
            requester.refused(reason)
        self.sent += [(qp, request) for request in done]
        self._look(qp, now)

    # -- sending ----------------------------------------------------------------------------------------------------

    def _transmit(self, now: float) -> bool:
        sent = False
        for _ in range(len(self._ready)):
            qp = self._ready.popleft()
            requester = qp.requester
            for segment in requester.transmit(now, _TURN):
                sent = True
                request = segment.request
                last = request.packets - 1 - segment.offset
                for index in range(segment.count):
                    ask = requester.asks(segment.number + index, last=index == last)
                    self._add(qp, qp.writer.request(self._row(), segment, index, self._memory, ask=ask))
            qp.queued = False
            self._look(qp, now)
            if self._outbox.used > _BATCH - _TURN:
                break
        self._flush()
        return sent

    def _row(self) -> memoryview:
        if self._outbox.full:
            self._flush()
        return self._outbox.rows[self._outbox.used]

    def _add(self, qp: QueuePair, length: int) -> None:
        self._outbox.add(length, qp.name)

    def _flush(self) -> None:
        self.counters.unsendable += self._outbox.send(self._out.fileno())

    # -- turns and timers -------------------------------------------------------------------------------------------

    def _schedule(self, qp: QueuePair, now: float) -> None:
        if not qp.queued and qp.requester.ready(now):
            qp.queued = True
            self._ready.append(qp)

    def _look(self, qp: QueuePair, now: float) -> None:
        """After anything that may have changed what a queue pair may send, and when."""
        if qp.requester.error is not None:
            self._fail(qp)
            return
        self._schedule(qp, now)
        deadline = qp.requester.deadline(now)
        if deadline is not None and deadline < qp.armed:
            qp.armed = deadline
            heapq.heappush(self._timers, (deadline, qp.own.qp))

    def _fail(self, qp: QueuePair) -> None:
        if qp not in self.failed:
            self.failed.append(qp)

    def _expire(self, now: float) -> None:
        due = []
        while self._timers and self._timers[0][0] <= now:
            at, number = heapq.heappop(self._timers)
            qp = self.qps[number]
            # Deadlines move on with every acknowledgement; the heap learns of it only here.
            if at <= qp.armed:
                qp.armed = float("inf")
                due.append(qp)
        for qp in due:
            qp.requester.on_time(now)
            self._look(qp, now)


def _raw_socket(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    made.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 23)
    return made


def _udp_socket(address: str) -> socket.socket:
    v6 = ":" in address
    made = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    if v6:
        # RoCEv2 has no UDP checksum (annex A17.3.2): the ICRC covers the packet.
        made.setsockopt(socket.IPPROTO_UDP, _UDP_NO_CHECK6_RX, 1)
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVTCLASS, 1)
    else:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
    made.bind((address, roce.UDP_PORT))
    return made
