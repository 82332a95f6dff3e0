"""Faults on a timeline, as data: what is done to a lab, when, and when it is undone. Pure; `inject` does it.

In YAML a schedule is a list; each entry has `at` (seconds from the start), `for` (seconds; without it the fault lasts
to the end) and one fault by its name, with its fields or, in short, with its first field alone::

    - {at: 2, for: 3, cut: dc1-leaf1--dc1-spine1}
    - {at: 8, for: 5, loss: {link: "dc1-leaf1:eth1", towards: dc1-leaf1, percent: 5}}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import combinations
from typing import Any, ClassVar

from qpd.lab.errors import LabError
from qpd.lab.topology import Link, Role, Topology

QPD = "qpd"
"""The name of qpd among a router's daemons; all others are FRR's."""


@dataclass(frozen=True)
class Fault:
    """Something that is done to a lab and can be undone."""

    name: ClassVar[str] = ""

    def claims(self, topology: Topology) -> frozenset[str]:
        """What of the lab it holds while it lasts: two faults at one time may not hold the same.

        Raises:
            LabError: where the lab has no such link, node, site or daemon, or a number makes no sense.
        """
        raise NotImplementedError

    def to_yaml(self) -> dict[str, Any]:
        """The fault as a schedule writes it."""
        return {self.name: {key: value for key, value in asdict(self).items() if value is not None}}

    def __str__(self) -> str:
        """The fault in one line, for people."""
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in asdict(self).values()]
        return " ".join([self.name, *(value for value in values if value != "None")])


@dataclass(frozen=True)
class Cut(Fault):
    """A link without carrier: one end is set down."""

    name: ClassVar[str] = "cut"
    link: str
    side: str | None = None
    """The node whose interface is set down; by default the first in the topology file."""

    def claims(self, topology: Topology) -> frozenset[str]:  # noqa: D102
        link = topology.link(*self.link.split())
        _end(link, self.side, "side")
        return frozenset({f"carrier of {link}"})


@dataclass(frozen=True)
class Loss(Fault):
    """Packets lost silently, carrier up: all of them, or a part (gray loss); both ways or one."""

    name: ClassVar[str] = "loss"
    link: str
    towards: str | None = None
    """The node that no longer hears; both by default."""
    percent: float = 100.0

    def claims(self, topology: Topology) -> frozenset[str]:  # noqa: D102
        link = topology.link(*self.link.split())
        _end(link, self.towards, "towards")
        if not 0 < self.percent <= 100:
            raise LabError(f"loss: percent: {self.percent:g}: give more than 0, at most 100")
        return frozenset(f"what arrives at {end}" for end in link.receivers(self.towards))


@dataclass(frozen=True)
class Delay(Fault):
    """Delay on top of what the link has; needs netem."""

    name: ClassVar[str] = "delay"
    link: str
    ms: float
    """Milliseconds that are added one way."""
    jitter_ms: float = 0.0
    """Each packet's delay is anywhere within plus and minus this."""
    towards: str | None = None
    """Only what goes towards this node is late; both ways by default."""

    def claims(self, topology: Topology) -> frozenset[str]:  # noqa: D102
        link = topology.link(*self.link.split())
        _end(link, self.towards, "towards")
        if not 0 < self.ms <= 10_000:
            raise LabError(f"delay: ms: {self.ms:g}: give more than 0, at most 10000")
        if not 0 <= self.jitter_ms <= self.ms:
            raise LabError(f"delay: jitter_ms: {self.jitter_ms:g}: give 0 to the delay's {self.ms:g}")
        return frozenset(f"delay from {end}" for end in link.senders(self.towards))


@dataclass(frozen=True)
class Reboot(Fault):
    """A router without power: its daemons are killed and its links are down until it is undone."""

    name: ClassVar[str] = "reboot"
    node: str

    def claims(self, topology: Topology) -> frozenset[str]:  # noqa: D102
        _router(topology, self.node, self.name)
        carriers = {f"carrier of {link}" for link in topology.links_of(self.node)}
        return frozenset({f"daemons of {self.node}"} | carriers)


@dataclass(frozen=True)
class Partition(Fault):
    """A site without its inter-site links."""

    name: ClassVar[str] = "partition"
    site: str

    def claims(self, topology: Topology) -> frozenset[str]:  # noqa: D102
        return frozenset(f"carrier of {link}" for link in self.links(topology))

    def links(self, topology: Topology) -> list[Link]:
        """The inter-site links of the site."""
        found = [
            link
            for link in topology.inter_site_links
            if self.site in {topology.site(e.node) for e in link.ends}
        ]
        if not found:
            sites = ", ".join(topology.sites) or "none"
            raise LabError(f"partition: site {self.site} has no inter-site links; sites are {sites}")
        return found


@dataclass(frozen=True)
class _OfDaemon(Fault):
    node: str
    daemon: str = QPD
    """`qpd`, or one of FRR's: `zebra`, `bgpd`, `bfdd`."""

    def claims(self, topology: Topology) -> frozenset[str]:
        _router(topology, self.node, self.name)
        if self.daemon == QPD and topology.sidecar(self.node) is None:
            raise LabError(f"{self.name}: {self.node} has no qpd beside it in {topology.path}")
        return frozenset({f"{self.daemon} of {self.node}"})


@dataclass(frozen=True)
class Stop(_OfDaemon):
    """A daemon ended in order (SIGTERM); it is started again when undone."""

    name: ClassVar[str] = "stop"


@dataclass(frozen=True)
class Kill(_OfDaemon):
    """A daemon killed (SIGKILL); it is started again when undone."""

    name: ClassVar[str] = "kill"


@dataclass(frozen=True)
class Hang(_OfDaemon):
    """A daemon that does nothing (SIGSTOP) until it is undone."""

    name: ClassVar[str] = "hang"


KINDS: Mapping[str, type[Fault]] = {
    kind.name: kind for kind in (Cut, Loss, Delay, Reboot, Partition, Stop, Kill, Hang)
}
"""Every fault by its name."""


@dataclass(frozen=True)
class Timed:
    """A fault and its time."""

    at: float
    """Seconds from the start of the schedule."""
    duration: float | None
    """Seconds; None: to the end of the schedule, whenever that is."""
    fault: Fault

    @property
    def until(self) -> float:
        """Seconds from the start; infinity where it lasts to the end."""
        return math.inf if self.duration is None else self.at + self.duration

    def to_yaml(self) -> dict[str, Any]:
        """The entry as a schedule writes it."""
        lasts = {} if self.duration is None else {"for": self.duration}
        return {"at": self.at, **lasts, **self.fault.to_yaml()}


@dataclass(frozen=True)
class Step:
    """The begin or the end of a fault."""

    at: float
    begins: bool
    fault: Fault

    def __str__(self) -> str:
        return f"{self.fault}{'' if self.begins else ': undone'}"


@dataclass(frozen=True)
class Schedule:
    """Faults on a timeline."""

    entries: tuple[Timed, ...] = ()

    @property
    def steps(self) -> list[Step]:
        """All begins and ends in the order in which they are done; at one time, ends come first.

        A fault that lasts to the end has no step for that: who plays the schedule undoes what is left.
        """
        steps = [Step(entry.at, begins=True, fault=entry.fault) for entry in self.entries]
        steps += [
            Step(entry.until, begins=False, fault=entry.fault)
            for entry in self.entries
            if entry.duration is not None
        ]
        return sorted(steps, key=lambda step: (step.at, step.begins))

    @property
    def length(self) -> float:
        """Seconds from the start to the last step; 0 where there is none."""
        return max((step.at for step in self.steps), default=0.0)

    def check(self, topology: Topology) -> None:
        """Raise LabError where a fault does not fit the lab, or two hold the same thing at one time."""
        claims = [_claims(entry, topology, f"faults[{number}]") for number, entry in enumerate(self.entries)]
        for (i, one), (j, other) in combinations(enumerate(self.entries), 2):
            if one.at < other.until and other.at < one.until and (both := shared(claims[i], claims[j])):
                raise LabError(f"faults[{i}] and faults[{j}] both hold {both}; let one end before the other")

    def to_yaml(self) -> list[dict[str, Any]]:
        """The schedule as YAML writes it; `parse` reads it back."""
        return [entry.to_yaml() for entry in self.entries]


def parse(raw: object, where: str = "faults") -> Schedule:
    """The schedule in a parsed YAML list (None: no faults).

    Raises:
        LabError: with `where` and the index of the entry that is wrong.
    """
    if raw is None:
        return Schedule()
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise LabError(f"{where}: expected a list of faults, found {type(raw).__name__}")
    return Schedule(tuple(_timed(entry, f"{where}[{number}]") for number, entry in enumerate(raw)))


def parse_fault(raw: Mapping[str, Any], where: str = "fault") -> Fault:
    """The one fault of a mapping such as `{"cut": {"link": "a--b"}}`."""
    known = ", ".join(KINDS)
    if len(raw) != 1:
        raise LabError(f"{where}: expected one of {known}; found {', '.join(map(str, raw)) or 'none'}")
    ((name, values),) = raw.items()
    if name not in KINDS:
        raise LabError(f"{where}: {name!r} is no fault; faults are {known}")
    return _fault(KINDS[name], values, f"{where}.{name}")


def shared(one: Iterable[str], other: Iterable[str]) -> str | None:
    """The first thing that both claims hold: the same thing, or a daemon of a node whose daemons are all held."""
    both = set(one) & set(other)
    for mine, theirs in ((one, other), (other, one)):
        nodes = {claim.removeprefix("daemons of ") for claim in mine if claim.startswith("daemons of ")}
        both |= {claim for claim in theirs if claim.rpartition(" of ")[2] in nodes}
    return min(both, default=None)


def _timed(raw: object, where: str) -> Timed:
    if not isinstance(raw, Mapping):
        raise LabError(f"{where}: expected a mapping with `at` and a fault, found {type(raw).__name__}")
    if "at" not in raw:
        raise LabError(f"{where}: `at` is missing: give seconds from the start")
    at = _seconds(raw["at"], f"{where}.at")
    duration = _seconds(raw["for"], f"{where}.for") if "for" in raw else None
    if duration == 0:
        raise LabError(f"{where}.for: 0: give more than 0 seconds, or leave it out")
    rest = {key: value for key, value in raw.items() if key not in {"at", "for"}}
    return Timed(at, duration, parse_fault(rest, where))


def _seconds(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise LabError(f"{where}: {value!r}: give seconds, 0 or more")
    return float(value)


def _fault(kind: type[Fault], values: object, where: str) -> Fault:
    known = {one.name: one for one in fields(kind)}
    if isinstance(values, str):
        values = {next(iter(known)): values}
    if not isinstance(values, Mapping):
        raise LabError(f"{where}: expected a mapping of {', '.join(known)}, found {type(values).__name__}")
    for key, value in values.items():
        if key not in known:
            raise LabError(f"{where}: {key!r} is not among {', '.join(known)}")
        numeric = known[key].type == "float"
        if numeric and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise LabError(f"{where}.{key}: {value!r}: give a number")
        if not numeric and not isinstance(value, str):
            raise LabError(f"{where}.{key}: {value!r}: give a name")
    missing = [key for key, one in known.items() if one.default is MISSING and key not in values]
    if missing:
        raise LabError(f"{where}: `{missing[0]}` is missing")
    return kind(**{key: float(v) if known[key].type == "float" else v for key, v in values.items()})


def _claims(entry: Timed, topology: Topology, where: str) -> frozenset[str]:
    try:
        return entry.fault.claims(topology)
    except LabError as error:
        raise LabError(f"{where}: {error}") from error


def _end(link: Link, node: str | None, key: str) -> None:
    if node is not None and node not in {end.node for end in link.ends}:
        raise LabError(f"{key}: {link} has no end at {node}")


def _router(topology: Topology, node: str, fault: str) -> None:
    routers = [one.name for one in topology.of_role(Role.SPINE, Role.LEAF)]
    if node not in routers:
        raise LabError(f"{fault}: {node} is no router of {topology.name}; routers are {', '.join(routers)}")
