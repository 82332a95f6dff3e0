"""Groups, their slot tables and their destinations: what should be written, against what is.

Everything is written before anything points to it, and nothing is erased while something does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

import numpy as np
import numpy.typing as npt

from qpd.core.config import Adopted
from qpd.core.routes import GroupKey
from qpd.core.slots import slot_table
from qpd.model import (
    DESTINATIONS_MAX,
    GROUPS_MAX,
    NO_GROUP,
    NO_PATH,
    PATHS_MAX,
    SLOTS,
    TABLES_MAX,
    EraseDestinations,
    EraseGroup,
    Group,
    Network,
    Operation,
    RaiseGeneration,
    WriteDestinations,
    WriteGroup,
    WriteTable,
)

TableKey = tuple[tuple[str, int, int], ...]
"""What makes a slot table the same table: (name, weight, path id) of every path of the node."""

Target = GroupKey | int | None
"""What a prefix should be: a group, NO_GROUP, or None for no entry."""

NO_TABLE = -1

_TABLES_IN_USE_MAX = TABLES_MAX - 1
"""One table stays free, so that a new one can be written while the old one still serves."""


def group_key(weights: Mapping[int, int]) -> GroupKey:
    """The key of a group with these members."""
    return frozenset(weights.items())


@dataclass(frozen=True, slots=True)
class Order:
    """How slot tables see the node: path id to name, and the weight of paths that are no members."""

    names: Mapping[int, str]
    weights: Mapping[int, int]

    def key(self, members: GroupKey) -> TableKey:
        """The table that a group reads: its own members' weights, all other paths with their own."""
        weights = {**self.weights, **dict(members)}
        unit = gcd(*(weights[path] for path in self.names))
        return tuple(sorted((self.names[path], weights[path] // unit, path) for path in self.names))


@lru_cache(maxsize=32)
def _orders_of_planes(weights: tuple[tuple[str, int], ...]) -> npt.NDArray[np.uint8]:
    return slot_table(dict(weights))


def orders(key: TableKey) -> npt.NDArray[np.uint8]:
    """The slot table as the kernel reads it: uint8[4096, 64], path ids best first, padded with NO_PATH."""
    table = np.full((SLOTS, PATHS_MAX), NO_PATH, np.uint8)
    ids = np.array([path for _, _, path in key], np.uint8)
    table[:, : len(key)] = ids[_orders_of_planes(tuple((name, weight) for name, weight, _ in key))]
    return table


class GroupBook:
    """What is written of groups, tables and destinations, and the operations that bring it to what is wanted."""

    def __init__(self, adopted: Adopted) -> None:
        self.destinations: dict[Network, int] = dict(adopted.destinations)
        """Prefix to group id, as written; NO_GROUP: a prefix that must not fall to a shorter one's group."""
        self.starved: dict[Network, Target] = {}
        """Prefixes that a limit left out, and what they should be."""
        self.limits: set[str] = set()
        """The limits that left something out in the last ``settle``: groups, tables, destinations."""
        self.changed: list[Group] = []
        """Groups whose members the last ``settle`` wrote; those it erased have none."""
        self.freed = False
        """Something became free in the last ``settle``: what starves may be tried again."""
        self._groups: dict[int, Group] = {
            number: replace(group, destinations=()) for number, group in adopted.groups.items()
        }
        self._keys = {number: group_key(group.weights) for number, group in self._groups.items()}
        self._by_key = {key: number for number, key in reversed(self._keys.items())}
        self._sizes = Counter(dict.fromkeys(self._groups, 0))
        self._lengths: Counter[tuple[int, int]] = Counter()
        for prefix, number in self.destinations.items():
            self._sizes[number] += 1
            self._lengths[prefix.version, prefix.prefixlen] += 1
        self._users = Counter(group.table for group in self._groups.values())
        self._found = dict(adopted.tables)
        self._tables: dict[TableKey, int] = {}
        self._table_keys: dict[int, TableKey] = {}
        self._orders: dict[int, npt.NDArray[np.uint8]] = {}

    # --- what there is ----------------------------------------------------------------------------------------------

    def view(self) -> tuple[Group, ...]:
        """All groups with their destinations, by id."""
        prefixes: dict[int, list[Network]] = {number: [] for number in self._groups}
        for prefix, number in self.destinations.items():
            if number in prefixes:
                prefixes[number].append(prefix)
        return tuple(
            replace(self._groups[number], destinations=tuple(prefixes[number]))
            for number in sorted(self._groups)
        )

    def group(self, number: int) -> Group | None:
        """One group, without its destinations."""
        return self._groups.get(number)

    def orders(self, table: int) -> npt.NDArray[np.uint8] | None:
        """The slot table of this number, as written."""
        return self._orders.get(table, self._found.get(table))

    def lengths(self, version: int) -> list[int]:
        """The prefix lengths of all written destinations, longest first."""
        # A copy: the census asks from another thread.
        lengths = list(self._lengths.items())
        found = [length for (family, length), uses in lengths if family == version and uses]
        return sorted(found, reverse=True)

    # --- what should be ---------------------------------------------------------------------------------------------

    def settle(self, wanted: Mapping[Network, Target], order: Order, reorder: bool) -> list[Operation]:
        """Bring these prefixes to what is wanted, and what starved as well once something is free.

        ``reorder``: paths, planes or weights changed, so that every group's table is looked at again.
        """
        if self.freed:
            wanted = {**self.starved, **wanted}
        self.changed, self.limits, self.freed = [], set(), False
        moves = self._moves(wanted)
        touched = self._rename(moves)
        changes = self._numbered(moves, touched)
        self._keep_longest(changes)
        tables = self._place_tables(changes, touched, order, reorder)
        destinations = self._write(changes)
        operations = tables + destinations
        if destinations or any(isinstance(operation, WriteGroup) for operation in tables):
            operations.append(RaiseGeneration())
        return operations + self._erase_unused()

    def _moves(self, wanted: Mapping[Network, Target]) -> dict[tuple[int | None, Target], list[Network]]:
        """Which prefixes change from which group (None: no entry) to which target."""
        moves: dict[tuple[int | None, Target], list[Network]] = {}
        for prefix, target in wanted.items():
            self.starved.pop(prefix, None)
            number = self.destinations.get(prefix)
            now = number if number is None or number == NO_GROUP else self._keys.get(number)
            if now != target or (number is not None and now is None):
                moves.setdefault((number, target), []).append(prefix)
        return moves

    def _rename(self, moves: dict[tuple[int | None, Target], list[Network]]) -> set[int]:
        """Where all prefixes of a group become one new group, the group itself changes: one write, no destination."""
        touched: set[int] = set()
        for (number, target), prefixes in list(moves.items()):
            if (
                isinstance(target, frozenset)
                and target not in self._by_key
                and number in self._groups
                and len(prefixes) == self._sizes[number]
            ):
                self._forget_key(number)
                self._name(number, target)
                touched.add(number)
                del moves[number, target]
        return touched

    def _numbered(
        self, moves: Mapping[tuple[int | None, Target], list[Network]], touched: set[int]
    ) -> dict[Network, int | None]:
        """Each moving prefix's group id (None: no entry); new groups get ids and join ``touched``."""
        changes: dict[Network, int | None] = {}
        for (_, target), prefixes in moves.items():
            number: int | None
            if isinstance(target, frozenset):
                number = self._by_key.get(target)
                if number is None:
                    number = next((n for n in range(GROUPS_MAX) if n not in self._groups), None)
                    if number is None:
                        self.limits.add("groups")
                        self.starved.update(dict.fromkeys(prefixes, target))
                        number = NO_GROUP
                    else:
                        self._groups[number] = Group(number, {}, NO_TABLE)
                        self._name(number, target)
                        touched.add(number)
            else:
                number = target
            changes.update(dict.fromkeys(prefixes, number))
        return changes

    def _keep_longest(self, changes: dict[Network, int | None]) -> None:
        """Hold to the limit of destinations by leaving out the shortest prefixes.

        A packet of a prefix that is left out then never matches a shorter one that is not.
        """
        count = len(self.destinations)
        for prefix, number in changes.items():
            count += (number is not None) - (prefix in self.destinations)
        if count <= DESTINATIONS_MAX:
            return
        self.limits.add("destinations")
        after = {
            prefix: number
            for prefix, number in {**self.destinations, **changes}.items()
            if number is not None
        }
        for prefix in sorted(after, key=_shortest_first)[: count - DESTINATIONS_MAX]:
            number = after[prefix]
            self.starved.setdefault(prefix, self._keys.get(number, NO_GROUP))
            changes[prefix] = None

    def _place_tables(
        self, changes: dict[Network, int | None], touched: set[int], order: Order, reorder: bool
    ) -> list[Operation]:
        """Write the tables that are needed, one after the other, and switch groups to them."""
        sizes = Counter(self._sizes)
        for prefix, number in changes.items():
            sizes[self.destinations.get(prefix, NO_GROUP)] -= 1
            sizes[NO_GROUP if number is None else number] += 1
        users: dict[TableKey, list[int]] = {}
        for number in self._groups:
            if sizes[number] > 0 and (reorder or number in touched):
                users.setdefault(order.key(self._keys[number]), []).append(number)
        kept = {
            self._groups[number].table
            for number in self._groups
            if sizes[number] > 0 and not (reorder or number in touched)
        }
        operations: list[Operation] = []
        waiting = sorted(users, key=lambda key: key not in self._tables)
        refused = []
        for key in waiting:
            known = self._tables.get(key)
            if known not in kept and len(kept) >= _TABLES_IN_USE_MAX:
                refused.append(key)
            else:
                kept.add(-len(kept) - 1 if known is None else known)
        waiting = [key for key in waiting if key not in refused]
        while waiting:
            blocked = [key for key in waiting if not self._switch(key, users[key], touched, operations)]
            if len(blocked) == len(waiting):
                refused += blocked
                break
            waiting = blocked
        self._refuse({number for key in refused for number in users[key]}, changes)
        return operations

    def _switch(
        self, key: TableKey, users: list[int], touched: set[int], operations: list[Operation]
    ) -> bool:
        """Make the table exist and let the groups read it; False: no table is free."""
        table = self._tables.get(key)
        if table is None:
            wanted = orders(key)
            table = self._found_like(wanted)
            if table is None:
                table = next((n for n in range(TABLES_MAX) if not self._users[n]), None)
                if table is None:
                    return False
                self._release(table)
                operations.append(WriteTable(table, wanted))
            self._found.pop(table, None)
            self._tables[key], self._table_keys[table], self._orders[table] = table, key, wanted
        for number in users:
            before = self._groups[number]
            if number not in touched and before.table == table:
                continue
            self._users[table] += 1
            if before.table != NO_TABLE:
                self._users[before.table] -= 1
                self.freed |= not self._users[before.table]
            group = Group(number, dict(sorted(self._keys[number])), table)
            self._groups[number] = group
            operations.append(WriteGroup(group))
            if number in touched:
                self.changed.append(group)
        return True

    def _found_like(self, wanted: npt.NDArray[np.uint8]) -> int | None:
        """The number of a table that an earlier daemon left and that is just the one wanted."""
        return next((n for n, found in self._found.items() if np.array_equal(found, wanted)), None)

    def _release(self, table: int) -> None:
        """The table's content is about to go."""
        key = self._table_keys.pop(table, None)
        if key is not None:
            del self._tables[key]
        self._orders.pop(table, None)
        self._found.pop(table, None)

    def _refuse(self, numbers: set[int], changes: dict[Network, int | None]) -> None:
        """No table for these groups: all their destinations are left out."""
        if not numbers:
            return
        self.limits.add("tables")
        for prefix, number in {**self.destinations, **changes}.items():
            if number in numbers:
                self.starved[prefix] = self._keys[number]
                changes[prefix] = NO_GROUP

    def _write(self, changes: Mapping[Network, int | None]) -> list[Operation]:
        erased = tuple(
            prefix for prefix, number in changes.items() if number is None and prefix in self.destinations
        )
        written = {
            prefix: number
            for prefix, number in changes.items()
            if number is not None and self.destinations.get(prefix) != number
        }
        for prefix in erased:
            self._sizes[self.destinations.pop(prefix)] -= 1
            self._lengths[prefix.version, prefix.prefixlen] -= 1
        for prefix, number in written.items():
            before = self.destinations.get(prefix)
            if before is None:
                self._lengths[prefix.version, prefix.prefixlen] += 1
            else:
                self._sizes[before] -= 1
            self._sizes[number] += 1
        self.destinations.update(written)
        self.freed |= bool(erased)
        # Erased first: the map may be full. What is erased falls to a shorter prefix, as it does in the main table.
        operations: list[Operation] = [EraseDestinations(erased)] if erased else []
        if written:
            operations.append(WriteDestinations(written))
        return operations

    def _erase_unused(self) -> list[Operation]:
        operations: list[Operation] = []
        for number in [number for number in self._groups if self._sizes[number] <= 0]:
            group = self._groups.pop(number)
            self._forget_key(number)
            del self._keys[number], self._sizes[number]
            self.freed = True
            if group.table != NO_TABLE:
                self._users[group.table] -= 1
                self.changed.append(Group(number, {}, group.table))
                operations.append(EraseGroup(number))
        return operations

    def _name(self, number: int, key: GroupKey) -> None:
        self._keys[number] = key
        self._by_key[key] = number

    def _forget_key(self, number: int) -> None:
        """Earlier daemons may have left two groups of one key: only the one that is found by it loses it."""
        if self._by_key.get(self._keys[number]) == number:
            del self._by_key[self._keys[number]]


def _shortest_first(prefix: Network) -> tuple[int, int, int]:
    return prefix.prefixlen + (0 if prefix.version == 6 else 96), prefix.version, -int(prefix.network_address)
