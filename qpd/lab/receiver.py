"""The program that receives RoCE test traffic: `python -m qpd.lab.receiver` inside a host's namespace.

It prints `ready`, counts until SIGTERM and then until nothing has come for a moment, and prints its result as JSON.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from qpd.lab import mmsg, roce
from qpd.lab.sender import end_with_parent

_BATCH = 256
_CHUNK = 1 << 16
_QUIET = 0.15
"""Seconds without a packet after which, once SIGTERM has come, nothing more is expected."""
_SO_RCVBUFFORCE, _SO_MEMINFO = 33, 55
_GAPS = 16
_HALF = roce.PSN_MODULUS // 2

_RECORD = np.dtype([("qp", "u4"), ("psn", "u4"), ("time", "i8"), ("length", "u4")])


@dataclass
class Arrivals:
    """One QP's packets as they arrived; times are CLOCK_MONOTONIC nanoseconds."""

    packets: int = 0
    bytes: int = 0
    """UDP payload."""
    first_ns: int = 0
    last_ns: int = 0
    gap_ns: int = 0
    """The longest time between two packets that followed each other."""
    gap_begin_ns: int = 0
    """When that gap began."""
    first_psn: int = 0
    last_psn: int = 0
    """The highest PSN, not folded to 24 bits."""
    missing: int = 0
    """PSNs between the first and the highest that never came."""
    duplicates: int = 0
    out_of_order: int = 0
    """Packets whose PSN was below one that had come before."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """Begin and length of the longest gaps, the longest first: that one and a few more."""


class Tracker:
    """Turns records of arrival into what is known of each QP; pure."""

    def __init__(self) -> None:
        self.arrivals: dict[int, Arrivals] = {}
        self._seen: dict[int, npt.NDArray[np.uint8]] = {}
        """How often each PSN came, counted from the first."""
        self._latest: dict[int, int] = {}
        """The PSN of the packet that came last, not folded."""

    def add(self, records: npt.NDArray[np.void]) -> None:
        """Take records in the order of arrival."""
        order = np.argsort(records["qp"], kind="stable")
        grouped = records[order]
        bounds = np.flatnonzero(np.diff(grouped["qp"])) + 1
        for group in np.split(grouped, bounds):
            if len(group):
                self._add_qp(int(group["qp"][0]), group)

    def _add_qp(self, qp: int, group: npt.NDArray[np.void]) -> None:
        times, psns = group["time"], group["psn"].astype(np.int64)
        known = self.arrivals.get(qp)
        if known is None:
            known = Arrivals(first_ns=int(times[0]), first_psn=int(psns[0]), last_psn=int(psns[0]))
            known.last_ns = known.first_ns
            self.arrivals[qp] = known
            self._seen[qp] = np.zeros(4096, dtype=np.uint8)
            self._latest[qp] = known.first_psn
        # Unfold: a step is the difference modulo 2^24 that is nearest to none.
        steps = (
            np.diff(psns, prepend=self._latest[qp] % roce.PSN_MODULUS) + _HALF
        ) % roce.PSN_MODULUS - _HALF
        unfolded = self._latest[qp] + np.cumsum(steps)
        self._latest[qp] = int(unfolded[-1])

        gaps = np.diff(times, prepend=known.last_ns)
        longest = np.argsort(-gaps, kind="stable")[:_GAPS]
        found = [(int(times[index] - gaps[index]), int(gaps[index])) for index in longest if gaps[index] > 0]
        known.gaps = sorted([*known.gaps, *found], key=lambda gap: (-gap[1], gap[0]))[:_GAPS]
        if known.gaps:
            known.gap_begin_ns, known.gap_ns = known.gaps[0]
        highest = np.maximum.accumulate(np.concatenate(([known.last_psn], unfolded)))
        known.out_of_order += int(np.count_nonzero(unfolded < highest[:-1]))
        known.packets += len(group)
        known.bytes += int(group["length"].sum())
        known.last_ns = int(times[-1])
        known.last_psn = int(highest[-1])
        self._mark(qp, known, unfolded)

    def _mark(self, qp: int, known: Arrivals, unfolded: npt.NDArray[np.int64]) -> None:
        index = unfolded - known.first_psn
        # What is older than the first packet that came is late, not missing.
        index = index[index >= 0]
        seen = self._seen[qp]
        if known.last_psn - known.first_psn >= len(seen):
            size = 1 << (known.last_psn - known.first_psn + 1).bit_length()
            seen = np.concatenate((seen, np.zeros(size - len(seen), dtype=np.uint8)))
            self._seen[qp] = seen
        np.add.at(seen, index, 1)

    def finish(self) -> dict[int, Arrivals]:
        """What is known of each QP, with missing and duplicate PSNs counted."""
        for qp, known in self.arrivals.items():
            seen = self._seen[qp][: known.last_psn - known.first_psn + 1]
            known.missing = int(np.count_nonzero(seen == 0))
            known.duplicates = int(np.maximum(seen.astype(np.int64) - 1, 0).sum())
        return self.arrivals


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 27)
    made.setsockopt(socket.SOL_SOCKET, mmsg.SO_TIMESTAMPNS, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50_000))
    made.bind(("::", roce.UDP_PORT))
    return made


def run(stop: list[bool]) -> tuple[dict[int, Arrivals], int]:
    """Receive until `stop` is not empty and nothing more comes; returns the arrivals and the socket's overflows."""
    receiver = mmsg.Receiver(_BATCH, 16)
    tracker = Tracker()
    chunk = np.zeros(_CHUNK, dtype=_RECORD)
    used = 0
    quiet_since = time.monotonic()
    with _socket() as udp:
        descriptor = udp.fileno()
        print("ready", flush=True)
        while not (stop and time.monotonic() - quiet_since > _QUIET):
            heads, lengths, times = receiver.receive(descriptor)
            count = len(heads)
            if count:
                quiet_since = time.monotonic()
                offset = time.monotonic_ns() - time.time_ns()
                wide = heads.astype(np.uint32)
                records = chunk[used : used + count]
                records["qp"] = wide[:, 5] << 16 | wide[:, 6] << 8 | wide[:, 7]
                records["psn"] = wide[:, 9] << 16 | wide[:, 10] << 8 | wide[:, 11]
                records["time"] = times + offset
                records["length"] = lengths
                used += count
            if used and (used > _CHUNK - _BATCH or not count):
                tracker.add(chunk[:used])
                used = 0
        if used:
            tracker.add(chunk[:used])
        overflows = _overflows(udp)
    return tracker.finish(), overflows


def _overflows(udp: socket.socket) -> int:
    """Packets that the socket's buffer had no room for (SO_MEMINFO, the ninth figure)."""
    return int(struct.unpack("9I", udp.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[8])


def main() -> None:
    """Receive, then print what came."""
    end_with_parent()
    stop: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    arrivals, overflows = run(stop)
    qps = {qp: asdict(known) for qp, known in arrivals.items()}
    print(json.dumps({"qps": qps, "overflows": overflows}), flush=True)


if __name__ == "__main__":
    main()
