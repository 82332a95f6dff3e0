"""The programs on real links: what leaves where, seen by the neighbours; and what PROG_TEST_RUN cannot make.

A node with the classifier on two uplinks, each a wire to a neighbour of its own.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from qpd.core.slots import qp_hash, source_port_of
from qpd.kernel import bpf
from qpd.kernel.bpf import AttachType
from qpd.model import Hook, Verdict
from tests.ebpf import packets
from tests.ebpf.harness import Classifier, Uplink
from tests.ebpf.netns import Node, _ip
from tests.ebpf.packets import Roce

pytestmark = pytest.mark.root

UPLINKS = ("up0", "up1")
DEADLINE_S = 5.0
_PACKET_VNET_HDR, _SOL_PACKET = 15, 263
_ETH_P_ALL = 3
_MARK = b"\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01\x88\xb5"
"""A frame of an EtherType for experiments (IEEE 802): sent last, it says that all before it has come."""


@dataclass
class Bench:
    """The node, its neighbours and open sockets on every interface."""

    classifier: Classifier
    node: Node
    neighbours: dict[str, Node]
    ifindex: dict[str, int]
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    senders: dict[str, socket.socket] = field(default_factory=dict)

    def path(self, uplink: str, next_hop: str, *, sole: bool = True) -> Uplink:
        return Uplink(self.ifindex[uplink], next_hop, sole=sole)

    def send(self, frame: bytes, uplink: str = "up0") -> None:
        self.senders[uplink].send(frame)

    def received(self, uplink: str) -> list[bytes]:
        """What the neighbour on this uplink got so far: RoCE and VXLAN only."""
        self.send(_MARK, uplink)
        frames = []
        while (frame := self.sockets[uplink].recv(65535))[12:14] != _MARK[12:14]:
            if frame[12:14] in {b"\x08\x00", b"\x86\xdd"} and (b"\x12\xb7" in frame or b"\x12\xb5" in frame):
                frames.append(frame)
        return frames

    def verdicts(self) -> dict[Verdict, int]:
        """Of the egress hooks, since the last call; only those that matter here."""
        now = self.classifier.maps.counters().verdicts[Hook.STEER].astype(int)
        before, self._before = getattr(self, "_before", now), now
        changed = {Verdict(n): int(count) for n, count in enumerate(now - before) if count}
        changed.pop(Verdict.NOT_ROCE, None)
        return changed


@pytest.fixture(scope="module")
def wires(session_classifier: Classifier) -> Iterator[Bench]:
    prefix = f"qpdt-{os.getpid()}-r"
    node, neighbours = Node(f"{prefix}-node"), {up: Node(f"{prefix}-{up}") for up in UPLINKS}
    with ExitStack() as stack:
        for one in (node, *neighbours.values()):
            _ip("netns", "add", one.name)
            stack.callback(_ip, "netns", "del", one.name)
        for number, (uplink, neighbour) in enumerate(neighbours.items()):
            _ip("-n", node.name, "link", "add", uplink, "mtu", "9000", "type", "veth",
                "peer", "name", uplink, "mtu", "9000", "netns", neighbour.name)  # fmt: skip
            for one, host in ((node, 1), (neighbour, 2)):
                one.run("sysctl", "-qw", f"net.ipv6.conf.{uplink}.accept_dad=0")
                one.run("ip", "link", "set", uplink, "address", f"02:00:00:00:0{number}:0{host}")
                one.run("ip", "addr", "add", f"198.51.10{number}.{host}/24", "dev", uplink)
                one.run("ip", "addr", "add", f"fe80::{number}:{host}/64", "dev", uplink, "nodad")
                one.run("ip", "link", "set", uplink, "up")
        bench = Bench(session_classifier, node, neighbours, {up: node.ifindex(up) for up in UPLINKS})
        for uplink in UPLINKS:
            for hook, where in ((Hook.STEER, AttachType.TCX_EGRESS), (Hook.OBSERVE, AttachType.TCX_INGRESS)):
                link = node.call(
                    bpf.link_create, session_classifier.programs[hook], bench.ifindex[uplink], where
                )
                stack.callback(os.close, link)
            bench.sockets[uplink] = stack.enter_context(neighbours[uplink].call(_listen, uplink))
            bench.senders[uplink] = stack.enter_context(node.call(_open, uplink))
        yield bench


def _open(interface: str) -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    one.bind((interface, 0))
    return one


def _listen(interface: str) -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    one.bind((interface, _ETH_P_ALL))
    one.settimeout(DEADLINE_S)
    return one


@pytest.fixture
def bench(wires: Bench) -> Bench:
    wires.classifier.reset()
    for uplink in UPLINKS:
        wires.node.run("ip", "neigh", "flush", "dev", uplink)
        wires.received(uplink)
    wires.verdicts()
    return wires


def deliver(bench: Bench, uplink: str) -> list[bytes]:
    """What arrives on an uplink, waiting for the first frame: a neighbour may have to be resolved before."""
    end = time.monotonic() + DEADLINE_S
    while not (frames := bench.received(uplink)):
        assert time.monotonic() < end, f"nothing came out of {uplink}"
    return frames


NEXT_HOPS = {
    "an IPv4 next hop": ("198.51.101.2", Roce()),
    "an IPv6 link-local next hop, IPv4 packet": ("fe80::1:2", Roce()),
    "an IPv6 link-local next hop, IPv6 packet": ("fe80::1:2", Roce(outer=6)),
    "an IPv4 next hop, plain RoCE": ("198.51.101.2", Roce(vni=None)),
    "an IPv6 link-local next hop, plain RoCE": ("fe80::1:2", Roce(vni=None)),
}


@pytest.mark.parametrize("resolved", [False, True], ids=["unresolved", "resolved"])
@pytest.mark.parametrize("sentence", NEXT_HOPS)
def test_a_packet_leaves_by_the_other_uplink_once_and_counts_once(
    bench: Bench, sentence: str, *, resolved: bool
) -> None:
    """Also while the next hop's address is not known yet and the packet waits for it: the guard waits with it."""
    next_hop, roce = NEXT_HOPS[sentence]
    bench.classifier.fabric([bench.path("up1", next_hop)])
    if resolved:
        bench.node.run("ip", "neigh", "replace", next_hop, "lladdr", "02:00:00:00:01:02", "dev", "up1")
    packet = roce.build()
    bench.send(packet)
    (frame,) = deliver(bench, "up1")
    assert frame[:12] == bytes.fromhex("020000000102" + "020000000101")
    if roce.vni is None:
        assert frame[12:] == packet[12:]
    else:
        version = roce.outer
        assert packets.source_port(frame, version=version) == source_port_of(qp_hash(roce.key))
        clean = packets.without_entropy(packet, version=version)
        assert packets.without_entropy(frame, version=version)[12:] == clean[12:]
    assert bench.received("up0") == []
    assert bench.verdicts() == {Verdict.REDIRECTED: 1, Verdict.SECOND_PASS: 1}
    entry = bench.classifier.entry(roce.key)
    assert entry is not None
    assert entry["packets"] == 1


def test_two_next_hops_on_one_uplink_are_told_apart(bench: Bench) -> None:
    """Both are reached by the interface that the packet is on already, so only the redirect chooses between them."""
    neighbours = {"198.51.100.2": "02:00:00:00:00:02", "198.51.100.3": "02:00:00:00:00:03"}
    for address, station in neighbours.items():
        bench.node.run("ip", "neigh", "replace", address, "lladdr", station, "dev", "up0")
    bench.classifier.fabric([bench.path("up0", address, sole=False) for address in neighbours])
    homes = {}
    for qp in range(40):
        roce = Roce(dest_qp=qp)
        bench.send(roce.build())
        (frame,) = bench.received("up0")
        entry = bench.classifier.entry(roce.key)
        assert entry is not None
        homes[frame[:6].hex(":")] = int(entry["home"])
    assert homes == {"02:00:00:00:00:02": 0, "02:00:00:00:00:03": 1}
    assert bench.verdicts() == {Verdict.REDIRECTED: 40, Verdict.SECOND_PASS: 40}


def test_the_own_path_s_packets_pass_as_they_are(bench: Bench) -> None:
    bench.classifier.fabric([bench.path("up0", "198.51.100.2")])
    packet = Roce(vni=None).build()
    bench.send(packet)
    assert bench.received("up0") == [packet]
    assert bench.verdicts() == {Verdict.OWN_PATH: 1}


def test_the_neighbour_s_packets_are_observed(bench: Bench) -> None:
    bench.classifier.maps.replace_neighbours({(bench.ifindex["up1"], "02:00:00:00:01:02"): 7})
    packet = bytes.fromhex("020000000101" + "020000000102") + Roce().build()[12:]
    sender = bench.neighbours["up1"].call(_open, "up1")
    with sender:
        sender.send(packet)
    end = time.monotonic() + DEADLINE_S
    while (entry := bench.classifier.maps.qp(Roce().key, "arrivals")) is None:
        assert time.monotonic() < end
    assert (entry["path"], entry["packets"], entry["bytes"]) == (7, 1, len(packet))


# --- Shapes that only a real link has --------------------------------------------------------------------------------


@pytest.mark.parametrize("roce", [Roce(vni=None), Roce(vni=None, inner=6)], ids=lambda roce: roce.sentence)
def test_frames_that_end_within_the_ip_header_are_truncated(bench: Bench, roce: Roce) -> None:
    bench.classifier.fabric([bench.path("up1", "198.51.101.2")])
    lengths = range(15, 14 + (20 if roce.inner == 4 else 40))
    for length in lengths:
        bench.send(roce.build()[:length])
    assert bench.received("up1") == []
    assert bench.verdicts() == {Verdict.TRUNCATED: len(lengths)}


@pytest.mark.parametrize(
    "roce", [Roce(), Roce(outer=6, inner=6), Roce(vni=None)], ids=lambda roce: roce.sentence
)
def test_headers_in_the_buffer_s_parts_are_found(bench: Bench, roce: Roce) -> None:
    """Jumbo frames of which only the first octets lie in the buffer's linear part, cut at every length."""
    bench.node.run("ip", "neigh", "replace", "fe80::1:2", "lladdr", "02:00:00:00:01:02", "dev", "up1")
    bench.classifier.fabric([bench.path("up1", "fe80::1:2")])
    packet = roce.build() + bytes(8000)
    headers = len(roce.build()) - len(packets.PAYLOAD) - 4
    sender = bench.node.call(_open, "up0")
    sender.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    with sender:
        for linear in range(14, headers + 2):
            vnet = struct.pack("=BBHHHH", 0, 0, linear, 0, 0, 0)
            sender.send(vnet + packet)
            (frame,) = bench.received("up1")
            assert frame[60:] == packet[60:], f"{linear} octets linear"
    sent = headers + 2 - 14
    assert bench.verdicts() == {Verdict.REDIRECTED: sent, Verdict.SECOND_PASS: sent}
    entry = bench.classifier.entry(roce.key)
    assert entry is not None
    assert (entry["packets"], entry["bytes"]) == (sent, sent * len(packet))


def test_a_tag_beside_the_frame_is_a_tag(bench: Bench) -> None:
    """The kernel keeps the outer tag in the buffer's metadata where the device inserts it; a redirect would lose it."""
    bench.classifier.fabric([bench.path("up1", "198.51.101.2")])
    program = bpf.prog_load(
        [
            _instruction(0xB7, dst=2, immediate=0x0081),  # 802.1Q, in network order
            _instruction(0xB7, dst=3, immediate=100),
            _instruction(0x85, immediate=18),  # bpf_skb_vlan_push
            _instruction(0xB7, immediate=-1),
            _instruction(0x95),
        ],
        name="tagger",
    )
    link = bench.node.call(_link_first, program, bench.ifindex["up0"])
    try:
        bench.send(Roce().build())
    finally:
        os.close(link)
        os.close(program)
    bench.received("up0")
    assert bench.verdicts() == {Verdict.TAGGED: 1}
    assert bench.received("up1") == []


def _link_first(program: int, ifindex: int) -> int:
    return bpf.link_create(program, ifindex, AttachType.TCX_EGRESS, first=True)


def _instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> Any:
    return int.from_bytes(struct.pack("=BBhi", code, src << 4 | dst, offset, immediate), "little")
