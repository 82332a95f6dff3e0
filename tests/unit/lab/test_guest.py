"""The two sides of `qplab --guest`, without a virtual machine between them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpd.lab import guest
from qpd.lab.errors import LabError
from qpd.lab.guest import Guest

# in-guest as this machine itself: what stands after `--` runs, without the modules of a kernel.
STAND_IN = """\
import os, sys
command = sys.argv[sys.argv.index("--") + 1 :]
script = command[-1].split(";", 1)[1]
os.execvp("sh", ["sh", "-c", script.replace("qpd.lab.guest_agent", os.environ["QPDT_AGENT"])])
"""
# An agent whose commands are small programs, and whose labs are those of its own file.
AGENT = """\
import os, sys, time
from pathlib import Path
from qpd.lab import guest_agent, state
state.labs = lambda: Path("labs").read_text().split() if Path("labs").exists() else []
def command():
    words = sys.argv[1:]
    if words[0] == "say":
        print(os.getcwd(), os.environ["COLUMNS"], "grün", flush=True)
        print("also this", file=sys.stderr)
        sys.exit(int(words[1]))
    if words[0] == "up":
        Path("labs").write_text("mine")
    if words[0] == "down":
        Path("labs").unlink()
    if words[0] == "wait":
        print("waiting", os.getpid(), flush=True)
        time.sleep(60)
    if words[0] == "break":
        raise RuntimeError("broken")
guest_agent.Agent(Path(sys.argv[1]), command).serve()
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    script, work = tmp_path / "scripts" / "in-guest", tmp_path / "work"
    script.parent.mkdir()
    script.write_text(STAND_IN)
    (tmp_path / "an_agent.py").write_text(AGENT)
    work.mkdir()
    monkeypatch.setattr(guest, "IN_GUEST", script)
    monkeypatch.setenv("QPDT_AGENT", "an_agent")
    monkeypatch.chdir(work)
    made = Guest(tmp_path / "guest", "1G", 1)
    try:
        yield made
    finally:
        made.end()
        assert not made.runs()
        assert sorted(entry.name for entry in (tmp_path / "guest").iterdir()) == ["lock"]


def run(machine: Guest, *words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    machine.start()
    return machine.run(words, out, err), out.getvalue(), err.getvalue()


def test_output_and_status_come_through_and_a_guest_without_labs_ends(
    machine: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "123")
    assert run(machine, "say", "3") == (3, f"{tmp_path / 'work'} 123 grün\n", "also this\n")
    assert not machine.runs()


def test_a_guest_lives_as_long_as_a_lab_in_it(machine: Guest) -> None:
    assert run(machine, "up")[0] == 0
    assert machine.runs()
    assert run(machine, "say", "0")[0] == 0
    assert machine.runs()
    assert run(machine, "down")[0] == 0
    assert not machine.runs()


def test_what_breaks_in_the_guest_is_told(machine: Guest) -> None:
    status, _, errors = run(machine, "break")
    assert status == 1
    assert "RuntimeError: broken" in errors


class Watched(io.StringIO):
    """Tells when something has been said."""

    def __init__(self) -> None:
        super().__init__()
        self.said = threading.Event()

    def write(self, text: str) -> int:
        if text:
            self.said.set()
        return super().write(text)


def test_an_interrupt_goes_to_the_command(machine: Guest) -> None:
    run(machine, "up")
    out, err = Watched(), io.StringIO()

    def interrupt() -> None:
        out.said.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert machine.run(["wait"], out, err) == 1
    assert "KeyboardInterrupt" in err.getvalue()
    assert machine.runs(), "the guest outlives an interrupted command while it has a lab"
    assert run(machine, "down")[0] == 0


def test_a_guest_that_dies_is_one_line(machine: Guest) -> None:
    run(machine, "up")
    identity = machine._records.find("guest")
    assert identity is not None
    out = Watched()

    def kill() -> None:
        out.said.wait(60)
        identity.send(signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(LabError, match="the guest has ended: ") as caught:
        machine.run(["wait"], out, io.StringIO())
    assert "\n" not in str(caught.value)
    # The stand-in's command outlives it, which a virtual machine's would not.
    (waiting,) = [int(word) for word in out.getvalue().split() if word.isdigit()]
    os.kill(waiting, signal.SIGKILL)


def test_a_guest_that_does_not_boot_is_one_line_with_its_words(
    machine: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "scripts" / "in-guest").write_text("import sys; sys.exit('in-guest: no kernel')")
    with pytest.raises(LabError, match="the guest does not come up: in-guest: no kernel"):
        machine.start()
    monkeypatch.setattr(guest, "IN_GUEST", tmp_path / "none")
    with pytest.raises(LabError, match="is not there: guests are started from qpd's repository"):
        machine.start()


def test_without_a_guest_down_has_nothing_to_do(tmp_path: Path) -> None:
    environment = dict(os.environ, QPLAB_GUEST_DIR=str(tmp_path / "none"))
    if os.geteuid() != 0:
        pytest.skip("needs root: qplab refuses others")
    done = subprocess.run(
        [sys.executable, "-m", "qpd.lab", "--guest", "down", "--all"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "no guest is running, so no lab is up in one\n"


def test_experiments_have_virtual_time_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QPLAB_GUEST_TIME", "QPDT_GUEST_KVM"):
        monkeypatch.delenv(name, raising=False)

    def processors(*, measures: bool) -> str:
        return guest.of_machine(measures=measures).processors

    assert processors(measures=True) == "--virtual-time"
    assert processors(measures=False).startswith("--cpus=")
    monkeypatch.setenv("QPDT_GUEST_KVM", "1")
    assert processors(measures=True).startswith("--cpus=")
    monkeypatch.setenv("QPLAB_GUEST_TIME", "virtual")
    assert processors(measures=False) == "--virtual-time"
    monkeypatch.setenv("QPLAB_GUEST_TIME", "fast")
    with pytest.raises(LabError, match="QPLAB_GUEST_TIME is 'fast'; it can be 'host' or 'virtual'"):
        guest.of_machine()
