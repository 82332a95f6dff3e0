"""Events that wait to be handed out: the last word about each subject, in slices; pure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from qpd.model import (
    Event,
    NeighbourChanged,
    NeighbourGone,
    RouteChanged,
    RouteGone,
)


class EventQueue:
    """Keeps one event a subject (a route's prefix and metric, a neighbour), in the order of their last words."""

    def __init__(self) -> None:
        self._latest: dict[object, Event] = {}

    def __len__(self) -> int:
        return len(self._latest)

    def put(self, events: Iterable[Event]) -> None:
        """Add events; each takes the place of an earlier one about the same subject."""
        for event in events:
            key = _subject(event)
            self._latest.pop(key, None)
            self._latest[key] = event

    def take(self, limit: int) -> list[Event]:
        """The oldest events, at most ``limit``, which are then no longer here."""
        if len(self._latest) <= limit:
            taken, self._latest = list(self._latest.values()), {}
            return taken
        keys = list(islice(self._latest, limit))
        return [self._latest.pop(key) for key in keys]

    def clear(self) -> None:
        """Forget all: a whole new picture says everything."""
        self._latest.clear()


def _subject(event: Event) -> object:
    match event:
        case RouteChanged(route):
            return route.prefix, route.metric
        case RouteGone(prefix, metric):
            return prefix, metric
        case NeighbourChanged(neighbour):
            return neighbour.ifindex, neighbour.address
        case NeighbourGone(ifindex, address):
            return ifindex, address
        case _:
            return id(event)
