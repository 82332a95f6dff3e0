"""The program of RC test traffic on a host: `python -m qpd.lab.endpoint.program`, ordered by `traffic`.

Says `ready`; on `go` sends; on `stop` posts nothing more and says `drained` when all is acknowledged (or nothing has
been for a while); on `end` says its `result`. It answers its peers all the while.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qpd.lab.endpoint import report
from qpd.lab.endpoint.adapter import Adapter, QueuePair
from qpd.lab.endpoint.config import Transport
from qpd.lab.endpoint.connections import End
from qpd.lab.endpoint.remote import Control
from qpd.lab.endpoint.requester import Request

_IDLE = 0.05
"""Seconds that nothing is done at most, where nothing happens."""
_RECEIVES = 160
"""Receive requests of a queue pair: more than one look at the socket can use up."""


@dataclass
class Source:
    """Posts messages to queue pairs in turn: at a rate, or so that there is always something to send.

    Args:
        adapter: the queue pairs' own.
        qps: those that send.
        rate: messages per second and queue pair; None: as fast as the windows let.
        limit: messages of each queue pair; None: no limit.
        message: bytes.
        operation: write, send, or write-immediate.
    """

    adapter: Adapter
    qps: list[QueuePair]
    rate: float | None
    limit: int | None
    message: int
    operation: str
    begin: float = 0.0
    posted: int = 0
    stopped: bool = False
    _by_qp: dict[int, int] = field(default_factory=dict, init=False)

    def go(self, now: float) -> None:
        """Begin."""
        self.begin = now
        if self.rate is None:
            packets = -(-self.message // self.adapter.transport.mtu)
            # Enough for the window, and one that is completed.
            depth = 1 + -(-self.adapter.transport.window // packets)
            for qp in self.qps * depth:
                self._post(qp)

    def work(self, now: float) -> float:
        """Post what is due; returns seconds until more is."""
        done = self.adapter.sent
        if self.rate is None:
            for qp, _ in done:
                self._post(qp)
            done.clear()
            return _IDLE
        done.clear()
        if not self.qps or self.stopped:
            return _IDLE
        total = self.rate * len(self.qps)
        while self.posted <= (now - self.begin) * total and not self.finished:
            self._post(self.qps[self.posted % len(self.qps)])
        return max(0.0, self.begin + self.posted / total - now)

    @property
    def finished(self) -> bool:
        """True when all messages have been posted."""
        return self.limit is not None and self.posted >= self.limit * len(self.qps)

    @property
    def still(self) -> bool:
        """True when all that was posted is acknowledged, or never will be."""
        return all(qp.requester.idle or qp.requester.error is not None for qp in self.qps)

    def _post(self, qp: QueuePair) -> None:
        posted = self._by_qp.get(qp.own.qp, 0)
        if self.stopped or posted == self.limit:
            return
        self._by_qp[qp.own.qp] = posted + 1
        self.posted += 1
        request = Request(0, self.message, None if self.operation == "send" else 0)
        if self.operation == "write-immediate":
            request.immediate = self.posted & 0xFFFFFFFF
        self.adapter.post(qp, request)


def main() -> None:
    """Follow the orders."""
    control = Control()
    orders = control.orders()
    message = int(orders["message"])
    memory = np.resize(np.arange(251, dtype=np.uint8), max(message, 1))
    adapter = Adapter(orders["address"], memory, Transport(**orders["transport"]))
    adapter.watch(0)
    senders = []
    for lane in orders["lanes"]:
        qp = adapter.add(End(**lane["own"]), End(**lane["peer"]), lane["peer_address"])
        for _ in range(_RECEIVES):
            qp.responder.post_receive(0, message)
        if lane["sends"]:
            senders.append(qp)
    source = Source(adapter, senders, orders["rate"], orders["messages"], message, orders["operation"])
    source.stopped = True
    control.say("ready")
    _serve(control, adapter, source, message)
    control.say("result", **_result(adapter, source))
    adapter.close()


def _serve(control: Control, adapter: Adapter, source: Source, message: int) -> None:
    draining = finished = False
    while True:
        order = control.poll()
        if order is not None:
            now = time.monotonic()
            if order["kind"] == "go":
                source.stopped = False
                source.go(now)
            elif order["kind"] == "stop":
                source.stopped = draining = True
            else:
                return
        elif control.closed:
            return
        wait = source.work(time.monotonic())
        adapter.step(min(wait, _IDLE))
        for qp, _ in adapter.arrived:
            qp.responder.post_receive(0, message)
        adapter.arrived.clear()
        if (draining or (source.finished and not finished)) and source.still:
            if source.finished and not finished:
                finished = True
                control.say("finished")
            if draining:
                draining = False
                control.say("drained")


def _result(adapter: Adapter, source: Source) -> dict[str, Any]:
    return {
        "begin_ns": round(source.begin * 1e9),
        "end_ns": time.monotonic_ns(),
        "adapter": asdict(adapter.tell()),
        "qps": {
            number: {"sent": report.of_requester(qp.requester), "received": report.of_responder(qp.responder)}
            for number, qp in adapter.qps.items()
        },
    }


if __name__ == "__main__":
    main()
