"""What follows from an experiment's seed: each repetition's own seed, queue pair numbers, times of faults. Pure.

All conditions of a repetition have the same seed: they differ in nothing but what is compared.
"""

from __future__ import annotations

import random
import zlib

from qpd.lab.faults import Schedule, Timed

_FIRST_QP, _LAST_QP = 0x100, 0xFFFFFF
_FIRST_PORT, _PORTS = 0xC000, 0x4000
BINS = 4


def trial_seed(seed: int, repetition: int) -> int:
    """The seed of one repetition, 32 bits."""
    return zlib.crc32(f"{seed}/{repetition}".encode())


def qp_numbers(seed: int, count: int) -> list[int]:
    """Different queue pair numbers, such as adapters hand them out: anywhere in their 24 bits."""
    return random.Random(f"{seed}/qps").sample(range(_FIRST_QP, _LAST_QP), count)


def bin_ports(seed: int) -> list[int]:
    """One source port of each of the bins that divide the ports of RoCEv2 (49152 to 65535) equally."""
    draw = random.Random(f"{seed}/bins")
    width = _PORTS // BINS
    return [_FIRST_PORT + number * width + draw.randrange(width) for number in range(BINS)]


def shifted(schedule: Schedule, seed: int, jitter: float) -> Schedule:
    """The schedule begun up to `jitter` seconds later."""
    late = round(random.Random(f"{seed}/faults").uniform(0.0, jitter), 3)
    return Schedule(
        tuple(Timed(round(one.at + late, 3), one.duration, one.fault) for one in schedule.entries)
    )
