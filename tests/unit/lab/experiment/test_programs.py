"""The two tiny programs of experiments, run by interpreters of their few instructions on frames that scapy has made."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from qpd.lab import roce
from qpd.lab.experiment.hostport import code, flow_hash
from qpd.lab.experiment.sightings import sample_filter


def inner(qp: int, psn: int, port: int = 50000, destination: str = "172.16.100.21") -> Any:
    ip = IP(src="172.16.100.11", dst=destination)
    return Ether() / ip / UDP(sport=port, dport=4791) / (roce.bth(roce.Opcode.SEND_ONLY, qp, psn) + bytes(64))


def on_the_wire(frame: Any) -> bytes:
    outer = Ether() / IP(src="10.255.1.11", dst="10.255.2.11") / UDP(sport=40000, dport=4789)
    return bytes(outer / VXLAN(vni=100) / frame)


# -- the filter of the wire's witness


def sampled(frame: bytes, mask: int) -> bool:
    """Interpret classic BPF; what lies beyond the frame makes the filter return 0 (linux/filter.h)."""
    steps, at, value = sample_filter(mask), 0, 0
    while True:
        operation, true, false, k = steps[at]
        at += 1
        if operation in {0x28, 0x30}:
            width = 2 if operation == 0x28 else 1
            if k + width > len(frame):
                return False
            value = int.from_bytes(frame[k : k + width], "big")
        elif operation == 0x15:
            at += true if value == k else false
        elif operation == 0x45:
            at += true if value & k else false
        else:
            assert operation == 0x06
            return bool(k)


def test_one_psn_of_sixteen_is_sampled() -> None:
    assert [psn for psn in range(64) if sampled(on_the_wire(inner(0x123, psn)), 0x0F)] == [0, 16, 32, 48]


def test_nothing_but_roce_in_vxlan_is_sampled() -> None:
    other = Ether() / IP() / UDP(dport=53) / bytes(64)
    assert not sampled(on_the_wire(other), 0)
    assert not sampled(bytes(inner(1, 0)), 0), "without VXLAN"
    assert not sampled(bytes(Ether(type=0x0806) / bytes(40)), 0)
    assert not sampled(on_the_wire(inner(1, 0))[:60], 0), "cut short"
    assert sampled(on_the_wire(inner(1, 0)), 0)


# -- the host port's program


def run(program: bytes, frame: bytes) -> tuple[int, int | None]:
    """Interpret the program: the mark and the flow hash (None: not set) that the packet has afterwards."""
    steps = list(struct.iter_unpack("<BBhi", program))
    registers, mark, hashed, at = [0] * 10, 0, None, 0
    while True:
        operation, which, offset, immediate = steps[at]
        dst, src = which & 0xF, which >> 4
        at += 1
        if operation in {0x20, 0x28}:
            width = 4 if operation == 0x20 else 2
            if immediate + width > len(frame):
                return mark, hashed
            registers[0] = int.from_bytes(frame[immediate : immediate + width], "big")
        elif operation in {0xB7, 0xB4}:
            registers[dst] = immediate & 0xFFFFFFFF
        elif operation in {0xBF, 0xBC}:
            registers[dst] = registers[src]
        elif operation == 0xAC:
            registers[dst] ^= registers[src]
        elif operation == 0x24:
            registers[dst] = registers[dst] * (immediate & 0xFFFFFFFF) & 0xFFFFFFFF
        elif operation == 0x74:
            registers[dst] >>= immediate
        elif operation == 0x55:
            at += offset if registers[dst] != immediate else 0
        elif operation == 0x63:
            assert offset == 8, "mark, in struct __sk_buff"
            mark = registers[src]
        elif operation == 0x85:
            assert immediate == 48, "bpf_set_hash"
            hashed = registers[2]
        else:
            assert operation == 0x95
            assert registers[0] == 0xFFFFFFFF, "TC_ACT_UNSPEC: go on"
            return mark, hashed


@pytest.mark.parametrize("seed", [0, 1, 0xDEADBEEF])
def test_the_flow_hash_is_that_of_the_flow_and_the_seed(seed: int) -> None:
    frame = bytes(inner(7, 0, port=51234))
    expected = flow_hash(seed, 0xAC10640B, 0xAC106415, 51234 << 16 | 4791)
    assert run(code(seed, mark=False), frame) == (0, expected)
    assert run(code(seed, mark=True), frame) == (1, expected)


def test_what_is_not_ipv4_keeps_its_hash_and_gets_the_mark() -> None:
    assert run(code(1, mark=True), bytes(Ether(type=0x0806) / bytes(40))) == (1, None)


def test_ports_and_seeds_spread_hashes() -> None:
    hashes = {flow_hash(seed, 1, 2, port << 16 | 4791) for seed in range(8) for port in range(49152, 49280)}
    assert len(hashes) == 8 * 128
    top = [flow_hash(3, 1, 2, port << 16 | 4791) >> 30 for port in range(49152, 53248)]
    assert all(900 < top.count(quarter) < 1150 for quarter in range(4)), "even in what chooses among four"
