"""Waiting for what the kernel and daemons do in their own time."""

from __future__ import annotations

import time
from collections.abc import Callable

from qpd.lab.errors import LabError

_PAUSE = 0.02


def wait_until(true: Callable[[], bool], limit: float, problem: str) -> None:
    """Poll until ``true()``; raise LabError with ``problem`` when time.monotonic() has passed ``limit``."""
    while not true():
        if time.monotonic() > limit:
            raise LabError(problem)
        time.sleep(_PAUSE)
