"""What an experiment file may say, and what it means. Pure but for `read`, which reads the file.

docs/experiments.md explains the keys.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)

from qpd.lab import faults as faults_
from qpd.lab import wan as wan_
from qpd.lab.errors import LabError
from qpd.lab.experiment.measures import BY_NAME
from qpd.lab.workload import PROFILES, Workload
from qpd.yamlfile import Document, Problem, SettingsError

_TIMERS = re.compile(r"(\d+)x(\d+)")
NO_BFD = (1000, 255)
"""Timers that stand for no BFD: after 255 s only, when BGP has long given up (180 s), would bfdd notice anything."""


class Steering(str, Enum):
    """Who chooses a queue pair's path, and by what."""

    ECMP = "ecmp"
    """The kernel's VTEP as it is: one cached outer route for each remote VTEP and CPU."""
    ECMP_PORTS = "ecmp-ports"
    """The kernel with a UDP source port for each QP, and packets marked, which defeats that cache: a choice a flow."""
    BINS = "bins"
    """The same with four source ports in all, to which QPs are dealt in turn."""
    HASH = "hash"
    """qpd, `placement: hash`."""
    BALANCED = "balanced"
    """qpd, `placement: balanced`."""

    @property
    def qpd(self) -> bool:
        """Whether qpd runs."""
        return self in {Steering.HASH, Steering.BALANCED}

    @property
    def marked(self) -> bool:
        """Whether packets get a mark at the leaf, so that the kernel chooses by flow."""
        return self in {Steering.ECMP_PORTS, Steering.BINS}

    @property
    def source_ports(self) -> str:
        """The UDP source ports that the queue pairs have."""
        return "bins" if self is Steering.BINS else "linux"


def _timers(value: object) -> object:
    """`10x3` (milliseconds, multiplier) or `off`."""
    if value is False or value == "off":  # YAML 1.1 reads a bare `off` as false
        return NO_BFD
    match = _TIMERS.fullmatch(value) if isinstance(value, str) else None
    if match is None or not 10 <= int(match[1]) <= 60_000 or not 2 <= int(match[2]) <= 255:
        raise ValueError("is no BFD timer; give 10x3 (10 to 60000 ms, 2 to 255 times) or off")
    return (int(match[1]), int(match[2]))


def _faults(value: object) -> object:
    if isinstance(value, faults_.Schedule):
        return value
    try:
        return faults_.parse(value, "")
    except LabError as error:
        raise ValueError(f"is no schedule of faults: {error}") from None


def _rate(value: object) -> object:
    try:
        return wan_.parse_rate(value)
    except LabError as error:
        raise ValueError(str(error)) from None


def _shape(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    try:
        return wan_.parse(value, "wan")
    except LabError as error:
        raise ValueError(f"is no wide-area link: {error}") from None


def _measure(name: str) -> str:
    if name not in BY_NAME:
        raise ValueError(f"is no measure; measures are {', '.join(BY_NAME)}")
    return name


Timers = Annotated[tuple[int, int], BeforeValidator(_timers)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Flow(_Section):
    """Who sends to whom."""

    source: str
    destination: str


class ConstantRate(_Section):
    """Queue pairs that send packets at one rate each and wait for nothing: they show load factors and outages."""

    kind: Literal["constant-rate"]
    flows: Annotated[list[Flow], Field(min_length=1)]
    qps: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Queue pairs of each flow."""
    rate: Annotated[float, Field(gt=0, le=1_000_000)] = 250.0
    """Packets per second and queue pair."""
    size: Annotated[int, Field(ge=1, le=4096)] = 1024
    """Bytes of data a packet."""
    duration: Annotated[float, Field(gt=0, le=3600)] = 3.0
    """Seconds."""
    source_ports: Literal["linux", "fixed"] = "linux"
    """A UDP source port for each queue pair, as Linux derives it, or one for all; the steering `bins` has its own."""

    @property
    def hosts(self) -> list[str]:
        """All that send."""
        return list(dict.fromkeys(flow.source for flow in self.flows))

    @property
    def receivers(self) -> list[str]:
        """All that receive."""
        return list(dict.fromkeys(flow.destination for flow in self.flows))


def _kind(value: object) -> str | None:
    """Which of the workloads a mapping speaks of."""
    if isinstance(value, ConstantRate):
        return _CONSTANT_RATE
    if isinstance(value, Workload):
        return _COLLECTIVE
    if not isinstance(value, Mapping):
        return None
    if value.get("kind") == _CONSTANT_RATE:
        return _CONSTANT_RATE
    return _COLLECTIVE if "profile" in value or value.get("kind") in _COLLECTIVES else None


def _collective(value: object) -> Workload:
    """A workload of the lab, or one of its profiles with other values."""
    if isinstance(value, Workload):
        return value
    assert isinstance(value, Mapping)
    given = dict(value)
    profile = given.pop("profile", None)
    if profile is not None and profile not in PROFILES:
        raise ValueError(f"profile: there is no {profile!r}; profiles are {', '.join(PROFILES)}")
    base = PROFILES[profile].to_mapping() if profile is not None else {}
    try:
        return Workload.from_mapping(_over(base, given))
    except LabError as error:
        raise ValueError(f"is no workload: {error}") from None


_CONSTANT_RATE, _COLLECTIVE = "constant-rate", "collective"
_COLLECTIVES = ("allreduce", "parameter-server")

AnyWorkload = Annotated[
    Annotated[ConstantRate, Tag(_CONSTANT_RATE)]
    | Annotated[Workload, PlainValidator(_collective), Tag(_COLLECTIVE)],
    Discriminator(_kind),
]


class Limit(_Section):
    """A rate to which links are limited."""

    rate: Annotated[int, BeforeValidator(_rate)]
    """Bits per second; written as `20mbit`."""
    queue: Annotated[int, Field(ge=10_000)] = 8_000_000
    """Bytes that wait for the link before packets are lost: RoCE's networks are made not to lose any."""


class FabricSection(_Section):
    """What the experiment runs on."""

    topology: Path
    """A containerlab topology file or its directory, or a description for `qplab generate`, of which the lab is made
    beside the results; relative to the experiment file."""
    bfd: Timers = (100, 3)
    """BFD timers of the links that faults touch; where there are no faults, of all between routers."""
    deadline: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Seconds until the fabric must have converged."""
    uplinks: Limit | None = None
    """Limits the links between leaves and spines, both ways."""
    wan: Annotated[wan_.Shape, BeforeValidator(_shape)] = wan_.PLAIN
    """What the links between sites do: a `profile`, or `rtt_ms`, `jitter_ms`, `loss_percent`, `rate`."""


class Condition(_Section):
    """One of the things that are compared."""

    name: str
    steering: Steering
    at: Literal["leaves", "routers"] = "leaves"
    """Where qpd runs: beside the leaves, or beside the spines as well."""
    bfd: Timers | None = None
    """Other BFD timers than the fabric's."""
    settings: dict[str, Any] = {}
    """More of qpd's configuration, as in qpd.yaml."""


def _conditions(value: object) -> object:
    """A steering mode alone is a condition of that name."""
    if not isinstance(value, list):
        return value
    return [{"name": one, "steering": one} if isinstance(one, str) else one for one in value]


class Sweep(_Section):
    """One key that takes several values; every condition is measured at each."""

    key: str
    """With dots: `workload.qps`."""
    values: Annotated[list[Any], Field(min_length=1)]
    label: str
    """What the values are, with their unit: the axis of the plots."""


class Experiment(_Section):
    """An experiment file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]
    title: str
    question: str
    """What it is to find out, in a sentence or two; stands in the report."""
    fabric: FabricSection
    workload: AnyWorkload
    conditions: Annotated[list[Condition], BeforeValidator(_conditions), Field(min_length=1)]
    baseline: str | None = None
    """The condition that the others are compared with; by default the first."""
    figures: Annotated[list[Annotated[str, AfterValidator(_measure)]], Field(min_length=1)]
    """The measures that the experiment is about, most important first: the report's table and plots."""
    faults: Annotated[Any, BeforeValidator(_faults)] = faults_.Schedule()
    """A schedule of faults, in seconds from the moment when all senders send."""
    deadline: Annotated[float, Field(gt=0, le=36_000)] = 300.0
    """Seconds after which a trial has failed."""
    fault_jitter: Annotated[float, Field(ge=0, le=60)] = 0.0
    """Each repetition begins its faults up to so many seconds later, drawn from the seed."""
    sweep: Sweep | None = None
    repetitions: Annotated[int, Field(ge=1, le=1000)] = 10
    seed: Annotated[int, Field(ge=0)] = 1
    """Queue pair numbers, multipath hash seeds and fault times follow from it."""

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _directory: Path = PrivateAttr(default=Path())

    def model_post_init(self, context: Any, /) -> None:  # noqa: ANN401 - pydantic's own
        """Keep what the model was made of: sweeps make others of it."""
        self._raw = context["raw"]
        self._directory = context["directory"]

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        names = [condition.name for condition in self.conditions]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"conditions: {twice[0]!r} is there twice; give each condition its own name")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(
                f"baseline: there is no condition {self.baseline!r}; give one of {', '.join(names)}"
            )
        return self

    @property
    def base(self) -> str:
        """The name of the condition that the others are compared with."""
        return self.baseline or self.conditions[0].name

    @property
    def topology(self) -> Path:
        """The topology, seen from here."""
        return self._directory / self.fabric.topology

    @property
    def raw(self) -> dict[str, Any]:
        """What the file says, `small` applied where it was asked for."""
        return copy.deepcopy(self._raw)

    def points(self) -> list[Point]:
        """The values of the sweep, each with the experiment that it makes; one point where nothing is swept."""
        if self.sweep is None:
            return [Point(None, self)]
        found = []
        for value in self.sweep.values:
            raw = self.raw
            _set(raw, self.sweep.key, value)
            found.append(Point(value, _made(raw, self._directory)))
        return found


@dataclass(frozen=True)
class Point:
    """One value of the swept key."""

    value: Any
    experiment: Experiment


def read(
    path: Path, *, small: bool = False, seed: int | None = None, repetitions: int | None = None
) -> Experiment:
    """The experiment of a file.

    Args:
        path: of the YAML file.
        small: what the file's key `small` says stands in place of the rest.
        seed: in place of the file's.
        repetitions: in place of the file's.

    Raises:
        SettingsError: every error with file, line, key, and how to mend it.
    """
    document = Document.read(path)
    if document.problems:
        raise SettingsError(document.problems)
    raw = {key: value for key, value in document.data.items() if key != "small"}
    less = document.data.get("small")
    if small:
        if not isinstance(less, Mapping):
            missing = "is missing; say there what a small run is, or run without --small"
            raise SettingsError((Problem(str(path), "small", missing),))
        raw = _over(raw, less)
    given = {"seed": seed, "repetitions": repetitions}
    raw |= {key: value for key, value in given.items() if value is not None}
    try:
        experiment = _made(raw, path.parent)
        # What a sweep sets must fit, too.
        experiment.points()
    except ValidationError as error:
        problems = (_explain(document, dict(one)) for one in error.errors(include_url=False))
        raise SettingsError(tuple(problems)) from None
    return experiment


def _made(raw: dict[str, Any], directory: Path) -> Experiment:
    return Experiment.model_validate(raw, context={"raw": raw, "directory": directory})


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _set(raw: dict[str, Any], key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            return
        raw = inner
    raw[last] = value


def keys(model: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[str]:
    """Every key with dots; those of lists' elements without an index."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in _models(info.annotation):
            yield from keys(kind, f"{prefix}{name}.")


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _explain(document: Document, error: Mapping[str, Any]) -> Problem:
    # The tag of a workload stands in the place of a key.
    parts = [str(part) for part in error["loc"] if part not in {_CONSTANT_RATE, _COLLECTIVE}]
    key = ".".join(parts)
    plain = ".".join(part for part in parts if not part.isdecimal())
    return Problem(document.where(key), key, _message(plain, error))


def _message(key: str, error: Mapping[str, Any]) -> str:
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    shown = json.dumps(given, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    match kind:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, [*keys(), "small"], n=1)
            return f"no such key; did you mean {near[0]}?" if near else "no such key; remove it"
        case "union_tag_not_found":
            kinds = ", ".join((_CONSTANT_RATE, *_COLLECTIVES))
            return f"kind: give one of {kinds}, or a profile ({', '.join(PROFILES)})"
        case "missing":
            return "is missing; docs/experiments.md says what it holds"
        case "value_error":
            said = error["msg"].removeprefix("Value error, ")
            return f"{shown} {said}" if key else said
        case "literal_error" | "enum":
            return f"{shown} is not possible; give {context['expected']}"
        case "greater_than_equal" | "greater_than":
            limit = f"more than {context['gt']:g}" if "gt" in context else f"{context['ge']:g} or more"
            return f"{shown} is too small; give {limit}"
        case "less_than_equal":
            return f"{shown} is too large; give {context['le']:g} or less"
        case "string_pattern_mismatch":
            return f"{shown}: give lower-case letters, digits and '-', at most 31"
        case _:
            return f"{shown}: {error['msg']}"
