"""The BFD tap: what it takes for a session, when a path dies and returns, and what it does not believe.

Time is not waited for: a test moves a session's time stamps in the map instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import IntEnum
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest

from qpd.kernel import layout
from qpd.kernel.ring import EventKind, Ring
from qpd.model import NO_PATH, Hook, Verdict
from tests.ebpf import packets
from tests.ebpf.harness import OTHER_IFINDEX, OWN_IFINDEX, PASS, Classifier, Outcome, Uplink
from tests.ebpf.packets import (
    ADMIN_DOWN,
    AUTHENTICATION,
    DEMAND,
    DOWN,
    FINAL,
    INIT,
    MULTIPOINT,
    PEER,
    POLL,
    UP,
    Bfd,
    Roce,
)

pytestmark = pytest.mark.root

SECOND = 10**9
HOLD_UP = 3600 * SECOND
"""Longer than any test, so that it ends only where a test says so."""
WATCHED, OTHER = 0, 1
"""Paths: the one whose session is under test, and one without."""


class State(IntEnum):
    """``enum tap_state`` of maps.h."""

    IDLE = 0
    ALIVE = 1
    DEAD = 2


class Cause(IntEnum):
    """``enum tap_cause`` of maps.h."""

    UP = 0
    LOCAL_DOWN = 1
    REMOTE_DOWN = 2
    SILENT = 3
    LIFTED = 4


class Tap:
    """The node with two paths, and a BFD session with the first one's next hop."""

    def __init__(self, classifier: Classifier, ring: Ring, version: int) -> None:
        self.classifier, self.version, self._ring = classifier, version, ring
        next_hop = PEER[version]
        classifier.fabric([Uplink(OWN_IFINDEX, next_hop, sole=False), Uplink(OTHER_IFINDEX, "fe80::2")])
        self.relate({(OWN_IFINDEX, next_hop): WATCHED})
        self.hold_up(HOLD_UP)
        # A QP at home on the path under test.
        self.roce = next(
            roce
            for roce in (Roce(outer=version, dest_qp=qp) for qp in range(64))
            if classifier.path_of(classifier.steer(roce.build())) == WATCHED
        )
        self.events()

    # --- what happens ------------------------------------------------------------------------------------------

    def send(self, state: int, **fields: Any) -> Outcome:
        """A packet of this node's BFD daemon leaves."""
        return self._run(Hook.STEER, Bfd(leaves=True, state=state, version=self.version, **fields))

    def receive(self, state: int, **fields: Any) -> Outcome:
        """A packet of the peer's arrives."""
        return self._run(Hook.OBSERVE, Bfd(leaves=False, state=state, version=self.version, **fields))

    def _run(self, hook: Hook, bfd: Bfd) -> Outcome:
        packet = bfd.build()
        outcome = self.classifier.run(hook, packet)
        assert (outcome.action, outcome.packet) == (PASS, packet), "the tap only listens"
        return outcome

    def come_up(self, **fields: Any) -> None:
        """The three-way handshake (RFC 5880, 6.2)."""
        self.send(DOWN, your=0, **fields)
        self.receive(DOWN, your=0, **fields)
        self.send(INIT, **fields)
        self.receive(UP, **fields)
        self.send(UP, **fields)

    def relate(self, paths: dict[tuple[int, str], int]) -> None:
        table = self.classifier.maps._tables["path_of_next_hop"]
        keys, _ = table.all()
        table.erase(keys)
        keys = np.array([(ifindex, key_address(peer)) for ifindex, peer in paths], layout.NEIGHBOUR_ADDRESS)
        table.write(keys, np.fromiter(paths.values(), layout.INDEX, len(paths)))

    def hold_up(self, nanoseconds: int) -> None:
        table = self.classifier.maps._tables["control"]
        control = np.frombuffer(bytearray(table.octets(0) or b""), layout.CONTROL)
        control["hold_up_ns"] = nanoseconds
        table.set(0, control)

    def pass_time(self, **fields: int) -> None:
        """Set time stamps of the session (and the path's deadline with its own) to another moment."""
        session = self.session.copy()
        for name, value in fields.items():
            session[name] = value
        table = self.classifier.maps._tables["bfd_sessions"]
        table.set(self.key.tobytes(), np.array([session], layout.BFD_SESSION))
        if "deadline_ns" in fields:
            paths = self.classifier.maps._tables["paths"]
            record = np.frombuffer(bytearray(paths.octets(WATCHED) or b""), layout.PATH)
            record["deadline_ns"] = fields["deadline_ns"]
            paths.set(WATCHED, record)

    # --- what is seen ------------------------------------------------------------------------------------------

    @property
    def key(self) -> np.ndarray[Any, Any]:
        return np.array([(OWN_IFINDEX, key_address(PEER[self.version]))], layout.NEIGHBOUR_ADDRESS)

    @property
    def session(self) -> Any:
        record = self.classifier.maps._tables["bfd_sessions"].get(self.key.tobytes())
        assert record is not None
        return record

    @property
    def dead(self) -> int:
        """The tap's word."""
        return int.from_bytes(self.classifier.maps._tables["living"].octets(1) or b"", "little")

    @property
    def path(self) -> int:
        """Where the QP's next packet goes."""
        return self.classifier.path_of(self.classifier.steer(self.roce.build()))

    def events(self) -> list[tuple[int, bool, Cause]]:
        """Path, whether it serves, cause: since the last call."""
        told = []
        while records := self._ring.read():
            for record in records:
                if record.kind is EventKind.PATH_STATE:
                    up, cause = np.frombuffer(record.content, "u4", 2)
                    told.append((record.path, bool(up), Cause(cause)))
        return told


def key_address(address: str) -> np.void:
    return np.void(layout.pack_address(ip_address(address)))


@pytest.fixture
def ring(classifier: Classifier) -> Iterator[Ring]:
    ring = Ring(classifier.pins.map("events"))
    yield ring
    ring.close()


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6 link-local"])
def tap(classifier: Classifier, ring: Ring, request: pytest.FixtureRequest) -> Tap:
    return Tap(classifier, ring, request.param)


@pytest.fixture
def up(tap: Tap) -> Tap:
    tap.come_up()
    assert tap.session["state"] == State.ALIVE
    return tap


# --- Life ------------------------------------------------------------------------------------------------------------


def test_a_session_comes_up_and_is_known(tap: Tap) -> None:
    assert tap.send(DOWN, your=0, diagnostic=7).verdicts == {Verdict.BFD: 1}
    assert tap.session["state"] == State.IDLE
    assert tap.receive(INIT).verdicts == {Verdict.BFD: 1}
    tap.send(UP, tx=20_000, rx=30_000, multiplier=4)
    assert tap.session["state"] == State.IDLE, "the peer has not said Up"
    tap.receive(UP, tx=40_000, rx=50_000, multiplier=5, diagnostic=3)
    session = tap.session
    assert (session["state"], session["path"], session["downs"]) == (State.ALIVE, WATCHED, 0)
    assert session["local"].tolist() == (UP, 0, 4, 0, packets.NODE_DISCRIMINATOR, 20_000, 30_000)
    assert session["remote"].tolist() == (UP, 3, 5, 0, packets.PEER_DISCRIMINATOR, 40_000, 50_000)
    assert 0 < session["last_tx_ns"] < session["last_rx_ns"] == session["up_since_ns"]
    assert (tap.dead, tap.path, tap.events()) == (0, WATCHED, [])


@pytest.mark.parametrize("states", [(DOWN,), (DOWN, INIT), (DOWN, INIT, DOWN)], ids=str)
def test_a_session_never_seen_up_constrains_nothing(tap: Tap, states: tuple[int, ...]) -> None:
    for state in states:
        tap.send(state)
        tap.receive(state)
    assert (tap.session["state"], tap.dead, tap.path, tap.events()) == (State.IDLE, 0, WATCHED, [])


# --- Death -----------------------------------------------------------------------------------------------------------


def test_the_own_daemon_s_down_kills_the_path_at_once(up: Tap) -> None:
    assert up.path == WATCHED
    up.send(DOWN, diagnostic=1)
    assert (up.dead, up.path) == (1 << WATCHED, OTHER)
    assert (up.session["state"], up.session["cause"], up.session["downs"]) == (
        State.DEAD,
        Cause.LOCAL_DOWN,
        1,
    )
    assert up.events() == [(WATCHED, False, Cause.LOCAL_DOWN)]


def test_the_peer_s_down_kills_the_path_at_once(up: Tap) -> None:
    up.receive(DOWN, diagnostic=1)
    assert (up.dead, up.path) == (1 << WATCHED, OTHER)
    assert up.events() == [(WATCHED, False, Cause.REMOTE_DOWN)]
    up.send(DOWN, diagnostic=3)
    assert (up.session["downs"], up.events()) == (1, []), "one death, told once"


def test_a_daemon_that_was_down_and_is_back_at_init_was_down(up: Tap) -> None:
    up.send(INIT)
    assert up.dead == 1 << WATCHED


def test_a_restarted_peer_was_down(up: Tap) -> None:
    """Its first packets know no discriminator of ours (RFC 5880, 6.8.6: Your Discriminator zero is for Down)."""
    up.receive(DOWN, my=0x99, your=0)
    assert up.events() == [(WATCHED, False, Cause.REMOTE_DOWN)]


def test_a_path_with_a_living_session_beside_it_is_not_touched(up: Tap) -> None:
    up.relate({(OWN_IFINDEX, PEER[up.version]): WATCHED, (OTHER_IFINDEX, "fe80::2"): OTHER})
    up.send(DOWN)
    assert up.dead == 1 << WATCHED
    assert up.path == OTHER


@pytest.mark.parametrize("who", ["send", "receive"])
def test_admin_down_is_no_failure(up: Tap, who: str) -> None:
    getattr(up, who)(ADMIN_DOWN)
    assert (up.session["state"], up.dead, up.path) == (State.IDLE, 0, WATCHED)
    up.send(DOWN, diagnostic=3)
    up.receive(DOWN)
    assert (up.dead, up.path, up.events()) == (0, WATCHED, []), "nor is what follows from it"


@pytest.mark.parametrize("who", ["send", "receive"])
def test_admin_down_lifts_the_claim_on_a_dead_path(up: Tap, who: str) -> None:
    up.send(DOWN)
    getattr(up, who)(ADMIN_DOWN)
    assert (up.dead, up.path) == (0, WATCHED)
    assert up.events() == [(WATCHED, False, Cause.LOCAL_DOWN), (WATCHED, True, Cause.LIFTED)]


# --- Silence ---------------------------------------------------------------------------------------------------------


DETECTION: dict[str, tuple[dict[str, int], dict[str, int], int, int]] = {
    "the peer sends slower than we want": ({"rx": 10_000}, {"tx": 20_000}, 60_000, 20_000),
    "we want it slower than the peer could": ({"rx": 50_000}, {"tx": 20_000}, 150_000, 50_000),
    "the peer's multiplier counts": ({"multiplier": 9}, {"multiplier": 2}, 20_000_000, 10_000_000),
    "our sending rate does not matter": ({"tx": 1, "rx": 10_000}, {"tx": 10_000, "rx": 1}, 30_000, 10_000),
    "the longest numbers": ({"rx": 2**32 - 1}, {"multiplier": 255}, 255 * (2**32 - 1), 2**32 - 1),
    "we want none": ({"rx": 0}, {"tx": 10_000}, 0, 0),
    "demand mode: we ask for none": ({"rx": 10_000, "flags": DEMAND}, {"tx": 10_000}, 0, 0),
    "the peer's demand mode is for us": ({"rx": 10_000}, {"tx": 10_000, "flags": DEMAND}, 30_000, 10_000),
}
"""Ours, theirs, detection time and interval in microseconds."""


@pytest.mark.parametrize("sentence", DETECTION)
def test_detection_time(tap: Tap, sentence: str) -> None:
    """RFC 5880, 6.8.4, and one interval more until the tap itself speaks."""
    ours, theirs, microseconds, interval = DETECTION[sentence]
    tap.send(INIT)
    tap.receive(UP, **theirs)
    tap.send(UP, **ours)
    session = tap.session
    assert session["detection_ns"] == microseconds * 1000
    waits = session["last_rx_ns"] + (microseconds + interval) * 1000 if microseconds else 0
    assert session["deadline_ns"] == waits
    assert tap.classifier.maps._tables["paths"].all()[1][WATCHED]["deadline_ns"] == waits


def test_a_shorter_interval_counts_when_its_poll_sequence_is_over(up: Tap) -> None:
    """RFC 5880, 6.8.3: until then the peer may still send at the old rate."""
    up.send(UP, rx=1_000_000, flags=POLL)
    assert up.session["detection_ns"] == 3 * 10 * SECOND
    up.receive(UP, tx=1_000_000, flags=FINAL)
    assert up.session["detection_ns"] == 3 * 10 * SECOND
    up.send(UP, rx=1_000_000)
    assert up.session["detection_ns"] == 3 * SECOND


def test_a_longer_interval_counts_at_once(up: Tap) -> None:
    up.send(UP, rx=20_000_000, flags=POLL)
    assert up.session["detection_ns"] == 3 * 20 * SECOND


def test_the_first_packet_after_the_deadline_takes_the_path_the_next_does_not(up: Tap) -> None:
    up.pass_time(deadline_ns=1)
    assert up.path == WATCHED
    assert (up.dead, up.path) == (1 << WATCHED, OTHER)
    assert up.events() == [(WATCHED, False, Cause.SILENT)]
    up.send(UP)
    assert (up.dead, up.session["state"], up.session["cause"]) == (1 << WATCHED, State.DEAD, Cause.SILENT)
    assert (up.session["downs"], up.events()) == (1, [])


def test_silence_is_found_without_traffic_by_the_daemon_s_next_packet(up: Tap) -> None:
    up.pass_time(deadline_ns=1)
    up.send(UP)
    assert (up.dead, up.events()) == (1 << WATCHED, [(WATCHED, False, Cause.SILENT)])


def test_a_packet_that_comes_too_late_does_not_undo_the_silence(up: Tap) -> None:
    up.pass_time(deadline_ns=1)
    up.receive(UP)
    assert (up.dead, up.events()) == (1 << WATCHED, [(WATCHED, False, Cause.SILENT)])


def test_each_packet_of_the_peer_moves_the_deadline(up: Tap) -> None:
    before = int(up.session["deadline_ns"])
    up.receive(UP)
    assert up.session["deadline_ns"] > before
    assert up.session["deadline_ns"] == up.session["last_rx_ns"] + 4 * 10 * SECOND


def test_our_own_packets_do_not(up: Tap) -> None:
    before = int(up.session["deadline_ns"])
    up.send(UP)
    assert up.session["deadline_ns"] == before


def test_no_deadline_outlives_the_session(up: Tap) -> None:
    up.send(DOWN)
    assert up.session["deadline_ns"] == 0
    assert up.classifier.maps._tables["paths"].all()[1][WATCHED]["deadline_ns"] == 0


# --- Return ----------------------------------------------------------------------------------------------------------


def held(up: Tap) -> None:
    """The session has been Up for hold_up."""
    up.pass_time(up_since_ns=1)
    up.hold_up(1)


@pytest.mark.parametrize("last", ["send", "receive"])
def test_a_dead_path_returns_when_both_sides_have_been_up_for_hold_up(up: Tap, last: str) -> None:
    up.send(DOWN)
    up.receive(DOWN)
    up.come_up()
    assert (up.session["state"], up.dead, up.path) == (State.DEAD, 1 << WATCHED, OTHER)
    up.events()
    held(up)
    assert up.path == OTHER, "time alone does nothing"
    getattr(up, last)(UP)
    assert (up.session["state"], up.dead, up.path) == (State.ALIVE, 0, WATCHED)
    assert up.events() == [(WATCHED, True, Cause.UP)]


def test_a_fall_within_hold_up_begins_it_anew(up: Tap) -> None:
    up.send(DOWN)
    up.come_up()
    first = int(up.session["up_since_ns"])
    assert first
    up.send(DOWN)
    assert up.session["up_since_ns"] == 0
    up.come_up()
    assert up.session["up_since_ns"] > first
    assert up.session["downs"] == 1


def test_silence_within_hold_up_begins_it_anew(up: Tap) -> None:
    up.send(DOWN)
    up.come_up()
    up.pass_time(deadline_ns=1, up_since_ns=1)
    up.hold_up(1)
    up.send(UP)
    assert (up.session["up_since_ns"], up.dead) == (0, 1 << WATCHED)
    up.hold_up(HOLD_UP)
    up.receive(UP)
    assert up.session["up_since_ns"] > 1


def test_without_hold_up_a_path_returns_at_once(up: Tap) -> None:
    up.hold_up(0)
    up.send(DOWN)
    up.come_up()
    assert (up.dead, up.path) == (0, WATCHED)


# --- The daemons' own lives ------------------------------------------------------------------------------------------


def test_a_restarted_daemon_does_not_kill_a_living_path(up: Tap) -> None:
    """Another discriminator is another session, never seen Up: it constrains nothing."""
    up.send(DOWN, my=0x77, your=0)
    assert (up.session["state"], up.dead, up.path) == (State.IDLE, 0, WATCHED)
    assert up.session["remote"]["discriminator"] == 0
    assert up.receive(UP, your=packets.NODE_DISCRIMINATOR).verdicts == {Verdict.NOT_ROCE: 1}, (
        "to the session before"
    )


def test_a_restarted_daemon_does_not_revive_a_dead_path(up: Tap) -> None:
    up.send(DOWN)
    up.send(DOWN, my=0x77, your=0)
    up.receive(DOWN, your=0)
    assert up.dead == 1 << WATCHED
    up.hold_up(0)
    up.send(INIT, my=0x77)
    up.receive(UP, your=0x77)
    up.send(UP, my=0x77)
    assert up.dead == 0


def test_a_bit_that_was_lost_is_put_right_by_the_next_packet(up: Tap) -> None:
    up.send(DOWN)
    up.classifier.maps._tables["living"].set(1, bytes(8))
    up.send(DOWN)
    assert up.dead == 1 << WATCHED
    up.hold_up(0)
    up.come_up()
    up.classifier.maps._tables["living"].set(1, (1 << WATCHED).to_bytes(8, "little"))
    up.receive(UP)
    assert up.dead == 0


# --- Which path ------------------------------------------------------------------------------------------------------


def test_a_session_with_no_path_is_known_and_claims_none(tap: Tap) -> None:
    tap.relate({})
    tap.come_up()
    tap.send(DOWN)
    assert (tap.session["state"], tap.session["path"], tap.dead, tap.events()) == (State.DEAD, NO_PATH, 0, [])
    tap.relate({(OWN_IFINDEX, PEER[tap.version]): OTHER})
    tap.send(DOWN)
    assert (tap.dead, tap.events()) == (1 << OTHER, [(OTHER, False, Cause.LOCAL_DOWN)])


def test_a_path_that_got_another_id_takes_its_bit_along(up: Tap) -> None:
    up.send(DOWN)
    up.relate({(OWN_IFINDEX, PEER[up.version]): 63})
    up.send(DOWN)
    assert up.dead == 1 << 63
    up.relate({})
    up.send(DOWN)
    assert up.dead == 0


def test_sessions_of_many_paths_do_not_disturb_each_other(classifier: Classifier, ring: Ring) -> None:
    tap = Tap(classifier, ring, 4)
    peers = {path: f"198.51.100.{path + 10}" for path in range(2, 64)}
    tap.relate({(OWN_IFINDEX, peer): path for path, peer in peers.items()})
    tap.hold_up(0)
    for peer in peers.values():
        tap.come_up(peer=peer)
    assert tap.dead == 0
    dead = 0
    for path, peer in peers.items():
        (tap.send if path % 2 else tap.receive)(DOWN, peer=peer)
        dead |= 1 << path
        assert tap.dead == dead
    for path, peer in reversed(peers.items()):
        tap.come_up(peer=peer)
        dead &= ~(1 << path)
        assert tap.dead == dead


def test_no_more_sessions_than_the_map_holds(classifier: Classifier, ring: Ring) -> None:
    tap = Tap(classifier, ring, 4)
    for number in range(layout.BFD_SESSIONS_MAX):
        assert tap.send(DOWN, your=0, peer=f"198.51.{number}.9").verdicts == {Verdict.BFD: 1}
    assert tap.send(DOWN, your=0, peer="198.51.100.250").verdicts == {Verdict.MAP_FULL: 1}
    assert tap.send(DOWN, your=0, peer="198.51.7.9").verdicts == {Verdict.BFD: 1}


# --- What is not believed --------------------------------------------------------------------------------------------

FALSE: dict[str, dict[str, Any]] = {
    "a packet that was forwarded (TTL 254)": {"ttl": 254},
    "TTL 1": {"ttl": 1},
    "version 0": {"bfd_version": 0},
    "version 2": {"bfd_version": 2},
    "a length below the least": {"length": 23},
    "a length below the least with authentication": {"flags": AUTHENTICATION, "length": 24},
    "no multiplier": {"multiplier": 0},
    "multipoint": {"flags": MULTIPOINT},
    "no discriminator of its own": {"my": 0},
    "no discriminator of ours, not at the beginning (Init)": {"your": 0, "state": INIT},
    "no discriminator of ours, not at the beginning (Up)": {"your": 0, "state": UP},
    "a discriminator that is not ours": {"your": 0x12345678},
    "authentication, which our session has not": {"flags": AUTHENTICATION, "length": 26},
    "another peer": {"peer": "other"},
    "an echo packet": {"port": 3785},
    "a multihop packet": {"port": 4784},
    "a packet of a VLAN's": {"tags": 1},
}


@pytest.mark.parametrize("sentence", FALSE)
def test_false_packets_from_outside_change_nothing(up: Tap, sentence: str) -> None:
    fields = {"state": DOWN, **FALSE[sentence]}
    if fields.get("peer"):
        fields["peer"] = {4: "198.51.100.77", 6: "fe80::77"}[up.version]
    before = up.session.tobytes()
    assert up.receive(**fields).verdicts == {Verdict.NOT_ROCE: 1}
    assert (up.session.tobytes(), up.dead, up.path, up.events()) == (before, 0, WATCHED, [])


OWN_FALSE = [
    sentence
    for sentence in FALSE
    # What the own daemon sends says how the session is: these three are true then.
    if sentence not in {"a discriminator that is not ours", "another peer"}
    and "authentication, which" not in sentence
]


@pytest.mark.parametrize("sentence", OWN_FALSE)
def test_false_packets_of_our_own_change_nothing(up: Tap, sentence: str) -> None:
    before = up.session.tobytes()
    assert up.send(**{"state": DOWN, **FALSE[sentence]}).verdicts == {Verdict.NOT_ROCE: 1}
    assert (up.session.tobytes(), up.dead, up.path) == (before, 0, WATCHED)


def test_a_peer_s_packet_on_another_uplink_is_not_the_session_s(up: Tap) -> None:
    before = up.session.tobytes()
    packet = Bfd(leaves=False, state=DOWN, version=up.version).build()
    # A second session that the daemon would have to have on that interface, for this packet to be one's.
    table = up.classifier.maps._tables["bfd_sessions"]
    moved = np.array([(OTHER_IFINDEX, key_address(PEER[up.version]))], layout.NEIGHBOUR_ADDRESS)
    table.erase(up.key)
    table.set(moved.tobytes(), np.frombuffer(bytearray(before), layout.BFD_SESSION))
    assert up.classifier.observe(packet).verdicts == {Verdict.NOT_ROCE: 1}
    record = table.get(moved.tobytes())
    assert record is not None
    assert record.tobytes() == before


def test_packets_of_a_peer_that_is_not_spoken_to_make_no_session(tap: Tap) -> None:
    assert tap.receive(DOWN, your=0).verdicts == {Verdict.NOT_ROCE: 1}
    assert len(tap.classifier.maps._tables["bfd_sessions"].all()[0]) == 0


def test_a_packet_inside_vxlan_is_a_guest_s(up: Tap) -> None:
    frame = Bfd(leaves=False, state=DOWN, version=up.version).layers()
    before = up.session.tobytes()
    for hook in Hook:
        assert up.classifier.run(hook, bytes(Roce().wrap(frame))).verdicts == {Verdict.NOT_ROCE: 1}
    assert up.session.tobytes() == before


def test_a_length_beyond_the_datagram_is_false(up: Tap) -> None:
    packet = bytearray(Bfd(leaves=False, state=DOWN, version=up.version).build())
    packet[-24 + 3] = 25
    assert up.classifier.observe(bytes(packet)).verdicts == {Verdict.NOT_ROCE: 1}
    assert up.dead == 0


@pytest.mark.parametrize("hook", list(Hook), ids=lambda hook: hook.name.lower())
def test_a_packet_cut_anywhere_changes_nothing(up: Tap, hook: Hook) -> None:
    packet = Bfd(leaves=hook is Hook.STEER, state=DOWN, version=up.version).build()
    before = up.session.tobytes()
    for length in range(14 + (20 if up.version == 4 else 40), len(packet)):
        assert up.classifier.run(hook, packet[:length]).verdicts == {Verdict.TRUNCATED: 1}, f"{length} octets"
    assert (up.session.tobytes(), up.dead) == (before, 0)


def test_an_authenticated_session_follows_its_own_daemon_s_word_alone(tap: Tap) -> None:
    """The tap cannot check a digest: neither the peer's Down nor its silence counts, the daemon's verdict does."""
    signed = {"flags": AUTHENTICATION, "length": 26}
    for state in (DOWN, INIT, UP):
        tap.send(state, **signed)
    assert (tap.session["state"], tap.session["deadline_ns"]) == (State.ALIVE, 0)
    assert tap.receive(DOWN, **signed).verdicts == {Verdict.NOT_ROCE: 1}
    assert tap.receive(DOWN).verdicts == {Verdict.NOT_ROCE: 1}
    assert tap.dead == 0
    tap.send(DOWN, **signed)
    assert tap.dead == 1 << WATCHED


# --- These assertions can fail ---------------------------------------------------------------------------------------


def test_what_the_false_packets_lack_is_what_makes_a_true_one(up: Tap) -> None:
    before = up.session.tobytes()
    true = Bfd(leaves=False, state=DOWN, version=up.version)
    assert up.classifier.observe(replace(true, state=UP).build()).verdicts == {Verdict.BFD: 1}
    assert up.session.tobytes() != before
    assert up.classifier.observe(true.build()).verdicts == {Verdict.BFD: 1}
    assert up.dead == 1 << WATCHED
