"""A receiver that keeps the time of every packet, so that many trials share one stream of traffic."""

from __future__ import annotations

import socket
import struct
import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpd.lab import mmsg, namespaces, roce

_BATCH = 256
_SO_RCVBUFFORCE = 33
_RECORD = np.dtype([("qp", "u4"), ("psn", "u4"), ("time", "i8")])
_HALF = roce.PSN_MODULUS // 2


@dataclass(frozen=True)
class Gap:
    """The longest silence of one QP in a window of time. Nanoseconds of CLOCK_MONOTONIC."""

    begin_ns: int
    end_ns: int
    lost: int
    """Packets of the window that never came, by their PSNs."""

    @property
    def length_ns(self) -> int:
        """From the last packet before to the first one after."""
        return self.end_ns - self.begin_ns


class Arrivals:
    """All RoCE packets that reach a host, from ``start`` to ``close``; a thread of its own reads them."""

    def __init__(self, namespace: str) -> None:
        self._socket = namespaces.inside(namespace, _socket)
        self._lock = threading.Lock()
        self._blocks: list[npt.NDArray[np.void]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._receive, name=f"arrivals-{namespace}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading; idempotent."""
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def forget(self, before_ns: int) -> None:
        """Let go of what came before a time, so that hours of traffic stay small."""
        with self._lock:
            self._blocks = [block for block in self._blocks if int(block["time"][-1]) >= before_ns]

    def last_seen(self) -> dict[int, int]:
        """QP to the time of its last packet."""
        records = self._records(0)
        return {int(qp): int(records["time"][records["qp"] == qp].max()) for qp in np.unique(records["qp"])}

    def gaps(self, begin_ns: int, end_ns: int) -> dict[int, Gap]:
        """The longest silence of every QP between the two times; a QP that is silent to the end has one up to it."""
        records = self._records(begin_ns)
        records = records[(records["time"] >= begin_ns) & (records["time"] <= end_ns)]
        return {int(qp): _gap(records[records["qp"] == qp], end_ns) for qp in np.unique(records["qp"])}

    def _records(self, since_ns: int) -> npt.NDArray[np.void]:
        with self._lock:
            blocks = [block for block in self._blocks if int(block["time"][-1]) >= since_ns]
        return np.concatenate(blocks) if blocks else np.zeros(0, _RECORD)

    def _receive(self) -> None:
        receiver = mmsg.Receiver(_BATCH, 16)
        while not self._stop.is_set():
            heads, _, times = receiver.receive(self._socket.fileno())
            if not len(heads):
                continue
            wide = heads.astype(np.uint32)
            block = np.zeros(len(heads), _RECORD)
            block["qp"] = wide[:, 5] << 16 | wide[:, 6] << 8 | wide[:, 7]
            block["psn"] = wide[:, 9] << 16 | wide[:, 10] << 8 | wide[:, 11]
            block["time"] = times + (time.monotonic_ns() - time.time_ns())
            with self._lock:
                self._blocks.append(block)
            # Packets come one by one: without a rest this thread would wake, and hold the interpreter, for each.
            time.sleep(0.005)


def _gap(records: npt.NDArray[np.void], end_ns: int) -> Gap:
    times = np.append(records["time"], end_ns)
    widest = int(np.argmax(np.diff(times)))
    psns = records["psn"].astype(np.int64)
    spread = (psns - psns[0] + _HALF) % roce.PSN_MODULUS - _HALF
    lost = int(spread.max() - spread.min()) + 1 - len(np.unique(spread))
    return Gap(int(times[widest]), int(times[widest + 1]), lost)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 26)
    made.setsockopt(socket.SOL_SOCKET, mmsg.SO_TIMESTAMPNS, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50_000))
    made.bind(("::", roce.UDP_PORT))
    return made
