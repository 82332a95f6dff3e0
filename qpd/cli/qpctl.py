"""``qpctl``: what the daemon knows, and the few things that an operator tells it."""

# ruff: noqa: PLC0415, PLR0917 - what a command alone needs is loaded by it, so that the others start fast; typer's
# commands take all their options as arguments.

from __future__ import annotations

import json
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from qpd import __version__
from qpd.api import DEFAULT_SOCKET
from qpd.cli.client import Client
from qpd.cli.errors import CommandError, ExitStatus, run

app = typer.Typer(
    name="qpctl",
    help="Shows and steers the queue pairs of this leaf. Exit status: 0 done, 1 no answer from the daemon, "
    "2 wrong usage, 3 not found.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Output(str, Enum):
    """``table``: for people; ``wide``: with all columns; ``json``: exact, complete and stable."""

    table = "table"
    json = "json"
    wide = "wide"


SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        metavar="PATH",
        help=f"The daemon's socket (api.socket); else $QPCTL_SOCKET, else {DEFAULT_SOCKET}.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Output | None,
    typer.Option("-o", "--output", help="How to print it; without the option: table.", show_default=False),
]


class _Options(NamedTuple):
    socket: Path | None
    output: Output | None


class _Call:
    """The daemon to ask and the way to print, from the options before and behind the command (these win)."""

    def __init__(self, context: typer.Context, socket: Path | None, output: Output | None) -> None:
        before: _Options = context.obj
        self.socket = socket or before.socket or _socket_of_environment()
        self.client = Client(self.socket or Path(DEFAULT_SOCKET))
        self.output = output or before.output or Output.table

    @property
    def json(self) -> bool:
        return self.output is Output.json

    @property
    def wide(self) -> bool:
        return self.output is Output.wide

    def pass_on(self, resource: str, **query: object) -> None:
        """Copy the daemon's JSON to standard output: indented in a terminal, else byte by byte."""
        if sys.stdout.isatty():
            _print_json(self.client.get(resource, **query))
            return
        for block in self.client.stream(resource, **query):
            sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()


def _socket_of_environment() -> Path | None:
    given = os.environ.get("QPCTL_SOCKET")
    return Path(given) if given else None


def _print_json(answer: Any) -> None:  # noqa: ANN401 - JSON
    print(json.dumps(answer, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qpctl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    socket: SocketOption = None,
    output: OutputOption = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """Options that all commands have, before or behind the command."""
    context.obj = _Options(socket, output)


@app.command()
def status(context: typer.Context, socket: SocketOption = None, output: OutputOption = None) -> None:
    """Show this node at a glance."""
    call = _Call(context, socket, output)
    if call.json:
        call.pass_on("status")
        return
    from qpd.cli import render, table

    render.status(table.console(), call.client.get("status"))


@app.command()
def paths(context: typer.Context, socket: SocketOption = None, output: OutputOption = None) -> None:
    """Show the paths: state and why, queue pairs, traffic, BFD."""
    call = _Call(context, socket, output)
    if call.json:
        call.pass_on("paths")
        return
    from qpd.cli import render, table

    render.paths(table.console(), call.client.get("paths"), call.wide)


@app.command()
def groups(context: typer.Context, socket: SocketOption = None, output: OutputOption = None) -> None:
    """Show the groups: which paths lead to which destinations."""
    call = _Call(context, socket, output)
    if call.json:
        call.pass_on("groups")
        return
    from qpd.cli import render, table

    render.groups(table.console(), call.client.get("groups"), call.wide)


def _number(text: str) -> int:
    """A QP or VNI as people write them: decimal or with 0x."""
    try:
        return int(text, 0)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number; give one such as 17 or 0x11") from None


class Direction(str, Enum):
    """``out``: QPs whose packets leave by an uplink; ``in``: those that arrive."""

    out = "out"
    in_ = "in"


@app.command()
def qps(
    context: typer.Context,
    path: Annotated[
        str | None, typer.Option(metavar="NAME", help="On this path now, or at home there.")
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="To or from this host.")] = None,
    qp: Annotated[
        int | None, typer.Option(parser=_number, metavar="N", help="With this destination QP (17, 0x11).")
    ] = None,
    vni: Annotated[int | None, typer.Option(parser=_number, metavar="N", help="In this VNI.")] = None,
    direction: Annotated[
        Direction, typer.Option(help="Those that leave, or those that arrive.")
    ] = Direction.out,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="At most so many, the busiest first. Tables: 100; JSON: all.",
            show_default=False,
        ),
    ] = None,
    socket: SocketOption = None,
    output: OutputOption = None,
) -> None:
    """Show the queue pairs: home, path and traffic of each."""
    call = _Call(context, socket, output)
    query = {"path": path, "host": host, "qp": qp, "vni": vni, "direction": direction.value}
    if call.json:
        call.pass_on("qps", **query, limit=limit)
        return
    from qpd.cli import render, table

    wanted = limit or 100
    rows = call.client.get("qps", **query, limit=wanted + 1)
    render.qps(table.console(), rows, wanted, call.wide)


@app.command()
def explain(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Argument(metavar="HOST", help="Destination host (inner address).")
    ] = None,
    number: Annotated[
        int | None, typer.Argument(parser=_number, metavar="QP", help="Destination QP.")
    ] = None,
    dst: Annotated[str | None, typer.Option(metavar="HOST", help="The same as HOST.")] = None,
    qp: Annotated[int | None, typer.Option(parser=_number, metavar="N", help="The same as QP.")] = None,
    vni: Annotated[
        int | None, typer.Option(parser=_number, metavar="N", help="VNI; 0: not encapsulated.")
    ] = None,
    via: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Outer destination: the remote VTEP.")
    ] = None,
    socket: SocketOption = None,
    output: OutputOption = None,
) -> None:
    """Tell why a queue pair uses its path, or which one it would use.

    --vni and --via may be left out for a QP that has been seen.
    """
    call = _Call(context, socket, output)
    host, number = dst or host, qp if qp is not None else number
    if host is None or number is None:
        raise typer.BadParameter("say which queue pair: qpctl explain HOST QP, or --dst HOST --qp N")
    query = {"dst": host, "qp": number, "vni": vni, "via": via}
    if call.json:
        call.pass_on("explain", **query)
        return
    from qpd.cli import render, table

    render.explanation(table.console(), call.client.get("explain", **query), call.wide)


PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="Its name, as `qpctl paths` shows it.")]


@app.command()
def drain(
    context: typer.Context, path: PathArgument, socket: SocketOption = None, output: OutputOption = None
) -> None:
    """Move all queue pairs off a path, and keep it out of service."""
    _drain(_Call(context, socket, output), path, "drain")


@app.command()
def undrain(
    context: typer.Context, path: PathArgument, socket: SocketOption = None, output: OutputOption = None
) -> None:
    """Put a drained path back into service."""
    _drain(_Call(context, socket, output), path, "undrain")


def _drain(call: _Call, path: str, verb: str) -> None:
    row = call.client.post("paths", path, verb)
    if call.json:
        _print_json(row)
        return
    from qpd.cli import render, table

    render.drained(table.console(), row)


@app.command()
def events(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", "-f", help="Go on with events as they come.")
    ] = True,
    socket: SocketOption = None,
    output: OutputOption = None,
) -> None:
    """Show what has happened, and what happens."""
    call = _Call(context, socket, output)
    records = call.client.lines("events", follow=follow)
    if call.json:
        for line in records:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        return
    from qpd.cli import render, table

    out = table.console()
    for line in records:
        render.event(out, json.loads(line))


@app.command()
def top(
    context: typer.Context,
    interval: Annotated[
        float, typer.Option(min=0.2, max=60, metavar="SECONDS", help="Between two pictures.")
    ] = 1.0,
    socket: SocketOption = None,
) -> None:
    """Show paths and the busiest queue pairs live; q or Ctrl-C ends it."""
    call = _Call(context, socket, None)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CommandError("top needs a terminal; use `qpctl paths -o json` in scripts", ExitStatus.USAGE)
    from qpd.cli import top as screen

    screen.run(call.client, interval)


@app.command()
def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The daemon's configuration; without: its usual one.", show_default=False
        ),
    ] = None,
    socket: SocketOption = None,
    output: OutputOption = None,
) -> None:
    """Examine kernel, headers, FRR and permissions: what is missing and how to mend it."""
    from qpd.cli import doctor as examination

    call = _Call(context, socket, output)
    findings = examination.examine(config, call.socket)
    if call.json:
        _print_json([finding.as_json() for finding in findings])
    else:
        from qpd.cli import table

        examination.show(table.console(), findings)
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(int(ExitStatus.FAILED))


def main() -> None:
    """Run ``qpctl``."""
    # `qpctl qps | head` ends as other tools do.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run(app, "qpctl")


if __name__ == "__main__":
    main()
