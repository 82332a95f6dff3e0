"""What BFD says of paths: bfdd's sessions as it tells them, and the kernel's tap, which is ahead of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qpd.core.paths import PathRecord
from qpd.model import BfdSession, BfdState, NextHopKey, Reason

_CONSTRAINING = (BfdState.DOWN, BfdState.INIT)
_TAP_TRUSTED = 2.0
"""Seconds after which bfdd's repeated Up outweighs the tap's Down: its news of the return was lost."""


class BfdFacts:
    """All sessions by interface and peer (interface '': a session that is bound to none).

    A session that was never seen Up constrains nothing, nor does one that either end took down (RFC 5882, 4.2).
    """

    def __init__(self) -> None:
        self.sessions: dict[NextHopKey, BfdSession] = {}
        self.lost = False
        """bfdd is away: what the tap calls dead is but bfdd's silence, and paths keep their state."""
        self._seen_up: set[NextHopKey] = set()

    def of(self, record: PathRecord) -> BfdSession | None:
        """The session that guards a path."""
        session = self.sessions.get(record.key)
        return session or self.sessions.get(NextHopKey("", record.key.address))

    def verdict(self, record: PathRecord) -> Reason:
        """What BFD has against a path."""
        if record.tap_down is not None:
            return record.tap_down
        session = self.of(record)
        if session is None or session.state not in _CONSTRAINING or _key(session) not in self._seen_up:
            return Reason.NONE
        return Reason.BFD_SILENT if "expired" in session.diagnostic.lower() else Reason.BFD_DOWN

    def read(self, sessions: Iterable[BfdSession]) -> None:
        """All of bfdd's sessions, as it tells them."""
        self.lost = False
        self.sessions = {_key(session): session for session in sessions}
        self._seen_up &= self.sessions.keys()
        for key, session in self.sessions.items():
            if session.state is BfdState.UP:
                self._seen_up.add(key)
            elif BfdState.ADMIN_DOWN in {session.state, session.remote_state}:
                self._seen_up.discard(key)

    def lose(self) -> None:
        """No bfdd any more. In its next life a session that is not Up yet is no dead path, unless it is one now."""
        self.lost = True
        self._seen_up = {
            key for key in self._seen_up if key in self.sessions and self.sessions[key].state in _CONSTRAINING
        }

    def tapped(self, record: PathRecord, up: bool, cause: str, now: float) -> bool:
        """The tap reported; False: it is not believed while bfdd is away."""
        if self.lost and not up:
            return False
        record.tap_down = None if up else _reason(cause)
        record.tap_at = now
        record.tapped = True
        record.disagreed = False
        session = self.of(record)
        if session is not None:
            state = BfdState.UP if up else BfdState.DOWN
            self.sessions[_key(session)] = replace(session, state=state)
            self._seen_up.add(_key(session))
        return True

    def assume_seen(self, record: PathRecord) -> None:
        """An earlier daemon held this path down: a session that is down now has been up in that life."""
        session = self.of(record)
        if (
            session is not None
            and session.state in _CONSTRAINING
            and session.remote_state is not BfdState.ADMIN_DOWN
        ):
            self._seen_up.add(_key(session))

    def compare(self, record: PathRecord, now: float) -> Mapping[str, str] | None:
        """After a read: what tap and bfdd say of a path where they differ for the second time, else None."""
        session = self.of(record)
        if session is None or session.state is BfdState.ADMIN_DOWN:
            record.tap_down, record.tapped, record.disagreed = None, False, False
            return None
        if not record.tapped or (record.tap_down is None) == (session.state is BfdState.UP):
            record.disagreed = False
            return None
        if not record.disagreed:
            # The read may have crossed the tap's report.
            record.disagreed = True
            return None
        tap = "up" if record.tap_down is None else "down"
        if session.state is BfdState.UP and now - record.tap_at > _TAP_TRUSTED:
            record.tap_down = None
        return {"tap": tap, "bfdd": session.state.name.lower().replace("_", "-")}


def _key(session: BfdSession) -> NextHopKey:
    return NextHopKey(session.interface, session.peer)


def _reason(cause: str) -> Reason:
    return Reason.BFD_SILENT if "silen" in cause or "expired" in cause else Reason.BFD_DOWN
