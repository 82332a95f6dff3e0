"""The little of rtnetlink that the lab needs on sockets inside other namespaces: counters, XDP programs.

pyroute2 is not used here: its sockets bring an event loop of their own, and these are read from the caller's.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from qpd.lab import namespaces

_NLM_REQUEST, _NLM_ACK, _NLM_DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_RTM_NEWLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 18, 19
_IFLA_IFNAME, _IFLA_STATS64, _IFLA_XDP = 3, 23, 43
_XDP_FD, _XDP_FLAGS = 1, 3
_XDP_FLAGS_SKB_MODE = 1 << 1
_NESTED = 0x8000
_IFF_UP = 1


@dataclass(frozen=True)
class Counters:
    """What an interface has counted since it was made."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_dropped: int
    tx_dropped: int


class Socket:
    """A NETLINK_ROUTE socket inside a namespace."""

    def __init__(self, namespace: str) -> None:
        self._socket = namespaces.inside(
            namespace, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        )
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Give the socket back; an open one keeps the namespace alive."""
        self._socket.close()

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def counters(self) -> dict[str, Counters]:
        """The counters of every interface, by name."""
        found = {}
        for kind, body in self._ask(_RTM_GETLINK, struct.pack("=BxHiII", 0, 0, 0, 0, 0), _NLM_DUMP):
            if kind != _RTM_NEWLINK:
                continue
            name, counters = "", None
            for attribute, value in _attributes(body[16:]):
                if attribute == _IFLA_IFNAME:
                    name = value.rstrip(b"\0").decode()
                elif attribute == _IFLA_STATS64:
                    rxp, txp, rxb, txb, _, _, rxd, txd = struct.unpack_from("=8Q", value)
                    counters = Counters(rxp, txp, rxb, txb, rxd, txd)
            if counters is not None:
                found[name] = counters
        return found

    def set_xdp(self, interface: str, program: int) -> None:
        """Attach a generic XDP program by descriptor; -1 takes it away."""
        nested = _attribute(_XDP_FD, struct.pack("=i", program))
        nested += _attribute(_XDP_FLAGS, struct.pack("=I", _XDP_FLAGS_SKB_MODE))
        header = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        name = _attribute(_IFLA_IFNAME, interface.encode() + b"\0")
        for _ in self._ask(_RTM_SETLINK, header + name + _attribute(_IFLA_XDP | _NESTED, nested), _NLM_ACK):
            pass

    def set_up(self, interface: str, *, up: bool) -> None:
        """Set an interface administratively up or down; returns when the kernel has done it."""
        header = struct.pack("=BxHiII", 0, 0, 0, _IFF_UP if up else 0, _IFF_UP)
        name = _attribute(_IFLA_IFNAME, interface.encode() + b"\0")
        for _ in self._ask(_RTM_NEWLINK, header + name, _NLM_ACK):
            pass

    def _ask(self, kind: int, body: bytes, flags: int) -> Iterator[tuple[int, bytes]]:
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(body), kind, _NLM_REQUEST | flags, self._sequence, 0)
        self._socket.send(header + body)
        while True:
            data = self._socket.recv(1 << 18)
            while data:
                length, answer, _, sequence, _ = struct.unpack_from("=IHHII", data)
                payload, data = data[16:length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue
                if answer == _ERROR:
                    (code,) = struct.unpack_from("=i", payload)
                    if code:
                        raise OSError(
                            -code, f"rtnetlink: {errno.errorcode.get(-code, code)}: {os.strerror(-code)}"
                        )
                    return
                if answer == _DONE:
                    return
                yield answer, payload


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + b"\0" * (-length % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & ~_NESTED, data[4:length]
        data = data[(length + 3) & ~3 :]
