"""Whenever qplab is interrupted or killed, `qplab down --all` leaves nothing of the lab on this machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qpd.lab import frr, labfolder

from .conftest import lab_name
from .test_fabric_base import traces

PAIR = "{name: pair, spines: 1, leaves: 2, hosts: 1, sites: {dc1: }}"


class Lab:
    """A small lab whose records are apart from all other labs of this machine."""

    def __init__(self, folder: Path) -> None:
        self.name = lab_name("pair")
        self._state = folder / "state"
        (folder / "lab.yaml").write_text(PAIR)
        labfolder.make(folder / "lab.yaml")
        self._folder = folder
        self._environment = dict(os.environ, QPLAB_STATE_DIR=str(self._state))

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "qpd.lab", *words]
        return subprocess.Popen(
            command, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def up(self) -> subprocess.Popen[str]:
        return self.start("up", str(self._folder), "--no-qpd", "--name", self.name)

    def down(self) -> subprocess.Popen[str]:
        return self.start("down", "--all")

    def left(self) -> list[str]:
        there = [str(entry) for entry in self._state.glob("*")] if self._state.exists() else []
        return traces(self.name) + there


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    reason = "needs root: network namespaces; run as root" if os.geteuid() != 0 else frr.missing()
    if reason:
        pytest.skip(reason)
    return Lab(tmp_path)


def ended(process: subprocess.Popen[str], patience: float = 120.0) -> str:
    try:
        return process.communicate(timeout=patience)[0]
    finally:
        process.kill()


@pytest.mark.timeout(600)
def test_nothing_is_left_wherever_it_was_killed(lab: Lab) -> None:
    begin = time.monotonic()
    said = ended(lab.up())
    took = time.monotonic() - begin
    assert f"lab {lab.name} is up" in said
    assert lab.left()
    try:
        assert f"lab {lab.name} is removed" in ended(lab.down())
        assert lab.left() == []
        seed = random.randrange(1 << 32)
        chance = random.Random(seed)
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            moment = chance.uniform(0, took)
            process = lab.up()
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
            ended(process)
            # The first `down` is killed as well; the second one has to finish the work.
            first = lab.down()
            try:
                first.wait(chance.uniform(0, took / 4))
            except subprocess.TimeoutExpired:
                first.kill()
            ended(first)
            ended(lab.down())
            assert lab.left() == [], f"seed {seed}: {number.name} after {moment:.2f} of {took:.2f} s"
    finally:
        ended(lab.down())


def test_down_goes_on_through_an_interrupt(lab: Lab) -> None:
    """Ctrl-C while a lab is removed: it is removed all the same."""
    assert "is up" in ended(lab.up())
    before = len(lab.left())
    process = lab.down()
    try:
        while len(lab.left()) == before:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "is removed" in ended(process)
        assert process.returncode == 0
        assert lab.left() == []
    finally:
        ended(lab.down())
