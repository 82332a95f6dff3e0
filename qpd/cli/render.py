"""What ``qpctl`` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from qpd.api.schemas import EventRecord, ExplainStep, Explanation, GroupRow, PathRow, QpRow, StatusInfo
from qpd.cli.table import Column, field, show, wrapped
from qpd.cli.units import duration, microseconds, plural, si

_STATE_STYLES = {
    "up": "green",
    "home": "green",
    "observed": "green",
    "hold": "yellow",
    "drained": "yellow",
    "away": "yellow",
    "idle": "dim",
    "down": "red",
    "unsteered": "red",
}


_EVENT_STYLES = {
    "path-up": "green",
    "path-down": "red",
    "path-drained": "yellow",
    "frr-lost": "yellow",
    "limit-reached": "yellow",
    "mismatch": "yellow",
}


def state_style(state: str) -> str:
    """The colour of a state's word."""
    return _STATE_STYLES.get(state, "")


def _state(row: PathRow) -> str:
    if row["reason"] not in ("", row["state"]):
        return f"{row['state']}: {row['reason']}"
    return f"{row['state']}, gray" if row.get("gray") else row["state"]


def _detection(row: PathRow) -> str:
    seconds = row["bfd"]["detection_time_s"] if row["bfd"] else None
    return "-" if seconds is None else f"{seconds * 1000:g}ms"


PATH_COLUMNS = (
    Column("NAME", lambda r: r["name"]),
    Column("ID", lambda r: str(r["id"]), right=True, wide=True),
    Column("INTERFACE", lambda r: r["interface"], rank=8),
    Column("NEXT HOP", lambda r: r["next_hop"], rank=12),
    Column("PLANE", lambda r: r["plane"], rank=11),
    Column("WEIGHT", lambda r: str(r["weight"]), right=True, wide=True),
    Column("STATE", _state, style=lambda r: "yellow" if r["gray"] else state_style(r["state"])),
    Column("SINCE", lambda r: duration(r["since_s"]), rank=10, right=True),
    Column("QPS", lambda r: str(r["qps"]), right=True),
    Column("HOMES", lambda r: str(r["homes"]), rank=7, right=True),
    Column("PACKETS", lambda r: si(r["packets"]), rank=1, right=True),
    Column("BYTES", lambda r: si(r["bytes"]), rank=3, right=True),
    Column("PACKETS IN", lambda r: si(r["packets_in"]), right=True, wide=True),
    Column("BYTES IN", lambda r: si(r["bytes_in"]), right=True, wide=True),
    Column("LOST", lambda r: si(r["lost"]), rank=4, right=True),
    Column("LOST IN", lambda r: si(r["lost_in"]), rank=5, right=True),
    Column("LOST AT HOST", lambda r: si(r["lost_at_host"]), right=True, wide=True),
    Column("RETRANS", lambda r: si(r["retransmitted"]), right=True, wide=True),
    Column("REORDERED IN", lambda r: si(r["out_of_order_in"]), right=True, wide=True),
    Column("ECN IN", lambda r: si(r["ecn_marked_in"]), right=True, wide=True),
    Column("RTT", lambda r: microseconds(r["rtt_us"]), rank=2, right=True),
    Column("RTT P99", lambda r: microseconds(r["rtt_p99_us"]), rank=9, right=True),
    Column(
        "BFD",
        lambda r: r["bfd"]["state"] if r["bfd"] else "-",
        rank=6,
        style=lambda r: state_style(r["bfd"]["state"]) if r["bfd"] else "",
    ),
    Column("DETECTION", _detection, wide=True, right=True),
)


QP_COLUMNS = (
    Column("VNI", lambda r: str(r["vni"]), rank=6, right=True),
    Column("DST", lambda r: r["dst"]),
    Column("QP", lambda r: f"{r['dest_qp']:#x}", right=True),
    Column("SRC", lambda r: r["src"], rank=5),
    Column("PEER", lambda r: "-" if r["peer_qp"] is None else f"{r['peer_qp']:#x}", rank=8, right=True),
    Column("VIA", lambda r: r["destination"], wide=True),
    Column("SLOT", lambda r: "-" if r["slot"] is None else str(r["slot"]), rank=12, right=True),
    Column(
        "PORT", lambda r: "-" if r["source_port"] is None else str(r["source_port"]), wide=True, right=True
    ),
    Column("HOME", lambda r: r["home"] or "-", rank=7),
    Column("PATH", lambda r: r["path"] or "-"),
    Column("STATE", lambda r: r["state"], style=lambda r: state_style(r["state"])),
    Column("TRANSPORT", lambda r: (r["transport"] or "-").upper(), wide=True),
    Column("PACKETS", lambda r: si(r["packets"]), right=True),
    Column("BYTES", lambda r: si(r["bytes"]), rank=3, right=True),
    Column("LOST", lambda r: si(r["lost"]), rank=1, right=True),
    Column("AT HOST", lambda r: si(r["lost_at_host"]), wide=True, right=True),
    Column("RETRANS", lambda r: si(r["retransmitted"]), rank=11, right=True),
    Column("REORDERED", lambda r: si(r["out_of_order"]), wide=True, right=True),
    Column("NAKS", lambda r: si(r["naks"]), wide=True, right=True),
    Column("CNPS", lambda r: si(r["cnps"]), wide=True, right=True),
    Column("ECN", lambda r: si(r["ecn_marked"]), wide=True, right=True),
    Column("RTT", lambda r: microseconds(r["rtt_us"]), rank=2, right=True),
    Column("RTT MIN", lambda r: microseconds(r["rtt_min_us"]), wide=True, right=True),
    Column("RTT MEAN", lambda r: microseconds(r["rtt_mean_us"]), wide=True, right=True),
    Column("MOVES", lambda r: str(r["moves"]), rank=9, right=True),
    Column("AGE", lambda r: duration(r["age_s"]), rank=10, right=True),
    Column("IDLE", lambda r: duration(r["idle_s"]), rank=4, right=True),
)

STEP_COLUMNS = (
    Column("ORDER", lambda r: str(r["place"]), right=True),
    Column("PATH", lambda r: r["path"]),
    Column("PLANE", lambda r: r["plane"], rank=3),
    Column("WEIGHT", lambda r: str(r["weight"]), rank=2, right=True),
    Column("NEXT HOP", lambda r: "yes" if r["member"] else "no"),
    Column("STATE", _state, style=lambda r: state_style(r["state"])),
    Column("HOMES", lambda r: str(r["homes"]), rank=1, right=True),
    Column("SHARE", lambda r: "-" if r["share"] is None else str(r["share"]), rank=1, right=True),
    Column("", lambda r: r["role"], style=lambda _: "bold"),
)


def paths(out: Console, rows: Sequence[PathRow], wide: bool) -> None:
    """``qpctl paths``."""
    if not rows:
        out.print("no paths: no route of the main table has a gateway by an uplink (qpctl doctor)")
        return
    show(out, PATH_COLUMNS, rows, wide)


def qps(out: Console, rows: Sequence[QpRow], limit: int | None, wide: bool) -> None:
    """``qpctl qps``; ``limit``: print so many of ``rows``, of which one more was asked for."""
    if not rows:
        out.print("no queue pairs")
        return
    shown = rows if limit is None else rows[:limit]
    show(out, QP_COLUMNS, shown, wide)
    if len(shown) < len(rows):
        out.print(
            f"(the {len(shown)} with the most bytes; there are more: --limit, or -o json for all)",
            style="dim",
        )


def groups(out: Console, rows: Sequence[GroupRow], wide: bool) -> None:
    """``qpctl groups``."""
    if not rows:
        out.print("no groups: no destination is reached by an uplink")
    for row in rows:
        names = [
            f"{member['path']} (weight {member['weight']}"
            + ("" if member["state"] == "up" else f", {member['state']}")
            + ")"
            for member in row["members"]
        ]
        count = len(row["destinations"])
        some = row["destinations"] if wide else row["destinations"][:8]
        more = [] if len(some) == count else [f"and {count - len(some)} more (-o wide)"]
        out.print(Text(f"group {row['id']}", style="bold"), Text(f"(slot table {row['table']})", style="dim"))
        field(out, plural(len(names), "path"), ", ".join(names))
        field(out, plural(count, "prefix", "es"), ", ".join([*some, *more]))


def status(out: Console, info: StatusInfo) -> None:
    """``qpctl status``."""
    up, total = info["paths"]["up"], info["paths"]["total"]
    known = info["qps"]
    field(
        out,
        "node",
        f"{info['node']}, qpd {info['version']}, pid {info['pid']}, up {duration(info['uptime_s'])}",
    )
    field(out, "state", info["state"], "" if info["state"] == "steering" else "yellow")
    field(out, "paths", f"{up} of {total} up", "" if up == total else "yellow")
    uplinks = [
        f"{u['name']} ({u['attach'] or 'not attached'}{'' if u['up'] else ', down'})" for u in info["uplinks"]
    ]
    field(out, "uplinks", ", ".join(uplinks) or "none")
    field(out, "queue pairs", f"{known['active']} active, {known['known']} known, room for {known['max']}")
    field(out, "placement", info["placement"])
    field(out, "destinations", f"{info['destinations']} in {plural(info['groups'], 'group')}")
    field(out, "failovers", str(info["failovers"]))
    field(out, "overrides", plural(info["overrides"], "route"))
    field(
        out,
        "frr",
        ", ".join(f"{name} {'answers' if up else 'is silent'}" for name, up in info["frr"].items()) or "-",
    )
    for hook, verdicts in info["verdicts"].items():
        counted = [f"{name} {si(count)}" for name, count in verdicts.items() if count]
        field(out, hook, ", ".join(counted) or "no packets")
    for warning in info["warnings"]:
        field(out, "warning", warning, "yellow")


def explanation(out: Console, answer: Explanation, wide: bool) -> None:
    """``qpctl explain``."""
    fields = answer["fields"]
    name = f"QP {fields['dest_qp']:#x} of {fields['dst']}" + (
        f" in VNI {fields['vni']}" if fields["vni"] else ""
    )
    verb = "uses" if answer["seen"] else "would use"
    used = answer["path"]
    out.print(Text(f"{name} {verb} {used}" if used else f"{name} is not steered", style="bold"))
    field(out, "hashed", f"VNI {fields['vni']}, destination {fields['dst']}, QP {fields['dest_qp']:#x}")
    field(out, "hash", f"{answer['hash']:#010x}")
    field(out, "slot", f"{answer['slot']} of 4096")
    if fields["vni"]:
        field(out, "source port", f"{answer['source_port']} (outer UDP)")
    field(out, "destination", f"{answer['destination']} by {answer['prefix'] or 'no known route'}")
    field(out, "home", answer["home"] or "-")
    out.print()
    if answer["order"]:
        show(out, STEP_COLUMNS, [{**step, "role": _role(step, answer)} for step in answer["order"]], wide)
        out.print()
    for sentence in [*answer["why"], *answer["fares"]]:
        wrapped(out, Text("- "), sentence)


def _role(step: ExplainStep, answer: Explanation) -> str:
    words = [
        word for word, path in (("home", answer["home"]), ("path", answer["path"])) if path == step["path"]
    ]
    return "<- " + ", ".join(words) if words else ""


def drained(out: Console, row: PathRow) -> None:
    """``qpctl drain`` and ``undrain``."""
    out.print(
        Text.assemble(
            f"{row['name']} is ",
            (_state(row), state_style(row["state"])),
            f"; it carries {plural(row['qps'], 'QP')}",
        )
    )


def event(out: Console, record: EventRecord) -> None:
    """One event of ``qpctl events``."""
    details = " ".join(f"{key}={_plain(value)}" for key, value in record["detail"].items() if value != "")
    style = _EVENT_STYLES.get(record["kind"], "")
    when = record["time"].replace("T", " ").removesuffix("Z")
    wrapped(out, Text.assemble((when, "dim"), "  ", (f"{record['kind']:<15}", style), "  "), details)


def _plain(value: Any) -> str:  # noqa: ANN401 - JSON
    if isinstance(value, list):
        return ",".join(_plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ",".join(f"{_plain(key)}:{_plain(item)}" for key, item in value.items()) or "none"
    text = str(value)
    return f'"{text}"' if not text or " " in text else text
