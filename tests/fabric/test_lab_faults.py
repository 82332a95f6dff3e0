"""Each fault does what its name says, judged by the kernel and FRR, and is undone whatever ends it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qpd.lab import wan
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.faults import (
    KINDS,
    Cut,
    Delay,
    Hang,
    Kill,
    Loss,
    Partition,
    Reboot,
    Schedule,
    Step,
    Stop,
    Timed,
)
from qpd.lab.inject import Injector, play, play_async
from qpd.lab.topology import Endpoint

CONVERGE = 90.0


@pytest.fixture
def injector(two_dc: Fabric) -> Iterator[Injector]:
    with Injector(two_dc) as injector:
        yield injector
    two_dc.wait_converged(CONVERGE)


def until(question: Callable[[], bool], what: str, deadline: float = 60.0) -> None:
    limit = time.monotonic() + deadline
    while not question():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


def up(fabric: Fabric, end: Endpoint) -> bool:
    shown = fabric.exec(end.node, "ip", "-j", "link", "show", "dev", end.interface).stdout
    return "UP" in json.loads(shown)[0]["flags"]


def lossy(fabric: Fabric, end: Endpoint) -> bool:
    shown = fabric.exec(end.node, "ip", "-j", "link", "show", "dev", end.interface).stdout
    return "xdp" in json.loads(shown)[0]


def state(fabric: Fabric, node: str, daemon: str) -> str:
    """A daemon's state as the kernel has it: S, T (stopped), or nothing."""
    identity = fabric.records.find(f"{node}.{daemon}")
    if identity is None:
        return ""
    return Path(f"/proc/{identity.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_cut_is_at_the_end_that_was_named(two_dc: Fabric, injector: Injector) -> None:
    link = two_dc.link("dc1-leaf1", "dc1-spine1")
    fault = Cut("dc1-leaf1 dc1-spine1", side="dc1-spine1")
    injector.begin(fault)
    assert [up(two_dc, end) for end in link.ends] == [True, False]
    injector.end(fault)
    assert [up(two_dc, end) for end in link.ends] == [True, True]


@pytest.mark.parametrize(("towards", "deaf"), [(None, 2), ("dc1-leaf1", 1)])
def test_loss_and_cut_of_one_link_are_undone_apart(
    two_dc: Fabric, injector: Injector, towards: str | None, deaf: int
) -> None:
    link = two_dc.link("dc1-leaf1", "dc1-spine1")
    loss, cut = Loss(str(link), towards, 5.0), Cut(str(link))
    injector.begin(loss)
    injector.begin(cut)
    assert sum(lossy(two_dc, end) for end in link.ends) == deaf
    injector.end(cut)
    assert sum(lossy(two_dc, end) for end in link.ends) == deaf, "the cut's end took the loss away"
    injector.end(loss)
    assert not any(lossy(two_dc, end) for end in link.ends)
    assert all(up(two_dc, end) for end in link.ends)


def test_a_partition_takes_the_sites_apart_and_nothing_else(two_dc: Fabric, injector: Injector) -> None:
    local, remote = two_dc.vtep("dc1-leaf2"), two_dc.vtep("dc2-leaf1")
    fault = Partition("dc1")
    injector.begin(fault)
    until(lambda: remote not in two_dc.next_hops("dc1-leaf1"), "the other site is still in the FIB")
    assert len(two_dc.next_hops("dc1-leaf1")[local]) == 2
    injector.end(fault)
    until(
        lambda: len(two_dc.next_hops("dc1-leaf1").get(remote, [])) == 2, "the other site does not come back"
    )


@pytest.mark.parametrize("kind", [Stop, Kill, Hang])
def test_a_daemon_of_frr_goes_and_comes_back(
    two_dc: Fabric, injector: Injector, kind: type[Stop | Kill | Hang]
) -> None:
    fault = kind("dc1-leaf1", "bgpd")
    before = two_dc.records.find("dc1-leaf1.bgpd")
    injector.begin(fault)
    wanted = "T" if kind is Hang else ""
    until(lambda: state(two_dc, "dc1-leaf1", "bgpd") == wanted, f"bgpd is not {wanted or 'gone'}")
    injector.end(fault)
    until(lambda: state(two_dc, "dc1-leaf1", "bgpd") not in {"", "T"}, "bgpd does not go on")
    assert (two_dc.records.find("dc1-leaf1.bgpd") == before) == (kind is Hang)
    # `injector` waits until the fabric has converged: the new daemon has its configuration.


def test_a_rebooted_spine_is_gone_and_back(two_dc: Fabric, injector: Injector) -> None:
    remote = two_dc.vtep("dc2-leaf1")
    fault = Reboot("dc1-spine1")
    injector.begin(fault)
    assert [state(two_dc, "dc1-spine1", name) for name in ("zebra", "bgpd", "bfdd")] == ["", "", ""]
    until(lambda: len(two_dc.next_hops("dc1-leaf1").get(remote, [])) == 1, "a dead spine is still used")
    injector.end(fault)
    until(lambda: len(two_dc.next_hops("dc1-leaf1").get(remote, [])) == 2, "the spine does not come back")


def test_qpd_killed_and_started_again_steers(two_dc: Fabric, injector: Injector) -> None:
    two_dc.start_qpd("dc1-leaf1", {"placement": "hash"}, deadline=CONVERGE)
    fault = Kill("dc1-leaf1")
    injector.begin(fault)
    assert not two_dc.sidecar("dc1-leaf1").running
    injector.end(fault)
    status = two_dc.sidecar("dc1-leaf1").status()
    assert status is not None
    assert (status["state"], status["placement"]) == ("steering", "hash"), "it has another configuration"


def test_delay_is_refused_in_one_line_where_the_kernel_has_no_netem(
    two_dc: Fabric, injector: Injector
) -> None:
    if wan.missing() is None:
        pytest.skip("this kernel has netem")
    with pytest.raises(LabError, match="no netem, so no delay") as caught:
        injector.begin(Delay("dc1-spine1:eth4", 20))
    assert "\n" not in str(caught.value)


def test_a_daemon_that_does_not_run_is_not_killed(two_dc: Fabric, injector: Injector) -> None:
    with pytest.raises(LabError, match="kill dc1-leaf2 qpd: it does not run"):
        injector.begin(Kill("dc1-leaf2"))
    assert injector.active == ()


def test_a_fault_that_meets_another_is_refused(two_dc: Fabric, injector: Injector) -> None:
    injector.begin(Cut("dc1-leaf1 dc1-spine1"))
    with pytest.raises(LabError, match=r"holds carrier of .* already"):
        injector.begin(Cut("dc1-spine1 dc1-leaf1"))


def test_a_schedule_is_played_in_its_order_and_the_rest_is_undone(two_dc: Fabric) -> None:
    link = two_dc.link("dc1-leaf1", "dc1-spine1")
    loss, cut = Loss(str(link), percent=1), Cut(str(link))
    schedule = Schedule((Timed(0.3, None, cut), Timed(0, 0.1, loss)))
    seen: list[tuple[Step, bool]] = []
    with Injector(two_dc) as injector:
        start = time.monotonic()

        def note(step: Step, began: int, done: int) -> None:
            assert start + step.at <= began / 1e9 <= done / 1e9
            seen.append((step, lossy(two_dc, link.a)))

        play(schedule, injector, on_step=note, start=start)
        assert [step for step, _ in seen] == schedule.steps
        assert [there for _, there in seen] == [True, False, False]
        assert not up(two_dc, link.a)
    assert up(two_dc, link.a)
    two_dc.wait_converged(CONVERGE)


async def test_a_cancelled_schedule_is_undone(two_dc: Fabric) -> None:
    link = two_dc.link("dc1-leaf1", "dc1-spine1")
    begun = threading.Event()
    schedule = Schedule((Timed(0, 1000, Cut(str(link))),))
    with Injector(two_dc) as injector:
        task = asyncio.create_task(play_async(schedule, injector, on_step=lambda *_: begun.set()))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert up(two_dc, link.a)
    two_dc.wait_converged(CONVERGE)


# --- as commands


def qplab(fabric: Fabric, *words: str) -> list[str]:
    return [sys.executable, "-m", "qpd.lab", words[0], *words[1:], "--name", fabric.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_fault_ends_with_its_command(two_dc: Fabric, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM undo it; what SIGKILL leaves, `qplab fault undo` finds."""
    link = two_dc.link("dc1-leaf1", "dc1-spine1")
    command = qplab(two_dc, "fault", "loss", "dc1-leaf1", "dc1-spine1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().endswith(" s  loss dc1-leaf1 dc1-spine1 100\n")
            assert all(lossy(two_dc, end) for end in link.ends)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    if number is signal.SIGKILL:
        assert all(lossy(two_dc, end) for end in link.ends)
        undone = subprocess.run(
            qplab(two_dc, "fault", "undo"), check=True, capture_output=True, text=True, timeout=60
        )
        assert undone.stdout.startswith("loss ")
    else:
        assert process.returncode == 130, errors
    assert not any(lossy(two_dc, end) for end in link.ends)
    two_dc.wait_converged(CONVERGE)


def test_a_schedule_of_a_file_is_played(two_dc: Fabric, tmp_path: Any) -> None:
    file = tmp_path / "faults.yaml"
    file.write_text("faults:\n  - {at: 0, for: 0.2, cut: dc1-leaf1 dc1-spine1}\n")
    done = subprocess.run(
        qplab(two_dc, "fault", "play", str(file)), check=True, capture_output=True, text=True, timeout=60
    )
    told = [line.split(None, 1)[1] for line in done.stdout.splitlines()]
    assert told == ["s  cut dc1-leaf1 dc1-spine1", "s  cut dc1-leaf1 dc1-spine1: undone"]
    assert up(two_dc, two_dc.link("dc1-leaf1", "dc1-spine1").a)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("faults:\n  - {at: 0, cut: dc1-leaf9}\n", "faults[0]: "),
        ("faults:\n  - {at: 0, burn: dc1-leaf9}\n", "'burn' is no fault"),
        ("fault: []\n", "expected `faults`"),
    ],
)
def test_a_wrong_file_is_one_line_and_nothing_is_done(
    two_dc: Fabric, tmp_path: Any, text: str, says: str
) -> None:
    file = tmp_path / "faults.yaml"
    file.write_text(text)
    done = subprocess.run(
        qplab(two_dc, "fault", "play", str(file)), check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_every_fault_has_a_command() -> None:
    help_ = subprocess.run(
        [sys.executable, "-m", "qpd.lab", "fault", "--help"],
        check=True,
        capture_output=True,
        text=True,
        env=dict(os.environ, COLUMNS="200"),
    ).stdout
    assert [name for name in (*KINDS, "play", "undo") if f" {name} " not in help_] == []
