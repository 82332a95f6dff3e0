"""Runs the commands as processes, in a pipe or in a terminal of a given width, against a served fake."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.api.fake_state import FakeState, serving

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def plain(self) -> str:
        """Without colours, and with the line ends of files."""
        return _COLOURS.sub("", self.out).replace("\r\n", "\n")


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QPD_", "QPCTL_"))}
    kept |= {"QPD_TEST_SESSION": os.environ.get("QPD_TEST_SESSION", "")}
    return kept | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | more


async def run(program: str, *arguments: str, **environment: str) -> Outcome:
    """Run ``qpctl`` or ``qpd`` in a pipe."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"qpd.cli.{program}",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(**environment),
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())


class Terminal:
    """A command in a terminal of ``columns``; keys can be sent while it runs."""

    def __init__(self, columns: int, rows: int = 24) -> None:
        self._ours, self._theirs = os.openpty()
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.text = ""
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, program: str, *arguments: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"qpd.cli.{program}",
            *arguments,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env=_environment(),
            start_new_session=True,
        )
        os.close(self._theirs)
        asyncio.get_running_loop().add_reader(self._ours, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # EIO: the command has ended
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._ours)
        self.text += data.decode(errors="replace")

    @property
    def plain(self) -> str:
        """All that was shown, without colours."""
        return _COLOURS.sub("", self.text)

    async def until(self, pattern: str, since: int = 0) -> None:
        """Wait until the screen has shown ``pattern``, behind the first ``since`` characters of ``plain``."""
        for _ in range(int(DEADLINE_S / 0.05)):
            if re.search(pattern, self.plain[since:]):
                return
            await asyncio.sleep(0.05)
        pytest.fail(f"the terminal never showed {pattern!r}: {self.plain[-2000:]!r}")

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def interrupt(self) -> None:
        """What Ctrl-C does in a shell's terminal."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    async def end(self) -> Outcome:
        """Wait for the command's end."""
        assert self._process is not None
        status = await asyncio.wait_for(self._process.wait(), DEADLINE_S)
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 65536):
                self.text += data.decode(errors="replace")
        return Outcome(status, self.text, "")

    async def close(self) -> None:
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._ours)
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        else:
            os.close(self._theirs)
        os.close(self._ours)


@contextlib.asynccontextmanager
async def terminal(columns: int, *command: str, rows: int = 24) -> AsyncIterator[Terminal]:
    """A running command in a terminal."""
    screen = Terminal(columns, rows)
    try:
        await screen.start(*command)
        yield screen
    finally:
        await screen.close()


async def in_terminal(columns: int, *command: str) -> Outcome:
    """Run a command to its end in a terminal."""
    async with terminal(columns, *command) as screen:
        return await screen.end()


@pytest.fixture
def state() -> FakeState:
    """A leaf with 40 QPs on four spines, of which the second is down."""
    return FakeState(count=40, down="dc1-spine2")


@pytest.fixture
async def socket(state: FakeState, tmp_path: Path) -> AsyncIterator[str]:
    """The API socket of a served ``state``."""
    async with serving(state, tmp_path, listen="off"):
        yield str(tmp_path / "qpd.sock")
