"""Who sends which part of a vector to whom, and in which phase: what a collective operation is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from qpd.lab.errors import LabError


@dataclass(frozen=True)
class Transfer:
    """Elements [begin, end) of the vector go from one rank to another.

    With `reduce` the destination adds them to its own, else it takes them in place of its own. The source sends what
    it has once all that earlier phases bring it for these elements has arrived.
    """

    phase: int
    source: int
    destination: int
    begin: int
    end: int
    reduce: bool


@dataclass(frozen=True)
class Schedule:
    """All transfers of one iteration.

    After them every contributor has the sum of all contributors' vectors.
    """

    ranks: int
    contributors: tuple[int, ...]
    """The ranks that bring a vector and want the sum; the others begin with zeros."""
    elements: int
    phases: tuple[str, ...]
    """Their names."""
    transfers: tuple[Transfer, ...]

    @cached_property
    def after(self) -> tuple[tuple[int, ...], ...]:
        """For each transfer, those (by index) that must have arrived at its source before."""
        inbound: dict[int, list[int]] = {}
        for index, transfer in enumerate(self.transfers):
            inbound.setdefault(transfer.destination, []).append(index)
        return tuple(
            tuple(
                index
                for index in inbound.get(transfer.source, [])
                if (before := self.transfers[index]).phase < transfer.phase
                and before.begin < transfer.end
                and transfer.begin < before.end
            )
            for transfer in self.transfers
        )

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Source and destination of everything that is sent, in order of first use."""
        return tuple(dict.fromkeys((one.source, one.destination) for one in self.transfers))


def parts(begin: int, end: int, count: int) -> list[tuple[int, int]]:
    """A range in `count` parts that differ by one element at most."""
    size = end - begin
    edges = [begin + size * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def _step(
    members: Sequence[int], ranges: Sequence[tuple[int, int]], phase: int, shift: int, *, reduce: bool
) -> Iterable[Transfer]:
    """One step around a ring: member i sends part (i + shift) to member i + 1."""
    count = len(members)
    for index, rank in enumerate(members):
        begin, end = ranges[(index + shift) % count]
        yield Transfer(phase, rank, members[(index + 1) % count], begin, end, reduce)


def _reduce_scatter(members: Sequence[int], begin: int, end: int, phase: int) -> list[Transfer]:
    """Around a ring, n - 1 phases; then member i has the sum of part i + 1."""
    ranges = parts(begin, end, len(members))
    return [
        transfer
        for step in range(len(members) - 1)
        for transfer in _step(members, ranges, phase + step, -step, reduce=True)
    ]


def _all_gather(members: Sequence[int], begin: int, end: int, phase: int) -> list[Transfer]:
    """Around a ring, n - 1 phases, from where `_reduce_scatter` ends."""
    ranges = parts(begin, end, len(members))
    return [
        transfer
        for step in range(len(members) - 1)
        for transfer in _step(members, ranges, phase + step, 1 - step, reduce=False)
    ]


def _names(what: str, count: int) -> list[str]:
    return [f"{what} {index + 1}/{count}" for index in range(count)]


def ring(ranks: int, elements: int, chunks: int = 1) -> Schedule:
    """AllReduce around a ring: reduce-scatter, then all-gather; each rank sends 2 (n - 1) / n of the vector."""
    members = range(ranks)
    transfers = []
    for begin, end in parts(0, elements, chunks):
        transfers += _reduce_scatter(members, begin, end, 0) + _all_gather(members, begin, end, ranks - 1)
    names = _names("reduce-scatter", ranks - 1) + _names("all-gather", ranks - 1)
    return _schedule(ranks, members, elements, names, transfers)


def _depth(index: int) -> int:
    return (index + 1).bit_length() - 1


def tree(ranks: int, elements: int, chunks: int = 1) -> Schedule:
    """AllReduce over two binary trees, each for half of the vector; the second is the first with the ranks reversed.

    So the ranks that are leaves of one tree, and send little there, are mostly inner ones of the other.
    """
    depth = _depth(ranks - 1)
    transfers = []
    for half, (low, high) in enumerate(parts(0, elements, 2)):
        rank_of = list(range(ranks)) if half == 0 else list(reversed(range(ranks)))
        for begin, end in parts(low, high, chunks):
            for child in range(1, ranks):
                parent = (child - 1) // 2
                up, down = depth - _depth(child), depth + _depth(parent)
                transfers.append(Transfer(up, rank_of[child], rank_of[parent], begin, end, True))
                transfers.append(Transfer(down, rank_of[parent], rank_of[child], begin, end, False))
    names = _names("reduce", depth) + _names("broadcast", depth)
    return _schedule(ranks, range(ranks), elements, names, transfers)


def hierarchical(sites: Sequence[Sequence[int]], elements: int, chunks: int = 1) -> Schedule:
    """AllReduce that crosses between sites with as little as can be.

    Reduce-scatter inside each site; then the ranks that have the same part in all sites reduce it among themselves,
    around rings; then all-gather inside each site. Between sites go 2 (k - 1) / k vectors a site, for k sites.

    Raises:
        LabError: where the sites have different numbers of ranks.
    """
    sizes = {len(site) for site in sites}
    if len(sizes) != 1:
        raise LabError(
            f"hierarchical: sites of {', '.join(str(len(site)) for site in sites)} workers; "
            "give each site the same number"
        )
    size, count = sizes.pop(), len(sites)
    ranks = size * count
    across, gather = size - 1, size - 1 + 2 * (count - 1)
    transfers = []
    for begin, end in parts(0, elements, chunks):
        for site in sites:
            transfers += _reduce_scatter(site, begin, end, 0)
            transfers += _all_gather(site, begin, end, gather)
        for index in range(size):
            low, high = parts(begin, end, size)[(index + 1) % size]
            peers = [site[index] for site in sites]
            transfers += _reduce_scatter(peers, low, high, across)
            transfers += _all_gather(peers, low, high, across + count - 1)
    names = [
        *_names("reduce-scatter inside", size - 1),
        *_names("reduce-scatter across", count - 1),
        *_names("all-gather across", count - 1),
        *_names("all-gather inside", size - 1),
    ]
    return _schedule(ranks, range(ranks), elements, names, transfers)


def parameter_server(workers: int, servers: int, elements: int, chunks: int = 1) -> Schedule:
    """Workers push their vectors, servers add and give back the sums; each server has a part of the vector.

    Workers are ranks 0 to workers - 1, servers the ranks after them.
    """
    transfers = []
    for index, (low, high) in enumerate(parts(0, elements, servers)):
        server = workers + index
        for begin, end in parts(low, high, chunks):
            for worker in range(workers):
                transfers.append(Transfer(0, worker, server, begin, end, True))
                transfers.append(Transfer(1, server, worker, begin, end, False))
    return _schedule(workers + servers, range(workers), elements, ["push", "pull"], transfers)


def _schedule(
    ranks: int,
    contributors: Iterable[int],
    elements: int,
    phases: Iterable[str],
    transfers: Iterable[Transfer],
) -> Schedule:
    wanted = tuple(
        sorted((one for one in transfers if one.begin < one.end), key=lambda one: (one.phase, one.begin))
    )
    return Schedule(ranks, tuple(contributors), elements, tuple(phases), wanted)
