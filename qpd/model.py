"""The words that all rooms speak: frozen facts, the events that change them, and the operations that follow.

Times are seconds of CLOCK_MONOTONIC as ``float`` unless a name ends in ``_ns``. Addresses are
``ipaddress`` objects, never IPv4-mapped; only the maps of the kernel hold mapped addresses.
Nothing here does I/O and nothing here decides: the planner (``qpd.core.planner``) does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PATHS_MAX = 64
SLOTS = 4096
TABLES_MAX = 16
GROUPS_MAX = 255
DESTINATIONS_MAX = 4096
NO_PATH = 0xFF
NO_GROUP = 0xFF
NO_PSN = -1


class Verdict(IntEnum):
    """What the classifier did with a packet; the same names and values as ``enum verdict`` in ``ebpf/verdict.h``."""

    NOT_ROCE = 0
    OWN_PATH = 1
    REDIRECTED = 2
    SECOND_PASS = 3
    FRAGMENT = 4
    TRUNCATED = 5
    TAGGED = 6
    UNKNOWN_GROUP = 7
    NO_LIVING_PATH = 8
    MAP_FULL = 9
    OBSERVED = 10
    BFD = 11


class Hook(IntEnum):
    """Where the classifier runs: ``STEER`` on egress, ``OBSERVE`` on ingress of every uplink."""

    STEER = 0
    OBSERVE = 1


class Placement(IntEnum):
    """How a new QP gets its home: its slot's first choice, or that with bounded load."""

    HASH = 0
    BALANCED = 1


# --- Facts: what the kernel and FRR say ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """One interface. ``up``: administratively up *and* carrier (IFF_UP, IFF_LOWER_UP). ``kind``: IFLA_INFO_KIND."""

    ifindex: int
    name: str
    up: bool
    kind: str = ""
    mac: str = ""


@dataclass(frozen=True, slots=True, order=True)
class NextHopKey:
    """An address on an interface: of a next hop, or of a routing or BFD peer."""

    interface: str
    address: Address = field(compare=True)

    def __str__(self) -> str:
        return f"{self.address}%{self.interface}"


@dataclass(frozen=True, slots=True)
class NextHop:
    """One leg of a route. ``alive`` is False with RTNH_F_DEAD or RTNH_F_LINKDOWN. ``weight``: rtnh_hops + 1.

    ``address`` is unspecified (``0.0.0.0`` or ``::``) for a leg without gateway, as connected routes have: no path,
    but a route that counts when the longest prefix is sought.
    """

    ifindex: int
    address: Address
    weight: int = 1
    alive: bool = True

    @property
    def connected(self) -> bool:
        """True: the destination itself is on this link; there is no next hop to steer to."""
        return self.address.is_unspecified


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route of the main table. ``protocol``: RTPROT_* number (rtnetlink(7); 186: FRR's bgpd)."""

    prefix: Network
    next_hops: tuple[NextHop, ...]
    protocol: int
    metric: int = 0


class NeighbourState(Enum):
    """NUD states as they matter for a path: FAILED is the only one that tells against it."""

    USABLE = "usable"
    UNRESOLVED = "unresolved"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the neighbour table (ARP or ND)."""

    ifindex: int
    address: Address
    state: NeighbourState
    mac: str = ""


class BfdState(IntEnum):
    """Session states of RFC 5880, 4.1."""

    ADMIN_DOWN = 0
    DOWN = 1
    INIT = 2
    UP = 3


@dataclass(frozen=True, slots=True)
class BfdSession:
    """One BFD session as bfdd or the tap tells it. ``detection_time``: seconds (RFC 5880, 6.8.4); None: not known."""

    interface: str
    peer: Address
    state: BfdState
    local: Address | None = None
    diagnostic: str = ""
    detection_time: float | None = None
    remote_state: BfdState | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """A whole picture of the kernel's network state, as after a dump."""

    links: tuple[Link, ...]
    routes: tuple[Route, ...]
    neighbours: tuple[Neighbour, ...]


# --- Events: what changed. Each is handed to planner.handle(event, now) ----------------------------------------------


@dataclass(frozen=True, slots=True)
class Resynced:
    """A full dump: replaces all facts of links, routes and neighbours."""

    facts: Facts


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """A link is new or changed."""

    link: Link


@dataclass(frozen=True, slots=True)
class LinkGone:
    """A link was deleted."""

    ifindex: int


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """A route of the main table is new or replaced (same prefix and metric)."""

    route: Route


@dataclass(frozen=True, slots=True)
class RouteGone:
    """A route of the main table was deleted."""

    prefix: Network
    metric: int = 0


@dataclass(frozen=True, slots=True)
class NeighbourChanged:
    """A neighbour entry is new or changed."""

    neighbour: Neighbour


@dataclass(frozen=True, slots=True)
class NeighbourGone:
    """A neighbour entry was deleted."""

    ifindex: int
    address: Address


@dataclass(frozen=True, slots=True)
class PeersNamed:
    """Host names of routing peers, from FRR (hostname capability); all of them. Key: interface and peer address."""

    names: Mapping[NextHopKey, str]


@dataclass(frozen=True, slots=True)
class BfdSessionsRead:
    """All of bfdd's sessions, read at start, after a reconnect, or as a cross-check: replaces bfdd's facts."""

    sessions: tuple[BfdSession, ...]


@dataclass(frozen=True, slots=True)
class FrrLost:
    """An FRR daemon's socket went away (``daemon``: bfdd, bgpd, zebra). Paths keep their state."""

    daemon: str


@dataclass(frozen=True, slots=True)
class FrrBack:
    """An FRR daemon answers again after FrrLost; what it says follows as PeersNamed or BfdSessionsRead."""

    daemon: str


@dataclass(frozen=True, slots=True)
class TapReported:
    """The kernel's BFD tap saw a path die or return; ``kernel_ns`` is its own time stamp (CLOCK_MONOTONIC)."""

    path: int
    up: bool
    cause: str
    kernel_ns: int


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The operator wants no QP on this path, or (``drain=False``) allows it again. ``path``: name."""

    path: str
    drain: bool


@dataclass(frozen=True, slots=True)
class GrayFound:
    """A path (id) that is alive loses or delays more than its siblings.

    ``detail`` says how much, and over how many packets. Its ``direction``: ``out``, of what leaves by the path, or
    ``in``, of what arrives by it.
    """

    path: int
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GrayOver:
    """A path (id) that was gray, and serves, is as good as its siblings again."""

    path: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; handled when ``planner.deadline`` has come."""


Event = (
    Resynced
    | LinkChanged
    | LinkGone
    | RouteChanged
    | RouteGone
    | NeighbourChanged
    | NeighbourGone
    | PeersNamed
    | BfdSessionsRead
    | FrrLost
    | FrrBack
    | TapReported
    | DrainAsked
    | GrayFound
    | GrayOver
    | Tick
)


# --- What the planner keeps and shows --------------------------------------------------------------------------------


class PathState(Enum):
    """``UP``: serves. ``HOLD``: up again, but not for ``hold_up`` yet. ``DOWN`` and ``DRAINED``: do not serve."""

    UP = "up"
    HOLD = "hold"
    DOWN = "down"
    DRAINED = "drained"


class Reason(Enum):
    """Why a path is in its state; the worst one where several hold."""

    NONE = ""
    LINK_DOWN = "link-down"
    LINK_GONE = "link-gone"
    NEXT_HOP_DEAD = "next-hop-dead"
    NEIGHBOUR_FAILED = "neighbour-failed"
    BFD_DOWN = "bfd-down"
    BFD_SILENT = "bfd-silent"
    DRAINED = "drained"
    GRAY = "gray"
    HOLD_UP = "hold-up"
    NO_ROUTE = "no-route"


@dataclass(frozen=True, slots=True)
class Path:
    """One neighbour on one uplink. ``id``: its bit in the word of living paths, kept for the path's life."""

    id: int
    name: str
    interface: str
    ifindex: int
    next_hop: Address
    plane: str
    weight: int
    state: PathState
    reason: Reason
    since: float
    sole: bool
    """True: the only path on its interface."""
    aliases: tuple[Address, ...] = ()
    """The neighbour's other addresses: next hops of routes, and peers of BGP and BFD."""
    gray: bool = False
    """It loses or delays more than its siblings; whether it serves is said by ``state``."""

    @property
    def key(self) -> NextHopKey:
        """Interface and next hop."""
        return NextHopKey(self.interface, self.next_hop)


@dataclass(frozen=True, slots=True)
class Group:
    """The paths (ids to weights) by which destinations are reached, and the slot table it reads."""

    id: int
    weights: Mapping[int, int]
    table: int
    destinations: tuple[Network, ...] = ()

    @property
    def members(self) -> int:
        """The member paths as bits."""
        return sum(1 << path for path in self.weights)


@dataclass(frozen=True, slots=True)
class QueuePairKey:
    """A QP as packets name it: VNI (0: no VXLAN), destination host, destination QP (24 bits)."""

    vni: int
    dst: Address
    dest_qp: int


class CmKind(IntEnum):
    """Messages of the InfiniBand connection manager that speak of QPs; their MAD attribute ids (12.6)."""

    REQ = 0x10
    REJ = 0x12
    REP = 0x13
    RTU = 0x14
    DREQ = 0x15
    DREP = 0x16


@dataclass(frozen=True, slots=True)
class CmMessage:
    """A message on QP 1 as it passed a hook: ``src`` sent it to ``dst``.

    ``local_id`` is the sender's communication id, ``remote_id`` the receiver's (0 in a REQ). ``qpn``: of REQ and REP
    the sender's QP, of DREQ the receiver's, else 0. ``psn``: of REQ and REP the first PSN that is sent *to* that QP.
    """

    kind: CmKind
    hook: Hook
    vni: int
    src: Address
    dst: Address
    local_id: int
    remote_id: int
    qpn: int
    psn: int
    kernel_ns: int


# --- Operations: what the planner wants done, applied in order by the kernel room ------------------------------------


@dataclass(frozen=True, slots=True)
class AttachUplink:
    """Put the classifier on this interface (idempotent)."""

    ifindex: int
    interface: str


@dataclass(frozen=True, slots=True)
class DetachUplink:
    """Take the classifier off this interface; the interface may be gone already."""

    ifindex: int
    interface: str


@dataclass(frozen=True, slots=True)
class WritePath:
    """Write the ``paths`` entry of this id."""

    path: Path


@dataclass(frozen=True, slots=True)
class ErasePath:
    """Clear the ``paths`` entry of this id."""

    id: int


@dataclass(frozen=True, slots=True, eq=False)
class WriteTable:
    """Write slot table number ``table``. ``orders``: uint8[4096, 64], path ids best first, padded with NO_PATH."""

    table: int
    orders: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class WriteGroup:
    """Write the ``groups`` entry (members, weights, table); the destinations come as operations of their own."""

    group: Group


@dataclass(frozen=True, slots=True)
class EraseGroup:
    """Clear the ``groups`` entry of this id."""

    id: int


@dataclass(frozen=True, slots=True)
class WriteDestinations:
    """Prefixes to group ids; many at once, since thousands change together."""

    groups: Mapping[Network, int]


@dataclass(frozen=True, slots=True)
class EraseDestinations:
    """Prefixes that no longer have a group."""

    prefixes: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class RaiseGeneration:
    """Tell every cached QP to look its group up again."""


@dataclass(frozen=True, slots=True)
class SetLiving:
    """The daemon's word of living paths, one bit per path id."""

    word: int


@dataclass(frozen=True, slots=True)
class WriteNeighbours:
    """(ifindex, MAC) to path id, all of them: replaces the map's content."""

    paths: Mapping[tuple[int, str], int]


@dataclass(frozen=True, slots=True)
class WriteNextHops:
    """(ifindex, next hop or BFD peer) to path id, all of them: whose life a BFD session tells."""

    paths: Mapping[tuple[int, Address], int]


@dataclass(frozen=True, slots=True)
class WriteOverrides:
    """Routes to put (or replace) in qpd's own table.

    An empty tuple writes a ``throw`` route: the prefix is left to main. It is needed for the more specific routes
    inside an overridden prefix, since a rule that finds any match in a table before main never reaches main.
    """

    routes: Mapping[Network, tuple[NextHop, ...]]


@dataclass(frozen=True, slots=True)
class EraseOverrides:
    """Routes to take out of qpd's own table."""

    prefixes: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class Tell:
    """A line for ``qpctl events``, the log and the counters. ``kind`` is a fixed word, ``detail`` its fields.

    Kinds: path-new, path-gone, path-up, path-down, path-drained, path-undrained, path-hold, path-gray, path-gray-over,
    pair-contradicted, group-changed, uplink-attached, uplink-detached, override-set, override-cleared, frr-lost,
    frr-back, limit-reached, mismatch.
    """

    kind: str
    detail: Mapping[str, Any]
    kernel_ns: int | None = None


Operation = (
    AttachUplink
    | DetachUplink
    | WritePath
    | ErasePath
    | WriteTable
    | WriteGroup
    | EraseGroup
    | WriteDestinations
    | EraseDestinations
    | RaiseGeneration
    | SetLiving
    | WriteNeighbours
    | WriteNextHops
    | WriteOverrides
    | EraseOverrides
    | Tell
)
