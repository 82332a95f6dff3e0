"""What BFD says of paths: bfdd's sessions as it tells them, and the kernel's tap, which is ahead of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qpd.core.paths import PathRecord
from qpd.model import Address, BfdSession, BfdState, NextHopKey, Reason

_CONSTRAINING = (BfdState.DOWN, BfdState.INIT)
_WORST_FIRST = (BfdState.DOWN, BfdState.INIT, BfdState.ADMIN_DOWN, BfdState.UP)
_HELD = "up"
"""The tap's cause for a path that is back: its session has been Up for ``hold_up`` (``enum tap_cause`` in maps.h)."""
_CROSSING = 0.1
"""Seconds after the tap's report in which what bfdd says may be older than the report."""
_OVERDUE = 2.0
"""Seconds beyond ``hold_up`` after which bfdd's Up outweighs the tap's Down: its news of the return was lost."""


class BfdFacts:
    """All sessions by interface and peer (interface '': a session that is bound to none).

    Several sessions may guard one path, one for each of its neighbour's addresses: the worst counts. A session that was
    never seen Up constrains nothing, nor does one that either end took down (RFC 5882, 4.2).
    """

    def __init__(self, hold_up: float) -> None:
        self.sessions: dict[NextHopKey, BfdSession] = {}
        self.lost = False
        """bfdd is away: what the tap calls dead is but bfdd's silence, and paths keep their state."""
        self._hold_up = hold_up
        self._seen_up: set[NextHopKey] = set()
        self._down_at: dict[NextHopKey, float] = {}

    def guards(self, record: PathRecord) -> list[BfdSession]:
        """The sessions with any of the path's addresses."""
        return [session for _, session in self._guards(record)]

    def worst(self, record: PathRecord) -> BfdSession | None:
        """The session that tells most against the path."""
        return min(self.guards(record), key=self._rank, default=None)

    def guard_of(self, record: PathRecord) -> Address | None:
        """The one address whose session shall tell the tap of the path; None: it has not more than one.

        The tap holds one word a path, which the packets of two sessions would write in turn.
        """
        guards = self._guards(record)
        if len(guards) < 2:
            return None
        best = min(
            guards, key=lambda guard: (_key(guard[1]) not in self._seen_up, guard[0] != record.key.address)
        )
        return best[0]

    def verdict(self, record: PathRecord, kin: Iterable[PathRecord] = ()) -> Reason:
        """What BFD has against a path. ``kin``: other paths to the same neighbour, whose sessions tell of it, too."""
        if record.tap_down is not None and record.tap_holds_since is None:
            return record.tap_down
        sessions = [session for one in (record, *kin) for session in self.guards(one)]
        failed = [session for session in sessions if self._constrains(session)]
        if not failed:
            return Reason.NONE
        silent = all("expired" in session.diagnostic.lower() for session in failed)
        return Reason.BFD_SILENT if silent else Reason.BFD_DOWN

    def is_up(self, record: PathRecord) -> bool:
        """BFD sees the path alive."""
        return self.verdict(record) is Reason.NONE and any(
            session.state is BfdState.UP for session in self.guards(record)
        )

    def read(self, sessions: Iterable[BfdSession], now: float) -> None:
        """All of bfdd's sessions, as it tells them."""
        self.lost = False
        self.sessions = {_key(session): session for session in sessions}
        self._seen_up &= self.sessions.keys()
        self._down_at = {key: at for key, at in self._down_at.items() if key in self.sessions}
        for key, session in self.sessions.items():
            if session.state is BfdState.UP:
                self._seen_up.add(key)
            else:
                self._down_at[key] = now
                if BfdState.ADMIN_DOWN in {session.state, session.remote_state}:
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
        guards = self.guards(record)
        if up and cause == _HELD:
            # It has waited for hold_up itself: no sooner than it reported the end, or bfdd was seen down.
            downs = [self._down_at.get(_key(session), 0.0) for session in guards]
            record.bfd_up_since = max(now - self._hold_up, record.tap_at, *downs)
        else:
            record.bfd_up_since = None
        record.tap_down = None if up else _reason(cause)
        record.tap_holds_since = None
        record.tap_at = now
        record.tapped = True
        record.disagreed = 0
        if len(guards) == 1:
            # Of several it does not say which: bfdd will.
            key = _key(guards[0])
            self.sessions[key] = replace(guards[0], state=BfdState.UP if up else BfdState.DOWN)
            self._seen_up.add(key)
        return True

    def assume_seen(self, record: PathRecord) -> None:
        """An earlier daemon held this path down: a session that is down now has been up in that life."""
        for session in self.guards(record):
            if session.state in _CONSTRAINING and session.remote_state is not BfdState.ADMIN_DOWN:
                self._seen_up.add(_key(session))

    def compare(self, record: PathRecord, now: float) -> Mapping[str, str] | None:
        """After a read: what tap and bfdd say of a path where they differ and should not, else None."""
        sessions = [session for session in self.guards(record) if session.state is not BfdState.ADMIN_DOWN]
        if not sessions:
            record.tap_down, record.tap_holds_since = None, None
            record.tapped, record.disagreed = False, 0
            return None
        down = next((session for session in sessions if self._constrains(session)), None)
        if down is not None:
            record.bfd_up_since = None
        if record.tap_down is not None:
            up = down is None and any(session.state is BfdState.UP for session in sessions)
            return self._held_by_tap(record, up, now)
        if down is None or not record.tapped:
            record.disagreed = 0
            return None
        record.disagreed += 1
        # The first read may have crossed the tap's report.
        return {"tap": "up", "bfdd": down.state.name.lower()} if record.disagreed == 2 else None

    def _held_by_tap(self, record: PathRecord, up: bool, now: float) -> Mapping[str, str] | None:
        """Up, says bfdd: the tap has nothing against the path but its own ``hold_up``, which is ours as well."""
        if not up:
            record.disagreed, record.tap_holds_since = 0, None
            return None
        record.disagreed += 1
        if record.disagreed < 2 and now - record.tap_at < _CROSSING:
            return None
        if record.tap_holds_since is None:
            record.tap_holds_since = now
        if now - record.tap_holds_since <= self._hold_up + _OVERDUE:
            return None
        record.tap_down, record.tap_holds_since, record.tapped = None, None, False
        return {"tap": "down", "bfdd": "up"}

    def _guards(self, record: PathRecord) -> list[tuple[Address, BfdSession]]:
        found = []
        for address in record.addresses:
            session = self.sessions.get(NextHopKey(record.key.interface, address))
            session = session or self.sessions.get(NextHopKey("", address))
            if session is not None:
                found.append((address, session))
        return found

    def _constrains(self, session: BfdSession) -> bool:
        return session.state in _CONSTRAINING and _key(session) in self._seen_up

    def _rank(self, session: BfdSession) -> tuple[bool, int]:
        return not self._constrains(session), _WORST_FIRST.index(session.state)


def _key(session: BfdSession) -> NextHopKey:
    return NextHopKey(session.interface, session.peer)


def _reason(cause: str) -> Reason:
    return Reason.BFD_SILENT if "silen" in cause or "expired" in cause else Reason.BFD_DOWN
