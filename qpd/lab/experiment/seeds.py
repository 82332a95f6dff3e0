"""What follows from an experiment's seed: each repetition's own seed, times of faults. Pure.

All conditions of a repetition have the same seed: they differ in nothing but what is compared.
"""

from __future__ import annotations

import random
import zlib

from qpd.lab.faults import Schedule, Timed


def trial_seed(seed: int, repetition: int) -> int:
    """The seed of one repetition, 32 bits."""
    return zlib.crc32(f"{seed}/{repetition}".encode())


def shifted(schedule: Schedule, seed: int, jitter: float) -> Schedule:
    """The schedule begun up to `jitter` seconds later."""
    late = round(random.Random(f"{seed}/faults").uniform(0.0, jitter), 3)
    return Schedule(
        tuple(Timed(round(one.at + late, 3), one.duration, one.fault) for one in schedule.entries)
    )
