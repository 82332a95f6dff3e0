"""Real RoCEv2 traffic through both programs; tshark, which shares no line with them, says what was in it."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from scapy.utils import RawPcapReader

from qpd.kernel import bpf, layout
from qpd.kernel.table import Records
from qpd.model import Hook, QueuePairKey, Verdict
from tests.ebpf import packets
from tests.ebpf.harness import Classifier, uplinks

pytestmark = pytest.mark.root

DATA = Path(__file__).parents[1] / "data" / "roce"
Counts = dict[QueuePairKey, tuple[int, int]]


def judged(capture: Path) -> Counts:
    """Packets and captured octets of each QP, by tshark."""
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark (Debian package tshark), the independent judge")
    fields = ("vxlan.vni", "ip.dst", "infiniband.bth.destqp", "frame.cap_len")
    done = subprocess.run(
        ["tshark", "-r", str(capture), "-d", "udp.port==4789,vxlan", "-Y", "infiniband.bth", "-T", "fields"]
        + [word for field in fields for word in ("-e", field)],
        capture_output=True,
        text=True,
        check=True,
    )
    count: Counter[QueuePairKey] = Counter()
    octets: Counter[QueuePairKey] = Counter()
    for line in done.stdout.splitlines():
        vni, addresses, qp, length = line.split("\t")
        key = QueuePairKey(int(vni or 0), ip_address(addresses.split(",")[-1]), int(qp, 16))
        count[key] += 1
        octets[key] += int(length)
    return {key: (number, octets[key]) for key, number in count.items()}


def counted(records: Records) -> Counts:
    """The same, by qpd."""
    return {
        layout.unpack_qp_key(key): (int(value["packets"]), int(value["bytes"]))
        for key, value in zip(records["key"], records["value"], strict=True)
    }


@pytest.mark.parametrize("capture", sorted(DATA.glob("*.pcap")), ids=lambda path: path.stem)
def test_packets_and_octets_of_every_qp_are_what_tshark_counts(classifier: Classifier, capture: Path) -> None:
    classifier.fabric(uplinks(4))
    expected = judged(capture)
    total = sum(number for number, _ in expected.values())
    assert total > 10_000
    before = classifier.maps.counters().verdicts
    frames = 0
    with RawPcapReader(str(capture)) as reader:
        for frame, _ in reader:
            for program in classifier.programs.values():
                bpf.prog_test_run(program, frame)
            frames += 1
    assert counted(classifier.maps.qps()) == expected
    assert counted(classifier.maps.arrivals()) == expected
    changed = (classifier.maps.counters().verdicts - before).astype(np.int64)
    steered = changed[Hook.STEER]
    assert steered[Verdict.OWN_PATH] + steered[Verdict.REDIRECTED] == total
    assert steered[Verdict.NOT_ROCE] == frames - total
    assert changed[Hook.OBSERVE][Verdict.OBSERVED] == total
    assert changed[Hook.OBSERVE][Verdict.NOT_ROCE] == frames - total


def test_every_frame_of_a_qp_takes_its_path_and_leaves_with_its_port(classifier: Classifier) -> None:
    """One path and one outer source port a QP, whatever the packet says; nothing else of the frame changes."""
    classifier.fabric(uplinks(4))
    ports: dict[int, set[int]] = {}
    with RawPcapReader(str(DATA / "rxe-vxlan-uplink.pcap")) as reader:
        for number, (frame, _) in enumerate(reader):
            if number % 20:
                continue
            outcome = classifier.steer(frame)
            assert packets.without_entropy(outcome.packet, version=4) == packets.without_entropy(
                frame, version=4
            )
            if outcome.paths:
                ports.setdefault(packets.source_port(outcome.packet, version=4), set()).update(outcome.paths)
    assert len(ports) == len(classifier.maps.qps()) > 8
    assert all(len(paths) == 1 for paths in ports.values())
