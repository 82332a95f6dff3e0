"""From bfdd's Down packet to the last RoCE packet after it on the same link, judged by tcpdump at the uplink."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.figures import BenchError
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint

_BFD_PORT, _VXLAN_PORT, _ROCE_PORT = 3784, 4789, 4791
_BFD_DOWN = 1
_MAGIC_NS = 0xA1B23C4D
_SNAP = 128


@dataclass(frozen=True)
class Sent:
    """One packet that left: its time (CLOCK_REALTIME ns), and what it was."""

    time_ns: int
    bfd_state: int | None
    roce: bool


class Watch:
    """tcpdump of what leaves by an interface; the kernel shows it packets after all tc programs."""

    def __init__(self, fabric: Fabric, end: Endpoint, file: Path) -> None:
        self._file = file
        self._process = fabric.popen(
            end.node,
            "tcpdump",
            *("-i", end.interface, "-Q", "out", "-s", str(_SNAP), "-n", "-U", "-Z", "root", "-B", "16384"),
            *("--immediate-mode", "--time-stamp-precision=nano", "-w", str(file)),
            f"udp port {_BFD_PORT} or udp port {_VXLAN_PORT}",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if b"listening on" in line:
                return
        raise BenchError(f"tcpdump at {end} does not start")

    def result(self) -> dict[str, float]:
        """Milliseconds from the first Down packet to the last RoCE packet after it, and how many came after it."""
        self._process.terminate()
        _, said = self._process.communicate()
        if b"\n0 packets dropped by kernel" not in said:
            raise BenchError("tcpdump lost packets")
        sent = list(read(self._file.read_bytes()))
        down = next((packet.time_ns for packet in sent if packet.bfd_state == _BFD_DOWN), None)
        if down is None:
            return {}
        after = [packet.time_ns - down for packet in sent if packet.roce and packet.time_ns > down]
        return {"down_to_last_ms": max(after, default=0) / 1e6, "after_down": float(len(after))}


def read(data: bytes) -> Iterator[Sent]:
    """The packets of a pcap file with nanoseconds (IPv4, no VLAN tags: what the fabric's leaves send)."""
    if len(data) < 24 or struct.unpack_from("=I", data)[0] != _MAGIC_NS:
        raise BenchError("not a capture file with nanoseconds")
    offset = 24
    while offset + 16 <= len(data):
        seconds, nanoseconds, length, _ = struct.unpack_from("=4I", data, offset)
        frame = data[offset + 16 : offset + 16 + length]
        offset += 16 + length
        yield _sent(seconds * 1_000_000_000 + nanoseconds, frame)


def _sent(time_ns: int, frame: bytes) -> Sent:
    port, udp = _udp(frame, 14)
    if port == _BFD_PORT and len(frame) >= udp + 10:
        return Sent(time_ns, frame[udp + 9] >> 6, roce=False)
    inner, _ = _udp(frame, udp + 8 + 8 + 14) if port == _VXLAN_PORT else (0, 0)
    return Sent(time_ns, None, inner == _ROCE_PORT)


def _udp(frame: bytes, ip: int) -> tuple[int, int]:
    """Destination port and offset of the UDP header behind an IPv4 header; (0, 0): there is none."""
    if len(frame) < ip + 28 or frame[ip] >> 4 != 4 or frame[ip + 9] != 17:
        return 0, 0
    udp = ip + (frame[ip] & 0xF) * 4
    return int.from_bytes(frame[udp + 2 : udp + 4], "big"), udp
