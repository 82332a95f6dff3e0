"""The configuration that a sidecar's qpd gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpd.lab.processes import Records
from qpd.lab.sender import Pacer
from qpd.lab.sidecar import Sidecar, merged


def sidecar(tmp_path: Path, base: Path | None) -> Sidecar:
    return Sidecar(
        node="leaf1",
        namespace="lab-leaf1",
        frr_sockets=Path("/var/run/frr/lab-leaf1"),
        pins=Path("/sys/fs/bpf/qplab/lab/leaf1"),
        directory=tmp_path / "leaf1",
        records=Records(tmp_path / "processes"),
        log=tmp_path / "log",
        base=base,
    )


def test_the_topology_then_the_lab_then_the_caller(tmp_path: Path) -> None:
    base = tmp_path / "qpd.yaml"
    base.write_text("planes: {eth1: p1}\nnode: other\nmetrics: {qp_series_max: 5}\n")
    made = sidecar(tmp_path, base).configuration({"placement": "hash", "planes": {"eth2": "p2"}})
    assert made == {
        "planes": {"eth1": "p1", "eth2": "p2"},
        "node": "leaf1",
        "metrics": {"qp_series_max": 5, "listen": "127.0.0.1:9791"},
        "frr": {"socket_dir": "/var/run/frr/lab-leaf1"},
        "bpf": {"pin_dir": "/sys/fs/bpf/qplab/lab/leaf1"},
        "api": {"socket": str(tmp_path / "leaf1/qpd.sock")},
        "placement": "hash",
    }


def test_merging_changes_neither_side() -> None:
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}
    assert merged(base, over) == {"a": {"b": 1, "c": 2}, "d": 3}
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3})


def test_a_daemon_that_is_not_there_does_not_answer(tmp_path: Path) -> None:
    absent = sidecar(tmp_path, None)
    assert absent.status() is None
    assert not absent.running


@pytest.mark.parametrize(("now", "sent", "due"), [(0.0, 0, 1), (1.0, 0, 101), (1.0, 100, 1), (1.0, 101, 0)])
def test_a_constant_rate_catches_up(now: float, sent: int, due: int) -> None:
    assert Pacer(100.0, 0.0, None).due(now, sent) == due


def test_a_limit_ends_both_ways_of_sending() -> None:
    assert Pacer(100.0, 0.0, 10).due(5.0, 8) == 2
    assert Pacer(None, 0.0, 10).due(0.0, 8) == 2
    assert Pacer(None, 0.0, None).due(0.0, 1000) > 0
