"""What has happened: the ring behind ``qpctl events``, the log, and the counts of failovers."""

from __future__ import annotations

from collections import Counter, defaultdict

import structlog

from qpd.api.events import EventRing
from qpd.model import Tell

_log = structlog.get_logger("qpd.events")
_ALARMING = frozenset({"path-down", "frr-lost", "limit-reached", "mismatch"})


class History:
    """Takes every ``Tell``."""

    def __init__(self) -> None:
        self.events = EventRing()
        self.failovers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Path name to cause (a value of :class:`qpd.model.Reason`) to times that it stopped serving."""

    def tell(self, event: Tell) -> None:
        """Record it."""
        self.events.tell(event)
        if event.kind in {"path-down", "path-drained"}:
            self.failovers[str(event.detail.get("path", ""))][str(event.detail.get("reason", ""))] += 1
        write = _log.warning if event.kind in _ALARMING else _log.info
        write(event.kind, **event.detail)
