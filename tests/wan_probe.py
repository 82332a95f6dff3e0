"""Measures one direction of a wire between two namespaces: delay and jitter, loss, rate. JSON on stdout.

    python tests/wan_probe.py delay|loss|rate FROM TO ADDRESS [PACKETS]

Both sockets are in this process and use one clock. Arrivals are stamped by the kernel (SO_TIMESTAMPNS), so that a
busy machine that reads late measures the same.
"""

from __future__ import annotations

import json
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from functools import partial

from qpd.lab import namespaces

PORT = 4799
SO_TIMESTAMPNS = 35
_STAMP = struct.Struct("=qq")
_HEADERS = 14 + 20 + 8
_ROOM = 8 << 20
_PATIENCE = 1.0


class Wire:
    """A sender in one namespace, a receiver in another."""

    def __init__(self, source: str, target: str, address: str) -> None:
        make = partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self.sender = namespaces.inside(source, make)
        self.receiver = namespaces.inside(target, make)
        self.receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        # SO_RCVBUFFORCE: beyond the kernel's limit for others.
        self.receiver.setsockopt(socket.SOL_SOCKET, 33, _ROOM)
        self.receiver.bind((address, PORT))
        self.sender.connect((address, PORT))

    def send(self, number: int, size: int = 64) -> None:
        """One packet, with its number and the moment."""
        self.sender.send(struct.pack("=QQ", number, time.time_ns()).ljust(size, b"\0"))

    def arrivals(self, patience: float = 0.0) -> Iterator[tuple[int, int, int, int]]:
        """Number, moment of sending, moment of arrival (ns), and bytes on the wire of what has come."""
        self.receiver.settimeout(patience)
        while True:
            try:
                data, ancillary, _, _ = self.receiver.recvmsg(65536, 64)
            except (BlockingIOError, TimeoutError):
                return
            number, sent = struct.unpack_from("=QQ", data)
            seconds, nanoseconds = _STAMP.unpack(ancillary[0][2][: _STAMP.size])
            yield number, sent, seconds * 10**9 + nanoseconds, len(data) + _HEADERS


def delay(wire: Wire, packets: int) -> dict[str, float]:
    """Packets far enough apart that none waits for another: median delay and the spread of nine tenths, in ms."""
    delays = []
    for number in range(packets):
        wire.send(number)
        time.sleep(0.004)
        delays += [(arrived - sent) / 1e6 for _, sent, arrived, _ in wire.arrivals()]
    delays += [(arrived - sent) / 1e6 for _, sent, arrived, _ in wire.arrivals(_PATIENCE)]
    tenths = statistics.quantiles(delays, n=10)
    return {
        "packets": len(delays),
        "median_ms": statistics.median(delays),
        "spread_ms": tenths[8] - tenths[0],
    }


def loss(wire: Wire, packets: int) -> dict[str, float]:
    """The part that does not arrive."""
    arrived = 0
    for number in range(packets):
        wire.send(number)
        if number % 64 == 0:
            arrived += sum(1 for _ in wire.arrivals())
    arrived += sum(1 for _ in wire.arrivals(_PATIENCE))
    return {"packets": packets, "lost": (packets - arrived) / packets}


def rate(wire: Wire, packets: int) -> dict[str, float]:
    """Bits per second of what arrives while the sender waits for room; the first tenth, a full bucket, is left out."""
    seen: list[tuple[int, int]] = []
    number = 0
    limit = time.monotonic() + 60
    while len(seen) < packets and time.monotonic() < limit:
        for _ in range(16):
            wire.send(number, 1400)
            number += 1
        seen += [(arrived, size) for _, _, arrived, size in wire.arrivals()]
    seen = seen[len(seen) // 10 :]
    took = (seen[-1][0] - seen[0][0]) / 1e9
    return {"packets": len(seen), "bits_per_second": 8 * sum(s for _, s in seen[1:]) / took}


MEASURES = {"delay": (delay, 2000), "loss": (loss, 30000), "rate": (rate, 4000)}


def probe(what: str, source: str, target: str, address: str, packets: int | None = None) -> dict[str, float]:
    """One measurement."""
    measure, default = MEASURES[what]
    wire = Wire(source, target, address)
    try:
        return measure(wire, packets or default)
    finally:
        wire.sender.close()
        wire.receiver.close()


if __name__ == "__main__":
    _what, _source, _target, _address, *_more = sys.argv[1:]
    print(json.dumps(probe(_what, _source, _target, _address, *map(int, _more))))
