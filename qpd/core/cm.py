"""Queue pairs as the connection manager's messages tell them, for applications that use it (rdma_cm). Pure.

InfiniBand Architecture Specification volume 1, 12.6 and 12.9: a REQ names the asker's QP, the REP that answers it (by
communication ids) the other one; a DREQ ends the connection. Messages pass unencrypted on QP 1; what a lost one would
have said is learned from PSNs instead.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from qpd.model import Address, CmKind, CmMessage, Hook, QueuePairKey

REQUESTS_MAX = 4096
"""Requests that wait for their reply."""
CONNECTIONS_MAX = 65536


@dataclass(frozen=True, slots=True)
class Connection:
    """``near``: the QP at this leaf's host. ``far``: its partner."""

    near: QueuePairKey
    far: QueuePairKey


@dataclass(frozen=True, slots=True)
class Change:
    """What one message has changed; a number that is connected anew ends what it was before."""

    made: Connection | None = None
    ended: tuple[Connection, ...] = ()


class CmBook:
    """Takes messages in the order in which they passed."""

    def __init__(self) -> None:
        self._requests: OrderedDict[tuple[Address, Address, int], CmMessage] = OrderedDict()
        """By asker, asked, and the asker's communication id."""
        self._of: OrderedDict[tuple[Address, int], Connection] = OrderedDict()
        """By host and QP, both ends of each connection."""

    def take(self, message: CmMessage) -> Change:
        """What follows from a message."""
        match message.kind:
            case CmKind.REQ:
                key = (message.src, message.dst, message.local_id)
                self._requests.pop(key, None)
                self._requests[key] = message
                while len(self._requests) > REQUESTS_MAX:
                    self._requests.popitem(last=False)
            case CmKind.REP:
                # Sent again where no RTU came: the request stays until it is old.
                request = self._requests.get((message.dst, message.src, message.remote_id))
                # Within one tenant, or what is routed between two of its networks; seen from the same side.
                if request is not None and request.hook is not message.hook:
                    return self._connect(request, message)
            case CmKind.REJ:
                self._requests.pop((message.dst, message.src, message.remote_id), None)
            case CmKind.DREQ:
                return Change(None, self._end(message.dst, message.qpn, message.src))
            case _:
                pass
        return Change()

    def _connect(self, request: CmMessage, reply: CmMessage) -> Change:
        # Packets to a QP are in the network that messages to its host are in.
        asker = QueuePairKey(reply.vni, request.src, request.qpn)
        asked = QueuePairKey(request.vni, reply.src, reply.qpn)
        leaves = request.hook is Hook.STEER
        made = Connection(asker, asked) if leaves else Connection(asked, asker)
        if self._of.get((asker.dst, asker.dest_qp)) == made == self._of.get((asked.dst, asked.dest_qp)):
            return Change()
        ended = (*self._end(asker.dst, asker.dest_qp), *self._end(asked.dst, asked.dest_qp))
        for end in (asker, asked):
            self._of[end.dst, end.dest_qp] = made
        while len(self._of) > 2 * CONNECTIONS_MAX:
            host, qp = next(iter(self._of))
            self._end(host, qp)
        return Change(made, ended)

    def _end(self, host: Address, qp: int, other: Address | None = None) -> tuple[Connection, ...]:
        """End the connection of a QP, if it is one with the other host."""
        known = self._of.get((host, qp))
        if known is None or (other is not None and other not in {known.near.dst, known.far.dst}):
            return ()
        for end in (known.near, known.far):
            if self._of.get((end.dst, end.dest_qp)) == known:
                del self._of[end.dst, end.dest_qp]
        return (known,)
