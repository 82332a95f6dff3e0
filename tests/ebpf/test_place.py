"""Which home a new QP gets: by its slot, and in balance with the others'."""

from __future__ import annotations

import shutil
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from qpd.core.slots import choose, place, qp_hash, slot_of
from qpd.kernel import bpf, layout, sources
from qpd.model import PATHS_MAX, Group, Hook, Placement, QueuePairKey
from tests.ebpf.harness import Classifier, Uplink, loaded, on_two_cpus, orders_of, uplinks
from tests.ebpf.packets import RC_ACKNOWLEDGE, Roce

pytestmark = pytest.mark.root


def homes(classifier: Classifier) -> Counter[int]:
    """How many QPs have their home on each path."""
    return Counter(int(home) for home in classifier.maps.qps()["value"]["home"])


def counted(classifier: Classifier) -> Counter[int]:
    """How many QPs that count have their home on each path."""
    values = classifier.maps.qps()["value"]
    return Counter(int(home) for home in values["home"][values["counted"] == 1])


def placed(classifier: Classifier) -> Counter[int]:
    """`placed` as the kernel has it."""
    return Counter({path: int(qps) for path, qps in enumerate(classifier.maps.placed()) if qps})


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


# --- QPs that only answer --------------------------------------------------------------------------------------------

ANSWERS = {0x11, 0x12, 0x51, 0x52, 0xB1, 0xB2, 0x81}
"""ACK (and NAK) and atomic acknowledge of RC, RD and XRC, and CNP (InfiniBand Architecture 1, 9.2.1, A17.9)."""


def test_all_but_answers_without_data_count(classifier: Classifier) -> None:
    classifier.fabric(uplinks(4), placement=Placement.BALANCED)
    for opcode in range(256):
        classifier.steer(Roce(dest_qp=opcode, opcode=opcode).build())
    records = classifier.maps.qps()
    only_answer = set(records["key"]["dest_qp"][records["value"]["counted"] == 0].tolist())
    assert only_answer == ANSWERS
    assert placed(classifier) == counted(classifier)


@pytest.mark.parametrize("seed", range(12))
def test_those_that_send_lie_evenly_among_those_that_only_answer(classifier: Classifier, seed: int) -> None:
    """In whatever order they begin, and whatever has come of each by then."""
    random = Random(seed)
    classifier.fabric(uplinks(4), placement=Placement.BALANCED)
    orders = orders_of(dict.fromkeys(range(4), 1))
    senders = [Roce(dest_qp=random.getrandbits(24)) for _ in range(16)]
    answerers = [
        Roce(dest_qp=random.getrandbits(24), opcode=random.choice(sorted(ANSWERS))) for _ in range(16)
    ]
    packets = [roce for roce in senders + answerers for _ in range(random.randint(1, 3))]
    random.shuffle(packets)
    active = [0] * 4
    seen: dict[int, int] = {}
    for roce in packets:
        home = classifier.path_of(classifier.steer(roce.build()))
        if roce.dest_qp not in seen:
            order = [int(path) for path in orders[slot_of(qp_hash(roce.key))][:4]]
            answers = roce.opcode in ANSWERS
            weights = dict.fromkeys(range(4), 1)
            assert home == place(order, 0b1111, Placement.BALANCED, active, weights, answers=answers)
            assert not answers or home == choose(order, 0b1111)
            active[home] += not answers
        assert seen.setdefault(roce.dest_qp, home) == home
    assert counted(classifier) == placed(classifier) == dict.fromkeys(range(4), 4)
    recount = classifier.maps.recount_active(time.monotonic_ns(), 3600 * 10**9)
    assert recount.active[:4].tolist() == [4] * 4
    assert recount.certain.all()
    assert not classifier.maps.gone().any()


@pytest.mark.parametrize("opcode", [0x04, 0x0C, 0x0D, 0x0E, 0x10, 0x14, 0x24, 0x64, 0xA4])
def test_what_has_answered_counts_once_from_when_it_sends(classifier: Classifier, opcode: int) -> None:
    """Where it is: a home stays. RC SEND, READ request and responses, atomic, UC, UD, XRC."""
    classifier.fabric(uplinks(4), placement=Placement.BALANCED)
    for qp in range(8):
        classifier.steer(Roce(dest_qp=qp, opcode=RC_ACKNOWLEDGE).build())
    before = homes(classifier)
    assert not placed(classifier)
    for _ in range(3):
        for qp in range(8):
            classifier.steer(Roce(dest_qp=qp, opcode=opcode).build())
            classifier.steer(Roce(dest_qp=qp, opcode=RC_ACKNOWLEDGE).build())
    assert homes(classifier) == before == placed(classifier) == counted(classifier)


def test_what_began_to_send_is_made_up_for_by_who_comes_next(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2), placement=Placement.BALANCED)
    orders = orders_of({0: 1, 1: 1})
    first = [Roce(dest_qp=qp) for qp in range(100) if orders[slot_of(qp_hash(Roce(dest_qp=qp).key))][0] == 0]
    for roce in first[:6]:
        classifier.steer(replace(roce, opcode=RC_ACKNOWLEDGE).build())
        classifier.steer(roce.build())
    assert placed(classifier) == {0: 6}
    for roce in first[6:18]:
        classifier.steer(roce.build())
    assert placed(classifier) == {0: 9, 1: 9}


def test_by_hash_the_same_are_counted(classifier: Classifier) -> None:
    """So that `balanced`, once set, knows of them."""
    classifier.fabric(uplinks(4))
    for qp in range(20):
        classifier.steer(Roce(dest_qp=qp, opcode=RC_ACKNOWLEDGE if qp % 2 else 0x04).build())
    assert placed(classifier) == counted(classifier)
    assert sum(placed(classifier).values()) == 10


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
	packet->key.dest_qp = skb->mark - skb->priority;
"""
"""The run waits for the other CPU's to come as far, so that both place their QP in the same moment. ``mark`` tells CPU
and QP; less ``priority``, where both shall have the same QP."""


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


DATA, ANSWER = Roce().build(), Roce(opcode=RC_ACKNOWLEDGE).build()


def run_marked(
    classifier: Classifier, mark: int, repeat: int = 1, *, packet: bytes = DATA, priority: int = 0
) -> None:
    context = bytearray(192)
    struct.pack_into("=I", context, 8, mark)
    struct.pack_into("=I", context, 32, priority)
    bpf.prog_test_run(classifier.programs[Hook.STEER], packet, repeat=repeat, ctx_in=bytes(context))


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


def test_two_cpus_that_see_qps_begin_to_send_count_each_once(racing: Classifier) -> None:
    racing.reset()
    racing.fabric(uplinks(4), placement=Placement.BALANCED)
    on_two_cpus(lambda _: run_marked(racing, 0, QPS, packet=ANSWER))
    assert sum(homes(racing).values()) == QPS
    assert not placed(racing)
    on_two_cpus(lambda _: run_marked(racing, 0, QPS))
    assert counted(racing) == placed(racing) == homes(racing)


def test_two_cpus_of_which_one_sees_an_answer_first_count_each_qp_once(racing: Classifier) -> None:
    """Whichever makes the entry, and whichever loses."""
    racing.reset()
    racing.fabric(uplinks(4), placement=Placement.BALANCED)
    on_two_cpus(lambda number: run_marked(racing, 0, QPS, packet=(ANSWER, DATA)[number]))
    assert counted(racing) == placed(racing) == homes(racing)
    assert sum(placed(racing).values()) == QPS


def test_two_cpus_that_see_one_qp_begin_to_send_at_the_same_moment_count_it_once(gated: Classifier) -> None:
    gated.reset()
    gated.fabric(uplinks(2), placement=Placement.BALANCED)
    barrier = threading.Barrier(2)
    wrong = []

    def rounds(number: int) -> None:
        for turn in range(ROUNDS):
            for packet in (ANSWER, DATA):
                barrier.wait()
                run_marked(gated, 2 * turn + number, packet=packet, priority=number)
            barrier.wait()
            if number == 0 and sum(placed(gated).values()) != turn + 1:
                wrong.append((turn, placed(gated)))

    on_two_cpus(rounds)
    assert wrong == []
    assert counted(gated) == placed(gated) == homes(gated)
