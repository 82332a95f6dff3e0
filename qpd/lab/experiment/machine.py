"""What an experiment ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import qpd
from qpd.lab import frr


def facts() -> dict[str, str]:
    """Processor, kernel, versions, load: what a reader of figures wants to know."""
    return {
        "processors": f"{len(os.sched_getaffinity(0))} of {_processor()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "distribution": _distribution(),
        "FRR": _frr(),
        "qpd": qpd.__version__,
        "load before the run": " ".join(f"{one:.1f}" for one in os.getloadavg()),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def _frr() -> str:
    program = frr.BINARIES / "zebra"
    if not program.exists():
        return "none"
    done = subprocess.run([str(program), "--version"], check=False, capture_output=True, text=True)
    words = done.stdout.split()
    return words[2] if len(words) > 2 else "unknown"
