"""The source of FRR's facts: keeps a conversation with each daemon and hands out what it says as model events."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from qpd.frr import bfd, peers, vty
from qpd.frr.bfd import InterfaceOf
from qpd.model import BfdSessionsRead, Event, FrrBack, FrrLost, PeersNamed

_log = structlog.get_logger(__name__)

Deliver = Callable[[list[Event]], None]
Read = Callable[[str], Event]

CROSS_CHECK = 5.0
"""Seconds between two readings of what FRR knows."""

_BACKOFF_FIRST, _BACKOFF_MAX = 0.05, 1.0
_DEBOUNCE = 0.02
"""Seconds from a hint to the reading, so that a burst of log lines costs one."""


@dataclass(slots=True)
class DaemonStatus:
    """How the conversation with one FRR daemon stands. ``problem``: one line for people, '' where there is none."""

    connected: bool = False
    problem: str = "not asked yet"
    losses: int = 0
    readings: int = 0


class _Watch:
    """Keeps the conversation with one daemon.

    Args:
        path: its vty socket.
        command: what it is asked, '' where its presence is all that matters.
        read: makes an event of the answer; raises ValueError where it does not understand it.
        hints: parts of log lines after which the command is given again; empty string: every line.
    """

    def __init__(
        self, path: Path, command: str, read: Read | None, hints: tuple[str, ...], interval: float
    ) -> None:
        self.name = path.stem
        self.status = DaemonStatus()
        self._path = path
        self._command = command
        self._read = read
        self._hints = hints
        self._interval = interval
        self._client = vty.VtyClient(path, on_lost=self._lost)
        self._wake = asyncio.Event()
        self._reading = asyncio.Lock()
        self._deliver: Deliver | None = None
        self._monitor: tuple[socket.socket, socket.socket] | None = None
        self._was_lost = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        # The first try is waited for, so that names and sessions are there from the start where FRR is.
        connected = await self._connect()
        self._task = asyncio.get_running_loop().create_task(self._keep(connected), name=f"frr-{self.name}")

    async def stop(self) -> None:
        self._deliver = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._close_monitor()
        self._client.close()
        self.status.connected = False

    def hint(self) -> None:
        self._wake.set()

    async def check(self) -> None:
        """Read now; a failure shows as a loss or in the status."""
        if not self._command or self._read is None:
            return
        async with self._reading:
            try:
                answer = await self._client.command(self._command)
                event = self._read(answer)
            except vty.VtyUnavailableError:
                return  # the loss has been told, and the conversation is begun anew
            except (vty.VtyRefusedError, ValueError) as error:
                self._trouble(str(error))
                return
        self.status.problem = ""
        self.status.readings += 1
        self._hand_out([event])

    async def _keep(self, connected: bool) -> None:
        backoff = _BACKOFF_FIRST
        # Cancellation alone would not do: wait_for() before Python 3.12 can swallow it.
        while self._deliver is not None:
            try:
                connected, backoff = await self._turn(connected, backoff)
            # Also where a reader of the events fails: watching must go on.
            except Exception as error:  # noqa: BLE001, PERF203
                _log.error("FRR: watching failed; trying again", daemon=self.name, error=repr(error))
                await asyncio.sleep(_BACKOFF_MAX)
                connected = self._client.connected

    async def _turn(self, connected: bool, backoff: float) -> tuple[bool, float]:
        """Try to connect once, or wait for what asks for a reading; returns whether connected, and the next wait."""
        if not connected:
            await asyncio.sleep(backoff)
            return await self._connect(), min(2 * backoff, _BACKOFF_MAX)
        timer = asyncio.get_running_loop().call_later(self._interval, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
        await asyncio.sleep(_DEBOUNCE)
        self._wake.clear()
        if self._client.replaced():
            self._client.close()
            self._lost()
        elif self._client.connected:
            await self.check()
        return self._client.connected, _BACKOFF_FIRST

    async def _connect(self) -> bool:
        try:
            await self._client.connect()
        except vty.VtyError as error:
            self._trouble(str(error))
            return False
        self.status.connected = True
        self.status.problem = ""
        if self._was_lost:
            self._was_lost = False
            _log.info("FRR daemon answers again", daemon=self.name)
            self._hand_out([FrrBack(self.name)])
        await self.check()
        if self._hints:
            await self._open_monitor()
        return self._client.connected

    def _lost(self) -> None:
        """The conversation ended: told at once, from the loop's own callback."""
        if not self.status.connected:
            return
        self.status.connected = False
        self.status.losses += 1
        self._was_lost = True
        self._close_monitor()
        self._trouble(f"{self._path}: {self.name} went away")
        self._hand_out([FrrLost(self.name)])
        self._wake.set()

    def _trouble(self, problem: str) -> None:
        # While it lasts, one and the same trouble is one line in the log.
        if problem != self.status.problem:
            self.status.problem = problem
            _log.warning("FRR", daemon=self.name, problem=problem)

    def _hand_out(self, events: list[Event]) -> None:
        if self._deliver is not None:
            self._deliver(events)

    # --- log lines as hints -------------------------------------------------------------------------------------------

    async def _open_monitor(self) -> None:
        try:
            self._monitor = await vty.open_monitor(self._path)
        except vty.VtyUnavailableError as error:
            _log.debug(
                "no log lines from FRR; sessions are read now and then", daemon=self.name, why=str(error)
            )
            return
        asyncio.get_running_loop().add_reader(self._monitor[1], self._log_line)
        if not self._client.connected:
            self._close_monitor()  # it went away while we asked

    def _log_line(self) -> None:
        if self._monitor is None:
            return
        try:
            datagram = self._monitor[1].recv(vty.LOG_MAX)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            datagram = b""
        if not datagram:
            self._close_monitor()
            return
        text = vty.log_text(datagram)
        if any(hint in text for hint in self._hints):
            self._wake.set()

    def _close_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            asyncio.get_running_loop().remove_reader(monitor[1])
            for opened in monitor:
                opened.close()


class FrrSource:
    """Hands out ``PeersNamed``, ``BfdSessionsRead``, ``FrrLost`` and ``FrrBack``.

    Sessions and names are read at start, after a reconnection, every ``cross_check`` seconds, after ``hint()``, and
    when a daemon logs that a session changed. FRR that is not there is no error: it is looked for once a second.

    Args:
        socket_dir: FRR's directory of sockets (``frr.socket_dir``).
        interface_of: the interface that leads to an address of a connected prefix, as ``NetlinkSource`` tells it.
        cross_check: seconds between two readings.
    """

    def __init__(
        self, socket_dir: Path, *, interface_of: InterfaceOf, cross_check: float = CROSS_CHECK
    ) -> None:
        names = peers.PeerNames()

        def read_sessions(text: str) -> Event:
            return BfdSessionsRead(bfd.parse_sessions(text, interface_of))

        def read_peers(text: str) -> Event:
            return PeersNamed(names.update(peers.parse_peers(text), interface_of))

        # bfdd says little, and every word may be about a session (8.4: with `debug bfd peer`, later releases:
        # `log-session-changes`). bgpd says much; these are the lines about a session that came or went.
        self._watches = (
            _Watch(socket_dir / "bfdd.vty", bfd.COMMAND, read_sessions, ("",), cross_check),
            _Watch(
                socket_dir / "bgpd.vty", peers.COMMAND, read_peers, ("ADJCHANGE", "End-of-RIB"), cross_check
            ),
            _Watch(socket_dir / "zebra.vty", "", None, (), cross_check),
        )

    async def start(self, deliver: Deliver) -> None:
        """Read what is there and go on; ``deliver`` is called on this loop. Never fails for want of FRR."""
        await asyncio.gather(*(watch.start(deliver) for watch in self._watches))

    async def stop(self) -> None:
        """End all conversations; nothing is delivered any more. Idempotent."""
        await asyncio.gather(*(watch.stop() for watch in self._watches))

    def hint(self) -> None:
        """Something may have changed (the tap saw a session move): read soon."""
        for watch in self._watches:
            watch.hint()

    async def check(self) -> None:
        """Read now and return when what was read has been delivered."""
        await asyncio.gather(*(watch.check() for watch in self._watches))

    def status(self) -> dict[str, DaemonStatus]:
        """How each daemon's conversation stands, by the daemon's name."""
        return {watch.name: watch.status for watch in self._watches}
