"""What is told of a queue pair when traffic has ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qpd.lab.endpoint.connections import Connection
from qpd.lab.endpoint.requester import Requester
from qpd.lab.endpoint.responder import Responder


@dataclass(frozen=True)
class QpReport:
    """One direction of a connection: the source's requests and what the destination made of them.

    Packets and bytes are of data; `packets` counts those sent again, too.
    """

    source: str
    destination: str
    source_qp: int
    destination_qp: int
    source_port: int
    packets: int
    bytes: int
    messages: int
    """Acknowledged."""
    retransmitted: int
    timeouts: int
    naks: int
    """Answers of a sequence error that the source got."""
    rnr_naks: int
    cnps: int
    stall_s: float
    """The longest time without an acknowledgement of anything new while something was on its way."""
    stall_begin_ns: int
    error: str | None
    """Why the queue pair died; None where it lives."""
    received_packets: int
    received_bytes: int
    out_of_sequence: int
    duplicates: int

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        return asdict(self)


def of_requester(requester: Requester) -> dict[str, Any]:
    """What the source's side says, as JSON."""
    counters = asdict(requester.counters)
    counters["stall_s"] = counters.pop("stall")
    counters["stall_begin_ns"] = round(counters.pop("stall_begin") * 1e9)
    return counters | {"error": requester.error}


def of_responder(responder: Responder) -> dict[str, Any]:
    """What the destination's side says, as JSON."""
    counters = responder.counters
    return {
        "received_packets": counters.packets,
        "received_bytes": counters.bytes,
        "out_of_sequence": counters.out_of_sequence,
        "duplicates": counters.duplicates,
    }


def join(connection: Connection, sent: Mapping[str, Any], received: Mapping[str, Any]) -> QpReport:
    """Both sides' words of the direction from a connection's source to its destination."""
    return QpReport(
        source=connection.source.host,
        destination=connection.destination.host,
        source_qp=connection.source.qp,
        destination_qp=connection.destination.qp,
        source_port=connection.source.source_port,
        **sent,
        **received,
    )
