"""An MPI AllReduce over UCX on two Soft-RoCE guests: its RC queue pairs pass the fabric, and qpd steers them."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from qpd.lab import frr, rxe_mpi
from qpd.lab.fabric import Fabric
from qpd.lab.rxe import Guest

pytestmark = [pytest.mark.frr, pytest.mark.long, pytest.mark.timeout(900)]

LAB = Path(__file__).parents[2] / "deploy/containerlab/four-spine"
LEAVES = {"host1": "leaf1", "host3": "leaf3"}
PATIENCE = 180.0


@pytest.mark.usefixtures("guest_kernel")
def test_every_sum_is_right_and_qpd_knows_the_queue_pairs() -> None:
    if problem := frr.missing() or rxe_mpi.missing(rxe_mpi.ALLREDUCE):
        pytest.skip(problem)
    fabric = Fabric.load(LAB, f"qpdt-{os.getpid()}-mpi")
    with ExitStack() as clean:
        clean.callback(fabric.down)
        fabric.up(qpd=False, deadline=PATIENCE)
        guests = [Guest(fabric, host, memory="768M") for host in LEAVES]
        for guest in guests:
            clean.callback(guest.close)
            guest.start()
        for leaf in LEAVES.values():
            fabric.start_qpd(leaf, {"idle_after": 3600}, wait=False)
        for leaf in LEAVES.values():
            fabric.wait_qpd(leaf, PATIENCE)
        for guest in guests:
            guest.wait()
        run = rxe_mpi.Mpi(guests, rxe_mpi.ALLREDUCE)
        assert run.wait(300) == 0, run.stdout
        sums = [json.loads(line) for line in run.stdout.splitlines()]
        assert [(row["ranks"], row["wrong"]) for row in sums] == [(2, 0)] * 3
        for leaf, far in zip(LEAVES.values(), reversed(guests), strict=True):
            rows = fabric.sidecar(leaf).get("/v1/qps", timeout=30)
            # Half of each vector goes each way in each round.
            moved = sum(row["bytes"] for row in rows if row["dst"] == far.address and row["dest_qp"] > 1)
            assert moved > sum(row["bytes"] * row["rounds"] for row in sums) / 2
