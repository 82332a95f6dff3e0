"""The distribution's own kernel, in a virtual machine: what it has, and that the classifier works on it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import IN_GUEST, REPOSITORY, RunInGuest

DEADLINE_PASSED = 124
# Soft-RoCE, delay and loss, VRFs of L3VNIs, loopbacks of a node.
MODULES = ("rdma_rxe", "sch_netem", "vrf", "dummy")


def processes_with(word: str) -> list[str]:
    """Command lines of this machine's processes that hold `word`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command:
            found.append(command)
    return found


def test_the_guest_runs_the_kernel_that_was_fetched(guest_kernel: Path, in_guest: RunInGuest) -> None:
    answer = in_guest("uname", "-r")
    assert (answer.returncode, answer.stdout.strip()) == (0, guest_kernel.name.removeprefix("vmlinuz-"))


def test_exit_status_output_and_errors_come_through(in_guest: RunInGuest) -> None:
    answer = in_guest("sh", "-c", "echo to stdout; echo 'to  stderr' >&2; exit 42")
    assert (answer.returncode, answer.stdout) == (42, "to stdout\n")
    assert "to  stderr\n" in answer.stderr


def test_the_guest_writes_nothing_on_this_machine(in_guest: RunInGuest) -> None:
    mark = f"qpdt-{os.getpid()}-guest"
    places = [REPOSITORY / mark, Path("/tmp") / mark, Path("/etc") / mark]
    answer = in_guest(
        "sh", "-c", " && ".join(f"echo x > {place}" for place in places) + f" && cat {places[0]}"
    )
    assert (answer.returncode, answer.stdout) == (0, "x\n"), answer.stderr
    assert not [place for place in places if place.exists()]


def test_a_guest_past_its_deadline_is_ended_and_leaves_nothing(guest_kernel: Path, tmp_path: Path) -> None:
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    answer = subprocess.run(
        [str(IN_GUEST), "--deadline=2", "--", "sleep", "1000"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert answer.returncode == DEADLINE_PASSED
    assert "in-guest: the deadline of 2 s passed" in answer.stderr
    assert list(tmp_path.iterdir()) == []
    assert processes_with(str(tmp_path)) == []


@pytest.fixture(scope="module")
def modules(in_guest: RunInGuest) -> str:
    """What modprobe says and /proc/modules of a guest that was asked for all of MODULES, each apart."""
    answer = in_guest(
        "sh", "-c", f"for m in {' '.join(MODULES)}; do modprobe $m 2>&1; done; cat /proc/modules"
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize("module", MODULES)
def test_the_guest_has_what_this_project_emulates_with(modules: str, module: str) -> None:
    assert re.search(rf"^{module} .* Live ", modules, re.MULTILINE), modules


# Attaching and steering: what differs between kernels. Not all of tests/ebpf, and not the test that fills a map:
# without hardware virtualization these take more than half an hour.
CLASSIFIER_TESTS = ("tests/ebpf/test_attach.py", "tests/ebpf/test_steer.py")
CLASSIFIER_CHOICE = "clsact or (test_steer and not full_map)"


@pytest.mark.slow
@pytest.mark.timeout(1020)
def test_the_classifier_passes_its_tests_on_this_kernel(in_guest: RunInGuest) -> None:
    """It loads, attaches by clsact and steers there; a test that needs TCX is skipped where the guest has none."""
    answer = in_guest(
        ".venv/bin/python", "-m", "pytest", *CLASSIFIER_TESTS, "-k", CLASSIFIER_CHOICE,
        "-v", "-p", "no:cacheprovider", "--timeout=400",
        deadline=900,
    )  # fmt: skip
    output = f"in the guest:\n{answer.stdout[-20000:]}\n{answer.stderr[-2000:]}"
    assert answer.returncode == 0, output
    assert re.search(r"test_attach\.py::\S+clsact\S* PASSED", answer.stdout), output
    assert re.search(r"test_steer\.py::\S+.* PASSED", answer.stdout), output
