"""Carries out the planner's operations, in their order: the only place from which the daemon changes the kernel.

Map writes take microseconds and are done at once; attachments and override routes are the work of threads and wait in a
queue, in order, so that thousands of them never hold up a path's death.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

import structlog

from qpd.kernel.attach import AttachError, InterfaceGoneError
from qpd.kernel.fib import OverrideTable
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
    WriteNextHops,
    WriteOverrides,
    WritePath,
    WriteTable,
)

_Slow = AttachUplink | DetachUplink | WriteOverrides | EraseOverrides

_log = structlog.get_logger("qpd.kernel")


class Uplinks(Protocol):
    """What puts the classifier on interfaces and takes it off: ``qpd.kernel.classifier.Classifier``."""

    async def attach(self, ifindex: int, name: str) -> None:
        """Put it on. Raises AttachError."""
        ...

    async def detach(self, ifindex: int, name: str) -> None:
        """Take it off; the interface may be gone. Raises AttachError."""
        ...


class Applier:
    """Applies operations to maps, uplinks and the override table; hands every ``Tell`` on.

    ``troubles``: what failed last, one line by subject (an interface, ``overrides``), until it works again.
    """

    def __init__(
        self, maps: Maps, uplinks: Uplinks, overrides: OverrideTable, tell: Callable[[Tell], None]
    ) -> None:
        self.troubles: dict[str, str] = {}
        self._maps = maps
        self._uplinks = uplinks
        self._overrides = overrides
        self._tell = tell
        self._queue: asyncio.Queue[_Slow] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work on what waits."""
        self._worker = asyncio.get_running_loop().create_task(self._work(), name="slow-operations")

    async def stop(self) -> None:
        """Finish what was asked for, then end."""
        if self._worker is not None:
            await self.settled()
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    async def settled(self) -> None:
        """Return when nothing waits any more."""
        await self._queue.join()

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
            case WriteNextHops(next_hops):
                self._maps.replace_next_hops(next_hops)
            case AttachUplink() | DetachUplink() | WriteOverrides() | EraseOverrides():
                self._queue.put_nowait(operation)
            case Tell():
                self._tell(operation)

    async def _work(self) -> None:
        while True:
            operation = await self._queue.get()
            try:
                match operation:
                    case AttachUplink(ifindex, interface):
                        self._note(interface, await self._attach(ifindex, interface))
                    case DetachUplink(ifindex, interface):
                        self._note(interface, await self._detach(ifindex, interface))
                    case WriteOverrides() | EraseOverrides():
                        self._note("overrides", await self._override(operation))
            finally:
                self._queue.task_done()

    async def _attach(self, ifindex: int, interface: str) -> str:
        try:
            await self._uplinks.attach(ifindex, interface)
        except InterfaceGoneError:
            # The kernel has said so, or is about to; the planner takes the uplink back then.
            return ""
        except AttachError as error:
            return str(error)
        self._tell(Tell("uplink-attached", {"interface": interface, "ifindex": ifindex}))
        return ""

    async def _detach(self, ifindex: int, interface: str) -> str:
        try:
            await self._uplinks.detach(ifindex, interface)
        except AttachError as error:
            return str(error)
        self._maps.forget_sessions(ifindex)
        self._tell(Tell("uplink-detached", {"interface": interface, "ifindex": ifindex}))
        return ""

    async def _override(self, operation: WriteOverrides | EraseOverrides) -> str:
        try:
            result = await self._overrides.apply(operation)
        except OSError as error:
            return f"override routes cannot be written: {error}"
        if not result.failures:
            return ""
        first = result.failures[0]
        return f"{len(result.failures)} override routes failed; the first: {first.prefix}: {first.reason}"

    def _note(self, subject: str, trouble: str) -> None:
        if not trouble:
            self.troubles.pop(subject, None)
        elif self.troubles.get(subject) != trouble:
            self.troubles[subject] = trouble
            _log.error("operation failed", subject=subject, why=trouble)
