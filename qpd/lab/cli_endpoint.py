"""`qplab endpoint`: real RoCE endpoints on a running lab, for as long as the command runs."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from qpd.lab import rxe_mpi
from qpd.lab.console import Lab, err, one_lab, out, uninterrupted
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.rxe import Guest
from qpd.lab.rxe_perftest import Perftest
from qpd.lab.rxe_ring import Ring

app = typer.Typer(
    help="Soft-RoCE guests beside hosts of the lab: virtual machines whose rxe0 sends real RoCEv2 into the fabric.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

Memory = Annotated[str, typer.Option(help="Memory of a guest.")]
Cpus = Annotated[int, typer.Option(help="Virtual processors of a guest.", min=1)]


@contextmanager
def _guests(
    fabric: Fabric, hosts: Sequence[str], addresses: Sequence[str | None], memory: str, cpus: int
) -> Iterator[list[Guest]]:
    """Guests beside these hosts, up; gone after the block, also after Ctrl-C and SIGTERM."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if len(set(hosts)) < len(hosts):
        raise LabError(f"{' '.join(hosts)}: one guest beside a host; name different hosts")
    guests = [
        Guest(fabric, host, address, memory, cpus) for host, address in zip(hosts, addresses, strict=True)
    ]
    before = signal.signal(signal.SIGTERM, interrupt)
    begin = time.monotonic()
    try:
        for guest in guests:
            guest.start()
        for guest in guests:
            guest.wait()
            elapsed = f"{time.monotonic() - begin:5.1f} s"
            err.print(f"{elapsed}  {guest.address} beside {guest.host} is up, rxe0 with it")
        yield guests
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        with uninterrupted():
            for guest in guests:
                guest.close()
        signal.signal(signal.SIGTERM, before)


def _relay(stream: str, text: str) -> None:
    to = sys.stdout if stream == "stdout" else sys.stderr
    to.write(text)
    to.flush()


def _words(command: Sequence[str]) -> list[str]:
    """The command of a guest, which may stand behind a --."""
    _refuse_options(command[:1])
    return list(command[1:] if command[0] == "--" else command)


def _ended(status: int) -> typer.Exit:
    """The end with a guest's command's exit status; of one that a signal ended, as shells tell it."""
    return typer.Exit(status if status >= 0 else 128 - status)


def _refuse_options(words: Sequence[str]) -> None:
    """What looks like an option where there can be none is qplab's own, in the wrong place."""
    for word in words:
        if word.startswith("-") and word != "--":
            raise LabError(f"{word}: options of qplab stand before the hosts; those of a program behind a --")


@app.command(context_settings=_PASS_ON)
def rxe(  # noqa: PLR0917 - one parameter an option
    host: Annotated[str, typer.Argument(help="The host beside which the guest stands.")],
    command: Annotated[list[str], typer.Argument(help="What runs in the guest; write -- before it.")],
    address: Annotated[
        str | None, typer.Option(help="The guest's address; by default the host's plus 100.")
    ] = None,
    memory: Memory = "512M",
    cpus: Cpus = 1,
    name: Lab = None,
) -> None:
    """Run a command in a guest with rxe0 (GID index 1: RoCE v2, IPv4); the exit status is the command's."""
    words = _words(command)
    with _guests(one_lab(name), [host], [address], memory, cpus) as (guest,):
        status = guest.popen(*words, sink=_relay).wait()
    raise _ended(status)


@app.command(context_settings=_PASS_ON)
def perftest(  # noqa: PLR0917 - one parameter an option
    client: Annotated[str, typer.Argument(help="The host beside which the client stands.")],
    server: Annotated[str, typer.Argument(help="The host beside which the server stands.")],
    test: Annotated[list[str], typer.Argument(help="-- ib_write_bw -q 8 -D 10, or another of its bw tests.")],
    memory: Memory = "512M",
    cpus: Cpus = 1,
    name: Lab = None,
) -> None:
    """Run a bandwidth test of perftest between two guests."""
    tool, *options = _words(test)
    with _guests(one_lab(name), [client, server], [None, None], memory, cpus) as guests:
        running = Perftest(guests[0], guests[1], tool, options)
        running.begin(_relay)
        running.wait()


@app.command()
def allreduce(  # noqa: PLR0917 - one parameter an option
    hosts: Annotated[list[str], typer.Argument(help="The hosts beside which the ranks stand: two or more.")],
    qps: Annotated[int, typer.Option(help="QPs from each rank to the next.", min=1, max=64)] = 4,
    elements: Annotated[int, typer.Option(help="Numbers (of 4 bytes) that are summed.", min=1)] = 65536,
    rounds: Annotated[int, typer.Option(help="AllReduces, at least.", min=1)] = 10,
    seconds: Annotated[float, typer.Option(help="Go on for so long.", min=0)] = 0.0,
    memory: Memory = "512M",
    cpus: Cpus = 1,
    name: Lab = None,
) -> None:
    """Run a ring AllReduce on RC queue pairs: every sum is checked."""
    if len(hosts) < 2:
        raise LabError("an AllReduce needs two hosts or more")
    with _guests(one_lab(name), hosts, [None] * len(hosts), memory, cpus) as guests:
        report = Ring(guests, qps=qps, elements=elements, rounds=rounds, seconds=seconds).wait()
    out.print_json(json.dumps(report.row()))


@app.command(context_settings=_PASS_ON)
def mpi(
    hosts: Annotated[
        list[str], typer.Argument(help="The hosts beside which the ranks stand, then -- and a program.")
    ],
    memory: Memory = "768M",
    cpus: Cpus = 1,
    name: Lab = None,
) -> None:
    """Run an MPI program over UCX and rxe0, one rank a guest; without one, an AllReduce whose sums are checked."""
    places, program = _split(hosts)
    if len(places) < 2:
        raise LabError("an MPI program needs two hosts or more: HOST HOST [-- PROGRAM]")
    program = program or list(rxe_mpi.ALLREDUCE)
    if problem := rxe_mpi.missing(program):
        raise LabError(problem)
    with _guests(one_lab(name), places, [None] * len(places), memory, cpus) as guests:
        status = rxe_mpi.Mpi(guests, program, _relay).wait()
    raise _ended(status)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first --, and what stands behind it."""
    at = words.index("--") if "--" in words else len(words)
    _refuse_options(words[:at])
    return list(words[:at]), list(words[at + 1 :])
