"""Programs in the hosts' namespaces that speak lines of JSON: the parent's side, and the program's own.

The parent sends objects to standard input, the program answers on standard output; it ends when its parent does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.sender import end_with_parent

_LINE = 1 << 28
"""Longest line: what thousands of queue pairs have to tell."""


class Remote:
    """A program in a host's namespace, from the parent's side."""

    def __init__(self, host: str, process: asyncio.subprocess.Process) -> None:
        self.host = host
        self._process = process

    @classmethod
    async def start(cls, fabric: Fabric, host: str, module: str, orders: Mapping[str, Any]) -> Remote:
        """Start `python -m MODULE` on a host and give it its orders."""
        process = await asyncio.create_subprocess_exec(
            *fabric.enter(host, sys.executable, "-m", module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE,
        )
        made = cls(host, process)
        try:
            await made.tell(orders)
        except BaseException:
            await made.kill()
            raise
        return made

    async def tell(self, message: Mapping[str, Any]) -> None:
        """Send an object; one that the program is no longer there to read is told by `hear`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()

    async def hear(self) -> dict[str, Any]:
        """The next object that the program says.

        Raises:
            LabError: where it has ended instead, with its last words.
        """
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            _, errors = await self._process.communicate()
            words = errors.decode(errors="replace").strip().splitlines()
            raise LabError(f"{self.host}: the endpoint ended: {words[-1] if words else 'it said nothing'}")
        return dict(json.loads(line))

    async def expect(self, kind: str) -> dict[str, Any]:
        """The next object of this kind; others are passed over."""
        while True:
            message = await self.hear()
            if message.get("kind") == kind:
                return message

    async def kill(self) -> None:
        """End the program, whatever it does; nothing happens where it has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.communicate()


class Control:
    """Standard input and output of such a program."""

    def __init__(self) -> None:
        end_with_parent()
        self._buffer = b""
        self.closed = False

    def orders(self) -> dict[str, Any]:
        """Wait for the first object."""
        while (message := self.poll()) is None and not self.closed:
            pass
        if message is None:
            raise LabError("no orders on standard input")
        os.set_blocking(0, False)
        return message

    def poll(self) -> dict[str, Any] | None:
        """The next object that has come; None where there is none."""
        if b"\n" not in self._buffer and not self.closed:
            try:
                data = os.read(0, 1 << 16)
            except BlockingIOError:
                return None
            self.closed = not data
            self._buffer += data
        line, separator, rest = self._buffer.partition(b"\n")
        if not separator:
            return None
        self._buffer = rest
        return dict(json.loads(line))

    @staticmethod
    def say(kind: str, **values: Any) -> None:
        """Send an object to the parent."""
        print(json.dumps({"kind": kind, **values}), flush=True)
