"""The shell scripts that a lab's nodes run: in the repository, or in the package where that is installed."""

from __future__ import annotations

from pathlib import Path

from qpd.lab.errors import LabError

NAMES = ("vtep.sh", "wan.sh", "start-frr.sh", "frr-answers.sh", "start-qpd.sh", "destroy.sh")
"""What generated labs use."""

_PLACES = (
    Path(__file__).resolve().parents[2] / "deploy" / "containerlab" / "common",
    Path(__file__).resolve().parents[1] / "_common",
)


def find(name: str) -> Path:
    """Where a script of the labs is on this machine."""
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    raise LabError(f"{name} is in none of {', '.join(map(str, _PLACES))}; install qpd anew")
