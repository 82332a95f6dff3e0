"""What the kernel holds of paths, uplinks and neighbours, and what must be written until it holds what is wanted. Pure.

As with :class:`qpd.core.groups.GroupBook` and :class:`qpd.core.override.OverrideBook`, an operation that was given out
counts as done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qpd.core.config import Adopted
from qpd.model import (
    Address,
    AttachUplink,
    DetachUplink,
    ErasePath,
    Operation,
    Path,
    SetLiving,
    WriteNeighbours,
    WriteNextHops,
    WritePath,
)


class Written:
    """What has been written. ``adopted``: what an earlier daemon has left; its paths are written again."""

    def __init__(self, adopted: Adopted) -> None:
        self.word = adopted.living or 0
        """The word of living paths."""
        self.uplinks: Mapping[int, str] = {}
        """Interfaces that carry the classifier, by index."""
        self._word_is_ours = False
        self._paths: dict[int, tuple[int, bool, Address] | None] = {}
        self._uplinks_found = dict(adopted.uplinks)
        self._macs: Mapping[tuple[int, str], int] | None = None
        self._next_hops: Mapping[tuple[int, Address], int] | None = None

    def adopt(self, path_id: int) -> None:
        """The kernel has an entry of this path, with whatever is in it."""
        self._paths[path_id] = None

    def settle_life(self, word: int) -> tuple[list[Operation], list[Operation]]:
        """The word of living paths: what dies at once, what lives once everything it may point to is written."""
        surviving = self.word & word
        dead: list[Operation] = [SetLiving(surviving)] if surviving != self.word else []
        living: list[Operation] = [SetLiving(word)] if word != surviving or not self._word_is_ours else []
        self.word, self._word_is_ours = word, True
        return dead, living

    def settle_paths(self, paths: Iterable[Path]) -> tuple[list[Operation], list[Operation]]:
        """Entries that must be there before groups use them, and those that may claim to be alone only afterwards."""
        early: list[Operation] = []
        late: list[Operation] = []
        for path in paths:
            before = self._paths.get(path.id)
            now = (path.ifindex, path.sole, path.next_hop)
            if before is not None and before[1] < path.sole:
                if (before[0], before[2]) != (now[0], now[2]):
                    early.append(WritePath(replace(path, sole=False)))
                late.append(WritePath(path))
            elif before != now:
                early.append(WritePath(path))
            self._paths[path.id] = now
        return early, late

    def erase_path(self, path_id: int) -> list[Operation]:
        """Nothing points to this path any more."""
        if path_id not in self._paths:
            return []
        del self._paths[path_id]
        return [ErasePath(path_id)]

    def settle_uplinks(self, wanted: Mapping[int, str]) -> list[Operation]:
        """Put the classifier on these interfaces, by index, and take it off all others."""
        attached: list[Operation] = [
            AttachUplink(ifindex, name)
            for ifindex, name in wanted.items()
            if self.uplinks.get(ifindex) != name
        ]
        detached: list[Operation] = [
            DetachUplink(ifindex, name)
            for ifindex, name in {**self._uplinks_found, **self.uplinks}.items()
            if ifindex not in wanted
        ]
        self._uplinks_found = {}
        self.uplinks = wanted
        return attached + detached

    def settle_neighbours(
        self, macs: Mapping[tuple[int, str], int], next_hops: Mapping[tuple[int, Address], int]
    ) -> list[Operation]:
        """Whose frames and whose BFD sessions are which path's, by interface."""
        operations: list[Operation] = []
        if macs != self._macs:
            operations.append(WriteNeighbours(dict(macs)))
        if next_hops != self._next_hops:
            operations.append(WriteNextHops(dict(next_hops)))
        self._macs, self._next_hops = macs, next_hops
        return operations
