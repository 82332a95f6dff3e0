"""What the API answers: the JSON objects, key by key. ``qpctl`` prints them and ``docs/cli.md`` shows them.

Typed dictionaries, since 100 000 of them are written in one answer, and since ``qpctl`` shows them as they come.
pydantic's ``TypeAdapter`` validates them where that is wanted (the tests do).
Keys may be added, never renamed or removed. ``None`` (null) means: not measured, or there is none; never 0.
Ages are seconds, RTTs microseconds; addresses and prefixes are text.
"""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

Direction = Literal["out", "in"]
"""``out``: steered, leaves by an uplink. ``in``: observed, arrives by an uplink."""

QpState = Literal["home", "away", "idle", "unsteered", "observed"]
"""``home``: uses its home. ``away``: uses a stand-in, as its home does not live or is no next hop of its destination.
``idle``: no packet for ``idle_after``. ``unsteered``: the kernel chose its way (no group, or no living path).
``observed``: arrives here (direction ``in``); steered at the other end."""


class BfdInfo(TypedDict):
    """The BFD session that guards a path."""

    state: str
    """``up``, ``init``, ``down`` or ``admin-down`` (RFC 5880, 4.1)."""
    remote_state: str | None
    detection_time_s: float | None
    diagnostic: str


class PathRow(TypedDict):
    """One path: a next hop on an uplink."""

    id: int
    name: str
    interface: str
    next_hop: str
    plane: str
    weight: int
    state: Literal["up", "hold", "down", "drained"]
    reason: str
    """Why it does not serve (``bfd-down``, ``link-down``, ...); empty where it does."""
    qps: int
    """Active QPs whose next packet takes this path."""
    packets: int
    """RoCE packets that left by it."""
    bytes: int
    lost: int | None
    rtt_us: float | None
    bfd: BfdInfo | None
    homes: int
    """Active QPs whose home it is: what ``balanced`` placement counts."""
    packets_in: int
    bytes_in: int
    since_s: float
    """Seconds that it has been in this state."""


class QpRow(TypedDict):
    """One queue pair, as packets name it: VNI, destination host, destination QP."""

    vni: int
    """0: not encapsulated."""
    dst: str
    dest_qp: int
    src: str
    slot: int | None
    home: str | None
    path: str | None
    state: QpState
    packets: int
    bytes: int
    lost: int | None
    retransmitted: int | None
    out_of_order: int | None
    naks: int | None
    cnps: int | None
    ecn_marked: int | None
    rtt_us: float | None
    peer_qp: int | None
    age_s: float
    """Since its first packet."""
    idle_s: float
    """Since its last packet."""
    direction: Direction
    destination: str
    """Outer destination address (the remote VTEP); ``dst`` again without VXLAN."""
    moves: int
    """How often its path changed."""
    source_port: int | None
    """Outer UDP source port that VXLAN gets for it."""


class GroupMember(TypedDict):
    """A path of a group."""

    path: str
    weight: int
    state: Literal["up", "hold", "down", "drained"]


class GroupRow(TypedDict):
    """The paths by which some destinations are reached."""

    id: int
    table: int
    """Number of the slot table that it reads; groups with equal weights share one."""
    members: list[GroupMember]
    destinations: list[str]


class UplinkRow(TypedDict):
    """An interface that carries the classifier."""

    name: str
    ifindex: int
    up: bool
    attach: Literal["tcx", "clsact"] | None
    """How the classifier is attached; null: it is not."""


class PathsCount(TypedDict):
    """How many paths there are and how many of them serve."""

    total: int
    up: int


class QpsCount(TypedDict):
    """QPs that leave: known to the kernel, of these active, and the most that it keeps."""

    known: int
    active: int
    max: int


class StatusInfo(TypedDict):
    """The node at a glance."""

    state: Literal["starting", "steering"]
    """``starting``: the kernel's state is being read; an earlier daemon's programs go on meanwhile."""
    node: str
    version: str
    pid: int
    started: str
    """RFC 3339, UTC."""
    uptime_s: float
    placement: Literal["balanced", "hash"]
    pin_dir: str
    uplinks: list[UplinkRow]
    paths: PathsCount
    groups: int
    destinations: int
    qps: QpsCount
    failovers: int
    """Since the daemon started: times that a serving path stopped serving."""
    overrides: int
    """Routes in qpd's own table now; 0 in the steady state."""
    frr: dict[str, bool]
    """FRR daemon (``bfdd``, ``bgpd``) to whether it answers."""
    verdicts: dict[str, dict[str, int]]
    """Hook (``steer``, ``observe``) to verdict to packets."""
    warnings: list[str]
    """What the operator should mend, one sentence each."""


class ExplainFields(TypedDict):
    """The fields that name the QP; nothing else enters its hash."""

    vni: int
    dst: str
    dest_qp: int


class ExplainStep(TypedDict):
    """One place in the slot's preference order."""

    place: int
    """1: first choice."""
    path: str
    plane: str
    weight: int
    member: bool
    """The destination's routes have it as a next hop."""
    state: Literal["up", "hold", "down", "drained"]
    reason: str
    homes: int
    share: int | None
    """Most homes that ``balanced`` gives it before it is passed over; null with ``hash`` or where it cannot serve."""


class Explanation(TypedDict):
    """Why a QP uses its path, or which one it would use."""

    seen: bool
    """False: no packet of it has passed; ``home`` and ``path`` are what its first one would get now."""
    fields: ExplainFields
    destination: str
    prefix: str | None
    """The route's prefix that covers ``destination``; null: none does."""
    group: int | None
    hash: int
    slot: int
    source_port: int
    order: list[ExplainStep]
    home: str | None
    path: str | None
    """Null: the kernel's own choice applies."""
    why: list[str]
    """The reasons, in sentences."""
    qp: QpRow | None


class EventRecord(TypedDict):
    """One line of the daemon's history."""

    seq: int
    """Counts from 1 at the daemon's start; a gap tells a follower what it missed."""
    time: str
    """RFC 3339, UTC, microseconds; the kernel's own time stamp where there is one."""
    kind: str
    """A fixed word (``path-down``, ``group-changed``, ...); docs/cli.md lists them."""
    detail: dict[str, Any]
    kernel_ns: int | None
    """CLOCK_MONOTONIC of the cause in the kernel, ns."""
