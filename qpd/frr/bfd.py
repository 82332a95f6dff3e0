"""``show bfd peers json`` of bfdd as sessions; pure.

Seen in a live FRR 8.4.4 and read in the sources of 9.0 to 10.7 (bfdd/bfdd_vty.c, __display_peer_json). Every key is
optional: 9.1 adds ``type``, 10.3 SBFD's ``bfd-name``, 10.6 ``detection-timeout``, 10.7 ``authentication``.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import orjson

from qpd.model import Address, BfdSession, BfdState

COMMAND = "show bfd peers json"

InterfaceOf = Callable[[Address], str | None]
"""The interface on whose connected prefix an address lies; None where there is none."""

_STATES = {
    "shutdown": BfdState.ADMIN_DOWN,
    "down": BfdState.DOWN,
    "init": BfdState.INIT,
    "up": BfdState.UP,
}
_DEFAULT_VRF = "default"


def parse_sessions(text: str, interface_of: InterfaceOf) -> tuple[BfdSession, ...]:
    """Single-hop sessions of the default VRF.

    Multihop and seamless sessions are left out: they speak of no one link. So are sessions whose state has no name.

    Raises:
        ValueError: the text is not what bfdd answers; one line.
    """
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"bfdd's answer to {COMMAND!r} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"bfdd's answer to {COMMAND!r} is not a list: {text[:60]!r}")  # noqa: TRY004 - of the text
    found = (_session(entry, interface_of) for entry in entries if isinstance(entry, dict))
    return tuple(session for session in found if session is not None)


def _session(entry: dict[str, Any], interface_of: InterfaceOf) -> BfdSession | None:
    peer, state = to_address(entry.get("peer")), _STATES.get(str(entry.get("status")))
    if peer is None or state is None:
        return None
    if entry.get("multihop") is True or "bfd-name" in entry or entry.get("vrf", _DEFAULT_VRF) != _DEFAULT_VRF:
        return None
    interface = entry.get("interface") or interface_of(peer)
    if not isinstance(interface, str):
        return None
    return BfdSession(
        interface=interface,
        peer=peer,
        state=state,
        local=to_address(entry.get("local")),
        diagnostic=str(entry.get("diagnostic", "")),
        detection_time=_detection_time(entry, state),
    )


def _detection_time(entry: dict[str, Any], state: BfdState) -> float | None:
    """RFC 5880, 6.8.4: the peer's multiplier times the slower of what we accept and it sends. Milliseconds come in."""
    told = entry.get("detection-timeout")
    if isinstance(told, int) and told > 0:
        return told / 1000
    values = [
        entry.get(key) for key in ("remote-detect-multiplier", "receive-interval", "remote-transmit-interval")
    ]
    multiplier, accepted, sent = (value if isinstance(value, int) and value > 0 else None for value in values)
    if state is not BfdState.UP or multiplier is None or accepted is None or sent is None:
        return None  # before the session is up, the peer's values are not negotiated ones
    return multiplier * max(accepted, sent) / 1000


def to_address(text: object) -> Address | None:
    """An address as FRR prints it, or None ("none", "Unknown", absent)."""
    try:
        return ip_address(text) if isinstance(text, str) else None
    except ValueError:
        return None
