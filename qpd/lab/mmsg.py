"""sendmmsg(2) and recvmmsg(2) over numpy arrays: many datagrams for one system call, no Python object a packet."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

_libc = ctypes.CDLL(None, use_errno=True)

# struct mmsghdr and struct iovec of 64-bit Linux (bits/types/struct_msghdr.h).
_MMSGHDR = np.dtype(
    {
        "names": ["name", "namelen", "iov", "iovlen", "control", "controllen", "flags", "length"],
        "formats": ["u8", "u4", "u8", "u8", "u8", "u8", "i4", "u4"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)
_IOVEC = np.dtype([("base", "u8"), ("length", "u8")])
_CMSG_TIMESTAMP = np.dtype(
    [("length", "u8"), ("level", "i4"), ("type", "i4"), ("seconds", "i8"), ("nanoseconds", "i8")]
)
MSG_WAITFORONE = 0x10000
SO_TIMESTAMPNS = 35


def sockaddr(address: str, port: int) -> bytes:
    """The bytes of a sockaddr_in or sockaddr_in6."""
    if ":" in address:
        family = struct.pack("=H", socket.AF_INET6)
        return family + struct.pack(">HI", port, 0) + socket.inet_pton(socket.AF_INET6, address) + bytes(4)
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(address) + bytes(8)


def _headers(rows: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A struct iovec and a struct mmsghdr for each row of a contiguous array, which the caller keeps alive."""
    count, length = rows.shape
    iov, headers = np.zeros(count, dtype=_IOVEC), np.zeros(count, dtype=_MMSGHDR)
    iov["base"] = _places(rows, length)
    iov["length"] = length
    headers["iov"] = _places(iov, _IOVEC.itemsize)
    headers["iovlen"] = 1
    return iov, headers


def _places(rows: npt.NDArray[Any], size: int) -> npt.NDArray[np.uint64]:
    """The address of each row."""
    return rows.ctypes.data + np.arange(len(rows), dtype=np.uint64) * np.uint64(size)


class Sender:
    """Rows of payload that are sent to one address.

    Args:
        rows: the payloads, one a row, contiguous; the caller changes them in place between calls.
        address: where they go.
    """

    def __init__(self, rows: npt.NDArray[np.uint8], address: bytes) -> None:
        self._name = ctypes.create_string_buffer(address, len(address))
        self._rows = rows
        self._iov, self._headers = _headers(rows)
        self._headers["name"] = ctypes.addressof(self._name)
        self._headers["namelen"] = len(address)

    def send(self, descriptor: int, first: int, count: int) -> int:
        """Send `count` rows from row `first` on; returns how many the kernel took (0: its buffers are full)."""
        start = self._headers.ctypes.data + first * _MMSGHDR.itemsize
        sent = int(_libc.sendmmsg(descriptor, ctypes.c_void_p(start), count, 0))
        if sent < 0:
            error = ctypes.get_errno()
            if error in {errno.ENOBUFS, errno.EAGAIN, errno.EINTR}:
                return 0
            raise OSError(error, os.strerror(error))
        return sent


class Receiver:
    """Batches of datagrams: the first bytes, the full length and the kernel's time of arrival of each."""

    def __init__(self, batch: int, head: int) -> None:
        self._data = np.zeros((batch, head), dtype=np.uint8)
        self._control = np.zeros(batch, dtype=_CMSG_TIMESTAMP)
        self._iov, self._headers = _headers(self._data)
        self._headers["control"] = _places(self._control, _CMSG_TIMESTAMP.itemsize)

    def receive(
        self, descriptor: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Wait for at least one datagram (or the socket's timeout) and take what is there.

        Returns heads, lengths, and CLOCK_REALTIME nanoseconds of arrival; views that hold until the next call.
        """
        self._headers["controllen"] = _CMSG_TIMESTAMP.itemsize
        flags = MSG_WAITFORONE | socket.MSG_TRUNC
        count = int(
            _libc.recvmmsg(
                descriptor, ctypes.c_void_p(self._headers.ctypes.data), len(self._headers), flags, None
            )
        )
        if count < 0:
            error = ctypes.get_errno()
            if error not in {errno.EAGAIN, errno.EINTR}:
                raise OSError(error, os.strerror(error))
            count = 0
        control = self._control[:count]
        return (
            self._data[:count],
            self._headers["length"][:count],
            control["seconds"] * 1_000_000_000 + control["nanoseconds"],
        )


class Outbox:
    """Packets of any length that go to any address: rows that are filled one after the other, then sent together.

    Args:
        count: rows.
        size: the longest packet.
    """

    def __init__(self, count: int, size: int) -> None:
        self._data = np.zeros((count, size), dtype=np.uint8)
        self.rows = [memoryview(row) for row in self._data]  # type: ignore[arg-type]
        """Where the packets are written."""
        self._lengths: list[int] = []
        self._names: list[int] = []
        self._iov, self._headers = _headers(self._data)

    @property
    def used(self) -> int:
        """Rows that hold packets; the next free row, where it is smaller than their number."""
        return len(self._lengths)

    @property
    def full(self) -> bool:
        """True where no row is free."""
        return len(self._lengths) == len(self.rows)

    def add(self, length: int, name: ctypes.Array[ctypes.c_char]) -> None:
        """The next row is filled with `length` bytes for the address `name`, which the caller keeps alive."""
        self._lengths.append(length)
        self._names.append(ctypes.addressof(name))
        self._namelen = len(name)

    def send(self, descriptor: int) -> int:
        """Send all; returns how many could not be sent: no route, or a link that is down. Then all rows are free."""
        count, lost, done = len(self._lengths), 0, 0
        if not count:
            return 0
        self._iov["length"][:count] = self._lengths
        self._headers["name"][:count] = self._names
        self._headers["namelen"][:count] = self._namelen
        start = self._headers.ctypes.data
        while done < count:
            place = ctypes.c_void_p(start + done * _MMSGHDR.itemsize)
            sent = int(_libc.sendmmsg(descriptor, place, count - done, 0))
            if sent < 0:
                error = ctypes.get_errno()
                if error == errno.EINTR:
                    continue
                if error not in _LOST:
                    raise OSError(error, os.strerror(error))
                lost += 1
                sent = 1
            done += sent
        self._lengths.clear()
        self._names.clear()
        return lost


_LOST = {errno.ENOBUFS, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL}
"""What a packet may meet that an adapter would not notice either: it is lost."""

_CMSG_BYTE = np.dtype(
    {
        "names": ["length", "level", "type", "value"],
        "formats": ["u8", "i4", "i4", "u1"],
        "offsets": [0, 8, 12, 16],
        "itemsize": 24,
    }
)


class Inbox:
    """Whole datagrams and the traffic class that each came with (IP_RECVTOS or IPV6_RECVTCLASS must be set).

    Args:
        batch: most datagrams of one call.
        size: the longest datagram.
    """

    def __init__(self, batch: int, size: int) -> None:
        self._data = np.zeros((batch, size), dtype=np.uint8)
        self.rows = [memoryview(row) for row in self._data]  # type: ignore[arg-type]
        self._control = np.zeros(batch, dtype=_CMSG_BYTE)
        self._iov, self._headers = _headers(self._data)
        self._headers["control"] = _places(self._control, _CMSG_BYTE.itemsize)
        self._headers["controllen"] = _CMSG_BYTE.itemsize
        self._place = ctypes.c_void_p(self._headers.ctypes.data)

    def receive(self, descriptor: int) -> tuple[list[int], npt.NDArray[np.uint8]]:
        """Take what is there, waiting for nothing; returns lengths and traffic classes, one for each row."""
        count = int(_libc.recvmmsg(descriptor, self._place, len(self._headers), socket.MSG_DONTWAIT, None))
        if count < 0:
            error = ctypes.get_errno()
            if error not in {errno.EAGAIN, errno.EINTR}:
                raise OSError(error, os.strerror(error))
            count = 0
        else:
            self._headers["controllen"][:count] = _CMSG_BYTE.itemsize
        return self._headers["length"][:count].tolist(), self._control["value"][:count]
