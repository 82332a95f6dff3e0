"""Topology files: containerlab's rules of inheritance, and one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpd.lab.errors import LabError
from qpd.lab.topology import Endpoint, Role, Topology, parse

HERE = Path("/labs/small.clab.yml")

SMALL = """
name: small
topology:
  defaults: {kind: linux, sysctls: {a: 1, b: 1}, exec: [echo defaults]}
  kinds: {linux: {image: "${IMAGE:=default}", labels: {tier: kind}}}
  groups:
    leaf:
      labels: {qplab.role: leaf}
      sysctls: {b: 2}
      binds: ["__clabNodeName__/frr.conf:/etc/frr/frr.conf", "/one:/same"]
      exec: [sh /etc/frr/frr.conf x]
    spine: {labels: {qplab.role: spine}}
    host: {labels: {qplab.role: host}}
    qpd: {labels: {qplab.role: qpd}}
  nodes:
    l1: {group: leaf, exec: [echo "two words"], binds: ["two:/same"]}
    s1: {group: spine}
    l1-qpd: {group: qpd, network-mode: "container:l1"}
    h1: {group: host}
    grafana:
  links:
    - {endpoints: ["l1:eth1", "s1:eth1"], mtu: 9100}
    - {endpoints: ["l1:eth2", "s1:eth2"]}
    - {endpoints: ["l1:eth3", "h1:eth1"]}
"""


def small(text: str = SMALL) -> Topology:
    return parse(text, HERE, {})


def test_layers_are_merged_as_containerlab_does() -> None:
    leaf = small().nodes["l1"]
    assert leaf.sysctls == {"a": "1", "b": "2"}
    assert leaf.labels == {"tier": "kind", "qplab.role": "leaf"}
    assert leaf.commands() == [["echo", "defaults"], ["sh", "/labs/l1/frr.conf", "x"], ["echo", "two words"]]
    assert leaf.bound("/etc/frr/frr.conf") == Path("/labs/l1/frr.conf")
    assert leaf.bound("/same") == Path("/labs/two"), "the node's own bind wins over its group's"


def test_roles_links_and_sidecars() -> None:
    topology = small()
    assert [node.name for node in topology.machines] == ["l1", "s1", "h1"]
    assert topology.nodes["grafana"].role is Role.OTHER
    assert [str(link) for link in topology.fabric_links] == ["l1:eth1--s1:eth1", "l1:eth2--s1:eth2"]
    assert topology.links[0].mtu == 9100
    assert topology.links[0].other("l1") == Endpoint("s1", "eth1")
    assert topology.leaf_of("h1") == "l1"
    sidecar = topology.sidecar("l1")
    assert sidecar is not None
    assert sidecar.name == "l1-qpd"
    assert topology.sidecar("s1") is None


@pytest.mark.parametrize("words", [("l1:eth2",), ("l1:eth2", "s1"), ("l1:eth2--s1:eth2",), ("s1:eth2", "l1")])
def test_a_link_has_several_names(words: tuple[str, ...]) -> None:
    assert str(small().link(*words)) == "l1:eth2--s1:eth2"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("l1", "s1"), "l1:eth1--s1:eth1, l1:eth2--s1:eth2; write NODE:INTERFACE"),
        (("h1", "s1"), "has no link h1--s1; near it: "),
        (("x",), "write NODE, NODE:INTERFACE or A--B"),
    ],
)
def test_a_link_that_is_not_one_says_which_there_are(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(LabError, match=says):
        small().link(*words)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("name: small", "name: 'sm all'", "name: 'sm all': give 1 to 40"),
        ("name: small", "name: [", "not YAML"),
        ("qplab.role: spine", "qplab.role: spin", "label qplab.role: 'spin' is none of spine, leaf"),
        ("s1:eth2", "s2:eth2", r"topology.links\[1\]: s2:eth2: there is no node 's2'"),
        ("s1:eth2", "s1:eth1", r"topology.links\[1\]: s1:eth1 is already used by topology.links\[0\]"),
        ("s1:eth2", "s1:interface-of-sixteen", "interface names of 1 to 15 characters"),
        ("mtu: 9100", "mtu: big", r"topology.links\[0\].mtu: 'big'"),
        ("container:l1", "container:l9", "l1-qpd.network-mode: there is no node l9"),
        (', network-mode: "container:l1"', "", "a qpd node needs network-mode: container:LEAF"),
        ("two:/same", "two", "binds: 'two': write SOURCE:TARGET"),
        ('["l1:eth1", "s1:eth1"]', "l1", r"topology.links\[0\].endpoints: write two of NODE:INTERFACE"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(before: str, after: str, says: str) -> None:
    assert before in SMALL
    with pytest.raises(LabError, match=says) as caught:
        small(SMALL.replace(before, after))
    assert str(caught.value).startswith(str(HERE))
    assert "\n" not in str(caught.value)


def test_variables_take_the_environment_and_then_their_default() -> None:
    text = SMALL.replace("tier: kind", "tier: '${TIER:=low}', both: '${A:-x}${B}'")
    assert parse(text, HERE, {}).nodes["l1"].labels["tier"] == "low"
    labels = parse(text, HERE, {"TIER": "high", "B": "y"}).nodes["l1"].labels
    assert (labels["tier"], labels["both"]) == ("high", "xy")
