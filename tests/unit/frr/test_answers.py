"""bfdd's and bgpd's answers, from 8.4.4 to 10.7, become sessions and names; see tests/data/frr/README.md."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.frr.bfd import parse_sessions
from qpd.frr.peers import PeerNames, parse_peers
from qpd.model import Address, BfdState, NextHopKey

DATA = Path(__file__).parents[2] / "data" / "frr"
PEER = IPv4Address("10.77.0.1")
LINK_LOCAL = IPv6Address("fe80::d460:3eff:feb3:67b3")
LINK_LOCAL_10_3 = IPv6Address("fe80::7c36:5ff:fed9:ede0")


def text(name: str) -> str:
    return (DATA / f"{name}.json").read_text()


def n0(address: Address) -> str | None:
    """The kernel's word: 10.77.0.0/30 lies on n0, nothing else on any link."""
    return "n0" if int(address) >> 2 == int(PEER) >> 2 else None


def nowhere(address: Address) -> str | None:
    return None


@pytest.mark.parametrize(
    ("answer", "unnumbered"),
    [
        ("bfd-8.4.4-up", LINK_LOCAL),
        ("bfd-9.1", LINK_LOCAL),
        ("bfd-10.3-up", LINK_LOCAL_10_3),
        ("bfd-10.7", LINK_LOCAL),
    ],
)
def test_sessions_of_every_release_are_the_same(answer: str, unnumbered: IPv6Address) -> None:
    found = {(s.interface, s.peer): s for s in parse_sessions(text(answer), nowhere)}
    assert set(found) == {("n0", PEER), ("n1", unnumbered)}
    for session in found.values():
        assert session.state is BfdState.UP
        assert session.diagnostic == "ok"
        # The peer's multiplier 3 times 100 ms.
        assert session.detection_time == pytest.approx(0.3)
    assert found["n0", PEER].local == IPv4Address("10.77.0.0")


@pytest.mark.parametrize("answer", ["bfd-8.4.4-down", "bfd-10.3-down"])
def test_a_session_that_went_down_says_why_and_has_no_detection_time(answer: str) -> None:
    (down,) = (s for s in parse_sessions(text(answer), nowhere) if s.interface == "n0")
    assert down.state is BfdState.DOWN
    assert down.diagnostic == "control detection time expired"
    assert down.detection_time is None


def test_a_session_without_interface_gets_the_one_that_the_kernel_knows() -> None:
    (shut,) = (s for s in parse_sessions(text("bfd-10.7"), n0) if s.peer == IPv4Address("10.77.0.3"))
    assert shut.interface == "n0"
    assert shut.state is BfdState.ADMIN_DOWN


@given(st.sets(st.sampled_from(sorted({key for entry in orjson.loads(text("bfd-10.7")) for key in entry}))))
def test_every_key_of_a_session_is_optional(missing: set[str]) -> None:
    entries = [
        {key: value for key, value in entry.items() if key not in missing}
        for entry in orjson.loads(text("bfd-10.7"))
    ]
    found = parse_sessions(orjson.dumps(entries).decode(), n0)
    if missing & {"peer", "status"}:
        assert not found
    else:
        assert ("n0", PEER) in {(s.interface, s.peer) for s in found}


@pytest.mark.parametrize("answer", ["", "% Unknown command", "{}", "[", "null"])
def test_an_answer_that_is_none_is_an_error_of_one_line(answer: str) -> None:
    with pytest.raises(ValueError, match=r"^bfdd's answer to 'show bfd peers json' is not .*$"):
        parse_sessions(answer, nowhere)


@pytest.mark.parametrize("answer", ["", "% BGP instance not found", "[]", "{", "null"])
def test_bgpd_likewise(answer: str) -> None:
    with pytest.raises(ValueError, match=r"^bgpd's answer to 'show bgp neighbors json' is not .*$"):
        parse_peers(answer)


@pytest.mark.parametrize(
    ("answer", "unnumbered"), [("bgp-8.4.4-up", LINK_LOCAL), ("bgp-10.3-up", LINK_LOCAL_10_3)]
)
def test_numbered_and_unnumbered_peers_are_named(answer: str, unnumbered: IPv6Address) -> None:
    assert PeerNames().update(parse_peers(text(answer)), n0) == {
        NextHopKey("n0", PEER): "east",
        NextHopKey("n1", unnumbered): "east",
    }


def test_in_10_7_peers_without_a_name_are_left_out() -> None:
    assert PeerNames().update(parse_peers(text("bgp-10.7")), n0) == {
        NextHopKey("n0", PEER): "east",
        NextHopKey("n0", IPv4Address("10.77.0.3")): "south",
        NextHopKey("n1", LINK_LOCAL): "east",
    }


def test_a_numbered_peer_on_no_link_has_no_next_hop() -> None:
    assert PeerNames().update(parse_peers(text("bgp-8.4.4-up")), nowhere) == {
        NextHopKey("n1", LINK_LOCAL): "east"
    }


def test_a_name_outlives_its_session_and_goes_with_its_neighbour() -> None:
    names = PeerNames()
    before = names.update(parse_peers(text("bgp-8.4.4-up")), n0)
    silent = orjson.loads(text("bgp-8.4.4-up"))
    for entry in silent.values():
        entry["bgpState"] = "Active"
        del entry["hostname"]
        entry["hostForeign"] = "Unknown"
        entry.pop("bgpNeighborAddr", None)
    assert names.update(parse_peers(orjson.dumps(silent).decode()), nowhere) == before
    del silent["n1"]
    assert names.update(parse_peers(orjson.dumps(silent).decode()), n0) == {NextHopKey("n0", PEER): "east"}


def test_a_peer_with_a_new_link_local_address_is_named_by_that() -> None:
    names = PeerNames()
    names.update(parse_peers(text("bgp-8.4.4-up")), n0)
    moved = text("bgp-8.4.4-up").replace(str(LINK_LOCAL), "fe80::7")
    keys = {key for key in names.update(parse_peers(moved), n0) if key.interface == "n1"}
    assert keys == {NextHopKey("n1", ip_address("fe80::7"))}
