"""What the benchmarks make on this machine carries one prefix, and is removed however they end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from qpd.kernel.pins import every_version
from qpd.lab import namespaces

PREFIX = "qpdb"
BPFFS = Path("/sys/fs/bpf")
_OURS = re.compile(rf"{PREFIX}-(\d+)(-.*)?")


class Scope:
    """Names that belong to this run."""

    def __init__(self, folder: Path) -> None:
        self.prefix = f"{PREFIX}-{os.getpid()}"
        self.folder = folder
        """For files: sources, merged kernel headers, configuration."""

    def namespace(self, name: str) -> str:
        """A network namespace's name."""
        return f"{self.prefix}-{name}"

    def pin_dir(self, name: str) -> Path:
        """A folder in bpffs (no dots there)."""
        return BPFFS / f"{self.prefix}-{name}"


class Terminated(Exception):  # noqa: N818 - a signal, not an error
    """SIGTERM or SIGHUP came: unwinds the stack, so that everything is removed."""


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)


@contextlib.contextmanager
def scope() -> Iterator[Scope]:
    """A run's names; at the end all that bears them is gone. Also removes what a killed run has left."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    for pid in _dead_runs():
        _remove(pid)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-"))
    try:
        yield Scope(folder)
    finally:
        # A second signal must not cut this short.
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _remove(os.getpid())
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _candidates() -> list[Path]:
    found = []
    for folder in (BPFFS, namespaces.DIRECTORY):
        if folder.is_dir():
            found += [entry for entry in folder.iterdir() if _OURS.fullmatch(entry.name)]
    return found


def _dead_runs() -> set[int]:
    pids = {int(match[1]) for entry in _candidates() if (match := _OURS.fullmatch(entry.name))}
    return {pid for pid in pids if not Path(f"/proc/{pid}").exists()}


def _remove(pid: int) -> None:
    for entry in _candidates():
        match = _OURS.fullmatch(entry.name)
        if match is None or int(match[1]) != pid:
            continue
        if entry.parent == BPFFS:
            for pins in every_version(entry):
                pins.remove()
            if entry.is_dir():
                entry.rmdir()
        else:
            namespaces.delete(entry.name)
