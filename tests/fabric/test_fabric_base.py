"""The fabric without qpd: what FRR and the kernel do by themselves, and that faults are what they say.

Everything that later tests say of qpd is said against this background: if the plain fabric were wrong, they would
prove nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qpd.lab import namespaces, programs, wires
from qpd.lab.counters import Sampler
from qpd.lab.errors import LabError
from qpd.lab.fabric import DEFAULT_BFD, Fabric
from qpd.lab.topology import Endpoint, Link
from qpd.lab.traffic import Flow, Traffic, run
from qpd.lab.wire import Capture

from .judge import difference, until, until_equal
from .tcp import transfer

pytestmark = [pytest.mark.frr]

QPS = range(0x100, 0x120)


def far_pair(fabric: Fabric) -> tuple[str, str]:
    """The first and the last host: in two-dc they are in different data centres."""
    return fabric.hosts[0], fabric.hosts[-1]


def hops(fabric: Fabric, leaf: str, remote: str) -> set[str]:
    """The uplinks of a leaf's kernel route to another leaf's VTEP."""
    return {interface for interface, _ in fabric.next_hops(leaf).get(fabric.vtep(remote), [])}


def ping(fabric: Fabric, source: str, address: str, *options: str) -> bool:
    done = fabric.exec(
        source, "ping", "-q", "-c", "3", "-i", "0.05", "-W", "2", *options, address, check=False
    )
    return " 0% packet loss" in done.stdout


# --- control plane


def test_sessions_of_every_router(fabric: Fabric) -> None:
    for node in fabric.frr:
        links = fabric.topology.uplinks(node)
        peers = {
            fabric.conf(node).neighbor_on(link.end(node).interface): link.other(node).node for link in links
        }
        established = {
            address: {"state": "Established", "hostname": name} for address, name in peers.items() if address
        }
        summary = fabric.show(node, "show bgp summary json")
        expected = {"ipv4Unicast": {"peers": established}, "l2VpnEvpn": {"peers": established}}
        assert difference(expected, summary) is None
        bfd = [
            {"status": "up", "transmit-interval": DEFAULT_BFD[0], "detect-multiplier": DEFAULT_BFD[1]}
            for _ in links
        ]
        assert difference(bfd, fabric.show(node, "show bfd peers json")) is None
        assert len(fabric.bfd_sessions(node)) == len(links)


def test_vteps_see_each_other_across_autonomous_systems(fabric: Fabric) -> None:
    """Spines pass EVPN routes on with the VTEP as next hop, and leaves of other AS numbers import them."""
    for leaf in fabric.leaves:
        others = {fabric.vtep(other) for other in fabric.leaves if other != leaf}
        assert fabric.flood_list(leaf) == others
        routes = fabric.show(leaf, "show bgp l2vpn evpn route type multicast json")
        seen = set(re.findall(r'"ip":\s*"(10\.255\.[0-9.]+)"', json.dumps(routes)))
        assert others <= seen


def test_the_fib_has_every_uplink_for_every_vtep(fabric: Fabric) -> None:
    for leaf in fabric.leaves:
        uplinks = {link.end(leaf).interface for link in fabric.topology.uplinks(leaf)}
        for other in fabric.leaves:
            if other != leaf:
                assert hops(fabric, leaf, other) == uplinks


def test_spines_use_both_inter_site_links(two_dc: Fabric) -> None:
    for spine in two_dc.spines:
        for leaf in two_dc.leaves:
            if leaf[:3] != spine[:3]:
                assert hops(two_dc, spine, leaf) == {"eth4", "eth5"}


def test_three_kinds_of_next_hops(two_dc: Fabric, four_spine: Fabric) -> None:
    """Numbered; BGP unnumbered as FRR writes it inline; and with nexthop objects, where IPv6 shows."""

    def gateways(fabric: Fabric, leaf: str, remote: str) -> set[str]:
        return {gateway for _, gateway in fabric.next_hops(leaf)[fabric.vtep(remote)]}

    assert gateways(two_dc, "dc1-leaf1", "dc2-leaf1") == {"10.1.11.0", "10.1.11.2"}
    assert gateways(four_spine, "leaf1", "leaf2") == {"169.254.0.1"}
    assert all(address.startswith("fe80::") for address in gateways(four_spine, "leaf3", "leaf1"))
    assert len(gateways(four_spine, "leaf3", "leaf1")) == 4


def test_an_ipv6_destination_has_link_local_next_hops(four_spine: Fabric) -> None:
    routes = json.loads(four_spine.exec("leaf1", "ip", "-6", "-j", "route", "show", "fd00:255::12").stdout)
    found = {(hop["dev"], hop["gateway"][:6]) for hop in routes[0]["nexthops"]}
    assert found == {(f"eth{i}", "fe80::") for i in range(1, 5)}
    source = ["-I", "fd00:255::11"]
    assert ping(four_spine, "leaf1", "fd00:255::12", "-6", *source)


# --- hosts


def test_hosts_reach_each_other(fabric: Fabric) -> None:
    source = fabric.hosts[0]
    for other in fabric.hosts[1:]:
        assert ping(fabric, source, fabric.address(other))
        assert ping(fabric, source, fabric.address(other, 6), "-6")


def test_arp_is_answered_by_the_far_host_itself(fabric: Fabric) -> None:
    source, other = far_pair(fabric)
    interface = fabric.topology.links_of(source)[0].end(source).interface
    fabric.exec(source, "ip", "neighbor", "flush", "dev", interface)
    assert ping(fabric, source, fabric.address(other))
    entry = json.loads(fabric.exec(source, "ip", "-j", "neighbor", "show", fabric.address(other)).stdout)[0]
    link = json.loads(fabric.exec(other, "ip", "-j", "link", "show", "dev", "eth1").stdout)[0]
    assert entry["lladdr"] == link["address"]


def test_a_full_size_packet_fits_and_one_byte_more_does_not(fabric: Fabric) -> None:
    source, other = far_pair(fabric)
    room = 4200 - 20 - 8
    assert ping(fabric, source, fabric.address(other), "-M", "do", "-s", str(room))
    assert not ping(fabric, source, fabric.address(other), "-M", "do", "-s", str(room + 1))


def test_tcp_carries_every_byte(fabric: Fabric) -> None:
    """20 MB: segmentation and checksum offload are at work between the namespaces."""
    transfer(fabric, *far_pair(fabric))


# --- the kernel's own way with RoCE


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """What is started meanwhile stays on one CPU."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


async def test_all_qps_of_a_host_pair_leave_by_one_uplink(fabric: Fabric) -> None:
    """A plain Linux VTEP caches the outer route: the reason for qpd. Two judges that know nothing of each other."""
    source, other = far_pair(fabric)
    leaf = fabric.topology.leaf_of(source)
    uplinks = [link.end(leaf) for link in fabric.topology.uplinks(leaf)]
    packets = 20
    async with Sampler(fabric, uplinks) as sampler, Capture.of_uplinks(fabric, leaf) as capture:
        traffic = Traffic(fabric, [Flow(source, other, QPS, rate=50)], packets=packets)
        # vxlan remembers the outer route for each CPU by itself.
        with on_one_cpu():
            await traffic.start()
        result = await traffic.wait()
    assert (result.sent, result.lost, result.overflows) == (packets * len(QPS), 0, 0)
    by_counter = [end for end, count in sampler.series.totals("tx_packets").items() if count >= result.sent]
    assert len(by_counter) == 1

    seen = await capture.decode()
    by_tshark = seen.links_by_qp()
    assert set(by_tshark) == set(QPS)
    (far_end,) = {end for places in by_tshark.values() for end in places}
    assert far_end == fabric.link(str(by_counter[0])).other(leaf)
    assert all(sum(places.values()) == packets for places in by_tshark.values())
    sample = seen.packets[far_end][0]
    assert (sample.vni, sample.host) == (100, fabric.address(other))
    assert sample.outer_destination == fabric.vtep(fabric.topology.leaf_of(other))


def test_traffic_over_ipv6_with_linux_ports_and_both_ways(fabric: Fabric) -> None:
    source, other = far_pair(fabric)
    flows = [
        Flow(source, other, range(1, 5), rate=200, family=6, source_port=None, first_psn=0xFFFFF0),
        Flow(other, source, range(1, 5), rate=200),
    ]
    result = run(fabric, flows, packets=50)
    assert [(qp.received, qp.lost, qp.arrivals.out_of_order) for qp in result.qps] == [(50, 0, 0)] * 8
    assert result.qp(1).arrivals.last_psn == 0xFFFFF0 + 49


def test_a_qp_in_two_flows_is_refused(two_dc: Fabric) -> None:
    flows = [Flow("dc1-host1", "dc2-host1", [5]), Flow("dc1-host2", "dc2-host1", [5])]
    with pytest.raises(LabError, match="QP 0x5 of dc2-host1 is in two flows"):
        Traffic(two_dc, flows)


# --- namespaces are machines


def test_every_node_has_a_hash_seed_of_its_own(fabric: Fabric) -> None:
    seeds = [
        fabric.exec(node, "cat", "/proc/sys/net/ipv4/fib_multipath_hash_seed", check=False).stdout.strip()
        for node in fabric.frr
    ]
    if not any(seeds):
        pytest.skip("this kernel has no net.ipv4.fib_multipath_hash_seed (it came with 6.11)")
    assert len(set(seeds)) == len(seeds)
    assert "0" not in seeds


def tcx_programs(namespace: str, interface: str) -> int:
    """How many TCX ingress programs an interface has (BPF_PROG_QUERY)."""

    def query() -> int:
        attributes = struct.pack("<IIIIQI", socket.if_nametoindex(interface), 46, 0, 0, 0, 0)
        buffer = ctypes.create_string_buffer(attributes, 128)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syscall(321 if os.uname().machine == "x86_64" else 280, 16, buffer, 128) == 0
        return int(struct.unpack_from("<I", buffer.raw, 24)[0])

    return namespaces.inside(namespace, query)


def test_wires_forget_the_packet_hash(fabric: Fabric) -> None:
    """One program at every underlay interface, and it lives on when the link has been down."""
    program = programs.load_forget_hash()
    try:
        namespace = fabric.namespace(fabric.spines[0])
        if not namespaces.inside(namespace, lambda: programs.attach_forget_hash(program, [])):
            pytest.skip("this kernel has no TCX (it came with 6.6)")
    finally:
        os.close(program)
    link = fabric.topology.fabric_links[0]
    fabric.cut(link)
    fabric.heal(link)
    for one in fabric.topology.fabric_links:
        for end in one.ends:
            assert tcx_programs(fabric.namespace(end.node), end.interface) == 1


def test_wires_forget_the_packet_hash_without_tcx_too(two_dc: Fabric) -> None:
    """Kernels before 6.6: clsact filters, which here come on top of TCX and go again."""
    namespace, pins = two_dc.namespace("dc1-leaf1"), two_dc.state.pins
    program = programs.load_forget_hash()
    try:
        wires.attach_clsact(program, namespace, ["eth1", "eth2"], pins)
        for interface in ("eth1", "eth2"):
            shown = two_dc.exec("dc1-leaf1", "tc", "filter", "show", "dev", interface, "ingress").stdout
            assert shown.count("name forget_hash") == 1
        assert not list(pins.glob("forget_hash"))
        assert ping(two_dc, "dc1-host1", two_dc.address("dc2-host1")), "what is forgotten is not lost"
    finally:
        os.close(program)
        for interface in ("eth1", "eth2"):
            two_dc.exec("dc1-leaf1", "tc", "qdisc", "del", "dev", interface, "clsact", check=False)


# --- faults


def first_uplink(fabric: Fabric) -> tuple[Link, str, str]:
    """The first uplink of the first leaf, with the leaf and a remote leaf."""
    leaf = fabric.leaves[0]
    return fabric.topology.uplinks(leaf)[0], leaf, fabric.leaves[-1]


@pytest.mark.parametrize("side", ["leaf", "spine"])
def test_a_cut_link_leaves_the_fib_and_comes_back(fabric: Fabric, side: str) -> None:
    link, leaf, remote = first_uplink(fabric)
    every = hops(fabric, leaf, remote)
    dead = link.end(leaf).interface
    fabric.cut(link, leaf if side == "leaf" else link.other(leaf).node)
    until_equal(lambda: hops(fabric, leaf, remote), every - {dead})
    # The way back, from the far leaf, may heal later.
    until_equal(lambda: ping(fabric, fabric.hosts[0], fabric.address(fabric.hosts[-1])), True)
    fabric.heal(link)
    until_equal(lambda: hops(fabric, leaf, remote), every)
    fabric.wait_converged()


def carrier(fabric: Fabric, link: Link) -> set[str]:
    return {
        json.loads(fabric.exec(end.node, "ip", "-j", "link", "show", "dev", end.interface).stdout)[0][
            "operstate"
        ]
        for end in link.ends
    }


@pytest.mark.parametrize("towards", [None, "leaf", "spine"])
def test_silent_loss_is_found_by_bfd_alone(fabric: Fabric, towards: str | None) -> None:
    link, leaf, remote = first_uplink(fabric)
    every = hops(fabric, leaf, remote)
    target = None if towards is None else leaf if towards == "leaf" else link.other(leaf).node
    fabric.lose(link, target)
    until_equal(lambda: hops(fabric, leaf, remote), every - {link.end(leaf).interface})
    assert carrier(fabric, link) == {"UP"}
    # The end that hears nothing says Down; the other end may already try anew.
    deaf = target or leaf
    until_equal(lambda: fabric.bfd_peer(deaf, link)["status"], "down")
    fabric.heal(link)
    fabric.wait_converged()
    assert hops(fabric, leaf, remote) == every


def test_one_way_loss_loses_one_way(two_dc: Fabric) -> None:
    """Judged by packets that the peer's interface has counted: those that it never saw and those that it did."""
    link = two_dc.link("dc1-leaf1:eth3")
    host, leaf = "dc1-host1", "dc1-leaf1"
    with two_dc.fault(link, towards=leaf):
        lost = two_dc.exec(
            host, "ping", "-q", "-c", "3", "-i", "0.05", "-W", "1", "172.16.100.12", check=False
        )
        assert " 100% packet loss" in lost.stdout
        result = run(two_dc, [Flow("dc1-host2", host, [9], rate=500)], packets=50)
        assert result.received in {0, 50}, "all or, with an ARP entry that has run out, nothing"
    assert ping(two_dc, host, "172.16.100.12")


def test_gray_loss_loses_its_part(two_dc: Fabric) -> None:
    """2 000 packets at 30 %: the part lost is within five standard deviations (1 % each) of it."""
    source, other = "dc1-host1", "dc1-host2"
    assert ping(two_dc, source, two_dc.address(other))
    link = two_dc.link("dc1-leaf2:eth3")
    with two_dc.fault(link, towards=other, probability=0.3):
        result = run(two_dc, [Flow(source, other, range(1, 5), rate=1000)], packets=500)
    assert result.overflows == 0
    assert 0.25 < result.lost / result.sent < 0.35
    assert run(two_dc, [Flow(source, other, [1], rate=500)], packets=50).lost == 0


def test_bfd_timers_change_at_both_ends(fabric: Fabric) -> None:
    link, leaf, _ = first_uplink(fabric)

    def timers() -> list[tuple[int, int, str]]:
        peers = [fabric.bfd_peer(end.node, link) for end in link.ends]
        return [(p["transmit-interval"], p["remote-transmit-interval"], p["status"]) for p in peers]

    assert timers() == [(100, 100, "up")] * 2
    fabric.set_bfd(link, 30, 3)
    until_equal(timers, [(30, 30, "up")] * 2)
    fabric.set_bfd(link, *DEFAULT_BFD)
    until_equal(timers, [(100, 100, "up")] * 2)
    others = [one for one in fabric.topology.uplinks(leaf) if one != link]
    assert {fabric.bfd_peer(leaf, one)["transmit-interval"] for one in others} == {100}


async def test_an_outage_is_seen_at_the_receiver(two_dc: Fabric) -> None:
    """Silent loss of the uplink that carries the QPs: all of them stop, and go on by the other one."""
    source, other = far_pair(two_dc)
    leaf = two_dc.topology.leaf_of(source)
    uplinks = {link.end(leaf): link for link in two_dc.topology.uplinks(leaf)}
    traffic = Traffic(two_dc, [Flow(source, other, QPS, rate=100)])
    async with Sampler(two_dc, list(uplinks), 0.05) as sampler:
        await traffic.start()
        used = await _busiest(sampler)
        two_dc.lose(uplinks[used], link_far(uplinks[used], leaf))
        spare = next(end for end in uplinks if end != used)
        await _carries(sampler, spare)
        result = await traffic.stop()
    assert result.outage_ns > 1e6 * DEFAULT_BFD[0] * (DEFAULT_BFD[1] - 1), "BFD needs that long at least"
    assert all(qp.lost > 0 for qp in result.qps)
    assert all(qp.arrivals.missing == qp.lost for qp in result.qps), "lost in the middle, none at the end"


def link_far(link: Link, node: str) -> str:
    return link.other(node).node


async def _poll(question: Callable[[], bool], deadline: float = 30.0) -> None:
    limit = time.monotonic() + deadline
    while not question():
        assert time.monotonic() < limit
        await asyncio.sleep(0.05)


async def _busiest(sampler: Sampler) -> Endpoint:
    await _poll(lambda: max(sampler.series.totals().values()) > 200)
    totals = sampler.series.totals()
    return max(totals, key=lambda end: totals[end])


async def _carries(sampler: Sampler, endpoint: Endpoint) -> None:
    def rate() -> bool:
        return (
            len(sampler.series.times_ns) > 3
            and sampler.series.rates(endpoint, "tx_packets")[-2:].min() > 1000
        )

    await _poll(rate)


# --- up and down


def traces(name: str) -> list[str]:
    """Whatever of a lab is on this machine."""
    places = ["/run/netns", "/var/run/frr", "/etc/frr", "/run/qplab", "/sys/fs/bpf/qplab"]
    found = [str(entry) for place in places for entry in Path(place).glob(f"{name}*")]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes()
        except OSError:
            continue
        if f"-N\0{name}".encode() in command:
            found.append(f"{process.parent.name}: {command!r}")
    return found


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("stage", ["namespaces", "interfaces", "FRR on", "converge"])
def test_an_interrupted_up_leaves_nothing(stage: str, signal_name: str) -> None:
    """Ctrl-C and SIGTERM clean up by themselves; after SIGKILL `qplab down` does."""
    import signal
    import subprocess

    from .conftest import LABS, lab_name

    name = lab_name("cut")
    command = [sys.executable, "-m", "qpd.lab", "up", str(LABS / "four-spine"), "--no-qpd", "--name", name]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if stage in line:
                break
        else:
            pytest.fail(f"qplab up ended before the stage {stage!r}")
        process.send_signal(getattr(signal, signal_name))
        process.stderr.read()
        status = process.wait(timeout=60)
    if signal_name == "SIGKILL":
        assert status == -signal.SIGKILL
        assert traces(name), "nothing was made yet: the test proves nothing"
        subprocess.run([sys.executable, "-m", "qpd.lab", "down", name], check=True, stdout=subprocess.DEVNULL)
    else:
        assert status == 130
    assert traces(name) == []


def test_up_refuses_what_is_up_and_changes_nothing(four_spine: Fabric) -> None:
    before = traces(four_spine.name)
    with pytest.raises(LabError, match="is up already"):
        Fabric.load(four_spine.topology.path, four_spine.name).up(qpd=False)
    assert traces(four_spine.name) == before
    assert four_spine.health().converged


def test_a_process_of_the_lab_ends_with_it_and_no_other_does() -> None:
    from .conftest import LABS, lab_name

    fabric = Fabric.load(LABS / "four-spine", lab_name("down"))
    import subprocess

    with subprocess.Popen(["sleep", "300"]) as outside:
        try:
            fabric.up(qpd=False)
            with fabric.popen("host1", "sleep", "300") as inside:
                fabric.down()
                assert inside.wait(timeout=10) != 0
            assert outside.poll() is None
        finally:
            fabric.down()
            outside.kill()
    until(lambda: str(left) if (left := traces(fabric.name)) else None)
