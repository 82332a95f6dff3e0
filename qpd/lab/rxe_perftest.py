"""perftest (ib_write_bw and its like) between two Soft-RoCE guests: how it is called, and what it says of its QPs."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qpd.lab.errors import LabError
from qpd.lab.rxe import DEVICE, GID_INDEX, Command, Guest, Sink

_QPN = re.compile(r"^ (local|remote) address:.* QPN (0x[0-9a-f]+)", re.MULTILINE)
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
    """One test that runs between two guests.

    Args:
        client, server: guests that are up.
        tool: such as `ib_write_bw`.
        options: for both sides, such as `-q 8 -D 10`, or `-R` for connections by rdma_cm.
        number: tells tests apart that run side by side.
        sink: gets the client's output as it comes.
    """

    def __init__(
        self,
        client: Guest,
        server: Guest,
        tool: str,
        options: Sequence[str] = (),
        *,
        number: int = 0,
        sink: Sink | None = None,
    ) -> None:
        self.tool = tool
        port = _FIRST_PORT + number
        both = [tool, *arguments(options, port)]
        self.server = server.popen(*both)
        try:
            _listening(server, self.server, port, rdma_cm="-R" in options)
            self.client = client.popen(*both, server.address, sink=sink)
        except BaseException:
            self.server.send_signal(9)
            raise

    def end(self) -> None:
        """End what still runs of it."""
        for command in (self.client, self.server):
            if command.status is None:
                command.send_signal(9)

    def wait(self, timeout: float) -> Report:
        """Wait until both sides have ended well.

        Raises:
            LabError: where one of them fails or takes longer than `timeout` seconds.
        """
        limit = time.monotonic() + timeout
        try:
            output = self.client.check(timeout)
            self.server.check(max(limit - time.monotonic(), 1.0))
            return report(output)
        except ValueError as error:
            raise LabError(f"{self.tool}: {error}") from None
        finally:
            self.end()


def _listening(guest: Guest, command: Command, port: int, *, rdma_cm: bool, deadline: float = 60.0) -> None:
    """Wait until the server waits for its client: a client that comes too early gives up at once."""
    question = (
        ["sh", "-c", f"rdma resource show cm_id | grep -q 'state LISTEN.* src-port {port}'"]
        if rdma_cm
        else ["sh", "-c", f"ss -Hltn sport = :{port} | grep -q ."]
    )
    limit = time.monotonic() + deadline
    while guest.run(*question).returncode != 0:
        if command.status is not None:
            raise LabError(f"{' '.join(command.argv)}: {(command.stderr or command.stdout).strip()[-200:]}")
        if time.monotonic() > limit:
            raise LabError(f"{' '.join(command.argv)}: does not listen after {deadline:.0f} s")
        time.sleep(0.2)
