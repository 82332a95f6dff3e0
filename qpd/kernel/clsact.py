"""The classifier as clsact filters, where the kernel has no TCX.

A filter is known by its name. It is put where it runs before others' (priority 1 and the head of that list, else the
next priority that will have it), for an earlier filter that returns TC_ACT_OK would end the chain; qpd returns
TC_ACT_UNSPEC, which runs the next one. The qdisc is made where it is missing, and deleted only where qpd made it and
nobody else has a filter on it. Layouts: include/uapi/linux/rtnetlink.h (tcmsg) and pkt_cls.h (TCA_BPF_*).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from qpd.kernel.netlink_decode import ATTRIBUTE, HEADER
from qpd.kernel.netlink_socket import attribute, error_of, explanation, open_netlink, request
from qpd.kernel.pins import Pins, program_name
from qpd.model import Hook

_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _EXCL, _CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_TCMSG = struct.Struct("=BxxxiIII")
_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_PARENTS = {Hook.STEER: 0xFFFFFFF3, Hook.OBSERVE: 0xFFFFFFF2}
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_ALL_PROTOCOLS = socket.htons(0x0003)
_PRIORITIES = range(1, 17)
_GONE = {errno.ENODEV, errno.ENOENT, errno.EINVAL}
"""What the kernel answers where the interface, the filter or the qdisc (EINVAL) is not there."""
_TIMEOUT = 5.0
"""Seconds for one answer: the kernel answers at once, but for the lock that all of rtnetlink shares."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A tc filter. ``info``: priority and protocol as tcmsg has them; ``name`` and ``prog_id`` of cls_bpf only."""

    ifindex: int
    handle: int
    parent: int
    info: int
    kind: str
    name: str
    prog_id: int


def filter_name(hook: Hook) -> str:
    """What `tc filter show` calls our filter."""
    return f"qpd-{program_name(hook)}"


def attach(pins: Pins, ifindex: int, hook: Hook, prog_fd: int) -> None:
    """Make ``prog_fd`` the program of our filter on this hook; idempotent, atomic. Raises OSError."""
    with _Netlink() as netlink:
        mine = _own(netlink, ifindex, hook)
        if mine:
            netlink.put_filter(ifindex, hook, prog_fd, info=mine[0].info, handle=mine[0].handle)
            for surplus in mine[1:]:
                netlink.delete_filter(surplus)
        else:
            _ensure_qdisc(netlink, pins, ifindex)
            _add_first(netlink, ifindex, hook, prog_fd)
    pins.filter(ifindex, hook).mkdir(parents=True, exist_ok=True)


def detach(pins: Pins, ifindex: int, hook: Hook) -> bool:
    """Delete our filter, and the qdisc with the last one where it is ours; False: there was none."""
    with _Netlink() as netlink:
        mine = _own(netlink, ifindex, hook)
        for one in mine:
            netlink.delete_filter(one)
        _remove_folder(pins.filter(ifindex, hook))
        ours = pins.qdisc(ifindex)
        if ours.exists() and not any(_filters(netlink, ifindex, parent) for parent in _PARENTS.values()):
            netlink.delete_qdisc(ifindex)
            _remove_folder(ours)
    return bool(mine)


def is_attached(ifindex: int, hook: Hook) -> bool:
    """Whether our filter is on that hook."""
    with _Netlink() as netlink:
        return bool(_own(netlink, ifindex, hook))


def interfaces_with_filters() -> set[int]:
    """Every interface of this network namespace that has a filter of ours, noted or not."""
    with _Netlink() as netlink:
        return {
            ifindex
            for ifindex in netlink.clsact_interfaces()
            if any(_own(netlink, ifindex, hook) for hook in Hook)
        }


def filters(ifindex: int, hook: Hook) -> list[Filter]:
    """All filters on a hook, in the order in which they run."""
    with _Netlink() as netlink:
        return _filters(netlink, ifindex, _PARENTS[hook])


def _own(netlink: _Netlink, ifindex: int, hook: Hook) -> list[Filter]:
    found = _filters(netlink, ifindex, _PARENTS[hook])
    return [one for one in found if one.kind == "bpf" and one.name == filter_name(hook)]


def _filters(netlink: _Netlink, ifindex: int, parent: int) -> list[Filter]:
    """All filters of a hook; none where the interface or the qdisc is gone."""
    return [one for one in netlink.filters(ifindex, parent) if one.handle]


def _ensure_qdisc(netlink: _Netlink, pins: Pins, ifindex: int) -> None:
    """Make clsact where it is missing, and note that it is ours."""
    note = pins.qdisc(ifindex)
    if netlink.make_qdisc(ifindex):
        note.mkdir(parents=True, exist_ok=True)
    elif not any(_own(netlink, ifindex, hook) for hook in Hook):
        # Somebody else made it: a note would stem from a deleted interface with the same index.
        _remove_folder(note)


def _add_first(netlink: _Netlink, ifindex: int, hook: Hook, prog_fd: int) -> None:
    """Add the filter at the first priority that takes it."""
    for priority in _PRIORITIES:
        try:
            netlink.put_filter(ifindex, hook, prog_fd, info=priority << 16 | _ALL_PROTOCOLS, handle=0)
        except OSError as error:  # noqa: PERF203 - the loop is there for the error
            # EINVAL: filters of another kind or protocol have this priority.
            if error.errno != errno.EINVAL or priority == _PRIORITIES[-1]:
                raise
        else:
            return


class _Netlink:
    """One rtnetlink socket and the few requests that clsact needs; each waits for its answer."""

    def __init__(self) -> None:
        self._socket = open_netlink()
        self._socket.settimeout(_TIMEOUT)
        self._sequence = 0

    def __enter__(self) -> _Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def make_qdisc(self, ifindex: int) -> bool:
        """Add clsact; False: it is there."""
        body = _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT_PARENT, 0) + attribute(_TCA_KIND, b"clsact\0")
        try:
            self._change(_NEWQDISC, _CREATE | _EXCL, body)
        except FileExistsError:
            return False
        return True

    def delete_qdisc(self, ifindex: int) -> None:
        """Delete clsact and all filters on it."""
        self._remove(_DELQDISC, _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT_PARENT, 0))

    def clsact_interfaces(self) -> set[int]:
        """Interfaces with a clsact qdisc."""
        found = set()
        for body in self._dump(_GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0)):
            _, ifindex, _, _, _ = _TCMSG.unpack_from(body)
            if _attributes(body[_TCMSG.size :]).get(_TCA_KIND) == b"clsact\0":
                found.add(ifindex)
        return found

    def put_filter(self, ifindex: int, hook: Hook, prog_fd: int, *, info: int, handle: int) -> None:
        """Add a filter (``handle`` 0), or replace the program of the one with this handle."""
        options = (
            attribute(_TCA_BPF_FD, struct.pack("=I", prog_fd))
            + attribute(_TCA_BPF_NAME, filter_name(hook).encode() + b"\0")
            + attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
        )
        body = (
            _TCMSG.pack(0, ifindex, handle, _PARENTS[hook], info)
            + attribute(_TCA_KIND, b"bpf\0")
            + attribute(_TCA_OPTIONS, options)
        )
        self._change(_NEWTFILTER, _CREATE if handle else _CREATE | _EXCL, body)

    def delete_filter(self, one: Filter) -> None:
        """Delete a filter; it may be gone."""
        body = _TCMSG.pack(0, one.ifindex, one.handle, one.parent, one.info) + attribute(_TCA_KIND, b"bpf\0")
        self._remove(_DELTFILTER, body)

    def filters(self, ifindex: int, parent: int) -> list[Filter]:
        """The filters of one parent; none where interface or qdisc are missing."""
        try:
            bodies = list(self._dump(_GETTFILTER, _TCMSG.pack(0, ifindex, 0, parent, 0)))
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise
        return [_decode_filter(body) for body in bodies]

    def _remove(self, kind: int, body: bytes) -> None:
        try:
            self._change(kind, 0, body)
        except OSError as error:
            if error.errno not in _GONE:
                raise

    def _change(self, kind: int, flags: int, body: bytes) -> None:
        for _ in self._exchange(kind, _REQUEST | _ACK | flags, body):
            pass

    def _dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        return self._exchange(kind, _REQUEST | _DUMP, body)

    def _exchange(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        """Bodies of the answers, up to the acknowledgement or the end of the dump. Raises OSError."""
        self._sequence += 1
        self._socket.send(request(kind, flags, self._sequence, body))
        while True:
            datagram = self._socket.recv(1 << 16)
            offset = 0
            while offset + HEADER.size <= len(datagram):
                length, answer, answer_flags, sequence, _ = HEADER.unpack_from(datagram, offset)
                content = datagram[offset + HEADER.size : offset + length]
                offset += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if answer in {_ERROR, _DONE}:
                    if code := error_of(content):
                        raise OSError(code, explanation(answer_flags, content) or os.strerror(code))
                    return
                yield content


def _decode_filter(body: bytes) -> Filter:
    _, ifindex, handle, parent, info = _TCMSG.unpack_from(body)
    fields = _attributes(body[_TCMSG.size :])
    kind = fields.get(_TCA_KIND, b"").rstrip(b"\0").decode()
    options = _attributes(fields.get(_TCA_OPTIONS, b"")) if kind == "bpf" else {}
    name = options.get(_TCA_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace")
    prog_id = int.from_bytes(options.get(_TCA_BPF_ID, b"\0"), sys.byteorder)
    return Filter(ifindex, handle, parent, info, kind, name, prog_id)


def _attributes(octets: bytes) -> dict[int, bytes]:
    """Attributes by kind; the flags of nesting and byte order are cut off."""
    found = {}
    offset = 0
    while offset + ATTRIBUTE.size <= len(octets):
        length, kind = ATTRIBUTE.unpack_from(octets, offset)
        if length < ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = octets[offset + ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()
