"""The planner: events in, operations out. Nothing else decides, and nothing here does I/O.

Facts are taken in first and settled afterwards, so that a burst of events (``handle_all``) costs one round of
operations. The order within a round is what makes every step in between right: what is dead is taken out of the word of
living paths before anything else, everything is written before something points to it, and erased after nothing does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.core import override
from qpd.core.bfd import BfdFacts
from qpd.core.config import (
    NO_UPLINK_KINDS,
    ROUTING_PROTOCOLS,
    RTPROT_KERNEL,
    Adopted,
    PlannerConfig,
    UnknownPath,
)
from qpd.core.groups import GroupBook, Order, Target
from qpd.core.neighbours import ADDRESSES_MAX, Neighbours, best_next_hop
from qpd.core.override import OverrideBook
from qpd.core.paths import PathRecord, Registry
from qpd.core.routes import Legs, RouteTable
from qpd.core.written import Written
from qpd.model import (
    DESTINATIONS_MAX,
    GROUPS_MAX,
    NO_GROUP,
    NO_PATH,
    PATHS_MAX,
    TABLES_MAX,
    Address,
    BfdSession,
    BfdSessionsRead,
    DrainAsked,
    EraseOverrides,
    Event,
    FrrBack,
    FrrLost,
    GrayFound,
    GrayOver,
    Group,
    Link,
    LinkChanged,
    LinkGone,
    NeighbourChanged,
    NeighbourGone,
    Network,
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
    TapReported,
    Tell,
    Tick,
    WriteOverrides,
)

__all__ = ["Adopted", "Destination", "Planner", "PlannerConfig", "UnknownPath"]

WEIGHT_MAX = 0xFFFF
_LIMITS = {"paths": PATHS_MAX, "groups": GROUPS_MAX, "tables": TABLES_MAX, "destinations": DESTINATIONS_MAX}
_KINDS = {PathState.UP: "path-up", PathState.DOWN: "path-down", PathState.HOLD: "path-hold"}


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """How a destination is reached: its longest prefix, its group, the slot table, and the paths that live."""

    prefix: Network
    group: Group
    orders: npt.NDArray[np.uint8]
    living: int

    def order(self, slot: int) -> tuple[int, ...]:
        """The slot's preference order over the group's members, dead ones included."""
        return tuple(
            path for path in self.orders[slot].tolist() if path != NO_PATH and self.group.members >> path & 1
        )


class Planner:
    """Takes events and returns the operations that follow, in the order in which they must be applied.

    Before the first ``Resynced`` facts are only taken in: whatever is known of peers and BFD should be told before it.
    A round of operations is taken for applied; what could not be is set right by a new planner with ``adopted``.
    """

    def __init__(self, config: PlannerConfig, adopted: Adopted | None = None) -> None:
        adopted = adopted or Adopted()
        self.config = config
        self._registry = Registry(config)
        self._routes = RouteTable(self._eligible)
        self._bfd = BfdFacts(config.hold_up)
        self._neighbours = Neighbours(self._registry)
        self._book = GroupBook(adopted)
        self._overrides = OverrideBook(adopted.overrides)
        self._links: dict[int, Link] = {}
        self._link_names: dict[str, Link] = {}
        self._peers: Mapping[NextHopKey, str] = {}
        self._frr_lost: set[str] = set()
        self._lingering: set[PathRecord] = set()
        self._order = Order({}, {})
        self._written = Written(adopted)
        self._told_limits: set[str] = set()
        # What must be looked at again.
        self._ready = False
        self._retry_at: float | None = None
        self._touched: set[PathRecord] = set()
        self._unresolved: dict[Legs, None] = {}
        self._reordered = True
        self._renamed = True
        self._relinked = True
        self._remapped = True
        self._prefixes: dict[Network, None] = dict.fromkeys([*adopted.destinations, *adopted.overrides])
        self._kernel_ns: dict[int, int] = {}
        self._tells: list[Tell] = []
        self._held_down: set[PathRecord] = set()
        self._born: list[PathRecord] = []
        self._keyless: dict[Legs, None] = {}
        for number, key in adopted.paths.items():
            if 0 <= number < PATHS_MAX and self._registry.get(key) is None:
                self._adopt(number, key, adopted)
        for key, number in adopted.next_hops.items():
            record = self._registry.by_id(number)
            if record is not None and key.interface == record.key.interface and not self._registry.get(key):
                self._neighbours.attach(record, key.address, 0)

    # --- what others read -------------------------------------------------------------------------------------------

    @property
    def paths(self) -> tuple[Path, ...]:
        """All known paths, by id."""
        return tuple(
            self._registry.view(record) for record in sorted(self._registry, key=lambda record: record.id)
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups with their destinations, by id."""
        return self._book.view()

    @property
    def sessions(self) -> Mapping[NextHopKey, BfdSession]:
        """BFD sessions by interface and peer, as bfdd or the tap told last."""
        return self._bfd.sessions

    @property
    def living(self) -> int:
        """The word of living paths, as last written."""
        return self._written.word

    @property
    def overrides(self) -> Mapping[Network, tuple[Any, ...]]:
        """What the own table holds; an empty tuple is a ``throw`` route."""
        return self._overrides.written

    @property
    def uplinks(self) -> tuple[Link, ...]:
        """The interfaces that carry the classifier, by index."""
        return tuple(
            self._links[ifindex] for ifindex in sorted(self._written.uplinks) if ifindex in self._links
        )

    @property
    def drained(self) -> frozenset[NextHopKey]:
        """The paths that the operator has taken out of service."""
        return frozenset(record.key for record in self._registry if record.drained)

    def orders(self, table: int) -> npt.NDArray[np.uint8]:
        """A slot table: uint8[4096, 64]; KeyError where there is none of this number."""
        orders = self._book.orders(table)
        if orders is None:
            raise KeyError(table)
        return orders

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is wanted; None: nothing waits."""
        if not self._ready:
            return None
        times = [
            record.health.hold_until for record in self._registry if record.health.hold_until is not None
        ]
        times += [record.gray.until for record in self._registry if record.gray.until is not None]
        times += [
            record.linger_until
            for record in self._lingering
            if record.linger_until is not None and not self._kept(record, record.linger_until)
        ]
        if self._retry_at is not None:
            times.append(self._retry_at)
        return min(times, default=None)

    def session_of(self, path: Path) -> BfdSession | None:
        """The BFD session that guards a path; of several the worst."""
        record = self._registry.by_id(path.id)
        return None if record is None else self._bfd.worst(record)

    def explain_destination(self, address: Address) -> Destination | None:
        """How this address (an outer destination) is reached; None: by the kernel's own choice."""
        host = ip_network(address)
        for length in self._book.lengths(address.version):
            prefix = host.supernet(new_prefix=length)
            number = self._book.destinations.get(prefix)
            if number is None:
                continue
            group = self._book.group(number)
            orders = None if group is None else self._book.orders(group.table)
            return (
                None
                if group is None or orders is None
                else Destination(prefix, group, orders, self._written.word)
            )
        return None

    # --- events -----------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Operation]:
        """What follows from one event. Raises UnknownPath for the drain of a path that there is not."""
        self._take(event, now)
        return self._settle(now)

    def handle_all(self, events: Iterable[Event], now: float) -> list[Operation]:
        """What follows from a burst of events together: one round of operations instead of many."""
        for event in events:
            self._take(event, now)
        return self._settle(now)

    def _take(self, event: Event, now: float) -> None:  # noqa: C901, PLR0912 - one line an event
        match event:
            case RouteChanged(route):
                self._routes.put(route)
            case RouteGone(prefix, metric):
                self._routes.drop(prefix, metric)
            case TapReported():
                self._take_tap(event, now)
            case LinkChanged(link):
                self._take_link(link)
            case LinkGone(ifindex):
                self._lose_link(ifindex)
            case NeighbourChanged(neighbour):
                self._neighbours.put(neighbour)
                self._touch_neighbour(neighbour.ifindex, neighbour.address)
            case NeighbourGone(ifindex, address):
                self._neighbours.drop(ifindex, address)
                self._touch_neighbour(ifindex, address)
            case BfdSessionsRead(sessions):
                self._take_sessions(sessions, now)
            case PeersNamed(names):
                self._take_names(names)
            case FrrLost(daemon):
                self._take_loss(daemon)
            case FrrBack(daemon):
                self._back(daemon)
            case DrainAsked(name, drain):
                self._take_drain(name, drain)
            case GrayFound(path, detail):
                self._take_gray(path, detail, now)
            case GrayOver(path):
                self._end_gray(path)
            case Resynced(facts):
                self._take_links(facts.links)
                self._neighbours.replace(facts.neighbours)
                self._touched.update(self._registry)
                self._remapped = True
                self._routes.replace(facts.routes)
                if not self._ready:
                    self._ready = True
                    for record in self._registry:
                        record.since = now
            case Tick():
                pass

    # --- links and neighbours ---------------------------------------------------------------------------------------

    def _take_link(self, link: Link) -> None:
        before = self._links.get(link.ifindex)
        if before == link:
            return
        self._links[link.ifindex] = link
        if before is not None and before.name != link.name and self._link_names.get(before.name) is before:
            del self._link_names[before.name]
        self._link_names[link.name] = link
        if before is None or (before.name, before.kind) != (link.name, link.kind):
            self._relink(link.ifindex)
        self._touch_interfaces({link.name} if before is None else {link.name, before.name})

    def _lose_link(self, ifindex: int) -> None:
        link = self._links.pop(ifindex, None)
        if link is None:
            return
        if self._link_names.get(link.name) is link:
            del self._link_names[link.name]
        self._neighbours.drop_interface(ifindex)
        self._relink(ifindex)
        self._touch_interfaces({link.name})

    def _take_links(self, links: Iterable[Link]) -> None:
        fresh = {link.ifindex: link for link in links}
        for ifindex in [known for known in self._links if known not in fresh]:
            self._lose_link(ifindex)
        for link in fresh.values():
            self._take_link(link)

    def _relink(self, ifindex: int) -> None:
        """Whatever stands on this interface index may stand on another interface now."""
        self._unresolved.update(self._routes.by_ifindex.get(ifindex, {}))
        self._relinked = self._remapped = True

    def _touch_interfaces(self, names: set[str]) -> None:
        for record in self._registry:
            if record.key.interface in names:
                link = self._link_names.get(record.key.interface)
                if link is not None and link.ifindex != record.ifindex:
                    record.ifindex = link.ifindex
                    self._relinked = self._remapped = True
                self._touched.add(record)

    def _touch_neighbour(self, ifindex: int, address: Address) -> None:
        link = self._links.get(ifindex)
        record = self._registry.get(NextHopKey(link.name, address)) if link else None
        if record is not None:
            self._touched.add(record)
            self._remapped = True
        elif link is not None and self._registry.on(link.name):
            # Perhaps a peer's address, which is told from another neighbour's by its MAC.
            self._remapped = True

    # --- FRR and the tap --------------------------------------------------------------------------------------------

    def _take_sessions(self, sessions: Iterable[BfdSession], now: float) -> None:
        self._back("bfdd")
        self._bfd.read(sessions, now)
        self._know()
        self._remapped = True  # Which session tells the tap hangs on what was seen of them.
        for record in self._registry:
            difference = self._bfd.compare(record, now)
            if difference is not None:
                self._tells.append(Tell("mismatch", {**_named(record), **difference}))
        self._touched.update(self._registry)

    def _take_tap(self, event: TapReported, now: float) -> None:
        record = self._registry.by_id(event.path)
        if record is None:
            return
        if not self._bfd.tapped(record, event.up, event.cause, now):
            detail = {**_named(record), "tap": event.cause, "bfdd": "lost"}
            self._tells.append(Tell("mismatch", detail, event.kernel_ns))
            return
        self._kernel_ns[record.id] = event.kernel_ns
        self._touched.update((record, *self._neighbours.kin(record)))

    def _take_names(self, names: Mapping[NextHopKey, str]) -> None:
        """A peer that is away has no name: what a path was called, it stays."""
        self._back("bgpd")
        self._peers = dict(names)
        self._know()
        for record in self._registry:
            self._name_after_peer(record)

    def _name_after_peer(self, record: PathRecord) -> None:
        addresses = (record.key.address, *record.addresses)
        keys = (NextHopKey(record.key.interface, address) for address in addresses)
        name = next((self._peers[key] for key in keys if self._peers.get(key)), None)
        if name and name != record.host_name:
            record.host_name = name
            self._renamed = True

    def _know(self) -> None:
        """What BGP and BFD call their peers may be other addresses of neighbours that we know."""
        if self._neighbours.know((*self._peers, *self._bfd.sessions)):
            self._touched.update(self._registry)
            self._remapped = True

    def _take_loss(self, daemon: str) -> None:
        if daemon in self._frr_lost:
            return
        self._frr_lost.add(daemon)
        self._tells.append(Tell("frr-lost", {"daemon": daemon}))
        if daemon == "bfdd":
            self._bfd.lose()

    def _back(self, daemon: str) -> None:
        """It answers again, or what only it can have said has come: told once, by whichever is first."""
        if daemon in self._frr_lost:
            self._frr_lost.discard(daemon)
            self._tells.append(Tell("frr-back", {"daemon": daemon}))

    def _take_drain(self, name: str, drain: bool) -> None:
        record = next((record for record in self._registry if record.name == name), None)
        if record is None:
            raise UnknownPath(name, tuple(sorted(record.name for record in self._registry)))
        if record.drained is drain:
            return
        record.drained = drain
        self._remapped = True  # What is drained is not folded into another path.
        self._tells.append(Tell("path-drained" if drain else "path-undrained", _named(record)))
        self._touched.add(record)

    def _take_gray(self, path: int, detail: Mapping[str, Any], now: float) -> None:
        record = self._registry.by_id(path)
        # What arrives by it may be found lossy first, and what leaves later: that is what drains it.
        if record is None or record.gray.until is not None:
            return
        record.gray.found = True
        told = {**_named(record), **detail, "action": "report"}
        if self.config.gray_drain and detail.get("direction") == "out":
            told |= {"action": "drain", "hold_s": round(record.gray.hold(now), 3)}
            if not self._spared(record):
                told["action"] = "kept: no other path"
        self._tells.append(Tell("path-gray", told))
        self._touched.add(record)

    def _end_gray(self, path: int) -> None:
        """It is as good as others, as its own traffic shows: it has been serving, so that nothing has to change."""
        record = self._registry.by_id(path)
        if record is not None and record.gray.found:
            self._tells.append(Tell("path-gray-over", _named(record)))
            record.gray.forgive()
            self._touched.add(record)

    def _retry_gray(self, now: float) -> None:
        for record in self._registry:
            if not record.gray.is_over(now):
                continue
            if record.state is PathState.UP:
                record.gray.look_again(now)
                continue
            record.gray.give_back(now)
            self._tells.append(Tell("path-gray-over", _named(record)))
            self._touched.add(record)

    def _spared(self, record: PathRecord) -> bool:
        """Whether another path that is well reaches what several paths reach: the last of them is never taken away.

        What it alone reaches (its neighbour's own address, say) is left to the kernel's choice, which is the same path.
        """
        shared = [legs for legs in record.legs if any(other is not record for other, _ in legs.members)]
        return all(
            any(other is not record and self._well(other) for other, _ in legs.members) for legs in shared
        )

    @staticmethod
    def _well(record: PathRecord) -> bool:
        return (
            record.health.serving and not record.drained and record.gray.until is None and bool(record.legs)
        )

    # --- settling ---------------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> list[Operation]:
        if not self._ready:
            tells, self._tells = self._tells, []
            return list(tells)
        self._retry_at = None
        if self._zebra_spoke():
            self._back("zebra")
        if self._registry.recycle():
            self._unresolved.update((legs, None) for legs in self._keyless if legs.left_out)
        resolved: dict[Legs, None] = {}
        erased: list[Operation] = []
        claimed = True
        while claimed:
            # An address that is found to be a path's may be the link to others.
            erased += self._recognise()
            resolved |= self._resolve(now)
            erased += self._expire(now)
            claimed = self._claim()
        self._choose_next_hops()
        if self._renamed:
            self._rename(resolved)
        affected = self._judge(now)
        self._rekey(resolved)
        dead, living = self._life()
        overrides = self._settle_overrides({**resolved, **affected})
        early, late = self._write_paths()
        uplinks = self._settle_uplinks()
        groups = self._settle_groups(bool(uplinks))
        operations = [*dead, *overrides, *early, *groups, *late, *living]
        operations += [*self._settle_neighbours(), *uplinks, *erased]
        self._tell_limits()
        if (self._book.freed and self._book.starved) or (
            erased and any(legs.left_out for legs in self._keyless)
        ):
            self._retry_at = now
        tells, self._tells = self._tells, []
        return [*operations, *tells]

    def _zebra_spoke(self) -> bool:
        if "zebra" not in self._frr_lost:
            return False
        found = (self._routes.legs_of.get(prefix) for prefix in self._routes.moved)
        return any(legs is not None and legs.eligible for legs in found)

    def _resolve(self, now: float) -> dict[Legs, None]:
        """Find the paths of all legs that are new or whose links changed."""
        for legs in self._routes.release():
            self._leave(legs)
            self._unresolved.pop(legs, None)
            self._keyless.pop(legs, None)
        resolved = {**self._unresolved, **self._routes.fresh}
        self._unresolved.clear()
        self._routes.fresh.clear()
        for legs in resolved:
            self._leave(legs)
            legs.left_out = False
            legs.members = ()
            if not legs.eligible:
                continue
            members = []
            for hop in legs.next_hops:
                link = self._links.get(hop.ifindex)
                if link is None or hop.connected or not self._may_be_uplink(link):
                    continue
                record = self._path(NextHopKey(link.name, hop.address), link, now)
                if record is None:
                    legs.left_out = True
                    continue
                members.append((record, hop))
            legs.members = tuple(members)
            for record, hop in members:
                record.legs[legs] = None
                record.uses[hop.address] += 1
                if not hop.alive:
                    record.dead_legs.add(legs)
                self._touched.add(record)
        return resolved

    def _leave(self, legs: Legs) -> None:
        for record, hop in legs.members:
            record.legs.pop(legs, None)
            record.dead_legs.discard(legs)
            record.uses[hop.address] -= 1
            if not record.uses[hop.address]:
                del record.uses[hop.address]
            self._touched.add(record)

    def _path(self, key: NextHopKey, link: Link, now: float) -> PathRecord | None:
        record = self._registry.get(key) or self._alias(key, link.ifindex)
        if record is None:
            record = self._registry.add(key, now)
            if record is None:
                return None
            record.ifindex = link.ifindex
            self._neighbours.learn(record, link.ifindex)
            self._name_after_peer(record)
            self._renamed = self._relinked = self._remapped = self._reordered = True
            self._born.append(record)
        return record

    # --- one path a neighbour ---------------------------------------------------------------------------------------

    def _alias(self, key: NextHopKey, ifindex: int) -> PathRecord | None:
        """The path whose neighbour has this address, too: it is the path's from now on."""
        record = self._neighbours.find(key, ifindex)
        if record is None or not self._neighbours.attach(record, key.address, ifindex):
            return None
        self._name_after_peer(record)
        self._touched.add(record)
        self._remapped = True
        return record

    def _claim(self) -> bool:
        """Give what BGP and BFD know to the paths whose neighbours have these addresses; True: some was no path's."""
        if not self._remapped:
            return False
        claimed = False
        for key in list(self._neighbours.unclaimed()):
            link = self._link_names.get(key.interface)
            claimed |= self._alias(key, link.ifindex if link else 0) is not None
        return claimed

    def _recognise(self) -> list[Operation]:
        """Learn MACs. Two paths to one neighbour become one where no QP can have its home on the other."""
        if not self._remapped:
            return []
        for record in self._registry:
            self._neighbours.learn(record, record.ifindex)
        erased: list[Operation] = []
        for record in list(self._registry):
            if record.served or record.drained:
                continue
            on = list(self._registry.on(record.key.interface))
            elders = on[: on.index(record)]
            for other in self._neighbours.kin(record):
                room = len(record.addresses) + len(other.addresses) <= ADDRESSES_MAX
                if room and (other.served or other in elders):
                    erased += self._fold(record, other)
                    break
        return erased

    def _fold(self, record: PathRecord, other: PathRecord) -> list[Operation]:
        for legs in list(record.legs):
            self._leave(legs)
            legs.members = ()
            self._unresolved[legs] = None
        operations = self._remove(record)
        for address in record.addresses:
            self._neighbours.attach(other, address, other.ifindex)
        self._name_after_peer(other)
        self._touched.add(other)
        self._tells.append(Tell("path-gone", {**_named(record), "into": other.id}))
        return operations

    def _remove(self, record: PathRecord) -> list[Operation]:
        self._lingering.discard(record)
        self._touched.discard(record)
        self._registry.remove(record)
        self._renamed = self._relinked = self._remapped = self._reordered = True
        return self._written.erase_path(record.id)

    def _choose_next_hops(self) -> None:
        """Which of its neighbour's addresses each path is written with."""
        for record in self._touched:
            born, known = record in self._born, self._neighbours.known(record)
            if born:
                known = [one for one in known if not self._neighbours.failed(record.ifindex, one)]
            address = best_next_hop(record, known, born)
            if address != record.key.address:
                record.key = NextHopKey(record.key.interface, address)
                # Names tell paths on one interface apart by their next hops, and tables the paths of one plane.
                self._renamed = self._relinked = self._reordered = True

    def _expire(self, now: float) -> list[Operation]:
        """Let go of paths that have had no route for long."""
        for record in self._touched:
            if bool(record.legs) is (record.linger_until is not None):
                self._remapped = True  # Of two paths to one neighbour the one with routes counts.
            if record.legs:
                record.linger_until = None
                self._lingering.discard(record)
            elif record.linger_until is None:
                record.linger_until = now + self.config.linger
                self._lingering.add(record)
        operations: list[Operation] = []
        for record in sorted(self._lingering, key=lambda record: record.id):
            if record.linger_until is None or now < record.linger_until or self._kept(record, now):
                continue
            operations += self._remove(record)
            self._tells.append(Tell("path-gone", _named(record)))
        return operations

    def _kept(self, record: PathRecord, now: float) -> bool:
        """Something but a route refers to the path at this time."""
        held = record.health.hold_until is not None and now < record.health.hold_until
        return record.drained or held or bool(self._bfd.guards(record))

    def _rename(self, resolved: dict[Legs, None]) -> None:
        """Names, planes and weights anew; configured weights hang on names."""
        self._renamed = False
        for record in self._registry.rename():
            self._reordered = True
            if self.config.weights:
                resolved.update(record.legs)
        self._tells += [Tell("path-new", {**_named(record), "plane": record.plane}) for record in self._born]
        self._born.clear()

    def _judge(self, now: float) -> dict[Legs, None]:
        """Bring all touched paths, and those whose hold is over, up to date; returns the legs that stand on them."""
        affected: dict[Legs, None] = {}
        self._retry_gray(now)
        touched = {*self._touched, *self._due(now)}
        # Whether a gray path can be spared hangs on how the others are: those first.
        if touched:
            touched.update(record for record in self._registry if record.gray.until is not None)
        for record in sorted(touched, key=lambda record: (record.gray.until is not None, record.id)):
            if record in self._held_down:
                self._held_down.discard(record)
                self._bfd.assume_seen(record)
            record.health.judge(self._failure(record), now, record.bfd_up_since)
            if record.health.failing is Reason.NONE:
                record.bfd_up_since = None
            unseen = self._neighbour_failed(record) or self._bfd_reason(record) is not Reason.NONE
            if record.health.hold_until is None:
                record.fib_dead = unseen
            state, reason = self._state(record)
            if state is PathState.DOWN and record.gray.until is None:
                record.gray.forgive()
            if (state, reason) != (record.state, record.reason):
                self._change(record, state, reason, now)
            affected.update(record.legs)
        self._touched.clear()
        self._kernel_ns.clear()
        return affected

    def _due(self, now: float) -> Iterable[PathRecord]:
        return (
            record
            for record in self._registry
            if record.health.hold_until is not None and now >= record.health.hold_until
        )

    def _failure(self, record: PathRecord) -> Reason:
        """The worst that speaks against the path."""
        link = self._link_names.get(record.key.interface)
        if link is None:
            return Reason.LINK_GONE
        if not link.up:
            return Reason.LINK_DOWN
        if record.dead_legs:
            return Reason.NEXT_HOP_DEAD
        if self._neighbour_failed(record):
            return Reason.NEIGHBOUR_FAILED
        return self._bfd_reason(record)

    def _neighbour_failed(self, record: PathRecord) -> bool:
        """The address that packets are sent to does not answer; or one that routes use, and BFD sees nobody alive."""
        if self._neighbours.failed(record.ifindex, record.key.address):
            return True
        if not any(self._neighbours.failed(record.ifindex, address) for address in record.uses):
            return False
        return not (self.config.bfd and self._bfd.is_up(record))

    def _bfd_reason(self, record: PathRecord) -> Reason:
        return self._bfd.verdict(record, self._neighbours.kin(record)) if self.config.bfd else Reason.NONE

    def _state(self, record: PathRecord) -> tuple[PathState, Reason]:
        if record.health.failing is not Reason.NONE:
            return PathState.DOWN, record.health.failing
        if record.drained:
            return PathState.DRAINED, Reason.DRAINED
        if not record.legs:
            return PathState.DOWN, Reason.NO_ROUTE
        if record.health.hold_until is not None:
            return PathState.HOLD, Reason.HOLD_UP
        if record.gray.until is not None and self._spared(record):
            return PathState.DRAINED, Reason.GRAY
        return PathState.UP, Reason.NONE

    def _change(self, record: PathRecord, state: PathState, reason: Reason, now: float) -> None:
        before, record.state = record.state, state
        if before is not state:
            record.since = now
        told = before is not state or (state is PathState.DOWN and record.reason is Reason.NO_ROUTE)
        was, record.reason = record.reason, reason
        kind = _KINDS.get(state)
        if state is PathState.DRAINED and (before is PathState.DOWN or reason is Reason.GRAY):
            kind = "path-drained"
        if before is PathState.DRAINED and state is PathState.UP and was is not Reason.GRAY:
            kind = None  # told as path-undrained when it was asked for
        if kind is None or not told:
            return
        detail = {**_named(record), "reason": reason.value}
        if record.health.hold_until is not None and state is PathState.HOLD:
            detail |= {"hold_s": round(record.health.hold_until - now, 3), "flaps": record.health.flaps}
        self._tells.append(Tell(kind, detail, self._kernel_ns.get(record.id)))

    def _rekey(self, resolved: Iterable[Legs]) -> None:
        """Which group the legs' prefixes belong to."""
        for legs in resolved:
            weights: dict[int, int] = {}
            if not legs.left_out:
                for record, hop in legs.members:
                    weights[record.id] = record.weight or weights.get(record.id, 0) + max(hop.weight, 1)
            if weights and not self.config.weights:
                unit = gcd(*weights.values())
                weights = {path: weight // unit for path, weight in weights.items()}
            key = frozenset((path, min(weight, WEIGHT_MAX)) for path, weight in weights.items()) or None
            if key is None:
                self._keyless[legs] = None
            else:
                self._keyless.pop(legs, None)
            if key != legs.key:
                legs.key = key
                self._prefixes.update(legs.prefixes)

    # --- operations -------------------------------------------------------------------------------------------------

    def _life(self) -> tuple[list[Operation], list[Operation]]:
        word = 0
        for record in self._registry:
            if record.state is PathState.UP:
                word |= 1 << record.id
                record.served = True
        return self._written.settle_life(word)

    def _settle_overrides(self, legs: Iterable[Legs]) -> list[Operation]:
        changed = {**self._prefixes, **self._routes.moved}
        for some in legs:
            if override.refresh(some):
                changed.update(some.prefixes)
        operations = self._overrides.settle(changed, self._routes)
        written = [prefix for op in operations if isinstance(op, WriteOverrides) for prefix in op.routes]
        erased = [prefix for op in operations if isinstance(op, EraseOverrides) for prefix in op.prefixes]
        if written:
            dead = sorted(record.name for record in self._registry if record.fib_dead)
            self._tells.append(Tell("override-set", {"destinations": len(written), "paths": dead}))
        if erased:
            detail = {"destinations": len(erased), "left": len(self._overrides.written)}
            self._tells.append(Tell("override-cleared", detail))
        return operations

    def _write_paths(self) -> tuple[list[Operation], list[Operation]]:
        if not self._relinked:
            return [], []
        return self._written.settle_paths(
            self._registry.view(record) for record in self._registry if record.ifindex
        )

    def _settle_uplinks(self) -> list[Operation]:
        if not self._relinked:
            return []
        self._relinked = False
        if self.config.uplinks is None:
            names = {record.key.interface for record in self._registry}
        else:
            names = set(self.config.uplinks)
        links = [
            link for link in map(self._link_names.get, sorted(names)) if link and self._may_be_uplink(link)
        ]
        return self._written.settle_uplinks({link.ifindex: link.name for link in links})

    def _settle_groups(self, uplinks_changed: bool) -> list[Operation]:
        """Groups, tables and destinations for all prefixes that must be looked at again."""
        wanted: dict[Network, Target] = {}
        for prefix in (*self._prefixes, *self._routes.moved):
            legs = self._routes.legs_of.get(prefix)
            wanted[prefix] = legs.key if legs else None
        if wanted or uplinks_changed:
            self._shadow(wanted, uplinks_changed)
        self._prefixes.clear()
        self._routes.moved.clear()
        reorder, self._reordered = self._reordered, False
        if reorder:
            self._order = Order(
                self._registry.table_names(), {record.id: record.weight or 1 for record in self._registry}
            )
        if not wanted and not reorder and not (self._book.freed and self._book.starved):
            return []
        operations = self._book.settle(wanted, self._order, reorder)
        for group in self._book.changed:
            records = [(self._registry.by_id(path), weight) for path, weight in group.weights.items()]
            weights = {record.name: weight for record, weight in records if record is not None}
            self._tells.append(Tell("group-changed", {"group": group.id, "paths": weights}))
        return operations

    def _shadow(self, wanted: dict[Network, Target], uplinks_changed: bool) -> None:
        """What is the kernel's business, but leaves by an uplink, must not fall to a shorter prefix's group."""
        lengths = {version: set(self._book.lengths(version)) for version in (4, 6)}
        for prefix, target in wanted.items():
            if target is not None:
                lengths[prefix.version].add(prefix.prefixlen)
        for legs in self._keyless:
            outside = not any(hop.ifindex in self._written.uplinks for hop in legs.next_hops)
            if outside and not uplinks_changed:
                continue
            for prefix in legs.prefixes:
                hidden = not outside and self._covered(prefix, lengths[prefix.version])
                wanted[prefix] = NO_GROUP if hidden else None

    def _covered(self, prefix: Network, lengths: Iterable[int]) -> bool:
        """A shorter prefix has a group."""
        for length in lengths:
            if length < prefix.prefixlen:
                legs = self._routes.legs_of.get(prefix.supernet(new_prefix=length))
                if legs is not None and legs.key is not None:
                    return True
        return False

    def _settle_neighbours(self) -> list[Operation]:
        """By which path frames come in, and whose life a BFD session tells: of two on one key, the one with routes."""
        if not self._remapped:
            return []
        self._remapped = False
        macs: dict[tuple[int, str], int] = {}
        next_hops: dict[tuple[int, Address], int] = {}
        for record in sorted(self._registry, key=lambda record: (bool(record.legs), -record.id)):
            guard = self._bfd.guard_of(record)
            for address in record.addresses:
                mac = self._neighbours.mac(record.ifindex, address)
                if mac:
                    macs[record.ifindex, mac] = record.id
                if record.ifindex and self.config.bfd and guard in {None, address}:
                    next_hops[record.ifindex, address] = record.id
        return self._written.settle_neighbours(macs, next_hops)

    def _tell_limits(self) -> None:
        limits = set(self._book.limits)
        if self._book.starved:
            limits |= self._told_limits - {"paths"}
        if any(legs.left_out for legs in self._keyless):
            limits.add("paths")
        for limit in sorted(limits - self._told_limits):
            self._tells.append(Tell("limit-reached", {"limit": limit, "max": _LIMITS[limit]}))
        self._told_limits = limits

    # --- what counts ------------------------------------------------------------------------------------------------

    def _eligible(self, route: Route) -> bool:
        """Whether a route is the fabric's."""
        if route.protocol == self.config.own_protocol:
            return False
        if self.config.uplinks is None:
            return route.protocol in ROUTING_PROTOCOLS
        return route.protocol != RTPROT_KERNEL

    def _may_be_uplink(self, link: Link) -> bool:
        if self.config.uplinks is None:
            return link.kind not in NO_UPLINK_KINDS and link.name != "lo"
        return link.name in self.config.uplinks

    def _adopt(self, number: int, key: NextHopKey, adopted: Adopted) -> None:
        record = self._registry.add(key, 0.0, number)
        assert record is not None
        self._written.adopt(number)
        record.served = True
        record.drained = key in adopted.drained
        if adopted.living is not None and not record.drained and not adopted.living >> number & 1:
            self._held_down.add(record)


def _named(record: PathRecord) -> dict[str, Any]:
    return {
        "path": record.name,
        "id": record.id,
        "interface": record.key.interface,
        "next_hop": str(record.key.address),
    }
