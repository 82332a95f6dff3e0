"""One daemon for one set of pins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpd.kernel.lock import LockedError, PinLock

HOLD = """
import sys
from pathlib import Path
from qpd.kernel.lock import PinLock
lock = PinLock("/sys/fs/bpf/qpd", Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_daemon_is_told_who_the_first_is(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        try:
            with pytest.raises(LockedError, match=rf"process {first.pid}\b.*/sys/fs/bpf/qpd") as caught:
                PinLock("/sys/fs/bpf/qpd", tmp_path)
            assert "\n" not in str(caught.value)
        finally:
            first.kill()
    with PinLock("/sys/fs/bpf/qpd", tmp_path) as lock:  # a killed daemon leaves no lock
        assert lock.path.read_text() == f"{os.getpid()}\n"


def test_another_set_of_pins_is_another_lock(tmp_path: Path) -> None:
    with PinLock("/sys/fs/bpf/one", tmp_path), PinLock("/sys/fs/bpf/two", tmp_path):
        pass


def test_released_and_taken_again(tmp_path: Path) -> None:
    lock = PinLock("/sys/fs/bpf/qpd", tmp_path)
    lock.release()
    lock.release()
    with PinLock("/sys/fs/bpf/qpd", tmp_path):
        pass


def test_a_removed_lock_file_is_never_locked_beside_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed between another's open and its lock: that one notices, and takes the new file."""
    first = PinLock("/sys/fs/bpf/qpd", tmp_path)
    real = os.open
    removed: list[str | Path] = []

    def slow_open(path: str | Path, flags: int, mode: int = 0o777) -> int:
        fd = real(path, flags, mode)
        if not removed:
            removed.append(path)
            first.remove()
            first.release()
        return fd

    monkeypatch.setattr(os, "open", slow_open)
    with PinLock("/sys/fs/bpf/qpd", tmp_path) as second:
        assert second.path.exists()
        with pytest.raises(LockedError):
            PinLock("/sys/fs/bpf/qpd", tmp_path)
    assert removed
