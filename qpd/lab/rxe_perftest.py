"""perftest (ib_write_bw and its like) between two Soft-RoCE guests: how it is called, and what it says of its QPs."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qpd.lab.errors import LabError
from qpd.lab.rxe import DEVICE, GID_INDEX, Command, Guest, Sink

_QPN = re.compile(r"^ (local|remote) address:.* QPN (0x[0-9a-f]+)", re.MULTILINE)
_RULE = re.compile(r"^ remote address:.*\n(?:.*\n)*?-{20,}\n", re.MULTILINE)
"""The line below the last QP."""
_RESULT = re.compile(r"^\s*\d+\s+(\d+)\s+[\d.]+\s+([\d.]+)\s+[\d.]+\s*$", re.MULTILINE)
_FIRST_PORT = 18515
"""perftest's own default; tests that run side by side each need their own."""


@dataclass(frozen=True)
class Report:
    """What the client of a bandwidth test says."""

    pairs: tuple[tuple[int, int], ...]
    """For each connection the client's and the server's QP number."""
    messages: int
    """Messages of all its QPs in the time that counts."""
    megabytes_per_second: float
    """perftest's own unit: 2^20 bytes."""


def arguments(options: Sequence[str], port: int) -> list[str]:
    """The options of both sides: rxe0, RoCE v2 over IPv4, a TCP port of its own; `options` come last and win."""
    return ["-d", DEVICE, "-x", str(GID_INDEX), "-F", "-p", str(port), *options]


def pairs(output: str) -> tuple[tuple[int, int], ...]:
    """The QP numbers (own, peer's) of each connection that a side's output tells, in their order."""
    own = [int(number, 16) for side, number in _QPN.findall(output) if side == "local"]
    peers = [int(number, 16) for side, number in _QPN.findall(output) if side == "remote"]
    if not own or len(own) != len(peers):
        raise ValueError(f"perftest tells {len(own)} QPs of its own and {len(peers)} of its peer")
    return tuple(zip(own, peers, strict=True))


def report(output: str) -> Report:
    """What the output of a client that has ended says.

    Raises:
        ValueError: where it is not the output of a bandwidth test that came to its end.
    """
    result = _RESULT.search(output)
    if result is None:
        raise ValueError(f"perftest tells no result: {' | '.join(output.strip().splitlines()[-3:])}")
    return Report(pairs(output), int(result[1]), float(result[2]))


class Perftest:
    """One test between two guests: its server listens when this is made, `begin` starts the client.

    Args:
        client, server: guests that are up.
        tool: such as `ib_write_bw`.
        options: for both sides, such as `-q 8 -D 10`, or `-R` for connections by rdma_cm.
        number: tells tests apart that run side by side.
    """

    def __init__(
        self, client: Guest, server: Guest, tool: str, options: Sequence[str] = (), *, number: int = 0
    ) -> None:
        self.tool = tool
        self._port = _FIRST_PORT + number
        # Its output is a pipe: without stdbuf it would say nothing of its QPs before its end.
        self._command = ["stdbuf", "-oL", tool, *arguments(options, self._port)]
        self._rdma_cm = "-R" in options
        self._guests = (client, server)
        self._client: Command | None = None
        self._server = server.popen(*self._command)

    def begin(self, sink: Sink | None = None, deadline: float = 60.0) -> None:
        """Start the client as soon as the server waits for it: one that comes too early gives up at once.

        Raises:
            LabError: where the server ends, or does not listen within `deadline` seconds.
        """
        client, server = self._guests
        limit = time.monotonic() + deadline
        while server.run(*self._question()).returncode != 0:
            if self._server.status is not None:
                self._server.check()
            if time.monotonic() > limit:
                raise LabError(f"{' '.join(self._command)}: does not listen after {deadline:.0f} s")
            time.sleep(0.2)
        self._client = client.popen(*self._command, server.address, sink=sink)

    def _question(self) -> list[str]:
        """The command that finds the listening server."""
        if self._rdma_cm:
            return ["sh", "-c", f"rdma resource show cm_id | grep -q 'LISTEN.*:{self._port} '"]
        return ["sh", "-c", f"ss -Hltn sport = :{self._port} | grep -q ."]

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The client's and the server's QP number of each connection; () while the client has not told them."""
        output = self._client.stdout if self._client is not None else ""
        # The last of them is complete once something follows.
        return pairs(output) if _RULE.search(output) else ()

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until both sides have ended well.

        Raises:
            LabError: where one of them fails or takes longer than `timeout` seconds.
        """
        assert self._client is not None, "begin() it first"
        try:
            output = self._client.check(timeout)
            # The server ends with its client.
            self._server.check(60)
            return report(output)
        except ValueError as error:
            raise LabError(f"{self.tool}: {error}") from None
        finally:
            self.end()

    def end(self) -> None:
        """End what still runs of it."""
        for command in (self._client, self._server):
            if command is not None and command.status is None:
                command.send_signal(signal.SIGKILL)
