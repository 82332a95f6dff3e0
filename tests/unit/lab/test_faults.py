"""Schedules of faults: what YAML may say, the order of steps, and which faults may not meet."""

from __future__ import annotations

import pytest
import yaml

from qpd.lab.errors import LabError
from qpd.lab.faults import (
    KINDS,
    Cut,
    Delay,
    Fault,
    Hang,
    Kill,
    Loss,
    Partition,
    Reboot,
    Schedule,
    Step,
    Stop,
    Timed,
    parse,
)
from qpd.lab.topology import Topology, load
from tests.unit.lab.test_labs import ROOT


@pytest.fixture(scope="module")
def two_dc() -> Topology:
    return load(ROOT / "deploy/containerlab/two-dc")


LINK = "dc1-leaf1:eth1--dc1-spine1:eth1"

EVERY = """
- {at: 1, for: 2, cut: "dc1-leaf1 dc1-spine1"}
- {at: 4, for: 2, loss: {link: dc1-leaf1--dc1-spine1, towards: dc1-leaf1, percent: 5}}
- {at: 7, for: 1.5, delay: {link: "dc1-spine1:eth4", ms: 20, jitter_ms: 1}}
- {at: 9, for: 1, reboot: dc1-spine1}
- {at: 11, for: 1, partition: dc2}
- {at: 13, for: 1, stop: dc1-leaf1}
- {at: 15, for: 1, kill: {node: dc1-leaf1, daemon: bgpd}}
- {at: 17, hang: {node: dc1-leaf1, daemon: bfdd}}
"""
PARSED = (
    Timed(1, 2, Cut("dc1-leaf1 dc1-spine1")),
    Timed(4, 2, Loss("dc1-leaf1--dc1-spine1", "dc1-leaf1", 5)),
    Timed(7, 1.5, Delay("dc1-spine1:eth4", 20, 1)),
    Timed(9, 1, Reboot("dc1-spine1")),
    Timed(11, 1, Partition("dc2")),
    Timed(13, 1, Stop("dc1-leaf1", "qpd")),
    Timed(15, 1, Kill("dc1-leaf1", "bgpd")),
    Timed(17, None, Hang("dc1-leaf1", "bfdd")),
)


def test_every_fault_is_read_checked_and_written_back(two_dc: Topology) -> None:
    schedule = parse(yaml.safe_load(EVERY))
    assert schedule.entries == PARSED
    assert {entry.fault.name for entry in PARSED} == set(KINDS), "a fault is missing in this test"
    schedule.check(two_dc)
    assert parse(yaml.safe_load(yaml.safe_dump(schedule.to_yaml()))) == schedule
    assert parse(None) == Schedule()


def test_steps_are_in_order_and_an_end_comes_before_a_begin() -> None:
    one, two, three = Cut("a b"), Reboot("c"), Hang("d")
    schedule = Schedule((Timed(5, 1, two), Timed(2, 3, one), Timed(0, None, three)))
    assert schedule.steps == [
        Step(0, begins=True, fault=three),
        Step(2, begins=True, fault=one),
        Step(5, begins=False, fault=one),
        Step(5, begins=True, fault=two),
        Step(6, begins=False, fault=two),
    ]
    assert schedule.length == 6
    assert Schedule().length == 0


def test_a_partition_holds_all_links_between_the_sites(two_dc: Topology) -> None:
    assert two_dc.sites == ["dc1", "dc2"]
    assert Partition("dc1").links(two_dc) == two_dc.inter_site_links
    assert len(two_dc.inter_site_links) == 4


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (Cut(LINK), Cut("dc1-spine1 dc1-leaf1"), "carrier of"),
        (Cut(LINK), Reboot("dc1-leaf1"), "carrier of"),
        (Partition("dc1"), Partition("dc2"), "carrier of"),
        (Partition("dc1"), Reboot("dc2-spine1"), "carrier of"),
        (Loss(LINK), Loss(LINK, "dc1-leaf1", 5), "what arrives at dc1-leaf1:eth1"),
        (Delay(LINK, 5), Delay(LINK, 9, towards="dc1-leaf1"), "delay from dc1-spine1:eth1"),
        (Kill("dc1-leaf1", "bgpd"), Hang("dc1-leaf1", "bgpd"), "bgpd of dc1-leaf1"),
        (Kill("dc1-leaf1"), Reboot("dc1-leaf1"), "qpd of dc1-leaf1"),
    ],
)
def test_two_faults_cannot_hold_one_thing_at_one_time(
    two_dc: Topology, one: Fault, other: Fault, shared: str
) -> None:
    for entries in ((Timed(0, 5, one), Timed(4, None, other)), (Timed(4, None, other), Timed(0, 5, one))):
        with pytest.raises(LabError, match=r"both hold " + shared):
            Schedule(entries).check(two_dc)
    Schedule((Timed(0, 5, one), Timed(5, None, other))).check(two_dc)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Cut(LINK), Loss(LINK)),
        (Loss(LINK, "dc1-leaf1"), Loss(LINK, "dc1-spine1")),
        (Cut("dc1-leaf1:eth1"), Cut("dc1-leaf1:eth2")),
        (Kill("dc1-leaf1", "bgpd"), Kill("dc1-leaf1", "bfdd")),
        (Reboot("dc1-spine1"), Reboot("dc1-spine2")),
    ],
)
def test_faults_of_different_things_may_meet(two_dc: Topology, one: Fault, other: Fault) -> None:
    Schedule((Timed(0, 5, one), Timed(1, 5, other))).check(two_dc)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cut", "faults: expected a list of faults, found str"),
        ("- cut", r"faults\[0\]: expected a mapping"),
        ("- {cut: a}", r"faults\[0\]: `at` is missing"),
        ("- {at: -1, cut: a}", r"faults\[0\].at: -1: give seconds"),
        ("- {at: soon, cut: a}", r"faults\[0\].at: 'soon': give seconds"),
        ("- {at: .nan, cut: a}", r"faults\[0\].at: nan: give seconds"),
        ("- {at: 1, for: 0, cut: a}", r"faults\[0\].for: 0: give more than 0"),
        ("- {at: 1}", r"faults\[0\]: expected one of cut, loss, .*; found none"),
        ("- {at: 1, cut: a, loss: b}", r"faults\[0\]: expected one of .*; found cut, loss"),
        ("- {at: 1, burn: a}", r"faults\[0\]: 'burn' is no fault; faults are cut"),
        ("- {at: 1, cut: [a]}", r"faults\[0\].cut: expected a mapping of link, side, found list"),
        ("- {at: 1, cut: {link: a, end: b}}", r"faults\[0\].cut: 'end' is not among link, side"),
        ("- {at: 1, cut: {side: a}}", r"faults\[0\].cut: `link` is missing"),
        ("- {at: 1, delay: a}", r"faults\[0\].delay: `ms` is missing"),
        ("- {at: 1, delay: {link: a, ms: fast}}", r"faults\[0\].delay.ms: 'fast': give a number"),
        ("- {at: 1, kill: {node: 1}}", r"faults\[0\].kill.node: 1: give a name"),
    ],
)
def test_what_is_wrong_in_yaml_is_one_line_with_its_place(text: str, says: str) -> None:
    with pytest.raises(LabError, match=says) as caught:
        parse(yaml.safe_load(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Cut("dc1-leaf1 dc2-leaf1"), "topology two-dc has no link"),
        (Cut(LINK, "dc2-leaf1"), "side: .* has no end at dc2-leaf1"),
        (Loss(LINK, "dc2-leaf1"), "towards: .* has no end at dc2-leaf1"),
        (Loss(LINK, percent=0), "loss: percent: 0: give more than 0"),
        (Delay(LINK, 0), "delay: ms: 0: give more than 0"),
        (Delay(LINK, 5, 6), "delay: jitter_ms: 6: give 0 to the delay's 5"),
        (Reboot("dc1-host1"), "reboot: dc1-host1 is no router of two-dc; routers are dc1-spine1"),
        (Partition("dc3"), "partition: site dc3 has no inter-site links; sites are dc1, dc2"),
        (Kill("dc1-spine1"), "kill: dc1-spine1 has no qpd beside it"),
        (Stop("dc9", "bgpd"), "stop: dc9 is no router"),
    ],
)
def test_what_does_not_fit_the_lab_is_one_line_with_its_place(
    two_dc: Topology, fault: Fault, says: str
) -> None:
    with pytest.raises(LabError, match=r"faults\[1\]: " + says):
        Schedule((Timed(0, 1, Reboot("dc1-leaf3")), Timed(5, 1, fault))).check(two_dc)


def test_a_step_is_told_in_one_line() -> None:
    assert str(Step(1, begins=True, fault=Loss("a b", percent=5))) == "loss a b 5"
    assert str(Step(1, begins=False, fault=Kill("leaf1"))) == "kill leaf1 qpd: undone"
