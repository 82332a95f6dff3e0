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

Transport = Literal["rc", "uc", "rd", "ud", "xrc"]
"""InfiniBand's services. Of ``uc`` nothing is sent again; of ``ud``, datagrams, it does not show what is missing."""

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
    """Packets that left by it and were lost in the fabric, as their being sent again shows; since it has its id."""
    rtt_us: float | None
    """Median round-trip time of the last 10 to 20 s; null: no request was acknowledged in that time."""
    bfd: BfdInfo | None
    homes: int
    """Active QPs whose home it is, wherever they are now."""
    packets_in: int
    bytes_in: int
    since_s: float
    """Seconds that it has been in this state."""
    lost_in: int
    """Packets that should have arrived by it and were lost in the fabric, as gaps show."""
    lost_at_host: int
    """Packets of its QPs lost between this leaf and its hosts, both ways: not the path's fault."""
    retransmitted: int
    """Packets that left by it and had been sent before."""
    out_of_order_in: int
    """Packets that arrived by it behind later ones."""
    ecn_marked_in: int
    """Packets that arrived by it with congestion experienced (ECN CE)."""
    rtt_p99_us: float | None
    rtt_samples: int
    """Behind ``rtt_us`` and ``rtt_p99_us``."""
    gray: bool
    """It loses or delays more than its siblings (``gray.*``), though BFD sees it alive."""


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
    """In the fabric. ``out``: behind this leaf, by its sender's steps back (RC). ``in``: on the way here, by gaps."""
    retransmitted: int | None
    """Sent again (RC)."""
    out_of_order: int | None
    """Came here behind later ones, not sent again."""
    naks: int | None
    """Negative acknowledgements among its packets: something of the other direction is missing, early or refused."""
    cnps: int
    """Congestion notification packets among them."""
    ecn_marked: int
    """With congestion experienced (ECN CE)."""
    rtt_us: float | None
    """The last one; null while ``peer_qp`` is null."""
    peer_qp: int | None
    """The QP at ``src`` that speaks with it; null: no evidence yet, or none that is sure."""
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
    transport: Transport | None
    """Service of its last packet; null: none that is known."""
    lost_at_host: int | None
    """Between this leaf and its host. ``out``: before they came here, by gaps. ``in``: behind this leaf (RC)."""
    rtt_min_us: float | None
    rtt_mean_us: float | None
    rtt_samples: int


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
    """What ``balanced`` counts: active QPs that send (not only answers) whose home it is."""
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
    fares: list[str]
    """How its packets have fared, in sentences; empty for a QP that has not been seen."""
    reverse: QpRow | None
    """Its other direction, where the peer is known and its packets arrive here."""


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
