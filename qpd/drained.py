"""Remembers which paths the operator has drained, so that a restarted daemon does not put them back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

import structlog

from qpd.model import NextHopKey

_log = structlog.get_logger(__name__)


class DrainedPaths:
    """A file beside the API's socket; gone with the machine's next start, as drains are."""

    def __init__(self, socket: Path) -> None:
        self._path = socket.with_name(socket.name + ".drained")
        self._kept: frozenset[NextHopKey] = frozenset()

    def read(self) -> frozenset[NextHopKey]:
        """What was drained; nothing where there is no file, or one that cannot be understood (which is said)."""
        try:
            found = json.loads(self._path.read_bytes())
            self._kept = frozenset(NextHopKey(one["interface"], ip_address(one["next_hop"])) for one in found)
        except FileNotFoundError:
            self._kept = frozenset()
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.warning("drained paths forgotten: drain them again", file=str(self._path), why=str(error))
            self._kept = frozenset()
        return self._kept

    def keep(self, paths: Iterable[NextHopKey]) -> None:
        """Remember exactly these; an unwritable file is said and stops nothing."""
        wanted = frozenset(paths)
        if wanted == self._kept:
            return
        entries = [
            {"interface": key.interface, "next_hop": str(key.address)} for key in sorted(wanted, key=str)
        ]
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            fresh.write_text(json.dumps(entries))
            fresh.replace(self._path)
            self._kept = wanted
        except OSError as error:
            _log.warning("drained paths not remembered", file=str(self._path), why=str(error))

    def forget(self) -> None:
        """Remove the file."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._kept = frozenset()
