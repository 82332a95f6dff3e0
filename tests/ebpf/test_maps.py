"""The typed views over real maps: what is written is read, whole maps are read right while they change."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import numpy as np
import pytest

from qpd.kernel import bpf, layout
from qpd.kernel.maps import Maps
from qpd.kernel.table import LayoutMismatchError, Table, possible_cpus
from qpd.model import (
    DESTINATIONS_MAX,
    NO_PATH,
    PATHS_MAX,
    SLOTS,
    TABLES_MAX,
    Group,
    Hook,
    PathState,
    Placement,
    QueuePairKey,
    Reason,
    Verdict,
)
from qpd.model import Path as UplinkPath
from tests.conftest import BPFFS, PREFIX

QPS_MAX = 131072
NOW, SECOND = 10**12, 10**9


def make(directory: Path, name: str, entries: int | None = None) -> None:
    """Pin one map as the classifier's sources declare it."""
    declared = layout.MAPS[name]
    fd = bpf.map_create(
        declared.type,
        declared.key.itemsize,
        declared.value.itemsize,
        entries or declared.entries or QPS_MAX,
        flags=declared.flags,
        name=name,
    )
    bpf.obj_pin(fd, directory / name)
    os.close(fd)


@pytest.fixture
def directory() -> Iterator[Path]:
    folder = BPFFS / f"{PREFIX}-maps"
    folder.mkdir()
    try:
        for name in layout.MAPS:
            make(folder, name)
        yield folder
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.fixture
def maps(directory: Path) -> Iterator[Maps]:
    with Maps(directory) as opened:
        yield opened


def fill(
    maps: Maps, count: int, *, home: int = 0, last_seen_ns: int = NOW, first: int = 0, counted: int = 1
) -> None:
    """Make QPs numbered from ``first``."""
    keys, values = np.zeros(count, layout.QP_KEY), np.zeros(count, layout.QP)
    keys["dest_qp"] = np.arange(first, first + count)
    values["home"], values["last_seen_ns"] = home, last_seen_ns
    values["packets"] = keys["dest_qp"]
    values["counted"] = counted
    maps._tables["qps"].write(keys, values)


def place(maps: Maps, path: int, qps: int) -> None:
    """What the kernel does for each new QP."""
    maps._tables["placed"].set(path, np.uint64(qps).tobytes())


def uplink(number: int, next_hop: str) -> UplinkPath:
    return UplinkPath(
        number, f"spine{number}", f"eth{number}", 10 + number, ip_address(next_hop), "p", 1, PathState.UP,
        Reason.NONE, 0.0, True,
    )  # fmt: skip


def field(maps: Maps, table: str, index: int, name: str) -> int:
    """A field that no typed view shows."""
    record = maps._tables[table].get(index)
    assert record is not None
    return int(record[name])


# --- whole maps


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 100_000])
def test_every_qp_comes_once(maps: Maps, count: int) -> None:
    fill(maps, count)
    records = maps.qps()
    assert sorted(records["key"]["dest_qp"]) == list(range(count))
    assert (records["value"]["packets"] == records["key"]["dest_qp"]).all()


def test_what_stays_is_read_exactly_once_while_others_come_and_go(maps: Maps) -> None:
    fill(maps, 20_000)
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            key = layout.pack_qp_key(QueuePairKey(7, ip_address("192.0.2.1"), number % 3000))
            maps._tables["qps"].set(key, np.zeros(1, layout.QP))
            maps._tables["qps"].delete(key)
            number += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(10):
            numbers = np.concatenate([keys["dest_qp"][keys["vni"] == 0] for keys, _ in maps.scan()])
            assert len(numbers) == 20_000
            assert len(np.unique(numbers)) == 20_000
    finally:
        stop.set()
        thread.join()


def test_a_bucket_larger_than_a_chunk(directory: Path) -> None:
    (directory / "neighbours").unlink()
    make(directory, "neighbours")
    table = Table(directory / "neighbours", layout.MAPS["neighbours"])
    keys = np.zeros(1000, layout.NEIGHBOUR_KEY)
    keys["ifindex"] = np.arange(1000)
    table.write(keys, np.arange(1000, dtype=layout.INDEX))
    # 1000 entries in 1024 buckets: some bucket holds more than one.
    found = [int(key["ifindex"]) for some, _ in table.scan(chunk=1) for key in some]
    table.close()
    assert sorted(found) == list(range(1000))


def test_one_qp(maps: Maps) -> None:
    key = QueuePairKey(100, ip_address("2001:db8::1"), 0xABCDEF)
    assert maps.qp(key) is None
    value = np.zeros(1, layout.QP)
    value["packets"] = 3
    maps._tables["qps"].set(layout.pack_qp_key(key), value)
    found = maps.qp(key)
    assert found is not None
    assert found["packets"] == 3
    assert maps.qp(key, "arrivals") is None
    assert maps.qps_max() == QPS_MAX


def test_a_scan_of_100_000_qps_stays_within_the_daemons_memory(maps: Maps, directory: Path) -> None:
    fill(maps, 100_000)
    program = (
        "import json, re, sys; from pathlib import Path; from qpd.kernel.maps import Maps\n"
        # Not ru_maxrss: that begins with what the parent had when it forked.
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "maps = Maps(Path(sys.argv[1])); before = peak()\n"
        "active = int(maps.recount_active(2, 1).active.sum()); counted = peak()\n"
        "qps = len(maps.qps()); whole = peak()\n"
        "print(json.dumps([active, qps, before, counted, whole]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(directory)], check=True, capture_output=True, text=True
    ).stdout
    active, qps, before, counted, whole = json.loads(output)
    assert (active, qps) == (100_000, 100_000)
    assert counted - before < 4_000, "counting needs a chunk or two, not the whole (kB)"
    assert whole < 80_000, "the whole daemon's allowance (kB)"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, 524])
def test_without_batches_the_same_comes_out(maps: Maps, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, "not supported")

    for name in ("lookup_batch", "update_batch", "delete_batch"):
        monkeypatch.setattr(bpf, name, refuse)
    groups = {ip_network(f"10.{n}.0.0/16"): n for n in range(100)}
    maps.write_destinations(groups)
    assert maps.destinations() == groups
    maps.erase_destinations([*list(groups)[:99], ip_network("172.16.0.0/12")])
    assert maps.destinations() == {ip_network("10.99.0.0/16"): 99}
    fill(maps, 5000)
    assert sorted(maps.qps()["key"]["dest_qp"]) == list(range(5000))


# --- writing and reading back


def test_paths_are_adopted_as_written(maps: Maps) -> None:
    maps.write_path(uplink(0, "192.0.2.1"))
    maps.write_path(uplink(63, "fe80::1"))
    maps.write_path(uplink(5, "192.0.2.5"))
    maps.erase_path(5)
    found = maps.paths()
    assert found.keys() == {0, 63}
    assert found[0].key == uplink(0, "192.0.2.1").key
    assert found[63].key == uplink(63, "fe80::1").key
    assert (found[63].ifindex, found[63].sole) == (73, True)
    _, records = maps._tables["paths"].all()
    assert [int(records["family"][number]) for number in (0, 63, 5)] == [2, 10, 0]


def test_groups_are_adopted_as_written(maps: Maps) -> None:
    maps.write_group(Group(3, {0: 1, 63: 256}, 2))
    maps.write_group(Group(4, {1: 1}, 0))
    maps.erase_group(4)
    assert {group.id: (dict(group.weights), group.table) for group in maps.groups().values()} == {
        3: ({0: 1, 63: 256}, 2)
    }


def test_a_slot_table_does_not_touch_its_neighbours(maps: Maps) -> None:
    orders = np.random.default_rng(1).integers(0, 64, (SLOTS, PATHS_MAX), dtype=np.uint8)
    maps.write_table(3, orders)
    assert (maps.table(3) == orders).all()
    assert not maps.table(2).any()
    assert not maps.table(4).any()
    maps.write_table(TABLES_MAX - 1, orders)
    assert (maps.table(TABLES_MAX - 1) == orders).all()


@pytest.mark.parametrize(
    ("table", "shape"), [(0, (SLOTS, 8)), (0, (8, PATHS_MAX)), (TABLES_MAX, (SLOTS, PATHS_MAX))]
)
def test_a_wrong_slot_table_is_refused(maps: Maps, table: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="slot table"):
        maps.write_table(table, np.zeros(shape, np.uint8))


def test_as_many_destinations_as_there_may_be(maps: Maps) -> None:
    groups = {ip_network((0x0A000000 + n * 256, 24)): n % 256 for n in range(DESTINATIONS_MAX - 3)}
    groups |= {ip_network("0.0.0.0/0"): 1, ip_network("::/0"): 2, ip_network("2001:db8::1/128"): 3}
    maps.write_destinations(groups)
    assert maps.destinations() == groups
    maps.write_destinations({ip_network("10.0.0.0/24"): 200})
    assert maps.destinations()[ip_network("10.0.0.0/24")] == 200
    with pytest.raises(OSError, match="MAP_UPDATE_BATCH"):
        maps.write_destinations({ip_network("203.0.113.0/24"): 1})


def test_erasing_destinations_passes_over_those_that_are_not_there(maps: Maps) -> None:
    groups = {ip_network(f"10.{n}.0.0/16"): n for n in range(200)}
    maps.write_destinations(groups)
    absent = [ip_network(f"172.16.{n}.0/24") for n in range(50)]
    half = list(groups)[::2]
    maps.erase_destinations([prefix for pair in zip(half, absent * 2, strict=True) for prefix in pair])
    assert maps.destinations() == {prefix: n for prefix, n in groups.items() if prefix not in half}
    maps.erase_destinations([])


def test_neighbours_are_replaced_as_a_whole(maps: Maps) -> None:
    maps.replace_neighbours({(3, "02:00:00:00:00:01"): 1, (4, "02:00:00:00:00:02"): 2})
    maps.replace_neighbours({(3, "02:00:00:00:00:01"): 7, (5, "02:00:00:00:00:03"): 3})
    assert maps.neighbours() == {(3, "02:00:00:00:00:01"): 7, (5, "02:00:00:00:00:03"): 3}
    full = {(n, "02:00:00:00:00:09"): n % 64 for n in range(1, layout.NEIGHBOURS_MAX + 1)}
    maps.replace_neighbours(full)
    assert maps.neighbours() == full
    maps.replace_neighbours({})
    assert maps.neighbours() == {}


def test_the_words(maps: Maps) -> None:
    assert maps.living() == 0
    maps.set_living((1 << 63) | 5)
    assert maps.living() == (1 << 63) | 5
    assert maps.tap_dead() == 0
    assert maps.raise_generation() == 1
    maps.set_placement(Placement.BALANCED)
    assert maps.raise_generation() == 2
    assert (maps.generation(), maps.placement()) == (2, Placement.BALANCED)
    maps.set_hold_up(1.5)
    assert field(maps, "control", 0, "hold_up_ns") == 1_500_000_000
    maps._tables["control"].set(0, np.array([(0xFFFFFFFF, 1, 0)], layout.CONTROL))
    assert maps.raise_generation() == 1, "0 would be that of an entry which has seen no group"


def test_what_the_tap_knows_stays_with_the_next_hop(maps: Maps) -> None:
    """Not with the id: written anew it is kept, given to another neighbour it is forgotten."""
    path = uplink(3, "10.1.0.1")
    maps.write_path(path)
    record = np.frombuffer(bytearray(maps._tables["paths"].octets(3) or b""), layout.PATH)
    record["deadline_ns"] = 77
    maps._tables["paths"].set(3, record.tobytes())
    maps._tables["living"].set(layout.LIVING_TAP, np.uint64(0b1010).tobytes())
    maps.set_living(0b1011)
    assert maps.usable() == 0b0001

    maps.write_path(replace(path, sole=not path.sole))
    assert field(maps, "paths", 3, "deadline_ns") == 77
    assert maps.tap_dead() == 0b1010
    maps.replace_next_hops({(path.ifindex, path.next_hop): 3, (path.ifindex, ip_address("fe80::3")): 3})
    path = replace(path, next_hop=ip_address("fe80::3"))
    maps.write_path(path)
    assert field(maps, "paths", 3, "deadline_ns") == 77, "another address of the same neighbour"
    assert maps.tap_dead() == 0b1010
    maps.write_path(replace(path, next_hop=ip_address("10.9.9.9")))
    assert field(maps, "paths", 3, "deadline_ns") == 0
    assert maps.tap_dead() == 0b0010


def test_next_hops_are_replaced(maps: Maps) -> None:
    first = {(3, ip_address("10.1.0.1")): 0, (3, ip_address("fe80::1")): 0, (4, ip_address("fe80::1")): 5}
    maps.replace_next_hops(first)
    assert maps.next_hops() == first
    second = {(4, ip_address("fe80::1")): 6, (7, ip_address("10.1.0.9")): 1}
    maps.replace_next_hops(second)
    assert maps.next_hops() == second


def test_counters_are_summed_over_cpus(maps: Maps) -> None:
    cpus = possible_cpus()
    size = -(-layout.COUNTERS.itemsize // 8) * 8
    octets = bytearray(size * cpus)
    for cpu in range(cpus):
        record = np.zeros(1, layout.COUNTERS)
        record["verdicts"][0, Hook.OBSERVE, Verdict.OBSERVED] = 10 + cpu
        record["path"]["bytes"][0, Hook.STEER, 63] = 100
        octets[cpu * size : cpu * size + layout.COUNTERS.itemsize] = record.tobytes()
    maps._tables["counters"].set(0, bytes(octets))
    counters = maps.counters()
    assert counters.verdicts[Hook.OBSERVE, Verdict.OBSERVED] == sum(10 + cpu for cpu in range(cpus))
    assert counters.verdicts.sum() == counters.verdicts[Hook.OBSERVE, Verdict.OBSERVED]
    assert counters.bytes[Hook.STEER, 63] == 100 * cpus
    assert counters.packets.sum() == 0


# --- active QPs


def test_active_is_placed_less_gone(maps: Maps) -> None:
    fill(maps, 100, home=2, last_seen_ns=NOW)
    fill(maps, 50, home=2, last_seen_ns=NOW - 61 * SECOND, first=1000)
    fill(maps, 30, home=3, last_seen_ns=NOW - 59 * SECOND, first=2000)
    place(maps, 2, 160)  # ten more were evicted
    place(maps, 3, 30)
    recount = maps.recount_active(NOW, 60 * SECOND)
    assert {n: int(count) for n, count in enumerate(recount.active) if count} == {2: 100, 3: 30}
    active = maps.placed() - maps.gone()
    assert (active == recount.active).all()


def test_what_only_answers_is_as_little_counted_as_it_was_placed(maps: Maps) -> None:
    fill(maps, 7, home=2)
    fill(maps, 50, home=2, first=1000, counted=0)
    fill(maps, 9, home=3, first=2000, counted=0)
    place(maps, 2, 8)  # one of those that send was evicted
    recount = maps.recount_active(NOW, 60 * SECOND)
    assert {n: int(count) for n, count in enumerate(recount.active) if count} == {2: 7}
    assert (maps.gone()[2], maps.gone()[3]) == (1, 0)


def test_a_qp_that_sends_again_is_active_again(maps: Maps) -> None:
    fill(maps, 10, last_seen_ns=NOW - 61 * SECOND)
    place(maps, 0, 10)
    maps.recount_active(NOW, 60 * SECOND)
    assert maps.gone()[0] == 10
    fill(maps, 4, last_seen_ns=NOW)
    maps.recount_active(NOW, 60 * SECOND)
    assert maps.gone()[0] == 6


def test_nothing_is_written_for_a_path_that_got_a_qp_during_the_scan(
    maps: Maps, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(maps, 10, home=1, last_seen_ns=0)
    place(maps, 1, 10)
    place(maps, 2, 5)
    scan = Table.scan

    def placing(table: Table, *arguments: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from scan(table, *arguments)
        if table.path.name == "qps":
            place(maps, 1, 11)

    monkeypatch.setattr(Table, "scan", placing)
    recount = maps.recount_active(NOW, 60 * SECOND)
    assert not recount.certain[1]
    assert (maps.gone()[1], maps.gone()[2]) == (0, 5)


def test_a_qp_without_a_home_counts_for_no_path(maps: Maps) -> None:
    fill(maps, 10, home=NO_PATH)
    assert not maps.recount_active(NOW, SECOND).active.any()


def test_gone_never_runs_below_zero(maps: Maps) -> None:
    fill(maps, 10)  # more than were placed: somebody emptied `placed`
    maps.recount_active(NOW, SECOND)
    assert maps.gone()[0] == 0


# --- what does not fit


def test_another_size_of_map_is_refused(directory: Path) -> None:
    (directory / "paths").unlink()
    fd = bpf.map_create(bpf.MapType.ARRAY, 4, 8, 64)
    bpf.obj_pin(fd, directory / "paths")
    os.close(fd)
    with pytest.raises(LayoutMismatchError, match=r"paths has array of 64 .*4 \+ 8 .*qpd detach"):
        Maps(directory)


def test_a_missing_map_is_named(directory: Path) -> None:
    (directory / "gone").unlink()
    with pytest.raises(FileNotFoundError, match=r"maps/gone"):
        Maps(directory)
