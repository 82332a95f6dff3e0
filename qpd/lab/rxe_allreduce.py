"""A ring AllReduce over RC queue pairs: the traffic of data-parallel training, on real verbs. Runs inside guests.

Each rank writes to its successor by RDMA WRITE with immediate data, as NCCL does, over several QPs at once: N - 1
steps of reduce-scatter, N - 1 of all-gather (Patarasuk and Yuan, 2009). The sum is made by numpy and compared, in every
round, with the sum that it must be. QP numbers, addresses and keys are exchanged over TCP.

    python3 rxe_allreduce.py --rank R --ranks ADDRESS ADDRESS... [--qps N] [--elements N] [--rounds N | --seconds S]

Says one JSON object a line: {"connected"} with the QPs, then {"rounds", "bytes", "seconds", "wrong"} at the end.
Only pyverbs and numpy of the distribution; no other module of qpd.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyverbs import enums
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

DEVICE, PORT, GID_INDEX = "rxe0", 1, 1
_TCP_PORT = 18600
_ELEMENT = 4
_PARITIES = 2
"""Rounds whose data a rank may hold at once. To end a round a rank needs what all others have sent in it, and they send
that only after the round before: whoever is two rounds ahead writes where nobody reads any more."""
_TIMEOUT = 14
"""Local ACK timeout: 4.096 us x 2^14 = 67 ms (InfiniBand specification, 9.7.6.1.3)."""


@dataclass(frozen=True)
class Peer:
    """What a rank tells its predecessor: where to write."""

    qps: list[int]
    psns: list[int]
    gid: str
    address: int
    rkey: int


def ring_chunk(rank: int, step: int, ranks: int) -> int:
    """The chunk that a rank sends in a step of the ring (reduce-scatter, then all-gather)."""
    if step < ranks - 1:
        return (rank - step) % ranks
    return (rank + 1 - (step - (ranks - 1))) % ranks


class Buffer:
    """Registered memory that numpy sees as numbers."""

    def __init__(self, pd: PD, elements: int, access: int) -> None:
        self.region = MR(pd, elements * _ELEMENT, access)
        memory = (ctypes.c_char * (elements * _ELEMENT)).from_address(self.region.buf)
        self.values: NDArray[np.float32] = np.frombuffer(memoryview(memory), dtype=np.float32)

    def address(self, element: int) -> int:
        """The address of an element."""
        return int(self.region.buf) + element * _ELEMENT


class Ring:
    """One rank's place in the ring."""

    def __init__(self, rank: int, addresses: list[str], qps: int, elements: int) -> None:
        self.rank, self.ranks, self.qps = rank, len(addresses), qps
        self._addresses = addresses
        # Equal chunks, and in each an equal slice for every QP.
        self.slice = -(-elements // (self.ranks * qps))
        self.chunk = self.slice * qps
        self._steps = 2 * (self.ranks - 1)
        self._context = Context(name=DEVICE)
        self._pd = PD(self._context)
        self._channel = CompChannel(self._context)
        depth = _PARITIES * self._steps * qps
        self._cq = CQ(self._context, 4 * depth, None, self._channel, 0)
        self._cq.req_notify()
        self.data = Buffer(self._pd, self.ranks * self.chunk, enums.IBV_ACCESS_LOCAL_WRITE)
        access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
        self._inbox = Buffer(self._pd, _PARITIES * self._steps * self.chunk, access)
        capacity = QPCap(max_send_wr=depth, max_recv_wr=2 * depth, max_send_sge=1, max_recv_sge=1)
        self._out, self._in = ([self._new_qp(capacity) for _ in range(qps)] for _ in range(2))
        # The data of a WRITE goes where the writer says; a receive request takes its immediate only, but pyverbs wants
        # a place in it all the same.
        place = SGE(self._inbox.address(0), _ELEMENT, self._inbox.region.lkey)
        self._immediate = RecvWR(num_sge=1, sg=[place])
        self._requests: list[list[SendWR]] = []
        self._arrived: set[int] = set()
        self._unsent = 0
        self._next: Peer

    def _new_qp(self, capacity: QPCap) -> QP:
        return QP(self._pd, QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=capacity))

    # -- connecting ------------------------------------------------------------------------------------------------

    def connect(self, deadline: float) -> dict[str, Any]:
        """Exchange addresses with both neighbours and bring the QPs up; returns who is connected to whom."""
        gid = str(self._context.query_gid(PORT, GID_INDEX))
        mine = [
            Peer(
                qps=[qp.qp_num for qp in qps],
                psns=[(qp.qp_num * 0x9E3779B1 + time.time_ns()) & 0xFFFFFF for qp in qps],
                gid=gid,
                address=self._inbox.address(0),
                rkey=self._inbox.region.rkey,
            )
            for qps in (self._in, self._out)
        ]
        listener = socket.create_server(("", _TCP_PORT + self.rank), backlog=1)
        following = (self.rank + 1) % self.ranks
        to_next = _dial(self._addresses[following], _TCP_PORT + following, deadline)
        listener.settimeout(max(deadline - time.monotonic(), 1.0))
        from_previous, _ = listener.accept()
        listener.close()
        for connection in (to_next, from_previous):
            connection.settimeout(max(deadline - time.monotonic(), 1.0))
        incoming, outgoing = mine
        _send(to_next, asdict(outgoing))
        previous = Peer(**_receive(from_previous))
        self._raise(self._in, incoming, previous)
        for _ in range(_PARITIES * self._steps):
            for qp in self._in:
                qp.post_recv(self._immediate)
        # Only now: who knows our QPs may write at once.
        _send(from_previous, asdict(incoming))
        self._next = Peer(**_receive(to_next))
        self._raise(self._out, outgoing, self._next)
        # Made once: pyverbs never gives the memory of a request back by itself.
        self._requests = [self._requests_of(slot) for slot in range(_PARITIES * self._steps)]
        to_next.close()
        from_previous.close()
        return {
            "out": [list(pair) for pair in zip(outgoing.qps, self._next.qps, strict=True)],
            "in": [list(pair) for pair in zip(incoming.qps, previous.qps, strict=True)],
        }

    def _raise(self, qps: list[QP], mine: Peer, other: Peer) -> None:
        for index, qp in enumerate(qps):
            route = GlobalRoute(dgid=GID(other.gid), sgid_index=GID_INDEX, hop_limit=64)
            attributes = QPAttr(port_num=PORT)
            attributes.dest_qp_num = other.qps[index]
            attributes.ah_attr = AHAttr(is_global=1, port_num=PORT, gr=route)
            attributes.path_mtu = self._context.query_port(PORT).active_mtu
            attributes.rq_psn, attributes.sq_psn = other.psns[index], mine.psns[index]
            attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
            attributes.qp_access_flags = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
            attributes.min_rnr_timer, attributes.timeout = 12, _TIMEOUT
            attributes.retry_cnt = attributes.rnr_retry = 7
            qp.to_rts(attributes)

    # -- a round ---------------------------------------------------------------------------------------------------

    def allreduce(self, number: int) -> None:
        """Replace the data of every rank by the sum of all ranks' data; `number` counts rounds from 0."""
        first = (number % _PARITIES) * self._steps
        for step in range(self._steps):
            self._write(first + step)
            self._wait(first + step)
            # What comes is what the predecessor sends in this very step.
            chunk = ring_chunk(self.rank - 1, step, self.ranks) * self.chunk
            begin = (first + step) * self.chunk
            arrived = self._inbox.values[begin : begin + self.chunk]
            mine = self.data.values[chunk : chunk + self.chunk]
            # The slices of a chunk are sent in the next step: until then nobody reads them.
            if step < self.ranks - 1:
                np.add(mine, arrived, out=mine)
            else:
                mine[:] = arrived
        while self._unsent:
            self._poll()

    def _requests_of(self, slot: int) -> list[SendWR]:
        """What is written in a step of a round: one request a QP."""
        chunk = ring_chunk(self.rank, slot % self._steps, self.ranks)
        requests = []
        for index in range(self.qps):
            offset = index * self.slice
            source = self.data.address(chunk * self.chunk + offset)
            request = SendWR(
                opcode=enums.IBV_WR_RDMA_WRITE_WITH_IMM,
                num_sge=1,
                imm_data=slot * self.qps + index,
                sg=[SGE(source, self.slice * _ELEMENT, self.data.region.lkey)],
                send_flags=enums.IBV_SEND_SIGNALED,
            )
            target = self._next.address + (slot * self.chunk + offset) * _ELEMENT
            request.set_wr_rdma(self._next.rkey, target)
            requests.append(request)
        return requests

    def _write(self, slot: int) -> None:
        for qp, request in zip(self._out, self._requests[slot], strict=True):
            qp.post_send(request)
            self._unsent += 1

    def _wait(self, slot: int) -> None:
        wanted = {slot * self.qps + index for index in range(self.qps)}
        while not wanted <= self._arrived:
            self._poll()
        self._arrived -= wanted

    def _poll(self) -> None:
        count, completions = self._cq.poll(64)
        if not count:
            # Ask to be woken, then look once more: what came in between wakes nobody.
            self._cq.req_notify()
            count, completions = self._cq.poll(64)
        if not count:
            self._channel.get_cq_event(self._cq)
            self._cq.ack_events(1)
            return
        by_number = {qp.qp_num: qp for qp in self._in}
        for completion in completions:
            if completion.status != enums.IBV_WC_SUCCESS:
                raise ConnectionError(
                    f"QP {completion.qp_num:#x}: completion status {completion.status} (see ibv_wc_status)"
                )
            if completion.opcode == enums.IBV_WC_RECV_RDMA_WITH_IMM:
                self._arrived.add(completion.imm_data)
                by_number[completion.qp_num].post_recv(self._immediate)
            else:
                self._unsent -= 1


def _dial(address: str, port: int, deadline: float) -> socket.socket:
    while True:
        connection = socket.socket()
        connection.settimeout(5)
        if connection.connect_ex((address, port)) == 0:
            return connection
        connection.close()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{address}:{port} does not answer")
        time.sleep(0.2)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    connection.sendall(struct.pack("!I", len(data)) + data)


def _receive(connection: socket.socket) -> dict[str, Any]:
    (length,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
    message: dict[str, Any] = json.loads(connection.recv(length, socket.MSG_WAITALL))
    return message


def _say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    """Take part in the ring until its end; exit status 1 where a sum was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", nargs="+", required=True, metavar="ADDRESS")
    parser.add_argument("--qps", type=int, default=4, help="QPs to the next rank")
    parser.add_argument("--elements", type=int, default=65536, help="numbers to sum")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.0, help="go on for so long; rank 0's clock counts")
    options = parser.parse_args()
    ring = Ring(options.rank, options.ranks, options.qps, options.elements + 1)
    _say(connected=ring.connect(time.monotonic() + 60))
    begin, rounds, wrong = time.monotonic(), 0, 0
    # Small whole numbers: their sums are exact in single precision, whatever the order.
    pattern = np.arange(options.elements, dtype=np.float32) % 1021
    ranks = ring.ranks
    while True:
        ring.data.values[:] = 0
        ring.data.values[: options.elements] = (pattern + rounds % 97) * (options.rank + 1)
        # Whether there is another round is summed up as well: so all ranks agree on it.
        go_on = rounds + 1 < options.rounds or time.monotonic() - begin < options.seconds
        ring.data.values[options.elements] = float(go_on and options.rank == 0)
        ring.allreduce(rounds)
        expected = (pattern + rounds % 97) * (ranks * (ranks + 1) // 2)
        wrong += not np.array_equal(ring.data.values[: options.elements], expected)
        rounds += 1
        if not ring.data.values[options.elements]:
            break
    _say(
        rounds=rounds,
        bytes=options.elements * _ELEMENT,
        seconds=round(time.monotonic() - begin, 3),
        wrong=wrong,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
