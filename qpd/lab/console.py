"""What qplab's commands share: where they write, and which lab they mean."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from qpd.lab import state
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Lab = Annotated[str | None, typer.Option("--name", "-n", help="The lab; needed where several are up.")]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM do nothing meanwhile, nor to what is started meanwhile: a half removed lab helps nobody."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def one_lab(name: str | None) -> Fabric:
    """The lab of this name, or the only one that is up.

    Raises:
        LabError: where there is none, or more than one and no name.
    """
    labs = state.labs()
    if name is None:
        if not labs:
            raise LabError("no lab is up; start one with `qplab up TOPOLOGY`")
        if len(labs) > 1:
            raise LabError(f"several labs are up: {', '.join(labs)}; choose one with --name")
        name = labs[0]
    return Fabric.attach(name)
