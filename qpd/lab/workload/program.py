"""The program of one rank: `python -m qpd.lab.workload.program` in its host's namespace, ordered by `execution`.

Says `ready`; on `go` runs its iterations and tells each; says `done`, or `failed` when a queue pair died; on `end`
says its `result`. It answers its peers all the while, also while it computes or checks: an adapter never sleeps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from qpd.lab.endpoint import report
from qpd.lab.endpoint.adapter import Adapter, QueuePair
from qpd.lab.endpoint.connections import End
from qpd.lab.endpoint.remote import Control
from qpd.lab.endpoint.requester import Request
from qpd.lab.workload import values
from qpd.lab.workload.model import Workload
from qpd.lab.workload.rank import Posting, Rank, layout

_IDLE = 0.05
"""Seconds that nothing is done at most, where nothing happens."""
_RECEIVES = 160
"""Receive requests of a queue pair: more than one look at the socket can use up."""
_BLOCK = 1 << 18
"""Elements that are filled or checked between two looks at the socket."""


class Ended(Exception):  # noqa: N818 - no error
    """The parent wants no more."""


class Program:
    """A rank and its adapter."""

    def __init__(self, control: Control, orders: dict[str, Any]) -> None:
        self.control = control
        self.workload = Workload.from_mapping(orders["workload"])
        self.number = int(orders["rank"])
        schedule = self.workload.schedule()
        self.is_worker = self.number in schedule.contributors
        self.contributors = schedule.contributors
        memory = np.zeros(layout(schedule, self.number).size, dtype=np.uint8)
        self.rank = Rank(schedule, self.number, memory, self.workload.message)
        self.adapter = Adapter(orders["address"], memory, self.workload.transport)
        self.adapter.watch(0)
        self._lanes: dict[int, list[QueuePair]] = {}
        self._turn: dict[int, int] = {}
        for lane in orders["lanes"]:
            qp = self.adapter.add(End(**lane["own"]), End(**lane["peer"]), lane["peer_address"])
            if lane["to"] is None:
                for _ in range(_RECEIVES):
                    qp.responder.post_receive(0, 0)
            else:
                self._lanes.setdefault(lane["to"], []).append(qp)

    # -- the network ------------------------------------------------------------------------------------------------

    def serve(self, timeout: float) -> None:
        """Let the adapter work, and take what it brings.

        Raises:
            Ended: where the parent says so.
        """
        adapter = self.adapter
        adapter.step(timeout)
        if adapter.arrived or adapter.sent:
            now = time.monotonic_ns()
            for qp, arrived in adapter.arrived:
                qp.responder.post_receive(0, 0)
                assert arrived.immediate is not None
                self._send(self.rank.arrived(arrived.immediate, arrived.address, arrived.length, now))
            adapter.arrived.clear()
            for _, request in adapter.sent:
                assert request.immediate is not None
                self.rank.acknowledged(request.immediate, request.length, now)
            adapter.sent.clear()
        order = self.control.poll()
        if self.control.closed or (order is not None and order["kind"] == "end"):
            raise Ended

    def serve_until(self, reached: Callable[[], bool], deadline: float = float("inf")) -> None:
        """Serve until something is reached, or a time."""
        while not reached() and (left := deadline - time.monotonic()) > 0:
            self.serve(min(_IDLE, left))

    def _send(self, postings: list[Posting]) -> None:
        for one in postings:
            lane = self._lanes[one.destination]
            turn = self._turn.get(one.destination, 0)
            self._turn[one.destination] = turn + 1
            request = Request(one.source, one.length, one.address, one.immediate)
            self.adapter.post(lane[turn % len(lane)], request)

    # -- iterations -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All iterations; ends early where a queue pair dies."""
        rng = random.Random(f"{self.workload.seed}/{self.number}/jitter")
        for number in range(self.workload.iterations):
            self._fill(number)
            begin = time.monotonic_ns()
            if self.is_worker:
                pause = self.workload.compute + rng.random() * self.workload.jitter
                self.serve_until(lambda: False, time.monotonic() + pause)
            communicate = time.monotonic_ns()
            self._send(self.rank.begin(communicate))
            self.serve_until(lambda: self.rank.done or bool(self.adapter.failed))
            if self.adapter.failed:
                qp = self.adapter.failed[0]
                self.control.say("failed", error=f"QP {qp.own.qp:#x}: {qp.requester.error}", iteration=number)
                return
            end = time.monotonic_ns()
            self.control.say(
                "iteration",
                number=number,
                begin_ns=begin,
                communicate_ns=communicate,
                end_ns=end,
                phases=[asdict(phase) for phase in self.rank.phases],
                wrong_values=self._wrong(number),
            )
        self.control.say("done")

    def _fill(self, iteration: int) -> None:
        vector = self.rank.vector
        for begin in range(0, len(vector), _BLOCK):
            end = min(begin + _BLOCK, len(vector))
            vector[begin:end] = (
                values.contribution(self.number, iteration, begin, end) if self.is_worker else 0
            )
            self.serve(0)

    def _wrong(self, iteration: int) -> int:
        """Elements that are not the sum; 0 at a server, which has only its part."""
        if not self.is_worker:
            return 0
        wrong, vector = 0, self.rank.vector
        for begin in range(0, len(vector), _BLOCK):
            end = min(begin + _BLOCK, len(vector))
            expected = values.total(self.contributors, iteration, begin, end)
            wrong += int(np.count_nonzero(vector[begin:end] != expected))
            self.serve(0)
        return wrong

    def result(self) -> dict[str, Any]:
        """What is told at the end."""
        return {
            "adapter": asdict(self.adapter.tell()),
            "qps": {
                number: {
                    "sent": report.of_requester(qp.requester),
                    "received": report.of_responder(qp.responder),
                }
                for number, qp in self.adapter.qps.items()
            },
        }


def main() -> None:
    """Follow the orders."""
    control = Control()
    program = Program(control, control.orders())
    control.say("ready")
    try:
        _wait_for_go(program)
        program.run()
        program.serve_until(lambda: False)
    except Ended:
        pass
    control.say("result", **program.result())
    program.adapter.close()


def _wait_for_go(program: Program) -> None:
    while True:
        order = program.control.poll()
        if program.control.closed:
            raise Ended
        if order is not None:
            if order["kind"] == "end":
                raise Ended
            return
        program.adapter.step(_IDLE)


if __name__ == "__main__":
    main()
