"""`qplab fault`: does one fault, or a file's schedule, for as long as the command runs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import yaml

from qpd.lab import faults
from qpd.lab.console import Lab, one_lab
from qpd.lab.errors import LabError
from qpd.lab.faults import Fault, Schedule, Step, Timed
from qpd.lab.inject import Injector, play

app = typer.Typer(
    help="Hurt the lab for a while: each fault is undone after --for seconds, or at Ctrl-C.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LinkWords = Annotated[list[str], typer.Argument(help="Two nodes, an endpoint NODE:IF, or A--B.")]
Duration = Annotated[float | None, typer.Option("--for", help="Seconds; by default until Ctrl-C.", min=0.001)]
Router = Annotated[str, typer.Argument(help="A spine or leaf.")]
Daemon = Annotated[str, typer.Argument(help="qpd, or one of FRR's: zebra, bgpd, bfdd.")]
Towards = Annotated[str | None, typer.Option(help="Only what goes towards this node.")]


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, and do not break into what is being done or undone."""
    stop = threading.Event()
    before = {n: signal.signal(n, lambda *_: stop.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(schedule: Schedule, name: str | None) -> None:
    fabric = one_lab(name)
    schedule.check(fabric.topology)
    start = time.monotonic()

    def tell(step: Step, began: int, _done: int) -> None:
        print(f"{began / 1e9 - start:7.3f} s  {step}", flush=True)

    with _interrupts() as stop:
        with Injector(fabric) as injector:
            play(schedule, injector, on_step=tell, stop=stop, start=start)
            if injector.active and not stop.is_set():
                stop.wait()
            left = injector.active
        for fault in reversed(left):
            print(f"{time.monotonic() - start:7.3f} s  {fault}: undone", flush=True)
        if stop.is_set():
            raise typer.Exit(130)


def _one(fault: Fault, duration: float | None, name: str | None) -> None:
    _run(Schedule((Timed(0.0, duration, fault),)), name)


@app.command()
def cut(
    link: LinkWords,
    side: Annotated[str | None, typer.Option(help="The node whose interface is set down.")] = None,
    duration: Duration = None,
    name: Lab = None,
) -> None:
    """Cut a link: it has no carrier."""
    _one(faults.Cut(" ".join(link), side), duration, name)


@app.command()
def loss(
    link: LinkWords,
    towards: Towards = None,
    percent: Annotated[float, typer.Option(help="How much; below 100 it is gray.")] = 100.0,
    duration: Duration = None,
    name: Lab = None,
) -> None:
    """Lose packets silently, carrier up."""
    _one(faults.Loss(" ".join(link), towards, percent), duration, name)


@app.command()
def delay(  # noqa: PLR0917 - one parameter an option
    link: LinkWords,
    ms: Annotated[float, typer.Option(help="Milliseconds that are added, one way.")],
    jitter_ms: Annotated[float, typer.Option(help="Plus and minus.")] = 0.0,
    towards: Towards = None,
    duration: Duration = None,
    name: Lab = None,
) -> None:
    """Add delay to a link (needs netem)."""
    _one(faults.Delay(" ".join(link), ms, jitter_ms, towards), duration, name)


@app.command()
def reboot(node: Router, duration: Duration = None, name: Lab = None) -> None:
    """Take a router's power away: daemons killed, links down; afterwards it starts again."""
    _one(faults.Reboot(node), duration, name)


@app.command()
def partition(
    site: Annotated[str, typer.Argument(help="A site.")], duration: Duration = None, name: Lab = None
) -> None:
    """Cut all inter-site links of a site."""
    _one(faults.Partition(site), duration, name)


@app.command()
def stop(node: Router, daemon: Daemon = faults.QPD, duration: Duration = None, name: Lab = None) -> None:
    """End a daemon in order (SIGTERM); afterwards it starts again."""
    _one(faults.Stop(node, daemon), duration, name)


@app.command()
def kill(node: Router, daemon: Daemon = faults.QPD, duration: Duration = None, name: Lab = None) -> None:
    """Kill a daemon (SIGKILL); afterwards it starts again."""
    _one(faults.Kill(node, daemon), duration, name)


@app.command()
def hang(node: Router, daemon: Daemon = faults.QPD, duration: Duration = None, name: Lab = None) -> None:
    """Stop a daemon in its tracks (SIGSTOP); afterwards it goes on."""
    _one(faults.Hang(node, daemon), duration, name)


@app.command("play")
def play_(
    file: Annotated[Path, typer.Argument(help="YAML with a list `faults`; see docs/lab.md.")],
    name: Lab = None,
) -> None:
    """Do the faults of a file at their times."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"{file}: {error.strerror}; give a YAML file with a list `faults`") from error
    except yaml.YAMLError as error:
        raise LabError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or "faults" not in document:
        raise LabError(f"{file}: expected `faults` and a list under it")
    _run(faults.parse(document["faults"]), name)


@app.command()
def undo(name: Lab = None) -> None:
    """Undo what a killed qplab has left."""
    with _interrupts():
        for fault in Injector(one_lab(name)).recover():
            print(f"{fault}: undone")
