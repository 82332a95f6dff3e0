"""Interprets the planner's operations, so that a test asks "where does this packet leave?" at every step in between.

Whatever would be visible half-written, emitted twice or left behind fails at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network

import numpy as np
import numpy.typing as npt

from qpd.core.slots import choose, qp_hash, slot_of
from qpd.model import (
    DESTINATIONS_MAX,
    NO_GROUP,
    NO_PATH,
    PATHS_MAX,
    SLOTS,
    Address,
    AttachUplink,
    DetachUplink,
    EraseDestinations,
    EraseGroup,
    EraseOverrides,
    ErasePath,
    Group,
    Network,
    NextHop,
    NextHopKey,
    Operation,
    Path,
    QueuePairKey,
    RaiseGeneration,
    SetLiving,
    Tell,
    WriteDestinations,
    WriteGroup,
    WriteNeighbours,
    WriteNextHops,
    WriteOverrides,
    WritePath,
    WriteTable,
)


class FakeKernel:
    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}
        self.groups: dict[int, Group] = {}
        self.tables: dict[int, npt.NDArray[np.uint8]] = {}
        self.destinations: dict[Network, int] = {}
        self.living = 0
        self.living_written = False
        self.overrides: dict[Network, tuple[NextHop, ...]] = {}
        self.neighbours: dict[tuple[int, str], int] | None = None
        self.next_hops: dict[tuple[int, Address], int] | None = None
        self.uplinks: dict[int, str] = {}
        self.stale = False
        self.generation = 0
        self.tells: list[Tell] = []

    def apply(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            self.step(operation)
        assert not self.stale, "cached QPs were not told"

    def step(self, operation: Operation) -> None:  # noqa: C901, PLR0912, PLR0915
        match operation:
            case WritePath(path):
                assert path.ifindex
                assert path.id < PATHS_MAX
                before = self.paths.get(path.id)
                if before is not None:
                    same = before.interface == path.interface and before.next_hop in {
                        path.next_hop,
                        *path.aliases,
                    }
                    assert same, "an id changed its path without being erased"
                    assert written(before) != written(path)
                self.paths[path.id] = path
            case ErasePath(number):
                del self.paths[number]
                assert not self.living >> number & 1
                assert number not in (self.next_hops or {}).values(), (
                    "a BFD session tells of a path that is not there"
                )
                for group in self.groups.values():
                    assert number not in group.weights
                    assert not (self.tables[group.table] == number).any()
            case WriteTable(table, orders):
                assert all(group.table != table for group in self.groups.values()), (
                    "a table changed while read"
                )
                assert orders.shape == (SLOTS, PATHS_MAX)
                ids = set(np.unique(orders).tolist()) - {NO_PATH}
                assert (np.sort(orders[:, : len(ids)], axis=1) == np.array(sorted(ids))).all()
                assert (orders[:, len(ids) :] == NO_PATH).all()
                self.tables[table] = orders.copy()
            case WriteGroup(group):
                before_group = self.groups.get(group.id)
                assert before_group is None or (before_group.weights, before_group.table) != (
                    group.weights,
                    group.table,
                )
                assert group.weights
                assert all(
                    path in self.paths and 1 <= weight <= 0xFFFF for path, weight in group.weights.items()
                )
                assert set(group.weights) <= set(self.tables[group.table][0].tolist())
                self.groups[group.id] = group
                self.stale = True
            case EraseGroup(number):
                assert number not in self.destinations.values()
                assert not self.stale, "a cached QP may still look at this group"
                del self.groups[number]
            case WriteDestinations(groups):
                assert groups
                for prefix, number in groups.items():
                    assert number == NO_GROUP or number in self.groups
                    assert self.destinations.get(prefix) != number
                self.destinations.update(groups)
                assert len(self.destinations) <= DESTINATIONS_MAX
                self.stale = True
            case EraseDestinations(prefixes):
                assert prefixes
                for prefix in prefixes:
                    del self.destinations[prefix]
                self.stale = True
            case RaiseGeneration():
                assert self.stale, "raised for nothing"
                self.stale = False
                self.generation += 1
            case SetLiving(word):
                assert word != self.living or not self.living_written
                assert all(number in self.paths for number in range(PATHS_MAX) if word >> number & 1)
                self.living, self.living_written = word, True
            case WriteNeighbours(paths):
                assert paths != self.neighbours
                assert all(number in self.paths for number in paths.values())
                self.neighbours = dict(paths)
            case WriteNextHops(next_hops):
                assert next_hops != self.next_hops
                assert all(number in self.paths for number in next_hops.values())
                self.next_hops = dict(next_hops)
            case AttachUplink(ifindex, interface):
                assert self.uplinks.get(ifindex) != interface
                self.uplinks[ifindex] = interface
            case DetachUplink(ifindex, _):
                del self.uplinks[ifindex]
            case WriteOverrides(routes):
                assert routes
                for prefix, hops in routes.items():
                    assert self.overrides.get(prefix) != hops
                self.overrides.update(routes)
            case EraseOverrides(prefixes):
                assert prefixes
                for prefix in prefixes:
                    del self.overrides[prefix]
            case Tell():
                self.tells.append(operation)

    # --- where packets leave ----------------------------------------------------------------------------------------

    def group_of(self, address: Address) -> Group | None:
        prefix = longest_match(self.destinations, address)
        return None if prefix is None else self.groups.get(self.destinations[prefix])

    def usable(self, address: Address) -> int:
        group = self.group_of(address)
        return 0 if group is None else group.members & self.living

    def path_of(self, address: Address, dest_qp: int, home: int | None = None) -> int | None:
        """The path of a QP to this VTEP; None: the kernel's own choice."""
        group = self.group_of(address)
        if group is None:
            return None
        usable = group.members & self.living
        if home is not None and usable >> home & 1:
            return home
        slot = slot_of(qp_hash(QueuePairKey(100, address, dest_qp)))
        return choose(self.tables[group.table][slot].tolist(), usable)

    def key(self, number: int) -> NextHopKey:
        return self.paths[number].key

    def override_of(self, address: Address) -> tuple[Network, tuple[NextHop, ...]] | None:
        """What the own table answers; None: the look-up goes on to main."""
        prefix = longest_match(self.overrides, address)
        return None if prefix is None or not self.overrides[prefix] else (prefix, self.overrides[prefix])


def written(path: Path) -> tuple[object, ...]:
    """What the kernel holds of a path."""
    return path.ifindex, path.next_hop, path.sole


def longest_match(prefixes: Iterable[Network], address: Address) -> Network | None:
    host = ip_network(address)
    matching = [
        prefix
        for prefix in prefixes
        if prefix.version == host.version
        and int(address) >> (host.prefixlen - prefix.prefixlen)
        == int(prefix.network_address) >> (host.prefixlen - prefix.prefixlen)
    ]
    return max(matching, key=lambda prefix: prefix.prefixlen, default=None)
