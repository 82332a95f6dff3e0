"""Captures through the real programs, judged by the independent reckoning; which itself must be right first."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.utils import RawPcapReader

from qpd.kernel import bpf, layout
from qpd.kernel.ring import EventKind, Ring, cm_message
from qpd.kernel.tell import Teller
from qpd.model import Hook
from qpd.pairs import PairKeeper
from tests.ebpf.harness import Classifier, uplinks
from tests.ebpf.reckoning import (
    Key,
    Packet,
    Reckoning,
    agreed,
    answered,
    connections,
    packets,
    reckon,
)

DATA = Path(__file__).parents[1] / "data" / "roce"
CAPTURES = sorted(DATA.glob("*.pcap"))
HOSTS = ("172.16.0.1", "172.16.0.2")
needs_tshark = pytest.mark.skipif(
    shutil.which("tshark") is None, reason="needs tshark (Debian package tshark), the independent judge"
)
QP = Key(0, "10.0.0.2", 7)
WRITE, READ = 0x07, 0x0C


def requests(*psns: int, opcode: int = WRITE, length: int | None = None) -> list[Packet]:
    return [
        Packet(frame, QP, "10.0.0.1", 0, opcode, psn % (1 << 24), None, length, 1024, b"")
        for frame, psn in enumerate(psns)
    ]


@pytest.mark.parametrize(
    ("psns", "lost", "retransmitted", "out_of_order"),
    [
        pytest.param((5, 6, 7, 8), 0, 0, 0, id="in order"),
        pytest.param((-2, -1, 0, 1), 0, 0, 0, id="around the end of 24 bits"),
        pytest.param((5, 6, 9), 2, 0, 0, id="two never come"),
        pytest.param((5, 7, 6, 8), 0, 0, 1, id="one comes late"),
        pytest.param(
            (5, 7, 8, 6, 7, 8, 9), 1, 3, 0, id="one is lost and go-back-N sends it and two more again"
        ),
        pytest.param((5, 6, 7, 5, 6, 7, 8), 0, 3, 0, id="lost behind the observer: repetition without a gap"),
        pytest.param((5, 6, 8, 9, 7, 10, 11), 0, 0, 1, id="late, and the pass goes on"),
        pytest.param((5, 6, 8, 9, 7), 1, 0, 0, id="late or sent again: the end comes before anybody knows"),
        pytest.param((5, 7, 8, 6, 8, 9), 2, 2, 0, id="one is lost, and of its repetition another one"),
        pytest.param((5, 7, 6, 6, 7, 8), 1, 3, 0, id="a filling that is repeated was a repetition itself"),
        pytest.param((5, 6, 5_000_000, 5_000_001), 0, 0, 0, id="a new connection of the same number"),
        pytest.param((100, 100 - 3, 98, 99, 101), 0, 0, 3, id="late ones from before the first"),
    ],
)
def test_what_is_missing_late_and_sent_again(
    psns: tuple[int, ...], lost: int, retransmitted: int, out_of_order: int
) -> None:
    found = reckon(requests(*psns))[QP]
    assert (found.lost, found.retransmitted, found.out_of_order) == (lost, retransmitted, out_of_order)
    assert found.packets == len(psns)


def test_a_read_takes_a_number_for_each_packet_of_its_answer() -> None:
    mtu = requests(0)
    reads = requests(1, 9, 17, opcode=READ, length=8192)
    assert reckon([*mtu, *reads])[QP] == Reckoning(packets=4, connections=1)
    short = requests(1, 9, 18, opcode=READ, length=8192)
    assert reckon([*mtu, *short])[QP].lost == 1


def replay(classifier: Classifier, capture: Path, frames: Sequence[Packet], local: str) -> None:
    """What the host ``local`` sends leaves by the uplinks, everything else arrives, in the capture's order."""
    source = {packet.frame: packet.src for packet in frames}
    classifier.reset()
    classifier.fabric(uplinks(4))
    with RawPcapReader(str(capture)) as reader:
        for number, (frame, _) in enumerate(reader, 1):
            if number in source:
                hook = Hook.STEER if source[number] == local else Hook.OBSERVE
                bpf.prog_test_run(classifier.programs[hook], frame)


def entries(classifier: Classifier) -> dict[Key, np.void]:
    """Both maps' entries."""
    found = {}
    for records in (classifier.maps.qps(), classifier.maps.arrivals()):
        for record in records:
            key = layout.unpack_qp_key(record["key"])
            found[Key(key.vni, str(key.dst), key.dest_qp)] = record["value"]
    return found


def as_reckoned(entry: np.void) -> dict[str, int]:
    """The kernel's counters by the reckoning's words."""
    lost = int(entry["missing"]) - int(entry["out_of_order"])
    same = ("packets", "retransmitted", "out_of_order", "ecn_marked", "cnps")
    naks = {kind: int(entry[f"naks_{kind}"]) for kind in ("sequence", "rnr", "remote")}
    return {name: int(entry[name]) for name in same} | {"lost": lost} | naks


def as_counted(reckoned: Reckoning) -> dict[str, int]:
    same = ("packets", "retransmitted", "out_of_order", "ecn_marked", "cnps", "lost")
    naks = {kind: reckoned.naks[kind] for kind in ("sequence", "rnr", "remote")}
    return {name: getattr(reckoned, name) for name in same} | naks


@needs_tshark
@pytest.mark.root
@pytest.mark.parametrize("local", HOSTS)
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.stem)
def test_qpd_counts_of_every_qp_what_the_reckoning_finds(
    classifier: Classifier, capture: Path, local: str
) -> None:
    frames = packets(capture)
    replay(classifier, capture, frames, local)
    counted = {key: as_reckoned(entry) for key, entry in entries(classifier).items()}
    wanted = {key: as_counted(one) for key, one in reckon(frames).items()}
    assert counted.keys() == wanted.keys()
    differing = {key: differences(counted[key], wanted[key]) for key in wanted}
    assert {key: found for key, found in differing.items() if found} == {}
    assert sum(one["retransmitted"] for one in wanted.values()) > 1000
    assert sum(one["sequence"] for one in wanted.values()) > 30


def differences(counted: Mapping[str, int], wanted: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What qpd says and what the reckoning says, where they differ."""
    return {name: (counted[name], wanted[name]) for name in wanted if counted[name] != wanted[name]}


@needs_tshark
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.stem)
def test_both_kinds_of_evidence_for_pairs_agree(capture: Path) -> None:
    """What connection managers say is what acknowledgements show; and nobody has two peers at one time."""
    frames = packets(capture)
    said = {frozenset((pair.asked, pair.answered)) for pair in agreed(frames)}
    shown = {frozenset((pair.asked, pair.answered)) for pair in answered(frames)}
    assert said
    assert said <= shown
    assert len(shown) >= 20


# --- Pairs ------------------------------------------------------------------------------------------------------------

LOOK, LOOK_IDLE = 0.05, 0.5
"""Seconds between two looks of the daemon, while there are QPs whose partner is not known, and else."""
Qp = tuple[Key, int]
"""A QP number, and which of its lives."""


class Lives:
    """Which connection of its number a QP is at, by frame number."""

    def __init__(self, frames: Sequence[Packet]) -> None:
        streams: dict[tuple[Key, bool], list[Packet]] = defaultdict(list)
        for packet in frames:
            if packet.connected:
                streams[packet.key, packet.response].append(packet)
        begins: dict[Key, list[tuple[int, bool]]] = defaultdict(list)
        for (key, response), stream in streams.items():
            begins[key] += [(some[0].frame, response) for some in connections(stream)]
        self._begins = {key: _begun(sorted(found)) for key, found in begins.items()}

    def at(self, key: Key, frame: int) -> Qp:
        return key, bisect_right(self._begins[key], frame)


def _begun(streams: Sequence[tuple[int, bool]]) -> list[int]:
    """A stream that begins once more begins a life; the other one of the same life may begin later."""
    found: list[int] = []
    seen: set[bool] = set()
    for frame, response in streams:
        if not seen or response in seen:
            found.append(frame)
            seen = set()
        seen.add(response)
    return found


class Watch:
    """The daemon's looks at a replay, in the capture's time."""

    def __init__(self, classifier: Classifier, teller: Teller, ring: Ring) -> None:
        self.now = 1e6
        self._due = self.now
        self._maps = classifier.maps
        self._ring = ring
        self._keeper = PairKeeper(
            classifier.maps,
            teller,
            symmetric=False,
            idle=0.1,
            clock=lambda: int(self.now * 1e9),
        )

    def until(self, when: float) -> Iterator[set[frozenset[Key]]]:
        """Look as often as it is time to; gives the pairs that are known then."""
        while self._due <= when:
            self.now = self._due
            for message in (cm_message(event) for event in self._ring.read() if event.kind is EventKind.CM):
                if message is not None:
                    self._keeper.hear(message)
            outcome = self._keeper.look([])
            assert outcome.events == (), "none is contradicted"
            self._due += LOOK if outcome.busy else LOOK_IDLE
            yield self._known()
        self.now = when

    def _known(self) -> set[frozenset[Key]]:
        """Entries that name each other."""
        named = {
            (_key(record["key"]), Key(int(record["key"]["vni"]), _host(value["src"]), int(value["peer_qp"])))
            for records in (self._maps.qps(), self._maps.arrivals())
            for record, value in zip(records, records["value"], strict=True)
            if value["peer_qp"]
        }
        return {frozenset(pair) for pair in named if pair[::-1] in named}


def _host(octets: Any) -> str:
    return str(layout.unpack_address(bytes(octets)))


def _key(record: np.void) -> Key:
    return Key(int(record["vni"]), _host(record["dst"]), int(record["dest_qp"]))


@needs_tshark
@pytest.mark.root
@pytest.mark.parametrize("local", HOSTS)
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.stem)
def test_pairs_are_those_of_the_reckoning(classifier: Classifier, capture: Path, local: str) -> None:
    """Each connection's, while it is that number's newest, and no other; most of them are over within one look."""
    frames = packets(capture)
    lives = Lives(frames)
    wanted = {
        frozenset((lives.at(pair.asked, pair.begin), lives.at(pair.answered, pair.begin)))
        for pair in answered(frames)
    }
    stated: set[frozenset[Qp]] = set()
    classifier.reset()
    classifier.fabric(uplinks(4))
    source = {packet.frame: packet.src for packet in frames}
    teller, ring = Teller(classifier.pins.tell), Ring(classifier.pins.map("events"))
    try:
        ring.read()
        watch = Watch(classifier, teller, ring)
        begun = None
        number = 0

        def note(when: float) -> None:
            for known in watch.until(when):
                stated.update(frozenset(lives.at(key, number) for key in pair) for pair in known)

        with RawPcapReader(str(capture)) as reader:
            for frame, about in reader:
                at = about.sec + about.usec / 1e6
                begun = at - watch.now if begun is None else begun
                note(at - begun)
                number += 1
                if number in source:
                    hook = Hook.STEER if source[number] == local else Hook.OBSERVE
                    bpf.prog_test_run(classifier.programs[hook], frame)
        note(watch.now + 10)
    finally:
        ring.close()
        teller.close()
    assert stated == wanted
    assert len(wanted) >= 20
