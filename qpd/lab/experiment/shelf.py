"""Keeps a node's compiled classifier from trial to trial, with maps as empty as new ones.

Compiling takes most of a daemon's start. `qpd detach` unpins everything at a trial's end, as it should; descriptors
that are held here outlive that, and are pinned again before the next start, where the daemon finds a classifier made
from the very sources that it would compile.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qpd.kernel import bpf
from qpd.kernel.layout import MAPS
from qpd.kernel.pins import PROGRAMS, Pins
from qpd.kernel.table import possible_cpus

_ARRAYS = {bpf.MapType.ARRAY, bpf.MapType.PERCPU_ARRAY}


@dataclass
class _Kept:
    fingerprint: str
    maps: dict[str, int] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)


class Shelf:
    """Classifiers by the directory of their pins (setting `bpf.pin_dir`)."""

    def __init__(self) -> None:
        self._kept: dict[Path, _Kept] = {}

    def keep(self, pin_dir: Path) -> None:
        """Hold what is pinned there; nothing happens where it is held, or is not a whole classifier."""
        pins = Pins.of(pin_dir)
        if pin_dir in self._kept or (made := pins.made) is None:
            return
        kept = self._kept[pin_dir] = _Kept(made)
        for names, found in ((MAPS, kept.maps), (PROGRAMS, kept.programs)):
            for name in names:
                found[name] = bpf.obj_get(pins.directory / name)

    def give(self, pin_dir: Path) -> None:
        """Pin what is held, its maps emptied; nothing happens where nothing is held, or something is pinned there."""
        kept, pins = self._kept.get(pin_dir), Pins.of(pin_dir)
        if kept is None or pins.directory.exists():
            return
        pins.directory.mkdir(parents=True)
        for name, fd in kept.maps.items():
            empty(fd)
            bpf.obj_pin(fd, pins.directory / name)
        for name, fd in kept.programs.items():
            bpf.obj_pin(fd, pins.directory / name)
        pins.note_made(kept.fingerprint)

    def close(self) -> None:
        """Let go of all of them."""
        for kept in self._kept.values():
            for fd in (*kept.maps.values(), *kept.programs.values()):
                os.close(fd)
        self._kept = {}


def empty(fd: int) -> None:
    """Make a map as it was when it was made: arrays all zero, others without entries."""
    info = bpf.map_info(fd)
    if info.type == bpf.MapType.RINGBUF:
        _skip(fd)
    elif info.type in _ARRAYS:
        keys = np.arange(info.max_entries, dtype=np.uint32)
        if info.type == bpf.MapType.ARRAY:
            bpf.update_batch(fd, keys.data, bytes(info.value_size * info.max_entries), info.max_entries)
            return
        value = bytes((info.value_size + 7) // 8 * 8 * possible_cpus())
        for index in keys:
            bpf.update(fd, index.tobytes(), value)
    else:
        while (key := bpf.get_next_key(fd, None, info.key_size)) is not None:
            bpf.delete(fd, key)


def _skip(fd: int) -> None:
    """Count a ring buffer's records as read: its first page is the consumer's position, the second the producer's."""
    with (
        contextlib.closing(mmap.mmap(fd, mmap.PAGESIZE)) as consumer,
        contextlib.closing(
            mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
        ) as producer,
    ):
        consumer[:8] = producer[:8]
