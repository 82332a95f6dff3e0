"""The bpf(2) system call, and nothing above it.

Neither bcc nor the distributions' libbpf know TCX links, and importing bcc costs 65 MB; the calls that the
daemon needs are few, so they are made directly. File descriptors are plain integers, closed on exec (the
kernel sets that) and by the caller. Every failure is the ``OSError`` of its errno, with the command's name
and the path. Calls release the GIL while the kernel works.
Layouts: ``union bpf_attr`` in include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280}

PROG_TYPE_SCHED_CLS, PROG_TYPE_XDP = 3, 6
ANY, NOEXIST, EXIST = 0, 1, 2
"""Update flags: create or replace, create only, replace only."""
F_BEFORE = 1 << 3
"""Attach flag: before the program that is named, or before all."""
F_NO_PREALLOC = 1 << 0
"""Map flag."""


class Command(IntEnum):
    """``enum bpf_cmd``."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_TEST_RUN = 10
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    BTF_GET_FD_BY_ID = 19
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34


class MapType(IntEnum):
    """``enum bpf_map_type``, the kinds that qpd uses."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    RINGBUF = 27


class AttachType(IntEnum):
    """``enum bpf_attach_type``: the TCX hooks (Linux 6.6 and later)."""

    TCX_INGRESS = 46
    TCX_EGRESS = 47


class MapInfo(NamedTuple):
    """``struct bpf_map_info``: what the kernel knows of a map."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str
    btf_id: int
    btf_value_type_id: int


class ProgInfo(NamedTuple):
    """``struct bpf_prog_info``. ``tag``: the kernel's hash of the instructions; ``map_ids``: its maps."""

    type: int
    id: int
    tag: str
    name: str
    map_ids: tuple[int, ...]
    btf_id: int


class LinkInfo(NamedTuple):
    """``struct bpf_link_info`` of a TCX link. ``ifindex`` 0: its interface is gone."""

    type: int
    id: int
    prog_id: int
    ifindex: int
    attach_type: int


class Batch(NamedTuple):
    """One step through a map: how many entries were ``read``, where to go on, whether nothing is left."""

    cursor: bytes
    read: int
    done: bool


class RunResult(NamedTuple):
    """What BPF_PROG_TEST_RUN gave back. ``duration_ns``: mean of the repetitions, to a whole nanosecond."""

    retval: int
    data_out: bytes
    ctx_out: bytes
    duration_ns: int


@dataclass(frozen=True, slots=True)
class Attached:
    """The programs on one TCX hook in the order in which they run; a link id is 0 where there is no link."""

    prog_ids: tuple[int, ...]
    link_ids: tuple[int, ...]
    revision: int


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(command: Command, attributes: bytearray, path: str | None = None) -> int:
    """Make one bpf(2) call; ``attributes`` is read and written. Raises the OSError of its errno."""
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        known = ", ".join(_SYSCALL_NUMBERS)
        raise OSError(errno.ENOSYS, f"bpf(2): no system call number for {platform.machine()} (only {known})")
    memory = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    result = _libc.syscall(
        ctypes.c_long(number), ctypes.c_long(command), ctypes.byref(memory), ctypes.c_long(len(attributes))
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf(BPF_{command.name}): {os.strerror(code)}", path)
    return int(result)


class _Memory:
    """The address of a buffer, which lives as long as this object does; of a read-only one, a copy's."""

    __slots__ = ("_keep", "address", "size")

    def __init__(self, buffer: Buffer) -> None:
        view = memoryview(buffer)
        self.size = view.nbytes
        self._keep: object
        if view.readonly:
            copy = ctypes.create_string_buffer(view.tobytes(), self.size)
            self._keep, self.address = copy, ctypes.addressof(copy)
        else:
            array = (ctypes.c_char * self.size).from_buffer(buffer)
            self._keep, self.address = array, ctypes.addressof(array)


def _name(name: str) -> bytes:
    """An object name as the kernel takes it: 15 characters and a NUL."""
    return name.encode()[:15].ljust(16, b"\0")


# --- Objects and pins ---------------------------------------------------------------------------------------


def obj_get(path: str | Path) -> int:
    """Open the map, program or link pinned at ``path``."""
    memory = _Memory(os.fsencode(path) + b"\0")
    return _call(Command.OBJ_GET, bytearray(struct.pack("=QII", memory.address, 0, 0)), str(path))


def obj_pin(fd: int, path: str | Path) -> None:
    """Pin an object; ``path`` must not exist and lie in a bpffs."""
    memory = _Memory(os.fsencode(path) + b"\0")
    _call(Command.OBJ_PIN, bytearray(struct.pack("=QII", memory.address, fd, 0)), str(path))


def _info(fd: int, size: int, given: bytes = b"") -> bytearray:
    memory = bytearray(given.ljust(size, b"\0"))
    holder = _Memory(memory)
    _call(Command.OBJ_GET_INFO_BY_FD, bytearray(struct.pack("=IIQ", fd, size, holder.address)))
    return memory


def map_info(fd: int) -> MapInfo:
    """Type, sizes and name of an open map."""
    info = _info(fd, 88)
    kind, ident, key_size, value_size, entries, flags, name = struct.unpack_from("=6I16s", info)
    btf_id, _, btf_value = struct.unpack_from("=3I", info, 64)
    text = name.rstrip(b"\0").decode()
    return MapInfo(kind, ident, key_size, value_size, entries, flags, text, btf_id, btf_value)


def prog_info(fd: int) -> ProgInfo:
    """Type, tag, name and maps of an open program."""
    (count,) = struct.unpack_from("=I", _info(fd, 232), 52)
    ids = bytearray(4 * max(count, 1))
    holder = _Memory(ids)
    request = bytearray(232)
    struct.pack_into("=IQ", request, 52, count, holder.address)
    info = _info(fd, 232, bytes(request))
    kind, ident, tag = struct.unpack_from("=II8s", info)
    (name,) = struct.unpack_from("=16s", info, 64)
    (btf_id,) = struct.unpack_from("=I", info, 128)
    map_ids = struct.unpack_from(f"={count}I", ids)
    return ProgInfo(kind, ident, tag.hex(), name.rstrip(b"\0").decode(), map_ids, btf_id)


def link_info(fd: int) -> LinkInfo:
    """Program and interface of an open TCX link."""
    info = _info(fd, 64)
    kind, ident, prog_id = struct.unpack_from("=III", info)
    ifindex, attach_type = struct.unpack_from("=II", info, 16)
    return LinkInfo(kind, ident, prog_id, ifindex, attach_type)


def prog_get_fd_by_id(prog_id: int) -> int:
    """Open a loaded program by its id."""
    return _call(Command.PROG_GET_FD_BY_ID, bytearray(struct.pack("=III", prog_id, 0, 0)))


def map_get_fd_by_id(map_id: int) -> int:
    """Open a map by its id."""
    return _call(Command.MAP_GET_FD_BY_ID, bytearray(struct.pack("=III", map_id, 0, 0)))


# --- Maps ---------------------------------------------------------------------------------------------------


def map_create(
    kind: MapType, key_size: int, value_size: int, max_entries: int, *, flags: int = 0, name: str = ""
) -> int:
    """Make a map."""
    fields = struct.pack("=7I16s", kind, key_size, value_size, max_entries, flags, 0, 0, _name(name))
    return _call(Command.MAP_CREATE, bytearray(fields))


def _element(command: Command, fd: int, key: Buffer | None, value: Buffer | None, flags: int = 0) -> None:
    key_memory = _Memory(key) if key is not None else None
    value_memory = _Memory(value) if value is not None else None
    attributes = struct.pack(
        "=I4xQQQ",
        fd,
        key_memory.address if key_memory else 0,
        value_memory.address if value_memory else 0,
        flags,
    )
    _call(command, bytearray(attributes))


def lookup(fd: int, key: Buffer, value_size: int) -> bytes | None:
    """The value of a key, or None.

    ``value_size`` of a per-CPU map: that of its value, rounded up to 8, times the possible CPUs.
    """
    value = bytearray(value_size)
    try:
        _element(Command.MAP_LOOKUP_ELEM, fd, key, value)
    except FileNotFoundError:
        return None
    return bytes(value)


def update(fd: int, key: Buffer, value: Buffer, flags: int = ANY) -> None:
    """Write one entry."""
    _element(Command.MAP_UPDATE_ELEM, fd, key, value, flags)


def delete(fd: int, key: Buffer) -> bool:
    """Delete one entry; False: it was not there."""
    try:
        _element(Command.MAP_DELETE_ELEM, fd, key, None)
    except FileNotFoundError:
        return False
    return True


def get_next_key(fd: int, key: Buffer | None, key_size: int) -> bytes | None:
    """The key after ``key`` (None: the first), or None at the end."""
    following = bytearray(key_size)
    try:
        _element(Command.MAP_GET_NEXT_KEY, fd, key, following)
    except FileNotFoundError:
        return None
    return bytes(following)


def _batch(
    command: Command,
    fd: int,
    count: int,
    keys: _Memory,
    values: _Memory | None = None,
    *,
    cursor: tuple[int, int] = (0, 0),
) -> tuple[int, OSError | None]:
    """One batch command: how many entries it handled, and the error that ended it."""
    attributes = bytearray(
        struct.pack("=QQQQIIQQ", *cursor, keys.address, values.address if values else 0, count, fd, 0, 0)
    )
    failure = None
    try:
        _call(command, attributes)
    except OSError as error:
        if error.errno in {errno.EFAULT, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ENOMEM}:
            raise
        failure = error
    (handled,) = struct.unpack_from("=I", attributes, 32)
    return handled, failure


def lookup_batch(
    fd: int, cursor: bytes | None, keys: Buffer, values: Buffer, count: int, *, cursor_size: int = 4
) -> Batch:
    """Read up to ``count`` entries into ``keys`` and ``values``, from ``cursor`` on (None: from the start).

    ``cursor_size``: 4 for hash maps, the key's size for others. A hash map's bucket is read as a whole, so an
    entry that is there all along is read exactly once. OSError ENOSPC: ``count`` is too small for one bucket.
    """
    start = _Memory(cursor) if cursor is not None else None
    following = bytearray(max(cursor_size, 4))
    next_memory = _Memory(following)
    read, failure = _batch(
        Command.MAP_LOOKUP_BATCH,
        fd,
        count,
        _Memory(keys),
        _Memory(values),
        cursor=(start.address if start else 0, next_memory.address),
    )
    if failure is not None and failure.errno not in {errno.ENOENT, errno.EINTR}:
        raise failure
    del next_memory
    return Batch(bytes(following), read, failure is not None and failure.errno == errno.ENOENT)


def update_batch(fd: int, keys: Buffer, values: Buffer, count: int) -> None:
    """Write ``count`` entries; on an error those before it are written. Some types lack it (EOPNOTSUPP)."""
    _, failure = _batch(Command.MAP_UPDATE_BATCH, fd, count, _Memory(keys), _Memory(values))
    if failure is not None:
        raise failure


def delete_batch(fd: int, keys: Buffer, count: int) -> int:
    """Delete up to ``count`` entries; stops at the first key that is not there. Gives the number deleted."""
    deleted, failure = _batch(Command.MAP_DELETE_BATCH, fd, count, _Memory(keys))
    if failure is not None and failure.errno != errno.ENOENT:
        raise failure
    return deleted


# --- Programs and links -------------------------------------------------------------------------------------


def prog_load(
    instructions: Sequence[int],
    *,
    kind: int = PROG_TYPE_SCHED_CLS,
    name: str = "",
    licence: str = "Dual BSD/GPL",
) -> int:
    """Load a program of raw 64-bit instructions, for probes, tests and the lab's wires. ``kind``: its type."""
    code = _Memory(struct.pack(f"={len(instructions)}Q", *instructions))
    licence_text = _Memory(licence.encode() + b"\0")
    fields = struct.pack(
        "=IIQQ24x16s", kind, len(instructions), code.address, licence_text.address, _name(name)
    )
    return _call(Command.PROG_LOAD, bytearray(fields))


def prog_test_run(
    prog_fd: int,
    data_in: bytes,
    *,
    repeat: int = 1,
    ctx_in: bytes = b"",
    ctx_size_out: int = 0,
    room: int = 512,
) -> RunResult:
    """Run a program over a packet (BPF_PROG_TEST_RUN), ``repeat`` times.

    ``ctx_in``: a ``struct __sk_buff``; ``ctx_size_out``: how much of it to read back (default: as much as was
    given); ``room``: by how many octets the packet may grow. A repetition gets the packet of the one before.
    """
    data_out = bytearray(len(data_in) + room)
    ctx_out = bytearray(ctx_size_out or len(ctx_in))
    packet, packet_out, context, context_out = (
        _Memory(part) for part in (data_in, data_out, ctx_in, ctx_out)
    )
    data = (prog_fd, 0, len(data_in), len(data_out), packet.address, packet_out.address, repeat, 0)
    ctx_addresses = (context.address if ctx_in else 0, context_out.address if ctx_out else 0)
    attributes = bytearray(struct.pack("=IIIIQQIIIIQQ16x", *data, len(ctx_in), len(ctx_out), *ctx_addresses))
    _call(Command.PROG_TEST_RUN, attributes)
    del packet_out, context_out
    retval, _, size_out = struct.unpack_from("=III", attributes, 4)
    (duration,) = struct.unpack_from("=I", attributes, 36)
    (context_size,) = struct.unpack_from("=I", attributes, 44)
    return RunResult(retval, bytes(data_out[:size_out]), bytes(ctx_out[:context_size]), duration)


def link_create(prog_fd: int, ifindex: int, attach_type: AttachType, *, first: bool = False) -> int:
    """Attach a program to a TCX hook, last or ``first``. The link lives while it is open or pinned."""
    flags = F_BEFORE if first else 0
    return _call(
        Command.LINK_CREATE, bytearray(struct.pack("=IIII16x", prog_fd, ifindex, attach_type, flags))
    )


def prog_attach(prog_fd: int, ifindex: int, attach_type: AttachType, *, first: bool = False) -> None:
    """Attach a program to a TCX hook without a link: until the interface goes, whoever made it."""
    flags = F_BEFORE if first else 0
    _call(Command.PROG_ATTACH, bytearray(struct.pack("=IIII16x", ifindex, prog_fd, attach_type, flags)))


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replace a link's program, atomically: each packet sees the old or the new one."""
    _call(Command.LINK_UPDATE, bytearray(struct.pack("=IIII", link_fd, prog_fd, 0, 0)))


def link_detach(link_fd: int) -> None:
    """Take a link's program off its hook at once, whoever else holds the link."""
    _call(Command.LINK_DETACH, bytearray(struct.pack("=I", link_fd)))


def prog_query(ifindex: int, attach_type: AttachType) -> Attached:
    """The programs on one TCX hook."""
    room = 64
    prog_ids, link_ids = bytearray(4 * room), bytearray(4 * room)
    progs, links = _Memory(prog_ids), _Memory(link_ids)
    attributes = bytearray(
        struct.pack("=IIIIQI4xQQQQ", ifindex, attach_type, 0, 0, progs.address, room, 0, links.address, 0, 0)
    )
    _call(Command.PROG_QUERY, attributes)
    (count,) = struct.unpack_from("=I", attributes, 24)
    (revision,) = struct.unpack_from("=Q", attributes, 56)
    return Attached(
        struct.unpack_from(f"={count}I", prog_ids), struct.unpack_from(f"={count}I", link_ids), revision
    )
