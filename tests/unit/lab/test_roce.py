"""Test packets: headers and ICRC, against a captured frame, Scapy's ICRC and the definition."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.lab import roce
from qpd.lab.sender import Ring, Spec

# An acknowledgement between two Soft-RoCE hosts, from the Ethernet header to the ICRC, as the Linux kernel made it.
CAPTURED = bytes.fromhex(
    "525400000001525400000002080045000030a3a5400040113ef4ac100002ac100001"
    "c2db12b7001c0000"
    "1100ffff00000011008d72b1"
    "1f000001"
    "22c0371e"
)


def test_icrc_of_a_captured_frame() -> None:
    ip, udp, transport = CAPTURED[14:34], CAPTURED[34:42], CAPTURED[42:]
    assert roce.icrc(ip, udp, transport[:-4]) == transport[-4:]


def test_bth_of_a_captured_frame() -> None:
    # Soft-RoCE leaves the migration bit clear; everything else is the same.
    captured = CAPTURED[42:54]
    made = roce.bth(roce.Opcode.ACKNOWLEDGE, 0x11, 0x8D72B1)
    assert made[:1] + made[2:] == captured[:1] + captured[2:]


@pytest.mark.parametrize("addresses", [("172.16.100.11", "172.16.100.21"), ("fd00:100::11", "fd00:100::21")])
def test_scapy_agrees(addresses: tuple[str, str]) -> None:
    from scapy.contrib.roce import BTH
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6

    source, destination = addresses
    transport = roce.bth(roce.Opcode.SEND_ONLY, 0x123456, 0xABCDEF, ack_request=True) + b"data"
    header = roce.ip_header(source, destination, 8 + len(transport) + 4)
    udp = struct.pack(">HHHH", 49152, 4791, 8 + len(transport) + 4, 0)
    network = IPv6 if ":" in source else IP
    packet = network(header + udp + transport + bytes(4))
    assert BTH in packet
    assert packet[UDP].dport == 4791
    assert packet[BTH].dqpn == 0x123456
    assert packet[BTH].psn == 0xABCDEF
    assert packet[BTH].ackreq == 1
    assert roce.icrc(header, udp, transport) == packet[BTH].compute_icrc(bytes(4))[:4]


@settings(deadline=None)
@given(st.integers(0, 0xFFFFFF), st.booleans(), st.integers(1, 0xFFFFFF), st.sampled_from([0, 1, 64, 255]))
def test_the_table_gives_the_icrc_of_every_psn(psn: int, ack: bool, qp: int, size: int) -> None:
    template = roce.Template("10.0.0.1", "10.0.0.2", 50000, qp, size=size)
    changed = roce.bth(roce.Opcode.SEND_ONLY, qp, psn, ack_request=ack)
    value = template.base
    for position, byte in enumerate(changed[8:12]):
        value ^= int(template.contributions()[position, byte])
    transport = changed + template.transport[12:]
    length = 8 + len(transport) + 4
    udp = struct.pack(">HHHH", 50000, 4791, length, 0)
    header = roce.ip_header("10.0.0.1", "10.0.0.2", length)
    assert struct.pack("<I", value) == roce.icrc(header, udp, transport)


@pytest.mark.parametrize("opcode", [roce.Opcode.SEND_ONLY, roce.Opcode.WRITE_MIDDLE, roce.Opcode.WRITE_ONLY])
def test_prepared_packets_run_through_qps_and_psns(opcode: roce.Opcode) -> None:
    spec = Spec(
        "127.0.0.1", "127.0.0.1", [7, 8, 9], [0], size=16, opcode=opcode, first_psn=0xFFFFFE, ack_every=2
    )
    ring = Ring(spec, 0, spec.qps)
    try:
        rows = ring.rows[:9]
        qps = rows[:, 5].astype(int) << 16 | rows[:, 6].astype(int) << 8 | rows[:, 7]
        psns = rows[:, 9].astype(int) << 16 | rows[:, 10].astype(int) << 8 | rows[:, 11]
        assert qps.tolist() == [7, 8, 9] * 3
        assert psns.tolist() == [0xFFFFFE] * 3 + [0xFFFFFF] * 3 + [0] * 3, "24 bits, then from the start"
        assert (rows[:, 8] >> 7).tolist() == [0] * 3 + [1] * 3 + [0] * 3
        for row in rows:
            transport = row.tobytes()
            udp = struct.pack(">HHHH", 0, 4791, 8 + len(transport), 0)
            header = roce.ip_header("127.0.0.1", "127.0.0.1", 8 + len(transport))
            assert roce.icrc(header, udp, transport[:-4]) == transport[-4:]
    finally:
        ring.socket.close()


@given(st.integers(1, 0xFFFFFF), st.integers(1, 0xFFFFFF))
def test_linux_ports_are_symmetric_and_ephemeral(a: int, b: int) -> None:
    port = roce.linux_source_port(a, b)
    assert port == roce.linux_source_port(b, a)
    assert 0xC000 <= port <= 0xFFFF


def test_contributions_depend_on_the_length_alone() -> None:
    one = roce.Template("10.0.0.1", "10.0.0.2", 1, 1, size=32).contributions()
    other = roce.Template("10.9.0.1", "10.8.0.2", 2, 0xFFFFFF, size=32).contributions()
    assert np.array_equal(one, other)
