"""Rows of QPs from what the maps hold."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.api.queries import QpFilter
from qpd.api.rows import CHUNK, QpTable, busiest, rows, select, stream, top
from qpd.kernel.layout import PSN_KNOWN, QP, QP_KEY, pack_address
from qpd.model import NO_GROUP, NO_PATH
from tests.unit.api.fake_state import SECOND


def table(**fields: object) -> QpTable:
    """One QP at home on path 0, seen first 10 s and last 1 s ago."""
    keys, values = np.zeros(1, QP_KEY), np.zeros(1, QP)
    keys["vni"], keys["dest_qp"] = 10010, 0xABCDEF
    keys["dst"] = np.void(pack_address(ip_address("10.1.0.21")))
    values["src"] = np.void(pack_address(ip_address("fd00::11")))
    values["destination"] = np.void(pack_address(ip_address("10.255.2.1")))
    values["first_seen_ns"], values["last_seen_ns"] = 90 * SECOND, 99 * SECOND
    values["packets"], values["bytes"], values["slot"], values["source_port"] = 2**40, 2**53, 4095, 65535
    for name, value in fields.items():
        values[name] = value
    return QpTable(keys, values, {0: "spine1", 1: "spine2"}, now_ns=100 * SECOND, idle_after_ns=30 * SECOND)


MEASURED = {"next_psn": PSN_KNOWN | 7, "missing": 5, "out_of_order": 2, "lost_behind": 4, "retransmitted": 30}


def test_a_row_says_what_the_map_holds() -> None:
    row = rows(table(moves=2), np.array([0]))[0]
    assert row == {
        "vni": 10010,
        "dst": "10.1.0.21",
        "dest_qp": 0xABCDEF,
        "src": "fd00::11",
        "slot": 4095,
        "home": "spine1",
        "path": "spine1",
        "state": "home",
        "packets": 2**40,
        "bytes": 2**53,
        "age_s": 10.0,
        "idle_s": 1.0,
        "direction": "out",
        "destination": "10.255.2.1",
        "moves": 2,
        "source_port": 65535,
        "transport": "rc",
        "naks": 0,
        "cnps": 0,
        "ecn_marked": 0,
        "rtt_samples": 0,
        **dict.fromkeys(("lost", "lost_at_host", "retransmitted", "out_of_order", "peer_qp")),
        **dict.fromkeys(("rtt_us", "rtt_min_us", "rtt_mean_us")),
    }


def test_gaps_tell_of_losses_before_the_leaf_and_steps_back_of_those_behind_it() -> None:
    """Which of them is the fabric depends on the direction."""
    known = table(**MEASURED, naks_sequence=1, naks_rnr=2, naks_remote=3, cnps=8, ecn_marked=9)
    out = rows(known, np.array([0]))[0]
    assert (out["lost"], out["lost_at_host"]) == (4, 3)
    assert (out["retransmitted"], out["out_of_order"], out["naks"]) == (30, 2, 6)
    assert (out["cnps"], out["ecn_marked"]) == (8, 9)
    in_ = rows(replace(known, direction="in"), np.array([0]))[0]
    assert (in_["lost"], in_["lost_at_host"]) == (3, 4)


@pytest.mark.parametrize(
    ("transport", "name", "measured"),
    [
        (0, "rc", {"lost", "lost_at_host", "retransmitted", "out_of_order", "naks"}),
        (1, "uc", {"lost_at_host", "out_of_order"}),
        (3, "ud", set()),
        (4, None, set()),
        (5, "xrc", set()),
    ],
)
def test_a_transport_tells_what_it_can(transport: int, name: str | None, measured: set[str]) -> None:
    row = rows(table(**MEASURED, transport=transport), np.array([0]))[0]
    assert row["transport"] == name
    told = {"lost", "lost_at_host", "retransmitted", "out_of_order", "naks"}
    assert {key for key in told if dict(row)[key] is not None} == measured


def test_a_late_packet_between_two_readings_makes_no_negative_loss() -> None:
    row = rows(table(next_psn=PSN_KNOWN, missing=1, out_of_order=2), np.array([0]))[0]
    assert row["lost_at_host"] == 0


def test_round_trips_are_microseconds_and_the_peer_a_number() -> None:
    timed = table(
        peer_qp=0x77, rtt_samples=4, rtt_sum_ns=400_500, rtt_last_ns=2_000_000_000, rtt_min_ns=22_345
    )
    row = rows(timed, np.array([0]))[0]
    assert (row["peer_qp"], row["rtt_samples"]) == (0x77, 4)
    assert (row["rtt_us"], row["rtt_min_us"], row["rtt_mean_us"]) == (2_000_000.0, 22.345, 100.125)


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "home"),
        ({"path": 1}, "away"),
        ({"path": NO_PATH}, "unsteered"),
        ({"group": NO_GROUP}, "unsteered"),
        ({"last_seen_ns": 69 * SECOND, "first_seen_ns": SECOND}, "idle"),
        ({"last_seen_ns": 70 * SECOND, "first_seen_ns": SECOND}, "home"),
        ({"path": 1, "last_seen_ns": 0, "first_seen_ns": 0}, "idle"),
    ],
)
def test_states(fields: dict[str, int], state: str) -> None:
    assert rows(table(**fields), np.array([0]))[0]["state"] == state


def test_a_path_that_is_no_more_has_no_name() -> None:
    row = rows(table(home=7, path=1), np.array([0]))[0]
    assert (row["home"], row["path"], row["state"]) == (None, "spine2", "away")


def test_what_arrives_has_no_home_and_no_slot() -> None:
    arriving = replace(table(home=NO_PATH, path=1), direction="in")
    row = rows(arriving, np.array([0]))[0]
    assert (row["home"], row["slot"], row["source_port"], row["path"]) == (None, None, None, "spine2")
    assert (row["state"], row["direction"]) == ("observed", "in")


def test_without_vxlan_there_is_no_outer_source_port() -> None:
    plain = table()
    plain.keys["vni"] = 0
    assert rows(plain, np.array([0]))[0]["source_port"] is None


def test_clocks_that_disagree_by_a_tick_give_no_negative_ages() -> None:
    # last_seen comes from the coarse clock, which lags behind first_seen's; both may be ahead of the reader's.
    row = rows(table(first_seen_ns=100 * SECOND + 5, last_seen_ns=99_996 * SECOND // 1000), np.array([0]))[0]
    assert (row["age_s"], row["idle_s"]) == (0.0, 0.0)


@given(st.lists(st.integers(0, 2**62), max_size=30), st.integers(1, 40))
def test_the_busiest_are_the_first_of_a_sorted_list(amounts: list[int], limit: int) -> None:
    traffic = np.array(amounts, np.uint64)
    found = busiest(traffic, np.arange(len(traffic)), limit)
    assert [int(traffic[position]) for position in found] == sorted(amounts, reverse=True)[:limit]
    assert len(set(found.tolist())) == len(found)


def test_an_ipv4_host_is_not_taken_for_its_ipv6_namesake() -> None:
    assert len(select(table(), QpFilter(host=ip_address("10.1.0.21")))) == 1
    assert len(select(table(), QpFilter(host=ip_address("::10.1.0.21")))) == 0


async def test_chunks_are_small_and_keep_the_order() -> None:
    one = table()
    many = replace(one, keys=np.repeat(one.keys, 4500), values=np.repeat(one.values, 4500))
    many.values["packets"] = np.arange(4500)
    chunks = [chunk async for chunk in stream([many], QpFilter())]
    assert [len(chunk) for chunk in chunks] == [CHUNK] * (4500 // CHUNK)
    assert [row["packets"] for chunk in chunks for row in chunk] == list(range(4500))


@given(st.lists(st.lists(st.integers(0, 2**40), min_size=1, max_size=6), max_size=6), st.integers(1, 8))
def test_the_busiest_of_parts_are_the_busiest_of_the_whole(amounts: list[list[int]], limit: int) -> None:
    one = table()
    parts = []
    for some in amounts:
        values = np.repeat(one.values[:1], len(some))
        values["bytes"] = some
        parts.append(replace(one, keys=np.repeat(one.keys[:1], len(some)), values=values))
    best = top(parts, QpFilter(limit=limit))
    found = [] if best is None else best.values["bytes"].tolist()
    assert found == sorted((amount for some in amounts for amount in some), reverse=True)[:limit]
