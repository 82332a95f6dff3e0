"""The ready experiments in their small forms, on the real fabric: trials go well, and say what happened."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qpd.kernel import bpf
from qpd.kernel.bpf import MapType
from qpd.kernel.table import possible_cpus
from qpd.lab import topology, wan
from qpd.lab.errors import LabError
from qpd.lab.experiment import raw, shelf
from qpd.lab.experiment.model import read
from qpd.lab.experiment.run import run
from qpd.lab.fabric import Fabric

pytestmark = [pytest.mark.frr, pytest.mark.timeout(600)]

EXPERIMENTS = Path(__file__).parents[2] / "configs/experiments"

Small = Callable[..., tuple[dict[str, Any], dict[str, list[raw.Row]]]]


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Small:
    """Runs the small form of a ready experiment on the session's fabric; gives its summary and raw data."""

    def body(name: str, **changes: int) -> tuple[dict[str, Any], dict[str, list[raw.Row]]]:
        experiment = read(EXPERIMENTS / f"{name}.yaml", small=True, **changes)
        lab = topology.load(experiment.topology).name
        fabric = request.getfixturevalue(lab.replace("-", "_"))
        assert isinstance(fabric, Fabric)
        directory = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        summary = run(experiment, directory, small=True, fabric=fabric)
        assert summary["trials"]["failed"] == []
        assert json.loads((directory / "summary.json").read_text()) == summary
        assert (directory / "report.html").stat().st_size > 10_000
        return summary, raw.load(directory)

    return body


def means(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each condition's means."""
    return {
        group["condition"]: {name: one["mean"] for name, one in group["measures"].items()}
        for group in summary["groups"]
    }


def paths(tables: dict[str, list[raw.Row]], trial: int) -> dict[tuple[str, int], set[str]]:
    """The links on which each QP was seen."""
    found: dict[tuple[str, int], set[str]] = {}
    for row in tables["paths"]:
        if row["trial"] == trial:
            found.setdefault((row["destination"], row["qp"]), set()).add(row["link"])
    return found


def test_distribution(small: Small) -> None:
    """Balanced is even at the leaf; each QP has one uplink and one link between the sites; a seed repeats itself."""
    summary, tables = small("distribution")
    assert means(summary)["balanced"]["leaf_max_to_mean"] < 1.06
    for row in tables["trials"]:
        seen = paths(tables, row["trial"])
        assert len(seen) == 8
        for links in seen.values():
            assert sorted(link.partition("-")[2][:4] for link in links) == ["leaf", "spin"]
    _, again = small("distribution", repetitions=1)
    same = [(row["trial"], row["condition"]) for row in again["trials"]]
    assert same == [(row["trial"], row["condition"]) for row in tables["trials"][: len(same)]]
    for trial, _ in same:
        assert paths(again, trial) == paths(tables, trial)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (MapType.LRU_HASH, 0),
        (MapType.HASH, 0),
        (MapType.LPM_TRIE, 1),
        (MapType.ARRAY, 0),
        (MapType.PERCPU_ARRAY, 0),
    ],
)
def test_an_emptied_map_is_as_a_new_one(kind: MapType, flags: int) -> None:
    """What a trial has placed and counted does not reach the next, which uses the same compiled classifier."""
    width = 8 * possible_cpus() if kind is MapType.PERCPU_ARRAY else 8
    keys = [
        number.to_bytes(4, "little") + bytes(4) for number in (32, 2, 7)
    ]  # an LPM key begins with its length
    size = 8 if kind is MapType.LPM_TRIE else 4
    fd = bpf.map_create(kind, size, 8, 64, flags=flags)
    try:
        for key in keys:
            bpf.update(fd, key[:size], b"\xff" * width)
        shelf.empty(fd)
        for key in keys:
            found = bpf.lookup(fd, key[:size], width)
            assert found == (bytes(width) if kind in {MapType.ARRAY, MapType.PERCPU_ARRAY} else None)
    finally:
        os.close(fd)


def test_an_emptied_ring_has_nothing_to_read() -> None:
    """Records that no daemon has read would tell the next one of queue pairs that it has never seen."""
    ring = bpf.map_create(MapType.RINGBUF, 0, 0, 4096)
    program = bpf.prog_load(_writes_a_record(ring))
    page = mmap.PAGESIZE
    try:
        bpf.prog_test_run(program, bytes(64))
        with (
            contextlib.closing(mmap.mmap(ring, page)) as consumer,
            contextlib.closing(mmap.mmap(ring, page, prot=mmap.PROT_READ, offset=page)) as producer,
        ):
            assert consumer[:8] != producer[:8]
            shelf.empty(ring)
            assert consumer[:8] == producer[:8]
    finally:
        os.close(program)
        os.close(ring)


def _writes_a_record(ring: int) -> list[int]:
    """Instructions of bpf_ringbuf_output(ring, 8 zero octets of the stack, 8, 0); return 0."""
    steps = [
        (0x7A, 10, 0, -8, 0),  # *(u64 *)(r10 - 8) = 0
        (0x18, 1, 1, 0, ring),  # r1 = the map of this descriptor
        (0x00, 0, 0, 0, 0),
        (0xBF, 2, 10, 0, 0),  # r2 = r10
        (0x07, 2, 0, 0, -8),  # r2 += -8
        (0xB7, 3, 0, 0, 8),  # r3 = 8
        (0xB7, 4, 0, 0, 0),  # r4 = 0
        (0x85, 0, 0, 0, 130),  # call bpf_ringbuf_output
        (0xB7, 0, 0, 0, 0),  # r0 = 0
        (0x95, 0, 0, 0, 0),  # exit
    ]
    text = b"".join(
        struct.pack("=BBhi", code, dst | src << 4, offset, value) for code, dst, src, offset, value in steps
    )
    return list(struct.unpack(f"={len(steps)}Q", text))


def test_failover(small: Small) -> None:
    """QPs of the dead link come again in both conditions, and no other loses a packet by the fault."""
    summary, tables = small("failover")
    for condition, found in means(summary).items():
        assert found["outage_s"] > 0, condition
        assert found["lost_packets"] > 0, condition
    for row in tables["trials"]:
        hurt = [one["hurt"] for one in tables["qps"] if one["trial"] == row["trial"]]
        assert 0 < sum(hurt) < len(hurt)
    assert len(tables["faults"]) == 2
    assert {row["planned_s"] for row in tables["faults"]} == {tables["faults"][0]["planned_s"]}, (
        "the seed's time"
    )


@pytest.mark.parametrize("name", ["allreduce", "parameter-server"])
def test_collectives(small: Small, name: str) -> None:
    """Every sum is right, all iterations are there, qpd's leaves are more even than the kernel's."""
    summary, tables = small(name)
    found = means(summary)
    assert {one["wrong_values"] for one in found.values()} == {0}
    assert {one["qp_errors"] for one in found.values()} == {0}
    assert found["balanced"]["leaf_max_to_mean"] < found["ecmp-ports"]["leaf_max_to_mean"]
    assert len(tables["iterations"]) == 4
    assert [one["condition"] for one in summary["savings"] if one["measure"] == "communication_s"] == [
        "balanced"
    ]


@pytest.mark.parametrize("name", ["allreduce-failover", "gray-failure"])
def test_a_fault_in_the_middle_of_an_allreduce(small: Small, name: str) -> None:
    """No QP dies, the results stay right, and the iteration that the fault hit is told from the others."""
    summary, tables = small(name)
    (found,) = means(summary).values()
    assert (found["wrong_values"], found["qp_errors"]) == (0, 0)
    # Of a gray link a lucky few packets may all arrive; from a dead one nobody is spared.
    assert found["retransmitted_packets"] > 0 or name == "gray-failure"
    assert found["stall_s"] >= 0
    (fault,) = tables["faults"]
    assert "leaf1:eth1" in fault["links"].split()


def test_scale(small: Small) -> None:
    """256 QPs, two uplinks: even, and nothing is lost."""
    summary, tables = small("scale")
    found = means(summary)["balanced"]
    assert found["leaf_max_to_mean"] < 1.05
    assert len(tables["qps"]) == 256
    assert found["qpd_resident_bytes"] > 10_000_000


def test_distance(tmp_path: Path, two_dc: Fabric) -> None:
    """A longer road makes a longer iteration; without netem the experiment says so in one line, and runs nothing."""
    if wan.missing() is None:
        summary = run(read(EXPERIMENTS / "wan-sweep.yaml", small=True), tmp_path / "wan", small=True)
        near, far = (group["measures"]["communication_s"]["mean"] for group in summary["groups"])
        assert far > near
        return
    with pytest.raises(LabError, match="this kernel has no netem"):
        run(read(EXPERIMENTS / "wan-sweep.yaml", small=True), tmp_path / "wan", fabric=two_dc)


def test_a_failed_repetition_does_not_end_the_run(tmp_path: Path, two_dc: Fabric) -> None:
    """Qpd refuses its configuration in one condition: that trial is told, the other is measured, the fabric is well."""
    file = tmp_path / "experiment.yaml"
    text = (EXPERIMENTS / "distribution.yaml").read_text()
    text = text.replace("../../deploy", str(EXPERIMENTS.parents[1] / "deploy"))
    wrong = '{name: wrong, steering: balanced, settings: {hold_up: "never"}}'
    file.write_text(text.replace("conditions: [ecmp-ports, balanced]", f"conditions: [{wrong}, ecmp-ports]"))
    experiment = read(file, small=True, repetitions=1)
    summary = run(experiment, tmp_path / "out", small=True, fabric=two_dc)
    (failed,) = summary["trials"]["failed"]
    assert failed["condition"] == "wrong"
    assert "hold_up" in failed["error"]
    assert [group["condition"] for group in summary["groups"]] == ["ecmp-ports"]
    assert two_dc.health().converged
