"""A lab of two data centres in the guest, by `qplab --guest`: the wide-area link is what its profile says.

One spine and one leaf a site: without hardware virtualization a larger lab takes longer to converge than a tier may.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import NO_GUEST, REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAIR = """
name: pair
spines: 1
leaves: 1
bfd: 1000x5
sites: {a: , b: }
wan: [{between: [a, b], profile: paper}]
"""
DELAY_MS, JITTER_MS = 11.0, 1.0
WAN = ("pair-a-spine1", "pair-b-spine1", "10.0.0.1")
"""A wire as the probe wants it: the namespaces of both ends, and the far address."""
WAN_PORT = "eth2"

Qplab = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def qplab(guest_kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qplab]:
    """`qplab --guest WORDS...` with a guest of this test session, in which the lab `pair` is up."""
    folder = tmp_path_factory.mktemp("guest")
    lab = folder / "pair"
    lab.mkdir()
    (lab / "lab.yaml").write_text(PAIR)
    environment = dict(
        os.environ,
        QPLAB_GUEST_DIR=str(folder / "guest"),
        QPLAB_GUEST_TIME="virtual",
        PYTHONPATH=str(REPOSITORY),
        COLUMNS="160",
    )

    def run(*words: str, deadline: float = 600.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qpd.lab", *words]
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=deadline,
        )

    made = run("generate", "--force", str(lab / "lab.yaml"))
    assert made.returncode == 0, made.stderr
    try:
        up = run("--guest", "up", "pair", "--no-qpd", "--deadline", "4000", deadline=840)
        if up.returncode == NO_GUEST or "in-guest: no guest kernel" in up.stderr:
            pytest.skip(up.stderr.strip().splitlines()[-1])
        assert up.returncode == 0, up.stderr
        yield lambda *words: run("--guest", *words)
    finally:
        down = run("--guest", "down", "--all")
        assert down.returncode == 0, down.stderr
        assert not (folder / "results").exists(), "nothing was written there"


def probe(qplab: Qplab, what: str, packets: int) -> dict[str, float]:
    script = str(REPOSITORY / "tests" / "wan_probe.py")
    done = qplab(
        "exec", "a-spine1", "--", "env", f"PYTHONPATH={REPOSITORY}",
        sys.executable, script, what, *WAN, str(packets),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def near(value: float) -> object:
    """Within five percent."""
    return pytest.approx(value, rel=0.05)


def test_the_lab_is_the_same_as_without_a_guest(qplab: Qplab) -> None:
    status = qplab("status")
    assert status.returncode == 0, status.stdout + status.stderr
    assert "converged" in status.stdout
    refused = qplab("exec", "a-spine9", "--", "true")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "qplab: lab pair has no node a-spine9; it has a-spine1, a-leaf1, a-host1,"
    )


def test_the_round_trip_between_the_data_centres_is_the_papers(qplab: Qplab) -> None:
    ping = qplab("exec", "a-host1", "--", "ping", "-c", "100", "-i", "0.05", "172.16.2.1")
    assert ping.returncode == 0, ping.stdout + ping.stderr
    times = [float(time) for time in re.findall(r"time=([\d.]+) ms", ping.stdout)]
    assert statistics.median(times) == near(2 * DELAY_MS)


def test_delay_and_jitter_are_within_five_percent(qplab: Qplab) -> None:
    """Uniform within plus and minus the jitter: four fifths of the packets are within 1.6 times of it."""
    seen = probe(qplab, "delay", 2000)
    assert (seen["median_ms"], seen["spread_ms"]) == (near(DELAY_MS), near(1.6 * JITTER_MS))


@pytest.mark.parametrize(
    ("words", "what", "key", "value"),
    [("loss 20%", "loss", "lost", 0.2), ("rate 5mbit", "rate", "bits_per_second", 5e6)],
)
def test_loss_and_rate_are_within_five_percent(
    qplab: Qplab, words: str, what: str, key: str, value: float
) -> None:
    """40 000 packets: five percent of the loss are five standard deviations."""
    script = str(REPOSITORY / "deploy/containerlab/common/wan.sh")
    shaped = qplab("exec", "a-spine1", "--", "sh", script, WAN_PORT, *words.split())
    assert (shaped.returncode, shaped.stdout) == (0, ""), shaped.stderr
    assert probe(qplab, what, 40_000 if what == "loss" else 2000)[key] == near(value)


def test_a_fault_adds_delay_and_takes_it_away(qplab: Qplab) -> None:
    """The schedule's own steps say when; netem's words say what the port does, asked beside it on the guest's clock."""
    show = f"tc qdisc show dev {WAN_PORT}"
    fault = f"{sys.executable} -m qpd.lab fault delay b-spine1:{WAN_PORT} --ms 20 --for 10"
    watched = qplab(
        "exec", "b-spine1", "--", "env", f"PYTHONPATH={REPOSITORY}", "sh", "-c",
        f"{show}; {fault} >&2 & fault=$!; while kill -0 $fault; do {show}; sleep 0.5; done; wait $fault && {show}",
    )  # fmt: skip
    assert watched.returncode == 0, watched.stderr
    delays = [delay for delay, _ in itertools.groupby(re.findall(r"delay (\w+)", watched.stdout))]
    assert delays == ["11ms", "31ms", "11ms"]
