"""How a command ends: one line on standard error, and a status that scripts can tell apart."""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import NoReturn

import typer


class ExitStatus(IntEnum):
    """Exit statuses of ``qpctl`` and ``qpd``."""

    DONE = 0
    FAILED = 1
    """No answer from the daemon; ``qpd``: it could not do its work; ``doctor``: something fails."""
    USAGE = 2
    NOT_FOUND = 3


class CommandError(Exception):
    """The command cannot go on; the message is one line."""

    def __init__(self, message: str, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(message)
        self.status = status


def run(app: typer.Typer, program: str) -> NoReturn:
    """Run a command to its end; every error is one line on standard error."""
    try:
        status = app(prog_name=program, standalone_mode=False)
    except typer.TyperException as error:
        # An empty message is that of a command without arguments, which has printed its help.
        message = " ".join(error.format_message().split())
        if message:
            print(f"{program}: {message} ({program} --help)", file=sys.stderr)
        status = ExitStatus.USAGE
    except CommandError as error:
        print(f"{program}: {error}", file=sys.stderr)
        status = error.status
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    raise SystemExit(int(status or 0))
