"""From what was seen to figures: which links count, who was hurt, which silence was the fault's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpd.lab import faults, topology
from qpd.lab.experiment import reckon, seeds, tiers
from qpd.lab.experiment.drive import Done, Outcome, QpOutcome, constant_rate_flows, silence
from qpd.lab.experiment.model import ConstantRate, Steering
from qpd.lab.experiment.sightings import SIGHTING
from qpd.lab.topology import Endpoint

LABS = Path(__file__).parents[4] / "deploy/containerlab"
TWO_DC = topology.load(LABS / "two-dc")
FOUR_SPINE = topology.load(LABS / "four-spine")
S = 1_000_000_000


def test_the_links_of_a_sending_host_are_its_leafs_uplinks_and_its_sites_way_out() -> None:
    leaf, spine = tiers.groups(TWO_DC, ["dc1-host1"])
    assert (leaf.tier, leaf.name, [str(end) for end in leaf.ends]) == (
        "leaf",
        "dc1-leaf1",
        ["dc1-leaf1:eth1", "dc1-leaf1:eth2"],
    )
    assert {str(end) for end in spine.ends} == {
        f"dc1-spine{number}:eth{port}" for number in (1, 2) for port in (4, 5)
    }
    assert [group.tier for group in tiers.groups(FOUR_SPINE, ["host1", "host2"])] == ["leaf", "leaf"]
    far = tiers.far_ends(TWO_DC, [leaf])
    assert str(far[Endpoint("dc1-leaf1", "eth2")]) == "dc1-spine2:eth1"


def test_of_several_leaves_the_worst_counts_and_idle_ones_do_not() -> None:
    groups = tiers.groups(FOUR_SPINE, ["host1", "host2", "host3"])
    loads = {end: 0.0 for group in groups for end in group.ends}
    loads |= dict.fromkeys(groups[0].ends, 10.0)
    loads[groups[1].ends[0]] = 5.0
    assert tiers.factors(groups, loads) == {"leaf_max_to_mean": 4.0, "leaf_jain": 0.25}


def done(begin: float, end: float | None, what: str = "dc1-leaf1--dc1-spine1", **how: float) -> Done:
    fault = faults.Loss(what, **how)  # type: ignore[arg-type]
    return Done(fault, begin, int(begin * S), None if end is None else int(end * S))


def outcome(*qps: QpOutcome, happened: list[Done]) -> Outcome:
    return Outcome(list(qps), happened, begin_ns=0, end_ns=20 * S, nominal_gap_ns=2_000_000)


def qp(number: int, begin: float, length: float) -> QpOutcome:
    return QpOutcome("h", "d", number, 1, 10, silence_ns=int(length * S), silence_at_ns=int(begin * S))


def test_who_was_on_the_link_before_the_fault_is_hurt() -> None:
    placement = {
        ("d", 1): {Endpoint("dc1-leaf1", "eth1"), Endpoint("dc1-spine1", "eth4")},
        ("d", 2): {Endpoint("dc1-leaf1", "eth2"), Endpoint("dc1-spine2", "eth4")},
    }
    assert reckon.hurt_qps([done(1, 2)], placement, TWO_DC) == {("d", 1)}
    far = [done(1, 2, "dc1-spine2:eth4")]
    assert reckon.hurt_qps(far, placement, TWO_DC) == {("d", 2)}, "links between sites count, too"
    killed = [Done(faults.Kill("dc1-leaf1", "bgpd"), 1.0, S, 2 * S)]
    assert reckon.hurt_qps(killed, placement, TWO_DC) == {("d", 1), ("d", 2)}, "a daemon has no link"


def test_outage_is_the_worst_of_the_hurt_less_the_nominal_gap() -> None:
    found, bounds = reckon.silences(
        outcome(qp(1, 5.0, 0.1), qp(2, 5.0, 0.032), qp(3, 5.0, 0.004), happened=[done(5, 8)]),
        {("d", 1), ("d", 2)},
    )
    assert found == {"outage_s": pytest.approx(0.098), "outage_unhurt_s": pytest.approx(0.002)}
    assert not bounds


@pytest.mark.parametrize(("begin", "length"), [(5.01, 3.0), (5.01, 14.99)])
def test_a_silence_that_healing_or_the_end_ended_is_a_lower_bound(begin: float, length: float) -> None:
    _, bounds = reckon.silences(outcome(qp(1, begin, length), happened=[done(5, 8)]), {("d", 1)})
    assert bounds == {"outage_s"}


def test_only_a_silence_during_the_fault_is_the_faults() -> None:
    gaps = [(1 * S, 3 * S), (5 * S, S // 10), (9 * S, 2 * S)]
    assert silence(gaps, [done(5, 8)]) == (5 * S, S // 10)
    assert silence(gaps, []) == (1 * S, 3 * S), "without a fault the longest of all"
    assert silence(gaps[:1], [done(5, 8)]) == (None, None)


def sightings(*rows: tuple[float, int]) -> np.ndarray:
    return np.array([(int(time * S), link, 7, 1) for time, link in rows], dtype=SIGHTING)


def test_a_hurt_link_is_left_with_its_last_packet() -> None:
    hurt, other = TWO_DC.link("dc1-leaf1", "dc1-spine1"), TWO_DC.link("dc1-leaf1", "dc1-spine2")
    gray = outcome(happened=[done(5, 8, percent=5.0)])
    seen = sightings((4, 0), (5.1, 0), (5.6, 0), (7, 1), (8.5, 0))
    found, bounds = reckon.left_after(gray, seen, {0: hurt, 1: other}, [7], TWO_DC)
    assert found == {"left_s": pytest.approx(0.6)}
    assert not bounds
    seen = sightings((5.1, 0), (7.9, 0))
    _, bounds = reckon.left_after(gray, seen, {0: hurt}, [7], TWO_DC)
    assert bounds == {"left_s"}, "it never was"
    assert reckon.left_after(gray, seen, {0: hurt}, [8], TWO_DC) == ({}, set()), "answers do not count"
    dead = outcome(happened=[done(5, 8)])
    assert reckon.left_after(dead, seen, {0: hurt}, [7], TWO_DC) == ({}, set()), (
        "nothing is seen on a dead link"
    )


def test_stall_is_what_the_iteration_of_the_fault_took_longer() -> None:
    rows = [
        {
            "begin_ns": i * S,
            "end_ns": (i + 1) * S,
            "seconds": seconds,
            "communication_s": seconds / 2,
            "wrong_values": 0,
        }
        for i, seconds in enumerate([1.0, 1.2, 3.0, 1.4])
    ]
    found = reckon.iterations(rows, [done(2.2, 2.4)])
    assert found["stall_s"] == pytest.approx(1.9), "1.1 was usual before"
    assert found["lost_time_s"] == pytest.approx(2.2), "the one after it is still slower, by 0.3"
    assert found["iteration_s"] == pytest.approx(1.2), "the touched one is not in the mean"
    assert "stall_s" not in reckon.iterations(rows, [])
    longer = reckon.iterations(rows, [done(1.5, 2.4)])
    assert longer["lost_time_s"] == pytest.approx(2.6), "1.2, 3.0 and 1.4, where 1.0 was usual"
    assert reckon.iterations(rows, [done(0.2, 0.4)])["stall_s"] == 0, (
        "the others' median, where none was before"
    )
    assert reckon.iterations([], []) == {}


def test_a_seed_gives_the_same_queue_pairs_ports_and_fault_times() -> None:
    workload = ConstantRate.model_validate(
        {"kind": "constant-rate", "flows": [{"source": "a", "destination": "b"}], "qps": 16}
    )
    for steering in Steering:
        assert constant_rate_flows(workload, steering, 5) == constant_rate_flows(workload, steering, 5)
        assert constant_rate_flows(workload, steering, 5) != constant_rate_flows(workload, steering, 6)
    (one,), (other,) = (constant_rate_flows(workload, s, 5) for s in (Steering.ECMP_PORTS, Steering.BALANCED))
    assert one == other, "conditions differ in nothing but who steers"
    (bins,) = constant_rate_flows(workload, Steering.BINS, 5)
    assert [(port - 0xC000) // 0x1000 for port in bins.source_ports] == [0, 1, 2, 3] * 4
    schedule = faults.parse([{"at": 1, "for": 2, "cut": "a--b"}])
    late = seeds.shifted(schedule, 9, 0.5)
    assert late == seeds.shifted(schedule, 9, 0.5)
    assert 1.0 <= late.entries[0].at <= 1.5
    assert late != seeds.shifted(schedule, 10, 0.5)
    assert seeds.trial_seed(1, 0) != seeds.trial_seed(1, 1)
