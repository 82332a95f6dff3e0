"""A ring AllReduce among Soft-RoCE guests: starts a rank in each, and reads what they say."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpd.lab.errors import LabError
from qpd.lab.rxe import Command, Guest

# By its path: importing it here would need pyverbs, which only the guests' Python must have.
_PROGRAM = Path(__file__).with_name("rxe_allreduce.py")


@dataclass(frozen=True)
class Connection:
    """One RC connection, from a rank to the next."""

    source: str
    """The address of the rank that writes."""
    qp: int
    """Its QP number."""
    destination: str
    dest_qp: int


@dataclass(frozen=True)
class Report:
    """How an AllReduce went."""

    rounds: int
    bytes: int
    """The vector that is summed in a round."""
    seconds: float
    """From the first round's beginning to the last one's end, by the slowest rank."""
    connections: tuple[Connection, ...]

    def row(self) -> dict[str, Any]:
        """The report for people and JSON."""
        # 2 (N-1)/N of the vector pass each link of the ring in a round (NCCL's bus bandwidth).
        ranks = len({connection.source for connection in self.connections})
        moved = self.rounds * self.bytes * 2 * (ranks - 1) / ranks
        return {
            "ranks": ranks,
            "qps": len(self.connections),
            "rounds": self.rounds,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "bus_bandwidth_bits_per_second": round(8 * moved / self.seconds) if self.seconds else None,
        }


class Ring:
    """An AllReduce that runs.

    Args:
        guests: one a rank, all up.
        qps: QPs from each rank to the next.
        elements: numbers of four bytes that are summed.
        rounds: how often, at least.
        seconds: how long, at least.
    """

    def __init__(
        self,
        guests: Sequence[Guest],
        *,
        qps: int = 4,
        elements: int = 65536,
        rounds: int = 10,
        seconds: float = 0,
    ) -> None:
        self._addresses = [guest.address for guest in guests]
        options = [f"--qps={qps}", f"--elements={elements}", f"--rounds={rounds}", f"--seconds={seconds:g}"]
        command = ["/usr/bin/python3", "-I", str(_PROGRAM), *options]
        self.ranks: list[Command] = [
            guest.popen(*command, f"--rank={rank}", "--ranks", *self._addresses)
            for rank, guest in enumerate(guests)
        ]

    def connections(self) -> tuple[Connection, ...] | None:
        """Who is connected to whom; None while not all ranks are.

        Raises:
            LabError: where a rank has failed.
        """
        found = []
        for rank, command in enumerate(self.ranks):
            if command.status is not None:
                command.check()
            told = _told(command, "connected")
            if told is None:
                return None
            following = self._addresses[(rank + 1) % len(self.ranks)]
            found += [
                Connection(self._addresses[rank], qp, following, peer)
                for qp, peer in told["connected"]["out"]
            ]
        return tuple(found)

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until all ranks have ended well.

        Raises:
            LabError: where one fails, has found a wrong sum, or takes longer than `timeout` seconds.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        try:
            for command in self.ranks:
                command.check(None if limit is None else max(limit - time.monotonic(), 0.1))
        finally:
            self.end()
        ends = [told for command in self.ranks if (told := _told(command, "rounds"))]
        connections = self.connections()
        if connections is None or len(ends) < len(self.ranks):
            raise LabError("AllReduce: a rank ended without a report")
        return Report(
            rounds=ends[0]["rounds"],
            bytes=ends[0]["bytes"],
            seconds=max(end["seconds"] for end in ends),
            connections=connections,
        )

    def end(self) -> None:
        """End what still runs of it."""
        for command in self.ranks:
            if command.status is None:
                command.send_signal(signal.SIGKILL)


def _told(command: Command, key: str) -> dict[str, Any] | None:
    for line in command.stdout.splitlines(keepends=True):
        if line.endswith("\n"):
            message: dict[str, Any] = json.loads(line)
            if key in message:
                return message
    return None
