"""The program that sends RoCE test traffic of one flow: `python -m qpd.lab.sender SPEC` inside a host's namespace.

It prints `ready`, sends until its time or count is reached or SIGTERM comes, and prints its result as JSON.
"""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from qpd.lab import mmsg, roce

_BURST = 64
"""Most packets of one system call: what comes back from it is up to date by the time of this many packets."""
_RING = 256
"""Least number of prepared packets."""
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO, _SO_NO_CHECK, _IPV6_MTU_DISCOVER = 10, 2, 11, 23


@dataclass(frozen=True)
class Spec:
    """What to send; the program's argument as JSON."""

    source: str
    destination: str
    qps: list[int]
    """Destination QP numbers."""
    source_ports: list[int]
    """One for all QPs, or one for each."""
    rate: float | None = None
    """Packets per second and QP; None: as fast as possible."""
    size: int = 1024
    """Bytes of data a packet."""
    opcode: int = roce.Opcode.SEND_ONLY
    ack_every: int = 16
    """Every n-th packet of a QP asks for an acknowledgement."""
    first_psn: int = 0
    duration: float | None = None
    """Seconds; None: until SIGTERM."""
    packets: int | None = None
    """Packets of each QP; None: no limit."""


@dataclass
class Result:
    """What was sent: packets by QP, and CLOCK_MONOTONIC nanoseconds of begin and end."""

    sent: dict[int, int]
    bytes: int
    begin_ns: int
    end_ns: int


class Ring:
    """Prepared packets of the QPs of one source port, in turn; refilled with new PSNs whenever all have been sent."""

    def __init__(self, spec: Spec, source_port: int, qps: list[int]) -> None:
        self.qps = qps
        self.rounds = max(1, _RING // len(qps))
        templates = [
            roce.Template(
                spec.source,
                spec.destination,
                source_port,
                qp,
                opcode=roce.Opcode(spec.opcode),
                size=spec.size,
            )
            for qp in qps
        ]
        self._contributions = templates[0].contributions()
        length = templates[0].length
        block = np.zeros((len(qps), length), dtype=np.uint8)
        for row, template in zip(block, templates, strict=True):
            row[: length - roce.ICRC_LENGTH] = np.frombuffer(template.transport, dtype=np.uint8)
        self.rows = np.ascontiguousarray(np.tile(block, (self.rounds, 1)))
        self._base = np.tile(
            np.array([template.base for template in templates], dtype=np.uint32), self.rounds
        )
        self._spec = spec
        self._first_round = 0
        self.position = 0
        self.total = 0
        self._sender = mmsg.Sender(self.rows, mmsg.sockaddr(spec.destination, roce.UDP_PORT))
        self.socket = _socket(spec, source_port)
        self._fill()

    @property
    def wire_length(self) -> int:
        """Length of a packet's UDP payload."""
        return int(self.rows.shape[1])

    def send(self, count: int) -> int:
        """Send up to `count` packets; returns how many were sent."""
        count = min(count, _BURST, len(self.rows) - self.position)
        sent = self._sender.send(self.socket.fileno(), self.position, count)
        self.position += sent
        self.total += sent
        if self.position == len(self.rows):
            self.position = 0
            self._first_round += self.rounds
            self._fill()
        return sent

    def sent(self) -> dict[int, int]:
        """Packets sent of each QP."""
        rounds, more = divmod(self.total, len(self.qps))
        return {qp: rounds + (index < more) for index, qp in enumerate(self.qps)}

    def _fill(self) -> None:
        rounds = np.repeat(np.arange(self.rounds), len(self.qps)) + self._first_round
        psn = (rounds + self._spec.first_psn) % roce.PSN_MODULUS
        changing: npt.NDArray[np.uint8] = np.empty((len(psn), 4), dtype=np.uint8)
        changing[:, 0] = np.where(rounds % self._spec.ack_every == self._spec.ack_every - 1, 0x80, 0)
        changing[:, 1], changing[:, 2], changing[:, 3] = psn >> 16, psn >> 8 & 0xFF, psn & 0xFF
        self.rows[:, roce.ACK_REQUEST_OFFSET : roce.ACK_REQUEST_OFFSET + 4] = changing
        icrc = self._base.copy()
        for position in range(4):
            icrc ^= self._contributions[position, changing[:, position]]
        self.rows[:, -roce.ICRC_LENGTH :] = icrc.astype("<u4").view(np.uint8).reshape(-1, 4)


def _socket(spec: Spec, source_port: int) -> socket.socket:
    v6 = ":" in spec.source
    made = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    if v6:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IP_PMTUDISC_DO)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, roce.TRAFFIC_CLASS)
    else:
        # Not connected and DF: identification is 0 then, which the ICRC counts on.
        made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, roce.TRAFFIC_CLASS)
        made.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
    made.bind((spec.source, source_port))
    return made


class Pacer:
    """How many packets are due: a constant rate, which catches up after a pause of the machine."""

    def __init__(self, rate: float | None, begin: float, limit: int | None) -> None:
        self._rate = rate
        self._begin = begin
        self._limit = limit

    def due(self, now: float, sent: int) -> int:
        """Packets that should have been sent by now and have not."""
        wanted = sent + _BURST if self._rate is None else int((now - self._begin) * self._rate) + 1
        return (wanted if self._limit is None else min(wanted, self._limit)) - sent

    def next_at(self, sent: int) -> float:
        """The time at which the next packet is due."""
        return self._begin if self._rate is None else self._begin + sent / self._rate


def run(spec: Spec, stop: list[bool]) -> Result:
    """Send until the spec's end, or until `stop` is not empty."""
    rings = _rings(spec)
    print("ready", flush=True)
    count = len(spec.qps)
    limit = None if spec.packets is None else spec.packets * count
    begin_ns = time.monotonic_ns()
    begin = begin_ns / 1e9
    pacer = Pacer(None if spec.rate is None else spec.rate * count, begin, limit)
    end = None if spec.duration is None else begin + spec.duration
    sent = 0
    while not stop and (limit is None or sent < limit):
        now = time.monotonic()
        if end is not None and now >= end:
            break
        due = pacer.due(now, sent)
        if due <= 0:
            # At most a millisecond of packets at once, so that a QP's packets do not come in lumps.
            time.sleep(min(0.05, max(pacer.next_at(sent) - now, 0.0005)))
            continue
        sent += _send_round(rings, due)
    return Result(
        {qp: number for ring in rings for qp, number in ring.sent().items()},
        sent * rings[0].wire_length,
        begin_ns,
        time.monotonic_ns(),
    )


def _send_round(rings: list[Ring], due: int) -> int:
    if len(rings) == 1:
        return rings[0].send(due)
    # One QP a ring: the one that is behind goes first.
    ring = min(rings, key=lambda candidate: candidate.total)
    return ring.send(max(1, due // len(rings)))


def _rings(spec: Spec) -> list[Ring]:
    ports = spec.source_ports * len(spec.qps) if len(spec.source_ports) == 1 else spec.source_ports
    by_port: dict[int, list[int]] = {}
    for port, qp in zip(ports, spec.qps, strict=True):
        by_port.setdefault(port, []).append(qp)
    return [Ring(spec, port, qps) for port, qps in by_port.items()]


def end_with_parent() -> None:
    """Ask the kernel to send SIGTERM when the process that started this one ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def main() -> None:
    """Read the spec, send, print the result."""
    end_with_parent()
    stop: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    result = run(Spec(**json.loads(sys.argv[1])), stop)
    print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
