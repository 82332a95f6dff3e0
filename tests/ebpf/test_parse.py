"""Which packets are whose: every header combination, cut at every length, and everything else.

BPF_PROG_TEST_RUN takes no frame that ends within an IP header right behind Ethernet, and makes no buffer with parts:
those two are sent over a real link in test_wire.py.
"""

from __future__ import annotations

import pytest

from qpd.core.slots import qp_hash, slot_of, source_port_of
from qpd.kernel import layout
from qpd.model import Hook, Verdict
from tests.ebpf import packets
from tests.ebpf.harness import PASS, REDIRECT, Classifier, mapped, shortest, uplinks
from tests.ebpf.packets import HOSTS, Roce

pytestmark = pytest.mark.root

COMBINATIONS = list(packets.every_combination())
BY_NAME = {roce.sentence: roce for roce in COMBINATIONS}


@pytest.fixture(autouse=True)
def one_path(classifier: Classifier) -> None:
    """One uplink, so that a packet is steered by being let through."""
    classifier.fabric(uplinks(1))


@pytest.mark.parametrize("roce", COMBINATIONS, ids=lambda roce: roce.sentence)
def test_each_header_combination_names_its_qp(classifier: Classifier, roce: Roce) -> None:
    packet = roce.build()
    outcome = classifier.steer(packet)
    tagged = roce.tags > 0
    assert outcome.action == PASS
    assert outcome.verdicts == {Verdict.TAGGED if tagged else Verdict.OWN_PATH: 1}
    assert outcome.paths == ({} if tagged else {0: (1, len(packet))})
    entry = classifier.entry(roce.key)
    assert entry is not None
    h = qp_hash(roce.key)
    assert (entry["packets"], entry["bytes"], entry["home"], entry["path"], entry["moves"]) == (
        1,
        len(packet),
        0,
        0,
        0,
    )
    assert (entry["slot"], entry["source_port"], entry["group"]) == (slot_of(h), source_port_of(h), 0)
    assert bytes(entry["src"]) == mapped(HOSTS[roce.inner][0])
    assert bytes(entry["destination"]) == mapped(roce.destination)
    assert len(classifier.maps.qps()) == 1
    if tagged or roce.vni is None:
        assert outcome.packet == packet
    else:
        assert packets.source_port(outcome.packet, version=roce.outer) == source_port_of(h)
        clean = packets.without_entropy(packet, version=roce.outer)
        assert packets.without_entropy(outcome.packet, version=roce.outer) == clean


@pytest.mark.parametrize("roce", COMBINATIONS, ids=lambda roce: roce.sentence)
def test_each_header_combination_is_observed(classifier: Classifier, roce: Roce) -> None:
    packet = roce.build()
    outcome = classifier.observe(packet)
    assert (outcome.action, outcome.verdicts, outcome.packet) == (PASS, {Verdict.OBSERVED: 1}, packet)
    (record,) = classifier.maps.arrivals()
    assert layout.unpack_qp_key(record["key"]) == roce.key
    assert (record["value"]["packets"], record["value"]["bytes"]) == (1, len(packet))
    assert bytes(record["value"]["src"]) == mapped(HOSTS[roce.inner][0])
    assert len(classifier.maps.qps()) == 0


@pytest.mark.parametrize("hook", list(Hook), ids=lambda hook: hook.name.lower())
@pytest.mark.parametrize("roce", COMBINATIONS, ids=lambda roce: roce.sentence)
def test_a_packet_cut_anywhere_in_its_headers_passes_as_truncated(
    classifier: Classifier, roce: Roce, hook: Hook
) -> None:
    packet = roce.build()
    bth_end = len(packet) - len(packets.PAYLOAD) - 4
    for length in range(shortest(packet), bth_end):
        outcome = classifier.run(hook, packet[:length])
        assert outcome.verdicts == {Verdict.TRUNCATED: 1}, f"cut to {length} octets"
        assert (outcome.action, outcome.packet, outcome.paths) == (PASS, packet[:length], {})
    assert len(classifier.maps.qps()) == len(classifier.maps.arrivals()) == 0
    for length in (bth_end, bth_end + 1, len(packet) - 1):
        (verdict,) = classifier.run(hook, packet[:length]).verdicts
        assert verdict is not Verdict.TRUNCATED, f"cut to {length} octets, behind the BTH"


@pytest.mark.parametrize("hook", list(Hook), ids=lambda hook: hook.name.lower())
@pytest.mark.parametrize("sentence", packets.others())
def test_what_is_not_roce_passes_untouched(classifier: Classifier, sentence: str, hook: Hook) -> None:
    packet = packets.others()[sentence]
    outcome = classifier.run(hook, packet)
    assert (outcome.action, outcome.packet) == (PASS, packet)
    assert (outcome.verdicts, outcome.paths) == ({Verdict.NOT_ROCE: 1}, {})
    assert len(classifier.maps.qps()) == len(classifier.maps.arrivals()) == 0


@pytest.mark.parametrize("hook", list(Hook), ids=lambda hook: hook.name.lower())
@pytest.mark.parametrize("sentence", packets.fragments())
def test_fragments_pass_untouched(classifier: Classifier, sentence: str, hook: Hook) -> None:
    packet = packets.fragments()[sentence]
    outcome = classifier.run(hook, packet)
    assert (outcome.action, outcome.packet) == (PASS, packet)
    assert (outcome.verdicts, outcome.paths) == ({Verdict.FRAGMENT: 1}, {})
    assert len(classifier.maps.qps()) == len(classifier.maps.arrivals()) == 0


@pytest.mark.parametrize("sentence", packets.unusual())
def test_options_and_extension_headers_are_stepped_over(classifier: Classifier, sentence: str) -> None:
    roce, packet = packets.unusual()[sentence]
    assert classifier.steer(packet).verdicts == {Verdict.OWN_PATH: 1}
    entry = classifier.entry(roce.key)
    assert entry is not None
    assert bytes(entry["src"]) == mapped(HOSTS[roce.inner][0])


@pytest.mark.parametrize("sentence", packets.unusual())
def test_options_cut_anywhere_pass_as_truncated(classifier: Classifier, sentence: str) -> None:
    _, packet = packets.unusual()[sentence]
    for length in range(shortest(packet), len(packet) - len(packets.PAYLOAD) - 4):
        assert classifier.steer(packet[:length]).verdicts == {Verdict.TRUNCATED: 1}, f"cut to {length} octets"


@pytest.mark.parametrize(
    "roce", [Roce(), Roce(vni=None), Roce(outer=6, inner=6)], ids=lambda roce: roce.sentence
)
def test_every_opcode_is_steered_alike(classifier: Classifier, roce: Roce) -> None:
    packet = bytearray(roce.build())
    opcode_at = len(packet) - len(packets.PAYLOAD) - 4 - 12
    assert packet[opcode_at] == packets.RC_SEND_ONLY
    for opcode in range(256):
        packet[opcode_at] = opcode
        assert classifier.steer(bytes(packet)).verdicts == {Verdict.OWN_PATH: 1}, f"opcode {opcode:#04x}"
        assert classifier.observe(bytes(packet)).verdicts == {Verdict.OBSERVED: 1}, f"opcode {opcode:#04x}"
    entry = classifier.entry(roce.key)
    assert entry is not None
    assert entry["packets"] == 256


def test_the_reserved_octet_before_the_destination_qp_is_no_part_of_it(classifier: Classifier) -> None:
    packet = bytearray(Roce(dest_qp=0xABCDEF).build())
    packet[-len(packets.PAYLOAD) - 4 - 8] = 0x40  # FECN, BECN: congestion marks (annex A17)
    classifier.steer(bytes(packet))
    assert classifier.entry(Roce(dest_qp=0xABCDEF).key) is not None


def test_a_udp_length_that_leaves_no_room_for_a_bth_is_truncation(classifier: Classifier) -> None:
    layers = Roce(vni=None).layers()
    layers["UDP"].len = 8 + 11
    assert classifier.steer(bytes(layers)).verdicts == {Verdict.TRUNCATED: 1}
    layers["UDP"].len = 8 + 12
    assert classifier.steer(bytes(layers)).verdicts == {Verdict.OWN_PATH: 1}


def test_a_packet_to_be_segmented_is_left_alone(classifier: Classifier) -> None:
    packet = Roce().build()
    outcome = classifier.steer(packet, gso_size=60)
    assert (outcome.verdicts, outcome.packet) == ({Verdict.NOT_ROCE: 1}, packet)


def test_these_assertions_can_fail(classifier: Classifier) -> None:
    """Each thing that the tables assert is seen to change when the packet does."""
    roce = Roce()
    packet = roce.build()
    assert classifier.entry(roce.key) is None
    first = classifier.steer(packet)
    assert first.packet != packet, "the entropy was written"
    assert first.packet == classifier.steer(first.packet).packet, "and is written once"
    assert classifier.steer(packet[:60]).verdicts != first.verdicts
    assert not packets.checksum_is_right(Roce(outer_checksum=True).build()[:-1] + b"\xff")
    other = classifier.steer(Roce(dest_qp=0x12).build())
    assert other.verdicts == first.verdicts
    assert len(classifier.maps.qps()) == 2
    classifier.fabric([uplinks(2)[1]])
    assert classifier.steer(packet).action == REDIRECT
