"""One path per neighbour: several addresses of one MAC, as BGP unnumbered and dual-stack fabrics have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network

import pytest

from qpd.core.neighbours import ADDRESSES_MAX, eui64_mac
from qpd.core.planner import Adopted, Planner, PlannerConfig
from qpd.model import (
    Address,
    BfdSession,
    BfdSessionsRead,
    BfdState,
    DrainAsked,
    ErasePath,
    Facts,
    Link,
    LinkChanged,
    Neighbour,
    NeighbourChanged,
    NeighbourGone,
    NeighbourState,
    Network,
    NextHop,
    NextHopKey,
    Operation,
    Path,
    PathState,
    PeersNamed,
    Reason,
    Resynced,
    Route,
    RouteChanged,
    RouteGone,
    SetLiving,
    TapReported,
    Tick,
    WriteGroup,
    WriteNextHops,
    WriteOverrides,
    WritePath,
)
from tests.unit.core.fake_kernel import FakeKernel

STAND_IN = ip_address("169.254.0.1")
VTEP4, VTEP6 = ip_network("192.0.2.1/32"), ip_network("2001:db8::1/128")
SPINES = (0, 1)


def mac(index: int) -> str:
    return f"02:00:00:00:00:{index:02x}"


def local(index: int) -> Address:
    return ip_address(f"fe80::{index + 1}")


def numbered(index: int) -> Address:
    return ip_address(f"10.1.{index}.0")


def entry(index: int, address: Address, *, known: bool = True) -> Neighbour:
    state = NeighbourState.USABLE if known else NeighbourState.UNRESOLVED
    return Neighbour(10 + index, address, state, mac(index) if known else "")


def failed(index: int, address: Address) -> Neighbour:
    return Neighbour(10 + index, address, NeighbourState.FAILED)


def route(prefix: Network, addresses: Iterable[tuple[int, Address]]) -> Route:
    return Route(prefix, tuple(NextHop(10 + index, address) for index, address in addresses), 186, 20)


def bfd(index: int, peer: Address, state: BfdState) -> BfdSession:
    return BfdSession(f"eth{index}", peer, state)


class Leaf:
    """A leaf with a spine on each of eth0 and eth1."""

    def __init__(self, adopted: Adopted | None = None) -> None:
        self.planner = Planner(PlannerConfig(), adopted)
        self.kernel = FakeKernel()
        self.now = 100.0

    def handle(self, *events: object, after: float = 0.0) -> list[Operation]:
        self.now += after
        operations = self.planner.handle_all(events, self.now)  # type: ignore[arg-type]
        self.kernel.apply(operations)
        return operations

    def picture(self, routes: Iterable[Route], neighbours: Iterable[Neighbour] = ()) -> list[Operation]:
        links = tuple(Link(10 + index, f"eth{index}", True) for index in SPINES)
        return self.handle(Resynced(Facts(links, tuple(routes), tuple(neighbours))))

    def on(self, index: int) -> list[Path]:
        return [path for path in self.planner.paths if path.interface == f"eth{index}"]

    def only(self, index: int) -> Path:
        (path,) = self.on(index)
        return path

    @property
    def adopted(self) -> Adopted:
        """What a successor finds."""
        names = {10 + index: f"eth{index}" for index in SPINES}
        return Adopted(
            paths={number: path.key for number, path in self.kernel.paths.items()},
            groups=dict(self.kernel.groups),
            tables=dict(self.kernel.tables),
            destinations=dict(self.kernel.destinations),
            living=self.kernel.living,
            uplinks=dict(self.kernel.uplinks),
            next_hops={
                NextHopKey(names[ifindex], address): number
                for (ifindex, address), number in (self.kernel.next_hops or {}).items()
            },
        )


def unnumbered(*, known: bool = True) -> tuple[list[Route], list[Neighbour]]:
    """What FRR 8.4 makes of BGP unnumbered: zebra's stand-in, with a permanent entry, beside the peer itself."""
    routes = [
        route(VTEP4, [(index, STAND_IN) for index in SPINES]),
        route(VTEP6, [(index, local(index)) for index in SPINES]),
    ]
    entries = [entry(index, STAND_IN) for index in SPINES]
    return routes, entries + [entry(index, local(index), known=known) for index in SPINES]


def dual_stack() -> tuple[list[Route], list[Neighbour]]:
    """Numbered IPv4 sessions that carry IPv6 routes by link-local next hops."""
    routes = [
        route(VTEP4, [(index, numbered(index)) for index in SPINES]),
        route(VTEP6, [(index, local(index)) for index in SPINES]),
    ]
    return routes, [entry(index, address) for index in SPINES for address in (numbered(index), local(index))]


def names(of: Mapping[int, Address]) -> PeersNamed:
    return PeersNamed(
        {NextHopKey(f"eth{index}", address): f"spine{index + 1}" for index, address in of.items()}
    )


PEERS = names({index: local(index) for index in SPINES})
UP = BfdSessionsRead(tuple(bfd(index, local(index), BfdState.UP) for index in SPINES))


class TestOneWire:
    def test_unnumbered_is_one_path_a_wire_named_after_its_peer(self) -> None:
        leaf = Leaf()
        leaf.handle(PEERS, UP)
        leaf.picture(*unnumbered())
        assert [(path.name, path.next_hop, path.aliases, path.sole) for path in leaf.planner.paths] == [
            ("spine1", local(0), (STAND_IN,), True),
            ("spine2", local(1), (STAND_IN,), True),
        ]
        assert {frozenset(group.weights) for group in leaf.kernel.groups.values()} == {frozenset({0, 1})}
        assert len(leaf.kernel.groups) == 1, "both families share it"
        assert all(path.sole for path in leaf.kernel.paths.values())
        assert leaf.kernel.neighbours == {(10, mac(0)): 0, (11, mac(1)): 1}

    def test_names_that_come_later_find_the_path_by_its_mac(self) -> None:
        leaf = Leaf()
        routes, entries = unnumbered()
        leaf.picture(routes[:1], entries)
        assert [path.name for path in leaf.planner.paths] == ["eth0", "eth1"]
        leaf.handle(PEERS)
        assert [path.name for path in leaf.planner.paths] == ["spine1", "spine2"]
        leaf.handle(RouteChanged(routes[1]))
        assert [path.sole for path in leaf.planner.paths] == [True, True]

    def test_a_session_with_one_address_guards_both_families(self) -> None:
        leaf = Leaf()
        leaf.handle(names({index: numbered(index) for index in SPINES}))
        leaf.handle(BfdSessionsRead(tuple(bfd(index, numbered(index), BfdState.UP) for index in SPINES)))
        leaf.picture(*dual_stack())
        down = (bfd(0, numbered(0), BfdState.DOWN), bfd(1, numbered(1), BfdState.UP))
        operations = leaf.handle(BfdSessionsRead(down))
        assert operations[0] == SetLiving(0b10)
        (written,) = [op for op in operations if isinstance(op, WriteOverrides)]
        # The routes' own legs, each family's by its own next hop.
        assert written.routes == {VTEP4: (NextHop(11, numbered(1)),), VTEP6: (NextHop(11, local(1)),)}
        assert leaf.planner.session_of(leaf.only(0)) == down[0]

    def test_a_peer_that_is_known_by_nothing_but_its_own_address(self) -> None:
        leaf = Leaf()
        routes, entries = unnumbered()
        leaf.picture(routes[:1], entries[:2])
        assert [path.next_hop for path in leaf.planner.paths] == [STAND_IN, STAND_IN]
        assert [path.aliases for path in leaf.planner.paths] == [(), ()]

    def test_two_neighbours_on_one_interface_stay_two(self) -> None:
        leaf = Leaf()
        other = Neighbour(10, numbered(7), NeighbourState.USABLE, mac(7))
        leaf.picture([route(VTEP4, [(0, numbered(0)), (0, numbered(7))])], [entry(0, numbered(0)), other])
        assert [path.sole for path in leaf.on(0)] == [False, False]

    def test_two_legs_of_a_route_to_one_neighbour_are_one_member(self) -> None:
        leaf = Leaf()
        legs = [(0, numbered(0)), (0, numbered(7)), (1, numbered(1))]
        twin = Neighbour(10, numbered(7), NeighbourState.USABLE, mac(0))
        leaf.picture([route(VTEP4, legs)], [entry(0, numbered(0)), twin, entry(1, numbered(1))])
        assert [dict(group.weights) for group in leaf.planner.groups] == [{0: 2, 1: 1}]


class TestNextHop:
    """Packets of both families must be able to leave by it: IPv6 cannot be sent to an IPv4 next hop."""

    def test_an_ipv6_one_as_soon_as_there_are_ipv6_routes_and_for_good(self) -> None:
        leaf = Leaf()
        leaf.handle(names({index: numbered(index) for index in SPINES}))
        routes, entries = dual_stack()
        leaf.picture(routes[:1], entries)
        assert [path.next_hop for path in leaf.planner.paths] == [numbered(0), numbered(1)]
        operations = leaf.handle(RouteChanged(routes[1]))
        assert [path.next_hop for path in leaf.kernel.paths.values()] == [local(0), local(1)]
        kinds = [type(operation) for operation in operations]
        assert kinds.index(WritePath) < min(
            index for index, kind in enumerate(kinds) if kind.__name__.startswith("WriteDest")
        )
        assert WriteGroup not in kinds
        leaf.handle(RouteGone(VTEP6, 20))
        assert [path.next_hop for path in leaf.planner.paths] == [numbered(0), numbered(1)]

    def test_a_new_path_takes_none_that_does_not_answer(self) -> None:
        leaf = Leaf()
        leaf.handle(PEERS)
        routes, _ = unnumbered()
        leaf.picture(routes[:1], [entry(0, STAND_IN), failed(0, local(0)), entry(1, STAND_IN)])
        assert [(path.next_hop, path.state) for path in leaf.planner.paths] == [
            (STAND_IN, PathState.UP),
            (local(1), PathState.UP),
        ]

    def test_it_stays_while_there_is_no_route(self) -> None:
        leaf = Leaf()
        leaf.handle(names({index: numbered(index) for index in SPINES}))
        routes, entries = dual_stack()
        leaf.picture(routes, entries)
        leaf.handle(RouteGone(VTEP4, 20), RouteGone(VTEP6, 20))
        assert [path.next_hop for path in leaf.planner.paths] == [local(0), local(1)]

    def test_one_that_nobody_knows_any_more_gives_way(self) -> None:
        """The peer was replaced: another link-local address, another MAC, behind the same stand-in."""
        leaf = Leaf()
        leaf.handle(PEERS, UP)
        routes, entries = unnumbered()
        leaf.picture(routes[:1], entries)
        anew = ip_address("fe80::99")
        leaf.handle(
            NeighbourChanged(Neighbour(10, STAND_IN, NeighbourState.USABLE, mac(99))),
            NeighbourChanged(Neighbour(10, anew, NeighbourState.USABLE, mac(99))),
            NeighbourChanged(failed(0, local(0))),
        )
        assert leaf.only(0).reason is Reason.NEIGHBOUR_FAILED
        leaf.handle(names({0: anew, 1: local(1)}), BfdSessionsRead((bfd(0, anew, BfdState.UP),)))
        path = leaf.only(0)
        assert (path.id, path.next_hop, path.reason) == (0, anew, Reason.HOLD_UP)
        assert leaf.kernel.paths[0].next_hop == anew


class TestUnknownMacs:
    def test_frrs_stand_in_belongs_to_the_only_unnumbered_peer(self) -> None:
        leaf = Leaf()
        leaf.handle(PEERS)
        routes, _ = unnumbered()
        leaf.picture(routes)
        assert [(path.name, path.sole) for path in leaf.planner.paths] == [("spine1", True), ("spine2", True)]

    def test_also_if_the_peer_is_named_later(self) -> None:
        leaf = Leaf()
        routes, _ = unnumbered()
        leaf.picture(routes[:1])
        leaf.handle(UP)
        assert [path.aliases for path in leaf.planner.paths] == [(local(0),), (local(1),)]

    def test_but_not_where_two_peers_are_known(self) -> None:
        leaf = Leaf()
        leaf.handle(PeersNamed({NextHopKey("eth0", local(n)): f"spine{n}" for n in (0, 5)}))
        leaf.picture([route(VTEP4, [(0, STAND_IN)]), route(VTEP6, [(0, local(0))])])
        assert len(leaf.on(0)) == 2

    def test_and_not_where_both_macs_are_known_to_differ(self) -> None:
        leaf = Leaf()
        leaf.handle(PEERS)
        other = Neighbour(10, local(0), NeighbourState.USABLE, mac(9))
        leaf.picture(
            [route(VTEP4, [(0, STAND_IN)]), route(VTEP6, [(0, local(0))])], [entry(0, STAND_IN), other]
        )
        assert len(leaf.on(0)) == 2

    def test_a_link_local_address_made_of_the_mac_tells_it(self) -> None:
        made_of = ip_address("fe80::a8bb:ccff:fe00:110")
        assert eui64_mac(made_of) == "aa:bb:cc:00:01:10"
        leaf = Leaf()
        known = Neighbour(10, numbered(0), NeighbourState.USABLE, "aa:bb:cc:00:01:10")
        leaf.picture([route(VTEP4, [(0, numbered(0))]), route(VTEP6, [(0, made_of)])], [known])
        assert leaf.only(0).next_hop == made_of

    @pytest.mark.parametrize("text", ["fe80::1", "2001:db8::a8bb:ccff:fe00:110", "10.0.255.254"])
    def test_other_addresses_tell_none(self, text: str) -> None:
        assert eui64_mac(ip_address(text)) == ""

    def test_a_path_that_has_served_is_never_folded_but_shares_bfds_word(self) -> None:
        """QPs may have their home there; what is dead must be dead for both nevertheless."""
        leaf = Leaf()
        routes, entries = dual_stack()
        hidden = [entry(index, local(index), known=False) for index in SPINES]
        leaf.handle(BfdSessionsRead((bfd(0, numbered(0), BfdState.UP),)))
        leaf.picture(routes, [*(e for e in entries if e.address.version == 4), *hidden])
        first, second = leaf.on(0)
        operations = leaf.handle(*(NeighbourChanged(e) for e in entries))
        assert not [op for op in operations if isinstance(op, ErasePath | SetLiving)]
        assert [path.id for path in leaf.on(0)] == [first.id, second.id]
        leaf.handle(BfdSessionsRead((bfd(0, numbered(0), BfdState.DOWN),)))
        assert [path.reason for path in leaf.on(0)] == [Reason.BFD_DOWN, Reason.BFD_DOWN]
        leaf.handle(BfdSessionsRead((bfd(0, numbered(0), BfdState.UP),)))
        leaf.handle(Tick(), after=2.0)
        leaf.handle(TapReported(first.id, False, "local-down", 5))
        assert {path.state for path in leaf.on(0)} == {PathState.DOWN}

    def test_one_that_has_never_served_is(self) -> None:
        leaf = Leaf()
        routes, entries = dual_stack()
        leaf.picture(routes[:1], [e for e in entries if e.address.version == 4])
        leaf.handle(NeighbourChanged(failed(0, local(0))), NeighbourChanged(failed(1, local(1))))
        leaf.handle(RouteChanged(routes[1]))
        assert [path.state for path in leaf.on(0)] == [PathState.UP, PathState.DOWN]
        gone = leaf.on(0)[1]
        operations = leaf.handle(NeighbourChanged(entry(0, local(0))))
        assert ErasePath(gone.id) in operations
        path = leaf.only(0)
        assert (path.id, path.next_hop, path.sole) == (0, local(0), True)
        told = [tell for tell in leaf.kernel.tells if tell.kind == "path-gone"]
        assert [(tell.detail["id"], tell.detail["into"]) for tell in told] == [(gone.id, 0)]
        group = leaf.kernel.group_of(ip_address("2001:db8::1"))
        assert group is not None
        assert leaf.kernel.usable(ip_address("2001:db8::1")) == 0b01

    def test_a_drained_one_is_left_to_its_operator(self) -> None:
        leaf = Leaf()
        routes, entries = dual_stack()
        leaf.picture(routes[:1], [e for e in entries if e.address.version == 4])
        leaf.handle(NeighbourChanged(failed(0, local(0))), RouteChanged(routes[1]))
        leaf.handle(DrainAsked(leaf.on(0)[1].name, True))
        leaf.handle(NeighbourChanged(entry(0, local(0))))
        assert len(leaf.on(0)) == 2


class TestSticky:
    def test_entries_come_and_go_and_nothing_changes(self) -> None:
        leaf = Leaf()
        leaf.handle(PEERS, UP)
        routes, entries = unnumbered()
        leaf.picture(routes, entries)
        before = leaf.planner.paths
        for one in entries:
            leaf.handle(NeighbourGone(one.ifindex, one.address))
        leaf.handle(RouteGone(VTEP6, 20))
        leaf.handle(RouteChanged(routes[1]))
        assert leaf.planner.paths == before

    def test_addresses_that_nothing_refers_to_make_room(self) -> None:
        leaf = Leaf()
        leaf.picture([route(VTEP4, [(0, numbered(0))])], [entry(0, numbered(0))])
        for number in range(20):
            peer = ip_address(f"fe80::{number + 1:x}")
            leaf.handle(NeighbourChanged(entry(0, peer)), names({0: peer}))
            assert peer in leaf.only(0).aliases
        assert len(leaf.only(0).aliases) == ADDRESSES_MAX - 1
        wanted = {(10, address) for address in (leaf.only(0).next_hop, *leaf.only(0).aliases)}
        assert set(leaf.kernel.next_hops or {}) == wanted

    def test_a_successor_goes_on_with_the_same_paths(self) -> None:
        """Also where the table has forgotten the MACs: the pinned maps know all addresses."""
        leaf = Leaf()
        leaf.handle(PEERS, UP)
        leaf.picture(*unnumbered())
        left = leaf.adopted
        for entries in (unnumbered()[1], []):
            successor = Leaf(left)
            assert not successor.handle(PEERS, UP)
            operations = successor.planner.handle(
                Resynced(
                    Facts(
                        tuple(Link(10 + index, f"eth{index}", True) for index in SPINES),
                        tuple(reversed(unnumbered()[0])),
                        tuple(entries),
                    )
                ),
                5.0,
            )
            kinds = {type(operation).__name__ for operation in operations} - {"Tell"}
            assert kinds <= {"WritePath", "SetLiving", "WriteNeighbours", "WriteNextHops", "AttachUplink"}
            assert [(path.id, path.key, path.sole) for path in successor.planner.paths] == [
                (path.id, path.key, path.sole) for path in leaf.planner.paths
            ]

    def test_two_paths_of_an_earlier_daemon_stay_two(self) -> None:
        both = {0: NextHopKey("eth0", STAND_IN), 1: NextHopKey("eth0", local(0))}
        successor = Leaf(Adopted(paths=both, living=0b11))
        successor.kernel.living = 0b11
        routes, entries = unnumbered()
        successor.picture(routes, entries)
        assert [path.key for path in successor.on(0)] == list(both.values())


class TestSeveralSessions:
    @staticmethod
    def leaf() -> Leaf:
        leaf = Leaf()
        leaf.picture(*dual_stack())
        leaf.handle(TestSeveralSessions.read(BfdState.UP, BfdState.UP))
        return leaf

    @staticmethod
    def read(first: BfdState, second: BfdState) -> BfdSessionsRead:
        return BfdSessionsRead((bfd(0, numbered(0), first), bfd(0, local(0), second)))

    def test_the_worst_counts(self) -> None:
        leaf = self.leaf()
        leaf.handle(self.read(BfdState.UP, BfdState.DOWN))
        assert leaf.only(0).reason is Reason.BFD_DOWN
        session = leaf.planner.session_of(leaf.only(0))
        assert session is not None
        assert (session.peer, session.state) == (local(0), BfdState.DOWN)
        leaf.handle(self.read(BfdState.DOWN, BfdState.DOWN))
        leaf.handle(self.read(BfdState.DOWN, BfdState.UP))
        assert leaf.only(0).state is PathState.DOWN
        leaf.handle(self.read(BfdState.UP, BfdState.UP))
        assert leaf.only(0).state is PathState.HOLD

    def test_one_that_was_never_up_constrains_nothing(self) -> None:
        leaf = Leaf()
        leaf.picture(*dual_stack())
        leaf.handle(self.read(BfdState.UP, BfdState.DOWN))
        assert leaf.only(0).state is PathState.UP

    def test_the_taps_word_does_not_clear_another_sessions(self) -> None:
        leaf = self.leaf()
        leaf.handle(self.read(BfdState.UP, BfdState.DOWN))
        leaf.handle(TapReported(leaf.only(0).id, True, "up", 5))
        assert leaf.only(0).reason is Reason.BFD_DOWN

    def test_one_of_them_tells_the_tap(self) -> None:
        """The tap holds one word a path: two sessions would write it in turn."""
        leaf = self.leaf()
        told = {address for ifindex, address in leaf.kernel.next_hops or {} if ifindex == 10}
        assert told == {leaf.only(0).next_hop}
        operations = leaf.handle(BfdSessionsRead((bfd(0, numbered(0), BfdState.UP),)))
        (written,) = [op for op in operations if isinstance(op, WriteNextHops)]
        assert {address for ifindex, address in written.paths if ifindex == 10} == {numbered(0), local(0)}


class TestFailedNeighbour:
    def test_of_another_family_is_no_death_where_bfd_is_up(self) -> None:
        leaf = Leaf()
        leaf.picture(*dual_stack())
        assert leaf.only(0).next_hop == local(0)
        leaf.handle(BfdSessionsRead((bfd(0, local(0), BfdState.UP),)))
        leaf.handle(NeighbourChanged(failed(0, numbered(0))))
        assert leaf.only(0).state is PathState.UP

    def test_is_one_without_bfd(self) -> None:
        leaf = Leaf()
        leaf.picture(*dual_stack())
        leaf.handle(NeighbourChanged(failed(0, numbered(0))))
        assert leaf.only(0).reason is Reason.NEIGHBOUR_FAILED

    def test_is_one_at_the_address_that_packets_are_sent_to(self) -> None:
        leaf = Leaf()
        leaf.picture(*dual_stack())
        leaf.handle(BfdSessionsRead((bfd(0, numbered(0), BfdState.UP),)))
        leaf.handle(NeighbourChanged(failed(0, local(0))))
        assert leaf.only(0).reason is Reason.NEIGHBOUR_FAILED

    def test_is_none_at_an_address_that_nothing_is_sent_to(self) -> None:
        leaf = Leaf()
        routes, entries = dual_stack()
        leaf.picture(routes, entries)
        leaf.handle(RouteGone(VTEP4, 20))
        leaf.handle(NeighbourChanged(failed(0, numbered(0))))
        assert leaf.only(0).state is PathState.UP


def test_a_link_made_anew_keeps_its_addresses() -> None:
    leaf = Leaf()
    leaf.handle(PEERS)
    leaf.picture(*unnumbered())
    leaf.handle(LinkChanged(Link(99, "eth0", True)))
    assert leaf.only(0).aliases == (STAND_IN,)
    assert {address for ifindex, address in leaf.kernel.next_hops or {} if ifindex == 99} == {
        local(0),
        STAND_IN,
    }
