"""Labs as containerlab deploys them: the same facts as where `qplab up` makes them from the same files.

QPDT_LABS says which labs (docs/containers.md). For each the tests run in the order of this file: the last one takes it
away.
"""

from __future__ import annotations

import json
import re
import urllib.request
from functools import partial
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from qpd.lab.topology import Role
from qpd.lab.traffic import Flow, run
from tests.fabric import test_fabric_base as facts
from tests.fabric.judge import difference, until

from .lab import ContainerLab

# The first of them waits for containerlab and for the lab.
pytestmark = pytest.mark.timeout(840)

CONVERGE = 300.0
"""Up to 16 routers, and sidecars that compile, on a machine that may be busy."""
QPS = range(0x100, 0x120)
PACKETS = 200
DETECTION = 0.3


def rows(lab: ContainerLab, leaf: str, question: str) -> Any:
    answer = lab.sidecar(leaf).get(question)
    assert answer is not None, f"{leaf}: no answer to {question}"
    return answer


def steers(lab: ContainerLab, leaf: str) -> None:
    def question() -> str | None:
        api = lab.sidecar(leaf)
        status, paths = api.status(), api.get("/v1/paths") or []
        uplinks = lab.topology.uplinks(leaf)
        if status and status["state"] == "steering" and [p["state"] for p in paths] == ["up"] * len(uplinks):
            return None
        return f"{leaf}: {status}, {paths}; {lab.last_words(leaf)}"

    until(question, CONVERGE, pause=1.0)


def test_it_converges(lab: ContainerLab) -> None:
    lab.wait_converged(CONVERGE)


def test_nothing_is_privileged(lab: ContainerLab) -> None:
    assert {lab.inspect(node, ".HostConfig.Privileged") for node in lab.topology.nodes} == {"false"}


def test_sidecars_are_given_three_capabilities(lab: ContainerLab) -> None:
    """By their names where the engine knows these; the older ones that stand for two of them elsewhere."""
    variables = lab.environment
    expected = {
        "NET_ADMIN",
        variables.get("QPLAB_CAP_BPF", "BPF"),
        variables.get("QPLAB_CAP_PERFMON", "PERFMON"),
    }
    for leaf in lab.leaves:
        beside = lab.topology.sidecar(leaf)
        assert beside is not None
        added = json.loads(lab.inspect(beside.name, "json .HostConfig.CapAdd"))
        assert {name.removeprefix("CAP_") for name in added} == expected


def test_qpd_started_when_frr_was_healthy(lab: ContainerLab) -> None:
    for leaf in lab.leaves:
        beside = lab.topology.sidecar(leaf)
        assert beside is not None
        assert lab.inspect(leaf, ".State.Health.Status") == "healthy"
        healthy = json.loads(lab.inspect(leaf, "json .State.Health.Log"))
        created = lab.inspect(beside.name, ".Created")
        # The log keeps five checks: the first good one may have left it already.
        assert created > healthy[0]["End"] or len(healthy) == 5, (created, healthy)


def test_addresses_are_those_of_the_files(lab: ContainerLab) -> None:
    """What `qplab up` gives to namespaces: the links' and loopbacks' addresses of frr.conf, the hosts' of `exec`."""
    for node in lab.topology.machines:
        links = lab.topology.links_of(node.name)
        shown = json.loads(lab.exec(node.name, "ip", "-j", "address", "show").stdout)
        have = {
            f"{one['ifname']} {address['local']}/{address['prefixlen']}"
            for one in shown
            if one["ifname"] != "eth0"
            for address in one["addr_info"]
            if address["scope"] == "global" and (address["family"] == "inet" or node.name not in lab.frr)
        }
        if node.name in lab.frr:
            wanted = {
                f"{interface} {address}"
                for interface, addresses in lab.conf(node.name).addresses.items()
                # A cut lab leaves ports out.
                if interface in {"lo", *(link.end(node.name).interface for link in links)}
                for address in addresses
            }
        else:
            adds = [command for command in node.commands() if command[:3] == ["ip", "address", "add"]]
            wanted = {f"{command[5]} {ip_interface(command[3])}" for command in adds}
            # The routed subnet is there where the kernel has VLAN devices.
            have = {one for one in have if not one.startswith("eth1.20 ")}
        assert wanted
        assert {one for one in have if ".20 " not in one} == wanted, node.name
        for link in links:
            mtu = {one["ifname"]: one["mtu"] for one in shown}[link.end(node.name).interface]
            assert mtu == link.mtu


@pytest.mark.parametrize("role", [Role.SPINE, Role.LEAF])
def test_sessions_of_every_router(lab: ContainerLab, role: Role) -> None:
    """Each link has a BGP session for both families, and a BFD session; the peers know each other's host names."""
    for node in lab.topology.of_role(role):
        links = lab.topology.uplinks(node.name)
        peers = {lab.conf(node.name).neighbor_on(link.end(node.name).interface): link for link in links}
        states = {
            address: {"state": "Established", "hostname": link.other(node.name).node}
            for address, link in peers.items()
        }
        expected = {"ipv4Unicast": {"peers": states}, "l2VpnEvpn": {"peers": states}}
        assert difference(expected, lab.show(node.name, "show bgp summary json")) is None
        assert {lab.bfd_peer(node.name, link)["status"] for link in links} == {"up"}


def test_vteps_see_each_other(lab: ContainerLab) -> None:
    facts.test_vteps_see_each_other_across_autonomous_systems(lab)


def test_the_fib_has_every_uplink_for_every_vtep(lab: ContainerLab) -> None:
    facts.test_the_fib_has_every_uplink_for_every_vtep(lab)


def test_spines_use_every_shortest_way(lab: ContainerLab) -> None:
    """To a leaf of their own by its link, to those of a site that they are joined to by all links to that site."""
    for spine in lab.spines:
        towards: dict[str, set[str]] = {}
        for link in lab.topology.uplinks(spine):
            other = link.other(spine).node
            place = lab.topology.site(other) if link in lab.topology.inter_site_links else other
            towards.setdefault(place, set()).add(link.end(spine).interface)
        ways = {
            leaf: towards.get(leaf) or towards.get(lab.topology.site(leaf)) for leaf in lab.leaves
        }  # fmt: skip
        assert any(ways.values())
        for leaf, interfaces in ways.items():
            assert interfaces in (None, facts.hops(lab, spine, leaf)), f"{spine} to {leaf}"


def test_every_host_reaches_every_other(lab: ContainerLab) -> None:
    for source in lab.hosts:
        for other in lab.hosts:
            if source < other:
                assert facts.ping(lab, source, lab.address(other)), f"{source} to {other}"
    assert facts.ping(lab, lab.hosts[0], lab.address(lab.hosts[-1], 6)), "over IPv6"


def test_qpd_knows_what_frr_knows(lab: ContainerLab) -> None:
    """Of each path: the peer's name from bgpd, and the session from bfdd with the detection time of frr.conf."""
    for leaf in lab.leaves:
        steers(lab, leaf)
        expected = [
            {
                "interface": link.end(leaf).interface,
                "name": link.other(leaf).node,
                "bfd": {"state": "up", "detection_time_s": DETECTION},
            }
            for link in lab.topology.uplinks(leaf)
        ]
        until(
            partial(lambda leaf, expected: difference(expected, rows(lab, leaf, "/v1/paths")), leaf, expected)
        )
        assert rows(lab, leaf, "/v1/status")["frr"] == {"bfdd": True, "bgpd": True, "zebra": True}


def test_qpd_steers(lab: ContainerLab) -> None:
    """32 QPs with one source port: as many packets by each uplink, which the interfaces count; none is lost."""
    leaf = lab.leaves[0]
    steers(lab, leaf)
    names = [link.end(leaf).interface for link in lab.topology.uplinks(leaf)]
    before = lab.counters(leaf)
    result = run(lab, [Flow(lab.hosts[0], lab.hosts[-1], QPS, rate=100)], packets=PACKETS)
    after = lab.counters(leaf)
    assert result.lost == 0
    sent = [after[name].tx_packets - before[name].tx_packets for name in names]
    share = PACKETS * len(QPS) / len(names)
    # More than the share: BGP, BFD and answers of the host.
    assert all(share <= count < 1.5 * share for count in sent), sent
    known = [row for row in rows(lab, leaf, "/v1/qps") if row["dest_qp"] in QPS]
    assert {row["dest_qp"]: row["packets"] for row in known} == dict.fromkeys(QPS, PACKETS)
    assert all(row["path"] == row["home"] for row in known)


def homes(lab: ContainerLab, leaf: str) -> dict[int, str]:
    return {row["dest_qp"]: row["home"] for row in rows(lab, leaf, "/v1/qps") if row["dest_qp"] in QPS}


def test_a_sidecar_that_starts_again_finds_its_queue_pairs(lab: ContainerLab) -> None:
    """The pins are the machine's, not the container's: no QP gets another home."""
    leaf = lab.leaves[0]
    before = homes(lab, leaf)
    assert set(before) == set(QPS)
    lab.engine.docker("restart", "--time=10", f"{leaf}-qpd")
    steers(lab, leaf)
    assert homes(lab, leaf) == before
    assert len(list(lab.pins(leaf).iterdir())) == 1


def test_a_silent_link_is_left_and_taken_again(lab: ContainerLab) -> None:
    """Only BFD can see it: bfdd says so, the path is down, its QPs are elsewhere; and they come home."""
    leaf = lab.leaves[0]
    link = lab.topology.uplinks(leaf)[0]
    name = link.other(leaf).node
    before = homes(lab, leaf)

    def path_is(state: str, bfd: str) -> None:
        expected = [{"name": name, "state": state, "bfd": {"state": bfd}}]
        until(lambda: difference(expected, rows(lab, leaf, "/v1/paths")), CONVERGE)

    lab.lose(link)
    try:
        path_is("down", "down")
        moved = {row["dest_qp"] for row in rows(lab, leaf, "/v1/qps") if row["path"] != row["home"]}
        assert {qp for qp, home in before.items() if home == name} == moved & set(QPS) != set()
    finally:
        lab.heal(link)
    path_is("up", "up")
    lab.wait_converged(CONVERGE)
    steers(lab, leaf)
    assert homes(lab, leaf) == before


def test_prometheus_scrapes_every_leaf_and_has_the_rules(lab: ContainerLab) -> None:
    for leaf in lab.leaves:
        steers(lab, leaf)
    address = lab.inspect("prometheus", '(index .NetworkSettings.Networks "clab").IPAddress')

    def ask(question: str) -> Any:
        with urllib.request.urlopen(f"http://{address}:9090/api/v1/{question}", timeout=10) as answer:
            return json.load(answer)["data"]

    def question() -> str | None:
        up = {one["metric"]["instance"].partition(":")[0] for one in ask("query?query=qpd_path_up")["result"]}
        return None if up == set(lab.leaves) else f"leaves with qpd_path_up: {sorted(up)}"

    until(question, 60, pause=1.0)
    assert any(group["rules"] for group in ask("rules")["groups"])


def test_destroy_leaves_nothing(lab: ContainerLab) -> None:
    containers = list(lab.topology.nodes)
    assert all(lab.pins(leaf).exists() for leaf in lab.leaves), "nothing was there: the test proves nothing"
    lab.destroy()
    listed = lab.engine.docker("ps", "--all", "--format={{.Names}}").stdout.split()
    assert not set(listed) & set(containers)
    assert lab.engine.docker("volume", "ls", "--quiet").stdout.split() == []
    networks = lab.engine.docker("network", "ls", "--format={{.Name}}").stdout.split()
    assert set(networks) <= {"none", "host", "bridge"}
    assert not [node for node in containers if Path("/run/netns", node).is_symlink()]
    assert not [leaf for leaf in lab.leaves if lab.pins(leaf).exists()]
    named = "|".join(map(re.escape, lab.topology.nodes))
    assert not re.findall(rf"\b({named})\b|clab-{lab.topology.name}", Path("/etc/hosts").read_text())
    assert not Path("/etc/ssh/ssh_config.d", f"clab-{lab.topology.name}.conf").exists()
    assert not list(lab.topology.path.parent.glob("clab-*"))
