"""Which queue pair takes which link, seen on the wire: a sample of the RoCE packets that arrive at links' ends.

Nothing here asks qpd: a raw socket at the far end of each link takes those packets whose PSN ends in zeros.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address

import numpy as np
import numpy.typing as npt

from qpd.lab import mmsg, namespaces
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint

SAMPLE_MASK = 0x0F
"""One packet of sixteen: PSNs count up, so each QP is seen as often as any other."""

_ETH_P_ALL = 3
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_HEAD = 104
_LD_H, _LD_B, _JEQ, _JSET, _RET = 0x28, 0x30, 0x15, 0x45, 0x06
# Offsets in an Ethernet frame with VXLAN over IPv4, in it Ethernet, IPv4, UDP and BTH, no options and no tags.
_OUTER_TYPE, _OUTER_PORT, _INNER_TYPE, _INNER_DESTINATION, _INNER_PORT, _QP, _PSN = (
    12,
    36,
    62,
    80,
    86,
    97,
    101,
)

SIGHTING = np.dtype([("time_ns", "i8"), ("link", "u2"), ("destination", "u4"), ("qp", "u4")])
"""`link` is an index into the endpoints; times are CLOCK_MONOTONIC."""


def sample_filter(mask: int) -> list[tuple[int, int, int, int]]:
    """Classic BPF (code, jump if true, jump if false, value): RoCE in VXLAN whose PSN has none of the mask's bits."""
    return [
        (_LD_H, 0, 0, _OUTER_TYPE),
        (_JEQ, 0, 9, 0x0800),
        (_LD_H, 0, 0, _OUTER_PORT),
        (_JEQ, 0, 7, 4789),
        (_LD_H, 0, 0, _INNER_TYPE),
        (_JEQ, 0, 5, 0x0800),
        (_LD_H, 0, 0, _INNER_PORT),
        (_JEQ, 0, 3, 4791),
        (_LD_B, 0, 0, _PSN + 2),
        (_JSET, 1, 0, mask),
        (_RET, 0, 0, _HEAD),
        (_RET, 0, 0, 0),
    ]


class Watch:
    """Raw sockets at endpoints; `drain` takes what has come."""

    def __init__(self, fabric: Fabric, endpoints: Sequence[Endpoint], mask: int = SAMPLE_MASK) -> None:
        self.endpoints = tuple(endpoints)
        self._sockets: list[socket.socket] = []
        self._receiver = mmsg.Receiver(256, _HEAD)
        self._taken: list[npt.NDArray[np.void]] = []
        try:
            for end in self.endpoints:
                self._sockets.append(_socket(fabric.namespace(end.node), end.interface, mask))
        except BaseException:
            self.close()
            raise

    def drain(self, offset_ns: int) -> None:
        """Take what has come since the last time; `offset_ns` leads from CLOCK_REALTIME to CLOCK_MONOTONIC."""
        for index, one in enumerate(self._sockets):
            while True:
                heads, _, times = self._receiver.receive(one.fileno())
                if not len(heads):
                    break
                wide = heads.astype(np.uint32)
                rows = np.zeros(len(heads), dtype=SIGHTING)
                rows["time_ns"] = times + offset_ns
                rows["link"] = index
                at = _INNER_DESTINATION
                rows["destination"] = (
                    wide[:, at] << 24 | wide[:, at + 1] << 16 | wide[:, at + 2] << 8 | wide[:, at + 3]
                )
                rows["qp"] = wide[:, _QP] << 16 | wide[:, _QP + 1] << 8 | wide[:, _QP + 2]
                self._taken.append(rows)

    def sightings(self) -> npt.NDArray[np.void]:
        """All that was taken, in the order of time."""
        rows = np.concatenate(self._taken) if self._taken else np.zeros(0, dtype=SIGHTING)
        return np.sort(rows, order="time_ns")

    def close(self) -> None:
        """Give the sockets back."""
        for one in self._sockets:
            one.close()
        self._sockets = []


def address(number: int) -> str:
    """The dotted address of a sighting's destination."""
    return str(IPv4Address(int(number)))


def _socket(namespace: str, interface: str, mask: int) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        program = b"".join(struct.pack("=HBBI", *step) for step in sample_filter(mask))
        room = ctypes.create_string_buffer(program, len(program))
        steps = len(program) // 8
        made.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("=H6xQ", steps, ctypes.addressof(room))
        )
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
        made.setsockopt(socket.SOL_SOCKET, mmsg.SO_TIMESTAMPNS, 1)
        made.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        made.setblocking(False)
        # Bound last: before that nothing comes, so nothing slips past the filter.
        made.bind((interface, _ETH_P_ALL))
        return made

    return namespaces.inside(namespace, make)
