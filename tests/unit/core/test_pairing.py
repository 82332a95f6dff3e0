"""Pairs from PSNs: all of those that can be told, and never a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.core.evidence import PROOFS
from qpd.core.pairing import Pairing
from qpd.core.sighting import newer

from .rc_world import MS, Network, World, names

Gap = Callable[[Random], int]
PSN_TOP = 1 << 24


def irregular(mean_ns: int) -> Gap:
    return lambda random: int(random.expovariate(1 / mean_ns))


def regular(every_ns: int) -> Gap:
    return lambda _: every_ns


def build(
    world: World, count: int, psn: Callable[[int], int], *, near_sends: bool = True, both_ways: bool = False
) -> World:
    """Connections of QPs numbered without any system."""
    far = list(range(50_000, 50_000 + count))
    world.random.shuffle(far)
    for index in range(count):
        world.connect(1000 + index, far[index], psn(index), near_sends=near_sends, both_ways=both_ways)
    return world


@pytest.mark.parametrize("near_sends", [True, False], ids=["requests leave", "requests arrive"])
@pytest.mark.parametrize("same_psn", [True, False], ids=["same PSN", "random PSNs"])
def test_all_are_known_within_two_seconds(same_psn: bool, near_sends: bool) -> None:
    """At the requesters' leaf and at the responders', 48 QPs that start together."""
    rolls = Random(7)
    world = World(Network(), 1, irregular(10 * MS))
    build(world, 48, lambda _: 0 if same_psn else rolls.randrange(PSN_TOP), near_sends=near_sends)
    stated = world.watch(Pairing(), 2)
    assert {names(pair) for _, pair in stated} == world.truth
    assert len(stated) == len(world.truth), "each is stated once"


@pytest.mark.parametrize("same_psn", [True, False], ids=["same PSN", "random PSNs"])
def test_a_thousand_qps_of_two_hosts(same_psn: bool) -> None:
    """1 024 that start together: 99.9 % within two seconds, at 100 packets a second each, and none wrong."""
    rolls = Random(8)
    world = World(Network(), 11, irregular(10 * MS))
    build(world, 1024, lambda _: 0 if same_psn else rolls.randrange(PSN_TOP))
    stated = {names(pair) for _, pair in world.watch(Pairing(), 2)}
    assert stated <= world.truth
    assert len(stated) >= 0.999 * 1024


@pytest.mark.parametrize(
    "network",
    [Network(loss=0.02), Network((20_000, 37 * MS)), Network(jitter_ns=30 * MS)],
    ids=["loss", "75 ms", "reordering"],
)
def test_a_bad_network_makes_it_slower_not_wrong(network: Network) -> None:
    world = build(World(network, 2, irregular(10 * MS)), 16, lambda _: 0)
    stated = {names(pair) for _, pair in world.watch(Pairing(), 8)}
    assert stated <= world.truth
    assert len(stated) >= 14


def test_psns_that_pass_their_end() -> None:
    world = build(World(Network(), 3, irregular(5 * MS)), 24, lambda index: PSN_TOP - 5 - index)
    assert {names(pair) for _, pair in world.watch(Pairing(), 2)} == world.truth


def test_data_in_both_directions() -> None:
    world = build(World(Network(), 4, irregular(10 * MS)), 24, lambda _: 0, both_ways=True)
    assert {names(pair) for _, pair in world.watch(Pairing(), 2)} == world.truth


@pytest.mark.parametrize("near_sends", [True, False], ids=["requests leave", "requests arrive"])
def test_lockstep_is_told_apart_by_the_order_in_each_round(near_sends: bool) -> None:
    """256 QPs through the same PSNs at the same pace, one after the other: no look at PSNs alone tells them apart."""
    world = World(Network(), 5, regular(40 * MS))
    for index in range(256):
        world.connect(1000 + index, 50_000 + index * 37 % 256, 0, near_sends=near_sends, message=1)
        world.run_until(world.now + 60_000)
    stated = {names(pair) for _, pair in world.watch(Pairing(), 2)}
    assert stated == world.truth


def test_a_lockstep_in_which_a_partner_is_out_of_sight_brings_none() -> None:
    """One answers nobody who is seen: then it is not known who is everybody."""
    world = World(Network(), 5, regular(40 * MS))
    world.hidden = {(True, 50_000)}
    for index in range(8):
        world.connect(1000 + index, 50_000 + index, 0, message=1)
        world.run_until(world.now + 60_000)
    assert world.watch(Pairing(), 3) == []


def test_lockstep_at_the_same_moments_cannot_be_told_apart() -> None:
    """The same packets at the same moments: any assignment fits, so there is none."""
    world = build(World(Network(), 5, regular(10 * MS)), 4, lambda _: 0)
    assert world.watch(Pairing(), 3) == []


def test_old_entries_are_in_nobodys_way() -> None:
    """What is left in the maps of QPs that ended long ago, some far ahead."""
    world = World(Network(), 6, irregular(10 * MS))
    for index in range(4):
        world.connect(1 + index, 11 + index, 1000 * index, left=40 * index)
    world.run_until(world.now + 1000 * MS)
    before = set(world.truth)
    build(world, 8, lambda _: 0)
    stated = {names(pair) for _, pair in world.watch(Pairing(), 9)}
    assert stated <= world.truth
    assert stated >= world.truth - before


def test_a_number_that_is_used_again_is_learned_again() -> None:
    world = build(World(Network(), 7, irregular(10 * MS)), 2, lambda _: 0)
    pairing = Pairing()
    assert len(world.watch(pairing, 2)) == 2
    (one, first), (other, second) = sorted(world.truth)
    # Both connections end, and their numbers are connected crosswise: the kernel sees PSNs jump, and forgets.
    for connection in world.connections:
        connection.left, connection.next_psn = 0, connection.newest
    world.run_until(world.now + 500 * MS)
    world.leaving.clear()
    world.arriving.clear()
    world.truth.clear()
    world.connect(one, second, 500_000)
    world.connect(other, first, 500_000)
    assert {names(pair) for _, pair in world.watch(pairing, 3)} == {(one, second), (other, first)}


def test_a_half_is_forgotten_when_its_other_half_is_gone() -> None:
    world = build(World(Network(), 8, irregular(10 * MS)), 2, lambda _: 0)
    pairing = Pairing()
    world.watch(pairing, 2)
    near, far = min(world.truth)
    del world.leaving[far]
    world.watch(pairing, 0.2)
    assert world.arriving[near].peer_qp == 0
    assert {names(pair) for _, pair in world.watch(pairing, 3)} == {(near, far)}


def test_what_is_contradicted_ends_with_all_of_its_hosts() -> None:
    """Told wrongly (as by a forged CM message): evidence is heard all the same."""
    world = build(World(Network(), 9, irregular(10 * MS)), 3, lambda index: 100_000 * (3 - index))
    world.run_until(world.now + 100 * MS)
    (a, _), (b, second), (_, third) = sorted(world.truth)
    world.arriving[a].peer_qp, world.leaving[second].peer_qp = second, a
    world.arriving[b].peer_qp, world.leaving[third].peer_qp = third, b
    pairing = Pairing()
    world.watch(pairing, 6)
    assert {(near, entry.peer_qp) for near, entry in world.arriving.items()} == world.truth
    assert PROOFS > 1


def test_only_so_many_are_looked_at_together() -> None:
    world = build(World(Network(), 10, irregular(10 * MS)), 8, lambda _: 0)
    pairing = Pairing(edges_max=63)
    assert world.watch(pairing, 2) == []
    assert not pairing.at_work
    assert len(world.watch(Pairing(edges_max=64), 2)) == 8


@pytest.mark.parametrize("near_sends", [True, False], ids=["requests leave", "requests arrive"])
def test_qps_that_are_over_before_anybody_looks(near_sends: bool) -> None:
    """What is left in the maps tells, where first PSNs were drawn: around their end as well."""
    world = World(Network(), 21, irregular(100_000))
    around = PSN_TOP - 1100
    for index, psn in enumerate([around, *(world.random.randrange(PSN_TOP) for _ in range(15))]):
        left = 1300 if psn == around else 40
        world.connect(1000 + index, 50_000 + index * 7 % 97, psn, near_sends=near_sends, left=left)
    world.run_until(world.now + 500 * MS)
    stated = world.watch(Pairing(), 0.15)
    assert {names(pair) for _, pair in stated} == world.truth
    assert len(stated) == len(world.truth), "each is stated once"


def test_qps_that_were_alike_and_are_over_cannot_be_told_apart() -> None:
    world = World(Network(), 22, irregular(100_000))
    for index in range(4):
        world.connect(1000 + index, 50_000 + index * 7 % 97, 5_000_000, left=40)
    world.run_until(world.now + 500 * MS)
    assert world.watch(Pairing(), 3) == []


def test_those_at_work_with_drawn_psns_are_told_at_once() -> None:
    rolls = Random(9)
    world = build(World(Network(), 23, irregular(10 * MS)), 48, lambda _: rolls.randrange(PSN_TOP))
    world.run_until(world.now + 200 * MS)
    assert len(world.watch(Pairing(), 0.25)) == 48


@pytest.mark.parametrize("psn", [0, 1, 5_000_000], ids=["0", "1", "shared"])
def test_halves_of_two_pairs_whose_first_psns_were_chosen_do_not_meet(psn: int) -> None:
    """The other halves, and whatever would show that this leaf sees half, pass elsewhere; here both end at one PSN."""
    world = World(Network(), 24, irregular(100_000))
    world.connect(1000, 50_000, psn, left=40)
    world.connect(1001, 50_001, psn, left=40)
    world.hidden = {(True, 50_000), (False, 1001)}
    if psn > 1:
        world.connect(1002, 50_002, psn, left=1)
    world.run_until(world.now + 500 * MS)
    assert world.watch(Pairing(), 3) == []


def test_what_is_left_when_others_are_evicted_is_no_pair() -> None:
    """Two connections at one pace, over now, and of either one entry is gone: what is left fits, and is no pair."""
    world = build(World(Network(), 23, regular(10 * MS)), 1, lambda _: 0)
    for near, far in ((2000, 60_000), (2001, 60_001)):
        world.connect(near, far, 0, both_ways=True, left=80)
    pairing = Pairing()
    watched = {names(pair) for _, pair in world.watch(pairing, 1.5)}
    assert not watched & {(2000, 60_000), (2001, 60_001)}, "they could not be told apart"
    del world.arriving[2001], world.leaving[60_000]
    assert {names(pair) for _, pair in world.watch(pairing, 3)} <= world.truth


def test_an_entry_that_comes_back_is_not_held_against_its_partner() -> None:
    """Evicted with requests on their way: their answers seem to come unasked."""
    world = World(Network((1_000, 37 * MS)), 24, irregular(5 * MS))
    for near, far in ((1000, 50_000), (1001, 50_001), (1002, 50_002)):
        world.connect(near, far, 0, window=200)
    pairing = Pairing()
    stated = {names(pair) for _, pair in world.watch(pairing, 0.3, 20 * MS)}
    assert not stated, "too early to be told"
    del world.leaving[50_001]
    assert {names(pair) for _, pair in world.watch(pairing, 6, 20 * MS)} == world.truth


@given(st.integers(0, PSN_TOP - 1), st.integers(-(1 << 23), (1 << 23) - 1))
def test_serial_arithmetic(psn: int, distance: int) -> None:
    assert newer((psn + distance) % PSN_TOP, psn) == distance


@st.composite
def worlds(draw: st.DrawFn, starts: tuple[str, ...] = ("same", "near", "random", "end")) -> World:
    network = Network(
        delay_ns=(draw(st.sampled_from([1_000, MS])), draw(st.sampled_from([1_000, 50_000, MS, 37 * MS]))),
        jitter_ns=draw(st.sampled_from([0, 50_000, 2 * MS, 20 * MS])),
        loss=draw(st.sampled_from([0.0, 0.001, 0.02, 0.1, 0.4])),
        timeout_ns=draw(st.sampled_from([10, 67, 400])) * MS,
    )
    mean = draw(st.sampled_from([2, 5, 10, 50, 150])) * MS
    gap = draw(
        st.sampled_from(
            [
                regular(mean),
                irregular(mean),
                lambda random: int(mean * (1 + 0.1 * random.random())),
            ]
        )
    )
    world = World(network, draw(st.integers(0, 1 << 30)), gap)
    start = draw(st.sampled_from(starts))
    apart = draw(st.sampled_from([0, 30_000, 300_000]))
    for index in range(draw(st.integers(1, 6))):
        psn = {
            "same": 0,
            "near": draw(st.integers(0, 50)),
            # Not hypothesis' own choice, which is anything but random.
            "random": world.random.randrange(PSN_TOP),
            "end": PSN_TOP - 20,
        }[start]
        world.connect(
            1000 + index,
            50_000 + index * 7 % 97,
            psn,
            near_sends=draw(st.booleans()),
            both_ways=draw(st.booleans()),
            window=draw(st.sampled_from([1, 4, 16, 200])),
            message=draw(st.sampled_from([1, 4, 16])),
            left=draw(st.sampled_from([20, 200, 1 << 40])),
        )
        world.run_until(world.now + apart)
    return world


@settings(max_examples=40, deadline=None)
@given(worlds(), st.sampled_from([20, 50, 200]))
def test_never_a_wrong_pair(world: World, every_ms: int) -> None:
    """Whatever is lost, delayed, overtaken, ends early, or goes alike."""
    stated = world.watch(Pairing(), 2.5, every_ms * MS)
    assert {names(pair) for _, pair in stated} <= world.truth


@settings(max_examples=40, deadline=None)
@given(worlds(), st.sampled_from([20, 200]), st.integers(0, 300))
def test_never_a_wrong_pair_of_entries_that_begin_amid_traffic(
    world: World, every_ms: int, before_ms: int
) -> None:
    """Answers to what was asked before the programs were attached, or before an entry was evicted."""
    pairing = Pairing()
    world.run_until(world.now + before_ms * MS)
    world.forget()
    stated = world.watch(pairing, 1, every_ms * MS)
    for entries in (world.leaving, world.arriving):
        for qp in list(entries):
            if world.random.random() < 0.5:
                del entries[qp]
    stated += world.watch(pairing, 1, every_ms * MS)
    assert {names(pair) for _, pair in stated} <= world.truth


@settings(max_examples=40, deadline=None)
@given(worlds(("random",)), st.sampled_from([20, 200]), st.data())
def test_never_a_wrong_pair_of_those_whose_partners_pass_elsewhere(
    world: World, every_ms: int, data: st.DataObject
) -> None:
    """Any directions may be out of sight, as long as first PSNs are drawn."""
    directions = sorted({(leaves, pair[leaves]) for pair in world.truth for leaves in (False, True)})
    world.hidden = data.draw(st.sets(st.sampled_from(directions)))
    stated = world.watch(Pairing(), 2.5, every_ms * MS)
    assert {names(pair) for _, pair in stated} <= world.truth
