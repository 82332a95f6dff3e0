"""Every configuration key: meaning, default, bounds; read from a YAML file and from ``QPD_*`` variables.

The environment wins over the file, the file over the defaults. Unknown keys are errors in both.
``python -m qpd.settings_docs`` writes ``docs/configuration.md`` and ``configs/qpd.yaml`` from this model.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

from qpd.api import DEFAULT_SOCKET
from qpd.yamlfile import Document, Problem, SettingsError

__all__ = [
    "DEFAULT_CONFIG",
    "ApiSettings",
    "BpfSettings",
    "FrrSettings",
    "GraySettings",
    "LogSettings",
    "MetricsSettings",
    "OverrideSettings",
    "Problem",
    "Settings",
    "SettingsError",
    "as_mapping",
    "leaves",
    "load_settings",
    "parse_duration",
    "variable_of",
]

DEFAULT_CONFIG = Path("/etc/qpd/qpd.yaml")
"""Read by ``qpd run`` and ``qpd detach`` without ``--config`` where it exists."""

ENV_PREFIX = "QPD_"
ENV_DELIMITER = "__"

_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h)?\s*")
_DURATION_UNITS = {"ms": 0.001, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_LISTEN = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^:\[\]\s]+)):(?P<port>\d{1,5})")
_KERNEL_TABLES = {253: "default", 254: "main", 255: "local"}


def parse_duration(value: object) -> object:
    """Seconds from a number or from ``500ms``, ``2s``, ``1.5m``, ``1h``; else a ``ValueError``."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise ValueError("is no duration; give seconds (1.5) or a number with ms, s, m or h (500ms)")
        return float(match[1]) * _DURATION_UNITS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("is no duration; give seconds (1.5) or a number with ms, s, m or h (500ms)")  # noqa: TRY004
    return value


def _node_name(value: object) -> object:
    return socket.gethostname() if value is None else value


def _word(value: str) -> str:
    if not value or value.split() != [value]:
        raise ValueError("must be one word, not empty and without blanks")
    return value


def _uplinks(value: object) -> object:
    """``auto``, a list of interface names, or (in the environment) names with commas between them."""
    if isinstance(value, str):
        if value == "auto":
            return value
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be auto or a list of interface names, such as [eth1, eth2]")
    for name in value:
        if not isinstance(name, str) or not _INTERFACE.fullmatch(name):
            raise ValueError(f"{name!r} is no interface name (1 to 15 characters, no blank, '/' or ':')")
    if len(set(value)) != len(value):
        raise ValueError("names an interface twice; name each once")
    return tuple(value)


def _mapping(value: object) -> object:
    """A mapping; in the environment as JSON or as ``eth1=a,eth2=b``."""
    if not isinstance(value, str):
        return {} if value is None else value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'is no JSON ({error.msg}); give {{"eth1": 1}} or eth1=1,eth2=2') from None
    pairs = [item.partition("=") for item in value.split(",")]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError('must map names to values; give {"eth1": 1} or eth1=1,eth2=2')
    return {name.strip(): setting.strip() for name, _, setting in pairs}


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path, beginning with /")
    return value


def _socket_path(value: Path) -> Path:
    # sockaddr_un.sun_path holds 108 bytes with its NUL (unix(7)).
    if len(os.fsencode(value)) > 107:
        raise ValueError("is too long for a Unix socket; give a path of at most 107 bytes")
    return _absolute(value)


def _listen(value: object) -> object:
    if value is False or value == "off":  # YAML 1.1 reads a bare `off` as false
        return "off"
    match = _LISTEN.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match["port"]) > 65535:
        raise ValueError("must be ADDRESS:PORT, such as 127.0.0.1:9791 or [::1]:9791, or off")
    return value


def _not_kernel_table(value: int) -> int:
    if value in _KERNEL_TABLES:
        raise ValueError(f"is the kernel's own table {_KERNEL_TABLES[value]}; give another number")
    return value


Duration = Annotated[float, BeforeValidator(parse_duration)]
Word = Annotated[str, AfterValidator(_word)]
Directory = Annotated[Path, AfterValidator(_absolute)]
Weight = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    """A group of keys; frozen, and without room for unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class FrrSettings(_Section):
    """How qpd talks to FRR."""

    socket_dir: Directory = Field(
        default=Path("/var/run/frr"),
        description="Directory of FRR's vty sockets (bfdd.vty, bgpd.vty, zebra.vty). "
        "With FRR's -N NAME option it is /var/run/frr/NAME. "
        "qpd runs without FRR, too; then it knows no peer names and asks no daemon about BFD.",
    )


class BpfSettings(_Section):
    """Where and how the classifier runs."""

    pin_dir: Directory = Field(
        default=Path("/sys/fs/bpf/qpd"),
        description="Directory in a mounted bpffs for the pinned programs and maps; they outlive the daemon. "
        "Each qpd on one machine (one a network namespace) needs its own.",
    )
    attach: Literal["auto", "tcx", "clsact"] = Field(
        default="auto",
        description="How programs are attached to uplinks: tcx (links, kernel 6.6 and later, nearly free), "
        "clsact (filters, any kernel, about 110 ns a packet), or auto: tcx where the kernel has it.",
    )
    qps_max: int = Field(
        default=131072,
        ge=1024,
        le=16777216,
        description="Queue pairs remembered at once, per direction. The least recently used makes room. "
        "Read when the maps are first made: after a change run `qpd detach` before the next start.",
    )


class ApiSettings(_Section):
    """The Unix socket that qpctl talks to."""

    socket: Annotated[Path, AfterValidator(_socket_path)] = Field(
        default=Path(DEFAULT_SOCKET),
        description="Path of the API's Unix socket (mode 0660). Its directory is made where it is missing.",
    )
    group: Word | None = Field(
        default=None,
        description="Unix group that owns the socket, so that its members may use qpctl without being root. "
        "null: the daemon's own group.",
    )


class MetricsSettings(_Section):
    """What Prometheus sees."""

    listen: Annotated[str, BeforeValidator(_listen)] = Field(
        default="127.0.0.1:9791",
        description="ADDRESS:PORT of /metrics; IPv6 addresses in brackets ([::]:9791). off: no listener.",
    )
    qp_series_max: int = Field(
        default=200,
        ge=0,
        le=100000,
        description="Series per queue pair are exported for at most so many QPs, the busiest "
        "(0: none; qpd_qp_series_dropped counts the others).",
    )

    @property
    def address(self) -> tuple[str, int] | None:
        """Host (without brackets) and port of ``listen``; None: off."""
        match = _LISTEN.fullmatch(self.listen)
        return None if match is None else (match["v6"] or match["host"], int(match["port"]))


class OverrideSettings(_Section):
    """qpd's own routing table, empty but for the moments between a failure and BGP's convergence."""

    table: Annotated[int, AfterValidator(_not_kernel_table)] = Field(
        default=4791,
        ge=1,
        le=4294967295,
        description="Number of the routing table that holds qpd's override routes; nothing else may use it.",
    )
    priority: int = Field(
        default=32000,
        ge=1,
        le=32765,
        description="Priority of the ip rule that finds the table: before the main table's (32766) and "
        "behind the one for VRFs (1000), whose traffic has tables of its own.",
    )


class GraySettings(_Section):
    """When a path that is alive counts as bad, and what follows."""

    action: Literal["report", "drain"] = Field(
        default="report",
        description="What follows when a path loses (or delays) more than its siblings: report (an event, a metric) or "
        "drain (also take it out of service for gray.hold, but never the last path to a destination).",
    )
    loss: float = Field(
        default=0.01,
        ge=0.0001,
        le=1,
        description="Part of the packets from which on a path's loss counts (0.01: one in a hundred).",
    )
    factor: float = Field(
        default=3.0, ge=1, le=1000, description="It counts only if it is so many times its siblings' loss."
    )
    delay: Duration | None = Field(
        default=None,
        gt=0,
        le=60,
        description="A path whose median round-trip time is longer than its siblings' by more than this is gray, too. "
        "null: delays are not compared, as is right where paths or destinations differ in length.",
        examples=["10ms"],
    )
    min_samples: int = Field(
        default=256,
        ge=16,
        le=1000000,
        description="Packets on the path, and on its siblings together, below which nothing is said of it.",
    )
    window: Duration = Field(
        default=5.0, ge=0.5, le=600, description="How far back packets count.", examples=["10s"]
    )
    hold: Duration = Field(
        default=30.0,
        ge=1,
        le=86400,
        description="How long a drained path stays out of service. Then its traffic is put to the test again; each "
        "relapse within a minute doubles this, up to 32 times.",
        examples=["2m"],
    )


class LogSettings(_Section):
    """What the daemon writes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least important level that is written: debug, info, warning or error."
    )
    format: Literal["auto", "text", "json"] = Field(
        default="auto",
        description="text (for people), json (one object a line), or auto: text on a terminal, else json.",
    )


class Settings(BaseSettings):
    """The effective configuration; immutable. Made by :func:`load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        nested_model_default_partial_update=True,
    )

    node: Annotated[Word, BeforeValidator(_node_name)] = Field(
        default_factory=socket.gethostname,
        description="Name of this node in answers, metrics and logs. null: the host name.",
    )
    uplinks: Annotated[Literal["auto"] | tuple[str, ...], NoDecode, BeforeValidator(_uplinks)] = Field(
        default="auto",
        description="Interfaces that carry the fabric's next hops: auto (all by which routes of the main "
        "table reach a gateway) or a list.",
        examples=[["eth1", "eth2"]],
    )
    planes: Annotated[dict[Word, Word], NoDecode, BeforeValidator(_mapping)] = Field(
        default_factory=dict,
        description="Plane by path name or interface. Leaves that give the same plane to both ends of a road "
        "put both directions of a QP on it without talking to each other. Default: the path's name.",
        examples=[{"spine1": "red", "eth2": "blue"}],
    )
    weights: Annotated[dict[Word, Weight], NoDecode, BeforeValidator(_mapping)] = Field(
        default_factory=dict,
        description="Weight by path name or interface, 1 to 65535; only their ratio counts. "
        "Default: the weight of the route's next hop.",
        examples=[{"spine1": 400, "spine2": 100}],
    )
    placement: Literal["balanced", "hash"] = Field(
        default="balanced",
        description="How a new QP gets its path: hash (its slot's first choice) or balanced (the same, but a "
        "path that already holds its share of active QPs is passed over).",
    )
    symmetric: bool = Field(
        default=True,
        description="Put the answers of a QP pair on the plane that the other direction arrives on, once, in a silence "
        "of the QP (symmetric_idle). Leaves need not talk to each other for it, but each needs the same planes.",
    )
    symmetric_idle: Duration = Field(
        default=0.1,
        ge=0.001,
        le=60,
        description="How long a QP has to be silent before it is moved: longer than a packet is ever under way, so "
        "that none overtakes another.",
        examples=["20ms"],
    )
    hold_up: Duration = Field(
        default=1.0,
        ge=0,
        le=3600,
        description="How long a path must have been up before it serves again. Flapping lengthens it.",
        examples=["500ms"],
    )
    idle_after: Duration = Field(
        default=30.0,
        ge=1,
        le=86400,
        description="A QP without packets for so long no longer counts as active. It keeps its home.",
        examples=["2m"],
    )
    reconcile_interval: Duration = Field(
        default=60.0,
        ge=1,
        le=86400,
        description="How often the kernel's state is read anew and compared, besides following its events.",
        examples=["30s"],
    )
    frr: FrrSettings = Field(default=FrrSettings(), description="FRR on this node.")
    bpf: BpfSettings = Field(default=BpfSettings(), description="The classifier in the kernel.")
    api: ApiSettings = Field(default=ApiSettings(), description="The socket that qpctl talks to.")
    metrics: MetricsSettings = Field(default=MetricsSettings(), description="Metrics for Prometheus.")
    override: OverrideSettings = Field(
        default=OverrideSettings(),
        description="qpd's own routing table: takes other traffic off a dead next hop until BGP converges.",
    )
    gray: GraySettings = Field(
        default=GraySettings(),
        description="Paths that are alive and yet lose or delay more than their siblings (gray failures).",
    )
    log: LogSettings = Field(default=LogSettings(), description="The daemon's log, on standard error.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment, then what :func:`load_settings` read from the file."""
        return env_settings, init_settings


def load_settings(path: Path | None = None) -> Settings:
    """The effective configuration from ``path`` (None: no file) and the environment.

    Raises:
        SettingsError: all errors at once, each with file and line or variable, key, and how to mend it.
    """
    document = Document.read(path) if path is not None else Document("", {}, {}, ())
    problems = [*document.problems, *_unknown_variables()]
    # A leading underscore would reach BaseSettings' own parameters.
    private = [key for key in document.data if key.startswith("_")]
    problems += [Problem(document.where(key), key, "no such key; remove it") for key in private]
    data: dict[str, Any] = {
        key: _filled(key, value) for key, value in document.data.items() if key not in private
    }
    try:
        settings = Settings(**data)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        found = (_explain(document, dict(detail)) for detail in error.errors(include_url=False))
        problems += [problem for problem in found if problem.key not in known]
        raise SettingsError(tuple(sorted(problems, key=_line))) from None
    except SourceError as error:
        field = re.search(r'field "(\w+)"', str(error))
        name = ENV_PREFIX + field[1].upper() if field else ""
        problems.append(
            Problem(
                f"environment variable {name}",
                field[1] if field else "",
                f"is no JSON; set {name}__KEY instead",
            )
        )
        raise SettingsError(tuple(problems)) from None
    if problems:
        raise SettingsError(tuple(problems))
    return settings


def _line(problem: Problem) -> tuple[str, int]:
    name, _, line = problem.where.rpartition(":")
    return (name, int(line)) if line.isdecimal() else (problem.where, 0)


def as_mapping(settings: Settings) -> dict[str, Any]:
    """The configuration as plain values: what :func:`load_settings` would read back from YAML."""
    return settings.model_dump(mode="json")


def leaves(model: type[BaseModel] | None = None, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with dots (``bpf.pin_dir``) and what the model says of it, in the model's order."""
    for name, info in (model or Settings).model_fields.items():
        section = _section_of(info)
        if section is not None:
            yield from leaves(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def variable_of(key: str) -> str:
    """The environment variable of a key: ``bpf.pin_dir`` is ``QPD_BPF__PIN_DIR``."""
    return ENV_PREFIX + key.replace(".", ENV_DELIMITER).upper()


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    kind: Any = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _filled(key: str, value: object) -> object:
    """A section all of whose keys are commented out is read as null by YAML; it means the defaults."""
    info = Settings.model_fields.get(key)
    return {} if value is None and info is not None and _section_of(info) else value


def _unknown_variables() -> Iterator[Problem]:
    """Variables that were meant for qpd but name no key.

    Others may begin alike (a service named qpd gives its neighbours QPD_SERVICE_HOST in Kubernetes), so a
    variable counts as meant where it names a section or comes close to a known name.
    """
    known = [variable_of(key) for key, _ in leaves()]
    sections = tuple(variable_of(name) for name, info in Settings.model_fields.items() if _section_of(info))
    for variable in sorted(os.environ):
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or name in known or name in sections:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near or name.startswith(tuple(section + ENV_DELIMITER for section in sections)):
            hint = f"did you mean {near[0]}?" if near else "unset it"
            key = name.removeprefix(ENV_PREFIX).replace(ENV_DELIMITER, ".").lower()
            yield Problem(f"environment variable {variable}", key, f"no such key; {hint}")


def _explain(document: Document, error: dict[str, Any]) -> Problem:
    """One line for one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")
    variable = next((name for name in _variables_of(key) if os.environ.get(name)), None)
    where = f"environment variable {variable}" if variable is not None else document.where(key)
    return Problem(where, key, _message(key, error))


def _variables_of(key: str) -> Iterator[str]:
    parts = key.split(".")
    wanted = {variable_of(".".join(parts[:length])) for length in range(1, len(parts) + 1)}
    return (name for name in os.environ if name.upper() in wanted)


def _message(key: str, error: dict[str, Any]) -> str:
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    shown = "null" if given is None else repr(str(given) if isinstance(given, Path) else given)
    keys = [known for known, _ in leaves()]
    match kind:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, keys, n=1)
            return f"no such key; did you mean {near[0]}?" if near else "no such key; remove it"
        case "value_error":
            return f"{shown} {error['msg'].removeprefix('Value error, ')}"
        case "literal_error":
            return f"{shown} is not possible; give {context['expected']}"
        case "greater_than_equal":
            return f"{shown} is too small; give {context['ge']:g} or more"
        case "less_than_equal":
            return f"{shown} is too large; give {context['le']:g} or less"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{shown} is no whole number; give one such as 1024"
        case "string_type":
            return f"{shown} is no text; put it in quotes if it is meant so"
        case "path_type":
            return f"{shown} is no path; give one such as /run/qpd"
        case "model_type" | "model_attributes_type" | "dict_type":
            inner = [known.rpartition(".")[2] for known in keys if known.startswith(f"{key}.")]
            return f"{shown} is no mapping; put keys under it" + (
                f" ({', '.join(inner)})" if inner else " (name: value)"
            )
        case _:
            return f"{shown}: {error['msg']}"
