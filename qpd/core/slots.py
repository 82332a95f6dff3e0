"""Slots: which position a QP hashes to, and in which order a position prefers the planes.

Everything here is integer arithmetic on names and weights, so that two leaves with other CPUs, other numpy
releases and another history compute the same tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from math import gcd

import numpy as np
import numpy.typing as npt

from qpd.model import PATHS_MAX, SLOTS, Address, Placement, QueuePairKey

_MASK32 = 0xFFFFFFFF
_FIRST_DYNAMIC_PORT = 49152

_LOG_BITS = 24
"""Fraction bits of the integer logarithm: two planes tie at fewer than one slot in a table."""

_SLOT_BITS = SLOTS.bit_length() - 1

_Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


# --- The hash of a QP ------------------------------------------------------------------------------------------------


def _words(address: Address) -> tuple[int, int, int, int]:
    """The address as four big-endian words; IPv4 is mapped (RFC 4291, 2.5.5.2)."""
    value = int(address)
    if isinstance(address, IPv4Address):
        value |= 0xFFFF << 32
    return value >> 96, value >> 64 & _MASK32, value >> 32 & _MASK32, value & _MASK32


def qp_hash(key: QueuePairKey) -> int:
    """The 32-bit hash of a QP, as ``ebpf/place.h`` computes it (docs/architecture.md, Hash of a QP)."""
    h = 0x71706431
    for word in (key.vni, key.dest_qp, *_words(key.dst)):
        h = (h ^ word) * 0x9E3779B1 & _MASK32
        h ^= h >> 15
    h ^= h >> 16
    h = h * 0x85EBCA6B & _MASK32
    h ^= h >> 13
    h = h * 0xC2B2AE35 & _MASK32
    return h ^ h >> 16


def slot_of(h: int) -> int:
    """The slot of a QP with this hash."""
    return h & (SLOTS - 1)


def source_port_of(h: int) -> int:
    """The outer UDP source port of a QP with this hash: dynamic range (RFC 7348, 5), bits that the slot leaves."""
    return _FIRST_DYNAMIC_PORT + (h >> 18)


# --- The choice at a slot --------------------------------------------------------------------------------------------


def choose(order: Iterable[int], usable: int) -> int | None:
    """The first path of ``order`` whose bit is set in ``usable``; None: there is none."""
    return next((path for path in order if usable >> path & 1), None)


def place(
    order: Iterable[int],
    usable: int,
    placement: Placement,
    active: Mapping[int, int] | Sequence[int],
    weights: Mapping[int, int],
    *,
    answers: bool = False,
) -> int | None:
    """The home that a new QP gets, by the kernel's own rule; None: no path is usable.

    ``order``: path ids, best first. ``usable``: bits of the group's living paths. ``active``: QPs that send, by path
    id. ``weights``: of the group's members. ``Placement.BALANCED`` passes over a path that holds its share already,
    ``ceil((active + 1) * weight / total)`` over the usable members (consistent hashing with bounded load).
    ``answers``: its first packet is an answer without data (ACK, NAK, CNP): its slot's order alone decides, and it is
    none of ``active`` before it sends.
    """
    candidates = [path for path in order if usable >> path & 1]
    if placement is Placement.HASH or answers or not candidates:
        return candidates[0] if candidates else None
    total = sum(weights[path] for path in candidates)
    queue_pairs = sum(active[path] for path in candidates) + 1
    for path in candidates:
        if active[path] < -(-queue_pairs * weights[path] // total):
            return path
    return candidates[0]


# --- Slot tables -----------------------------------------------------------------------------------------------------


def slot_table(weights: Mapping[str, int]) -> npt.NDArray[np.uint8]:
    """The preference order of every slot over these planes: uint8[4096, n], indices into ``sorted(weights)``.

    A function of names and weights only. It is the order of weighted rendezvous hashing, filled exactly: first choices
    are spread by weight to within one slot; so are the next choices of all slots whose choices before were the same
    planes, down to cells of a single slot. So the load of a dead path spreads evenly over the others, and that of two
    dead paths as well, while nearly every slot keeps the choice that rendezvous hashing alone would give it.

    Raises ValueError for more than 64 planes and for a weight below one.
    """
    planes = sorted(weights)
    if len(planes) > PATHS_MAX:
        raise ValueError(f"{len(planes)} planes: a slot table holds at most {PATHS_MAX}")
    for plane in planes:
        if weights[plane] < 1:
            raise ValueError(f"weight {weights[plane]} of plane {plane}: must be at least 1")
    if not planes:
        return np.empty((SLOTS, 0), np.uint8)
    unit = gcd(*weights.values())
    share = np.array([weights[plane] // unit for plane in planes], np.int64)
    seeds = np.array([_seed(plane) for plane in planes], np.uint64)
    cost = _costs(seeds, share)
    order = np.argsort(cost, axis=1, kind="stable")
    best_slots = np.argsort(cost, axis=0, kind="stable").T
    standing = np.empty_like(best_slots)
    np.put_along_axis(standing, best_slots, np.arange(SLOTS)[None, :], axis=1)
    chosen = np.zeros(SLOTS, np.uint64)
    slots = np.arange(SLOTS)
    for rank in range(len(planes) - 1):
        masks, cell, sizes = np.unique(chosen[slots], return_inverse=True, return_counts=True)
        places = _places(masks, sizes, share, seeds)
        shared = sizes[cell] > 1
        slots, cell = slots[shared], cell[shared]
        if not slots.size:
            break
        _accept(order, rank, slots, cell, places=places, best_slots=best_slots, standing=standing)
        chosen[slots] |= np.uint64(1) << order[slots, rank].astype(np.uint64)
    return order.astype(np.uint8)


def _seed(plane: str) -> int:
    return int.from_bytes(hashlib.blake2b(plane.encode(), digest_size=8).digest(), "big")


def _mix(words: _Words) -> _Words:
    """The finaliser of splitmix64: a bijection on 64 bits in which every output bit hangs on every input bit."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def _costs(seeds: _Words, share: _Ints) -> _Ints:
    """What each plane would cost each slot; the least wins a slot with a chance proportional to its weight.

    The cost is an exponential variate of rate weight, ``-log2(u) / weight``: a plane's costs do not hang on the
    other planes' weights.
    """
    steps = np.arange(1, SLOTS + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    draw = _mix(seeds[None, :] + steps) >> np.uint64(32)
    if (share == share[0]).all():
        return _MASK32 - draw.astype(np.int64)
    return (_log2_below(draw) << 16) // share


def _log2_below(draw: _Words) -> _Ints:
    """``-log2((draw + 1) / 2**32)`` in fixed point, by repeated squaring: floats may round otherwise elsewhere."""
    value = draw + np.uint64(1)
    whole = np.zeros(value.shape, np.int64)
    mantissa = value.copy()
    for step in (16, 8, 4, 2, 1):
        low = mantissa < np.uint64(1 << 32 - step)
        mantissa = np.where(low, mantissa << np.uint64(step), mantissa)
        whole += np.where(low, step, 0)
    exact = value == np.uint64(1 << 32)
    mantissa = np.where(exact, np.uint64(1 << 31), mantissa)
    fraction = np.zeros(value.shape, np.int64)
    for _ in range(_LOG_BITS):
        mantissa = mantissa * mantissa >> np.uint64(31)
        carry = mantissa >> np.uint64(32)
        mantissa >>= carry
        fraction = fraction << 1 | carry.astype(np.int64)
    return np.where(exact, 0, (whole + 1 << _LOG_BITS) - fraction)


def _places(masks: _Words, sizes: _Ints, share: _Ints, seeds: _Words) -> _Ints:
    """How many slots of each cell (those that chose the planes in ``masks``) each plane takes next.

    By weight over the planes left, largest remainders first. Ties go by name where all slots are one cell; elsewhere by
    hash, since the first name would otherwise gain in every cell. A cell with fewer slots than planes left has room for
    one more than it needs, so that every slot keeps the best that stays even.
    """
    count = len(share)
    free = masks[:, None] >> np.arange(count, dtype=np.uint64) & np.uint64(1) == 0
    weight = np.where(free, share, 0)
    total = weight.sum(axis=1, keepdims=True)
    scaled = sizes[:, None] * weight
    places: _Ints = scaled // total
    remainder = scaled - places * total
    roomy = sizes >= free.sum(axis=1)
    if len(masks) == 1:
        tie = np.arange(count)[None, ::-1]
    else:
        tie = np.argsort(np.argsort(_mix(masks[:, None] + seeds[None, :]), axis=1), axis=1)
    first = np.argsort(-(remainder * PATHS_MAX + tie), axis=1, kind="stable")
    over = np.where(roomy, sizes - places.sum(axis=1), 0)
    extra = np.zeros_like(places)
    np.put_along_axis(extra, first, (np.arange(count) < over[:, None]).astype(np.int64), axis=1)
    places += np.where(roomy[:, None], extra, (remainder > 0).astype(np.int64))
    return places


def _accept(
    order: _Ints, rank: int, slots: _Ints, cell: _Ints, *, places: _Ints, best_slots: _Ints, standing: _Ints
) -> None:
    """Deferred acceptance: slots ask planes in their order, a full plane keeps the slots it is cheapest for.

    Sets column ``rank`` of ``order`` for ``slots`` and keeps the rest of their rows in order. All cells at once.
    """
    count = order.shape[1]
    room = places.ravel()
    asked = np.full(SLOTS, rank)
    where = np.zeros(SLOTS, np.int64)
    where[slots] = cell
    asking = slots
    held: _Ints = np.empty(0, np.int64)
    while asking.size:
        plane = order[asking, asked[asking]]
        bids = (where[asking] * count + plane << _SLOT_BITS) | standing[plane, asking]
        held = np.sort(np.concatenate((held, bids)))
        desk = held >> _SLOT_BITS
        starts = np.flatnonzero(np.diff(desk, prepend=-1))
        place = np.arange(held.size) - np.repeat(starts, np.diff(starts, append=held.size))
        refused = place >= room[desk]
        asking = best_slots[desk[refused] % count, held[refused] & SLOTS - 1]
        asked[asking] += 1
        held = held[~refused]
    slots = slots[asked[slots] > rank]
    column = np.arange(count)
    given = asked[slots, None]
    source = np.where(column == rank, given, column - ((column > rank) & (column <= given)))
    order[slots] = np.take_along_axis(order[slots], source, axis=1)
