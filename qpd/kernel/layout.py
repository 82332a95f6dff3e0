"""The structs of ``ebpf/maps.h`` as numpy types, and the maps that hold them.

``ebpf/maps.h`` is their home; tests compare sizes and offsets with what a C compiler and the kernel say.
Numbers are in host byte order, addresses in network byte order, IPv4 mapped into IPv6 (RFC 4291, 2.5.5.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.kernel.bpf import F_NO_PREALLOC, MapType
from qpd.model import (
    DESTINATIONS_MAX,
    GROUPS_MAX,
    PATHS_MAX,
    SLOTS,
    TABLES_MAX,
    Address,
    Hook,
    Network,
    QueuePairKey,
    Verdict,
)

MARK_EXPONENTS = (0, 1, 2, 3, 5, 7, 9, 11)
"""Classes of PSNs of which an entry keeps one time each: the odd multiples of these powers of two (marks.h)."""
MARKS, MARK_SHIFT = len(MARK_EXPONENTS), 8
SLOT_WATCHED = 0x8000
"""Beside the slot of an entry."""

ADDRESS = np.dtype("V16")
QP_KEY = np.dtype([("vni", "u4"), ("dest_qp", "u4"), ("dst", ADDRESS)])
QP = np.dtype(
    [
        ("packets", "u8"),
        ("bytes", "u8"),
        ("last_seen_ns", "u8"),
        ("members", "u8"),
        ("generation", "u4"),
        ("group", "u1"),
        ("counted", "u1"),
        ("slot", "u2"),
        ("source_port", "u2"),
        ("home", "u1"),
        ("path", "u1"),
        ("next_psn", "u4"),
        ("window", "u8"),
        ("next_response", "u4"),
        ("acked_psn", "u4"),
        ("stamp_ns", "u8"),
        ("stamp_psn", "u4"),
        ("peer_qp", "u4"),
        ("rtt_sum_ns", "u8"),
        ("rtt_samples", "u4"),
        ("rtt_last_ns", "u4"),
        ("rtt_min_ns", "u4"),
        ("acks", "u4"),
        ("wish_idle_us", "u4"),
        ("wish", "u1"),
        ("pmtu", "u1"),
        ("transport", "u1"),
        ("gap_path", "u1"),
        ("missing", "u4"),
        ("out_of_order", "u4"),
        ("duplicates", "u4"),
        ("retransmitted", "u4"),
        ("go_backs", "u4"),
        ("lost_behind", "u4"),
        ("naks_sequence", "u4"),
        ("naks_rnr", "u4"),
        ("naks_remote", "u4"),
        ("read_octets", "u4"),
        ("cnps", "u4"),
        ("ecn_marked", "u4"),
        ("fecn", "u4"),
        ("becn", "u4"),
        ("restarts", "u4"),
        ("moves", "u4"),
        ("first_seen_ns", "u8"),
        ("src", ADDRESS),
        ("destination", ADDRESS),
        ("run_psn", "u4"),
        ("run", "u1"),
        ("rnr", "u1"),
        ("response_gaps", "u2"),
        ("gap_psn", "u4"),
        ("run_from", "u4"),
        ("response_gap", "u4"),
        ("first_psn", "u4"),
        ("asked_at", "u4", (MARKS,)),
        ("answered_at", "u4", (MARKS,)),
    ]
)
PATH = np.dtype(
    [
        ("ifindex", "u4"),
        ("family", "u1"),
        ("sole", "u1"),
        ("pad", "V2"),
        ("next_hop", ADDRESS),
        ("interface", "S16"),
        ("deadline_ns", "u8"),
    ]
)
GROUP = np.dtype([("members", "u8"), ("table", "u4"), ("pad", "u4"), ("weight", "u2", (PATHS_MAX,))])
SLOT_ORDER = np.dtype([("path", "u1", (PATHS_MAX,))])
DESTINATION_KEY = np.dtype([("prefixlen", "u4"), ("address", ADDRESS)])
CONTROL = np.dtype([("generation", "u4"), ("placement", "u4"), ("hold_up_ns", "u8")])
PATH_COUNTERS = np.dtype([("packets", "u8"), ("bytes", "u8")])
PATH_FAULTS = np.dtype(
    [
        ("missing", "u8"),
        ("out_of_order", "u8"),
        ("retransmitted", "u8"),
        ("lost_behind", "u8"),
        ("ecn_marked", "u8"),
    ]
)
RTT_FIRST, RTT_DOUBLINGS, RTT_STEPS = 10, 22, 64
RTT_BUCKETS = RTT_DOUBLINGS * RTT_STEPS
PATH_RTT = np.dtype([("samples", "u8"), ("sum_ns", "u8"), ("buckets", "u8", (RTT_BUCKETS,))])
COUNTERS = np.dtype(
    [
        ("verdicts", "u8", (len(Hook), len(Verdict))),
        ("path", PATH_COUNTERS, (len(Hook), PATHS_MAX)),
        ("tick", "u8"),
        ("tick_ns", "u8"),
        ("scratch", "V128"),
        ("fresh", QP),
        ("faults", PATH_FAULTS, (len(Hook), PATHS_MAX)),
    ]
)
LOAD = np.dtype([("qps", "u8")])
NEIGHBOUR_KEY = np.dtype([("ifindex", "u4"), ("mac", "V6"), ("pad", "V2")])
EVENT = np.dtype([("kind", "u4"), ("path", "u4"), ("time_ns", "u8")])
EVENT_QP = np.dtype([("head", EVENT), ("key", QP_KEY)])
EVENT_CM = np.dtype(
    [
        ("head", EVENT),
        ("key", QP_KEY),
        ("src", ADDRESS),
        ("hook", "u4"),
        ("attribute", "u4"),
        ("local_id", "u4"),
        ("remote_id", "u4"),
        ("qpn", "u4"),
        ("psn", "u4"),
    ]
)
TELL = np.dtype(
    [
        ("key", QP_KEY),
        ("hook", "u4"),
        ("fields", "u4"),
        ("peer_qp", "u4"),
        ("home", "u4"),
        ("idle_us", "u4"),
        ("restarts", "u4"),
        ("watched", "u4"),
    ]
)
EVENT_PATH = np.dtype([("head", EVENT), ("up", "u4"), ("cause", "u4")])
NEIGHBOUR_ADDRESS = np.dtype([("ifindex", "u4"), ("address", ADDRESS)])
BFD_SIDE = np.dtype(
    [
        ("state", "u1"),
        ("diagnostic", "u1"),
        ("multiplier", "u1"),
        ("flags", "u1"),
        ("discriminator", "u4"),
        ("desired_min_tx", "u4"),
        ("required_min_rx", "u4"),
    ]
)
BFD_SESSION = np.dtype(
    [
        ("local", BFD_SIDE),
        ("remote", BFD_SIDE),
        ("last_tx_ns", "u8"),
        ("last_rx_ns", "u8"),
        ("detection_ns", "u8"),
        ("deadline_ns", "u8"),
        ("up_since_ns", "u8"),
        ("downs", "u4"),
        ("path", "u4"),
        ("state", "u1"),
        ("cause", "u1"),
        ("pad", "V6"),
    ]
)
LOCK = np.dtype([("lock", "u4")])
NOTHING = np.dtype([])
INDEX = np.dtype("u4")
WORD = np.dtype("u8")

QPS_MAX = 131072
"""Default size of the maps ``qps`` and ``arrivals``, as in maps.h."""
NEIGHBOURS_MAX = 1024
BFD_SESSIONS_MAX = 256
EVENTS_BYTES = 512 * 1024
LIVING_DAEMON, LIVING_TAP = 0, 1
"""Indices of the two words in ``living``."""

STRUCTS: dict[str, np.dtype[Any]] = {
    "qp_key": QP_KEY,
    "qp": QP,
    "path": PATH,
    "group": GROUP,
    "slot_order": SLOT_ORDER,
    "destination_key": DESTINATION_KEY,
    "control": CONTROL,
    "path_counters": PATH_COUNTERS,
    "path_faults": PATH_FAULTS,
    "path_rtt": PATH_RTT,
    "counters": COUNTERS,
    "load": LOAD,
    "lock": LOCK,
    "neighbour_key": NEIGHBOUR_KEY,
    "event": EVENT,
    "event_qp": EVENT_QP,
    "event_path": EVENT_PATH,
    "event_cm": EVENT_CM,
    "tell": TELL,
    "neighbour_address": NEIGHBOUR_ADDRESS,
    "bfd_side": BFD_SIDE,
    "bfd_session": BFD_SESSION,
}


@dataclass(frozen=True, slots=True)
class MapLayout:
    """A map as maps.h declares it. ``entries`` None: the setting ``bpf.qps_max``."""

    type: MapType
    key: np.dtype[Any]
    value: np.dtype[Any]
    entries: int | None
    flags: int = 0


MAPS: dict[str, MapLayout] = {
    "qps": MapLayout(MapType.LRU_HASH, QP_KEY, QP, None),
    "arrivals": MapLayout(MapType.LRU_HASH, QP_KEY, QP, None),
    "paths": MapLayout(MapType.ARRAY, INDEX, PATH, PATHS_MAX),
    "groups": MapLayout(MapType.ARRAY, INDEX, GROUP, GROUPS_MAX),
    "slots": MapLayout(MapType.ARRAY, INDEX, SLOT_ORDER, TABLES_MAX * SLOTS),
    "destinations": MapLayout(MapType.LPM_TRIE, DESTINATION_KEY, INDEX, DESTINATIONS_MAX, F_NO_PREALLOC),
    "living": MapLayout(MapType.ARRAY, INDEX, WORD, 2),
    "control": MapLayout(MapType.ARRAY, INDEX, CONTROL, 1),
    "counters": MapLayout(MapType.PERCPU_ARRAY, INDEX, COUNTERS, 1),
    "rtts": MapLayout(MapType.ARRAY, INDEX, PATH_RTT, PATHS_MAX),
    "placed": MapLayout(MapType.ARRAY, INDEX, LOAD, PATHS_MAX),
    "gone": MapLayout(MapType.ARRAY, INDEX, LOAD, PATHS_MAX),
    "neighbours": MapLayout(MapType.HASH, NEIGHBOUR_KEY, INDEX, NEIGHBOURS_MAX),
    "bfd_sessions": MapLayout(MapType.HASH, NEIGHBOUR_ADDRESS, BFD_SESSION, BFD_SESSIONS_MAX),
    "path_of_next_hop": MapLayout(MapType.HASH, NEIGHBOUR_ADDRESS, INDEX, 4 * PATHS_MAX),
    "locks": MapLayout(MapType.ARRAY, INDEX, LOCK, 2),
    "events": MapLayout(MapType.RINGBUF, NOTHING, NOTHING, EVENTS_BYTES),
}

# --- Packet sequence numbers and round-trip times ----------------------------------------------------------------

PSN_KNOWN, PSN_MASK, STREAM_READ = 0x01000000, 0x00FFFFFF, 0x10000000
"""A field with a PSN has the bit PSN_KNOWN as soon as there is one. ``next_psn`` has STREAM_READ while the newest
request is a READ, of ``read_octets``, that takes more PSNs than are known. Other bits are the kernel's own."""


class Transport(IntEnum):
    """Services by the highest three bits of the BTH's opcode (InfiniBand Architecture Specification 1, 9.2.1)."""

    RC, UC, RD, UD, CNP, XRC = range(6)


def rtt_bounds_ns() -> npt.NDArray[np.int64]:
    """Upper bounds (exclusive) of the buckets in PATH_RTT, in ns; the last bucket also holds all that is longer."""
    lower = np.int64(1) << np.arange(RTT_FIRST, RTT_FIRST + RTT_DOUBLINGS, dtype=np.int64)
    steps = np.arange(1, RTT_STEPS + 1, dtype=np.int64)
    bounds: npt.NDArray[np.int64] = (lower[:, None] + lower[:, None] * steps // RTT_STEPS).ravel()
    return bounds


# --- Addresses and keys -----------------------------------------------------------------------------------------

_MAPPED = bytes(10) + b"\xff\xff"


def pack_address(address: Address) -> bytes:
    """16 octets, an IPv4 address mapped."""
    return _MAPPED + address.packed if isinstance(address, IPv4Address) else address.packed


def unpack_address(octets: bytes) -> Address:
    """The address that 16 octets hold; a mapped one as IPv4."""
    return IPv4Address(octets[12:]) if octets.startswith(_MAPPED) else IPv6Address(octets)


def pack_qp_key(key: QueuePairKey) -> bytes:
    """``struct qp_key`` of a QP."""
    return np.array([(key.vni, key.dest_qp, pack_address(key.dst))], QP_KEY).tobytes()


def unpack_qp_key(record: np.void) -> QueuePairKey:
    """The QP that one record of type QP_KEY names."""
    return QueuePairKey(int(record["vni"]), unpack_address(bytes(record["dst"])), int(record["dest_qp"]))


def pack_destination(prefix: Network) -> tuple[int, bytes]:
    """Prefix length (of 128) and address of a prefix."""
    mapped = 96 if isinstance(prefix, IPv4Network) else 0
    return mapped + prefix.prefixlen, pack_address(prefix.network_address)


def unpack_destination(record: np.void) -> Network:
    """The prefix that one record of type DESTINATION_KEY holds."""
    address = unpack_address(bytes(record["address"]))
    length = int(record["prefixlen"])
    if isinstance(address, IPv4Address) and length >= 96:
        return IPv4Network((address, length - 96))
    return IPv6Network((bytes(record["address"]), length))


def pack_mac(mac: str) -> bytes:
    """Six octets of ``aa:bb:cc:dd:ee:ff``. Raises ValueError."""
    octets = bytes.fromhex(mac.replace(":", ""))
    if len(octets) != 6:
        raise ValueError(f"not a MAC address of six octets: {mac!r}")
    return octets


def unpack_mac(octets: bytes) -> str:
    """``aa:bb:cc:dd:ee:ff`` of six octets."""
    return octets.hex(":")
