"""Opening netlink sockets and framing requests; shared by the source of events and the override table."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from errno import ENOBUFS

from qpd.kernel.netlink_decode import ATTRIBUTE, HEADER

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
_SO_RCVBUFFORCE = 33
# linux/rtnetlink.h, enum rtnetlink_groups
GROUP_LINK, GROUP_NEIGHBOUR, GROUP_ADDRESS4, GROUP_ROUTE4, GROUP_ROUTE6, GROUP_NEXTHOP = 1, 3, 5, 7, 11, 32

DATAGRAM_MAX = 1 << 16
"""Longest datagram taken: the kernel fills dumps up to 32 KiB (netlink_recvmsg), notifications are shorter."""

_EXT_ACK_MESSAGE = 1
_ACK_CAPPED, _ACK_TLVS = 0x100, 0x200
_ERROR = struct.Struct("=i")


def open_netlink(groups: Iterable[int] = (), receive_buffer: int = 1 << 20) -> socket.socket:
    """A NETLINK_ROUTE socket of this thread's network namespace, non-blocking, member of ``groups``.

    Args:
        groups: numbers of enum rtnetlink_groups.
        receive_buffer: bytes; beyond net.core.rmem_max only with CAP_NET_ADMIN, else as much as that allows.
    """
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            # Older kernels lack some: dumps are then longer and errors shorter.
            with contextlib.suppress(OSError):
                opened.setsockopt(_SOL_NETLINK, option, 1)
        opened.bind((0, 0))
        for group in groups:
            # Kernels before 5.3 have no nexthop objects and so no group for them.
            with contextlib.suppress(OSError) if group == GROUP_NEXTHOP else contextlib.nullcontext():
                opened.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    except OSError:
        opened.close()
        raise
    return opened


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute with its padding."""
    return ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) & 3)


def request(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """One message with its padding."""
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) & 3)


def error_of(body: bytes) -> int:
    """The errno of an NLMSG_ERROR or NLMSG_DONE body, 0 for an acknowledgement."""
    return -int(_ERROR.unpack_from(body)[0]) if len(body) >= _ERROR.size else 0


def explanation(flags: int, body: bytes) -> str:
    """What the kernel says about an error in its own words (extended acknowledgement), or ''."""
    if not flags & _ACK_TLVS:
        return ""
    offset = _ERROR.size + HEADER.size
    if not flags & _ACK_CAPPED:
        length = HEADER.unpack_from(body, _ERROR.size)[0]
        offset = _ERROR.size + ((length + 3) & ~3)
    while len(body) - offset >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(body, offset)
        if length < ATTRIBUTE.size:
            break
        if kind == _EXT_ACK_MESSAGE:
            return body[offset + ATTRIBUTE.size : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += (length + 3) & ~3
    return ""


def is_overrun(error: OSError) -> bool:
    """True: the kernel threw notifications away, since the socket's buffer was full."""
    return error.errno == ENOBUFS
