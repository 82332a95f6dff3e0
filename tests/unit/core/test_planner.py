"""The planner's answers to single events, in the words of an operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_network
from typing import TypeVar

import numpy as np
import pytest

from qpd.core.planner import Adopted, Planner, PlannerConfig, UnknownPath
from qpd.model import (
    NO_GROUP,
    BfdSession,
    BfdSessionsRead,
    BfdState,
    DetachUplink,
    DrainAsked,
    EraseGroup,
    EraseOverrides,
    ErasePath,
    Event,
    Facts,
    FrrBack,
    FrrLost,
    Link,
    LinkChanged,
    LinkGone,
    Neighbour,
    NeighbourChanged,
    NeighbourState,
    NextHop,
    NextHopKey,
    Operation,
    Path,
    PathState,
    PeersNamed,
    RaiseGeneration,
    Reason,
    Resynced,
    Route,
    RouteChanged,
    RouteGone,
    SetLiving,
    TapReported,
    Tell,
    Tick,
    WriteDestinations,
    WriteGroup,
    WriteNeighbours,
    WriteNextHops,
    WriteOverrides,
    WritePath,
    WriteTable,
)
from tests.unit.core.fake_kernel import FakeKernel

Kind = TypeVar("Kind")
BGP = 186


def link(index: int, *, up: bool = True, kind: str = "") -> Link:
    return Link(10 + index, f"eth{index}", up, kind)


def hop(index: int, *, alive: bool = True, weight: int = 1) -> NextHop:
    return NextHop(10 + index, ip_address(f"10.0.{index}.1"), weight, alive)


def key(index: int) -> NextHopKey:
    return NextHopKey(f"eth{index}", ip_address(f"10.0.{index}.1"))


def route(prefix: str, *hops: NextHop, protocol: int = BGP, metric: int = 20) -> Route:
    return Route(ip_network(prefix), hops, protocol, metric)


def neighbour(index: int, state: NeighbourState = NeighbourState.USABLE) -> Neighbour:
    return Neighbour(10 + index, ip_address(f"10.0.{index}.1"), state, f"02:00:00:00:00:{index:02x}")


def session(index: int, state: BfdState, **more: str) -> BfdSession:
    return BfdSession(f"eth{index}", ip_address(f"10.0.{index}.1"), state, **more)  # type: ignore[arg-type]


FOUR = tuple(range(4))
VTEPS = ("192.0.2.1/32", "192.0.2.2/32", "192.0.2.3/32")


class Leaf:
    """A leaf with uplinks eth0 to eth3 and a planner whose operations a fake kernel carries out."""

    def __init__(
        self, config: PlannerConfig | None = None, adopted: Adopted | None = None, **options: object
    ) -> None:
        self.planner = Planner(config or PlannerConfig(**options), adopted)  # type: ignore[arg-type]
        self.kernel = FakeKernel()
        self.now = 100.0

    def up(self, paths: Iterable[int] = FOUR, prefixes: Sequence[str] = VTEPS) -> list[Operation]:
        links = tuple(link(index) for index in paths)
        routes = tuple(route(prefix, *(hop(index) for index in paths)) for prefix in prefixes)
        return self.handle(Resynced(Facts(links, routes, tuple(neighbour(index) for index in paths))))

    def handle(self, event: object, *, after: float = 0.0) -> list[Operation]:
        self.now += after
        operations = self.planner.handle(event, self.now)  # type: ignore[arg-type]
        self.kernel.apply(operations)
        return operations

    def path(self, index: int) -> Path:
        return next(path for path in self.planner.paths if path.key == key(index))

    def tap(self, index: int, *, up: bool, cause: str = "bfd-down", kernel_ns: int = 7) -> list[Operation]:
        return self.handle(TapReported(self.path(index).id, up, cause, kernel_ns))

    def retry(self) -> bool:
        """Tick at once if the planner wants it: something became free."""
        due = self.planner.deadline == self.now
        if due:
            self.handle(Tick())
        return due

    def told(self, kind: str) -> list[Tell]:
        return [tell for tell in self.kernel.tells if tell.kind == kind]


def only(operations: Iterable[Operation], kind: type[Kind]) -> list[Kind]:
    return [operation for operation in operations if isinstance(operation, kind)]


def silent(operations: Iterable[Operation]) -> list[Operation]:
    return [operation for operation in operations if not isinstance(operation, Tell)]


@pytest.fixture
def leaf() -> Leaf:
    leaf = Leaf()
    leaf.up()
    return leaf


class TestStart:
    def test_nothing_is_written_before_the_first_whole_picture(self) -> None:
        leaf = Leaf()
        assert not leaf.handle(LinkChanged(link(0)))
        assert not leaf.handle(RouteChanged(route(VTEPS[0], hop(0))))
        assert not leaf.handle(BfdSessionsRead((session(0, BfdState.UP),)))
        assert not leaf.handle(PeersNamed({key(0): "spine1"}))
        assert leaf.planner.deadline is None

    def test_paths_then_table_then_group_then_destinations_then_life(self, leaf: Leaf) -> None:
        fresh = Leaf()
        kinds = list(dict.fromkeys(type(operation).__name__ for operation in fresh.up()))
        assert kinds[:6] == [
            "WritePath", "WriteTable", "WriteGroup", "WriteDestinations", "RaiseGeneration", "SetLiving",
        ]  # fmt: skip
        assert fresh.kernel.living == 0b1111
        assert len(fresh.kernel.groups) == 1
        assert sorted(fresh.kernel.uplinks.values()) == ["eth0", "eth1", "eth2", "eth3"]

    def test_all_paths_serve_at_once(self, leaf: Leaf) -> None:
        assert {path.state for path in leaf.planner.paths} == {PathState.UP}
        assert leaf.planner.deadline is None

    def test_the_same_picture_again_changes_nothing(self, leaf: Leaf) -> None:
        assert not leaf.up()

    def test_routes_of_others_and_over_bridges_make_no_path(self) -> None:
        leaf = Leaf()
        leaf.handle(LinkChanged(Link(20, "br100", True, "bridge")))
        leaf.handle(LinkChanged(Link(21, "eth9", True)))
        leaf.up(paths=(0, 1))
        leaf.handle(LinkChanged(Link(20, "br100", True, "bridge")))
        leaf.handle(LinkChanged(Link(21, "eth9", True)))
        leaf.handle(RouteChanged(route("198.51.100.0/24", NextHop(20, ip_address("198.51.100.1")))))
        leaf.handle(RouteChanged(route("203.0.113.0/24", NextHop(21, ip_address("203.0.113.1")), protocol=4)))
        assert [path.interface for path in leaf.planner.paths] == ["eth0", "eth1"]
        assert len(leaf.kernel.destinations) == len(VTEPS)

    def test_listed_uplinks_carry_any_route_but_the_kernels(self) -> None:
        leaf = Leaf(uplinks=("eth0", "eth1"))
        leaf.up()
        leaf.handle(RouteChanged(route("198.51.100.0/24", hop(1), protocol=4)))
        leaf.handle(RouteChanged(route("203.0.113.0/24", hop(1), protocol=2)))
        assert [path.interface for path in leaf.planner.paths] == ["eth0", "eth1"]
        assert ip_network("198.51.100.0/24") in leaf.kernel.destinations
        assert ip_network("203.0.113.0/24") not in leaf.kernel.destinations


class TestDeath:
    def test_carrier_loss_is_one_word_and_comes_first(self, leaf: Leaf) -> None:
        operations = leaf.handle(LinkChanged(link(2, up=False)))
        assert silent(operations) == [SetLiving(0b1011)]
        assert (leaf.path(2).state, leaf.path(2).reason) == (PathState.DOWN, Reason.LINK_DOWN)

    def test_the_tap_takes_the_word_and_the_other_traffic_along(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead(tuple(session(index, BfdState.UP) for index in FOUR)))
        operations = leaf.tap(1, up=False, cause="bfd-silent", kernel_ns=12345)
        first, second = silent(operations)
        assert first == SetLiving(0b1101)
        assert second == WriteOverrides({ip_network(prefix): (hop(0), hop(2), hop(3)) for prefix in VTEPS})
        (down,) = leaf.told("path-down")
        assert (down.detail["path"], down.detail["reason"], down.kernel_ns) == ("eth1", "bfd-silent", 12345)

    def test_bfdds_word_counts_as_well(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead(tuple(session(index, BfdState.UP) for index in FOUR)))
        states = (BfdState.UP, BfdState.DOWN, BfdState.UP, BfdState.UP)
        leaf.handle(BfdSessionsRead(tuple(session(index, state) for index, state in enumerate(states))))
        assert leaf.path(1).reason is Reason.BFD_DOWN

    @pytest.mark.parametrize("state", [BfdState.DOWN, BfdState.INIT, BfdState.ADMIN_DOWN])
    def test_a_session_never_seen_up_constrains_nothing(self, leaf: Leaf, state: BfdState) -> None:
        assert not leaf.handle(BfdSessionsRead((session(1, state),)))

    def test_admin_down_is_no_failure_not_even_afterwards(self, leaf: Leaf) -> None:
        for state in (BfdState.UP, BfdState.ADMIN_DOWN, BfdState.DOWN):
            assert not leaf.handle(BfdSessionsRead((session(1, state),)))
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.handle(BfdSessionsRead((session(1, BfdState.DOWN),)))
        assert leaf.path(1).state is PathState.DOWN

    def test_without_bfd_no_session_counts(self) -> None:
        leaf = Leaf(bfd=False)
        leaf.up()
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.handle(BfdSessionsRead((session(1, BfdState.DOWN),)))
        assert leaf.path(1).state is PathState.UP

    def test_a_failed_neighbour_and_no_other_state(self, leaf: Leaf) -> None:
        leaf.handle(NeighbourChanged(neighbour(1, NeighbourState.UNRESOLVED)))
        assert leaf.path(1).state is PathState.UP
        operations = leaf.handle(NeighbourChanged(neighbour(1, NeighbourState.FAILED)))
        assert leaf.path(1).reason is Reason.NEIGHBOUR_FAILED
        assert only(operations, WriteOverrides)

    def test_a_dead_next_hop_in_any_route(self, leaf: Leaf) -> None:
        operations = leaf.handle(RouteChanged(route(VTEPS[1], hop(0), hop(1, alive=False), hop(2), hop(3))))
        assert silent(operations) == [SetLiving(0b1101)]
        assert leaf.path(1).reason is Reason.NEXT_HOP_DEAD

    def test_the_worst_reason_is_shown(self, leaf: Leaf) -> None:
        leaf.tap(1, up=False)
        leaf.handle(LinkChanged(link(1, up=False)))
        assert leaf.path(1).reason is Reason.LINK_DOWN
        leaf.handle(LinkGone(11))
        assert leaf.path(1).reason is Reason.LINK_GONE


class TestReturn:
    def test_it_serves_after_hold_up_and_not_before(self, leaf: Leaf) -> None:
        leaf.handle(LinkChanged(link(2, up=False)))
        assert not silent(leaf.handle(LinkChanged(link(2)), after=5.0))
        assert (leaf.path(2).state, leaf.path(2).reason) == (PathState.HOLD, Reason.HOLD_UP)
        assert leaf.planner.deadline == leaf.now + 1.0
        assert not leaf.handle(Tick(), after=0.999)
        assert silent(leaf.handle(Tick(), after=0.001)) == [SetLiving(0b1111)]

    def test_override_goes_when_the_path_serves_again(self, leaf: Leaf) -> None:
        leaf.tap(1, up=False)
        leaf.tap(1, up=True)
        assert leaf.kernel.overrides
        operations = leaf.handle(Tick(), after=1.0)
        assert only(operations, EraseOverrides)
        assert leaf.kernel.living == 0b1111
        assert not leaf.kernel.overrides

    def test_the_taps_hold_is_not_added_to_ours(self, leaf: Leaf) -> None:
        """It reports the return when it has waited for hold_up itself: no second wait follows."""
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.tap(1, up=False, cause="silent")
        leaf.now += 4.0
        assert SetLiving(0b1111) in leaf.tap(1, up=True, cause="up")
        assert not leaf.kernel.overrides

    def test_the_hold_counts_from_bfdds_word_while_the_tap_holds(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.tap(1, up=False, cause="local-down")
        leaf.handle(BfdSessionsRead((session(1, BfdState.DOWN),)))
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)), after=3.0)
        assert leaf.path(1).state is PathState.HOLD
        assert leaf.planner.deadline == leaf.now + 1.0
        assert not silent(leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)), after=0.5))
        assert SetLiving(0b1111) in leaf.handle(Tick(), after=0.5)

    @pytest.mark.parametrize("read_after", [0.02, 0.9, 2.0])
    def test_it_returns_hold_up_after_bfd_whoever_knows_first(self, leaf: Leaf, read_after: float) -> None:
        """The session comes Up; bfdd is read so long after that, and the tap reports 1.01 s after it."""
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.tap(1, up=False, cause="remote-down")
        leaf.handle(BfdSessionsRead((session(1, BfdState.DOWN),)), after=0.02)
        up_at = leaf.now = leaf.now + 5.0
        first = (up_at + read_after, BfdSessionsRead((session(1, BfdState.UP),)))
        second = (up_at + 1.01, TapReported(leaf.path(1).id, True, "up", 7))
        for at, event in sorted((first, second), key=lambda step: step[0]):
            while leaf.planner.deadline is not None and leaf.planner.deadline <= at:
                leaf.now = leaf.planner.deadline
                leaf.handle(Tick())
            leaf.now = at
            leaf.handle(event)
        while leaf.planner.deadline is not None:
            leaf.now = leaf.planner.deadline
            leaf.handle(Tick())
        assert leaf.path(1).state is PathState.UP
        assert leaf.path(1).since <= up_at + 1.03

    def test_a_read_that_crossed_the_taps_report_is_no_return(self, leaf: Leaf) -> None:
        up = BfdSessionsRead((session(1, BfdState.UP),))
        leaf.handle(up)
        leaf.tap(1, up=False)
        assert not leaf.handle(up, after=0.01)
        assert leaf.path(1).state is PathState.DOWN
        # Twice is no accident.
        leaf.handle(up, after=0.01)
        assert leaf.path(1).state is PathState.HOLD

    def test_damping_outlasts_the_taps_hold(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        for _ in range(3):
            leaf.tap(1, up=False)
            leaf.now += 4.0
            leaf.tap(1, up=True, cause="up")
        # The third fall in a minute: 4 s, of which the tap has waited one.
        assert leaf.path(1).state is PathState.HOLD
        assert leaf.planner.deadline == leaf.now + 3.0

    def test_a_link_that_came_back_later_holds_from_then(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.tap(1, up=False)
        leaf.handle(LinkChanged(link(1, up=False)))
        leaf.handle(LinkChanged(link(1)), after=5.0)
        leaf.now += 0.4
        leaf.tap(1, up=True, cause="up")
        assert leaf.path(1).state is PathState.HOLD
        assert leaf.planner.deadline == pytest.approx(leaf.now + 0.6)
        leaf.handle(Tick(), after=1.0)
        leaf.handle(LinkChanged(link(1, up=False)), after=70.0)
        leaf.handle(LinkChanged(link(1)), after=5.0)
        # What the tap says again now has nothing to do with the link's own return.
        leaf.tap(1, up=True, cause="up")
        assert leaf.planner.deadline == pytest.approx(leaf.now + 1.0)

    def test_a_session_taken_down_by_its_administrator_proves_no_service(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.tap(1, up=False)
        leaf.now += 4.0
        leaf.tap(1, up=True, cause="lifted")
        assert leaf.planner.deadline == leaf.now + 1.0

    def test_a_link_made_anew_is_the_same_path(self, leaf: Leaf) -> None:
        before = leaf.path(3)
        leaf.handle(LinkGone(13))
        for prefix in VTEPS:
            leaf.handle(RouteChanged(route(prefix, hop(0), hop(1), hop(2))))
        leaf.handle(LinkChanged(Link(99, "eth3", True)))
        anew = NextHop(99, ip_address("10.0.3.1"))
        for prefix in VTEPS:
            leaf.handle(RouteChanged(route(prefix, hop(0), hop(1), hop(2), anew)))
        leaf.handle(Tick(), after=60.0)
        after = leaf.path(3)
        assert (after.id, after.ifindex, after.state) == (before.id, 99, PathState.UP)
        assert leaf.kernel.paths[after.id].ifindex == 99
        assert 13 not in leaf.kernel.uplinks
        assert leaf.kernel.uplinks[99] == "eth3"


class TestOverride:
    def test_it_goes_with_each_route_that_zebra_mends(self, leaf: Leaf) -> None:
        leaf.tap(1, up=False)
        operations = leaf.handle(RouteChanged(route(VTEPS[0], hop(0), hop(2), hop(3))))
        assert only(operations, EraseOverrides) == [EraseOverrides((ip_network(VTEPS[0]),))]
        assert set(leaf.kernel.overrides) == {ip_network(prefix) for prefix in VTEPS[1:]}

    def test_without_survivors_there_is_none(self, leaf: Leaf) -> None:
        for index in FOUR:
            leaf.tap(index, up=False)
        assert not leaf.kernel.overrides
        assert leaf.kernel.living == 0

    def test_survivors_of_two_deaths(self, leaf: Leaf) -> None:
        leaf.tap(1, up=False)
        leaf.tap(2, up=False)
        assert leaf.kernel.overrides[ip_network(VTEPS[0])] == (hop(0), hop(3))

    def test_a_drained_path_still_carries_other_traffic(self, leaf: Leaf) -> None:
        leaf.handle(DrainAsked("eth3", True))
        leaf.tap(1, up=False)
        assert leaf.kernel.overrides[ip_network(VTEPS[0])] == (hop(0), hop(2), hop(3))

    def test_longer_prefixes_inside_are_left_to_main(self, leaf: Leaf) -> None:
        leaf.handle(RouteChanged(route("0.0.0.0/0", hop(0), hop(1))))
        leaf.handle(RouteChanged(route("198.51.100.0/24", NextHop(77, ip_address("0.0.0.0")), protocol=2)))
        leaf.handle(RouteChanged(route("198.51.100.7/32", NextHop(77, ip_address("0.0.0.0")), protocol=2)))
        operations = leaf.tap(1, up=False)
        throws, routes = only(operations, WriteOverrides)
        assert throws.routes == {ip_network("198.51.100.0/24"): ()}
        assert ip_network("0.0.0.0/0") in routes.routes
        assert leaf.kernel.override_of(ip_address("198.51.100.7")) is None
        leaf.handle(RouteChanged(route("203.0.113.0/24", NextHop(77, ip_address("0.0.0.0")), protocol=2)))
        assert leaf.kernel.overrides[ip_network("203.0.113.0/24")] == ()
        leaf.handle(RouteGone(ip_network("0.0.0.0/0"), 20))
        assert all(leaf.kernel.overrides.values())


class TestGroups:
    def test_many_destinations_share_one_group_and_one_write_changes_them(self, leaf: Leaf) -> None:
        events = [RouteChanged(route(prefix, hop(0), hop(1), hop(3))) for prefix in VTEPS]
        operations = leaf.planner.handle_all(events, leaf.now)
        leaf.kernel.apply(operations)
        (written,) = only(operations, WriteGroup)
        assert dict(written.group.weights) == {0: 1, 1: 1, 3: 1}
        kinds = [type(operation) for operation in silent(operations)]
        assert kinds == [SetLiving, WriteGroup, RaiseGeneration]  # eth2 has no route any more

    def test_one_destination_leaves_the_group(self, leaf: Leaf) -> None:
        operations = leaf.handle(RouteChanged(route(VTEPS[0], hop(0), hop(1))))
        kinds = [type(operation) for operation in silent(operations)]
        assert kinds == [WriteGroup, WriteDestinations, RaiseGeneration]
        assert len(leaf.kernel.groups) == 2
        assert len({group.table for group in leaf.kernel.groups.values()}) == 1

    def test_the_last_destination_takes_the_group_with_it(self, leaf: Leaf) -> None:
        operations: list[Operation] = []
        for prefix in VTEPS:
            operations = leaf.handle(RouteGone(ip_network(prefix), 20))
        assert only(operations, EraseGroup)
        assert not leaf.kernel.groups
        assert {path.reason for path in leaf.planner.paths} == {Reason.NO_ROUTE}

    def test_the_lowest_metric_counts(self, leaf: Leaf) -> None:
        prefix = VTEPS[0]
        leaf.handle(RouteChanged(route(prefix, hop(0), metric=5)))
        group = leaf.kernel.group_of(ip_address("192.0.2.1"))
        assert group is not None
        assert set(group.weights) == {0}
        leaf.handle(RouteGone(ip_network(prefix), 5))
        group = leaf.kernel.group_of(ip_address("192.0.2.1"))
        assert group is not None
        assert set(group.weights) == {0, 1, 2, 3}

    def test_weights_of_routes_make_a_table_of_their_own(self, leaf: Leaf) -> None:
        operations = leaf.handle(RouteChanged(route(VTEPS[0], hop(0, weight=4), hop(1, weight=2))))
        assert len(only(operations, WriteTable)) == 1
        group = leaf.kernel.group_of(ip_address("192.0.2.1"))
        assert group is not None
        assert dict(group.weights) == {0: 2, 1: 1}
        first = leaf.kernel.tables[group.table][:, 0]
        assert abs(int((first == 0).sum()) - 2 * int((first == 1).sum())) <= 2

    def test_configured_weights_win(self) -> None:
        leaf = Leaf(weights={"eth0": 300, "spine2": 100})
        leaf.handle(PeersNamed({key(1): "spine2"}))
        leaf.up(paths=(0, 1))
        assert [dict(group.weights) for group in leaf.planner.groups] == [{0: 300, 1: 100}]

    def test_what_is_no_group_inside_a_group_is_told_apart(self, leaf: Leaf) -> None:
        """A static route out of an uplink must not be steered by the default route's group."""
        leaf.handle(RouteChanged(route("198.51.100.0/24", hop(2), protocol=4)))
        assert ip_network("198.51.100.0/24") not in leaf.kernel.destinations
        leaf.handle(RouteChanged(route("0.0.0.0/0", hop(0), hop(1))))
        assert leaf.kernel.destinations[ip_network("198.51.100.0/24")] == NO_GROUP
        assert leaf.kernel.group_of(ip_address("198.51.100.9")) is None
        leaf.handle(RouteGone(ip_network("0.0.0.0/0"), 20))
        assert ip_network("198.51.100.0/24") not in leaf.kernel.destinations

    def test_explain_names_prefix_group_and_order(self, leaf: Leaf) -> None:
        leaf.handle(RouteChanged(route("192.0.2.0/24", hop(0), hop(1))))
        near, far = leaf.planner.explain_destination(ip_address("192.0.2.1")), ip_address("192.0.2.99")
        assert near is not None
        assert near.prefix == ip_network("192.0.2.1/32")
        wide = leaf.planner.explain_destination(far)
        assert wide is not None
        assert wide.prefix == ip_network("192.0.2.0/24")
        assert set(wide.order(7)) == {0, 1}
        assert leaf.planner.explain_destination(ip_address("203.0.113.1")) is None


class TestPaths:
    def test_names_and_planes_come_from_the_peers(self, leaf: Leaf) -> None:
        leaf.handle(PeersNamed({key(index): f"spine{index + 1}" for index in FOUR}))
        assert [path.name for path in leaf.planner.paths] == ["spine1", "spine2", "spine3", "spine4"]
        assert [path.plane for path in leaf.planner.paths] == ["spine1", "spine2", "spine3", "spine4"]

    def test_a_name_that_several_would_have_grows_for_all(self, leaf: Leaf) -> None:
        leaf.handle(PeersNamed({key(0): "spine1", key(1): "spine1", key(2): "spine3"}))
        assert [path.name for path in leaf.planner.paths] == ["spine1:eth0", "spine1:eth1", "spine3", "eth3"]

    def test_a_peer_that_is_away_keeps_its_name(self, leaf: Leaf) -> None:
        leaf.handle(PeersNamed({key(index): f"spine{index + 1}" for index in FOUR}))
        assert not leaf.handle(PeersNamed({key(0): "spine1"}))

    def test_two_next_hops_on_one_interface_are_not_alone(self, leaf: Leaf) -> None:
        second = NextHop(10, ip_address("10.0.0.9"))
        operations = leaf.handle(RouteChanged(route(VTEPS[0], hop(0), second)))
        assert [(write.path.id, write.path.sole) for write in only(operations, WritePath)] == [
            (0, False),
            (4, False),
        ]
        assert [path.name for path in leaf.planner.paths if path.interface == "eth0"] == [
            "eth0:10.0.0.1",
            "eth0:10.0.0.9",
        ]

    def test_planes_by_configuration_agree_with_another_leaf(self) -> None:
        near, far = Leaf(planes={"eth0": "red", "eth1": "blue"}), Leaf(planes={"eth1": "red", "eth0": "blue"})
        near.up(paths=(0, 1))
        far.up(paths=(0, 1))
        red = np.concatenate(
            [leaf.kernel.tables[0][:, :1] == number for leaf, number in ((near, 0), (far, 1))], axis=1
        )
        assert (red[:, 0] == red[:, 1]).all()

    def test_a_path_lingers_and_is_then_gone(self, leaf: Leaf) -> None:
        for prefix in VTEPS:
            leaf.handle(RouteChanged(route(prefix, hop(0), hop(1), hop(2))))
        assert leaf.path(3).reason is Reason.NO_ROUTE
        assert leaf.planner.deadline == leaf.now + 600.0
        operations = leaf.handle(Tick(), after=600.0)
        assert only(operations, ErasePath) == [ErasePath(3)]
        assert only(operations, DetachUplink) == [DetachUplink(13, "eth3")]
        assert len(leaf.planner.paths) == 3

    def test_a_path_back_in_time_changes_no_table(self, leaf: Leaf) -> None:
        for prefix in VTEPS:
            leaf.handle(RouteChanged(route(prefix, hop(0), hop(1), hop(2))))
        for prefix in VTEPS:
            operations = leaf.handle(RouteChanged(route(prefix, *(hop(index) for index in FOUR))), after=50.0)
            assert not only(operations, WriteTable)
        assert leaf.path(3).state is PathState.UP

    def test_a_route_may_be_known_before_its_link(self, leaf: Leaf) -> None:
        late = NextHop(30, ip_address("10.0.9.1"))
        leaf.handle(RouteChanged(route("198.51.100.1/32", hop(0), late)))
        assert len(leaf.planner.paths) == 4
        leaf.handle(LinkChanged(Link(30, "eth9", True)))
        group = leaf.kernel.group_of(ip_address("198.51.100.1"))
        assert group is not None
        assert [leaf.kernel.key(number).interface for number in group.weights] == ["eth0", "eth9"]

    def test_a_renamed_link_carries_another_path(self, leaf: Leaf) -> None:
        leaf.handle(LinkChanged(Link(13, "uplink3", True)))
        assert leaf.path(3).reason is Reason.LINK_GONE
        group = leaf.kernel.group_of(ip_address("192.0.2.1"))
        assert group is not None
        assert {leaf.kernel.key(number).interface for number in group.weights} == {
            "eth0",
            "eth1",
            "eth2",
            "uplink3",
        }

    def test_frames_are_known_by_interface_and_mac(self, leaf: Leaf) -> None:
        assert leaf.kernel.neighbours == {
            (10 + index, f"02:00:00:00:00:{index:02x}"): index for index in FOUR
        }
        moved = Neighbour(11, ip_address("10.0.1.1"), NeighbourState.USABLE, "02:00:00:00:00:99")
        (written,) = only(leaf.handle(NeighbourChanged(moved)), WriteNeighbours)
        assert written.paths[11, "02:00:00:00:00:99"] == 1

    def test_the_tap_knows_whose_life_a_session_tells(self, leaf: Leaf) -> None:
        assert leaf.kernel.next_hops == {
            (10 + index, ip_address(f"10.0.{index}.1")): leaf.path(index).id for index in FOUR
        }
        numbers = leaf.path(3).id
        (written,) = only(leaf.handle(LinkChanged(Link(13, "uplink3", True))), WriteNextHops)
        assert written.paths[13, ip_address("10.0.3.1")] != numbers, "the path on the link that is there now"
        leaf.handle(LinkGone(12))
        leaf.handle(RouteGone(ip_network(VTEPS[0]), 20))
        assert not only(leaf.tap(1, up=False), WriteNextHops)

    def test_the_tap_knows_no_path_where_bfd_shall_not_count(self) -> None:
        leaf = Leaf(bfd=False)
        (written,) = only(leaf.up(), WriteNextHops)
        assert written.paths == {}


class TestDrain:
    def test_drained_paths_do_not_serve_and_come_back_at_once(self, leaf: Leaf) -> None:
        assert silent(leaf.handle(DrainAsked("eth1", True))) == [SetLiving(0b1101)]
        assert leaf.path(1).state is PathState.DRAINED
        assert not leaf.handle(DrainAsked("eth1", True))
        assert silent(leaf.handle(DrainAsked("eth1", False))) == [SetLiving(0b1111)]
        assert [tell.kind for tell in leaf.kernel.tells[-2:]] == ["path-drained", "path-undrained"]

    def test_an_unknown_name_is_one_clear_line_and_changes_nothing(self, leaf: Leaf) -> None:
        before = leaf.planner.paths
        with pytest.raises(UnknownPath, match="no path is named spine9; paths are eth0, eth1, eth2, eth3"):
            leaf.handle(DrainAsked("spine9", True))
        assert leaf.planner.paths == before

    def test_a_drained_path_is_kept_for_good(self, leaf: Leaf) -> None:
        leaf.handle(DrainAsked("eth3", True))
        for prefix in VTEPS:
            leaf.handle(RouteChanged(route(prefix, hop(0), hop(1), hop(2))))
        leaf.handle(Tick(), after=10000.0)
        assert leaf.path(3).state is PathState.DRAINED


class TestFrr:
    def test_bfdds_death_changes_no_path(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead(tuple(session(index, BfdState.UP) for index in FOUR)))
        leaf.tap(1, up=False)
        states = [path.state for path in leaf.planner.paths]
        assert not silent(leaf.handle(FrrLost("bfdd")))
        assert not silent(leaf.tap(2, up=False))
        assert [path.state for path in leaf.planner.paths] == states
        # Its next life begins with sessions that are not Up yet.
        leaf.handle(BfdSessionsRead(tuple(session(index, BfdState.DOWN) for index in FOUR)))
        assert [path.state for path in leaf.planner.paths] == states
        assert [tell.detail["daemon"] for tell in (*leaf.told("frr-lost"), *leaf.told("frr-back"))] == [
            "bfdd",
            "bfdd",
        ]

    def test_a_lasting_difference_of_tap_and_bfdd_is_told_once(self, leaf: Leaf) -> None:
        up = BfdSessionsRead(tuple(session(index, BfdState.UP) for index in FOUR))
        leaf.handle(up)
        leaf.tap(1, up=False)
        # For hold_up the tap rightly holds what bfdd calls Up again.
        for after in (0.0, 1.0, 1.0, 0.9):
            leaf.handle(up, after=after)
        assert not leaf.told("mismatch")
        for _ in range(3):
            leaf.handle(up, after=1.0)
        (mismatch,) = leaf.told("mismatch")
        detail = mismatch.detail
        assert (detail["path"], detail["tap"], detail["bfdd"]) == ("eth1", "down", "up")

    def test_a_tap_that_is_up_while_bfdd_is_down_is_told_once(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead((session(1, BfdState.UP),)))
        leaf.tap(1, up=True, cause="up")
        for _ in range(4):
            leaf.handle(BfdSessionsRead((session(1, BfdState.DOWN),)), after=1.0)
        (mismatch,) = leaf.told("mismatch")
        assert (mismatch.detail["tap"], mismatch.detail["bfdd"]) == ("up", "down")
        assert leaf.path(1).state is PathState.DOWN

    @pytest.mark.parametrize("daemon", ["bfdd", "bgpd", "zebra", "staticd"])
    def test_a_daemon_that_answers_again_is_told_once(self, leaf: Leaf, daemon: str) -> None:
        """It answers, and then says what it knows: whichever comes first tells."""
        words: dict[str, Event] = {
            "bfdd": BfdSessionsRead(()),
            "bgpd": PeersNamed({}),
            "zebra": RouteChanged(route("198.51.100.1/32", hop(0))),
            "staticd": Tick(),
        }
        states = [path.state for path in leaf.planner.paths]
        leaf.handle(FrrBack(daemon))
        assert not leaf.told("frr-back"), "it was never lost"
        for first, second in ((FrrBack(daemon), words[daemon]), (words[daemon], FrrBack(daemon))):
            leaf.kernel.tells.clear()
            for event in (FrrLost(daemon), FrrLost(daemon), first, second, first):
                leaf.handle(event)
            assert [tell.kind for tell in leaf.kernel.tells if tell.kind.startswith("frr-")] == [
                "frr-lost",
                "frr-back",
            ]
            assert [path.state for path in leaf.planner.paths] == states

    def test_a_bfdd_that_answers_is_no_bfdd_that_knows(self, leaf: Leaf) -> None:
        """What the tap calls dead is bfdd's silence until its sessions have been read."""
        leaf.handle(BfdSessionsRead(tuple(session(index, BfdState.UP) for index in FOUR)))
        leaf.handle(FrrLost("bfdd"))
        leaf.handle(FrrBack("bfdd"))
        assert not silent(leaf.tap(2, up=False))
        leaf.handle(BfdSessionsRead(tuple(session(index, BfdState.UP) for index in FOUR)))
        assert silent(leaf.tap(2, up=False))


class TestLimits:
    def test_more_than_64_paths(self) -> None:
        leaf = Leaf()
        facts = Facts(
            tuple(Link(100 + n, f"swp{n}", True) for n in range(70)),
            tuple(route(f"192.0.2.{n}/32", NextHop(100 + n, ip_address("fe80::1"))) for n in range(70)),
            (),
        )
        leaf.handle(Resynced(facts))
        assert len(leaf.planner.paths) == 64
        assert len(leaf.kernel.destinations) == 64
        assert [tell.detail["limit"] for tell in leaf.told("limit-reached")] == ["paths"]
        leaf.handle(RouteGone(ip_network("192.0.2.3/32"), 20))
        leaf.handle(Tick(), after=600.0)
        assert leaf.retry()
        assert len(leaf.kernel.destinations) == 64
        assert not leaf.retry()
        assert len(leaf.told("limit-reached")) == 1

    def test_a_route_with_one_path_too_many_is_the_kernels(self) -> None:
        leaf = Leaf()
        links = tuple(Link(100 + n, f"swp{n}", True) for n in range(66))
        hops = [NextHop(100 + n, ip_address("fe80::1")) for n in range(66)]
        routes = (
            route("192.0.2.1/32", *hops[:64]),
            route("192.0.2.2/32", *hops[60:]),
            route("192.0.2.0/24", hops[0]),
        )
        leaf.handle(Resynced(Facts(links, routes, ())))
        assert leaf.kernel.group_of(ip_address("192.0.2.2")) is None
        group = leaf.kernel.group_of(ip_address("192.0.2.1"))
        assert group is not None
        assert len(group.weights) == 64

    def test_more_than_255_groups(self) -> None:
        leaf = Leaf()
        links = tuple(link(index) for index in range(10))
        combinations = [[hop(i) for i in range(10) if number >> i & 1] for number in range(1, 301)]
        routes = tuple(
            route(f"192.0.{2 + n // 250}.{n % 250}/32", *hops) for n, hops in enumerate(combinations)
        )
        leaf.handle(Resynced(Facts(links, routes, ())))
        assert len(leaf.kernel.groups) == 255
        assert [tell.detail["limit"] for tell in leaf.told("limit-reached")] == ["groups"]
        for gone in routes[:60]:
            leaf.handle(RouteGone(gone.prefix, 20))
            while leaf.retry():
                pass
        steered = [number for number in leaf.kernel.destinations.values() if number != NO_GROUP]
        assert len(steered) == 240

    def test_more_than_15_tables(self) -> None:
        leaf = Leaf()
        links = (link(0), link(1))
        routes = tuple(route(f"192.0.2.{n}/32", hop(0, weight=1), hop(1, weight=n)) for n in range(1, 19))
        leaf.handle(Resynced(Facts(links, routes, ())))
        assert len({group.table for group in leaf.kernel.groups.values()}) == 15
        assert [tell.detail["limit"] for tell in leaf.told("limit-reached")] == ["tables"]
        # All fifteen are written anew, one after the other, when a path joins.
        leaf.handle(LinkChanged(link(2)))
        leaf.handle(RouteChanged(route("198.51.100.1/32", hop(2), hop(0))))
        assert len({group.table for group in leaf.kernel.groups.values()}) == 15

    def test_more_than_4096_destinations_leave_out_the_shortest(self) -> None:
        leaf = Leaf()
        prefixes = ["10.0.0.0/8", *(f"10.{n // 256}.{n % 256}.1/32" for n in range(4096))]
        leaf.up(prefixes=prefixes)
        assert len(leaf.kernel.destinations) == 4096
        assert ip_network("10.0.0.0/8") not in leaf.kernel.destinations
        assert [tell.detail["limit"] for tell in leaf.told("limit-reached")] == ["destinations"]
        leaf.handle(RouteGone(ip_network("10.1.0.1/32"), 20))
        assert leaf.retry()
        assert ip_network("10.0.0.0/8") in leaf.kernel.destinations


class TestAdoption:
    @staticmethod
    def left_by(leaf: Leaf) -> Adopted:
        return Adopted(
            paths={number: path.key for number, path in leaf.kernel.paths.items()},
            groups=dict(leaf.kernel.groups),
            tables=dict(leaf.kernel.tables),
            destinations=dict(leaf.kernel.destinations),
            living=leaf.kernel.living,
            uplinks=dict(leaf.kernel.uplinks),
            overrides=dict(leaf.kernel.overrides),
        )

    def test_a_restart_writes_no_group_no_table_no_destination(self, leaf: Leaf) -> None:
        successor = Leaf(adopted=self.left_by(leaf))
        kinds = {
            type(operation).__name__ for operation in silent(successor.planner.handle(self.picture(), 5.0))
        }
        assert kinds == {"WritePath", "SetLiving", "WriteNeighbours", "WriteNextHops", "AttachUplink"}
        assert [path.id for path in successor.planner.paths] == [path.id for path in leaf.planner.paths]

    def test_ids_do_not_hang_on_the_order_of_routes(self, leaf: Leaf) -> None:
        successor = Planner(PlannerConfig(), self.left_by(leaf))
        successor.handle(self.picture(reverse=True), 5.0)
        assert {path.key: path.id for path in successor.paths} == {
            path.key: path.id for path in leaf.planner.paths
        }

    def test_tables_that_were_not_read_are_written_beside_those_in_use(self, leaf: Leaf) -> None:
        left = self.left_by(leaf)
        successor = Planner(
            PlannerConfig(), Adopted(left.paths, left.groups, {}, left.destinations, left.living)
        )
        operations = successor.handle(self.picture(), 5.0)
        leaf.kernel.uplinks.clear()
        leaf.kernel.neighbours = None
        leaf.kernel.next_hops = None
        for operation in operations:
            if not isinstance(operation, WritePath | SetLiving):
                leaf.kernel.step(operation)
        assert [write.table for write in only(operations, WriteTable)] == [1]

    def test_what_is_gone_is_cleared_away(self, leaf: Leaf) -> None:
        leaf.handle(RouteChanged(route("198.51.100.1/32", hop(0))))
        leaf.tap(3, up=False)
        left = self.left_by(leaf)
        assert left.overrides
        assert left.living == 0b0111
        successor = Planner(PlannerConfig(), left)
        operations = successor.handle(self.picture(paths=(0, 1, 2)), 5.0)
        assert set(leaf.kernel.overrides) == set(only(operations, EraseOverrides)[0].prefixes)
        assert ip_network("198.51.100.1/32") not in successor._book.destinations
        assert only(operations, EraseGroup)
        assert only(operations, SetLiving) == [SetLiving(0b0111)]

    def test_a_path_that_was_down_by_bfd_stays_down(self, leaf: Leaf) -> None:
        leaf.handle(BfdSessionsRead(tuple(session(index, BfdState.UP) for index in FOUR)))
        leaf.tap(1, up=False)
        successor = Planner(PlannerConfig(), self.left_by(leaf))
        successor.handle(BfdSessionsRead((session(1, BfdState.DOWN), session(0, BfdState.DOWN))), 5.0)
        operations = successor.handle(self.picture(), 5.0)
        assert only(operations, SetLiving) == [SetLiving(0b1101)]

    def test_uplinks_that_are_none_any_more_are_let_go(self, leaf: Leaf) -> None:
        left = self.left_by(leaf)
        successor = Planner(PlannerConfig(uplinks=("eth0", "eth1")), left)
        operations = successor.handle(self.picture(), 5.0)
        assert [detach.interface for detach in only(operations, DetachUplink)] == ["eth2", "eth3"]

    @staticmethod
    def picture(paths: Sequence[int] = FOUR, *, reverse: bool = False) -> Resynced:
        order = list(reversed(paths)) if reverse else list(paths)
        routes = tuple(route(prefix, *(hop(index) for index in order)) for prefix in VTEPS)
        return Resynced(
            Facts(tuple(link(index) for index in order), routes, tuple(neighbour(index) for index in order))
        )
