"""The measured frames are what their names say, by Scapy's reading."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from scapy.contrib.roce import BTH
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from bench import frames

QP = 0x800002


@pytest.mark.parametrize("vtep", ["10.255.0.2", "fd00::2"])
def test_vxlan_frames_hold_a_roce_packet_of_the_qp(vtep: str) -> None:
    frame = frames.vxlan(ip_address(vtep), QP)
    packet = Ether(frame.octets)
    assert packet[VXLAN].vni == frames.VNI
    assert packet[VXLAN][UDP].dport == frames.ROCE
    assert packet[VXLAN][BTH].dqpn == QP
    assert packet[UDP].dport == frames.VXLAN
    assert packet[UDP].sport == frame.port == int.from_bytes(frame.octets[frame.port_at :][:2], "big")


def test_over_ipv6_the_outer_checksum_is_right() -> None:
    frame = frames.vxlan(ip_address("fd00::2"), QP)
    packet = Ether(frame.octets)
    assert packet[UDP].chksum == frame.check != 0
    del packet[UDP].chksum
    assert Ether(bytes(packet))[UDP].chksum == frame.check


def test_the_plain_frame_is_roce_without_vxlan() -> None:
    packet = Ether(frames.plain(ip_address("10.20.0.2"), QP).octets)
    assert VXLAN not in packet
    assert packet[BTH].dqpn == QP
    assert (packet[IP].dst, packet[UDP].dport) == ("10.20.0.2", frames.ROCE)


@pytest.mark.parametrize("kind", ["plain", "vxlan"])
def test_the_offset_of_the_destination_qp_is_where_a_harness_may_write_another(kind: str) -> None:
    frame = getattr(frames, kind)(ip_address("10.255.0.2"), QP)
    octets = bytearray(frame.octets)
    octets[frame.qp_at : frame.qp_at + 4] = (77).to_bytes(4, "big")
    assert Ether(bytes(octets))[BTH].dqpn == 77


def test_the_tcp_frames_are_tcp() -> None:
    vtep = ip_address("10.255.0.2")
    assert Ether(frames.tcp(vtep).octets)[TCP].dport == 5201
    assert Ether(frames.vxlan_tcp(vtep).octets)[VXLAN][TCP].dport == 5201
    assert IPv6 not in Ether(frames.tcp(vtep).octets)
