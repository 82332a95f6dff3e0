"""qpd on a leaf whose wires delay and lose by netem, in a guest of virtual time: tests/guest/netem, all in one boot."""

from __future__ import annotations

import re

import pytest

from tests.guest.conftest import REPOSITORY, RunInGuest

pytestmark = [pytest.mark.frr, pytest.mark.slow, pytest.mark.timeout(1020)]

TESTS = (
    "inside_rtt.py::test_medians_are_the_delays_that_were_set",
    "inside_gray.py::test_reported_by_default",
    "inside_gray.py::test_drained_where_configured",
)
MODULES = "sch_netem sch_ingress cls_bpf veth"


@pytest.fixture(scope="module")
def said(in_guest: RunInGuest) -> str:
    """What pytest says of all of them."""
    files = " ".join(dict.fromkeys(f"tests/guest/netem/{test.partition('::')[0]}" for test in TESTS))
    pytest_ = f"{REPOSITORY}/.venv/bin/python -m pytest {files} -v -rPs -p no:cacheprovider"
    answer = in_guest("sh", "-c", f"modprobe -a {MODULES} && exec {pytest_}", deadline=900, virtual_time=True)
    return f"{answer.stdout}\n{answer.stderr[-2000:]}"


@pytest.mark.parametrize("test", TESTS, ids=[test.rpartition("::")[2] for test in TESTS])
def test_against_netem(said: str, test: str) -> None:
    """As it ended in the guest; what it measured is in this test's output."""
    print(
        "\n".join(
            line for line in said.splitlines() if "packets/s on the path" in line or "set 22 ms" in line
        )
    )
    outcome = re.search(rf"{re.escape(test)} (PASSED|SKIPPED)", said)
    assert outcome is not None, f"in the guest:\n{said[-20000:]}"
    if outcome[1] == "SKIPPED":
        reasons = re.findall(rf"^SKIPPED \[\d+\] \S*{test.partition('::')[0]}:\d+: (.*)", said, re.MULTILINE)
        pytest.skip(reasons[0] if reasons else "skipped in the guest")
