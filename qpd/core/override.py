"""The FIB override: routes of the survivors, for all that is not RoCE, until zebra has converged.

A rule finds the own table before main. So a route in it hides every longer prefix of main: those inside an overridden
prefix get a ``throw`` route, which sends the look-up on to main.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qpd.core.routes import Legs, RouteTable
from qpd.model import EraseOverrides, Network, NextHop, Operation, Reason, WriteOverrides

THROW: tuple[NextHop, ...] = ()
_HOST = {4: 32, 6: 128}


def survivors(legs: Legs) -> tuple[NextHop, ...] | None:
    """What the override routes of these legs hold; None: none is needed, or none can be.

    Needed while a leg is dead that the main table cannot know to be (BFD, neighbour), and until it serves again. A leg
    that is well but still held counts only where there is no better one.
    """
    if legs.key is None or not any(record.fib_dead for record, _ in legs.members):
        return None
    if any(hop.connected for hop in legs.next_hops):
        return None
    health = {hop: record.health for record, hop in legs.members}
    usable = [
        hop
        for hop in legs.next_hops
        if hop.alive and (hop not in health or health[hop].failing is Reason.NONE)
    ]
    best = tuple(hop for hop in usable if hop not in health or health[hop].serving) or tuple(usable)
    return best if 0 < len(best) < len(legs.next_hops) else None


class OverrideBook:
    """What the own table holds, and the operations that bring it to what is wanted."""

    def __init__(self, found: Mapping[Network, tuple[NextHop, ...]]) -> None:
        self.written: dict[Network, tuple[NextHop, ...]] = dict(found)
        self._wide = {prefix for prefix, hops in found.items() if hops != THROW and _holds_others(prefix)}
        self._throws = any(hops == THROW for hops in found.values())

    def settle(self, changed: Iterable[Network], routes: RouteTable) -> list[Operation]:
        """Look at these prefixes again, and at what must be shielded inside overridden ones."""
        legs_of = routes.legs_of
        wanted = {prefix: legs_of[prefix].override if prefix in legs_of else None for prefix in changed}
        if not wanted:
            return []
        if (
            self._wide
            or self._throws
            or any(hops and _holds_others(prefix) for prefix, hops in wanted.items())
        ):
            self._shield(wanted, routes)
        return self._write(wanted)

    def _shield(self, wanted: dict[Network, tuple[NextHop, ...] | None], routes: RouteTable) -> None:
        """Throw for every prefix right inside an overridden one."""
        throws: set[Network] = set()
        around: list[tuple[int, int, bool]] = []
        for version, first, length, prefix in routes.nested():
            last = first | (1 << _HOST[version] - length) - 1
            while around and (around[-1][0] != version or around[-1][1] < first):
                around.pop()
            overridden = routes.legs_of[prefix].override is not None
            if around and around[-1][2] and not overridden:
                throws.add(prefix)
            around.append((version, last, overridden))
        for prefix, hops in self.written.items():
            if hops == THROW:
                legs = routes.legs_of.get(prefix)
                wanted[prefix] = legs.override if legs else None
        wanted.update(dict.fromkeys(throws, THROW))
        self._throws = bool(throws)

    def _write(self, wanted: Mapping[Network, tuple[NextHop, ...] | None]) -> list[Operation]:
        written = {
            prefix: hops
            for prefix, hops in wanted.items()
            if hops is not None and self.written.get(prefix) != hops
        }
        erased = [prefix for prefix, hops in wanted.items() if hops is None and prefix in self.written]
        self.written.update(written)
        for prefix in erased:
            del self.written[prefix]
        if self._wide:
            self._wide.difference_update(wanted)
        self._wide.update(prefix for prefix, hops in wanted.items() if hops and _holds_others(prefix))
        operations: list[Operation] = []
        # No longer prefix is hidden in between: throws before what they shield from, which goes before they do.
        throws = {prefix: hops for prefix, hops in written.items() if hops == THROW}
        routes = {prefix: hops for prefix, hops in written.items() if hops != THROW} if throws else written
        if throws:
            operations.append(WriteOverrides(throws))
        if routes:
            operations.append(WriteOverrides(routes))
        if erased:
            operations.append(EraseOverrides(tuple(sorted(erased, key=_length))))
        return operations


def _holds_others(prefix: Network) -> bool:
    """Longer prefixes may lie inside this one."""
    return prefix.prefixlen < _HOST[prefix.version]


def _length(prefix: Network) -> int:
    return prefix.prefixlen


def refresh(legs: Legs) -> bool:
    """Work out the override of these legs anew; True: it changed."""
    override = survivors(legs)
    if override == legs.override:
        return False
    legs.override = override
    return True
