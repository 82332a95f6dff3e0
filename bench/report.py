"""The tables that people read."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import Target


def show(console: Console, result: dict[str, Any], targets: list[Target]) -> None:
    """All that was measured, then what was to be reached."""
    if "classifier" in result:
        _classifier(console, result["classifier"])
    if "throughput" in result:
        _throughput(console, result["throughput"])
    if "daemon" in result:
        _daemon(console, result["daemon"])
    for part in ("classifier", "throughput", "daemon"):
        for reason in result.get(part, {}).get("skipped", []):
            console.print(f"not measured: {reason}")
    _targets(console, targets)


def _classifier(console: Console, part: dict[str, Any]) -> None:
    table = Table(title="Classifier, ns a packet (BPF_PROG_TEST_RUN)", title_justify="left")
    for heading in ("what", "median", "min", "max", "net of harness", ": floor, net", ": floor, gross"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in part["rows"]:
        ns, net, ratio = row["ns"], row.get("net_ns"), row.get("to_floor")
        table.add_row(
            row["name"],
            *(f"{ns[name]:.1f}" for name in ("median", "min", "max")),
            f"{net['median']:.1f}" if net else "",
            f"{ratio['net']['median']:.2f}" if ratio else "",
            f"{ratio['gross']['median']:.2f}" if ratio else "",
        )
    console.print(table)


def _throughput(console: Console, part: dict[str, Any]) -> None:
    title = f"Fabric throughput, with : without ({part['pairs']} pairs of runs; processor time)"
    table = Table(title=title, title_justify="left")
    for heading in ("what", "median", "middle half", "ns added", "ns without", "on the wall"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in part["rows"]:
        ratio = row["ratio"]
        table.add_row(
            row["name"],
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            f"{row['extra_ns']['median']:.0f}",
            f"{row['without_ns']['median']:.0f}",
            f"{row['wall_ratio']['median']:.3f}",
        )
    console.print(table)


def _daemon(console: Console, part: dict[str, Any]) -> None:
    table = Table(title="Daemon", title_justify="left")
    for heading in ("what", "median", "min", "max", "unit"):
        table.add_column(heading, justify="left" if heading in {"what", "unit"} else "right")
    for row in part["rows"]:
        values = row["spread"]
        table.add_row(row["name"], *(f"{values[name]:.4g}" for name in ("median", "min", "max")), row["unit"])
    console.print(table)


def _targets(console: Console, targets: list[Target]) -> None:
    table = Table(title="Figures to reach", title_justify="left")
    for heading in ("what", "figure", "target", "", "note"):
        table.add_column(heading, justify="right" if heading in {"figure", "target"} else "left")
    for target in targets:
        verdict = "[green]reached[/]" if target.reached else "[red]not reached[/]"
        table.add_row(
            target.name,
            f"{target.figure:.3g} {target.unit}".strip(),
            f"{target.sense} {target.limit:g} {target.unit}".strip(),
            verdict,
            target.note,
        )
    console.print(table)
