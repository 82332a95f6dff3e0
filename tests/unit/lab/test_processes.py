"""Processes are known by pid and start time; nothing else is ever ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qpd.lab import processes
from qpd.lab.processes import Identity, Records

# Ignores SIGTERM, and says when it does so.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('deaf', flush=True)
time.sleep(60)
"""


def wait_for_text(file: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (file.read_text() if file.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} does not appear in {file}"
        time.sleep(0.01)


def test_a_recycled_pid_is_not_touched() -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            identity = Identity.of(bystander.pid)
            assert identity is not None
            stale = Identity(bystander.pid, identity.started - 1)
            assert not stale.alive
            assert not stale.send(signal.SIGKILL)
            processes.end([stale], grace=0.1)
            assert bystander.poll() is None
            assert identity.alive
        finally:
            bystander.kill()
    assert not identity.alive


def test_ended_and_zombie_processes_are_not_alive() -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Identity.of(child.pid) is None, "a zombie has ended"


def test_a_record_finds_and_ends_its_process(tmp_path: Path) -> None:
    records = Records(tmp_path / "processes")
    identity = records.start("one", ["sleep", "60"], tmp_path / "log")
    assert Records(tmp_path / "processes").find("one") == identity, "another process reads the same record"
    records.end("one")
    assert not identity.alive
    assert records.names() == []


def test_what_does_not_hear_sigterm_is_killed(tmp_path: Path) -> None:
    records = Records(tmp_path / "processes")
    identity = records.start("deaf", [sys.executable, "-c", STUBBORN], tmp_path / "log")
    wait_for_text(tmp_path / "log", "deaf")
    records.end(grace=0.1)
    assert not identity.alive


def test_a_stopped_process_is_ended(tmp_path: Path) -> None:
    records = Records(tmp_path / "processes")
    identity = records.start("stopped", ["sleep", "60"], tmp_path / "log")
    assert identity.send(signal.SIGSTOP)
    records.end(grace=10)
    assert not identity.alive


def test_a_record_without_pid_is_no_process(tmp_path: Path) -> None:
    """What a crash between record and start leaves."""
    records = Records(tmp_path)
    (tmp_path / "x.json").write_text('{"pid": null, "command": ["zebra"]}')
    assert records.find("x") is None
    records.end()
    assert records.names() == []


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Records(tmp_path).start("x", ["/nonexistent/zebra"], tmp_path / "log")
