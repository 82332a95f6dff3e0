"""Rows of ``qpctl qps`` from what the kernel's maps hold, fast enough for 100 000 QPs.

Arrays have the fields of ``struct qp_key`` and ``struct qp`` (``ebpf/maps.h``). Selecting is numpy's work; rows are
made a chunk at a time in a thread, so that the event loop answers others meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.api.queries import QpFilter
from qpd.api.schemas import Direction, QpRow, QpState, Transport
from qpd.kernel import layout
from qpd.kernel.layout import PSN_KNOWN, pack_address, unpack_address
from qpd.model import NO_GROUP, NO_PATH, SLOTS, Address

CHUNK = 500
"""Rows made at once: what an answer takes in memory, however long it is."""


@dataclass(frozen=True, slots=True)
class QpTable:
    """A map, or a part of one, as read at ``now_ns`` (CLOCK_MONOTONIC). ``paths``: names by id."""

    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]
    paths: Mapping[int, str]
    now_ns: int
    idle_after_ns: int
    direction: Direction = "out"


def select(table: QpTable, wanted: QpFilter, path: int | None = None) -> npt.NDArray[np.intp]:
    """Positions of the wanted QPs. ``path``: the id that ``wanted.path`` names; ``wanted.limit``: busiest first."""
    keys, values = table.keys, table.values
    mask = np.ones(len(keys), dtype=np.bool_)
    if wanted.vni is not None:
        mask &= keys["vni"] == wanted.vni
    if wanted.qp is not None:
        mask &= keys["dest_qp"] == wanted.qp
    if wanted.host is not None:
        mask &= _equal(keys["dst"], wanted.host) | _equal(values["src"], wanted.host)
    if wanted.dst is not None:
        mask &= _equal(keys["dst"], wanted.dst)
    if path is not None:
        mask &= (values["path"] == path) | (values["home"] == path)
    return busiest(values["bytes"], np.flatnonzero(mask), wanted.limit)


def _equal(column: npt.NDArray[Any], host: Address) -> npt.NDArray[np.bool_]:
    wanted = np.frombuffer(pack_address(host), dtype=np.uint8)
    equal: npt.NDArray[np.bool_] = (_octets(column) == wanted).all(axis=1)
    return equal


def busiest(
    traffic: npt.NDArray[Any], positions: npt.NDArray[np.intp], limit: int | None
) -> npt.NDArray[np.intp]:
    """The ``limit`` positions with the most traffic, these first; all of them, as they are, without a limit."""
    if limit is None:
        return positions
    amount = traffic[positions]
    if limit < len(positions):
        kept = np.argpartition(amount, len(amount) - limit)[len(amount) - limit :]
        positions, amount = positions[kept], amount[kept]
    # Signed, so that the order can be turned round; no counter reaches 2^63.
    return positions[np.argsort(-amount.astype(np.int64), kind="stable")]


async def stream(
    parts: Iterable[QpTable], wanted: QpFilter, path: int | None = None, chunk: int = CHUNK
) -> AsyncIterator[list[QpRow]]:
    """The wanted rows in chunks, each made in a thread.

    ``parts``: the map piece by piece, so that it is never whole in memory; each is done with before the next comes.
    """
    names: dict[bytes, str] = {}
    source = iter(parts)
    if wanted.limit is not None:
        limited = await asyncio.to_thread(top, source, wanted, path)
        source = iter(() if limited is None else (limited,))
    while (part := await asyncio.to_thread(next, source, None)) is not None:
        positions = await asyncio.to_thread(select, part, wanted, path)
        for start in range(0, len(positions), chunk):
            yield await asyncio.to_thread(rows, part, positions[start : start + chunk], names)


def top(parts: Iterable[QpTable], wanted: QpFilter, path: int | None = None) -> QpTable | None:
    """The ``wanted.limit`` busiest of all parts as one table; None where there are no parts."""
    best: QpTable | None = None
    for part in parts:
        positions = select(part, wanted, path)
        keys, values = part.keys[positions], part.values[positions]
        if best is not None:
            keys, values = np.concatenate((best.keys, keys)), np.concatenate((best.values, values))
        kept = busiest(values["bytes"], np.arange(len(values)), wanted.limit)
        best = replace(part, keys=keys[kept], values=values[kept])
    return best


def rows(
    table: QpTable, positions: npt.NDArray[np.intp], names: dict[bytes, str] | None = None
) -> list[QpRow]:
    """The rows at these positions. ``names``: texts of addresses, kept from chunk to chunk."""
    names = {} if names is None else names
    keys, values = table.keys[positions], table.values[positions]
    out = table.direction == "out"
    paths = [table.paths.get(id_) for id_ in range(NO_PATH + 1)]
    first = values["first_seen_ns"].astype(np.int64)
    last = values["last_seen_ns"].astype(np.int64)
    # last_seen comes from the tick's clock and may lie a tick before first_seen, or after `now`.
    idle = np.maximum(table.now_ns - np.maximum(last, first), 0)
    seen = _sequences(values)
    missing = _counts(_never_came(values), seen.numbered)
    behind = _counts(values["lost_behind"], seen.resent)
    columns = zip(
        keys["vni"].tolist(),
        _texts(keys["dst"], names),
        keys["dest_qp"].tolist(),
        _texts(values["src"], names),
        _texts(values["destination"], names),
        (values["slot"] & SLOTS - 1).tolist(),
        values["home"].tolist(),
        values["path"].tolist(),
        _states(values, idle, table),
        values["packets"].tolist(),
        values["bytes"].tolist(),
        behind if out else missing,
        missing if out else behind,
        _counts(values["retransmitted"], seen.resent),
        _counts(values["out_of_order"], seen.numbered),
        _counts(_naks(values), seen.reliable),
        values["cnps"].tolist(),
        values["ecn_marked"].tolist(),
        *_round_trips(values),
        [qp or None for qp in values["peer_qp"].tolist()],
        [_TRANSPORTS.get(number) for number in values["transport"].tolist()],
        np.round(np.maximum(table.now_ns - first, 0) / 1e9, 3).tolist(),
        np.round(idle / 1e9, 3).tolist(),
        values["moves"].tolist(),
        values["source_port"].tolist(),
        strict=True,
    )
    return [
        {
            "vni": vni,
            "dst": dst,
            "dest_qp": dest_qp,
            "src": src,
            "slot": slot if out else None,
            "home": paths[home] if out else None,
            "path": paths[path],
            "state": state,
            "packets": packets,
            "bytes": octets,
            "lost": lost,
            "retransmitted": retransmitted,
            "out_of_order": out_of_order,
            "naks": naks,
            "cnps": cnps,
            "ecn_marked": ecn_marked,
            "rtt_us": rtt,
            "peer_qp": peer,
            "age_s": age,
            "idle_s": quiet,
            "direction": table.direction,
            "destination": destination,
            "moves": moves,
            "source_port": port if out and vni else None,
            "transport": transport,
            "lost_at_host": at_host,
            "rtt_min_us": rtt_min,
            "rtt_mean_us": rtt_mean,
            "rtt_samples": samples,
        }
        for (
            vni,
            dst,
            dest_qp,
            src,
            destination,
            slot,
            home,
            path,
            state,
            packets,
            octets,
            lost,
            at_host,
            retransmitted,
            out_of_order,
            naks,
            cnps,
            ecn_marked,
            rtt,
            rtt_min,
            rtt_mean,
            samples,
            peer,
            transport,
            age,
            quiet,
            moves,
            port,
        ) in columns
    ]


# --- What sequence numbers and responses have told ----------------------------------------------------------------

_TRANSPORTS: dict[int, Transport] = {
    layout.Transport.RC: "rc",
    layout.Transport.UC: "uc",
    layout.Transport.RD: "rd",
    layout.Transport.UD: "ud",
    layout.Transport.XRC: "xrc",
}


@dataclass(frozen=True, slots=True)
class _Sequences:
    """What can be known of each QP's packets, as masks."""

    reliable: npt.NDArray[np.bool_]
    """Reliable connection: what is missing is asked for again."""
    numbered: npt.NDArray[np.bool_]
    """Connected, and packets with numbers of their own (not acknowledgements alone) have come by."""
    resent: npt.NDArray[np.bool_]
    """Both: what is sent again can be told."""


def _sequences(values: npt.NDArray[Any]) -> _Sequences:
    reliable = values["transport"] == layout.Transport.RC
    connected = reliable | (values["transport"] == layout.Transport.UC)
    numbered = connected & ((values["next_psn"] | values["next_response"]) & PSN_KNOWN != 0)
    return _Sequences(reliable, numbered, numbered & reliable)


def _never_came(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Passed over and not come later: unsigned counters of one entry, read while packets change them."""
    never: npt.NDArray[np.int64] = np.maximum(
        values["missing"].astype(np.int64) - values["out_of_order"].astype(np.int64), 0
    )
    return never


def _naks(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    kinds = (values[name].astype(np.int64) for name in ("naks_sequence", "naks_rnr", "naks_remote"))
    naks: npt.NDArray[np.int64] = np.sum(list(kinds), axis=0, dtype=np.int64)
    return naks


def _counts(column: npt.NDArray[Any], measured: npt.NDArray[np.bool_]) -> list[int | None]:
    if measured.all():
        return column.tolist()  # type: ignore[no-any-return]
    return [count if known else None for count, known in zip(column.tolist(), measured.tolist(), strict=True)]


def _round_trips(values: npt.NDArray[Any]) -> Iterator[list[float | None] | list[int]]:
    """Last, least and mean in microseconds, and how many there are."""
    samples = values["rtt_samples"].astype(np.int64)
    any_ = samples > 0
    mean = values["rtt_sum_ns"] / np.maximum(samples, 1)
    for nanoseconds in (values["rtt_last_ns"], values["rtt_min_ns"], mean):
        rounded = np.round(nanoseconds / 1e3, 3)
        yield [value if known else None for value, known in zip(rounded.tolist(), any_.tolist(), strict=True)]
    yield samples.tolist()


_STATES: tuple[QpState, ...] = ("home", "away", "unsteered", "idle", "observed")


def _states(values: npt.NDArray[Any], idle: npt.NDArray[np.int64], table: QpTable) -> list[QpState]:
    if table.direction == "in":
        number = np.full(len(values), 4)
    else:
        number = np.where(values["path"] == values["home"], 0, 1)
        number[(values["path"] == NO_PATH) | (values["group"] == NO_GROUP)] = 2
    number[idle > table.idle_after_ns] = 3
    return [_STATES[n] for n in number.tolist()]


def _octets(column: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A column of 16-byte addresses as bytes, whatever the dtype calls them."""
    return np.ascontiguousarray(column).view(np.uint8).reshape(len(column), 16)


def _texts(column: npt.NDArray[Any], names: dict[bytes, str]) -> list[str]:
    octets = _octets(column).tobytes()
    texts = []
    for start in range(0, len(octets), 16):
        packed = octets[start : start + 16]
        text = names.get(packed)
        if text is None:
            text = names[packed] = str(unpack_address(packed))
        texts.append(text)
    return texts
