"""Which home a new QP gets: by its slot, and in balance with the others'."""

from __future__ import annotations

import os
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from qpd.core.slots import place, qp_hash, slot_of
from qpd.kernel import bpf, layout, sources
from qpd.model import PATHS_MAX, Group, Hook, Placement, QueuePairKey
from tests.ebpf.harness import Classifier, Uplink, loaded, orders_of, uplinks
from tests.ebpf.packets import Roce

pytestmark = pytest.mark.root


def homes(classifier: Classifier) -> Counter[int]:
    """How many QPs have their home on each path."""
    return Counter(int(home) for home in classifier.maps.qps()["value"]["home"])


def weighted(weights: list[int]) -> list[Uplink]:
    return [Uplink(1000 + n, f"fe80::{n + 1}", weight=weight) for n, weight in enumerate(weights)]


def test_the_program_hashes_as_the_daemon_does(classifier: Classifier) -> None:
    """Random VNIs, hosts of both families and QPs, down to the slot and the source port."""
    classifier.fabric(uplinks(1))
    random = Random(4791)
    for _ in range(200):
        version = random.choice((4, 6))
        vni, qp = random.choice((None, random.getrandbits(24))), random.getrandbits(24)
        host = ip_address(random.getrandbits(32) if version == 4 else bytes([0x20, *random.randbytes(15)]))
        layers = Roce(inner=version, vni=vni, dest_qp=qp).layers()
        innermost: Any = list(layers.iterpayloads())[-4]  # IP, UDP, BTH, data
        innermost.dst = str(host)
        classifier.steer(bytes(layers))
        key = QueuePairKey(vni or 0, host, qp)
        entry = classifier.entry(key)
        assert entry is not None, key
        h = qp_hash(key)
        assert (entry["slot"], entry["source_port"]) == (h & 4095, 49152 + (h >> 18))


def test_hash_placement_takes_the_slot_s_first_living_path(classifier: Classifier) -> None:
    classifier.fabric(weighted([1, 2, 1, 4]))
    classifier.maps.set_living(0b1101)
    orders = orders_of({0: 1, 1: 2, 2: 1, 3: 4})
    for qp in range(300):
        roce = Roce(dest_qp=qp)
        order = [int(path) for path in orders[slot_of(qp_hash(roce.key))][:4]]
        classifier.steer(roce.build())
        entry = classifier.entry(roce.key)
        assert entry is not None
        assert entry["home"] == place(order, 0b1101, Placement.HASH, [0] * 4, {0: 1, 1: 2, 2: 1, 3: 4})


@pytest.mark.parametrize(
    "weights", [[1, 1], [1] * 4, [1] * 3, [3, 1], [1, 2, 5], [7, 1, 1, 1], [1] * 64, [65535, 1]]
)
def test_balanced_placement_is_the_daemon_s_rule_and_never_exceeds_a_share(
    classifier: Classifier, weights: list[int]
) -> None:
    """After n QPs no path holds more than ceil(n * weight / total), and each went where slots.place() says."""
    classifier.fabric(weighted(weights), placement=Placement.BALANCED)
    table = orders_of(dict(enumerate(weights)))
    usable, total = (1 << len(weights)) - 1, sum(weights)
    active = [0] * len(weights)
    for n in range(1, 130):
        roce = Roce(dest_qp=n * 7)
        order = [int(path) for path in table[slot_of(qp_hash(roce.key))][: len(weights)]]
        expected = place(order, usable, Placement.BALANCED, active, dict(enumerate(weights)))
        home = classifier.path_of(classifier.steer(roce.build()))
        assert home == expected
        active[home] += 1
        assert all(active[p] <= -(-n * w // total) for p, w in enumerate(weights))
    assert classifier.maps.placed()[: len(weights)].tolist() == active
    assert homes(classifier) == Counter({p: n for p, n in enumerate(active) if n})


@pytest.mark.parametrize("paths", [2, 4])
def test_32_qps_spread_evenly(classifier: Classifier, paths: int) -> None:
    classifier.fabric(uplinks(paths), placement=Placement.BALANCED)
    for qp in range(32):
        classifier.steer(Roce(dest_qp=qp).build())
    assert set(homes(classifier).values()) == {32 // paths}


def test_balance_counts_living_members_only_and_homes_are_kept(classifier: Classifier) -> None:
    classifier.fabric(uplinks(4), placement=Placement.BALANCED)
    for qp in range(40):
        classifier.steer(Roce(dest_qp=qp).build())
    before = {bytes(record["key"]): int(record["value"]["home"]) for record in classifier.maps.qps()}
    classifier.maps.set_living(0b0111)
    for qp in range(40, 70):
        classifier.steer(Roce(dest_qp=qp).build())
    assert homes(classifier) == {0: 20, 1: 20, 2: 20, 3: 10}
    after = {bytes(record["key"]): int(record["value"]["home"]) for record in classifier.maps.qps()}
    assert all(after[key] == home for key, home in before.items())


def test_qps_that_are_gone_make_room(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2), placement=Placement.BALANCED)
    for qp in range(20):
        classifier.steer(Roce(dest_qp=qp).build())
    gone = np.zeros(PATHS_MAX, layout.LOAD)
    gone["qps"][1] = 10
    classifier.maps._tables["gone"].write(np.arange(PATHS_MAX, dtype=layout.INDEX), gone)
    for qp in range(20, 30):
        assert classifier.path_of(classifier.steer(Roce(dest_qp=qp).build())) == 1


def test_a_count_of_gone_that_runs_ahead_is_taken_for_an_empty_path(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2), placement=Placement.BALANCED)
    gone = np.zeros(PATHS_MAX, layout.LOAD)
    gone["qps"][0] = 5
    classifier.maps._tables["gone"].write(np.arange(PATHS_MAX, dtype=layout.INDEX), gone)
    for qp in range(4):
        classifier.steer(Roce(dest_qp=qp).build())
    assert sum(homes(classifier).values()) == 4


def test_groups_share_the_count_of_the_paths_that_they_share(classifier: Classifier) -> None:
    classifier.fabric(uplinks(4), ["192.0.2.0/24"], placement=Placement.BALANCED)
    classifier.maps.write_group(Group(1, {0: 1, 1: 1}, 0))
    classifier.maps.write_destinations({ip_network("2001:db8::/32"): 1})
    for qp in range(20):
        classifier.steer(Roce(outer=6, dest_qp=qp).build())
    assert homes(classifier) == {0: 10, 1: 10}
    for qp in range(20, 40):
        classifier.steer(Roce(dest_qp=qp).build())
    assert homes(classifier) == {0: 10, 1: 10, 2: 10, 3: 10}


# --- Two CPUs --------------------------------------------------------------------------------------------------------

QPS = 20_000
ROUNDS = 300
STEER = "return steer_packet(skb, packet, own);"
NUMBERED = f"packet->key.dest_qp = skb->mark + own->verdicts[HOOK_OBSERVE][VERDICT_BFD]++ % {QPS};"
"""Each run takes the packet for the next QP's, so that one call places thousands. Each CPU counts for itself."""
GATE = "BPF_ARRAY(gate, __u64, 2);\n"
GATED = """
	__u32 mine = skb->mark & 1, others = !mine;
	__u64 *here = gate.lookup(&mine), *there = gate.lookup(&others);

	if (!here || !there)
		return PASS;
	__sync_fetch_and_add(here, 1);
	#pragma clang loop unroll(disable)
	for (int i = 0; i < 4000 && *(volatile __u64 *)there < *here; i++)
		bpf_ktime_get_ns();
	packet->key.dest_qp = skb->mark;
"""
"""The run waits for the other CPU's to come as far, so that both place their QP in the same moment."""


@pytest.fixture(scope="module")
def racing(headers_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classifier]:
    with _with_lines(NUMBERED, "", headers_cache, tmp_path_factory.mktemp("numbered")) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def gated(headers_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classifier]:
    with _with_lines(GATED, GATE, headers_cache, tmp_path_factory.mktemp("gated")) as classifier:
        yield classifier


@contextmanager
def _with_lines(lines: str, head: str, cache: Path, folder: Path) -> Iterator[Classifier]:
    """The classifier with these lines between parser and steering."""
    shutil.copytree(sources.directory(), folder, dirs_exist_ok=True)
    main = folder / "qpd.c"
    text = main.read_text()
    assert text.count(STEER) == 1
    main.write_text(head + text.replace(STEER, f"{{ {lines} {STEER} }}"))
    with loaded(folder.name, cache=cache, qps_max=65536, folder=folder) as classifier:
        yield classifier


def on_two_cpus(function: Callable[[int], None]) -> None:
    """Run it with 0 and with 1, each in a thread on a CPU of its own."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")

    def on(number: int) -> None:
        os.sched_setaffinity(0, {cpus[number]})
        function(number)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(on, number) for number in (0, 1)]:
            done.result()


def run_marked(classifier: Classifier, mark: int, repeat: int = 1) -> None:
    context = bytearray(192)
    struct.pack_into("=I", context, 8, mark)
    bpf.prog_test_run(classifier.programs[Hook.STEER], Roce().build(), repeat=repeat, ctx_in=bytes(context))


def test_two_cpus_place_many_qps_exactly(racing: Classifier) -> None:
    racing.reset()
    racing.fabric(uplinks(4), placement=Placement.BALANCED)
    on_two_cpus(lambda number: run_marked(racing, number * QPS, QPS))
    assert homes(racing) == dict.fromkeys(range(4), 2 * QPS // 4)
    assert racing.maps.placed()[:4].tolist() == [2 * QPS // 4] * 4


def test_two_cpus_that_place_at_once_do_not_fill_one_place_twice(gated: Classifier) -> None:
    """Two QPs at the same moment on two empty paths: always one each."""
    gated.reset()
    gated.fabric(uplinks(2), placement=Placement.BALANCED)
    barrier = threading.Barrier(2)
    empty = np.zeros(PATHS_MAX, layout.LOAD)
    wrong = []

    def rounds(number: int) -> None:
        for turn in range(ROUNDS):
            barrier.wait()
            run_marked(gated, 2 * turn + number)
            barrier.wait()
            if number == 0:
                if (counts := gated.maps.placed()[:2].tolist()) != [1, 1]:
                    wrong.append((turn, counts))
                gated.maps._tables["placed"].write(np.arange(PATHS_MAX, dtype=layout.INDEX), empty)

    on_two_cpus(rounds)
    assert wrong == []


def test_two_cpus_that_see_the_same_new_qps_place_each_once(racing: Classifier) -> None:
    racing.reset()
    racing.fabric(uplinks(4), placement=Placement.BALANCED)
    on_two_cpus(lambda _: run_marked(racing, 0, QPS))
    assert sum(homes(racing).values()) == QPS
    assert [homes(racing)[path] for path in range(4)] == racing.maps.placed()[:4].tolist()
    assert int(racing.maps.qps()["value"]["packets"].sum()) == 2 * QPS
