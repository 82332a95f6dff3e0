"""Where packets go: next hops, moves and returns, outer source port and checksum, second pass, what is not steered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from qpd.core.slots import choose, qp_hash, slot_of, source_port_of
from qpd.kernel import bpf, layout, sources
from qpd.model import Group, Hook, Placement, Verdict
from tests.ebpf import packets
from tests.ebpf.harness import (
    GUARD_MAGIC,
    OTHER_IFINDEX,
    OWN_IFINDEX,
    PASS,
    REDIRECT,
    Classifier,
    Uplink,
    loaded,
    orders_of,
    uplinks,
)
from tests.ebpf.packets import Roce

pytestmark = pytest.mark.root

QPS = [Roce(dest_qp=0x100 + n) for n in range(64)]


def paths_of(classifier: Classifier, qps: list[Roce] = QPS) -> dict[int, int]:
    """Destination QP to the path that its next packet is counted on; -1: none."""
    taken = {}
    for roce in qps:
        paths = classifier.steer(roce.build()).paths
        taken[roce.dest_qp] = next(iter(paths), -1)
    return taken


# --- Ways out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "verdict"),
    [
        pytest.param(Uplink(OWN_IFINDEX), Verdict.OWN_PATH, id="this uplink's only next hop"),
        pytest.param(
            Uplink(OWN_IFINDEX, sole=False), Verdict.REDIRECTED, id="one of this uplink's next hops"
        ),
        pytest.param(Uplink(OTHER_IFINDEX), Verdict.REDIRECTED, id="another uplink's next hop"),
        pytest.param(Uplink(OTHER_IFINDEX, "fe80::1"), Verdict.REDIRECTED, id="an IPv6 next hop"),
    ],
)
@pytest.mark.parametrize(
    "roce",
    [Roce(), Roce(outer=6), Roce(inner=6), Roce(vni=None), Roce(vni=None, inner=6)],
    ids=lambda roce: roce.sentence,
)
def test_way_out(classifier: Classifier, roce: Roce, path: Uplink, verdict: Verdict) -> None:
    if roce.version == 6:
        path = replace(path, next_hop="fe80::7")
    classifier.fabric([path])
    packet = roce.build()
    outcome = classifier.steer(packet)
    assert outcome.verdicts == {verdict: 1}
    assert outcome.paths == {0: (1, len(packet))}
    if verdict is Verdict.OWN_PATH:
        assert (outcome.action, outcome.cb[:2]) == (PASS, (0, 0))
    else:
        assert (outcome.action, outcome.cb[:2]) == (REDIRECT, (GUARD_MAGIC, path.ifindex))


def test_a_redirected_packet_passes_the_next_hook_and_is_not_counted_again(classifier: Classifier) -> None:
    classifier.fabric([Uplink(OTHER_IFINDEX, "fe80::1")])
    packet = Roce().build()
    outcome = classifier.steer(packet, cb=(GUARD_MAGIC, OWN_IFINDEX))
    assert (outcome.action, outcome.packet) == (PASS, packet)
    assert (outcome.verdicts, outcome.paths) == ({Verdict.SECOND_PASS: 1}, {})
    assert outcome.cb[0] == 0, "and the packet after it on this buffer is not taken for it"
    assert len(classifier.maps.qps()) == 0


def test_a_guard_for_another_uplink_is_not_believed(classifier: Classifier) -> None:
    classifier.fabric(uplinks(1))
    assert classifier.steer(Roce().build(), cb=(GUARD_MAGIC, OTHER_IFINDEX)).verdicts == {Verdict.OWN_PATH: 1}


def test_a_guard_is_taken_off_where_a_packet_comes_in(classifier: Classifier) -> None:
    outcome = classifier.observe(Roce().build(), cb=(GUARD_MAGIC, OWN_IFINDEX))
    assert (outcome.verdicts, outcome.cb[0]) == ({Verdict.OBSERVED: 1}, 0)


# --- Loss and return -------------------------------------------------------------------------------------------------


def test_a_path_s_death_moves_exactly_its_own_qps_and_its_return_brings_them_home(
    classifier: Classifier,
) -> None:
    classifier.fabric(uplinks(4))
    home = paths_of(classifier)
    assert set(home.values()) == {0, 1, 2, 3}
    for dead in range(4):
        classifier.maps.set_living(0b1111 & ~(1 << dead))
        away = paths_of(classifier)
        for qp, path in home.items():
            assert (away[qp] == path) == (path != dead), f"QP {qp:#x}, path {dead} dead"
        assert dead not in away.values()
        classifier.maps.set_living(0b1111)
        assert paths_of(classifier) == home


def test_stand_ins_follow_the_slot_s_order_whatever_the_order_of_deaths(classifier: Classifier) -> None:
    classifier.fabric(uplinks(4))
    home = paths_of(classifier)
    orders = orders_of(dict.fromkeys(range(4), 1))
    for living in range(1, 16):
        classifier.maps.set_living(living)
        for qp, path in paths_of(classifier).items():
            order = [int(choice) for choice in orders[slot_of(qp_hash(Roce(dest_qp=qp).key))][:4]]
            expected = home[qp] if living >> home[qp] & 1 else choose(order, living)
            assert path == expected, f"QP {qp:#x}, living {living:04b}"


def test_the_tap_s_word_takes_a_path_out_like_the_daemon_s(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2))
    home = paths_of(classifier)
    classifier.maps._tables["living"].set(1, (0b10).to_bytes(8, "little"))
    assert set(paths_of(classifier).values()) == {0}
    classifier.maps.set_living(0b10)
    assert set(paths_of(classifier).values()) == {-1}
    classifier.maps._tables["living"].set(1, bytes(8))
    classifier.maps.set_living(0b11)
    assert paths_of(classifier) == home


def test_moves_are_counted_in_the_entry(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2))
    roce = QPS[0]
    home = classifier.path_of(classifier.steer(roce.build()))
    for living, path, moves in [(0b11, home, 0), (1 << (1 - home), 1 - home, 1), (0, -1, 1), (0b11, home, 2)]:
        classifier.maps.set_living(living)
        assert paths_of(classifier, [roce]) == {roce.dest_qp: path}
        entry = classifier.entry(roce.key)
        assert entry is not None
        assert (entry["home"], entry["moves"]) == (home, moves)


def test_without_a_living_path_packets_pass_and_no_entry_is_made(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2))
    classifier.maps.set_living(0)
    packet = Roce().build()
    outcome = classifier.steer(packet)
    assert (outcome.action, outcome.packet) == (PASS, packet)
    assert (outcome.verdicts, outcome.paths) == ({Verdict.NO_LIVING_PATH: 1}, {})
    assert len(classifier.maps.qps()) == 0
    classifier.maps.set_living(0b10)
    assert classifier.path_of(classifier.steer(packet)) == 1


def test_a_known_qp_without_a_living_path_is_counted_and_passes(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2))
    packet = Roce().build()
    classifier.steer(packet)
    classifier.maps.set_living(0)
    outcome = classifier.steer(packet)
    assert (outcome.action, outcome.packet) == (PASS, packet)
    assert (outcome.verdicts, outcome.paths) == ({Verdict.NO_LIVING_PATH: 1}, {})
    entry = classifier.entry(Roce().key)
    assert entry is not None
    assert entry["packets"] == 2


def test_a_living_bit_without_a_path_is_no_way_out(classifier: Classifier) -> None:
    classifier.fabric(uplinks(1))
    classifier.maps.erase_path(0)
    packet = Roce().build()
    outcome = classifier.steer(packet)
    assert (outcome.action, outcome.packet) == (PASS, packet)
    assert (outcome.verdicts, outcome.paths) == ({Verdict.NO_LIVING_PATH: 1}, {})


def test_an_ipv6_packet_is_not_sent_to_an_ipv4_next_hop(classifier: Classifier) -> None:
    """The kernel drops what it cannot redirect; no route says so, but qpd never drops."""
    classifier.fabric([Uplink(OTHER_IFINDEX, "198.51.100.1")])
    packet = Roce(outer=6).build()
    outcome = classifier.steer(packet)
    assert (outcome.action, outcome.packet, outcome.verdicts) == (PASS, packet, {Verdict.NO_LIVING_PATH: 1})


# --- Groups ----------------------------------------------------------------------------------------------------------


def test_the_longest_prefix_of_the_outer_address_decides_the_group(classifier: Classifier) -> None:
    classifier.fabric(uplinks(3), ["192.0.2.0/24"])
    classifier.maps.write_group(Group(1, {1: 1}, 0))
    classifier.maps.write_group(Group(2, {2: 1}, 0))
    classifier.maps.write_destinations(
        {ip_network("192.0.2.2/32"): 1, ip_network("2001:db8:1::/48"): 2, ip_network("10.0.0.0/8"): 2}
    )
    assert classifier.path_of(classifier.steer(Roce().build())) == 1
    assert classifier.path_of(classifier.steer(Roce(outer=6, dest_qp=2).build())) == 2
    assert classifier.path_of(classifier.steer(Roce(vni=None, dest_qp=3).build())) == 2


@pytest.mark.parametrize("roce", [Roce(), Roce(vni=None, inner=6)], ids=lambda roce: roce.sentence)
def test_a_destination_without_a_group_passes_untouched(classifier: Classifier, roce: Roce) -> None:
    classifier.fabric(uplinks(2), ["203.0.113.0/24"])
    packet = roce.build()
    outcome = classifier.steer(packet)
    assert (outcome.action, outcome.packet) == (PASS, packet)
    assert (outcome.verdicts, outcome.paths) == ({Verdict.UNKNOWN_GROUP: 1}, {})
    assert len(classifier.maps.qps()) == 0


def test_a_change_of_the_group_counts_from_the_generation_on_and_moves_only_those_it_must(
    classifier: Classifier,
) -> None:
    classifier.fabric(uplinks(3))
    home = paths_of(classifier)
    classifier.maps.write_group(Group(0, {0: 1, 2: 1}, 0))
    assert paths_of(classifier) == home, "entries are cached until the generation changes"
    classifier.maps.raise_generation()
    for qp, path in paths_of(classifier).items():
        assert path == home[qp] if home[qp] != 1 else path in {0, 2}
    classifier.maps.write_group(Group(0, {0: 1, 1: 1, 2: 1}, 0))
    classifier.maps.raise_generation()
    assert paths_of(classifier) == home


def test_a_known_qp_whose_group_went_passes_and_comes_back(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2), ["192.0.2.0/24"])
    packet = Roce().build()
    home = classifier.path_of(classifier.steer(packet))
    classifier.maps.erase_destinations([ip_network("192.0.2.0/24")])
    classifier.maps.raise_generation()
    outcome = classifier.steer(packet)
    assert (outcome.action, outcome.packet, outcome.paths) == (PASS, packet, {})
    assert outcome.verdicts == {Verdict.UNKNOWN_GROUP: 1}
    classifier.maps.write_destinations({ip_network("192.0.2.0/24"): 0})
    classifier.maps.raise_generation()
    assert classifier.path_of(classifier.steer(packet)) == home


# --- Entropy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksum", [False, True], ids=["no checksum", "checksum"])
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_the_outer_source_port_is_the_qp_s_and_the_checksum_stays_right(
    classifier: Classifier, inner: int, outer: int, *, checksum: bool
) -> None:
    classifier.fabric([Uplink(OTHER_IFINDEX, "fe80::1")])
    for qp in range(32):
        roce = Roce(inner=inner, outer=outer, dest_qp=qp, outer_checksum=checksum)
        packet = roce.build()
        out = classifier.steer(packet).packet
        assert packets.source_port(out, version=outer) == source_port_of(qp_hash(roce.key))
        assert packets.without_entropy(out, version=outer) == packets.without_entropy(packet, version=outer)
        if checksum:
            assert packets.checksum_is_right(packet)
            assert packets.checksum_is_right(out)
        else:
            assert packets.udp_checksum(out, version=outer) == 0


def test_the_checksum_is_never_written_as_none(classifier: Classifier) -> None:
    """A sum that comes out as 0 is sent as 0xffff (RFC 768): 0 would say that there is none."""
    classifier.fabric([Uplink(OTHER_IFINDEX, "fe80::1")])
    roce = Roce(outer=6, outer_checksum=True)
    port = source_port_of(qp_hash(roce.key))
    wanted = packets.with_zero_sum_at(roce, port)
    out = classifier.steer(wanted).packet
    assert packets.source_port(out, version=6) == port
    assert packets.udp_checksum(out, version=6) == 0xFFFF


@pytest.mark.parametrize("outer", [4, 6])
def test_a_checksum_that_the_device_will_finish_is_left_to_it(classifier: Classifier, outer: int) -> None:
    """CHECKSUM_PARTIAL: the field holds the pseudo header's sum, and the device adds the rest, with the new port."""
    classifier.fabric([Uplink(OTHER_IFINDEX, "fe80::1")])
    roce = Roce(outer=outer, outer_checksum=True)
    packet = packets.with_pseudo_sum(roce.build(), version=outer)
    out = classifier.steer(packet).packet
    assert packets.source_port(out, version=outer) == source_port_of(qp_hash(roce.key))
    assert packets.udp_checksum(out, version=outer) == packets.udp_checksum(packet, version=outer)


def test_a_port_that_is_right_already_is_left(classifier: Classifier) -> None:
    classifier.fabric([Uplink(OTHER_IFINDEX, "fe80::1")])
    roce = Roce(outer=6, outer_checksum=True)
    packet = replace(roce, source_port=source_port_of(qp_hash(roce.key))).build()
    assert classifier.steer(packet).packet == packet


@pytest.mark.parametrize("inner", [4, 6])
def test_a_plain_roce_packet_is_never_altered(classifier: Classifier, inner: int) -> None:
    classifier.fabric([Uplink(OTHER_IFINDEX, "fe80::1")])
    for qp in range(32):
        packet = Roce(vni=None, inner=inner, dest_qp=qp).build()
        outcome = classifier.steer(packet)
        assert (outcome.action, outcome.packet) == (REDIRECT, packet)


# --- Full maps -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(headers_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classifier]:
    """Maps of 8 QPs that refuse a ninth."""
    folder = tmp_path_factory.mktemp("ebpf") / "ebpf"
    shutil.copytree(sources.directory(), folder)
    maps = folder / "maps.h"
    maps.write_text(maps.read_text().replace('#define QPS_TYPE "lru_hash"', '#define QPS_TYPE "hash"'))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("qps", "arrivals"):
            patch.setitem(layout.MAPS, name, replace(layout.MAPS[name], type=bpf.MapType.HASH))
        with loaded("small", cache=headers_cache, qps_max=8, folder=folder) as classifier:
            yield classifier


def test_a_full_map_steers_by_the_slot_s_order(small: Classifier) -> None:
    small.reset()
    small.fabric(uplinks(4))
    for roce in QPS[:8]:
        small.steer(roce.build())
    assert len(small.maps.qps()) == 8
    orders = orders_of(dict.fromkeys(range(4), 1))
    placed = small.maps.placed().sum()
    for roce in QPS[8:16]:
        for living in (0b1111, 0b0110):
            small.maps.set_living(living)
            outcome = small.steer(roce.build())
            h = qp_hash(roce.key)
            assert outcome.verdicts == {Verdict.MAP_FULL: 1}
            assert small.path_of(outcome) == choose((int(p) for p in orders[slot_of(h)][:4]), living)
            assert packets.source_port(outcome.packet, version=4) == source_port_of(h)
            assert outcome.action == (REDIRECT if small.path_of(outcome) else PASS)
    assert small.maps.placed().sum() == placed, "a QP without an entry weighs on no path"


def test_what_answers_in_a_full_map_is_not_taken_off_a_count_that_it_is_not_in(small: Classifier) -> None:
    small.reset()
    small.fabric(uplinks(4), placement=Placement.BALANCED)
    for roce in QPS[:8]:
        small.steer(roce.build())
    for roce in QPS[8:16]:
        answer = replace(roce, opcode=packets.RC_ACKNOWLEDGE)
        assert small.steer(answer.build()).verdicts == {Verdict.MAP_FULL: 1}
    assert small.maps.placed()[:4].tolist() == [2] * 4


def test_a_full_map_does_not_keep_arrivals_from_being_counted(small: Classifier) -> None:
    small.reset()
    for roce in QPS[:8]:
        assert small.observe(roce.build()).verdicts == {Verdict.OBSERVED: 1}
    assert small.observe(QPS[8].build()).verdicts == {Verdict.MAP_FULL: 1}


def test_the_least_recently_used_qp_makes_room(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2))
    entries = classifier.maps.qps_max()
    packet = bytearray(Roce().build())
    qp_at = len(packet) - len(packets.PAYLOAD) - 4 - 7
    for qp in range(entries + 500):
        packet[qp_at : qp_at + 3] = qp.to_bytes(3, "big")
        assert Verdict.MAP_FULL not in classifier.run(Hook.STEER, bytes(packet)).verdicts
    kept = len(classifier.maps.qps())
    assert 0 < kept <= entries
    assert classifier.entry(Roce(dest_qp=entries + 499).key) is not None


# --- Arrivals --------------------------------------------------------------------------------------------------------


def test_an_arrival_is_counted_on_the_path_whose_neighbour_sent_it(classifier: Classifier) -> None:
    roce = Roce()
    packet = roce.build()
    assert classifier.observe(packet).paths == {}
    for path, moves in [(5, 1), (9, 2)]:
        classifier.maps.replace_neighbours(
            {(OWN_IFINDEX, packets.MACS["src"]): path, (OTHER_IFINDEX, packets.MACS["src"]): 3}
        )
        assert classifier.observe(packet).paths == {path: (1, len(packet))}
        entry = classifier.maps.qp(roce.key, "arrivals")
        assert entry is not None
        assert (entry["path"], entry["moves"], entry["home"]) == (path, moves, 0xFF)
