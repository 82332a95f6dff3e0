"""The daemon's recent history, for ``qpctl events``: a ring of records with followers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from typing import Any

from qpd.api.schemas import EventRecord
from qpd.model import Tell

RECORDS_MAX = 1000


def rfc3339(unix: float) -> str:
    """A Unix time as text: UTC, microseconds."""
    return (
        datetime.fromtimestamp(unix, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
    )


class EventRing:
    """The last events. Written and followed on one event loop.

    A follower that is slower than the ring turns misses records (their ``seq`` is gone) and never holds up the
    daemon: the ring itself is the only queue.
    """

    def __init__(self, size: int = RECORDS_MAX) -> None:
        self._records: deque[EventRecord] = deque(maxlen=size)
        self._seq = 0
        self._turn = asyncio.Event()
        self._closed = False

    def tell(self, event: Tell) -> EventRecord:
        """Record what the planner tells."""
        return self.add(event.kind, event.detail, event.kernel_ns)

    def add(self, kind: str, detail: Mapping[str, Any], kernel_ns: int | None = None) -> EventRecord:
        """Record an event; its time is the kernel's where ``kernel_ns`` (CLOCK_MONOTONIC) is given, else now."""
        ago = 0.0 if kernel_ns is None else max(0.0, (time.monotonic_ns() - kernel_ns) / 1e9)
        self._seq += 1
        record = EventRecord(
            seq=self._seq,
            time=rfc3339(time.time() - ago),
            kind=kind,
            detail=dict(detail),
            kernel_ns=kernel_ns,
        )
        self._records.append(record)
        self._wake()
        return record

    def records(self, since: int = 0) -> list[EventRecord]:
        """The recorded events with a greater ``seq`` than ``since``, oldest first."""
        missing = self._seq - since
        if missing <= 0:
            return []
        return [record for record in self._records if record["seq"] > since]

    async def follow(self, since: int = 0) -> AsyncIterator[list[EventRecord]]:
        """The recorded events, then new ones as they come, in batches; ends when the ring is closed."""
        while True:
            turn = self._turn
            batch = self.records(since)
            if batch:
                since = batch[-1]["seq"]
                yield batch
            elif self._closed:
                return
            else:
                await turn.wait()

    def close(self) -> None:
        """End all followers, after what is recorded."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._turn.set()
        self._turn = asyncio.Event()
