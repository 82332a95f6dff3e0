"""``qpctl top``: a live picture of the paths and the busiest queue pairs; rates are differences of counters."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import textwrap
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from qpd.api.schemas import PathRow, QpRow, StatusInfo
from qpd.cli.client import Client
from qpd.cli.errors import CommandError
from qpd.cli.render import state_style
from qpd.cli.table import Column, lines
from qpd.cli.units import duration, microseconds, si

_QPS_ASKED = 1000
"""The busiest so far; whoever is busy now is among them, short of a thousand older and bigger ones."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The daemon's answers at one moment (``taken``: seconds of time.monotonic)."""

    taken: float
    status: StatusInfo
    paths: Sequence[PathRow]
    qps: Sequence[QpRow]


def take(client: Client, now: float) -> Picture:
    """Ask the daemon."""
    return Picture(now, client.get("status"), client.get("paths"), client.get("qps", limit=_QPS_ASKED))


Rates = dict[Any, tuple[float, float, float]]
"""Path name or QP to packets, bits and lost packets a second."""


_STILL = (0.0, 0.0, 0.0)
_REMEDY = "a wider terminal shows all"


def path_rates(before: Picture, after: Picture) -> Rates:
    """Rates of the paths; one that is new has none yet."""
    return _rates(
        before,
        after,
        [(row["name"], row) for row in before.paths],
        [(row["name"], row) for row in after.paths],
    )


def qp_rates(before: Picture, after: Picture) -> Rates:
    """Rates of the QPs that both pictures hold."""
    return _rates(
        before, after, [(_key(row), row) for row in before.qps], [(_key(row), row) for row in after.qps]
    )


def _rates(
    before: Picture, after: Picture, old: Sequence[tuple[Any, Any]], new: Sequence[tuple[Any, Any]]
) -> Rates:
    elapsed = after.taken - before.taken
    base = dict(old)
    rates: Rates = {}
    for key, row in new:
        if key in base and elapsed > 0:
            # A QP that was forgotten and came back counts from 0 again.
            packets = max(0, row["packets"] - base[key]["packets"])
            octets = max(0, row["bytes"] - base[key]["bytes"])
            lost = max(0, _lost(row) - _lost(base[key]))
            rates[key] = (packets / elapsed, octets * 8 / elapsed, lost / elapsed)
    return rates


def _lost(row: Any) -> int:  # noqa: ANN401 - PathRow or QpRow
    """In the fabric: of a path both ways, of a QP on its way from here."""
    return int((row["lost"] or 0) + row.get("lost_in", 0))


def _key(row: QpRow) -> tuple[int, str, int]:
    return row["vni"], row["dst"], row["dest_qp"]


def picture(before: Picture, after: Picture, width: int, height: int) -> Text:
    """The screen's content, at most ``height`` lines."""
    of_path, of_qp = path_rates(before, after), qp_rates(before, after)
    total = sum(bits for _, bits, _ in of_path.values()) or 1.0
    info = after.status
    head = Text.assemble(
        (info["node"], "bold"),
        f"  {info['paths']['up']} of {info['paths']['total']} paths up  {info['qps']['active']} active QPs  "
        f"{info['failovers']} failovers  {si(total if of_path else 0, 'bit/s')}",
        ("  q: leave", "dim"),
    )
    path_columns = (
        Column("PATH", lambda r: r["name"]),
        Column(
            "STATE",
            lambda r: r["reason"] or ("gray" if r["gray"] else r["state"]),
            style=lambda r: "yellow" if r["gray"] else state_style(r["state"]),
        ),
        Column("QPS", lambda r: str(r["qps"]), right=True),
        Column("PACKETS/S", lambda r: _rate(of_path, r["name"], 0), rank=1, right=True),
        Column("BIT/S", lambda r: _rate(of_path, r["name"], 1), right=True),
        Column("SHARE", lambda r: _bar(of_path.get(r["name"], _STILL)[1] / total), rank=4),
        Column("LOST/S", lambda r: _rate(of_path, r["name"], 2), rank=2, right=True),
        Column("RTT", lambda r: microseconds(r["rtt_us"]), rank=3, right=True),
        Column("RTT P99", lambda r: microseconds(r["rtt_p99_us"]), rank=5, right=True),
    )
    qp_columns = (
        Column("DST", lambda r: r["dst"]),
        Column("QP", lambda r: f"{r['dest_qp']:#x}", right=True),
        Column("SRC", lambda r: r["src"], rank=5),
        Column("PATH", lambda r: r["path"] or "-"),
        Column("STATE", lambda r: r["state"], style=lambda r: state_style(r["state"])),
        Column("PACKETS/S", lambda r: _rate(of_qp, _key(r), 0), rank=1, right=True),
        Column("BIT/S", lambda r: _rate(of_qp, _key(r), 1), right=True),
        Column("LOST/S", lambda r: _rate(of_qp, _key(r), 2), rank=2, right=True),
        Column("RTT", lambda r: microseconds(r["rtt_us"]), rank=3, right=True),
        Column("IDLE", lambda r: duration(r["idle_s"]), rank=4, right=True),
    )
    busiest = sorted(after.qps, key=lambda row: of_qp.get(_key(row), _STILL)[1], reverse=True)
    content = [head, Text(), *lines(path_columns, after.paths, width, remedy=_REMEDY), Text()]
    content += lines(qp_columns, busiest[:height], width, remedy=_REMEDY)
    return Text("\n").join(content[: max(1, height)])


def _rate(rates: Rates, key: object, number: int) -> str:
    return si(rates[key][number]) if key in rates else "-"


def _bar(share: float, cells: int = 10) -> str:
    full = round(share * cells)
    return f"{'#' * full}{'.' * (cells - full)} {share:4.0%}"


def run(client: Client, interval: float) -> None:
    """Show pictures until q, Escape or Ctrl-C."""
    out = Console(highlight=False)
    before = after = take(client, time.monotonic())
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys(),
        Live(console=out, screen=True, auto_refresh=False) as live,
    ):
        trouble = ""
        while True:
            said = textwrap.wrap(trouble, out.width)
            shown = picture(before, after, out.width, out.height - len(said))
            live.update(Text("\n").join([shown, *(Text(line, style="red") for line in said)]), refresh=True)
            if _pressed(interval) in ("q", "Q", "\x1b"):
                return
            try:
                before, after, trouble = after, take(client, time.monotonic()), ""
            except CommandError as error:
                # The daemon may be restarting; its QPs go on meanwhile, and so does this screen.
                trouble = str(error)


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Single keys, unechoed."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _pressed(seconds: float) -> str:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.read(1) if ready else ""
