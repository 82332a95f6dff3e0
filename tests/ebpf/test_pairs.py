"""What the classifier does with a pair that it has been told, and what it tells of one: round-trip times, CM, homes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from qpd.kernel import bpf, layout
from qpd.kernel.ring import EventKind, Ring, cm_message
from qpd.kernel.tell import Teller, Told
from qpd.model import NO_PATH, CmKind, CmMessage, Group, Hook, Placement
from tests.ebpf import streams
from tests.ebpf.harness import Classifier, on_two_cpus, uplinks
from tests.ebpf.streams import (
    FROM_A,
    FROM_B,
    Packet,
    ack,
    answers,
    arrive,
    atomic_ack,
    counted,
    fetch_and_add,
    leave,
    read,
    send,
    sends,
)

pytestmark = pytest.mark.root


@pytest.fixture
def pair(classifier: Classifier, teller: Teller) -> Classifier:
    """Both entries are there, and each knows its peer."""
    classifier.fabric(uplinks(2))
    leave(classifier, send(100))
    arrive(classifier, ack(99))
    assert teller.set_peer(FROM_A, "qps", streams.A_QP) is Told.DONE
    assert teller.set_peer(FROM_B, "arrivals", streams.B_QP) is Told.DONE
    return classifier


def field(classifier: Classifier, name: str) -> int:
    record = classifier.maps.qp(FROM_A)
    assert record is not None
    return int(record[name])


# --- Round-trip times -------------------------------------------------------------------------------------------------

ASKS = replace(send(101), asks=True)
"""The first packet after those of the fixture, and it asks for a response."""

Step = tuple[str, Packet]


def out(*packets: Packet) -> list[Step]:
    return [("out", packet) for packet in packets]


def back(*packets: Packet) -> list[Step]:
    return [("back", packet) for packet in packets]


@pytest.mark.parametrize(
    ("steps", "samples"),
    [
        pytest.param(out(ASKS) + back(ack(101)), 1, id="the response to the packet that asked"),
        pytest.param(out(ASKS, *sends(102, 103)) + back(ack(101)), 1, id="others on their way meanwhile"),
        pytest.param(out(send(101)) + back(ack(101)), 0, id="nothing asked"),
        pytest.param(
            out(ASKS, replace(ASKS, psn=102)) + back(ack(102)),
            0,
            id="an ACK of two says nothing of the first",
        ),
        pytest.param(out(ASKS) + back(ack(100), ack(101)), 1, id="an ACK of one before does not matter"),
        pytest.param(out(ASKS, ASKS) + back(ack(101)), 0, id="sent twice (Karn)"),
        pytest.param(
            out(ASKS, send(102), send(100), ASKS, send(102)) + back(ack(101)),
            0,
            id="one before it sent again",
        ),
        pytest.param(
            out(ASKS, *sends(0x400000, 101 + 0x400000)) + back(ack(101)),
            0,
            id="the QP number got a new life meanwhile",
        ),
        pytest.param(out(ASKS) + back(ack(101, streams.SEQUENCE), ack(101)), 0, id="refused first"),
        pytest.param(out(ASKS) + back(ack(101, streams.RNR), ack(101)), 0, id="not ready first"),
        pytest.param(out(ASKS) + back(ack(101), ack(101)), 1, id="an ACK that comes twice"),
        pytest.param(
            out(ASKS) + back(ack(101)) + out(replace(ASKS, psn=102)) + back(ack(102)),
            2,
            id="one after the other",
        ),
        pytest.param(out(read(101, 256)) + back(*answers(101, 101)), 1, id="a READ of one response"),
        pytest.param(
            out(read(101, 4096)) + back(*answers(101, 104)), 1, id="a READ of four: the first tells"
        ),
        pytest.param(out(fetch_and_add(101)) + back(atomic_ack(101)), 1, id="an atomic"),
    ],
)
def test_samples(pair: Classifier, steps: list[Step], samples: int) -> None:
    before = pair.maps.round_trips()
    for where, packet in steps:
        (leave if where == "out" else arrive)(pair, packet)
    after = pair.maps.round_trips()
    assert field(pair, "rtt_samples") == samples
    assert int((after.samples - before.samples).sum()) == samples
    assert int((after.buckets - before.buckets).sum()) == samples


def test_without_a_known_pair_there_is_no_sample(classifier: Classifier) -> None:
    classifier.fabric(uplinks(1))
    leave(classifier, send(100), ASKS)
    arrive(classifier, ack(101))
    assert field(classifier, "rtt_samples") == 0


def test_a_wrong_peer_gives_no_sample(classifier: Classifier, teller: Teller) -> None:
    """Both sides have to name each other."""
    classifier.fabric(uplinks(1))
    leave(classifier, send(100))
    arrive(classifier, ack(99))
    teller.set_peer(FROM_A, "qps", streams.A_QP + 1)
    teller.set_peer(FROM_B, "arrivals", streams.B_QP)
    leave(classifier, ASKS)
    arrive(classifier, ack(101))
    assert field(classifier, "rtt_samples") == 0


def test_a_change_of_path_voids_the_stamp(pair: Classifier) -> None:
    leave(pair, ASKS)
    home = field(pair, "home")
    pair.maps.set_living(1 << (1 - home))
    leave(pair, send(102))
    arrive(pair, ack(101))
    assert field(pair, "rtt_samples") == 0


def test_the_time_is_that_between_the_two_packets(pair: Classifier) -> None:
    """Set by hand: a stamp of 22 ms ago gives 22 ms and the little that passes here, on the QP and on its path."""
    leave(pair, ASKS)
    record = pair.maps.qp(FROM_A)
    assert record is not None
    path, before = int(record["path"]), pair.maps.round_trips()
    altered = np.array([record])
    altered["stamp_ns"] -= 22_000_000
    pair.maps._tables["qps"].set(layout.pack_qp_key(FROM_A), altered)
    arrive(pair, ack(101))
    measured = field(pair, "rtt_last_ns")
    assert measured >= 22_000_000
    assert field(pair, "rtt_min_ns") == field(pair, "rtt_sum_ns") == measured
    after = pair.maps.round_trips()
    assert int(after.sum_ns[path] - before.sum_ns[path]) == measured
    (bucket,) = np.flatnonzero(after.buckets[path] - before.buckets[path])
    bounds = layout.rtt_bounds_ns()
    assert bounds[bucket - 1] <= measured < bounds[bucket]


def test_bounds_of_the_buckets() -> None:
    bounds = layout.rtt_bounds_ns()
    assert (len(bounds), int(bounds[-1])) == (layout.RTT_BUCKETS, 1 << 32)
    widths = np.diff(bounds, prepend=1 << layout.RTT_FIRST)
    assert (widths > 0).all()
    assert (widths[64:] / bounds[63:-1] <= 1 / 64).all(), "1.6 % wide at most"


# --- RNR --------------------------------------------------------------------------------------------------------------


def test_a_receiver_that_was_not_ready_is_no_loss(pair: Classifier) -> None:
    leave(pair, *sends(101, 102, 103))
    arrive(pair, ack(102, streams.RNR))
    leave(pair, *sends(102, 103, 104))
    assert counted(pair, Hook.STEER) == {"retransmitted": 2, "go_backs": 1}


def test_a_sequence_error_after_it_is(pair: Classifier) -> None:
    leave(pair, *sends(101, 102, 103))
    arrive(pair, ack(102, streams.RNR), ack(102, streams.SEQUENCE))
    leave(pair, *sends(102, 103, 104))
    assert counted(pair, Hook.STEER) == {"retransmitted": 2, "go_backs": 1, "lost_behind": 1}


def test_at_the_responder_s_leaf_as_well(pair: Classifier) -> None:
    """B's requests arrive, A's refusal leaves."""
    arrive(pair, *sends(500, 501, 502))
    leave(pair, ack(501, streams.RNR))
    arrive(pair, *sends(501, 502, 503))
    assert counted(pair, Hook.OBSERVE) == {"retransmitted": 2, "go_backs": 1}


def test_the_path_mtu_of_reads_is_learned_from_the_other_direction(pair: Classifier) -> None:
    arrive(pair, *answers(90, 99, pmtu=2048))
    leave(pair, read(101, 8192), read(105, 8192), read(110, 8192))
    assert counted(pair, Hook.STEER) == {"missing": 1}


# --- Peers and homes --------------------------------------------------------------------------------------------------


def test_what_is_told_stands_in_the_entry_and_nothing_else_changes(pair: Classifier, teller: Teller) -> None:
    before = pair.maps.qp(FROM_A)
    assert before is not None
    assert before["peer_qp"] == streams.A_QP
    assert teller.set_peer(FROM_A, "qps", 0) is Told.DONE
    after = pair.maps.qp(FROM_A)
    assert after is not None
    assert {
        name for name in after.dtype.names or () if bytes(after[name].tobytes()) != before[name].tobytes()
    } == {"peer_qp"}


@pytest.mark.parametrize("anew", [sends(0x400000), [ack(0x400000)]], ids=["requests", "answers"])
def test_a_new_life_of_the_number_has_no_peer_yet(
    classifier: Classifier, teller: Teller, anew: list[Packet]
) -> None:
    """Nor anything else of the life before, whichever of its two streams tells."""
    classifier.fabric(uplinks(1))
    leave(classifier, *sends(100, 101), ack(900_000))
    teller.set_peer(FROM_A, "qps", streams.A_QP)
    leave(classifier, *anew)
    names = ("peer_qp", "next_psn", "acked_psn", "restarts")
    asked = anew[0].opcode == send(0).opcode
    assert [field(classifier, name) for name in names] == [
        0,
        layout.PSN_KNOWN | 0x400001 if asked else 0,
        0 if asked else layout.PSN_KNOWN | 0x400000,
        1,
    ]


def test_what_was_learned_of_a_life_that_is_over_is_not_told(classifier: Classifier, teller: Teller) -> None:
    classifier.fabric(uplinks(1))
    leave(classifier, *sends(100, 0x400000))
    assert teller.set_peer(FROM_A, "qps", streams.A_QP, restarts=0) is Told.REFUSED
    assert field(classifier, "peer_qp") == 0
    assert teller.set_peer(FROM_A, "qps", streams.A_QP, restarts=1) is Told.DONE
    assert field(classifier, "peer_qp") == streams.A_QP


def test_where_a_life_of_the_number_begins(classifier: Classifier) -> None:
    classifier.fabric(uplinks(1))
    leave(classifier, *sends(100, 102, 101, 99, 103))
    assert field(classifier, "first_psn") == layout.PSN_KNOWN | 100
    leave(classifier, *sends(0x400000, 0x400001))
    assert field(classifier, "first_psn") == layout.PSN_KNOWN | 0x400000


def test_a_qp_without_entry_cannot_be_told(classifier: Classifier, teller: Teller) -> None:
    classifier.fabric(uplinks(2))
    assert teller.set_peer(FROM_A, "qps", 5) is Told.NO_ENTRY
    assert teller.set_home(FROM_A, 1, 0.0) is Told.NO_ENTRY
    assert bpf.prog_test_run(teller._fd, bytes(30)).retval == Told.MALFORMED


def test_a_silent_qp_moves_at_once(pair: Classifier, teller: Teller) -> None:
    home, placed = field(pair, "home"), pair.maps.placed()
    other = 1 - home
    assert teller.set_home(FROM_A, other, 0.0) is Told.DONE
    assert (field(pair, "home"), field(pair, "path"), field(pair, "wish")) == (other, home, 0)
    change = pair.maps.placed().astype(np.int64) - placed.astype(np.int64)
    assert (change[home], change[other]) == (-1, 1)
    leave(pair, send(101))
    assert (field(pair, "path"), field(pair, "moves")) == (other, 1)


def test_a_qp_that_only_answers_moves_without_a_count(classifier: Classifier, teller: Teller) -> None:
    """It counts at its new home when it sends."""
    classifier.fabric(uplinks(2), placement=Placement.BALANCED)
    leave(classifier, ack(100))
    other = 1 - field(classifier, "home")
    assert teller.set_home(FROM_A, other, 0.0) is Told.DONE
    assert (field(classifier, "home"), field(classifier, "counted")) == (other, 0)
    assert not classifier.maps.placed().any()
    leave(classifier, send(100), send(101), ack(101))
    assert (field(classifier, "home"), field(classifier, "counted")) == (other, 1)
    assert {path: int(qps) for path, qps in enumerate(classifier.maps.placed()) if qps} == {other: 1}


def test_two_cpus_that_move_one_qp_take_its_count_along_once(pair: Classifier, teller: Teller) -> None:
    """Each wants another home, over and over: the QP is counted where it ends, and nowhere else."""

    def wishes(number: int) -> None:
        record = np.zeros(1, layout.TELL)
        record["key"] = np.frombuffer(layout.pack_qp_key(FROM_A), layout.QP_KEY)
        record["hook"], record["fields"], record["home"] = Hook.STEER, 2, number
        bpf.prog_test_run(teller._fd, bytes(14) + record.tobytes(), repeat=50_000)

    on_two_cpus(wishes)
    assert {path: int(qps) for path, qps in enumerate(pair.maps.placed()) if qps} == {field(pair, "home"): 1}


def test_a_busy_qp_moves_in_its_first_silence(pair: Classifier, teller: Teller) -> None:
    home = field(pair, "home")
    assert teller.set_home(FROM_A, 1 - home, 3600.0) is Told.WAITS
    leave(pair, *sends(101, 102, 103))
    assert (field(pair, "home"), field(pair, "path")) == (home, home)
    # An hour passes: the last packet was that long ago.
    record = np.array([pair.maps.qp(FROM_A)])
    record["last_seen_ns"] -= np.uint64(min(int(record["last_seen_ns"][0]), 3600 * 10**9))
    if int(record["last_seen_ns"][0]) == 0:
        record["wish_idle_us"] = 1000
    pair.maps._tables["qps"].set(layout.pack_qp_key(FROM_A), record)
    leave(pair, send(104))
    assert (field(pair, "home"), field(pair, "path")) == (1 - home, 1 - home)
    assert (field(pair, "wish"), field(pair, "moves")) == (0, 1), "once"


def test_a_wish_can_be_taken_back(pair: Classifier, teller: Teller) -> None:
    home = field(pair, "home")
    assert teller.set_home(FROM_A, 1 - home, 3600.0) is Told.WAITS
    assert teller.set_home(FROM_A, NO_PATH, 0.0) is Told.DONE
    assert field(pair, "wish") == 0


@pytest.mark.parametrize("path", [2, 63, 64, 0xFFFF])
def test_only_a_path_of_the_group_can_be_a_home(pair: Classifier, teller: Teller, path: int) -> None:
    home = field(pair, "home")
    assert teller.set_home(FROM_A, path, 0.0) is Told.REFUSED
    assert (field(pair, "home"), field(pair, "wish")) == (home, 0)


def test_a_wish_for_a_path_that_left_the_group_lapses(pair: Classifier, teller: Teller) -> None:
    home = field(pair, "home")
    assert teller.set_home(FROM_A, 1 - home, 3600.0) is Told.WAITS
    record = np.array([pair.maps.qp(FROM_A)])
    record["last_seen_ns"], record["wish_idle_us"] = 0, 0
    pair.maps._tables["qps"].set(layout.pack_qp_key(FROM_A), record)
    pair.maps.write_group(Group(0, {home: 1}, 0))
    pair.maps.raise_generation()
    leave(pair, send(101))
    assert (field(pair, "home"), field(pair, "wish")) == (home, 0)


# --- The connection manager -------------------------------------------------------------------------------------------


def mad(attribute: int, data: dict[int, int], *, management_class: int = 7, size: int = 232) -> Packet:
    """A MAD on QP 1: UD SEND ONLY, DETH, MAD header, and 32-bit words at offsets of its data."""
    octets = bytearray(size)
    for offset, word in data.items():
        struct.pack_into("!I", octets, offset, word)
    header = struct.pack("!BBBB12xHHI", 1, management_class, 2, 3, attribute, 0, 0)
    return Packet(0x64, 0, struct.pack("!II", 0x80010000, 1) + header + bytes(octets), size=0)


CM = [
    (mad(0x10, {0: 0xAABBCCDD, 32: 0x12345607, 44: 0x00ABCD9F}),
     {"kind": CmKind.REQ, "local_id": 0xAABBCCDD, "qpn": 0x123456, "psn": 0x00ABCD}),
    (mad(0x13, {0: 1, 4: 2, 12: 0x65432100, 20: 0x7F000000}),
     {"kind": CmKind.REP, "local_id": 1, "remote_id": 2, "qpn": 0x654321, "psn": 0x7F0000}),
    (mad(0x14, {0: 2, 4: 1}), {"kind": CmKind.RTU, "local_id": 2, "remote_id": 1}),
    (mad(0x15, {0: 2, 4: 1, 8: 0x65432100}), {"kind": CmKind.DREQ, "local_id": 2, "remote_id": 1, "qpn": 0x654321}),
    (mad(0x16, {0: 1, 4: 2}), {"kind": CmKind.DREP, "local_id": 1, "remote_id": 2}),
    (mad(0x12, {0: 1, 4: 2}), {"kind": CmKind.REJ, "local_id": 1, "remote_id": 2}),
]  # fmt: skip


@pytest.fixture
def ring(classifier: Classifier) -> Iterator[Ring]:
    opened = Ring(classifier.pins.map("events"))
    try:
        while opened.read():
            pass
        yield opened
    finally:
        opened.close()


def messages(ring: Ring) -> list[CmMessage | None]:
    return [cm_message(event) for event in ring.read() if event.kind is EventKind.CM]


@pytest.mark.parametrize("hook", list(Hook))
@pytest.mark.parametrize(
    ("packet", "said"), CM, ids=lambda value: value["kind"].name if isinstance(value, dict) else ""
)
def test_messages_of_the_connection_manager_are_told(
    classifier: Classifier, ring: Ring, packet: Packet, said: dict[str, int], hook: Hook
) -> None:
    classifier.fabric(uplinks(1))
    key, src = (FROM_A, streams.A) if hook is Hook.STEER else (FROM_B, streams.B)
    bpf.prog_test_run(classifier.programs[hook], packet.build(replace(key, dest_qp=1), src))
    (message,) = messages(ring)
    assert message is not None
    told = {"remote_id": 0, "qpn": 0, "psn": 0, **said}
    assert {name: getattr(message, name) for name in told} == told
    assert (message.hook, message.vni, message.src, message.dst) == (hook, 0, src, key.dst)
    assert message.kernel_ns > 0


@pytest.mark.parametrize(
    "packet",
    [
        mad(0x10, {}, management_class=3),
        mad(0x0F, {}),
        mad(0x17, {}),
        Packet(0x64, 0, size=4),
        replace(mad(0x10, {}), opcode=0x04),
    ],
    ids=["another class", "an attribute before", "an attribute after", "cut short", "not UD"],
)
def test_other_traffic_of_qp_1_is_not(classifier: Classifier, ring: Ring, packet: Packet) -> None:
    bpf.prog_test_run(classifier.programs[Hook.OBSERVE], packet.build(replace(FROM_B, dest_qp=1), streams.B))
    assert messages(ring) == []


def test_a_message_that_says_nothing_of_queue_pairs_is_none(classifier: Classifier, ring: Ring) -> None:
    """MRA asks for patience."""
    packet = mad(0x11, {0: 1, 4: 2})
    bpf.prog_test_run(classifier.programs[Hook.OBSERVE], packet.build(replace(FROM_B, dest_qp=1), streams.B))
    assert messages(ring) == [None]
