"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import qpd


def facts() -> dict[str, Any]:
    """Processor, kernel, versions. Empty where something is not to be had."""
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "memory_mb": _memory_megabytes(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "distribution": _distribution(),
        "jit": _sysctl("net/core/bpf_jit_enable"),
        "jit_harden": _sysctl("net/core/bpf_jit_harden"),
        "spectre_v2": _read(Path("/sys/devices/system/cpu/vulnerabilities/spectre_v2")),
        "python": sys.version.split()[0],
        "bcc": _bcc_version(),
        "qpd": qpd.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _memory_megabytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _bcc_version() -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import bcc; print(bcc.__version__)"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def _commit() -> str:
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _sysctl(key: str) -> str:
    return _read(Path("/proc/sys") / key)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
