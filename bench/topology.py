"""A small fabric for throughput: host, leaf, two spines, leaf, host; static routes, no routing daemon.

    h1 --- l1 ===(up1, up2)=== s1, s2 ===(up1, up2)=== l2 --- h2         VXLAN 10010 between the leaves' loopbacks

The leaf's own choice is always up1 (one next hop), so that it is known which packets qpd has to move.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from bench.frames import HOST, PEER, ROCE, VNI, VXLAN
from bench.scope import Scope
from qpd.lab import namespaces

SPINES = (1, 2)
_MTU = "9000"
_HOST_MACS = {"h1": "02:00:00:00:00:a1", "h2": "02:00:00:00:00:b1"}
_ADDRESSES = {"h1": HOST, "h2": PEER}
_DROP = bytes.fromhex("0600000000000000")
"""Classic BPF: ret 0. The receiving socket wants no packet: its work would be the same with and without qpd."""
_SO_ATTACH_FILTER = 26


@dataclass(frozen=True)
class Leaf:
    """A leaf, and its uplinks: ifindex and next hop by spine."""

    namespace: str
    uplinks: dict[int, tuple[int, IPv4Address]]
    vtep: IPv4Address
    remote_vtep: IPv4Address


@dataclass(frozen=True)
class Fabric:
    """The fabric's ends and leaves. ``sender``, ``receiver``: the hosts' namespaces."""

    sender: str
    receiver: str
    left: Leaf
    right: Leaf


@contextlib.contextmanager
def fabric(scope: Scope) -> Iterator[Fabric]:
    """Build it; removed at the end."""
    names = {name: scope.namespace(name) for name in ("h1", "l1", "s1", "s2", "l2", "h2")}
    try:
        for name in names.values():
            namespaces.add(name)
            namespaces.set_sysctls(
                name, [("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.disable_ipv6", "1")]
            )
        for side in (1, 2):
            _cable(names[f"h{side}"], "eth0", names[f"l{side}"], "host")
            for spine in SPINES:
                leaf_end, spine_end = (names[f"l{side}"], f"up{spine}"), (names[f"s{spine}"], f"down{side}")
                _cable(*leaf_end, *spine_end)
                addresses = f"10.{side}.{spine}.1", f"10.{side}.{spine}.2"
                _end(*leaf_end, *addresses)
                _end(*spine_end, *addresses[::-1])
                _ip(names[f"s{spine}"], f"route add 10.255.0.{side}/32 via 10.{side}.{spine}.1")
        leaves = {side: _leaf(names[f"l{side}"], side) for side in (1, 2)}
        for host, other in (("h1", "h2"), ("h2", "h1")):
            _ip(names[host], f"addr add {_ADDRESSES[host]}/24 dev eth0")
            _ip(names[host], f"link set eth0 address {_HOST_MACS[host]}")
            _neighbour(names[host], "eth0", str(_ADDRESSES[other]), _HOST_MACS[other])
        yield Fabric(names["h1"], names["h2"], leaves[1], leaves[2])
    finally:
        for name in names.values():
            namespaces.delete(name)


def receiving_socket(namespace: str) -> socket.socket:
    """Bound to RoCE's port, so that nothing answers "port unreachable"; throws everything away."""

    def make() -> socket.socket:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # ``struct sock_fprog``: the length, and where the instructions are, which the kernel copies at once.
        import ctypes  # noqa: PLC0415

        code = ctypes.create_string_buffer(_DROP, len(_DROP))
        program = (ctypes.c_uint64 * 2)(1, ctypes.addressof(code))
        receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))
        receiver.bind((str(PEER), ROCE))
        return receiver

    return namespaces.inside(namespace, make)


def _leaf(namespace: str, side: int) -> Leaf:
    other = 3 - side
    _ip(namespace, f"addr add 10.255.0.{side}/32 dev lo")
    _ip(namespace, f"route add 10.255.0.{other}/32 via 10.{side}.1.2")
    _ip(namespace, "link add br0 up type bridge")
    _ip(
        namespace,
        f"link add vxlan0 type vxlan id {VNI} local 10.255.0.{side} dstport {VXLAN} nolearning",
    )
    _ip(namespace, "link set vxlan0 up master br0")
    _ip(namespace, "link set host master br0")
    mac = _HOST_MACS["h2" if side == 1 else "h1"]
    namespaces.run(
        ["bridge", "-n", namespace, "fdb", "append", mac, "dev", "vxlan0", "dst", f"10.255.0.{other}"]
    )
    namespaces.run(["bridge", "-n", namespace, "fdb", "append", mac, "dev", "vxlan0", "master", "static"])
    mine = _HOST_MACS["h1" if side == 1 else "h2"]
    namespaces.run(["bridge", "-n", namespace, "fdb", "append", mine, "dev", "host", "master", "static"])
    indices = namespaces.inside(
        namespace, lambda: {spine: socket.if_nametoindex(f"up{spine}") for spine in SPINES}
    )
    return Leaf(
        namespace,
        {spine: (indices[spine], IPv4Address(f"10.{side}.{spine}.2")) for spine in SPINES},
        IPv4Address(f"10.255.0.{side}"),
        IPv4Address(f"10.255.0.{other}"),
    )


def _cable(left: str, left_name: str, right: str, right_name: str) -> None:
    """A veth pair, both ends up."""
    _ip(left, f"link add {left_name} mtu {_MTU} type veth peer name {right_name} mtu {_MTU} netns {right}")
    _ip(left, f"link set {left_name} up")
    _ip(right, f"link set {right_name} up")


def _end(namespace: str, device: str, address: str, other: str) -> None:
    """Address one end of a link; its neighbour is fixed, so that no run waits for ARP."""
    _ip(namespace, f"link set {device} address {_mac(address)}")
    _ip(namespace, f"addr add {address}/30 dev {device}")
    _neighbour(namespace, device, other, _mac(other))


def _mac(address: str) -> str:
    return "02:00:" + IPv4Address(address).packed.hex(":")


def _neighbour(namespace: str, device: str, address: str, mac: str) -> None:
    _ip(namespace, f"neigh replace {address} lladdr {mac} dev {device} nud permanent")


def _ip(namespace: str, command: str) -> None:
    namespaces.run(["ip", "-n", namespace, *command.split()])
