"""One open BPF map whose keys and values are numpy records."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.kernel import bpf
from qpd.kernel.layout import MapLayout

Records = npt.NDArray[np.void]

CHUNK = 4096
"""Entries per system call: half a megabyte of QPs, read in about a millisecond."""

_ENOTSUPP = 524
"""The kernel's own errno (include/linux/errno.h) for a map type without batches."""
_NO_BATCH = {errno.EOPNOTSUPP, _ENOTSUPP}
_INTERRUPTED_MAX = 1000
_HASHES = {bpf.MapType.HASH, bpf.MapType.LRU_HASH}

_POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")


class LayoutMismatchError(Exception):
    """A pinned map has other sizes than this program's: one line that says which and what to do."""


def possible_cpus() -> int:
    """How many values a per-CPU map keeps for each key: 1 + the highest possible CPU's number."""
    ranges = _POSSIBLE_CPUS.read_text(encoding="ascii").strip().split(",")
    return 1 + int(ranges[-1].split("-")[-1])


class Table:
    """A map opened from its pin. Raises OSError where it cannot be opened, LayoutMismatchError where it is another."""

    def __init__(self, path: Path, layout: MapLayout) -> None:
        self.layout = layout
        self.path = path
        self.fd = bpf.obj_get(path)
        try:
            self.entries = check_layout(self.fd, path, layout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file descriptor; the pinned map stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # --- one entry ----------------------------------------------------------------------------------------------

    def octets(self, key: bytes | int) -> bytes | None:
        """The value of a key (``int``: an array's index), or None."""
        return bpf.lookup(self.fd, _key(key), self.layout.value.itemsize)

    def get(self, key: bytes | int) -> np.void | None:
        """The record of a key, or None. Records are copies."""
        value = self.octets(key)
        if value is None:
            return None
        record: np.void = np.frombuffer(value, self.layout.value)[0]
        return record

    def get_per_cpu(self, key: bytes | int) -> Records:
        """The records of all possible CPUs of a per-CPU map."""
        size = -(-self.layout.value.itemsize // 8) * 8
        value = bpf.lookup(self.fd, _key(key), size * possible_cpus())
        if value is None:
            raise KeyError(key)
        padded = np.dtype({"names": ["v"], "formats": [self.layout.value], "offsets": [0], "itemsize": size})
        records: Records = np.frombuffer(value, padded)["v"]
        return records

    def set(self, key: bytes | int, value: bytes | np.void | npt.NDArray[Any]) -> None:
        """Write one entry."""
        octets = value if isinstance(value, bytes) else value.tobytes()
        bpf.update(self.fd, _key(key), octets)

    def delete(self, key: bytes) -> bool:
        """Delete one entry; False: it was not there."""
        return bpf.delete(self.fd, key)

    # --- many entries -------------------------------------------------------------------------------------------

    def scan(self, chunk: int = CHUNK) -> Iterator[tuple[Records, Records]]:
        """Every entry, as arrays of at most ``chunk`` keys and values. They are overwritten by the next step.

        An entry of a hash map that is there all along comes exactly once, whatever else is made or deleted
        meanwhile: it never changes its bucket, and the kernel hands out whole buckets.
        """
        cursor: bytes | None = None
        cursor_size = 4 if self.layout.type in _HASHES else self.layout.key.itemsize
        chunk = min(chunk, self.entries)
        keys, values = np.empty(chunk, self.layout.key), np.empty(chunk, self.layout.value)
        interrupted = 0
        while True:
            try:
                step = bpf.lookup_batch(
                    self.fd, cursor, _memory(keys), _memory(values), len(keys), cursor_size=cursor_size
                )
            except OSError as error:
                if error.errno in _NO_BATCH:
                    yield from self._walk(chunk)
                    return
                if error.errno != errno.ENOSPC or len(keys) >= 2 * self.entries + CHUNK:
                    raise
                # One bucket holds more than a chunk: ask again with room for it.
                keys, values = (
                    np.empty(2 * len(keys), self.layout.key),
                    np.empty(2 * len(keys), self.layout.value),
                )
                continue
            if step.read:
                yield keys[: step.read], values[: step.read]
            if step.done:
                return
            # EINTR without progress: the entry at the cursor was deleted again and again under the kernel's hands.
            interrupted = 0 if step.read else interrupted + 1
            if interrupted > _INTERRUPTED_MAX:
                raise OSError(errno.EINTR, "reading the map was interrupted too often", str(self.path))
            if step.read:
                cursor = step.cursor

    def all(self) -> tuple[Records, Records]:
        """Every entry at once, as copies."""
        chunks = [(keys.copy(), values.copy()) for keys, values in self.scan()]
        if not chunks:
            return np.empty(0, self.layout.key), np.empty(0, self.layout.value)
        return np.concatenate([keys for keys, _ in chunks]), np.concatenate([values for _, values in chunks])

    def write(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Write many entries. Raises OSError E2BIG or ENOSPC where the map is full; those before are written."""
        keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        for start in range(0, len(keys), CHUNK):
            some_keys, some_values = keys[start : start + CHUNK], values[start : start + CHUNK]
            try:
                bpf.update_batch(self.fd, _memory(some_keys), _memory(some_values), len(some_keys))
            except OSError as error:
                if error.errno not in _NO_BATCH:
                    raise
                for key, value in zip(some_keys, some_values, strict=True):
                    bpf.update(self.fd, key.tobytes(), value.tobytes())

    def erase(self, keys: npt.NDArray[Any]) -> None:
        """Delete many entries; those that are not there are passed over."""
        keys = np.ascontiguousarray(keys)
        done = 0
        while done < len(keys):
            some = keys[done : done + CHUNK]
            try:
                deleted = bpf.delete_batch(self.fd, _memory(some), len(some))
            except OSError as error:
                if error.errno not in _NO_BATCH:
                    raise
                for key in some:
                    bpf.delete(self.fd, key.tobytes())
                deleted = len(some)
            # A batch ends at the first key that is not there: that one is done, too.
            done += deleted if deleted == len(some) else deleted + 1

    def _walk(self, chunk: int) -> Iterator[tuple[Records, Records]]:
        """The scan without batches, for map types and kernels that lack them.

        Where the key at hand is deleted meanwhile, the kernel starts again from the first: for maps that only this
        daemon writes (hash maps, which the classifier writes, have batches since Linux 5.6).
        """
        keys, values = np.empty(chunk, self.layout.key), np.empty(chunk, self.layout.value)
        filled = 0
        key = bpf.get_next_key(self.fd, None, self.layout.key.itemsize)
        while key is not None:
            value = bpf.lookup(self.fd, key, self.layout.value.itemsize)
            if value is not None:
                keys[filled] = np.frombuffer(key, self.layout.key)[0]
                values[filled] = np.frombuffer(value, self.layout.value)[0]
                filled += 1
            if filled == chunk:
                yield keys, values
                filled = 0
            key = bpf.get_next_key(self.fd, key, self.layout.key.itemsize)
        if filled:
            yield keys[:filled], values[:filled]


def check_layout(fd: int, path: Path, layout: MapLayout, qps_max: int | None = None) -> int:
    """Compare an open map with what it should be; gives its number of entries. Raises LayoutMismatchError.

    ``qps_max``: the entries of a map whose size is a setting; None: whatever it has.
    """
    info = bpf.map_info(fd)
    entries = layout.entries or qps_max or info.max_entries
    have = (info.type, info.key_size, info.value_size, info.max_entries)
    want = (int(layout.type), layout.key.itemsize, layout.value.itemsize, entries)
    if have != want:
        raise LayoutMismatchError(
            f"pinned map {path} has {_describe(*have)}; this qpd needs {_describe(*want)}: "
            "run `qpd detach` first (it removes the pinned maps and what they know)"
        )
    return entries


def _describe(kind: int, key: int, value: int, entries: int) -> str:
    try:
        name = bpf.MapType(kind).name.lower()
    except ValueError:
        name = f"type {kind}"
    return f"{name} of {entries} entries of {key} + {value} octets"


def _memory(array: npt.NDArray[Any]) -> memoryview:
    """An array's octets; records as such cannot be shared by the buffer protocol."""
    return array.view(np.uint8).data


def _key(key: bytes | int) -> bytes:
    return key if isinstance(key, bytes) else np.uint32(key).tobytes()
