"""Which home a new QP gets: by its slot, and in balance with the others'."""

from __future__ import annotations

import threading
from collections import Counter
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

import numpy as np
import pytest

from qpd.core.slots import place, qp_hash, slot_of
from qpd.kernel import bpf, layout
from qpd.model import PATHS_MAX, Group, Hook, Placement, QueuePairKey
from tests.ebpf import packets
from tests.ebpf.harness import Classifier, Uplink, orders_of, uplinks
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


def test_two_cpus_that_place_at_once_fill_no_place_twice(classifier: Classifier) -> None:
    """Two threads send new QPs through the program at the same time; all of them fit exactly."""
    classifier.fabric(uplinks(4), placement=Placement.BALANCED)
    program, qps = classifier.programs[Hook.STEER], 800
    barrier = threading.Barrier(2)

    def send(first: int) -> None:
        packet = bytearray(Roce().build())
        qp_at = len(packet) - len(packets.PAYLOAD) - 4 - 7
        barrier.wait()
        for qp in range(first, first + qps):
            packet[qp_at : qp_at + 3] = qp.to_bytes(3, "big")
            bpf.prog_test_run(program, bytes(packet))

    threads = [threading.Thread(target=send, args=(first,)) for first in (0, qps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert homes(classifier) == dict.fromkeys(range(4), 2 * qps // 4)
    assert classifier.maps.placed()[:4].tolist() == [2 * qps // 4] * 4


def test_two_cpus_that_see_one_new_qp_place_it_once(classifier: Classifier) -> None:
    classifier.fabric(uplinks(4), placement=Placement.BALANCED)
    program, qps = classifier.programs[Hook.STEER], 800
    barrier = threading.Barrier(2)

    def send() -> None:
        packet = bytearray(Roce().build())
        qp_at = len(packet) - len(packets.PAYLOAD) - 4 - 7
        for qp in range(qps):
            packet[qp_at : qp_at + 3] = qp.to_bytes(3, "big")
            barrier.wait()
            bpf.prog_test_run(program, bytes(packet))

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(classifier.maps.qps()) == qps
    assert homes(classifier) == Counter(
        {path: int(count) for path, count in enumerate(classifier.maps.placed()) if count}
    )
    assert sum(homes(classifier).values()) == qps
