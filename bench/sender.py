"""Sends RoCE-like datagrams of many QPs as fast as the fabric takes them, with one source port, from one thread.

In network namespaces a packet goes all its way, up to the receiving socket, on the sender's processor and within its
system call. So the processor time of the sending thread is the fabric's time, and other processes do not disturb it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.frames import PEER, ROCE, host_payload
from qpd.lab import namespaces

SOURCE_PORT = 49200
_BATCH_ROUNDS = 4
"""How often each QP is in one system call."""


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MessageHeader(ctypes.Structure):
    """``struct mmsghdr`` of a connected socket: only iov and its count matter (recvmmsg(2), sendmmsg(2))."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("sent", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Burst:
    """What one run cost. ``cpu_ns`` of the sending thread, ``softirq_ns`` of its processor's ksoftirqd."""

    packets: int
    wall_ns: int
    cpu_ns: int
    softirq_ns: int

    @property
    def cpu_ns_per_packet(self) -> float:
        """Processor time a packet."""
        return self.cpu_ns / self.packets

    @property
    def wall_ns_per_packet(self) -> float:
        """Time on the wall a packet."""
        return self.wall_ns / self.packets


class Sender:
    """A connected socket inside the namespace and prepared messages, one a QP. Stays on one processor."""

    def __init__(self, namespace: str, qps: Sequence[int]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._socket = namespaces.inside(namespace, self._connect)
        payloads = [ctypes.create_string_buffer(host_payload(qp)) for qp in qps]
        count = len(qps) * _BATCH_ROUNDS
        self.batch = count
        vectors = (_IoVec * count)()
        self._messages = (_MessageHeader * count)()
        for index in range(count):
            payload = payloads[index % len(qps)]
            vectors[index] = _IoVec(ctypes.addressof(payload), len(payload) - 1)
            self._messages[index].iov = ctypes.addressof(vectors[index])
            self._messages[index].iov_count = 1
        self._keep = (payloads, vectors)
        self._affinity = os.sched_getaffinity(0)
        self._processor = max(self._affinity)
        os.sched_setaffinity(0, {self._processor})
        self._softirq = _ksoftirqd(self._processor)

    def close(self) -> None:
        """Close the socket; the process may run anywhere again."""
        os.sched_setaffinity(0, self._affinity)
        self._socket.close()

    def send(self, batches: int) -> Burst:
        """Send every message that many times."""
        descriptor, count, messages = self._socket.fileno(), self.batch, self._messages
        send = self._libc.sendmmsg
        softirq = self._softirq_ns()
        wall, cpu = time.monotonic_ns(), time.thread_time_ns()
        for _ in range(batches):
            sent = send(descriptor, messages, count, 0)
            if sent != count:
                error = ctypes.get_errno()
                raise OSError(error, f"sendmmsg sent {sent} of {count}: {os.strerror(error)}")
        cpu, wall = time.thread_time_ns() - cpu, time.monotonic_ns() - wall
        return Burst(batches * count, wall, cpu, self._softirq_ns() - softirq)

    @staticmethod
    def _connect() -> socket.socket:
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.bind(("", SOURCE_PORT))
        sender.connect((str(PEER), ROCE))
        return sender

    def _softirq_ns(self) -> int:
        return int(self._softirq.read_text(encoding="ascii").split()[0]) if self._softirq else 0


def _ksoftirqd(processor: int) -> Path | None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text(encoding="ascii").strip() == f"ksoftirqd/{processor}":
                    return entry / "schedstat"
            except OSError:  # it has ended meanwhile
                continue
    return None
