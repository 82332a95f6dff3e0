"""The vty client's framing, against a server that speaks as lib/vty.c does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from qpd.frr.vty import VtyClient, VtyRefusedError, VtyUnavailableError, log_text
from qpd.frr.watch import FrrSource
from qpd.model import Event

Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


class Daemon:
    """Answers each command by ``answer``; without one: nothing and success."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer: Answer | None = None
        self.asked: list[str] = []
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            while True:
                command = (await reader.readuntil(b"\0"))[:-1].decode()
                self.asked.append(command)
                if command == "enable" or self.answer is None:
                    writer.write(bytes(4))
                else:
                    await self.answer(command, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    served = Daemon(tmp_path / "bfdd.vty")
    await served.start()
    yield served
    await served.stop()


async def test_an_answer_of_megabytes_in_odd_pieces_arrives_whole(daemon: Daemon) -> None:
    text = "äbc" * 500_000

    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        data = text.encode() + b"\0\0\0\0"
        # The end is cut at every place.
        for piece in (data[:100_001], data[100_001:-5], data[-5:-3], data[-3:-2], data[-2:-1], data[-1:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    daemon.answer = answer
    client = VtyClient(daemon.path)
    await client.connect()
    assert await client.command("show everything") == text
    assert await client.command("show everything") == text
    client.close()
    await asyncio.sleep(0)


async def test_a_failed_command_names_itself_and_leaves_the_conversation_open(daemon: Daemon) -> None:
    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"% Unknown command: nonsense\n\0\0\0\x02")

    daemon.answer = answer
    client = VtyClient(daemon.path)
    await client.connect()
    with pytest.raises(VtyRefusedError, match=r"bfdd\.vty: 'nonsense': % Unknown command: nonsense"):
        await client.command("nonsense")
    assert client.connected
    client.close()
    await asyncio.sleep(0)


async def test_commands_that_come_together_are_asked_one_after_the_other(daemon: Daemon) -> None:
    async def answer(command: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0)
        writer.write(command.upper().encode() + b"\0\0\0\0")

    daemon.answer = answer
    client = VtyClient(daemon.path)
    await client.connect()
    lines = [f"show {n}" for n in range(20)]
    assert await asyncio.gather(*map(client.command, lines)) == [line.upper() for line in lines]
    client.close()
    await asyncio.sleep(0)


async def test_a_daemon_that_ends_in_the_middle_of_an_answer_is_lost(daemon: Daemon) -> None:
    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"half an ans")
        await writer.drain()
        writer.transport.abort()

    daemon.answer = answer
    lost: list[bool] = []
    client = VtyClient(daemon.path, on_lost=lambda: lost.append(True))
    await client.connect()
    with pytest.raises(VtyUnavailableError, match="bfdd went away"):
        await client.command("show")
    assert lost == [True]
    assert not client.connected


async def test_a_daemon_that_does_not_answer_is_lost_after_the_timeout(daemon: Daemon) -> None:
    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        pass

    daemon.answer = answer
    lost: list[bool] = []
    client = VtyClient(daemon.path, timeout=0.05, on_lost=lambda: lost.append(True))
    await client.connect()
    with pytest.raises(VtyUnavailableError, match=r"did not answer 'show' within 0\.05 s"):
        await client.command("show")
    assert lost == [True]


async def test_closing_is_no_loss(daemon: Daemon) -> None:
    lost: list[bool] = []
    client = VtyClient(daemon.path, on_lost=lambda: lost.append(True))
    await client.connect()
    client.close()
    client.close()
    await asyncio.sleep(0.01)
    assert lost == []
    with pytest.raises(VtyUnavailableError, match="not connected"):
        await client.command("show")


async def test_a_socket_made_anew_is_noticed(daemon: Daemon) -> None:
    client = VtyClient(daemon.path)
    await client.connect()
    assert not client.replaced()
    other = daemon.path.with_name("other")
    other.touch()
    other.rename(daemon.path)
    assert client.replaced()
    client.close()
    await asyncio.sleep(0)


async def test_no_daemon_says_what_where_and_how_to_mend_it(tmp_path: Path) -> None:
    with pytest.raises(VtyUnavailableError, match=r"bfdd\.vty: not there; bfdd is not running"):
        await VtyClient(tmp_path / "bfdd.vty").connect()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who is not let in")
async def test_a_user_who_is_not_let_in_is_told_so(daemon: Daemon) -> None:
    daemon.path.chmod(0o600)
    for directory in (daemon.path.parent, daemon.path.parent.parent, daemon.path.parent.parent.parent):
        directory.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(VtyUnavailableError, match=r"permission denied; run qpd as root or add its user"):
            await VtyClient(daemon.path).connect()
    finally:
        os.seteuid(0)


async def test_without_frr_the_source_waits_and_says_what_is_missing(tmp_path: Path) -> None:
    events: list[Event] = []
    source = FrrSource(tmp_path, interface_of=lambda address: None)
    await source.start(events.extend)
    assert events == []
    assert {name: "not there" in status.problem for name, status in source.status().items()} == {
        "bfdd": True,
        "bgpd": True,
        "zebra": True,
    }
    await source.stop()


def test_the_text_of_a_log_message_is_found_behind_its_header() -> None:
    text = b"[M59KS-A3ZXZ] state-change: [mhop:no peer:10.0.0.1] up -> down"
    header = bytes(12) + (96).to_bytes(4, "little") + bytes(28) + len(text).to_bytes(4, "little") + bytes(48)
    assert log_text(header + text + b"trailing") == text.decode()
    assert log_text(b"short") == ""
