"""Every metric that qpd exports: name, unit, labels, help, when it is absent and what not to add it to.

``python -m qpd.metrics`` prints ``docs/metrics.md`` from this table. Nothing here reads the kernel: the daemon gives a
:class:`MetricsSnapshot`, and :func:`exposition` writes it down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import accumulate
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_latest
from prometheus_client.registry import Collector

try:
    from prometheus_client.samples import BucketSpan, NativeHistogram
except ImportError:  # before 0.22
    NativeHistogram = None  # type: ignore[assignment,misc]

from qpd.model import PathState, Reason

# --- What the daemon gives --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FaultSample:
    """What went wrong with the packets of one direction of a path."""

    lost: int = 0
    """In the fabric: behind this leaf (out), or on the way to it (in)."""
    lost_at_host: int = 0
    """Between this leaf and its hosts: before it (out), or behind it (in)."""
    out_of_order: int = 0
    retransmitted: int = 0
    ecn_marked: int = 0


@dataclass(frozen=True, slots=True)
class PathSample:
    """One path. Counters since the maps were made; ``None``: not measured."""

    name: str
    interface: str
    next_hop: str
    plane: str
    state: str
    """A value of :class:`qpd.model.PathState`."""
    weight: int
    qps: int
    homes: int
    packets_out: int
    bytes_out: int
    packets_in: int
    bytes_in: int
    failovers: Mapping[str, int] = field(default_factory=dict)
    """Cause (a value of :class:`qpd.model.Reason`) to count."""
    faults_out: FaultSample = field(default_factory=FaultSample)
    """Of the packets that leave by it."""
    faults_in: FaultSample = field(default_factory=FaultSample)
    """Of the packets that arrive by it."""
    rtt: Distribution | None = None
    """Seconds, since the path has its id; None: no sample yet."""
    gray: bool = False
    """Loses or delays more than its siblings, though BFD sees it alive."""


@dataclass(frozen=True, slots=True)
class BfdSample:
    """One BFD session. ``path``: the name of the path that it guards."""

    path: str
    interface: str
    peer: str
    up: bool
    detection_seconds: float | None = None
    downs: int | None = None
    """How often the kernel's tap took it for down."""


@dataclass(frozen=True, slots=True)
class QpSample:
    """One of the busiest QPs that leave."""

    vni: int
    src: str
    dst: str
    dest_qp: int
    path: str
    packets: int
    bytes: int
    lost: int | None = None
    lost_at_host: int | None = None
    retransmitted: int | None = None
    out_of_order: int | None = None
    naks: int | None = None
    cnps: int = 0
    ecn_marked: int = 0
    rtt_seconds: float | None = None
    rtt_min_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Native:
    """A distribution as a native histogram of Prometheus: bucket n ends at 2^(n / 2^``schema``), inclusive."""

    schema: int
    counts: Mapping[int, int]
    """Bucket to observations, none of them 0, in order."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Observations by size. ``counts``: as many as ``bounds`` (upper, inclusive) and one more for all above."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    native: Native | None = None
    """The same in finer buckets, where they were kept."""


REACTION_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
"""Seconds; of :attr:`MetricsSnapshot.reactions`."""


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """All that is exported, as of one moment. ``busiest`` holds at most ``metrics.qp_series_max`` QPs."""

    version: str
    node: str
    placement: str
    paths: tuple[PathSample, ...] = ()
    bfd_sessions: tuple[BfdSample, ...] = ()
    verdicts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(hook, verdict), in lower case, to packets."""
    busiest: tuple[QpSample, ...] = ()
    qps_known: int = 0
    qps_active: int = 0
    qps_paired: int = 0
    qps_max: int = 0
    groups: int = 0
    destinations: int = 0
    overrides: int = 0
    uplinks: Mapping[str, bool] = field(default_factory=dict)
    """Interface to whether the classifier is attached to it."""
    frr: Mapping[str, bool] = field(default_factory=dict)
    """FRR daemon to whether it answers."""
    resyncs: int = 0
    reactions: Distribution | None = None
    """Seconds from an event that changed which paths live to the word written."""


class NeverFalling:
    """Counters that are differences, as what was passed over less what came late, for who takes a fall for a restart.

    Such a one is held at its highest until it is higher again. It starts anew where its packets do.
    """

    def __init__(self) -> None:
        self._highest: dict[Hashable, tuple[int, FaultSample | QpSample]] = {}

    def paths(self, paths: Iterable[PathSample]) -> tuple[PathSample, ...]:
        """The same with losses that do not fall."""
        return tuple(
            replace(
                path,
                faults_out=self._held((path.name, "out"), path.packets_out, path.faults_out),
                faults_in=self._held((path.name, "in"), path.packets_in, path.faults_in),
            )
            for path in paths
        )

    def qps(self, qps: Iterable[QpSample]) -> tuple[QpSample, ...]:
        """The same with losses that do not fall; QPs that are not among them are forgotten."""
        before, self._highest = (
            self._highest,
            {key: kept for key, kept in self._highest.items() if isinstance(kept[1], FaultSample)},
        )
        held = []
        for qp in qps:
            key = (qp.vni, qp.dst, qp.dest_qp)
            if key in before:
                self._highest[key] = before[key]
            held.append(self._held(key, qp.packets, qp))
        return tuple(held)

    def _held(self, key: Hashable, packets: int, now: _Losses) -> _Losses:
        packets_before, before = self._highest.get(key, (0, now))
        if packets >= packets_before:
            higher = {
                name: max(getattr(now, name), getattr(before, name))
                for name in ("lost", "lost_at_host")
                if getattr(now, name) is not None and getattr(before, name) is not None
            }
            now = replace(now, **higher)
        self._highest[key] = (packets, now)
        return now


_Losses = TypeVar("_Losses", FaultSample, QpSample)


# --- What is exported -------------------------------------------------------------------------------------------------

Sample = tuple[tuple[str, ...], float | Distribution]
"""The values of a family's labels, and the sample's value."""

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

FAILOVER_CAUSES = tuple(reason.value for reason in Reason if reason not in (Reason.NONE, Reason.HOLD_UP))
"""Every value of the label ``cause``: each is exported from the start, so that ``increase()`` sees the first."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family. ``absent``: when it has no sample. ``add``: what to add it to, and what not."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    help: str
    read: Callable[[MetricsSnapshot], Iterable[Sample]]
    absent: str = "never"
    add: str = ""

    def family(self, snapshot: MetricsSnapshot, *, native: bool = False) -> Family | None:
        """The family with its samples; None where there are none. ``native``: histograms as native ones, too."""
        samples = list(self.read(snapshot))
        if not samples:
            return None
        if self.kind == "histogram":
            histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
            for labels, value in samples:
                assert isinstance(value, Distribution)
                bounds = [*map(str, value.bounds), "+Inf"]
                histogram.add_metric(
                    labels, list(zip(bounds, accumulate(value.counts), strict=True)), value.total
                )
                if native and value.native is not None:
                    histogram.add_sample(
                        self.name,
                        dict(zip(self.labels, labels, strict=True)),
                        0.0,
                        native_histogram=_native(value, value.native),
                    )
            return histogram
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        family: CounterMetricFamily | GaugeMetricFamily = kinds[self.kind](
            self.name, self.help, labels=self.labels
        )
        for labels, value in samples:
            assert not isinstance(value, Distribution)
            family.add_metric(labels, value)
        return family


def _native(distribution: Distribution, native: Native) -> NativeHistogram:
    """Runs of buckets that follow each other, and each count as its difference from the one before."""
    spans: list[tuple[int, int]] = []
    counts: list[int] = []
    end = 0
    for bucket, count in native.counts.items():
        if spans and bucket == end:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((bucket - end, 1))
        counts.append(count)
        end = bucket + 1
    deltas = [count - before for before, count in zip([0, *counts], counts, strict=False)]
    return NativeHistogram(
        count_value=float(sum(counts)),
        sum_value=distribution.total,
        schema=native.schema,
        zero_threshold=0.0,
        zero_count=0.0,
        pos_spans=[BucketSpan(*span) for span in spans],
        pos_deltas=deltas,
    )


def _per_path(
    read: Callable[[PathSample], float | Distribution | None],
) -> Callable[[MetricsSnapshot], Iterable[Sample]]:
    def samples(snapshot: MetricsSnapshot) -> Iterator[Sample]:
        for path in snapshot.paths:
            value = read(path)
            if value is not None:
                yield (path.name,), value

    return samples


def _per_direction(
    out: Callable[[PathSample], float], in_: Callable[[PathSample], float]
) -> Callable[[MetricsSnapshot], Iterable[Sample]]:
    def samples(snapshot: MetricsSnapshot) -> Iterator[Sample]:
        for path in snapshot.paths:
            yield (path.name, "out"), out(path)
            yield (path.name, "in"), in_(path)

    return samples


def _per_qp(read: Callable[[QpSample], float | None]) -> Callable[[MetricsSnapshot], Iterable[Sample]]:
    def samples(snapshot: MetricsSnapshot) -> Iterator[Sample]:
        for qp in snapshot.busiest:
            value = read(qp)
            if value is not None:
                yield (str(qp.vni), qp.src, qp.dst, str(qp.dest_qp), qp.path), value

    return samples


def _one(read: Callable[[MetricsSnapshot], float]) -> Callable[[MetricsSnapshot], Iterable[Sample]]:
    return lambda snapshot: [((), read(snapshot))]


def _flags(
    read: Callable[[MetricsSnapshot], Mapping[str, bool]],
) -> Callable[[MetricsSnapshot], Iterable[Sample]]:
    return lambda snapshot: [((name,), float(flag)) for name, flag in read(snapshot).items()]


def _bfd(read: Callable[[BfdSample], float | None]) -> Callable[[MetricsSnapshot], Iterable[Sample]]:
    def samples(snapshot: MetricsSnapshot) -> Iterator[Sample]:
        for session in snapshot.bfd_sessions:
            value = read(session)
            if value is not None:
                yield (session.path, session.interface, session.peer), value

    return samples


_PATH = ("path",)
_QP = ("vni", "src", "dst", "dest_qp", "path")
_BFD = ("path", "interface", "peer")
_NO_SAMPLE = "until a request of a QP whose peer is known has been acknowledged; absent is not 0"
_NO_BFD = "for paths without a BFD session, and while bfdd has not been asked yet"
_FEW = "for QPs that are not among the busiest `metrics.qp_series_max`"
_MOVES = "A move to another path starts a new series."

METRICS: tuple[Metric, ...] = (
    Metric(
        "qpd_info",
        "gauge",
        "1",
        ("node", "version", "placement"),
        "The daemon that answers; always 1.",
        lambda s: [((s.node, s.version, s.placement), 1.0)],
        add="nothing: join with it for its labels",
    ),
    Metric(
        "qpd_path_info",
        "gauge",
        "1",
        ("path", "interface", "next_hop", "plane"),
        "Interface, next hop and plane of a path; always 1.",
        lambda s: [((p.name, p.interface, p.next_hop, p.plane), 1.0) for p in s.paths],
        add="nothing: join with it on `path` for its labels",
    ),
    Metric(
        "qpd_path_up",
        "gauge",
        "0 or 1",
        _PATH,
        "Whether the path serves: 1 up; 0 down, drained or held up.",
        _per_path(lambda p: float(p.state == PathState.UP.value)),
        add="other paths of this node: paths that serve",
    ),
    Metric(
        "qpd_path_state",
        "gauge",
        "0 or 1",
        ("path", "state"),
        "1 for the state that the path is in (up, hold, down, drained), 0 for the others.",
        lambda s: [
            ((p.name, state.value), float(p.state == state.value)) for p in s.paths for state in PathState
        ],
        add="other paths in the same `state`; over all states it counts paths",
    ),
    Metric(
        "qpd_path_gray",
        "gauge",
        "0 or 1",
        _PATH,
        "Whether the path loses or delays more than its siblings though BFD sees it alive; drained or not.",
        _per_path(lambda p: float(p.gray)),
        add="other paths of this node: gray paths. Not to `qpd_path_up`",
    ),
    Metric(
        "qpd_path_weight",
        "gauge",
        "1",
        _PATH,
        "Weight of the path: its share of queue pairs is its weight over the sum of its group's.",
        _per_path(lambda p: p.weight),
    ),
    Metric(
        "qpd_path_qps",
        "gauge",
        "queue pairs",
        _PATH,
        "Active queue pairs whose next packet takes this path.",
        _per_path(lambda p: p.qps),
        add="other paths: active queue pairs. Not to `qpd_path_homes`, which counts the same queue pairs",
    ),
    Metric(
        "qpd_path_homes",
        "gauge",
        "queue pairs",
        _PATH,
        "Active queue pairs whose home is this path, wherever they are now.",
        _per_path(lambda p: p.homes),
        add="other paths. Not to `qpd_path_qps`",
    ),
    Metric(
        "qpd_path_packets_total",
        "counter",
        "packets",
        ("path", "direction"),
        "RoCE packets that took this path, out (steered) or in (observed).",
        _per_direction(lambda p: p.packets_out, lambda p: p.packets_in),
        add="other paths in the same `direction`. Not to another node's: what leaves here arrives there",
    ),
    Metric(
        "qpd_path_bytes_total",
        "counter",
        "bytes",
        ("path", "direction"),
        "Bytes of the RoCE packets that took this path, as frames on the uplink, out or in.",
        _per_direction(lambda p: p.bytes_out, lambda p: p.bytes_in),
        add="other paths in the same `direction`. Not to interface counters, which count these bytes, too",
    ),
    Metric(
        "qpd_path_lost_packets_total",
        "counter",
        "packets",
        ("path", "direction"),
        "RoCE packets lost in the fabric, charged to the path that they took. Out: behind this leaf; each step back of "
        "a sender that neither a gap here nor an RNR NAK explains counts as one. In: on the way here; sequence numbers "
        "that were passed over and did not come late.",
        _per_direction(lambda p: p.faults_out.lost, lambda p: p.faults_in.lost),
        add="other paths in the same `direction`. Not to another node's: what one leaf misses another sees sent again. "
        "Not to `qpd_qp_lost_packets_total`, which counts the same packets",
    ),
    Metric(
        "qpd_host_lost_packets_total",
        "counter",
        "packets",
        ("path", "direction"),
        "RoCE packets lost between this leaf and its hosts, by the path of their queue pair, which is not to blame. "
        "Out: before they came here. In: behind this leaf.",
        _per_direction(lambda p: p.faults_out.lost_at_host, lambda p: p.faults_in.lost_at_host),
        add="other paths in the same `direction`. Not to `qpd_path_lost_packets_total` where the fabric is judged",
    ),
    Metric(
        "qpd_path_retransmitted_packets_total",
        "counter",
        "packets",
        ("path", "direction"),
        "RoCE packets of reliable connections that were sent again (go-back-N repeats all from the lost one on).",
        _per_direction(lambda p: p.faults_out.retransmitted, lambda p: p.faults_in.retransmitted),
        add="`qpd_path_packets_total`: never, that includes them",
    ),
    Metric(
        "qpd_path_out_of_order_packets_total",
        "counter",
        "packets",
        ("path", "direction"),
        "RoCE packets that came behind later ones of their queue pair without having been sent again.",
        _per_direction(lambda p: p.faults_out.out_of_order, lambda p: p.faults_in.out_of_order),
        add="`qpd_path_lost_packets_total`: never, a late packet is not lost",
    ),
    Metric(
        "qpd_path_ecn_marked_packets_total",
        "counter",
        "packets",
        ("path", "direction"),
        "RoCE packets with congestion experienced (ECN CE) in their outer or inner IP header.",
        _per_direction(lambda p: p.faults_out.ecn_marked, lambda p: p.faults_in.ecn_marked),
        add="other paths in the same `direction`. Not to another node's: marks stay on a packet",
    ),
    Metric(
        "qpd_path_rtt_seconds",
        "histogram",
        "seconds",
        _PATH,
        "Time from this leaf to the remote host and back, by request and acknowledgement.",
        _per_path(lambda p: p.rtt),
        absent=_NO_SAMPLE,
        add="other paths' buckets, for a quantile over them. The responder's own time to answer is part of it",
    ),
    Metric(
        "qpd_failovers_total",
        "counter",
        "failovers",
        ("path", "cause"),
        "Times that the path stopped serving, by cause; counted since the daemon started.",
        lambda s: [
            ((p.name, cause), float(p.failovers.get(cause, 0))) for p in s.paths for cause in FAILOVER_CAUSES
        ],
        add="other paths and causes. One lost link is one failover on each path that it carries",
    ),
    Metric(
        "qpd_verdicts_total",
        "counter",
        "packets",
        ("hook", "verdict"),
        "Packets by what the classifier did with them, on egress (steer) and ingress (observe).",
        lambda s: [(labels, float(count)) for labels, count in s.verdicts.items()],
        add="verdicts of the same `hook`, except `second_pass`: such a packet was counted as `redirected` before",
    ),
    Metric(
        "qpd_bfd_session_up",
        "gauge",
        "0 or 1",
        _BFD,
        "Whether the BFD session that guards the path is up.",
        _bfd(lambda b: float(b.up)),
        absent=_NO_BFD,
    ),
    Metric(
        "qpd_bfd_session_detection_seconds",
        "gauge",
        "seconds",
        _BFD,
        "Negotiated detection time of the BFD session (RFC 5880, 6.8.4).",
        _bfd(lambda b: b.detection_seconds),
        absent=_NO_BFD + ", and while the session has not negotiated one",
        add="nothing",
    ),
    Metric(
        "qpd_bfd_session_downs_total",
        "counter",
        "transitions",
        _BFD,
        "Times that the kernel's tap saw the BFD session leave Up or fall silent.",
        _bfd(lambda b: b.downs),
        absent=_NO_BFD + ", and for sessions none of whose packets has been seen on the uplink",
        add="other sessions. Not to `qpd_failovers_total`, which counts what followed",
    ),
    Metric(
        "qpd_reaction_seconds",
        "histogram",
        "seconds",
        (),
        "Time from an event that changed which paths live (by the kernel's time stamp where it has one) to the change "
        "applied. The tap's own changes in the kernel are earlier.",
        lambda s: [] if s.reactions is None else [((), s.reactions)],
        absent="before the first picture of the kernel has been taken",
    ),
    Metric(
        "qpd_qp_packets_total",
        "counter",
        "packets",
        _QP,
        "RoCE packets of one queue pair that left by an uplink.",
        _per_qp(lambda q: q.packets),
        absent=_FEW,
        add=f"`qpd_path_packets_total`: never, that counts the same packets. {_MOVES}",
    ),
    Metric(
        "qpd_qp_bytes_total",
        "counter",
        "bytes",
        _QP,
        "Bytes of one queue pair's packets, as frames on the uplink.",
        _per_qp(lambda q: q.bytes),
        absent=_FEW,
        add=f"`qpd_path_bytes_total`: never, that counts the same bytes. {_MOVES}",
    ),
    Metric(
        "qpd_qp_lost_packets_total",
        "counter",
        "packets",
        _QP,
        "Packets of one queue pair lost in the fabric behind this leaf, by the steps back of its sender.",
        _per_qp(lambda q: q.lost),
        absent=f"{_FEW}, for datagrams (UD), unreliable connections (UC), and until a request has been seen",
        add=f"`qpd_path_lost_packets_total`: never. {_MOVES}",
    ),
    Metric(
        "qpd_qp_host_lost_packets_total",
        "counter",
        "packets",
        _QP,
        "Packets of one queue pair lost between its host and this leaf.",
        _per_qp(lambda q: q.lost_at_host),
        absent=f"{_FEW}, for datagrams (UD), and until a request has been seen",
        add=f"`qpd_qp_lost_packets_total` where the fabric is judged. {_MOVES}",
    ),
    Metric(
        "qpd_qp_retransmitted_packets_total",
        "counter",
        "packets",
        _QP,
        "Packets of one queue pair that were sent again (go-back-N).",
        _per_qp(lambda q: q.retransmitted),
        absent=f"{_FEW}, for datagrams (UD), unreliable connections (UC), and until a request has been seen",
        add="`qpd_qp_packets_total`: never, it includes them",
    ),
    Metric(
        "qpd_qp_out_of_order_packets_total",
        "counter",
        "packets",
        _QP,
        "Packets of one queue pair that came here behind later ones without having been sent again.",
        _per_qp(lambda q: q.out_of_order),
        absent=f"{_FEW}, for datagrams (UD), and until a request has been seen",
        add="`qpd_qp_lost_packets_total`: never, a late packet is not lost",
    ),
    Metric(
        "qpd_qp_naks_total",
        "counter",
        "packets",
        _QP,
        "Negative acknowledgements on their way to one queue pair: something that it had sent is missing, not welcome "
        "yet (RNR) or refused.",
        _per_qp(lambda q: q.naks),
        absent=f"{_FEW}, and for other than reliable connections",
        add="`qpd_qp_packets_total`: never, it includes them",
    ),
    Metric(
        "qpd_qp_cnps_total",
        "counter",
        "packets",
        _QP,
        "Congestion notification packets sent to one queue pair, for which it shall send more slowly.",
        _per_qp(lambda q: q.cnps),
        absent=_FEW,
        add="`qpd_qp_packets_total`: never, it includes them",
    ),
    Metric(
        "qpd_qp_ecn_marked_packets_total",
        "counter",
        "packets",
        _QP,
        "Packets of one queue pair with congestion experienced (ECN CE) when they passed here.",
        _per_qp(lambda q: q.ecn_marked),
        absent=_FEW,
        add="`qpd_path_ecn_marked_packets_total`: never, that counts the same packets",
    ),
    Metric(
        "qpd_qp_rtt_seconds",
        "gauge",
        "seconds",
        _QP,
        "Last round-trip time of one queue pair, by request and acknowledgement.",
        _per_qp(lambda q: q.rtt_seconds),
        absent=f"{_NO_SAMPLE}; and {_FEW}",
        add="nothing",
    ),
    Metric(
        "qpd_qp_rtt_min_seconds",
        "gauge",
        "seconds",
        _QP,
        "Least round-trip time that one queue pair has had: about that of the path without queues.",
        _per_qp(lambda q: q.rtt_min_seconds),
        absent=f"{_NO_SAMPLE}; and {_FEW}",
        add="nothing",
    ),
    Metric(
        "qpd_qp_series_dropped",
        "gauge",
        "queue pairs",
        (),
        "Queue pairs known but without series of their own, being less busy than metrics.qp_series_max others.",
        _one(lambda s: max(0, s.qps_known - len(s.busiest))),
    ),
    Metric(
        "qpd_qps_known",
        "gauge",
        "queue pairs",
        (),
        "Queue pairs that leave and are remembered in the kernel, idle ones included.",
        _one(lambda s: s.qps_known),
        add="other nodes: one QP with traffic both ways is known once at each end",
    ),
    Metric(
        "qpd_qps_active",
        "gauge",
        "queue pairs",
        (),
        "Queue pairs that leave and had a packet within idle_after.",
        _one(lambda s: s.qps_active),
        add="`qpd_qps_known`: never, that includes them",
    ),
    Metric(
        "qpd_qps_paired",
        "gauge",
        "queue pairs",
        (),
        "Queue pairs that leave and whose other direction is known, by evidence in the packets.",
        _one(lambda s: s.qps_paired),
        add="`qpd_qps_known`: never, that includes them",
    ),
    Metric(
        "qpd_qps_max",
        "gauge",
        "queue pairs",
        (),
        "Queue pairs that the kernel can remember (bpf.qps_max); beyond it the least recently used is forgotten.",
        _one(lambda s: s.qps_max),
    ),
    Metric(
        "qpd_groups",
        "gauge",
        "groups",
        (),
        "Distinct sets of paths by which destinations are reached.",
        _one(lambda s: s.groups),
    ),
    Metric(
        "qpd_destinations",
        "gauge",
        "prefixes",
        (),
        "Prefixes of the underlay that are reached by a group.",
        _one(lambda s: s.destinations),
    ),
    Metric(
        "qpd_override_routes",
        "gauge",
        "routes",
        (),
        "Routes in qpd's own table now; 0 in the steady state.",
        _one(lambda s: s.overrides),
    ),
    Metric(
        "qpd_uplink_attached",
        "gauge",
        "0 or 1",
        ("interface",),
        "Whether the classifier is attached to the uplink.",
        _flags(lambda s: s.uplinks),
        absent="where no uplink has been found",
    ),
    Metric(
        "qpd_frr_up",
        "gauge",
        "0 or 1",
        ("daemon",),
        "Whether the FRR daemon answers on its vty socket.",
        _flags(lambda s: s.frr),
        absent="for daemons that qpd does not ask",
    ),
    Metric(
        "qpd_netlink_resyncs_total",
        "counter",
        "resyncs",
        (),
        "Times that the kernel's state was read anew because events were lost.",
        _one(lambda s: s.resyncs),
    ),
)


_OPENMETRICS_2 = "application/openmetrics-text; version=2."
NATIVE = NativeHistogram is not None and "version" in signature(openmetrics_latest).parameters
"""Whether the client library writes native histograms: since 0.23; 0.22 knows them, but leaves their values out."""


class _Snapshot(Collector):
    def __init__(self, snapshot: MetricsSnapshot, *, native: bool) -> None:
        self._snapshot = snapshot
        self._native = native

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            family = metric.family(self._snapshot, native=self._native)
            if family is not None:
                yield family


def exposition(snapshot: MetricsSnapshot, accept: str = "") -> tuple[bytes, str]:
    """The answer to a scrape and its content type; ``accept``: the request's Accept header.

    Adds the client library's ``process_*`` metrics of this process. Takes time in proportion to the series:
    call it in a thread where there are many.
    """
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    # Native histograms are part of OpenMetrics 2 only; the other formats would write them as samples of value 0.
    registry.register(_Snapshot(snapshot, native=NATIVE and _OPENMETRICS_2 in content_type))
    ProcessCollector(registry=registry)
    return encode(registry), content_type


# --- What is documented -----------------------------------------------------------------------------------------------


def document() -> str:
    """``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Written from `qpd/metrics.py` by `python -m qpd.metrics`; change the table there.",
        "",
        "qpd answers on `metrics.listen` (default `127.0.0.1:9791`), path `/metrics`, in Prometheus' text format or",
        "OpenMetrics. Counters of packets and bytes live in the kernel: they go on while the daemon restarts and end",
        "with `qpd detach`. Besides the metrics below there are the client library's `process_*`",
        "(`process_resident_memory_bytes` and others) for the daemon itself.",
        "",
        "Who asks for OpenMetrics 2 also gets `qpd_path_rtt_seconds` as a native histogram (buckets 4.4 % wide); the",
        "classic one has two buckets a doubling. Prometheus' own servers ask for other formats today.",
        "",
        "Series per queue pair exist for the busiest `metrics.qp_series_max` (default 200) only;",
        "`qpd_qp_series_dropped` says how many are not shown, and `qpctl qps` shows all. A queue pair's series ends",
        "when the kernel forgets it, when others are busier, or when it moves to another path.",
        "",
        "| metric | type | unit | labels |",
        "|---|---|---|---|",
        *(
            f"| [`{m.name}`](#{m.name}) | {m.kind} | {m.unit} | {', '.join(f'`{label}`' for label in m.labels)} |"
            for m in METRICS
        ),
    ]
    for metric in METRICS:
        lines += ["", f"## {metric.name}", "", metric.help, "", f"- Absent: {metric.absent}."]
        if metric.add:
            lines.append(f"- Adding: {metric.add.removesuffix('.')}.")
        if metric.labels == _QP:
            lines.append("- Labels: `path` is the one that its next packet takes; `dest_qp` is decimal.")
        elif "cause" in metric.labels:
            lines.append(
                f"- Labels: `cause` is one of {', '.join(f'`{cause}`' for cause in FAILOVER_CAUSES)}."
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
