"""Schedules and ranks: whatever the order of arrival, everybody gets the sum, iteration after iteration."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.lab.endpoint.connections import SourcePorts, check
from qpd.lab.errors import LabError
from qpd.lab.workload import PROFILES, Workload, schedule, values
from qpd.lab.workload.rank import PhaseTimes, Posting, Rank, layout
from qpd.lab.workload.report import Iteration, RankTimes, Report
from qpd.lab.workload.schedule import Schedule


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    elements, chunks = draw(st.integers(1, 60)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["ring", "tree", "hierarchical", "parameter-server"]))
    if kind == "hierarchical":
        size, count = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        ranks = draw(st.permutations(range(size * count)))
        sites = [ranks[index * size : (index + 1) * size] for index in range(count)]
        return schedule.hierarchical(sites, elements, chunks)
    if kind == "parameter-server":
        return schedule.parameter_server(draw(st.integers(1, 5)), draw(st.integers(1, 3)), elements, chunks)
    ranks_count = draw(st.integers(2, 8))
    return (schedule.ring if kind == "ring" else schedule.tree)(ranks_count, elements, chunks)


@dataclass
class Cluster:
    """Ranks with a network that delivers messages in any order, and reads their bytes late or early."""

    plan: Schedule
    rng: random.Random
    message: int
    iterations: int

    def __post_init__(self) -> None:
        self.ranks = [
            Rank(self.plan, rank, np.zeros(layout(self.plan, rank).size, dtype=np.uint8), self.message)
            for rank in range(self.plan.ranks)
        ]
        self.flight: list[tuple[int, Posting, bytes | None]] = []
        self.finished = [0] * self.plan.ranks
        self.sent: dict[int, int] = defaultdict(int)

    def begin(self, number: int) -> None:
        rank = self.ranks[number]
        mine = number in self.plan.contributors
        rank.vector[:] = values.contribution(number, rank.iteration + 1, 0, self.plan.elements) if mine else 0
        self.send(number, rank.begin(1))

    def send(self, number: int, postings: list[Posting]) -> None:
        for one in postings:
            self.sent[number] += one.length
            early = self.rng.random() < 0.5
            memory = self.ranks[number].memory
            data = memory[one.source : one.source + one.length].tobytes() if early else None
            self.flight.append((number, one, data))

    def deliver(self, index: int) -> None:
        source, one, data = self.flight.pop(index)
        # A packet that is sent again is read again, from the memory as it is by then.
        body = data or self.ranks[source].memory[one.source : one.source + one.length].tobytes()
        target = self.ranks[one.destination]
        target.memory[one.address : one.address + one.length] = np.frombuffer(body, dtype=np.uint8)
        self.send(one.destination, target.arrived(one.immediate, one.address, one.length, 2))
        self.ranks[source].acknowledged(one.immediate, one.length, 3)

    def run(self) -> None:
        ready = set(range(self.plan.ranks))
        while ready or self.flight:
            choice = self.rng.randrange(len(ready) + len(self.flight))
            if choice < len(ready):
                number = sorted(ready)[choice]
                ready.discard(number)
                self.begin(number)
            else:
                self.deliver(choice - len(ready))
            for number, rank in enumerate(self.ranks):
                begun = rank.iteration == self.finished[number]
                if number not in ready and begun and rank.done:
                    self.check(number)
                    self.finished[number] += 1
                    if self.finished[number] < self.iterations:
                        ready.add(number)

    def check(self, number: int) -> None:
        if number in self.plan.contributors:
            expected = values.total(
                self.plan.contributors, self.ranks[number].iteration, 0, self.plan.elements
            )
            assert np.array_equal(self.ranks[number].vector, expected), f"rank {number}"


@settings(deadline=None, max_examples=150)
@given(
    plan=schedules(),
    seed=st.integers(0, 1 << 30),
    message=st.sampled_from([4, 12, 64, 1 << 20]),
)
def test_everybody_gets_the_sum_in_every_order(plan: Schedule, seed: int, message: int) -> None:
    """Three iterations; the fast ones run ahead of the slow ones; no place is overwritten before it is used."""
    cluster = Cluster(plan, random.Random(seed), message, iterations=3)
    cluster.run()
    assert cluster.finished == [3] * plan.ranks


def test_a_wrong_sum_is_noticed() -> None:
    """The check of the test before can fail: a rank adds something twice."""
    cluster = Cluster(schedule.ring(3, 30), random.Random(1), 1 << 20, iterations=1)
    original = cluster.ranks[1].arrived

    def twice(immediate: int, address: int, length: int, now_ns: int) -> list[Posting]:
        word = cluster.ranks[1].memory[address : address + 4].view(np.uint32)
        word += np.uint32(1)
        return original(immediate, address, length, now_ns)

    cluster.ranks[1].arrived = twice  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="rank"):
        cluster.run()


@given(st.integers(2, 8), st.integers(1, 3))
def test_a_ring_sends_twice_the_vector_less_one_part(ranks: int, chunks: int) -> None:
    elements = ranks * chunks * 10
    plan = schedule.ring(ranks, elements, chunks)
    for rank in range(ranks):
        sent = sum(one.end - one.begin for one in plan.transfers if one.source == rank)
        assert sent == 2 * (ranks - 1) * elements // ranks
    assert {(one.destination - one.source) % ranks for one in plan.transfers} == {1}


@given(st.integers(2, 9))
def test_a_tree_has_logarithmic_depth_and_sends_at_most_what_its_branches_are(ranks: int) -> None:
    plan = schedule.tree(ranks, 120)
    assert len(plan.phases) == 2 * ((ranks).bit_length() - 1)
    for rank in range(ranks):
        sent = sum(one.end - one.begin for one in plan.transfers if one.source == rank)
        # One parent and two children in each tree, each tree half of the vector.
        assert sent <= 3 * 120


def test_hierarchical_crosses_with_two_vectors_a_site_where_a_mixed_ring_needs_more() -> None:
    """Three workers at each of two sites, 60 elements."""
    site = {rank: rank // 3 for rank in range(6)}

    def crossing(plan: Schedule) -> int:
        return sum(one.end - one.begin for one in plan.transfers if site[one.source] != site[one.destination])

    assert crossing(schedule.hierarchical([[0, 1, 2], [3, 4, 5]], 60)) == 2 * 60
    assert crossing(schedule.ring(6, 60)) == 2 * 100
    with pytest.raises(LabError, match="sites of 2, 1 workers; give each site the same number"):
        schedule.hierarchical([[0, 1], [2]], 60)


def test_each_server_has_its_part() -> None:
    plan = schedule.parameter_server(4, 2, 100)
    pushed: dict[int, int] = defaultdict(int)
    for one in plan.transfers:
        if one.reduce:
            pushed[one.destination] += one.end - one.begin
    assert pushed == {4: 200, 5: 200}


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True),
    st.integers(0, 5000),
    st.integers(0, 1 << 27),
)
def test_the_total_is_the_sum_of_the_contributions(ranks: list[int], iteration: int, begin: int) -> None:
    parts = [values.contribution(rank, iteration, begin, begin + 8) for rank in ranks]
    assert np.array_equal(
        np.sum(parts, axis=0, dtype=np.uint32), values.total(ranks, iteration, begin, begin + 8)
    )


def test_profiles_have_the_published_volumes_and_survive_json() -> None:
    assert PROFILES["allreduce"].bytes == 312_000_000
    assert len(PROFILES["allreduce"].workers) == 4
    server = PROFILES["parameter-server"]
    assert (server.bytes, len(server.workers), len(server.servers)) == (459_000_000, 4, 1)
    for name, workload in PROFILES.items():
        again = Workload.from_mapping(json.loads(json.dumps(workload.to_mapping())))
        assert again == workload, name


def test_connections_are_the_schedules_own_and_repeatable() -> None:
    workload = Workload("allreduce", ("a-1", "a-2", "b-1"), 3000, qps=5, source_ports=SourcePorts.RANDOM)
    made = workload.connections()
    assert set(made) == {(0, 1), (1, 2), (2, 0)}
    assert {len(connections) for connections in made.values()} == {5}
    check([one for connections in made.values() for one in connections])
    assert made == workload.connections()


MAPPING = {"kind": "allreduce", "workers": ["a", "b"], "bytes": 100}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "gossip"}, "workload.kind: 'gossip'"),
        ({"algorithm": "star"}, "workload.algorithm: 'star': give ring, tree, hierarchical"),
        ({"workers": ["a", "a"]}, "name each host once"),
        ({"workers": "a"}, "give a list of hosts"),
        ({"workers": ["a"]}, "name 2 hosts at least"),
        ({"servers": ["c"]}, "an allreduce has none"),
        ({"kind": "parameter-server"}, "name a host that is no worker"),
        ({"message": 6}, "a multiple of 4"),
        ({"bytes": 0}, "workload.bytes: 0"),
        ({"qps": 1.5}, "workload.qps: 1.5"),
        ({"compute": -1}, "workload.compute: -1"),
        ({"compute": "fast"}, "workload.compute: 'fast': give seconds"),
        ({"message": "big"}, "workload.message: 'big'"),
        ({"sites": ["a"]}, "workload.sites"),
        ({"transport": 3}, "workload.transport: 3: give a mapping"),
        ({"transport": {"rate": "fast"}}, "transport.rate: 'fast'"),
        ({"transport": {"dcqcn": "maybe"}}, "transport.dcqcn: 'maybe'"),
        ({"source_ports": "odd"}, "give linux, fixed, random, bins"),
        ({"colour": 1}, "workload.colour: 1: there is no such key"),
        ({"transport": {"mtu": 1500}}, "transport.mtu: 1500: give one of 256"),
        ({"transport": {"mut": 1024}}, "transport.mut: there is no such key"),
        ({"transport": {"timeout": 40}}, "transport.timeout: 40: give 0 to 31"),
    ],
)
def test_bad_input_gets_one_clear_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(LabError, match=words.replace("(", r"\(")) as caught:
        Workload.from_mapping({**MAPPING, **change})
    assert "\n" not in str(caught.value)


def times(host: str, begin: int, communicate: int, end: int, wrong: int = 0) -> RankTimes:
    second = 1_000_000_000
    phases = (PhaseTimes(communicate * second, end * second), PhaseTimes())
    return RankTimes(host, begin * second, communicate * second, end * second, phases, wrong)


def test_a_report_says_who_was_late() -> None:
    ranks = (
        times("a", 10, 12, 20),
        times("b", 11, 15, 21),
        times("c", 10, 12, 29),
        times("server", 1, 12, 20),
    )
    iteration = Iteration(0, ("push", "pull"), ranks, workers=3)
    said = iteration.to_json()
    assert [said[key] for key in ("seconds", "compute_s", "communication_s")] == [19, 2, 17]
    assert [said[key] for key in ("straggler", "lag_s")] == ["c", 8.5]
    assert [said[key] for key in ("late_start", "late_start_s")] == ["b", 3]
    assert [phase["seconds"] for phase in said["phases"]] == [17, 0]


def test_a_report_is_not_ok_with_a_wrong_value_or_a_missing_iteration() -> None:
    workload = Workload("allreduce", ("a", "b"), 100, iterations=1)
    right = Iteration(0, ("x", "y"), (times("a", 1, 2, 3), times("b", 1, 2, 3)), 2)
    wrong = Iteration(0, ("x", "y"), (times("a", 1, 2, 3), times("b", 1, 2, 3, wrong=4)), 2)
    assert Report(workload, [right]).ok
    assert not Report(workload, []).ok
    assert not Report(workload, [wrong]).ok
    assert Report(workload, [wrong]).wrong_values == 4
    assert not Report(workload, [right], failures=["a: QP 0x7: transport retry counter exceeded"]).ok
    json.dumps(Report(workload, [right]).to_json())
