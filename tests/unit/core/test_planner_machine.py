"""Any order and timing of events: every step in between is right, and the end is that of a fresh look at the facts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from qpd.core.paths import PathRecord
from qpd.core.planner import Adopted, Planner, PlannerConfig
from qpd.model import (
    NO_GROUP,
    Address,
    BfdSession,
    BfdSessionsRead,
    BfdState,
    DrainAsked,
    Event,
    Facts,
    FrrBack,
    FrrLost,
    Link,
    LinkChanged,
    LinkGone,
    Neighbour,
    NeighbourChanged,
    NeighbourGone,
    NeighbourState,
    Network,
    NextHop,
    NextHopKey,
    Path,
    PathState,
    PeersNamed,
    Reason,
    Resynced,
    Route,
    RouteChanged,
    RouteGone,
    TapReported,
    Tell,
    Tick,
)
from tests.unit.core.fake_kernel import FakeKernel, longest_match

INTERFACES = ["eth0", "eth1", "eth2", "eth3", "br0"]
NEIGHBOURS: list[list[Address]] = [
    [ip_address("10.0.0.1"), ip_address("169.254.0.1"), ip_address("fe80::1")],
    [ip_address("10.0.0.2"), ip_address("2001:db8:f::2")],
]
"""On each interface two neighbours may be found, each with its MAC and these addresses."""
PEERS = [address for addresses in NEIGHBOURS for address in addresses]
PREFIXES: list[Network] = [
    ip_network(text)
    for text in (
        "0.0.0.0/0",
        "10.1.0.0/16",
        "10.1.1.0/24",
        "10.1.1.1/32",
        "10.1.1.2/32",
        "10.2.0.0/24",
        "2001:db8::/32",
        "2001:db8::1/128",
    )
]
PROBES = [
    ip_address(text)
    for text in (
        "10.1.1.1",
        "10.1.1.2",
        "10.1.1.3",
        "10.1.2.1",
        "10.2.0.1",
        "10.9.9.9",
        "2001:db8::1",
        "2001:db8::2",
    )
]
QUEUE_PAIRS = [(probe, dest_qp) for probe in PROBES for dest_qp in (0x11, 0x12, 0x13)]

DAEMONS = ["bfdd", "bgpd", "zebra"]

interfaces = st.sampled_from(INTERFACES)
peers = st.sampled_from(PEERS)
prefixes = st.sampled_from(PREFIXES)
metrics = st.sampled_from([0, 20, 100])
protocols = st.sampled_from([186, 186, 186, 188, 2, 4])
hops = st.lists(
    st.tuples(interfaces, peers, st.sampled_from([1, 1, 2]), st.sampled_from([True, True, True, False])),
    min_size=1,
    max_size=5,
    unique_by=lambda hop: hop[:2],
)


class Node(RuleBasedStateMachine):
    """The world as the kernel and FRR know it, a planner that is told, and a kernel that does what the planner says."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.next_ifindex = 10
        self.links: dict[str, Link] = {}
        self.routes: dict[tuple[Network, int], Route] = {}
        self.neighbours: dict[tuple[int, Address], Neighbour] = {}
        self.sessions: dict[NextHopKey, BfdSession] = {}
        self.kernel = FakeKernel()
        self.homes: dict[tuple[Address, int], int] = {}
        self.started = False

    @initialize(
        uplinks=st.sampled_from([None, None, ("eth0", "eth1", "eth2")]),
        weights=st.sampled_from([{}, {}, {"eth0": 3, "spine1": 2}]),
        planes=st.sampled_from([{}, {}, {"eth0": "red", "eth1": "red"}]),
        hold_up=st.sampled_from([0.0, 1.0]),
        at_once=st.booleans(),
        adopting=st.booleans(),
        legs=hops,
    )
    def begin(
        self, at_once: bool, adopting: bool, legs: list[tuple[str, Address, int, bool]], **options: Any
    ) -> None:
        self.adopting = adopting
        self.config = PlannerConfig(linger=30, hold_up_max=8, **options)
        self.planner = Planner(self.config)
        for name in INTERFACES:
            self.make_link(name)
        if at_once:
            self.many_routes(len(PREFIXES), 186, legs)
            self.start()

    def make_link(self, name: str) -> Link:
        self.next_ifindex += 1
        link = self.links[name] = Link(self.next_ifindex, name, True, "bridge" if name == "br0" else "")
        return link

    def facts(self) -> Facts:
        return Facts(tuple(self.links.values()), tuple(self.routes.values()), tuple(self.neighbours.values()))

    # --- telling and checking ---------------------------------------------------------------------------------------

    def tell(self, *events: Event) -> None:
        before = {qp: self.kernel.path_of(qp[0], qp[1], self.homes.get(qp)) for qp in QUEUE_PAIRS}
        usable_before = {probe: self.kernel.usable(probe) for probe in PROBES}
        had = {key: path for path in self.planner.paths for key in addresses_of(path)}
        operations = self.planner.handle_all(events, self.now)
        assert self.started or not [op for op in operations if type(op).__name__ != "Tell"]
        steps = []
        for operation in operations:
            self.kernel.step(operation)
            if isinstance(operation, Tell) and "into" in operation.detail:
                assert operation.detail["id"] not in self.homes.values(), "folded, and QPs were there"
            if type(operation).__name__ != "Tell":
                steps.append(
                    {qp: self.kernel.path_of(qp[0], qp[1], self.homes.get(qp)) for qp in QUEUE_PAIRS}
                )
        self.kernel.apply([])
        for qp in QUEUE_PAIRS:
            home = self.homes.get(qp)
            if home is not None and (usable_before[qp[0]] & self.kernel.usable(qp[0])) >> home & 1:
                assert before[qp] == home
                assert all(step[qp] == home for step in steps), "a QP of a living path moved"
            for step in steps:
                # In between, a QP's path is one that its group has before or after: never a mixture of the two.
                allowed = usable_before[qp[0]] | self.kernel.usable(qp[0])
                number = step[qp]
                assert number is None or allowed >> number & 1
        self.settled()
        self.recognised(had)

    def settled(self) -> None:
        if not self.started:
            return
        paths = {path.id: path for path in self.planner.paths}
        owners = {key: path for path in paths.values() for key in addresses_of(path)}
        assert len(owners) == sum(1 + len(path.aliases) for path in paths.values())
        assert self.kernel.living == sum(1 << p.id for p in paths.values() if p.state is PathState.UP)
        assert self.planner.living == self.kernel.living
        best = self.best_routes()
        for probe in PROBES:
            prefix = longest_match(best, probe)
            keys = self.steered(best[prefix]) if prefix is not None else {}
            group = self.kernel.group_of(probe)
            if prefix is not None and not keys and not self.leaves_by_uplink(best[prefix]):
                continue
            members = {owners[key].id for key in keys}
            assert set(group.weights if group else ()) == members
            assert all(
                self.kernel.paths[owners[key].id].next_hop.version >= key.address.version for key in keys
            ), "an IPv6 packet cannot be sent to an IPv4 next hop"
            for dest_qp in (0x11, 0x12, 0x13):
                number = self.kernel.path_of(probe, dest_qp, self.homes.get((probe, dest_qp)))
                if number is None:
                    assert not any(paths[member].state is PathState.UP for member in members)
                else:
                    assert paths[number].state is PathState.UP
                    self.homes.setdefault((probe, dest_qp), number)
            overridden = self.kernel.override_of(probe)
            if overridden is not None:
                assert overridden[0] == prefix, "an override hides a longer prefix of main"
                assert set(overridden[1]) < set(best[prefix].next_hops)
        for key, session in self.planner.sessions.items():
            failed = session.state in {BfdState.DOWN, BfdState.INIT} and key in self.planner._bfd._seen_up
            if failed and key in owners:
                assert owners[key].state is not PathState.UP, "a session that was Up is down"
        self.explained()
        self.told_in_turn()

    def recognised(self, had: dict[NextHopKey, Path]) -> None:
        """What is one neighbour's is one path's; and what is one path's stays so for the path's life."""
        have = {key: path for path in self.planner.paths for key in addresses_of(path)}
        living = {path.id for path in have.values()}
        for key, path in had.items():
            if path.id in living and have[key].id != path.id:
                raise AssertionError(f"{key} was handed from path to path")
        for path in self.planner.paths:
            assert len({neighbour_of(key.address) for key in addresses_of(path)}) == 1, (
                "two neighbours, one path"
            )
        for key, path in have.items():
            mac = self.mac_of(key)
            if key in had or not mac:
                continue
            elders = [
                other for other, owner in had.items() if owner.interface == path.interface and other in have
            ]
            known = any(self.mac_of(other) == mac for other in elders)
            assert not known or path.id in {have[other].id for other in elders}, (
                "a neighbour that we know got another"
            )

    def mac_of(self, key: NextHopKey) -> str:
        link = self.links.get(key.interface)
        entry = self.neighbours.get((link.ifindex, key.address)) if link else None
        return entry.mac if entry else ""

    def told_in_turn(self) -> None:
        """Each loss of a daemon once, and each return once."""
        for daemon in DAEMONS:
            kinds = [
                tell.kind
                for tell in self.kernel.tells
                if tell.kind.startswith("frr-") and tell.detail["daemon"] == daemon
            ]
            assert kinds == (["frr-lost", "frr-back"] * len(kinds))[: len(kinds)]

    def explained(self) -> None:
        for probe in PROBES:
            answer = self.planner.explain_destination(probe)
            group = self.kernel.group_of(probe)
            assert (answer is None) == (group is None)
            if answer is not None and group is not None:
                assert (answer.group.id, dict(answer.group.weights)) == (group.id, dict(group.weights))
                full = self.kernel.tables[group.table][77].tolist()
                assert answer.order(77) == tuple(number for number in full if number in group.weights)

    def best_routes(self) -> dict[Network, Route]:
        best: dict[Network, Route] = {}
        for route in self.routes.values():
            if route.prefix not in best or route.metric < best[route.prefix].metric:
                best[route.prefix] = route
        return best

    def steered(self, route: Route) -> dict[NextHopKey, NextHop]:
        """The route's paths, by the documented rule."""
        listed = self.config.uplinks is not None
        if route.protocol == 2 or (not listed and route.protocol not in {186, 188}):
            return {}
        names = {link.ifindex: link.name for link in self.links.values()}
        allowed = set(self.config.uplinks or ()) if listed else set(INTERFACES) - {"br0"}
        return {
            NextHopKey(names[hop.ifindex], hop.address): hop
            for hop in route.next_hops
            if names.get(hop.ifindex) in allowed
        }

    def leaves_by_uplink(self, route: Route) -> bool:
        return any(hop.ifindex in self.kernel.uplinks for hop in route.next_hops)

    # --- what happens -----------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.started)
    @rule()
    def start(self) -> None:
        self.started = True
        self.tell(Resynced(self.facts()))

    @rule()
    def resync(self) -> None:
        if self.started:
            operations = self.planner.handle(Resynced(self.facts()), self.now)
            assert not [op for op in operations if type(op).__name__ != "Tell"], operations

    @rule(prefix=prefixes, metric=metrics, protocol=protocols, legs=hops)
    def route(
        self, prefix: Network, metric: int, protocol: int, legs: list[tuple[str, Address, int, bool]]
    ) -> None:
        next_hops = tuple(
            NextHop(self.links[name].ifindex, address, weight, alive)
            for name, address, weight, alive in legs
            if name in self.links
        )
        if next_hops:
            route = self.routes[prefix, metric] = Route(prefix, next_hops, protocol, metric)
            self.tell(RouteChanged(route))

    @rule(count=st.integers(2, 6), protocol=protocols, legs=hops)
    def many_routes(self, count: int, protocol: int, legs: list[tuple[str, Address, int, bool]]) -> None:
        next_hops = tuple(
            NextHop(self.links[name].ifindex, address, weight, True)
            for name, address, weight, _ in legs
            if name in self.links
        )
        events: list[Event] = []
        for prefix in PREFIXES[-count:]:
            if next_hops:
                route = self.routes[prefix, 20] = Route(prefix, next_hops, protocol, 20)
                events.append(RouteChanged(route))
        self.tell(*events)

    @rule(data=st.data())
    def route_gone(self, data: st.DataObject) -> None:
        if self.routes:
            prefix, metric = data.draw(st.sampled_from(sorted(self.routes, key=str)))
            del self.routes[prefix, metric]
            self.tell(RouteGone(prefix, metric))

    @rule(name=interfaces, up=st.booleans())
    def link(self, name: str, up: bool) -> None:
        if name in self.links:
            link = self.links[name] = replace(self.links[name], up=up)
            self.tell(LinkChanged(link))

    @rule(name=interfaces, routes_first=st.booleans())
    def link_gone(self, name: str, routes_first: bool) -> None:
        """The kernel takes the next hops with it, with notice before or after."""
        link = self.links.pop(name, None)
        if link is None:
            return
        events: list[Event] = []
        for (prefix, metric), route in list(self.routes.items()):
            left = tuple(hop for hop in route.next_hops if hop.ifindex != link.ifindex)
            if left == route.next_hops:
                continue
            if left:
                self.routes[prefix, metric] = replace(route, next_hops=left)
                events.append(RouteChanged(self.routes[prefix, metric]))
            else:
                del self.routes[prefix, metric]
                events.append(RouteGone(prefix, metric))
        for key in [key for key in self.neighbours if key[0] == link.ifindex]:
            del self.neighbours[key]
        self.tell(*([*events, LinkGone(link.ifindex)] if routes_first else [LinkGone(link.ifindex), *events]))

    @rule(name=interfaces)
    def link_new(self, name: str) -> None:
        if name not in self.links:
            self.tell(LinkChanged(self.make_link(name)))

    @rule(name=interfaces, address=peers, state=st.sampled_from(NeighbourState))
    def neighbour_changed(self, name: str, address: Address, state: NeighbourState) -> None:
        self.neighbour(name, address, state)

    def neighbour(self, name: str, address: Address, state: NeighbourState) -> None:
        if name in self.links:
            ifindex = self.links[name].ifindex
            mac = (
                ""
                if state is not NeighbourState.USABLE
                else f"02:00:00:00:{INTERFACES.index(name):02x}:{neighbour_of(address):02x}"
            )
            entry = self.neighbours[ifindex, address] = Neighbour(ifindex, address, state, mac)
            self.tell(NeighbourChanged(entry))

    @rule(
        names=st.sets(st.sampled_from(INTERFACES[:3]), min_size=1),
        number=st.sampled_from([0, 0, 1]),
        ipv4=st.sampled_from([0, 1]),
        macs=st.sampled_from(["none", "first", "all"]),
    )
    def both_families(self, names: set[str], number: int, ipv4: int, macs: str) -> None:
        """Routes of both families by the same neighbours, as in BGP unnumbered (or a dual-stack fabric)."""
        first, last = NEIGHBOURS[number][ipv4 % (len(NEIGHBOURS[number]) - 1)], NEIGHBOURS[number][-1]
        for name in sorted(names & self.links.keys()):
            for address in {"none": [], "first": [first], "all": [first, last]}[macs]:
                self.neighbour(name, address, NeighbourState.USABLE)
        links = [self.links[name] for name in sorted(names & self.links.keys())]
        if links:
            for prefix in PREFIXES[3:]:
                address = first if prefix.version == 4 else last
                hops = tuple(NextHop(link.ifindex, address) for link in links)
                self.routes[prefix, 20] = Route(prefix, hops, 186, 20)
                self.tell(RouteChanged(self.routes[prefix, 20]))

    @rule(name=interfaces, number=st.sampled_from([0, 0, 1]))
    def answers(self, name: str, number: int) -> None:
        """The neighbour is found by all of its addresses."""
        for address in NEIGHBOURS[number]:
            self.neighbour(name, address, NeighbourState.USABLE)

    @rule(data=st.data())
    def neighbour_gone(self, data: st.DataObject) -> None:
        if self.neighbours:
            ifindex, address = data.draw(st.sampled_from(sorted(self.neighbours, key=str)))
            del self.neighbours[ifindex, address]
            self.tell(NeighbourGone(ifindex, address))

    @rule(name=interfaces, address=peers, state=st.sampled_from([None, *BfdState]))
    def session(self, name: str, address: Address, state: BfdState | None) -> None:
        key = NextHopKey(name, address)
        self.sessions = dict(self.planner.sessions)
        self.sessions.pop(key, None)
        if state is not None:
            self.sessions[key] = BfdSession(name, address, state)
        self.tell(BfdSessionsRead(tuple(self.sessions.values())))

    @rule(data=st.data(), cause=st.sampled_from(["up", "lifted", "local-down", "remote-down", "silent"]))
    def tap(self, data: st.DataObject, cause: str) -> None:
        if self.planner.paths:
            path = data.draw(st.sampled_from(self.planner.paths))
            self.tell(TapReported(path.id, cause in {"up", "lifted"}, cause, 1))

    @rule(
        known=st.sets(st.tuples(interfaces, peers)),
        names=st.lists(st.sampled_from(["spine1", "spine2", "spine3"]), min_size=3, max_size=3),
    )
    def peers_named(self, known: set[tuple[str, Address]], names: list[str]) -> None:
        """A neighbour has one name, by whichever of its addresses bgpd knows it."""
        self.tell(
            PeersNamed(
                {
                    NextHopKey(interface, address): names[
                        (INTERFACES.index(interface) + neighbour_of(address)) % 3
                    ]
                    for interface, address in sorted(known, key=str)
                }
            )
        )

    @rule(data=st.data(), drain=st.booleans())
    def drain(self, data: st.DataObject, drain: bool) -> None:
        if self.started and self.planner.paths:
            self.tell(DrainAsked(data.draw(st.sampled_from(self.planner.paths)).name, drain))

    @rule(daemon=st.sampled_from(DAEMONS), event=st.sampled_from([FrrLost, FrrBack]))
    def frr(self, daemon: str, event: type[FrrLost | FrrBack]) -> None:
        states = {path.id: path.state for path in self.planner.paths}
        self.tell(event(daemon))
        assert states == {path.id: path.state for path in self.planner.paths}

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Tick())

    # --- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not self.started:
            return
        self.drain_timers(self.planner)
        fresh, fresh_kernel = self.successor(Adopted())
        if self.adopting or self.partition(fresh) != self.partition(self.planner):
            # Which addresses are one path is decided once; a successor finds what was decided.
            fresh, fresh_kernel = self.successor(
                Adopted(
                    paths={path.id: path.key for path in self.planner.paths},
                    next_hops={key: path.id for path in self.planner.paths for key in addresses_of(path)},
                )
            )
            assert self.partition(fresh) == self.partition(self.planner)
        self.compare(fresh, fresh_kernel)

    def successor(self, adopted: Adopted) -> tuple[Planner, FakeKernel]:
        """A planner that sees the present facts only."""
        fresh, kernel = Planner(self.config, adopted), FakeKernel()
        for number, key in adopted.paths.items():
            path = next(path for path in self.planner.paths if path.id == number)
            kernel.paths[number] = replace(path, ifindex=0)
            assert path.key == key
        registry, bfd = self.planner._registry, self.planner._bfd
        seen = [replace(self.planner.sessions[key], state=BfdState.UP) for key in bfd._seen_up]
        kernel.apply(fresh.handle(PeersNamed(self.planner._peers), self.now))
        kernel.apply(fresh.handle(BfdSessionsRead(tuple(seen)), self.now))
        kernel.apply(fresh.handle(BfdSessionsRead(tuple(self.planner.sessions.values())), self.now))
        kernel.apply(fresh.handle(Resynced(self.facts()), self.now))
        twins = {}
        for record in registry:
            twin = fresh._registry.get(self.used(record.key, record.uses))
            if twin is not None:
                twins[record] = twin
        for record, twin in twins.items():
            # A path keeps its name when its peer is away, and the MACs when the neighbour table has forgotten them.
            twin.host_name, fresh._renamed = record.host_name, True
            twin.addresses.update(
                {address: mac for address, mac in record.addresses.items() if address in twin.addresses}
            )
            if record.tap_down is not None and record.tap_holds_since is None:
                cause = "silent" if record.tap_down is Reason.BFD_SILENT else "local-down"
                kernel.apply(fresh.handle(TapReported(twin.id, False, cause, 1), self.now))
                # The tap's report says something of the session as well, which bfdd may have taken back since.
                fresh._bfd.sessions.update(self.planner.sessions)
            if record.drained:
                kernel.apply(fresh.handle(DrainAsked(twin.name, True), self.now))
        kernel.apply(fresh.handle(Resynced(self.facts()), self.now))
        self.drain_timers(fresh, kernel)
        return fresh, kernel

    @staticmethod
    def used(key: NextHopKey, uses: Iterable[Address]) -> NextHopKey:
        return NextHopKey(key.interface, min(uses, key=str, default=key.address))

    @staticmethod
    def identities(planner: Planner) -> dict[int, Any]:
        """Path id to the next hops that routes use."""
        return {
            record.id: (record.key.interface, frozenset(record.uses))
            for record in planner._registry
            if record.uses
        }

    def partition(self, planner: Planner) -> set[Any]:
        """Which next hops in use, and which sessions, are one path's; and the next hop that stands for them."""
        return {
            (
                record.key,
                frozenset(record.uses),
                frozenset(self.planner.sessions.keys() & keys_of(record)),
            )
            for record in planner._registry
        }

    def drain_timers(self, planner: Planner, kernel: FakeKernel | None = None) -> None:
        for _ in range(500):
            if planner.deadline is None:
                break
            self.now = max(self.now, planner.deadline)
            if kernel is None:
                self.tell(Tick())
            else:
                kernel.apply(planner.handle(Tick(), self.now))
        assert planner.deadline is None

    def compare(self, fresh: Planner, fresh_kernel: FakeKernel) -> None:
        mine, theirs = self.identities(self.planner), self.identities(fresh)
        states = {mine[path.id]: (path.state, path.reason) for path in self.planner.paths if path.id in mine}
        twins = {theirs[path.id]: (path.state, path.reason) for path in fresh.paths if path.id in theirs}
        assert states == twins, (states, twins)
        # What a drain or a session keeps, without any route, is what a fresh look cannot know.
        kept = any(path.id not in mine for path in (*self.planner.paths, *fresh.paths))
        steered, twin_steered = reached(self.kernel, mine), reached(fresh_kernel, theirs)
        if kept:
            # They keep their interface an uplink, so that more prefixes are told apart from the groups' there, and
            # they share names, on which weights may hang.
            steered = {prefix: set(group) for prefix, group in steered.items() if group != NO_GROUP}
            twin_steered = {prefix: set(group) for prefix, group in twin_steered.items() if group != NO_GROUP}
        assert steered == twin_steered, (steered, twin_steered)
        assert self.kernel.overrides == fresh_kernel.overrides
        if kept:
            return
        assert {mine[p.id]: p.sole for p in self.planner.paths} == {theirs[p.id]: p.sole for p in fresh.paths}
        assert self.kernel.uplinks == fresh_kernel.uplinks
        assert {mine[p.id]: (p.name, p.plane) for p in self.planner.paths} == {
            theirs[p.id]: (p.name, p.plane) for p in fresh.paths
        }
        assert preferred(self.kernel, mine) == preferred(fresh_kernel, theirs)
        if {path.id: set(addresses_of(path)) for path in self.planner.paths} == {
            path.id: set(addresses_of(path)) for path in fresh.paths
        }:
            # Of two paths to one neighbour the lower id counts.
            assert {key: mine[n] for key, n in (self.kernel.neighbours or {}).items()} == {
                key: theirs[n] for key, n in (fresh_kernel.neighbours or {}).items()
            }


def addresses_of(path: Path) -> list[NextHopKey]:
    return [NextHopKey(path.interface, address) for address in (path.next_hop, *path.aliases)]


def keys_of(record: PathRecord) -> list[NextHopKey]:
    return [NextHopKey(record.key.interface, address) for address in record.addresses]


def neighbour_of(address: Address) -> int:
    return next(number for number, addresses in enumerate(NEIGHBOURS) if address in addresses)


def reached(kernel: FakeKernel, identities: dict[int, Any]) -> dict[Network, Any]:
    return {
        prefix: number
        if number == NO_GROUP
        else {identities[path]: weight for path, weight in kernel.groups[number].weights.items()}
        for prefix, number in kernel.destinations.items()
    }


def preferred(kernel: FakeKernel, identities: dict[int, Any]) -> dict[Network, list[list[Any]]]:
    found = {}
    for prefix, number in kernel.destinations.items():
        if number != NO_GROUP:
            table = kernel.tables[kernel.groups[number].table]
            found[prefix] = [
                [identities[path] for path in table[slot].tolist() if path in identities]
                for slot in range(0, 4096, 97)
            ]
    return found


Node.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnySequence = Node.TestCase
