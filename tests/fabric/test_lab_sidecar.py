"""qpd beside a leaf of the lab: started, killed, started again, taken away without a trace."""

from __future__ import annotations

import signal

import pytest

from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric

from .judge import until_equal

pytestmark = [pytest.mark.frr]

LEAF = "dc1-leaf1"


def test_start_kill_restart_detach(two_dc: Fabric) -> None:
    beside = two_dc.sidecar(LEAF)
    two_dc.start_qpd(LEAF, {"placement": "hash"})
    status = beside.status()
    assert status is not None
    assert (status["node"], status["state"], status["placement"]) == (LEAF, "steering", "hash")
    assert {uplink["name"] for uplink in status["uplinks"]} == {"eth1", "eth2"}
    with pytest.raises(LabError, match="runs already"):
        two_dc.start_qpd(LEAF)

    two_dc.kill_qpd(LEAF, signal.SIGKILL)
    until_equal(lambda: beside.running, wanted=False)
    assert beside.status() is None
    assert any(beside.pins.rglob("*")), "killed: programs and maps stay pinned"
    with pytest.raises(LabError, match="SIGTERM was not sent"):
        two_dc.kill_qpd(LEAF, signal.SIGTERM)

    two_dc.start_qpd(LEAF)
    two_dc.stop_qpd(LEAF, detach=True)
    assert not beside.running
    assert not beside.pins.exists()


def test_a_wrong_configuration_is_told_in_one_line(two_dc: Fabric) -> None:
    with pytest.raises(LabError, match=r"dc1-leaf1: qpd has ended: .*placement") as caught:
        two_dc.start_qpd(LEAF, {"placement": "random"})
    assert "\n" not in str(caught.value)


def test_qpctl_speaks_to_the_leafs_own_daemon(two_dc: Fabric) -> None:
    two_dc.start_qpd(LEAF)
    done = two_dc.sidecar(LEAF).qpctl("-o", "json", "status")
    assert done.returncode == 0, done.stderr
    assert f'"{LEAF}"' in done.stdout
