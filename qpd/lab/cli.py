"""qplab: brings an emulated fabric up and down, looks at it, and hurts it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from qpd.lab import cli_endpoint, cli_fault, guest, labfolder, state, wan
from qpd.lab.console import Lab, err, one_lab, out, uninterrupted
from qpd.lab.errors import LabError
from qpd.lab.experiment import cli as experiments
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link, Role

app = typer.Typer(
    name="qplab",
    help="An emulated EVPN-VXLAN fabric with real FRR in network namespaces, from a containerlab topology file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_fault.app, name="fault")
app.add_typer(cli_endpoint.app, name="endpoint")

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
_TIMERS = re.compile(r"(\d+)x(\d+)")


@contextmanager
def _defaulted_interrupt() -> Iterator[None]:
    """SIGTERM ends `up` as Ctrl-C does, so that what was made is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.callback()
def _options(
    in_guest: Annotated[
        bool,
        typer.Option("--guest", help="Run the command in a virtual machine whose kernel has netem and VRF."),
    ] = False,
) -> None:
    """See the application's own help; `main` takes --guest before typer sees it."""
    if in_guest:
        raise LabError("write --guest first: qplab --guest COMMAND")


@app.command()
def up(  # noqa: PLR0917 - one parameter an option
    topology: Annotated[Path, typer.Argument(help="A *.clab.yml, or the directory that holds it.")],
    name: Annotated[str | None, typer.Option(help="The lab's name; by default the topology's.")] = None,
    qpd: Annotated[
        bool, typer.Option("--qpd/--no-qpd", help="Start qpd on the leaves that have a sidecar.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Varies the nodes' multipath hash seeds.")] = 0,
    deadline: Annotated[float, typer.Option(help="Seconds until the fabric must have converged.")] = 90.0,
    keep: Annotated[bool, typer.Option(help="After a failure leave what there is, for a look.")] = False,
) -> None:
    """Build the fabric and wait until BGP, EVPN and BFD have converged."""
    fabric = Fabric.load(topology, name, seed)
    begin = time.monotonic()
    with _defaulted_interrupt():
        # `up` refuses before it has made anything where the name is taken: then there is nothing to remove.
        fabric.check_free()
        try:
            with err.status("") as status:

                def progress(line: str) -> None:
                    elapsed = f"[dim]{time.monotonic() - begin:5.1f} s[/dim]"
                    err.print(f"{elapsed}  {line}", soft_wrap=True)
                    status.update(line)

                fabric.up(qpd=qpd, deadline=deadline, progress=progress)
        except (KeyboardInterrupt, LabError, OSError, subprocess.SubprocessError) as error:
            if not keep:
                with uninterrupted():
                    err.print("[dim]removing what was made[/dim]")
                    fabric.down()
            if isinstance(error, KeyboardInterrupt):
                raise typer.Exit(130) from None
            raise
    out.print(f"[green]lab {fabric.name} is up[/green] after {time.monotonic() - begin:.1f} s")
    more = "" if len(state.labs()) == 1 else f" --name {fabric.name}"
    host, leaf = fabric.hosts[0] if fabric.hosts else fabric.leaves[0], fabric.leaves[0]
    out.print(
        f"look:  qplab status {fabric.name}\n"
        f"       qplab vtysh{more} {leaf} 'show bgp summary'\n"
        f"       qplab exec{more} {host} -- ping -c 3 {fabric.address(fabric.hosts[-1]) if fabric.hosts else ''}\n"
        f"end:   qplab down {fabric.name}",
        soft_wrap=True,
    )


@app.command("generate")
def generate_(
    description: Annotated[Path, typer.Argument(help="YAML with sites, spines, leaves; see docs/lab.md.")],
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where the lab goes; by default beside the description, by its name."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the files of a lab that is there.")] = False,
) -> None:
    """Write a lab from a short description: topology file, one folder a node, README."""
    lab, place = labfolder.make(description, folder, force=force)
    out.print(f"{place}: {lab}; bring it up with: qplab up {place}", soft_wrap=True)


@app.command()
def profiles() -> None:
    """Show the profiles of wide-area links, with their source."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("profile", "round trip", "jitter", "loss", "source"):
        table.add_column(column, overflow="fold")
    for name, profile in wan.PROFILES.items():
        jitter = f"± {profile.jitter_ms:g} ms" if profile.jitter_ms else ""
        loss = f"{profile.loss_percent:g} %" if profile.loss_percent else ""
        table.add_row(name, f"{profile.rtt_ms:g} ms", jitter, loss, profile.source)
    out.print(table)


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="The lab's name.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every lab, also what a crash has left.")] = False,
) -> None:
    """Remove a lab: processes, namespaces, pins, files."""
    labs = state.labs()
    if all_:
        chosen = labs
    elif name is not None:
        chosen = [name]
    elif len(labs) <= 1:
        chosen = labs
    else:
        raise LabError(f"several labs are up: {', '.join(labs)}; name one, or use --all")
    with uninterrupted():
        for one in chosen:
            state.State.load(one).remove()
            out.print(f"lab {one} is removed")
        unrecorded = state.remove_unrecorded() if all_ else []
    for one in unrecorded:
        out.print(f"lab {one} is removed; it had hardly begun")
    if not chosen and not unrecorded:
        out.print("no lab is up")


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="The lab; all of them by default.")] = None,
) -> None:
    """Show nodes, links and what is missing; exit status 1 where something is."""
    labs = [name] if name else state.labs()
    if not labs:
        out.print("no lab is up; start one with `qplab up TOPOLOGY`")
    healthy = True
    for one in labs:
        healthy &= _show(Fabric.attach(one))
    if not healthy:
        raise typer.Exit(1)


def _show(fabric: Fabric) -> bool:
    missing = fabric.health().missing
    verdict = "[green]converged[/green]" if not missing else f"[red]{len(missing)} things missing[/red]"
    out.print(f"[bold]{fabric.name}[/bold]  {verdict}  {fabric.topology.path}")
    nodes = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("node", "role", "AS", "loopback", "address", "BGP", "qpd"):
        nodes.add_column(column)
    for node in fabric.topology.machines:
        nodes.add_row(*_node_row(fabric, node.name))
    out.print(nodes)
    links = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("link", "carrier", "BFD", "sent a>b", "sent b>a"):
        links.add_column(column, justify="right" if column.startswith("sent") else "left")
    counters = {node.name: fabric.counters(node.name) for node in fabric.topology.machines}
    sessions = {node: fabric.bfd_sessions(node) for node in fabric.frr}
    for link in fabric.topology.links:
        sent = [f"{counters[end.node][end.interface].tx_packets:,}" for end in link.ends]
        links.add_row(str(link), _carrier(fabric, link), _bfd(sessions, link), *sent)
    out.print(links)
    for line in missing:
        out.print(f"[red]missing:[/red] {line}")
    out.print()
    return not missing


def _node_row(fabric: Fabric, node: str) -> tuple[str, ...]:
    role = fabric.topology.nodes[node].role
    if role is Role.HOST:
        return (node, role.value, "", "", fabric.address(node), "", "")
    conf = fabric.conf(node)
    peers = fabric.show(node, "show bgp summary json").get("ipv4Unicast", {}).get("peers", {})
    up_ = sum(peer.get("state") == "Established" for peer in peers.values())
    beside = ""
    if fabric.topology.sidecar(node) is not None:
        answer = fabric.sidecar(node).status(timeout=0.5)
        beside = str(answer.get("state")) if answer else "off"
    return (node, role.value, str(conf.asn), conf.loopback or "", "", f"{up_}/{len(peers)}", beside)


def _carrier(fabric: Fabric, link: Link) -> str:
    words = fabric.exec(link.a.node, "ip", "-br", "link", "show", "dev", link.a.interface).stdout.split()
    return words[1].lower() if len(words) > 1 else "?"


def _bfd(sessions: dict[str, dict[str, dict[str, object]]], link: Link) -> str:
    for end in link.ends:
        peer = sessions.get(end.node, {}).get(end.interface)
        if peer:
            return f"{peer.get('status')} {peer.get('transmit-interval')}x{peer.get('detect-multiplier')}"
    return ""


@app.command("exec", context_settings=_PASS_ON)
def exec_(
    node: Annotated[str, typer.Argument(help="A spine, leaf or host.")],
    command: Annotated[list[str], typer.Argument(help="The command; write -- before it.")],
    name: Lab = None,
) -> None:
    """Run a command on a node; the exit status is the command's."""
    fabric = one_lab(name)
    words = command[1:] if command[0] == "--" else command
    raise typer.Exit(subprocess.run(fabric.enter(node, *words), check=False).returncode)


@app.command(context_settings=_PASS_ON)
def vtysh(
    node: Annotated[str, typer.Argument(help="A spine or leaf.")],
    command: Annotated[
        list[str] | None, typer.Argument(help="Commands, one an argument; none: interactive.")
    ] = None,
    name: Lab = None,
) -> None:
    """Talk to a node's FRR."""
    fabric = one_lab(name)
    fabric.router(node)
    words = [word for one in command or [] if one != "--" for word in ("-c", one)]
    instance = ["vtysh", "-N", fabric.namespace(node)]
    raise typer.Exit(subprocess.run([*instance, *words], check=False).returncode)


@app.command()
def cut(
    link: Annotated[list[str], typer.Argument(help="Two nodes, an endpoint NODE:IF, or A--B.")],
    side: Annotated[str | None, typer.Option(help="The node whose interface is set down.")] = None,
    name: Lab = None,
) -> None:
    """Cut a link: set it down at one end."""
    fabric = one_lab(name)
    chosen = fabric.link(*link)
    fabric.cut(chosen, side)
    out.print(f"{chosen} is cut")


@app.command()
def lose(
    link: Annotated[list[str], typer.Argument(help="Two nodes, an endpoint NODE:IF, or A--B.")],
    towards: Annotated[str | None, typer.Option(help="Lose only what goes towards this node.")] = None,
    percent: Annotated[float, typer.Option(help="How much is lost.", min=0.001, max=100)] = 100.0,
    name: Lab = None,
) -> None:
    """Lose packets of a link silently: the carrier stays up."""
    fabric = one_lab(name)
    chosen = fabric.link(*link)
    fabric.lose(chosen, towards, percent / 100)
    out.print(f"{chosen} loses {percent:g} % {f'towards {towards}' if towards else 'both ways'}")


@app.command()
def heal(
    link: Annotated[list[str], typer.Argument(help="Two nodes, an endpoint NODE:IF, or A--B.")],
    name: Lab = None,
) -> None:
    """Undo cut and lose."""
    fabric = one_lab(name)
    chosen = fabric.link(*link)
    fabric.heal(chosen)
    out.print(f"{chosen} is healed")


@app.command()
def bfd(
    link: Annotated[list[str], typer.Argument(help="The link, then the timers: 10x3 is 10 ms, three times.")],
    name: Lab = None,
) -> None:
    """Change the BFD timers of a link at both ends."""
    *words, timers = link
    match = _TIMERS.fullmatch(timers)
    if match is None or not words:
        raise LabError(f"{timers!r} are no BFD timers; write `qplab bfd LINK 10x3` for 10 ms x 3")
    interval, multiplier = int(match[1]), int(match[2])
    if not 10 <= interval <= 60000 or not 2 <= multiplier <= 255:
        raise LabError(f"{timers}: bfdd takes 10 to 60000 ms and 2 to 255 times")
    fabric = one_lab(name)
    chosen = fabric.link(*words)
    fabric.set_bfd(chosen, interval, multiplier)
    out.print(f"{chosen} has BFD {interval} ms x {multiplier}")


for command in (experiments.run, experiments.report, experiments.compare):
    app.command()(command)


def main() -> None:
    """Run qplab; what the user can mend is one line on stderr and exit status 2."""
    try:
        if sys.argv[1:2] == ["--guest"] and len(sys.argv) > 2:
            sys.exit(guest.run(sys.argv[2:]))
        app()
    except LabError as error:
        err.print("[red]qplab:[/red]", Text(str(error)), soft_wrap=True)
        sys.exit(2)
