"""MPI_Allreduce of vectors of several lengths, each sum checked: what `qplab endpoint mpi` runs by default.

    python3 rxe_mpi_allreduce.py [--rounds N]

Rank 0 says one line of JSON a length: {"ranks", "bytes", "rounds", "seconds", "wrong"}; a wrong sum is exit status 1.
Only mpi4py and numpy of the distribution; no other module of qpd.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
from mpi4py import MPI

LENGTHS = (1, 1024, 65536)
"""Numbers of eight bytes: UCX sends the first two lengths by SEND, and of the last it makes RDMA operations."""


def main() -> int:
    """Sum vectors; 1 where a sum was wrong on any rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    world = MPI.COMM_WORLD
    wrong = 0
    for length in LENGTHS:
        mine = np.arange(length, dtype=np.int64) * (world.rank + 1)
        expected = np.arange(length, dtype=np.int64) * sum(range(1, world.size + 1))
        total = np.empty_like(mine)
        bad = 0
        begin = time.monotonic()
        for _ in range(rounds):
            total.fill(-1)
            world.Allreduce(mine, total, op=MPI.SUM)
            bad += not np.array_equal(total, expected)
        seconds = time.monotonic() - begin
        bad = world.allreduce(bad, op=MPI.SUM)
        wrong += bad
        if world.rank == 0:
            row = {"ranks": world.size, "bytes": mine.nbytes, "rounds": rounds}
            print(json.dumps({**row, "seconds": round(seconds, 3), "wrong": bad}), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
