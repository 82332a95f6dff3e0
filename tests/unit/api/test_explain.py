"""What `explain` says, sentence by sentence, and that it says the same as the placement rule itself."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.api.explain import Case, explain
from qpd.api.schemas import QpRow
from qpd.core.slots import place, qp_hash, slot_of
from qpd.model import NO_PATH, Group, PathState, Placement, QueuePairKey, Reason
from qpd.model import Path as QpdPath
from tests.unit.api.fake_state import FakeState, host

KEY = QueuePairKey(10010, host(0), 17)
VIA = ip_address("10.255.2.1")
HASHED = (
    f"VNI 10010, destination 10.1.0.21 and destination QP 0x11 hash to {qp_hash(KEY):#010x}: "
    f"slot {slot_of(qp_hash(KEY))} of 4096."
)
TAKES = "its packets take spine1, the first in its slot's order that serves"


def path(id_: int, state: PathState = PathState.UP, reason: Reason = Reason.NONE) -> QpdPath:
    address = ip_address(f"10.0.{id_}.1")
    return QpdPath(
        id_, f"spine{id_ + 1}", f"eth{id_ + 1}", id_ + 1, address, f"p{id_}", 1, state, reason, 0.0, True
    )


def case(**changes: object) -> Case:
    """Three living paths of equal weight, preferred in the order 2, 0, 1."""
    plain = Case(
        key=KEY,
        destination=VIA,
        prefix=ip_network("10.255.2.0/24"),
        group=Group(id=4, weights={0: 1, 1: 1, 2: 1}, table=0),
        order=[2, 0, 1, NO_PATH],
        paths={id_: path(id_) for id_ in range(3)},
        living=0b111,
        homes={},
        placement=Placement.BALANCED,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def seen(home: str, used: str) -> QpRow:
    return {**FakeState(1).table_rows()[0], "home": home, "path": used, "age_s": 12.0, "idle_s": 0.5}


def down(id_: int) -> dict[int, QpdPath]:
    return {number: path(number) for number in range(3)} | {id_: path(id_, PathState.DOWN, Reason.BFD_DOWN)}


def test_an_unseen_qp_gets_the_slots_first_choice() -> None:
    answer = explain(case())
    assert (answer["seen"], answer["home"], answer["path"], answer["qp"]) == (False, "spine3", "spine3", None)
    assert answer["hash"] == qp_hash(KEY)
    assert answer["slot"] == slot_of(qp_hash(KEY))
    assert answer["fields"] == {"vni": 10010, "dst": "10.1.0.21", "dest_qp": 17}
    assert (answer["prefix"], answer["group"]) == ("10.255.2.0/24", 4)
    assert [step["path"] for step in answer["order"]] == ["spine3", "spine1", "spine2"]
    assert answer["why"] == [
        HASHED,
        "10.255.2.0/24 covers the outer destination 10.255.2.1; its next hops are spine3, spine1, spine2.",
        "It has not been seen; if its first packet came now, spine3 would become its home.",
    ]


def test_a_full_path_is_passed_over_and_said_so() -> None:
    answer = explain(case(homes={2: 5, 0: 4, 1: 4}))
    assert answer["path"] == "spine1"
    assert (
        "spine3 is preferred but already is home to 5 QPs that send, its share is 5: passed over."
        in answer["why"]
    )
    assert [step["share"] for step in answer["order"]] == [5, 5, 5]


def test_an_unseen_qp_that_only_answers_would_get_another_home_where_the_first_is_full() -> None:
    says = "A first packet that only answers would make it spine3."
    assert explain(case(homes={2: 1}))["why"][-1] == says
    assert (
        "spine3 is preferred but already is home to 1 QP that sends, its share is 1: passed over."
        in (explain(case(homes={2: 1}))["why"])
    )
    assert says not in explain(case(homes={2: 1}, placement=Placement.HASH))["why"]
    assert says not in explain(case())["why"]


def test_a_seen_qp_that_only_answers_is_said_to_be_counted_by_no_share() -> None:
    answering = case(row=seen("spine3", "spine3"), home_id=2, counted=False, homes={0: 4})
    assert explain(answering)["why"][2:] == [
        "Its home has been spine3 since its first packet, 12.0 s ago.",
        "It has only sent answers so far (ACKs, NAKs, CNPs): it began where its slot's order says; no share counts it.",
        "spine3 serves, so its packets take it.",
    ]
    by_hash = explain(replace(answering, placement=Placement.HASH))
    assert not any("answers" in sentence for sentence in by_hash["why"]), "by hash nothing is counted"


def test_with_hash_placement_nothing_is_passed_over() -> None:
    answer = explain(case(homes={2: 500}, placement=Placement.HASH))
    assert answer["path"] == "spine3"
    assert [step["share"] for step in answer["order"]] == [None, None, None]


def test_a_dead_path_is_passed_over_and_said_so() -> None:
    answer = explain(case(paths=down(2), living=0b011))
    assert answer["path"] == "spine1"
    assert "spine3 is preferred but is down (bfd-down): passed over." in answer["why"]


def test_a_path_that_is_no_next_hop_is_passed_over_and_said_so() -> None:
    answer = explain(case(group=Group(id=1, weights={0: 1, 1: 1}, table=0)))
    assert answer["path"] == "spine1"
    assert "spine3 is preferred but is no next hop of this route: passed over." in answer["why"]
    assert [step["member"] for step in answer["order"]] == [False, True, True]


def test_a_seen_qp_stays_at_home() -> None:
    answer = explain(case(row=seen("spine2", "spine2"), home_id=1))
    assert (answer["seen"], answer["home"], answer["path"]) == (True, "spine2", "spine2")
    assert answer["why"][2:] == [
        "Its home has been spine2 since its first packet, 12.0 s ago.",
        "spine2 serves, so its packets take it.",
        "spine3 comes first in its slot's order now; a home is kept all the same.",
    ]


def test_a_seen_qp_whose_home_died_takes_the_next_choice() -> None:
    answer = explain(case(row=seen("spine3", "spine3"), home_id=2, paths=down(2), living=0b011))
    assert (answer["home"], answer["path"]) == ("spine3", "spine1")
    assert answer["why"][3:] == [
        f"spine3 is down (bfd-down), so {TAKES}, and go home when it serves again.",
        "Its last packet, 0.5 s ago, still took spine3.",
    ]


def test_the_kernels_word_counts_where_the_daemon_has_not_heard_yet() -> None:
    answer = explain(case(row=seen("spine3", "spine1"), home_id=2, living=0b011))
    assert answer["path"] == "spine1"
    assert answer["why"][3].startswith(
        "spine3 does not live in the kernel's word, so its packets take spine1"
    )


def test_a_home_that_left_the_route_is_said_so() -> None:
    answer = explain(
        case(row=seen("spine3", "spine1"), home_id=2, group=Group(id=1, weights={0: 1, 1: 1}, table=0))
    )
    assert answer["path"] == "spine1"
    assert answer["why"][3] == f"spine3 no longer is a next hop of this route, so {TAKES}."


def test_a_home_that_is_no_more() -> None:
    answer = explain(case(row=seen("spine9", "spine1"), home_id=9))
    assert (answer["home"], answer["path"]) == (None, "spine3")
    assert answer["why"][2] == "Its home is a path that is no more."


@pytest.mark.parametrize("row", [None, seen("spine1", "spine1")])
def test_no_living_path_is_the_kernels_own_choice(row: QpRow | None) -> None:
    answer = explain(case(living=0, row=row, home_id=None if row is None else 0))
    assert answer["path"] is None
    assert "None of them serves: its packets pass untouched, the kernel's own choice." in answer["why"]


def test_no_route_is_the_kernels_own_choice() -> None:
    answer = explain(case(group=None, prefix=None, order=[]))
    assert (answer["path"], answer["home"], answer["group"], answer["prefix"]) == (None, None, None, None)
    assert answer["why"][1].startswith(
        "No route by an uplink covers the outer destination 10.255.2.1: its packets"
    )


@given(
    st.permutations(range(5)),
    st.integers(0, 31),
    st.integers(1, 31),
    st.dictionaries(st.integers(0, 4), st.integers(0, 20)),
    st.sampled_from(Placement),
)
def test_an_unseen_qp_goes_where_the_placement_rule_says(
    order: list[int], living: int, members: int, homes: dict[int, int], placement: Placement
) -> None:
    weights = {id_: id_ + 1 for id_ in range(5) if members >> id_ & 1}
    answer = explain(
        case(
            order=order,
            paths={id_: path(id_) for id_ in range(5)},
            living=living,
            homes=homes,
            placement=placement,
            group=Group(id=0, weights=weights, table=0),
        )
    )
    active = {id_: homes.get(id_, 0) for id_ in range(5)}
    wanted = place(order, living & members, placement, active, weights)
    assert answer["path"] == (None if wanted is None else f"spine{wanted + 1}")
    assert answer["home"] == answer["path"]


def test_it_tells_how_the_packets_fared_and_which_qp_answers() -> None:
    plain: QpRow = seen("spine3", "spine3") | {
        "packets": 1200,
        "lost": 2,
        "retransmitted": 17,
        "naks": 1,
        "cnps": 3,
    }
    reverse: QpRow = {**plain, "direction": "in", "path": "spine3"}
    told = explain(case(row=plain, home_id=2, reverse=reverse))
    assert told["fares"] == [
        "1200 packets left, 17 sent again; none of them lost before this leaf, 2 in the fabric behind it.",
        "Among them: 1 NAK, 3 CNPs.",
        "QP 0x41 of 10.1.0.11 speaks with it; the other direction arrives by spine3, on the same plane.",
        "Its round trips take 84.2 us (the last one), 79.1 us at least and 86.5 us in the mean of 60.",
    ]
    assert told["reverse"] == reverse
    reverse["path"] = "spine1"
    elsewhere = explain(case(row=plain, home_id=2, reverse=reverse))
    assert "QP 0x41 of 10.1.0.11 speaks with it; the other direction arrives by spine1." in elsewhere["fares"]


def test_it_tells_what_cannot_be_known() -> None:
    nothing = dict.fromkeys(
        ("lost", "lost_at_host", "retransmitted", "out_of_order", "naks", "peer_qp", "rtt_us")
    )
    datagrams = seen("spine3", "spine3") | nothing | {"transport": "ud", "packets": 1}
    assert explain(case(row=datagrams, home_id=2))["fares"] == [
        "1 packet left; datagrams do not tell whether one is missing.",
        "Which QP speaks with it is not known: its packets have not shown it for sure.",
    ]
    unreliable = seen("spine3", "spine3") | {"transport": "uc", "lost": None, "lost_at_host": 5, "packets": 9}
    assert explain(case(row=unreliable, home_id=2))["fares"][0] == (
        "9 packets left, 5 of them lost before this leaf; nothing is sent again, so what is lost behind it does not "
        "show here."
    )
    assert explain(case())["fares"] == []
