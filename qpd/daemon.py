"""Builds the rooms, starts them in order, carries events from one to the other, and stops them; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import structlog
import uvloop

from qpd import logs
from qpd.api.events import EventRing
from qpd.api.server import ApiServer, ListenError
from qpd.core.config import Adopted, PlannerConfig
from qpd.core.gray import GrayConfig
from qpd.core.planner import Planner
from qpd.drained import DrainedPaths
from qpd.frr.watch import FrrSource
from qpd.grayness import GrayWatch
from qpd.history import History
from qpd.kernel import bpffs, headers
from qpd.kernel.apply import Applier
from qpd.kernel.classifier import Classifier, ClassifierError, detach_all
from qpd.kernel.fib import PROTOCOL, OverrideTable
from qpd.kernel.lock import LockedError, PinLock
from qpd.kernel.maps import Maps
from qpd.kernel.netlink import NetlinkSource
from qpd.kernel.ring import EventKind, RingEvent, cm_message, tap_report
from qpd.metrics import Distribution
from qpd.model import (
    BfdSessionsRead,
    Event,
    FrrBack,
    FrrLost,
    Group,
    NextHopKey,
    Operation,
    PeersNamed,
    Placement,
    SetLiving,
    TapReported,
    Tick,
)
from qpd.pairs import PairKeeper
from qpd.settings import Settings
from qpd.view import View

_log = structlog.get_logger("qpd")

_COUNT_INTERVAL = 1.0
_COUNT_SHARE = 20
"""The census takes at most one part in so many of the time, however many QPs there are."""
_LOOK_INTERVAL, _LOOK_INTERVAL_IDLE = 0.05, 0.5
"""Between two looks for pairs, while there are QPs whose partner is not known, and else."""
_LOOK_SHARE, _LOOK_SHARE_IDLE = 5, 50
"""Looks take at most one part in so many of the time."""
_GRAY_INTERVAL = 0.1
_GRAY_HOLDS_MAX = 32
_TIMER_MIN = 0.001
_PRIORITY = 1
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_FRR_EVENTS = (PeersNamed, BfdSessionsRead, FrrLost, FrrBack)


class StartError(Exception):
    """The daemon cannot start: one line that says what, where and how to mend it."""


def run(settings: Settings) -> int:
    """Run the daemon until SIGTERM or SIGINT. Returns the exit status; an error is one line on standard error."""
    logs.configure(settings.log)
    # Threads read the maps; with an arena each, what they have freed stays with the process (mallopt(3)).
    # And by itself the threshold of memory that goes back at once rises to that of the largest array.
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 * 1024)
    try:
        uvloop.run(_main(settings))
    except (StartError, ClassifierError, ListenError, LockedError, bpffs.BpffsMissingError) as error:
        print(f"qpd: {error}", file=sys.stderr)  # noqa: T201 - the one line for the operator
        return 1
    return 0


def detach(settings: Settings) -> int:
    """Remove programs, pins, rules and routes of a node on which no daemon runs. Returns the exit status."""
    try:
        with _lock(settings) as lock:
            interfaces = detach_all(settings.bpf.pin_dir)
            routes = asyncio.run(_detach_overrides(settings))
            DrainedPaths(settings.api.socket).forget()
            headers.forget(settings.api.socket.parent)
            lock.remove()
    except LockedError as error:
        print(f"qpd: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except (OSError, StartError) as error:
        print(f"qpd: cannot detach: {error}; run it as root", file=sys.stderr)  # noqa: T201
        return 1
    names = ", ".join(_name_of(ifindex) for ifindex in interfaces) or "no interface"
    print(f"qpd: detached from {names}; {routes} override routes removed")  # noqa: T201
    return 0


async def _detach_overrides(settings: Settings) -> int:
    table = OverrideTable(table=settings.override.table, priority=settings.override.priority)
    try:
        return await table.detach()
    finally:
        table.close()


async def _main(settings: Settings) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    daemon = Daemon(settings)
    try:
        await daemon.start()
        await stopped.wait()
    finally:
        await daemon.stop()


class Daemon:
    """All rooms of one node. ``start`` raises what :func:`run` catches; ``stop`` leaves the classifier steering."""

    planner: Planner
    maps: Maps

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.attached: Mapping[int, Literal["tcx", "clsact"]] = {}
        self._history = History()
        self._drained = DrainedPaths(settings.api.socket)
        self._closing = contextlib.AsyncExitStack()
        self._timer: asyncio.TimerHandle | None = None
        self._held: list[Event] | None = []

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load, adopt what an earlier daemon left, read kernel and FRR, then steer."""
        settings, closing = self.settings, self._closing
        begun = time.monotonic()
        closing.enter_context(_lock(settings))
        bpffs.check(settings.bpf.pin_dir)
        self._classifier = await Classifier.load(settings.bpf, settings.api.socket.parent)
        closing.callback(self._classifier.close)
        self.maps = closing.enter_context(self._classifier.open_maps())
        self._ring = self._classifier.open_ring()
        closing.callback(self._ring.close)
        teller = self._classifier.open_teller()
        closing.callback(teller.close)
        self._pairs = PairKeeper(
            self.maps,
            teller,
            symmetric=settings.symmetric,
            idle=settings.symmetric_idle,
        )
        closing.callback(self._pairs.close)
        self._gray = GrayWatch(self.maps, gray_config(settings))
        self._overrides = OverrideTable(table=settings.override.table, priority=settings.override.priority)
        try:
            await self._overrides.start()
        except OSError as error:
            raise StartError(f"no override rules: {error.strerror}; qpd needs CAP_NET_ADMIN") from error
        closing.callback(self._overrides.close)

        self.maps.set_placement(Placement[settings.placement.upper()])
        self.maps.set_hold_up(settings.hold_up)
        await self._classifier.forget_gone()
        self.attached = await self._classifier.attached()
        left = adopt(self.maps, self.attached, self._drained.read(), self._overrides)
        self.planner = Planner(planner_config(settings), left)
        self._applier = Applier(self.maps, self._classifier, self._overrides, self._history.tell)
        self._applier.start()
        closing.push_async_callback(self._applier.stop)

        self._netlink = NetlinkSource(reconcile=settings.reconcile_interval)
        self._frr = FrrSource(settings.frr.socket_dir, interface_of=self._netlink.interface_of)
        self._view = View(self)
        api = ApiServer(self._view, settings)
        await api.start()
        closing.push_async_callback(api.stop)
        await self._start_sources()
        await self._applier.settled()
        self.attached = await self._classifier.attached()
        for name, work in (("census", self._count()), ("pairs", self._pair()), ("gray", self._compare())):
            task = asyncio.get_running_loop().create_task(work, name=name)
            task.add_done_callback(_lament)
            closing.push_async_callback(_cancelled, task)
        self._view.steering = True
        _go_first()
        gc.collect()
        gc.freeze()  # What start-up made lives as long as the daemon: no collection need look at it again.
        _notify("READY=1")
        _log.info(
            "steering",
            node=settings.node,
            uplinks=len(self.attached),
            mode=self._classifier.mode,
            seconds=round(time.monotonic() - begun, 3),
        )

    async def _start_sources(self) -> None:
        # Names first: a path that is named before it is first seen never changes its name, its plane, and so its slots.
        try:
            await self._netlink.start(self.deliver)
        except OSError as error:
            raise StartError(f"cannot read routes by netlink: {error}") from error
        self._closing.push_async_callback(self._netlink.stop)
        await self._frr.start(self.deliver)
        self._closing.push_async_callback(self._frr.stop)
        held, self._held = self._held or [], None
        # What FRR has said goes before the first picture of the kernel, which begins what netlink has said.
        self.deliver(sorted(held, key=lambda event: not isinstance(event, _FRR_EVENTS)))
        loop = asyncio.get_running_loop()
        self._ring.watch(loop, self._take)
        self._closing.callback(self._ring.unwatch, loop)

    async def stop(self) -> None:
        """Stop everything in reverse order; programs, maps and homes stay in the kernel."""
        _notify("STOPPING=1")
        if self._timer is not None:
            self._timer.cancel()
        await self._closing.aclose()

    # --- events -------------------------------------------------------------------------------------------------------

    def deliver(self, events: Sequence[Event]) -> None:
        """Take what a source has seen."""
        if self._held is not None:
            self._held.extend(events)
            return
        now = time.monotonic()
        stamps = [event.kernel_ns / 1e9 for event in events if isinstance(event, TapReported)]
        self._carry_out(self.planner.handle_all(events, now), min([now, *stamps]))

    def handle(self, event: Event) -> None:
        """Give an event to the planner and carry out what follows."""
        now = time.monotonic()
        self._carry_out(self.planner.handle(event, now), now)

    def _carry_out(self, operations: Sequence[Operation], since: float) -> None:
        """Apply what follows from an event at ``since``, and set the timer for what the planner awaits."""
        self._applier.apply(operations)
        if any(isinstance(operation, SetLiving) for operation in operations):
            self._history.reacted(time.monotonic() - since)
        self._drained.keep(self.planner.drained)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.planner.deadline
        if deadline is not None:
            delay = max(_TIMER_MIN, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self.handle, Tick())

    def _take(self, records: list[RingEvent]) -> None:
        for record in records:
            message = cm_message(record) if record.kind is EventKind.CM else None
            if message is not None:
                self._pairs.hear(message)
        reports = [tap_report(record) for record in records if record.kind is EventKind.PATH_STATE]
        if reports:
            self.deliver(reports)
            self._frr.hint()

    async def _count(self) -> None:
        """Keep the census and the kernel's idea of active QPs true."""
        while True:
            begun = time.monotonic()
            steering = self._view.steering_now()
            await asyncio.to_thread(self._view.count, steering)
            idle_ns = int(self.settings.idle_after * 1e9)
            await asyncio.to_thread(self.maps.recount_active, time.monotonic_ns(), idle_ns)
            self.attached = await self._classifier.attached()
            # What readers of the maps and answers to the API have freed goes back to the machine (malloc_trim(3)).
            await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)
            await asyncio.sleep(max(_COUNT_INTERVAL, _COUNT_SHARE * (time.monotonic() - begun)))

    async def _pair(self) -> None:
        """Learn which QPs belong together, and put both directions on one plane."""
        while True:
            begun = time.monotonic()
            outcome = await asyncio.to_thread(self._pairs.look, self.planner.paths)
            for event in outcome.events:
                self._history.tell(event)
            pause, share = (
                (_LOOK_INTERVAL, _LOOK_SHARE) if outcome.busy else (_LOOK_INTERVAL_IDLE, _LOOK_SHARE_IDLE)
            )
            await asyncio.sleep(max(pause, share * (time.monotonic() - begun)))

    async def _compare(self) -> None:
        """Tell the planner of paths that are alive and yet worse than their siblings."""
        while True:
            await asyncio.sleep(_GRAY_INTERVAL)
            events = self._gray.look(self.planner.paths, self.planner.groups, time.monotonic())
            if events:
                self.deliver(events)

    # --- what the view reads ------------------------------------------------------------------------------------------

    @property
    def events(self) -> EventRing:
        """The history."""
        return self._history.events

    @property
    def failovers(self) -> Mapping[str, Counter[str]]:
        """Path name to cause to times."""
        return self._history.failovers

    def reactions(self) -> Distribution:
        """Seconds from events that changed which paths live to the change applied."""
        return self._history.reactions()

    def troubles(self) -> list[str]:
        """What the operator should mend, one sentence each."""
        found = [f"{subject}: {why}" for subject, why in sorted(self._applier.troubles.items())]
        found += [status.problem for _, status in sorted(self._frr.status().items()) if status.problem]
        if self._view.steering and not self.attached:
            found.append(
                "no uplink: no route of a routing daemon has a next hop yet; is BGP up? (vtysh: show bgp summary)"
            )
        return found

    def frr(self) -> Mapping[str, bool]:
        """FRR daemon to whether it answers."""
        return {name: status.connected for name, status in self._frr.status().items()}

    def overrides(self) -> int:
        """Routes in qpd's own table."""
        return len(self._overrides.routes)

    def resyncs(self) -> int:
        """Times that the kernel's state was read anew because events were lost."""
        return self._netlink.counters.overruns


def planner_config(settings: Settings) -> PlannerConfig:
    """The planner's part of the settings."""
    return PlannerConfig(
        uplinks=None if settings.uplinks == "auto" else settings.uplinks,
        planes=settings.planes,
        weights=settings.weights,
        placement=Placement[settings.placement.upper()],
        hold_up=settings.hold_up,
        gray_drain=settings.gray.action == "drain",
        gray_hold=settings.gray.hold,
        gray_hold_max=_GRAY_HOLDS_MAX * settings.gray.hold,
        own_protocol=PROTOCOL,
    )


def gray_config(settings: Settings) -> GrayConfig:
    """What makes a path gray, of the settings."""
    gray = settings.gray
    return GrayConfig(gray.loss, gray.factor, gray.delay, gray.min_samples, gray.window)


def adopt(
    maps: Maps, attached: Mapping[int, str], drained: Collection[NextHopKey], overrides: OverrideTable
) -> Adopted:
    """What an earlier daemon left in the kernel."""
    pinned_paths = maps.paths()
    groups = {id_: Group(id_, pinned.weights, pinned.table) for id_, pinned in maps.groups().items()}
    interfaces = {path.ifindex: path.key.interface for path in pinned_paths.values()}
    next_hops = {
        NextHopKey(interfaces[ifindex], address): id_
        for (ifindex, address), id_ in maps.next_hops().items()
        if ifindex in interfaces
    }
    return Adopted(
        paths={id_: path.key for id_, path in pinned_paths.items()},
        groups=groups,
        tables={number: maps.table(number) for number in {group.table for group in groups.values()}},
        destinations=maps.destinations(),
        living=maps.living() if pinned_paths else None,
        uplinks={ifindex: _name_of(ifindex) for ifindex in attached},
        overrides=dict(overrides.routes),
        drained=drained,
        next_hops=next_hops,
    )


def _lock(settings: Settings) -> PinLock:
    try:
        return PinLock(settings.bpf.pin_dir)
    except OSError as error:
        raise StartError(f"cannot lock {settings.bpf.pin_dir}: {error}; run qpd as root") from error


def _name_of(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"interface {ifindex} (gone)"


def _lament(task: asyncio.Task[None]) -> None:
    """Work that never ends has ended: everything else goes on, but somebody should know."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.error("work has ended: please report it", work=task.get_name(), why=repr(error))


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _go_first() -> None:
    """A lost carrier waits for nothing but us: on a busy machine, milliseconds of lost packets (docs/failover.md).

    This thread alone, and only from here on: the compiler's child and the census keep their place among others. The
    kernel bounds what a real-time thread may take. Without CAP_SYS_NICE all works, but later.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))


def _notify(word: str) -> None:
    """Tell systemd, where it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(word.encode())
