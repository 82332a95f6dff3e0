"""FrrSource against real daemons: sessions and names are seen, losses and returns are told."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

import pytest
import uvloop

from qpd.frr.vty import VtyClient
from qpd.frr.watch import FrrSource
from qpd.model import (
    Address,
    BfdSession,
    BfdSessionsRead,
    BfdState,
    Event,
    FrrBack,
    FrrLost,
    NextHopKey,
    PeersNamed,
)
from tests.fabric.frr_pair import FrrPair

pytestmark = pytest.mark.frr

PEER = NextHopKey("n0", IPv4Address("10.77.0.1"))
_E = TypeVar("_E")


@pytest.fixture(scope="module")
def pair() -> Iterator[FrrPair]:
    # Not below pytest's own folder: FRR's daemons run as their own user, and every session of pytest closes it anew.
    with tempfile.TemporaryDirectory(prefix=f"qpdt-{os.getpid()}-frr-") as directory:
        opened = FrrPair(Path(directory))
        try:
            yield opened.open()
        finally:
            opened.close()


class Watcher:
    """A FrrSource beside the west router, and what it has told."""

    def __init__(self, pair: FrrPair, cross_check: float) -> None:
        self.told: list[Event] = []
        self.source = FrrSource(
            pair.sockets("west"), interface_of=self._interface_of, cross_check=cross_check
        )

    @staticmethod
    def _interface_of(address: Address) -> str | None:
        return "n0" if address == PEER.address else None

    def last(self, kind: type[_E]) -> _E | None:
        return next((event for event in reversed(self.told) if isinstance(event, kind)), None)

    def session(self, interface: str) -> BfdSession | None:
        read = self.last(BfdSessionsRead)
        return next((s for s in read.sessions if s.interface == interface), None) if read else None

    def state(self, interface: str) -> BfdState | None:
        session = self.session(interface)
        return session.state if session else None

    def names(self) -> dict[NextHopKey, str]:
        named = self.last(PeersNamed)
        return dict(named.names) if named else {}

    async def until(self, what: str, condition: Callable[[], object], patience: float = 40.0) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}; {self.told[-3:]}"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def watching(pair: FrrPair, cross_check: float) -> AsyncIterator[Watcher]:
    """A watcher that is stopped whatever happens: what it left running would keep the loop from closing."""
    watcher = Watcher(pair, cross_check=cross_check)
    try:
        await watcher.source.start(watcher.told.extend)
        yield watcher
    finally:
        await watcher.source.stop()


@pytest.fixture
async def west(pair: FrrPair) -> AsyncIterator[Watcher]:
    async with watching(pair, cross_check=0.2) as watcher:
        await watcher.until(
            "both sessions up", lambda: watcher.state("n0") is watcher.state("n1") is BfdState.UP
        )
        yield watcher


async def test_numbered_and_unnumbered_peers_get_their_host_names(west: Watcher) -> None:
    await west.until("two names", lambda: len(west.names()) == 2)
    assert set(west.names().values()) == {"east"}
    (unnumbered,) = set(west.names()) - {PEER}
    assert unnumbered.interface == "n1"
    assert unnumbered.address.is_link_local
    session = west.session("n1")
    assert session is not None
    assert session.peer == unnumbered.address
    assert session.detection_time == pytest.approx(0.3)


async def test_a_cut_is_seen_and_healed_and_the_name_stays(pair: FrrPair, west: Watcher) -> None:
    await west.until("a name", lambda: PEER in west.names())
    pair.ip("east", "link", "set", "n0", "down")
    try:
        await west.until("n0 down", lambda: west.state("n0") is BfdState.DOWN)
        assert west.state("n1") is BfdState.UP
        west.told.clear()
        await west.until("names read again", lambda: west.last(PeersNamed))
        assert west.names()[PEER] == "east"
    finally:
        pair.ip("east", "link", "set", "n0", "up")
    await west.until("n0 up", lambda: west.state("n0") is BfdState.UP)


async def test_a_log_line_of_bfdd_is_enough(pair: FrrPair, west: Watcher) -> None:
    """With a cross-check once an hour, only bfdd's log can be what tells of the cut."""
    shell = VtyClient(pair.sockets("west") / "bfdd.vty")
    await shell.connect()
    await shell.command("debug bfd peer")
    watcher = Watcher(pair, cross_check=3600)
    await watcher.source.start(watcher.told.extend)
    try:
        assert watcher.state("n0") is BfdState.UP
        pair.ip("east", "link", "set", "n0", "down")
        await watcher.until("n0 down", lambda: watcher.state("n0") is BfdState.DOWN)
    finally:
        pair.ip("east", "link", "set", "n0", "up")
        await shell.command("no debug bfd peer")
        shell.close()
        await watcher.source.stop()
    await west.until("n0 up", lambda: west.state("n0") is BfdState.UP)


async def test_a_hint_makes_it_read(pair: FrrPair, west: Watcher) -> None:
    watcher = Watcher(pair, cross_check=3600)
    await watcher.source.start(watcher.told.extend)
    try:
        watcher.told.clear()
        watcher.source.hint()
        await watcher.until("both read", lambda: watcher.last(BfdSessionsRead) and watcher.last(PeersNamed))
        watcher.told.clear()
        await watcher.source.check()
        assert watcher.last(BfdSessionsRead)
        assert watcher.last(PeersNamed)
    finally:
        await watcher.source.stop()


async def test_bfdd_killed_is_lost_at_once_and_read_again_when_back(pair: FrrPair) -> None:
    """The next cross-check is an hour away, so the end of the socket is what tells."""
    watcher = Watcher(pair, cross_check=3600)
    await watcher.source.start(watcher.told.extend)
    try:
        watcher.told.clear()
        pair.kill("west", "bfdd")
        await watcher.until("told of the loss", lambda: watcher.last(FrrLost))
        assert watcher.told == [FrrLost("bfdd")]
        assert "bfdd" in watcher.source.status()["bfdd"].problem
        assert watcher.source.status()["bgpd"].connected
        pair.start("west", "bfdd")
        await watcher.until("told of the return", lambda: watcher.last(BfdSessionsRead))
        assert watcher.told[:2] == [FrrLost("bfdd"), FrrBack("bfdd")]
        assert watcher.source.status()["bfdd"].connected
        assert watcher.source.status()["bfdd"].problem == ""
    finally:
        await watcher.source.stop()


async def test_a_bfdd_that_hangs_is_lost_until_it_answers(pair: FrrPair, west: Watcher) -> None:
    pid = int((pair.sockets("west") / "bfdd.pid").read_text())
    west.told.clear()
    os.kill(pid, signal.SIGSTOP)
    try:
        await west.until("told of the loss", lambda: west.last(FrrLost) == FrrLost("bfdd"))
    finally:
        os.kill(pid, signal.SIGCONT)
    await west.until("told of the return", lambda: west.last(FrrBack) == FrrBack("bfdd"))
    await west.until("both up", lambda: west.state("n0") is west.state("n1") is BfdState.UP)


def test_the_same_on_the_loop_of_the_daemon(pair: FrrPair) -> None:
    """On uvloop, which has transports of its own: names, a log line, a killed daemon and its return."""

    async def story() -> None:
        async with watching(pair, cross_check=0.2) as watcher:
            await watcher.until("both up", lambda: watcher.state("n0") is watcher.state("n1") is BfdState.UP)
            await watcher.until("a name", lambda: PEER in watcher.names())
        async with watching(pair, cross_check=3600) as watcher:
            shell = VtyClient(pair.sockets("west") / "bfdd.vty")
            await shell.connect()
            await shell.command("debug bfd peer")
            pair.ip("east", "link", "set", "n0", "down")
            try:
                await watcher.until("n0 down", lambda: watcher.state("n0") is BfdState.DOWN)
            finally:
                pair.ip("east", "link", "set", "n0", "up")
            shell.close()
            pair.kill("west", "bfdd")
            await watcher.until("lost", lambda: watcher.last(FrrLost))
            pair.start("west", "bfdd")
            await watcher.until("back", lambda: watcher.last(FrrBack))

    uvloop.run(story())


async def test_zebra_gone_is_told(pair: FrrPair, west: Watcher) -> None:
    """Last of the file: without zebra the pair loses its routes."""
    pair.kill("west", "zebra")
    await west.until("told of the loss", lambda: FrrLost("zebra") in west.told)
    assert west.source.status()["zebra"].losses == 1
