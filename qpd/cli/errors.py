"""How a command ends: one line on standard error, and a status that scripts can tell apart."""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import NoReturn


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


def fail(program: str, error: CommandError) -> NoReturn:
    """Say what is wrong and exit."""
    print(f"{program}: {error}", file=sys.stderr)
    raise SystemExit(int(error.status))
