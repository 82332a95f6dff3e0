"""Carries out the planner's operations, in their order: the only place from which the daemon changes the kernel.

Map writes and attachments take microseconds and are done at once; override routes go to a worker, which takes them in
order, so that thousands of them never hold up a path's death.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

import structlog

from qpd.kernel.attach import AttachError
from qpd.kernel.fib import OverrideResult, OverrideTable
from qpd.kernel.maps import Maps
from qpd.model import (
    AttachUplink,
    DetachUplink,
    EraseDestinations,
    EraseGroup,
    EraseOverrides,
    ErasePath,
    Operation,
    RaiseGeneration,
    SetLiving,
    Tell,
    WriteDestinations,
    WriteGroup,
    WriteNeighbours,
    WriteOverrides,
    WritePath,
    WriteTable,
)

_log = structlog.get_logger("qpd.kernel")


class Uplinks(Protocol):
    """What puts the classifier on interfaces and takes it off: ``qpd.kernel.classifier.Classifier``."""

    def attach(self, ifindex: int, name: str) -> None:
        """Put it on. Raises AttachError."""
        ...

    def detach(self, ifindex: int, name: str) -> None:
        """Take it off; the interface may be gone."""
        ...


class Applier:
    """Applies operations to maps, uplinks and the override table; hands every ``Tell`` on.

    ``troubles`` holds what failed last by subject (an interface, ``overrides``), in one line each, until it works again.
    """

    def __init__(
        self, maps: Maps, uplinks: Uplinks, overrides: OverrideTable, tell: Callable[[Tell], None]
    ) -> None:
        self.troubles: dict[str, str] = {}
        self._maps = maps
        self._uplinks = uplinks
        self._overrides = overrides
        self._tell = tell
        self._queue: asyncio.Queue[WriteOverrides | EraseOverrides] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take override routes."""
        self._worker = asyncio.get_running_loop().create_task(self._override(), name="override-routes")

    async def stop(self) -> None:
        """Finish what was asked for, then end."""
        if self._worker is not None:
            await self._queue.join()
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    def apply(self, operations: Iterable[Operation]) -> None:
        """Carry out all, in order."""
        for operation in operations:
            self._apply(operation)

    def _apply(self, operation: Operation) -> None:  # noqa: C901, PLR0912 - one line an operation
        match operation:
            case SetLiving(word):
                self._maps.set_living(word)
            case WritePath(path):
                self._maps.write_path(path)
            case ErasePath(path_id):
                self._maps.erase_path(path_id)
            case WriteTable(table, orders):
                self._maps.write_table(table, orders)
            case WriteGroup(group):
                self._maps.write_group(group)
            case EraseGroup(group_id):
                self._maps.erase_group(group_id)
            case WriteDestinations(groups):
                self._maps.write_destinations(groups)
            case EraseDestinations(prefixes):
                self._maps.erase_destinations(prefixes)
            case RaiseGeneration():
                self._maps.raise_generation()
            case WriteNeighbours(paths):
                self._maps.replace_neighbours(paths)
            case AttachUplink(ifindex, interface):
                self._attach(ifindex, interface)
            case DetachUplink(ifindex, interface):
                self._uplinks.detach(ifindex, interface)
                self.troubles.pop(interface, None)
            case WriteOverrides() | EraseOverrides():
                self._queue.put_nowait(operation)
            case Tell():
                self._tell(operation)

    def _attach(self, ifindex: int, interface: str) -> None:
        try:
            self._uplinks.attach(ifindex, interface)
        except AttachError as error:
            self.troubles[interface] = str(error)
            _log.error("uplink not steered", interface=interface, why=str(error))
        else:
            self.troubles.pop(interface, None)

    async def _override(self) -> None:
        while True:
            operation = await self._queue.get()
            try:
                self._note(await self._overrides.apply(operation))
            except OSError as error:
                self.troubles["overrides"] = f"override routes cannot be written: {error}"
                _log.error("override routes failed", why=str(error))
            finally:
                self._queue.task_done()

    def _note(self, result: OverrideResult) -> None:
        if result.failures:
            first = result.failures[0]
            self.troubles["overrides"] = (
                f"{len(result.failures)} override routes failed; the first: {first.prefix}: {first.reason}"
            )
        else:
            self.troubles.pop("overrides", None)
