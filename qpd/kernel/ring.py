"""Reads the classifier's ring of events (``events`` in maps.h), by mmap and without bcc.

Layout of a BPF ring buffer: kernel/bpf/ringbuf.c. Page 0 holds the consumer's position and is ours to write; page 1 the
producer's; then come the data, mapped twice in a row, so that a record never wraps. Each record: a header of 8 octets
(length, with a busy and a discard bit; offset), then the content, all rounded up to 8. The kernel drops records when
the ring is full: events are hints, the maps are the truth.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpd.kernel import bpf, layout
from qpd.kernel.table import check_layout
from qpd.model import CmKind, CmMessage, Hook, QueuePairKey, TapReported

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER = 8

BUDGET = 512
"""Records read at one wake-up (about a millisecond), so that a burst of new QPs never blocks the event loop."""


class EventKind(IntEnum):
    """``enum event_kind`` of maps.h."""

    QP_NEW = 1
    PATH_STATE = 2
    QP_MOVED = 3
    CM = 4


class TapCause(IntEnum):
    """``enum tap_cause`` of maps.h."""

    UP = 0
    LOCAL_DOWN = 1
    REMOTE_DOWN = 2
    SILENT = 3
    LIFTED = 4


@dataclass(frozen=True, slots=True)
class RingEvent:
    """One record. ``kernel_ns``: CLOCK_MONOTONIC. ``qp``: of all but PATH_STATE. ``content``: all after the head."""

    kind: EventKind
    path: int
    kernel_ns: int
    qp: QueuePairKey | None
    content: bytes


class Ring:
    """The consumer of one pinned ring; there may be only one. Raises OSError or LayoutMismatchError."""

    def __init__(self, pin: Path) -> None:
        self._fd = bpf.obj_get(pin)
        try:
            size = check_layout(self._fd, pin, layout.MAPS["events"])
            page = mmap.PAGESIZE
            self._ours = mmap.mmap(self._fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._theirs = mmap.mmap(self._fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except BaseException:
            os.close(self._fd)
            raise
        self._mask = size - 1
        self._consumer: npt.NDArray[np.uint64] = np.frombuffer(self._ours, np.uint64, 1)
        self._producer: npt.NDArray[np.uint64] = np.frombuffer(self._theirs, np.uint64, 1)
        self._data = memoryview(self._theirs)[page:]
        self._lengths: npt.NDArray[np.uint32] = np.frombuffer(self._theirs, np.uint32, 2 * size // 4, page)
        self._fence = threading.Lock()
        self.unknown = 0
        """Records of a kind that this daemon does not know: a newer classifier's."""

    def fileno(self) -> int:
        """The map's file descriptor: readable (epoll) while there are records."""
        return self._fd

    def read(self, budget: int = BUDGET) -> list[RingEvent]:
        """Take up to ``budget`` records off the ring; an empty list: there are none."""
        events = []
        position = int(self._consumer[0])
        for _ in range(budget):
            if position >= int(self._producer[0]):
                break
            self._order()
            offset = position & self._mask
            length = int(self._lengths[offset // 4])
            if length & _BUSY:
                break
            self._order()
            size = length & ~(_BUSY | _DISCARDED)
            if not length & _DISCARDED:
                event = self._decode(bytes(self._data[offset + _HEADER : offset + _HEADER + size]))
                if event is not None:
                    events.append(event)
            position += (_HEADER + size + 7) & ~7
        self._order()
        self._consumer[0] = position
        return events

    def watch(self, loop: asyncio.AbstractEventLoop, handle: Callable[[list[RingEvent]], None]) -> None:
        """Call ``handle`` with records as they come, at most BUDGET at once; the loop runs others in between."""

        def wake() -> None:
            if events := self.read():
                handle(events)

        loop.add_reader(self._fd, wake)

    def unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop calling."""
        loop.remove_reader(self._fd)

    def close(self) -> None:
        """Give the ring back; records that were not read wait for the next consumer."""
        if self._fd < 0:
            return
        del self._consumer, self._producer, self._lengths
        self._data.release()
        self._ours.close()
        self._theirs.close()
        os.close(self._fd)
        self._fd = -1

    def _order(self) -> None:
        """Keep the loads before this call before those after it (arm64 may swap them): a lock's acquire and release."""
        with self._fence:
            pass

    def _decode(self, record: bytes) -> RingEvent | None:
        if len(record) < layout.EVENT.itemsize:
            self.unknown += 1
            return None
        head = np.frombuffer(record, layout.EVENT, 1)[0]
        content = record[layout.EVENT.itemsize :]
        try:
            kind = EventKind(int(head["kind"]))
        except ValueError:
            self.unknown += 1
            return None
        qp = None
        if kind is not EventKind.PATH_STATE:
            if len(content) < layout.QP_KEY.itemsize:
                self.unknown += 1
                return None
            if kind is EventKind.CM and len(record) < layout.EVENT_CM.itemsize:
                self.unknown += 1
                return None
            qp = layout.unpack_qp_key(np.frombuffer(content, layout.QP_KEY, 1)[0])
        elif len(record) < layout.EVENT_PATH.itemsize:
            self.unknown += 1
            return None
        return RingEvent(kind, int(head["path"]), int(head["time_ns"]), qp, content)


def tap_report(event: RingEvent) -> TapReported:
    """What the BFD tap says by a PATH_STATE event. ``cause`` is a :class:`TapCause`'s name with dashes."""
    _, up, cause = np.frombuffer(bytes(layout.EVENT.itemsize) + event.content, layout.EVENT_PATH, 1)[0]
    try:
        name = TapCause(int(cause)).name.lower().replace("_", "-")
    except ValueError:
        name = f"cause-{cause}"
    return TapReported(event.path, bool(up), name, event.kernel_ns)


def cm_message(event: RingEvent) -> CmMessage | None:
    """The connection manager's message that a CM event tells of; None: one of a kind that says nothing of QPs."""
    record = np.frombuffer(bytes(layout.EVENT.itemsize) + event.content, layout.EVENT_CM, 1)[0]
    try:
        kind = CmKind(int(record["attribute"]))
    except ValueError:
        return None
    return CmMessage(
        kind=kind,
        hook=Hook(int(record["hook"])),
        vni=int(record["key"]["vni"]),
        src=layout.unpack_address(bytes(record["src"])),
        dst=layout.unpack_address(bytes(record["key"]["dst"])),
        local_id=int(record["local_id"]),
        remote_id=int(record["remote_id"]),
        qpn=int(record["qpn"]),
        psn=int(record["psn"]),
        kernel_ns=event.kernel_ns,
    )
