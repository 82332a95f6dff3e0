"""The main table as the planner sees it: which next hops count for each prefix, and which prefixes share them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qpd.model import Network, NextHop, Route

if TYPE_CHECKING:
    from qpd.core.paths import PathRecord

GroupKey = frozenset[tuple[int, int]]
"""What makes a group the same group: pairs of path id and weight."""


class Legs:
    """A set of next hops that any number of prefixes share: thousands of routes are a handful of these."""

    __slots__ = ("eligible", "key", "left_out", "members", "next_hops", "override", "prefixes")

    def __init__(self, next_hops: tuple[NextHop, ...], eligible: bool) -> None:
        self.next_hops = next_hops
        self.eligible = eligible
        self.prefixes: dict[Network, None] = {}
        self.members: tuple[tuple[PathRecord, NextHop], ...] = ()
        """Its legs that are paths."""
        self.key: GroupKey | None = None
        """The group that its prefixes belong to; None: they are the kernel's business."""
        self.left_out = False
        """A leg found no free path id."""
        self.override: tuple[NextHop, ...] | None = None
        """What its prefixes' override routes hold; None: they need none."""


class RouteTable:
    """Routes by prefix. Of several metrics the lowest counts (all others only wait).

    ``moved`` collects the prefixes whose legs changed and ``fresh`` the legs that are new, until they are taken.
    """

    def __init__(self, eligible: Callable[[Route], bool]) -> None:
        self.legs_of: dict[Network, Legs] = {}
        self.by_ifindex: dict[int, dict[Legs, None]] = {}
        self.moved: dict[Network, None] = {}
        self.fresh: dict[Legs, None] = {}
        self.emptied: dict[Legs, None] = {}
        self._eligible = eligible
        self._routes: dict[Network, tuple[Route, ...]] = {}
        self._legs: dict[tuple[bool, tuple[NextHop, ...]], Legs] = {}
        self._sorted: list[tuple[int, int, int, Network]] | None = None

    def put(self, route: Route) -> None:
        """A route is new or replaces the one of its prefix and metric."""
        routes = self._routes.get(route.prefix)
        if routes is None:
            self._sorted = None
            self._set(route.prefix, (route,))
        else:
            others = [other for other in routes if other.metric != route.metric]
            self._set(route.prefix, tuple(sorted([*others, route], key=_metric)))

    def drop(self, prefix: Network, metric: int) -> None:
        """A route is gone."""
        routes = self._routes.get(prefix)
        if routes is None:
            return
        rest = tuple(route for route in routes if route.metric != metric)
        if rest:
            self._set(prefix, rest)
        else:
            self._unset(prefix)

    def replace(self, routes: Iterable[Route]) -> None:
        """All routes anew."""
        table: dict[Network, tuple[Route, ...]] = {}
        for route in routes:
            others = table.setdefault(route.prefix, (route,))
            if others[0] is not route:
                kept = [other for other in others if other.metric != route.metric]
                table[route.prefix] = tuple(sorted([*kept, route], key=_metric))
        for prefix in [known for known in self._routes if known not in table]:
            self._unset(prefix)
        for prefix, candidates in table.items():
            self._set(prefix, candidates)
        self._sorted = None

    def release(self) -> list[Legs]:
        """Forget the legs that no prefix uses any more, and return them."""
        unused = [legs for legs in self.emptied if not legs.prefixes]
        self.emptied.clear()
        for legs in unused:
            del self._legs[legs.eligible, legs.next_hops]
            self.fresh.pop(legs, None)
            for hop in legs.next_hops:
                standing = self.by_ifindex.get(hop.ifindex)
                if standing is not None:
                    standing.pop(legs, None)
                    if not standing:
                        del self.by_ifindex[hop.ifindex]
        return unused

    def nested(self) -> list[tuple[int, int, int, Network]]:
        """(version, first address, length, prefix) of all prefixes, each before those inside it."""
        if self._sorted is None:
            self._sorted = sorted(
                (prefix.version, int(prefix.network_address), prefix.prefixlen, prefix)
                for prefix in self._routes
            )
        return self._sorted

    def _set(self, prefix: Network, routes: tuple[Route, ...]) -> None:
        self._routes[prefix] = routes
        best = routes[0]
        eligible = self._eligible(best)
        legs = self._legs.get((eligible, best.next_hops))
        before = self.legs_of.get(prefix)
        if legs is None:
            legs = self._legs[eligible, best.next_hops] = Legs(best.next_hops, eligible)
            self.fresh[legs] = None
            for hop in best.next_hops:
                self.by_ifindex.setdefault(hop.ifindex, {})[legs] = None
        elif legs is before:
            return
        self._leave(prefix, before)
        self.legs_of[prefix] = legs
        legs.prefixes[prefix] = None
        self.moved[prefix] = None

    def _unset(self, prefix: Network) -> None:
        del self._routes[prefix]
        self._sorted = None
        self._leave(prefix, self.legs_of.pop(prefix))
        self.moved[prefix] = None

    def _leave(self, prefix: Network, legs: Legs | None) -> None:
        if legs is not None:
            del legs.prefixes[prefix]
            if not legs.prefixes:
                self.emptied[legs] = None


def _metric(route: Route) -> int:
    return route.metric
