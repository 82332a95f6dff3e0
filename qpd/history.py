"""What has happened: the ring behind ``qpctl events``, the log, and the counts of failovers."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict

import structlog

from qpd.api.events import EventRing
from qpd.metrics import REACTION_BOUNDS, Distribution
from qpd.model import Tell

_log = structlog.get_logger("qpd.events")
_ALARMING = frozenset({"path-down", "frr-lost", "limit-reached", "mismatch"})


class History:
    """Takes every ``Tell``."""

    def __init__(self) -> None:
        self.events = EventRing()
        self.failovers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Path name to cause (a value of :class:`qpd.model.Reason`) to times that it stopped serving."""
        self._reactions = [0] * (len(REACTION_BOUNDS) + 1)
        self._reaction_seconds = 0.0

    def tell(self, event: Tell) -> None:
        """Record it."""
        self.events.tell(event)
        if event.kind in {"path-down", "path-drained"}:
            self.failovers[str(event.detail.get("path", ""))][str(event.detail.get("reason", ""))] += 1
        write = _log.warning if event.kind in _ALARMING else _log.info
        write(event.kind, **event.detail)

    def reacted(self, seconds: float) -> None:
        """Which paths live has been changed, so long after the event."""
        self._reactions[bisect_left(REACTION_BOUNDS, seconds)] += 1
        self._reaction_seconds += seconds

    def reactions(self) -> Distribution:
        """All that ``reacted`` was told."""
        return Distribution(REACTION_BOUNDS, tuple(self._reactions), self._reaction_seconds)
