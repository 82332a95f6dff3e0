"""Nanoseconds a packet of the classifier, against an empty program, the parser alone and the floor."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bench import frames, testrun
from bench.figures import BenchError, Spread, Target, ratios
from bench.frames import Frame
from bench.scope import Scope
from bench.testrun import PASS, REDIRECT, Expectation, Load, TestRun
from qpd.kernel import sources
from qpd.model import Hook, Placement, Verdict

OWN_VTEP, VTEP, VTEP6 = ip_address("10.255.0.3"), ip_address("10.255.0.2"), ip_address("fd00::2")
ROUTED = ip_address("10.20.0.2")
QP_OWN, QP_AWAY, QP_ALONE = 0x800001, 0x800002, 0x800010
QPS_MAX = 131072
MANY, VERY_MANY = 100_002, 1_000_002
"""A prime less one, each: see programs.c."""
VERY_MANY_QPS_MAX = 1 << 20
VERY_MANY_MEGABYTES = 1200
"""What two maps of a million entries need, kernel memory, with room to spare."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One line of the table. ``base``: the row to subtract (the harness alone); ``floor``: what it is set against."""

    name: str
    subject: str
    frame: Frame
    expectation: Expectation
    base: str = "empty"
    floor: str = ""
    load: Load = field(default_factory=Load)
    target: tuple[str, float] | None = None
    """Of whom the row may cost how much at most."""
    repeat_share: float = 1.0
    placement: Placement | None = None


@dataclass
class Measured:
    """A row with its rounds."""

    row: Row
    repeat: int
    ns: list[float] = field(default_factory=list)
    kernel_ns: list[int] = field(default_factory=list)


def sizes(quick: bool) -> tuple[int, int]:
    """Rounds, and repetitions in each."""
    return (7, 20_000) if quick else (31, 100_000)


def run(
    scope: Scope, *, quick: bool, folder: Path | None, progress: Progress
) -> tuple[dict[str, Any], list[Target]]:
    """Measure all rows. ``folder``: other C sources than the repository's, for comparing variants."""
    source = snapshot(scope, folder)
    cache = scope.folder / "headers"
    rounds, repeat = sizes(quick)
    results: dict[str, Any] = {"rows": [], "skipped": []}
    targets: list[Target] = []

    def take(rows: list[Row], test: TestRun) -> None:
        measured = _rounds(test, rows, rounds, repeat, progress)
        some, more = _report(measured)
        results["rows"] += some
        targets.extend(more)

    progress("classifier: compiling")
    with _node(scope, source, cache, QPS_MAX) as test:
        take(_known(test), test)
        take(_at_random(test, MANY, "100 000 QPs"), test)
        take(_new(test), test)
    if quick:
        results["skipped"].append("1 000 000 QPs: not with --quick")
    elif _available_megabytes() < VERY_MANY_MEGABYTES:
        results["skipped"].append(f"1 000 000 QPs: needs {VERY_MANY_MEGABYTES} MB of free memory")
    else:
        progress("classifier: maps of a million entries")
        with _node(scope, source, cache, VERY_MANY_QPS_MAX) as test:
            take(_at_random(test, VERY_MANY, "1 000 000 QPs"), test)
    return results, targets


def snapshot(scope: Scope, folder: Path | None = None) -> Path:
    """The C sources as they are at this moment, with programs.c: whoever edits them meanwhile changes nothing here."""
    copy = scope.folder / "sources"
    if not copy.exists():
        origin = folder or sources.directory()
        if not (origin / "qpd.c").is_file():
            raise BenchError(f"--sources {origin}: no qpd.c there")
        copy.mkdir()
        for path in (*origin.glob("*.[ch]"), Path(__file__).with_name("programs.c")):
            shutil.copy(path, copy)
    return copy


@contextmanager
def _node(scope: Scope, source: Path, cache: Path, qps_max: int) -> Iterator[TestRun]:
    with testrun.loaded(scope.pin_dir(f"tc{qps_max}"), source, cache, qps_max) as test:
        others = tuple(testrun.network(address) for address in (VTEP, VTEP6, ROUTED))
        test.write_fabric(testrun.network(OWN_VTEP), others, Placement.HASH)
        yield test


# --- The rows -------------------------------------------------------------------------------------------------------


_REDIRECTED = Expectation(REDIRECT, Hook.STEER, Verdict.REDIRECTED)
_OWN = Expectation(PASS, Hook.STEER, Verdict.OWN_PATH)
_OBSERVED = Expectation(PASS, Hook.OBSERVE, Verdict.OBSERVED)
_FLOOR = Expectation(REDIRECT)


def _known(test: TestRun) -> list[Row]:
    """One QP of each kind, all in the cache: the common way of a packet."""
    own, away = frames.vxlan(OWN_VTEP, QP_OWN), frames.vxlan(VTEP, QP_AWAY)
    # The same inner packet in other outer headers would be the same QP.
    routed, away6 = frames.plain(ROUTED, QP_AWAY), frames.vxlan(VTEP6, QP_AWAY + 1)
    ack = frames.vxlan(VTEP, QP_AWAY + 2, frames.ACKNOWLEDGE)
    for frame in (own, away, routed, away6, ack):
        test.fill("steer", frame, int.from_bytes(frame.octets[frame.qp_at :][:4], "big"), 1)
    test.fill("observe", away, QP_AWAY, 1)
    test.fill("observe", ack, QP_AWAY + 2, 1)
    ready = _with_port(away, testrun.port_of(testrun.key_of(QP_AWAY)))
    return [
        Row("empty", "bench_empty", away, Expectation()),
        Row("parse only", "bench_parse", away, Expectation()),
        Row("floor", "bench_floor", away, _FLOOR),
        Row("steer, own path", "steer", own, _OWN, floor="floor"),
        Row("steer, redirected", "steer", away, _REDIRECTED, floor="floor", target=("floor", 1.2)),
        Row("steer, redirected, port is right", "steer", ready, _REDIRECTED, floor="floor"),
        Row("steer, redirected, an ACK", "steer", ack, _REDIRECTED, floor="floor"),
        Row("observe", "observe", away, _OBSERVED, floor="floor"),
        Row("observe, an ACK", "observe", ack, _OBSERVED, floor="floor"),
        Row("floor, plain", "bench_floor", routed, _FLOOR),
        Row("steer, redirected, plain", "steer", routed, _REDIRECTED, floor="floor, plain"),
        Row("floor, over IPv6", "bench_floor", away6, _FLOOR),
        Row("steer, redirected, over IPv6", "steer", away6, _REDIRECTED, floor="floor, over IPv6"),
        Row(
            "steer, TCP",
            "steer",
            frames.tcp(ROUTED),
            Expectation(PASS, Hook.STEER, Verdict.NOT_ROCE),
            floor="floor, plain",
        ),
        Row(
            "steer, TCP in VXLAN",
            "steer",
            frames.vxlan_tcp(VTEP),
            Expectation(PASS, Hook.STEER, Verdict.NOT_ROCE),
            floor="floor",
        ),
    ]


def _at_random(test: TestRun, qps: int, label: str) -> list[Row]:
    """Each packet one of many QPs: memory, not instructions. Beside it one QP, in the same rounds."""
    away = frames.vxlan(VTEP, QP_AWAY)
    test.fill("steer", away, QP_ALONE, 1)
    test.fill("steer", away, 1, qps)
    many = Load("random", 1, qps)
    one = Load("random", QP_ALONE, 1)
    base, floor, single = f"empty, {label}", f"floor, {label}", f"steer, one of 1 QP ({label})"
    return [
        Row(base, "bench_empty", away, Expectation(), base=base, load=many),
        Row(floor, "bench_floor", away, _FLOOR, base=base, load=many),
        Row(single, "steer", away, _REDIRECTED, base=base, load=one),
        Row(
            f"steer, {label}",
            "steer",
            away,
            _REDIRECTED,
            base=base,
            floor=floor,
            load=many,
            target=(single, 2.0) if qps == MANY else None,
        ),
    ]


def _new(test: TestRun) -> list[Row]:
    """Each packet a new QP, where the map is full: an insertion and an eviction."""
    away = frames.vxlan(VTEP, QP_AWAY)
    new = Load("next")
    test.fill("steer", away, QP_AWAY, 1)
    test.fill("steer", away, 0x900000, QPS_MAX)
    expectation = replace(_REDIRECTED, new_qps=True)
    empty, floor = "empty, new QPs", "parse and insert, new QPs"

    def row(name: str, subject: str, expects: Expectation, **more: Any) -> Row:
        return Row(name, subject, away, expects, base=empty, load=new, repeat_share=0.03, **more)

    return [
        row(empty, "bench_empty", Expectation()),
        row(floor, "bench_insert", Expectation()),
        row("steer, new QP, hash", "steer", expectation, floor=floor, placement=Placement.HASH),
        row("steer, new QP, balanced", "steer", expectation, floor=floor, placement=Placement.BALANCED),
    ]


def _with_port(frame: Frame, port: int) -> Frame:
    octets = bytearray(frame.octets)
    octets[frame.port_at : frame.port_at + 2] = port.to_bytes(2, "big")
    return replace(frame, octets=bytes(octets), port=port)


# --- Rounds and report ------------------------------------------------------------------------------------------------


def _rounds(test: TestRun, rows: list[Row], rounds: int, repeat: int, progress: Progress) -> list[Measured]:
    """Every round runs every row once, in an order of its own."""
    measured = [Measured(row, max(1000, int(repeat * row.repeat_share))) for row in rows]
    order = list(measured)
    shuffle = random.Random(4791)
    for number in range(rounds + 1):
        if number % 8 == 1:
            progress(f"classifier: {rows[-1].name} and {len(rows) - 1} more, round {number} of {rounds}")
        shuffle.shuffle(order)
        for one in order:
            if one.row.placement is not None:
                test.maps.set_placement(one.row.placement)
            row = one.row
            try:
                timing = test.measure(row.subject, row.frame, row.load, one.repeat, row.expectation)
            except BenchError as error:
                raise BenchError(f"classifier, row '{row.name}', {error}") from error
            if number:  # the first round warms up
                one.ns.append(timing.ns)
                one.kernel_ns.append(timing.kernel_ns)
    return measured


def _report(measured: list[Measured]) -> tuple[list[dict[str, Any]], list[Target]]:
    by_name = {one.row.name: one for one in measured}
    net = {
        name: [own - base for own, base in zip(one.ns, by_name[one.row.base].ns, strict=True)]
        for name, one in by_name.items()
    }
    rows, targets = [], []
    for name, one in by_name.items():
        row: dict[str, Any] = {
            "name": name,
            "repeat": one.repeat,
            "ns": Spread.of(one.ns).json(),
            "rounds_ns": [round(value, 2) for value in one.ns],
            "rounds_kernel_ns": one.kernel_ns,
        }
        if name != one.row.base:
            row["net_ns"] = Spread.of(net[name]).json() | {"without": one.row.base}
        if one.row.floor:
            row["to_floor"] = {
                "floor": one.row.floor,
                "net": Spread.of(ratios(net[name], net[one.row.floor])).json(),
                "gross": Spread.of(ratios(one.ns, by_name[one.row.floor].ns)).json(),
            }
        rows.append(row)
        if one.row.target:
            reference, limit = one.row.target
            figure = Spread.of(ratios(net[name], net[reference]))
            gross = Spread.of(ratios(one.ns, by_name[reference].ns)).median
            note = f"net of the harness; gross {gross:.2f}"
            targets.append(Target(f"{name} : {reference}", figure.median, limit, "at most", "x", note))
    return rows, targets


def _available_megabytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0
