"""Slot tables and placement: properties that hold for any planes, any weights, any order of failures and returns."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from ipaddress import ip_address
from math import ceil, gcd, log
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.core.slots import choose, place, qp_hash, slot_of, slot_table, source_port_of
from qpd.model import SLOTS, Placement, QueuePairKey

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
planes = st.dictionaries(names, st.integers(1, 400), min_size=1, max_size=10)
few_equal_planes = st.sets(names, min_size=2, max_size=8).map(lambda chosen: dict.fromkeys(chosen, 1))
relaxed = settings(max_examples=60, deadline=None)


def first_usable(table: np.ndarray, usable: int) -> np.ndarray:
    """Plane index per slot, -1 where none is usable."""
    alive = (usable >> table.astype(np.int64) & 1).astype(bool)
    first = table[np.arange(SLOTS), alive.argmax(axis=1)].astype(np.int64)
    return np.where(alive.any(axis=1), first, -1)


def fair_shares(count: int, weights: list[int]) -> list[float]:
    return [count * weight / sum(weights) for weight in weights]


class TestHash:
    @pytest.mark.parametrize(
        ("vni", "dst", "dest_qp", "h"),
        [
            (100, "10.1.0.7", 0x112233, 0x197457AA),
            (0, "10.1.0.7", 0x112233, None),
            (100, "2001:db8::7", 0x112233, None),
        ],
    )
    def test_words_are_mixed_as_documented(self, vni: int, dst: str, dest_qp: int, h: int | None) -> None:
        key = QueuePairKey(vni, ip_address(dst), dest_qp)
        address = ip_address(dst)
        mapped = address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
        expected = 0x71706431
        for word in [vni, dest_qp, *(int.from_bytes(mapped[i : i + 4], "big") for i in (0, 4, 8, 12))]:
            expected = ((expected ^ word) * 0x9E3779B1) % 2**32
            expected ^= expected >> 15
        expected ^= expected >> 16
        expected = expected * 0x85EBCA6B % 2**32
        expected ^= expected >> 13
        expected = expected * 0xC2B2AE35 % 2**32
        expected ^= expected >> 16
        assert qp_hash(key) == expected
        if h is not None:
            assert expected == h

    def test_ports_stay_in_the_dynamic_range(self) -> None:
        assert source_port_of(0) == 49152
        assert source_port_of(0xFFFFFFFF) == 65535
        assert slot_of(0xFFFFFFFF) == SLOTS - 1

    def test_slots_and_ports_of_consecutive_queue_pairs_spread(self) -> None:
        hashes = [qp_hash(QueuePairKey(100, ip_address("10.0.0.1"), number)) for number in range(20000)]
        per_slot = np.bincount([slot_of(h) for h in hashes], minlength=SLOTS)
        assert per_slot.max() < 20
        assert len({source_port_of(h) for h in hashes}) > 10000


class TestTable:
    @given(planes, st.randoms())
    @relaxed
    def test_order_of_insertion_does_not_matter(self, weights: Mapping[str, int], random: Random) -> None:
        shuffled = list(weights.items())
        random.shuffle(shuffled)
        assert np.array_equal(slot_table(weights), slot_table(dict(shuffled)))

    @given(planes)
    @relaxed
    def test_every_row_is_a_permutation(self, weights: Mapping[str, int]) -> None:
        table = slot_table(weights)
        assert table.shape == (SLOTS, len(weights))
        assert table.dtype == np.uint8
        assert (np.sort(table, axis=1) == np.arange(len(weights))).all()

    @given(planes)
    @relaxed
    def test_first_choices_follow_weight_to_within_one_slot(self, weights: Mapping[str, int]) -> None:
        counts = np.bincount(slot_table(weights)[:, 0], minlength=len(weights))
        shares = fair_shares(SLOTS, [weights[plane] for plane in sorted(weights)])
        assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))

    @given(planes, st.integers(2, 100))
    @relaxed
    def test_only_the_ratio_of_weights_counts(self, weights: Mapping[str, int], factor: int) -> None:
        scaled = {plane: weight * factor for plane, weight in weights.items()}
        assert np.array_equal(slot_table(weights), slot_table(scaled))

    @given(planes)
    @relaxed
    def test_load_of_one_dead_plane_spreads_by_weight(self, weights: Mapping[str, int]) -> None:
        table = slot_table(weights)
        by_index = [weights[plane] for plane in sorted(weights)]
        for dead in range(len(weights)):
            orphans = table[table[:, 0] == dead]
            rest = [plane for plane in range(len(weights)) if plane != dead]
            if not rest or len(orphans) < len(rest):
                continue
            counts = np.bincount(orphans[:, 1], minlength=len(weights))
            for plane, share in zip(
                rest, fair_shares(len(orphans), [by_index[p] for p in rest]), strict=True
            ):
                assert abs(counts[plane] - share) < 1

    @given(few_equal_planes, st.data())
    @relaxed
    def test_load_of_several_dead_planes_spreads_evenly(
        self, weights: Mapping[str, int], data: st.DataObject
    ) -> None:
        count = len(weights)
        alive = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))
        counts = np.bincount(first_usable(slot_table(weights), sum(1 << p for p in alive)), minlength=count)
        # Each set of dead planes is filled to within one slot: at most one slot a subset of the dead ones.
        assert max(counts[p] for p in alive) - min(counts[p] for p in alive) <= 2 ** (count - len(alive))

    @given(planes, st.data())
    @relaxed
    def test_survivors_never_move_and_history_leaves_no_trace(
        self, weights: Mapping[str, int], data: st.DataObject
    ) -> None:
        table = slot_table(weights)
        usable = (1 << len(weights)) - 1
        choice = first_usable(table, usable)
        for plane in data.draw(st.lists(st.integers(0, len(weights) - 1), max_size=12)):
            usable ^= 1 << plane
            following = first_usable(table, usable)
            moved = choice != following
            if usable >> plane & 1:
                assert (following[moved] == plane).all()
            else:
                assert (choice[moved] == plane).all()
                assert (moved == (choice == plane)).all()
            choice = following
        assert np.array_equal(choice, first_usable(slot_table(dict(weights)), usable))

    @given(few_equal_planes, names)
    @relaxed
    def test_a_new_plane_takes_little_more_than_its_share(self, weights: Mapping[str, int], new: str) -> None:
        grown = {**weights, new: 1}
        if len(grown) == len(weights):
            return
        before = np.array(sorted(weights))[slot_table(weights)[:, 0]]
        after = np.array(sorted(grown))[slot_table(grown)[:, 0]]
        assert SLOTS // len(grown) <= (before != after).sum() <= SLOTS // len(grown) * 1.3 + 32

    def test_another_plane_leaves_weighted_choices_alone(self) -> None:
        """Costs hang on a plane's own weight: the change of one weight moves about the difference of the shares."""
        before = np.array(["a", "b", "c"])[slot_table({"a": 2, "b": 2, "c": 2})[:, 0]]
        after = np.array(["a", "b", "c"])[slot_table({"a": 2, "b": 2, "c": 1})[:, 0]]
        assert (before != after).sum() < SLOTS * (1 / 3 - 1 / 5) * 1.3

    @pytest.mark.parametrize("count", [16, 33, 64])
    def test_many_planes(self, count: int) -> None:
        weights = {f"spine{i}": 1 + i % 3 for i in range(count)}
        table = slot_table(weights)
        assert (np.sort(table, axis=1) == np.arange(count)).all()
        shares = fair_shares(SLOTS, [weights[plane] for plane in sorted(weights)])
        assert np.abs(np.bincount(table[:, 0], minlength=count) - shares).max() < 1

    def test_the_table_is_the_same_on_every_machine(self) -> None:
        """Leaves agree without talking: a change of this digest is a change of every fabric's choices."""
        table = slot_table({"spine1": 1, "spine2": 1, "spine3": 2, "spine4": 1})
        assert hashlib.sha256(table.tobytes()).hexdigest() == GOLDEN

    def test_first_choices_are_those_of_textbook_deferred_acceptance(self) -> None:
        """Gale and Shapley's proposals, one slot at a time: the outcome does not hang on the order of proposals."""
        planes = ["north", "south", "west"]
        cost = {plane: [(1 << 32) - 1 - draw(plane, slot) for slot in range(SLOTS)] for plane in planes}
        room = dict(zip(planes, (1366, 1365, 1365), strict=True))
        held: dict[str, list[tuple[int, int]]] = {plane: [] for plane in planes}
        wishes = [sorted(planes, key=lambda plane: cost[plane][slot]) for slot in range(SLOTS)]
        asking = list(range(SLOTS))
        while asking:
            slot = asking.pop()
            plane = wishes[slot].pop(0)
            heapq.heappush(held[plane], (-cost[plane][slot], slot))
            if len(held[plane]) > room[plane]:
                asking.append(heapq.heappop(held[plane])[1])
        table = slot_table(dict.fromkeys(planes, 1))
        for index, plane in enumerate(planes):
            assert {slot for _, slot in held[plane]} == set(np.flatnonzero(table[:, 0] == index).tolist())

    def test_weighted_choices_are_nearly_those_of_weighted_rendezvous(self) -> None:
        """Against floating point: the plane with the least -log(u) / weight."""
        weights = {"north": 5, "south": 2, "west": 1}
        pure = [
            min(
                range(3),
                key=lambda i: -log((draw(plane_names[i], slot) + 1) / 2**32) / weights[plane_names[i]],
            )
            for plane_names in [sorted(weights)]
            for slot in range(SLOTS)
        ]
        assert (slot_table(weights)[:, 0] == np.array(pure)).mean() > 0.97

    @pytest.mark.parametrize(
        ("weights", "message"),
        [({"a": 0}, "weight 0 of plane a"), ({f"p{i}": 1 for i in range(65)}, "65 planes")],
    )
    def test_what_cannot_be_a_table_is_refused(self, weights: Mapping[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            slot_table(weights)

    def test_no_plane_no_column(self) -> None:
        assert slot_table({}).shape == (SLOTS, 0)


GOLDEN = "ca9b50dc2d9bf71a7f0ffcbcc69dd9449b21043a8d0bac1fc71450bb26b2b102"


def draw(plane: str, slot: int) -> int:
    """The upper half of splitmix64's output number slot + 1 from the plane's seed, written without numpy."""
    state = int.from_bytes(hashlib.blake2b(plane.encode(), digest_size=8).digest(), "big")
    z = (state + (slot + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) >> 32


class TestPlace:
    @given(
        st.permutations(range(6)),
        st.integers(0, 63),
        st.lists(st.integers(0, 50), min_size=6, max_size=6),
        st.lists(st.integers(1, 9), min_size=6, max_size=6),
    )
    def test_no_path_is_filled_over_its_share(
        self, order: list[int], usable: int, active: list[int], weights: list[int]
    ) -> None:
        members = dict(enumerate(weights))
        home = place(order, usable, Placement.BALANCED, active, members)
        alive = [path for path in order if usable >> path & 1]
        if not alive:
            assert home is None
            return
        assert home in alive
        total = sum(weights[path] for path in alive)
        queue_pairs = sum(active[path] for path in alive) + 1
        bounds = {path: ceil(queue_pairs * weights[path] / total) for path in alive}
        assert active[home] < bounds[home]
        for passed_over in alive[: alive.index(home)]:
            assert active[passed_over] >= bounds[passed_over]

    @given(st.permutations(range(6)), st.integers(0, 63))
    def test_by_hash_it_is_the_first_living_choice(self, order: list[int], usable: int) -> None:
        members = dict.fromkeys(range(6), 1)
        assert place(order, usable, Placement.HASH, [9] * 6, members) == choose(order, usable)

    @given(
        st.permutations(range(6)),
        st.integers(0, 63),
        st.lists(st.integers(0, 50), min_size=6, max_size=6),
        st.sampled_from(Placement),
    )
    def test_what_only_answers_goes_by_its_slot_alone(
        self, order: list[int], usable: int, active: list[int], placement: Placement
    ) -> None:
        members = dict.fromkeys(range(6), 1)
        assert place(order, usable, placement, active, members, answers=True) == choose(order, usable)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 200))
    @settings(deadline=None)
    def test_placed_one_after_another_queue_pairs_fill_by_weight(
        self, weights: list[int], count: int
    ) -> None:
        table = slot_table({str(path): weight for path, weight in enumerate(weights)})
        active = [0] * len(weights)
        for number in range(count):
            slot = slot_of(qp_hash(QueuePairKey(100, ip_address("10.0.0.1"), number)))
            home = place(
                table[slot].tolist(),
                (1 << len(weights)) - 1,
                Placement.BALANCED,
                active,
                dict(enumerate(weights)),
            )
            assert home is not None
            active[home] += 1
        total = sum(weights) // gcd(*weights)
        for path, weight in enumerate(weights):
            assert active[path] <= ceil(count * weight // gcd(*weights) / total) + 1
        assert sum(active) == count

    def test_equal_queue_pairs_end_exactly_even(self) -> None:
        table = slot_table(dict.fromkeys("abcd", 1))
        active = [0] * 4
        for number in range(32):
            slot = slot_of(qp_hash(QueuePairKey(100, ip_address("10.0.0.1"), 0x100 + number)))
            home = place(table[slot].tolist(), 15, Placement.BALANCED, active, dict.fromkeys(range(4), 1))
            assert home is not None
            active[home] += 1
        assert active == [8, 8, 8, 8]
