"""The labs of deploy/containerlab: valid for containerlab, and consistent with themselves.

The files of a lab speak of one plan: an address, an AS number or a peer that is wrong in one of them costs an
evening on the wire, and a second here.
"""

from __future__ import annotations

import json
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qpd.lab import frr, frrconf, topology
from qpd.lab.topology import Topology

ROOT = Path(__file__).parents[3]
LABS = sorted(file.parent.name for file in (ROOT / "deploy/containerlab").glob("*/*.clab.yml"))


@pytest.fixture(params=LABS)
def lab(request: pytest.FixtureRequest) -> Topology:
    return topology.load(ROOT / "deploy/containerlab" / request.param)


def conf(lab: Topology, node: str) -> frrconf.FrrConf:
    file = lab.nodes[node].bound(frr.FRR_CONF)
    assert file is not None
    return frrconf.parse(file.read_text())


def neighbors_text(lab: Topology, node: str) -> list[list[str]]:
    file = lab.nodes[node].bound(frr.FRR_CONF)
    assert file is not None
    return [line.split() for line in file.read_text().splitlines() if line.split()[:1] == ["neighbor"]]


def test_both_labs_are_there() -> None:
    assert {"two-dc", "four-spine"} <= set(LABS)


def test_containerlab_accepts_the_file(lab: Topology) -> None:
    # containerlab's patterns are Go's; Python's re has no \p{...}.
    schema = json.loads(
        (ROOT / "tests/data/clab.schema.json").read_text().replace("[\\\\p{N}\\\\p{L}]", "[\\\\w]")
    )
    validator = jsonschema.Draft202012Validator(schema)
    document = yaml.safe_load(lab.path.read_text())
    assert not [error.message for error in validator.iter_errors(document)]
    document["topology"]["nodes"]["x"] = {"kindd": "linux"}
    assert list(validator.iter_errors(document)), "a schema that accepts anything proves nothing"


def test_all_mac_addresses_of_a_lab_differ(lab: Topology) -> None:
    ends = [end for link in lab.links for end in link.ends]
    assert len({end.mac_address for end in ends}) == len(ends)


def test_every_bound_file_exists(lab: Topology) -> None:
    for node in lab.nodes.values():
        for bind in node.binds:
            if not str(bind.source).startswith("/sys/"):
                assert bind.source.exists(), f"{node.name}: {bind.source}"


def test_every_leaf_has_every_spine_of_its_site_a_host_and_a_sidecar(lab: Topology) -> None:
    for leaf in lab.of_role(topology.Role.LEAF):
        site = leaf.name.rpartition("-")[0]
        spines = {s.name for s in lab.of_role(topology.Role.SPINE) if s.name.rpartition("-")[0] == site}
        assert {link.other(leaf.name).node for link in lab.uplinks(leaf.name)} == spines
        assert lab.sidecar(leaf.name) is not None
        assert leaf.name in {lab.leaf_of(host.name) for host in lab.of_role(topology.Role.HOST)}


def test_names_loopbacks_and_as_numbers(lab: Topology) -> None:
    loopbacks: dict[str, str] = {}
    for node in lab.routers:
        facts = conf(lab, node.name)
        assert facts.hostname == node.name
        assert facts.loopback is not None
        assert facts.loopback not in loopbacks, f"{node.name} and {loopbacks.get(facts.loopback)}"
        loopbacks[facts.loopback] = node.name
        file = node.bound(frr.FRR_CONF)
        assert file is not None
        assert f" bgp router-id {facts.loopback}\n" in file.read_text()
    leaves = [conf(lab, leaf.name).asn for leaf in lab.of_role(topology.Role.LEAF)]
    assert len(set(leaves)) == len(leaves)


def test_both_ends_of_every_link_agree(lab: Topology) -> None:
    for link in lab.fabric_links:
        for here in link.ends:
            there = link.other(here.node)
            mine, theirs = conf(lab, here.node), conf(lab, there.node)
            neighbor = mine.neighbor_on(here.interface)
            assert neighbor is not None, f"{here} has no BGP neighbour"
            described = [w[3] for w in neighbors_text(lab, here.node) if w[1:3] == [neighbor, "description"]]
            assert described == [there.node]
            if neighbor == here.interface:
                continue
            assert neighbor in {str(address.ip) for address in theirs.addresses[there.interface]}
            remote = [int(w[3]) for w in neighbors_text(lab, here.node) if w[1:3] == [neighbor, "remote-as"]]
            assert remote == [theirs.asn]


def test_hosts_share_one_subnet_and_no_address(lab: Topology) -> None:
    by_version: dict[int, list[str]] = {4: [], 6: []}
    for host in lab.of_role(topology.Role.HOST):
        for command in host.commands():
            if command[:3] == ["ip", "address", "add"]:
                interface = ip_interface(command[3])
                by_version[interface.version].append(str(interface))
    for addresses in by_version.values():
        assert len({ip_interface(address).network for address in addresses}) == 1
        assert len(set(addresses)) == len(addresses) == len(lab.of_role(topology.Role.HOST))


def test_the_underlay_carries_what_the_hosts_send(lab: Topology) -> None:
    vxlan_over_ipv6 = 40 + 8 + 8 + 14
    access = max(link.mtu for link in lab.links if link not in lab.fabric_links)
    assert all(link.mtu >= access + vxlan_over_ipv6 for link in lab.fabric_links)
    assert access >= 4096 + 14 + 40 + 8 + 12 + 16 + 4, "a RoCE packet of MTU 4096 with a RETH over IPv6"


def topology_file(lab: Topology) -> dict[str, Any]:
    document = yaml.safe_load(lab.path.read_text())["topology"]
    assert isinstance(document, dict)
    return document


def test_a_sidecar_shares_its_leafs_sockets_and_waits_for_its_health(lab: Topology) -> None:
    """The volume is named after the sidecar at both ends, so that the names must fit; nothing is privileged."""
    document = topology_file(lab)
    groups = document["groups"]
    assert document["defaults"]["privileged"] is False
    assert not any("privileged" in group for group in groups.values())
    assert groups["leaf"]["volumes"] == ["__clabLabName__-__clabNodeName__-qpd:/var/run/frr"]
    assert groups["qpd"]["volumes"] == ["__clabLabName__-__clabNodeName__:/var/run/frr"]
    assert "healthcheck" in groups["leaf"]
    for leaf in lab.of_role(topology.Role.LEAF):
        beside = lab.sidecar(leaf.name)
        assert beside is not None
        assert beside.name == f"{leaf.name}-qpd"
        wait = document["nodes"][beside.name]["stages"]["create"]["wait-for"]
        assert wait == [{"node": leaf.name, "stage": "healthy"}]


def test_prometheus_scrapes_every_leaf_and_grafana_shows_the_dashboard(lab: Topology) -> None:
    nodes = lab.nodes
    scraped = nodes["prometheus"].bound("/etc/prometheus/prometheus.yml")
    assert scraped is not None
    document = yaml.safe_load(scraped.read_text())
    leaves = [leaf.name for leaf in lab.of_role(topology.Role.LEAF)]
    assert document["scrape_configs"][0]["static_configs"][0]["targets"] == [
        f"{leaf}:9791" for leaf in leaves
    ]
    rules = nodes["prometheus"].bound(f"/etc/prometheus/{document['rule_files'][0]}")
    assert rules == ROOT / "configs/rules.yml"

    provisioning = "/etc/grafana/provisioning"
    files = {
        what: nodes["grafana"].bound(f"{provisioning}/{what}/qpd.yml")
        for what in ("datasources", "dashboards")
    }
    source, shown = (yaml.safe_load(file.read_text()) for file in files.values() if file)
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert source["datasources"][0]["isDefault"]
    home = nodes["grafana"].env["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(shown["providers"][0]["options"]["path"] + "/")
    dashboard = nodes["grafana"].bound(home)
    assert dashboard is not None
    variables = {v["name"]: v for v in json.loads(dashboard.read_text())["templating"]["list"]}
    assert variables["datasource"]["query"] == source["datasources"][0]["type"]
