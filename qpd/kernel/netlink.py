"""The source of kernel facts: links, routes, neighbours of the daemon's network namespace as model events.

Raw sockets on the daemon's own loop and no thread: a link's death must reach the planner within about a millisecond,
without waiting for another thread's turn. Links have a socket of their own, so that thousands of route notifications
cannot stand before one of them. Reading yields to the loop every few milliseconds.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from qpd.kernel import netlink_decode as nl
from qpd.kernel import netlink_socket as ns
from qpd.kernel.netlink_queue import EventQueue
from qpd.kernel.netlink_state import NOTHING, Mirror, Part, Snapshot
from qpd.model import (
    Address,
    Event,
    LinkChanged,
    LinkGone,
    NeighbourChanged,
    NeighbourGone,
    Network,
    Resynced,
)

_log = structlog.get_logger(__name__)

Deliver = Callable[[list[Event]], None]

RECONCILE = 30.0
"""Seconds between two full comparisons with the kernel."""

_TURN = 0.004
"""Seconds of reading after which other work of the loop gets its turn."""
_COALESCE = 0.002
"""Seconds between a message that asks for a dump and the dump, so that a burst of them costs one."""
_SLICE = 256
"""Most events of a batch: who works on it must not keep the loop for long."""
_PACE = 0.005
"""Seconds between two batches of route or neighbour changes in a burst; the first goes out at once, links always do."""
_SETTLE = 0.05
"""Seconds after a link's change when routes are read once more: the kernel tells of a link before its routes have
followed, without a lock that a dump would wait for."""
_RETRY = 0.5
_INTERRUPTED_MAX = 8
_DUMP_TIMEOUT = 10.0

_RTEXT_FILTER_SKIP_STATS = 1 << 3
_IFLA_EXT_MASK = 29


def _dump_request(part: Part) -> tuple[int, bytes]:
    match part:
        case Part.LINKS:
            mask = ns.attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
            return nl.RTM_GETLINK, bytes(16) + mask
        case Part.NEIGHBOURS:
            return nl.RTM_GETNEIGH, bytes(12)
        case Part.NEXTHOPS:
            return nl.RTM_GETNEXTHOP, bytes(8)
        case _:
            family = socket.AF_INET if part is Part.ROUTES4 else socket.AF_INET6
            return nl.RTM_GETROUTE, nl.ROUTE.pack(family, 0, 0, 0, nl.RT_TABLE_MAIN, 0, 0, 0, 0)


class OpenSocket(Protocol):
    """How the source opens its sockets: ``qpd.kernel.netlink_socket.open_netlink`` or the like."""

    def __call__(self, groups: Iterable[int] = (), receive_buffer: int = ...) -> socket.socket:
        """Open a non-blocking NETLINK_ROUTE socket."""


@dataclass(slots=True)
class NetlinkCounters:
    """What the source has done since it was made."""

    notifications: int = 0
    """Messages that the kernel sent by itself."""
    overruns: int = 0
    """Times that the kernel threw notifications away; each led to a full dump."""
    dumps: int = 0
    """Dumps read, of whatever parts."""
    interrupted: int = 0
    """Dumps begun again, since tables changed while they were read."""
    drifts: int = 0
    """Full dumps that found something no notification had told."""
    dump_seconds: float = 0.0
    """How long the last dump took."""


class _InterruptedDumpError(Exception):
    pass


class NetlinkSource:
    """Hands out the kernel's network state and its changes.

    The first batch is one ``Resynced``; further ones hold single changes. What was missed (an overrun, the periodic
    comparison) is found by a full dump and handed out as the differences that it makes, in batches of a bounded size:
    a whole new picture would keep its reader busy over what it knows. ``resync()`` asks for one all the same.
    Of several words about a route or a neighbour that wait, the last is handed out; of a link every one, and at once.

    Args:
        reconcile: seconds between two comparisons with the kernel's tables.
        receive_buffer: bytes that the kernel may queue for the route socket; 4 096 notifications need about 4 MiB.
        open_socket: where the sockets come from (tests open them in another namespace).
    """

    def __init__(
        self,
        *,
        reconcile: float = RECONCILE,
        receive_buffer: int = 16 << 20,
        open_socket: OpenSocket = ns.open_netlink,
    ) -> None:
        self.counters = NetlinkCounters()
        self._reconcile = reconcile
        self._receive_buffer = receive_buffer
        self._open_socket = open_socket
        self._mirror = Mirror()
        self._deliver: Deliver | None = None
        self._links: socket.socket | None = None
        self._others: socket.socket | None = None
        self._dumps: socket.socket | None = None
        self._sequence = 0
        self._primed = False
        self._connected: list[tuple[Network, int]] | None = None
        self._meanwhile: list[tuple[int, int, bytes]] | None = None
        self._wanted = NOTHING
        self._whole = False
        self._asked = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self._timers: set[asyncio.TimerHandle] = set()
        self._pending = EventQueue()
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flushed = 0.0
        self._task: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self, deliver: Deliver) -> None:
        """Subscribe, dump, hand out the first ``Resynced`` and go on; ``deliver`` is called on this loop.

        Raises:
            OSError: no netlink socket, or the kernel refused the first dump.
        """
        loop = asyncio.get_running_loop()
        self._deliver = deliver
        try:
            self._links = self._open_socket([ns.GROUP_LINK], 1 << 20)
            self._others = self._open_socket(
                [ns.GROUP_ROUTE4, ns.GROUP_ROUTE6, ns.GROUP_NEIGHBOUR, ns.GROUP_NEXTHOP, ns.GROUP_ADDRESS4],
                self._receive_buffer,
            )
            self._dumps = self._open_socket([], 1 << 20)
            loop.add_reader(self._links, self._readable, self._links)
            loop.add_reader(self._others, self._readable, self._others)
            await self._refresh(Part.ALL, whole=True)
        except OSError:
            await self.stop()
            raise
        self._task = loop.create_task(self._keep(), name="netlink-dumps")

    async def stop(self) -> None:
        """Close everything; nothing is delivered any more. Idempotent."""
        self._deliver = None
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        self._pending.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        loop = asyncio.get_running_loop()
        for opened in (self._links, self._others, self._dumps):
            if opened is not None:
                if opened is not self._dumps:
                    loop.remove_reader(opened)
                opened.close()
        self._links = self._others = self._dumps = None
        self._primed = False
        for waiter in self._waiters:
            waiter.cancel()
        self._waiters.clear()

    async def resync(self) -> None:
        """Dump everything, hand out ``Resynced``, and return when that has been delivered."""
        if self._task is None:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._want(Part.ALL, whole=True)
        await waiter

    def interface_of(self, address: Address) -> str | None:
        """The interface on whose connected prefix ``address`` lies; None where no link is known to lead there."""
        if self._connected is None:
            self._connected = connected_prefixes(self._mirror.known.routes.values())
        for prefix, ifindex in self._connected:
            if address.version == prefix.version and address in prefix:
                link = self._mirror.known.links.get(ifindex)
                return None if link is None else link.name
        return None

    # --- notifications -----------------------------------------------------------------------------------------------

    def _readable(self, source: socket.socket) -> None:
        events: list[Event] = []
        until = time.monotonic() + _TURN
        while True:
            try:
                datagram = source.recv(ns.DATAGRAM_MAX)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if not ns.is_overrun(error):
                    raise
                self._overrun()
                continue
            self._take(datagram, events)
            if time.monotonic() >= until:
                break
        if self._mirror.stale:
            stale, self._mirror.stale = self._mirror.stale, NOTHING
            self._want(stale)
        if source is self._links:
            if events:
                self._later(_SETTLE, Part.ROUTES)
            self._hand_out(events)
        else:
            self._hand_out_soon(events)

    def _hand_out_soon(self, events: list[Event]) -> None:
        if events and self._primed:
            self._connected = None
            self._pending.put(events)
            if self._flush_timer is None:
                left = self._flushed + _PACE - time.monotonic()
                if left <= 0:
                    self._flush()
                else:
                    self._flush_timer = asyncio.get_running_loop().call_later(left, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        self._flushed = time.monotonic()
        self._hand_out(self._pending.take(_SLICE))
        if self._pending:
            # Where more waits already, only other work of the loop comes in between.
            self._flush_timer = asyncio.get_running_loop().call_later(0, self._flush)

    def _take(self, datagram: bytes, events: list[Event]) -> None:
        try:
            for kind, flags, _, body in nl.messages(datagram):
                self.counters.notifications += 1
                if self._meanwhile is not None:
                    self._meanwhile.append((kind, flags, body))
                events += self._mirror.apply(kind, flags, body)
        except (ValueError, struct.error) as error:
            _log.error("netlink message not understood; everything is read again", error=str(error))
            self._want(Part.ALL, whole=True)

    def _overrun(self) -> None:
        self.counters.overruns += 1
        _log.warning("netlink notifications lost; everything is read again", overruns=self.counters.overruns)
        self._want(Part.ALL)

    def _hand_out(self, events: list[Event]) -> None:
        if events:
            self._connected = None
        if events and self._primed and self._deliver is not None:
            self._deliver(events)

    # --- dumps -------------------------------------------------------------------------------------------------------

    def _want(self, parts: Part, *, whole: bool = False) -> None:
        self._wanted |= parts
        self._whole |= whole
        self._asked.set()

    def _later(self, delay: float, parts: Part) -> asyncio.TimerHandle:
        def due() -> None:
            self._timers.discard(timer)
            self._want(parts)

        timer = asyncio.get_running_loop().call_later(delay, due)
        self._timers.add(timer)
        return timer

    async def _keep(self) -> None:
        """Read again what is asked for, and everything now and then."""
        due = self._later(self._reconcile, Part.ALL)
        # Cancellation alone would not do: wait_for() before Python 3.12 can swallow it.
        while self._deliver is not None:
            await self._asked.wait()
            await asyncio.sleep(_COALESCE)
            parts, whole = self._wanted, self._whole
            self._wanted, self._whole = NOTHING, False
            self._asked.clear()
            waiters, self._waiters = self._waiters, []
            began = time.monotonic()
            try:
                await self._refresh(parts, whole=whole)
            except Exception as error:  # noqa: BLE001 - also where a reader of the events fails: reading must go on
                _log.error("netlink dump failed; trying again", error=repr(error), parts=str(parts))
                self._want(parts, whole=whole)
                self._waiters += waiters
                await asyncio.sleep(_RETRY)
                continue
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
            if Part.ALL in parts:
                due.cancel()
                self._timers.discard(due)
                due = self._later(self._reconcile, Part.ALL)
            # While tables keep changing, dumps may use at most half of the time.
            await asyncio.sleep(time.monotonic() - began)

    async def _refresh(self, parts: Part, *, whole: bool) -> None:
        began = time.monotonic()
        for _ in range(_INTERRUPTED_MAX):
            self._meanwhile = []
            memory: dict[bytes, nl.RouteRecord] = {}
            dumped = Snapshot()
            try:
                for part in Part:
                    if part in parts and part.value & (part.value - 1) == 0:
                        await asyncio.wait_for(self._dump(part, dumped, memory), _DUMP_TIMEOUT)
            except _InterruptedDumpError:
                self.counters.interrupted += 1
                continue
            except asyncio.TimeoutError as error:
                raise OSError(
                    errno.ETIMEDOUT, f"the kernel did not finish a dump in {_DUMP_TIMEOUT} s"
                ) from error
            finally:
                meanwhile, self._meanwhile = self._meanwhile, None
            break
        else:
            raise OSError(errno.EINTR, f"tables changed during each of {_INTERRUPTED_MAX} dumps")
        differences = self._mirror.settle(parts, dumped, memory, meanwhile)
        self.counters.dumps += 1
        self.counters.dump_seconds = time.monotonic() - began
        self._settled(parts, differences, whole=whole)

    def _settled(self, parts: Part, differences: list[Event], *, whole: bool) -> None:
        if self._mirror.stale:
            # Raised by replaying what came meanwhile.
            stale, self._mirror.stale = self._mirror.stale, NOTHING
            self._want(stale)
        if whole:
            self._primed = True
            self._pending.clear()
            self._hand_out([Resynced(self._mirror.known.facts())])
            return
        # The kernel tells no one of a neighbour that it begins to look for: no sign that anything was missed.
        if Part.ALL in parts and any(
            not isinstance(event, NeighbourChanged | NeighbourGone) for event in differences
        ):
            self.counters.drifts += 1
        self._hand_out([event for event in differences if isinstance(event, LinkChanged | LinkGone)])
        self._hand_out_soon([event for event in differences if not isinstance(event, LinkChanged | LinkGone)])

    async def _dump(self, part: Part, into: Snapshot, memory: dict[bytes, nl.RouteRecord]) -> None:
        assert self._dumps is not None
        loop = asyncio.get_running_loop()
        kind, body = _dump_request(part)
        self._sequence += 1
        sequence = self._sequence
        self._dumps.send(ns.request(kind, nl.NLM_F_REQUEST | nl.NLM_F_DUMP, sequence, body))
        interrupted = False
        while True:
            datagram = await loop.sock_recv(self._dumps, ns.DATAGRAM_MAX)
            bodies: list[tuple[int, bytes]] = []
            done = False
            for kind, flags, answered, content in nl.messages(datagram):
                if answered != sequence:
                    continue  # the rest of a dump that was given up
                interrupted |= bool(flags & nl.NLM_F_DUMP_INTR)
                if kind in (nl.NLMSG_DONE, nl.NLMSG_ERROR):
                    _judge(part, ns.error_of(content))
                    done = True
                else:
                    bodies.append((kind, content))
            self._mirror.collect(bodies, into, memory)
            if done:
                break
            # sock_recv does not yield where data is waiting.
            await asyncio.sleep(0)
        if interrupted:
            raise _InterruptedDumpError


def _judge(part: Part, error: int) -> None:
    if not error or (part is Part.NEXTHOPS and error in (errno.EOPNOTSUPP, errno.EINVAL)):
        return  # kernels before 5.3 have no nexthop objects
    raise OSError(error, f"dump of {part.name}: {os.strerror(error)}")


def connected_prefixes(records: Iterable[nl.RouteRecord]) -> list[tuple[Network, int]]:
    """Prefixes that lie on one link itself, with that link's index, the longest first."""
    found = [
        (record.route.prefix, record.route.next_hops[0].ifindex)
        for record in records
        if record.route is not None and record.route.next_hops[0].connected
    ]
    return sorted(found, key=lambda item: item[0].prefixlen, reverse=True)
