"""What the API asks of the daemon. The daemon implements it, and so does the fake of the tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from qpd.api.events import EventRing
from qpd.api.queries import ExplainQuery, QpFilter
from qpd.api.schemas import Explanation, GroupRow, PathRow, QpRow, StatusInfo
from qpd.core.config import UnknownPath
from qpd.metrics import MetricsSnapshot

__all__ = ["QueryError", "State", "UnknownPath"]


class QueryError(Exception):
    """The question cannot be answered as it was put; the message says how to put it (HTTP 400, exit status 2)."""


class State(Protocol):
    """The daemon as the API sees it. All methods are called on the API's event loop and must not block it."""

    @property
    def events(self) -> EventRing:
        """The history, which the daemon writes."""
        ...

    def status(self) -> StatusInfo:
        """The node at a glance."""
        ...

    def paths(self) -> list[PathRow]:
        """All paths, by id."""
        ...

    def groups(self) -> list[GroupRow]:
        """All groups, by id."""
        ...

    def qps(self, wanted: QpFilter) -> AsyncIterator[list[QpRow]]:
        """The QPs in chunks of at most ``rows.CHUNK``, made in a thread (:mod:`qpd.api.rows`).

        Raises:
            UnknownPath: before the first chunk.
        """
        ...

    async def explain(self, query: ExplainQuery) -> Explanation:
        """Why a QP uses its path (:mod:`qpd.api.explain`).

        Raises:
            QueryError: not seen, and the query does not say which VNI or outer destination it would have.
        """
        ...

    async def drain(self, name: str, drain: bool) -> PathRow:
        """Take a path out of service or put it back; returns it as it is then.

        Raises:
            UnknownPath: nothing was changed.
        """
        ...

    async def metrics(self) -> MetricsSnapshot:
        """All that Prometheus sees, at one moment."""
        ...
