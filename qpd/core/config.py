"""What the planner is told at its birth: the configuration, and what an earlier daemon left in the kernel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qpd.model import Group, Network, NextHop, NextHopKey, Placement

RTPROT_KERNEL = 2

ROUTING_PROTOCOLS = frozenset({11, 12, 42, *range(186, 199)})
"""RTPROT_* numbers that routing daemons put on their routes: zebra, BIRD and babel (linux/rtnetlink.h), and those of
FRR (zebra/rt_netlink.h): 186 bgp, 187 isis, 188 ospf, 189 rip, 190 ripng, 191 nhrp, 192 eigrp, 193 ldp, 194 sharp,
195 pbr, 196 static, 197 openfabric, 198 sr-te."""

NO_UPLINK_KINDS = frozenset(
    {
        "bridge",
        "vxlan",
        "dummy",
        "vrf",
        "ifb",
        "gre",
        "ip6gre",
        "ipip",
        "sit",
        "ip6tnl",
        "vti",
        "vti6",
        "wireguard",
    }
)
"""Kinds of links (IFLA_INFO_KIND) that carry no underlay, or no Ethernet: never found as uplinks, but may be listed."""


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """What the operator decides; all durations are seconds."""

    uplinks: Collection[str] | None = None
    """Interface names. None: all by which routing daemons' routes reach a next hop."""
    planes: Mapping[str, str] = field(default_factory=dict)
    """Plane by path name, interface or peer's host name. Default: the path's name."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Weight by path name, interface or peer's host name. Default: the weight of the route's next hop."""
    placement: Placement = Placement.BALANCED
    hold_up: float = 1.0
    """How long a path that came back must have been up before it serves."""
    hold_up_max: float = 16.0
    """Each fall that follows a short service doubles ``hold_up``, up to this."""
    stable_after: float = 60.0
    """A path that served for so long starts again at ``hold_up``."""
    linger: float = 600.0
    """How long a path keeps its id, and its place in the slot tables, after its last route went."""
    bfd: bool = True
    """Whether BFD sessions constrain paths."""
    gray_drain: bool = False
    """Whether paths that are found gray are taken out of service."""
    gray_hold: float = 30.0
    """How long; each time that it is gray again soon after its return doubles it …"""
    gray_hold_max: float = 960.0
    """… up to this."""
    own_protocol: int | None = None
    """RTPROT_* number of qpd's own routes: never taken for the fabric's."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """What an earlier daemon left: taken for written, so that only differences are written again.

    ``paths``: id to key. ``groups``: without destinations. ``tables``: slot tables by number (uint8[4096, 64]), as far
    as they were read; a number that a group uses is never overwritten, read or not. ``living``: the daemon's word.
    ``uplinks``: ifindex to interface where the classifier is attached. ``overrides``: routes found in the own table,
    an empty tuple for ``throw``. ``drained``: paths that the operator had taken out of service. ``next_hops``: other
    addresses of the paths' neighbours, to path id.
    """

    paths: Mapping[int, NextHopKey] = field(default_factory=dict)
    groups: Mapping[int, Group] = field(default_factory=dict)
    tables: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    destinations: Mapping[Network, int] = field(default_factory=dict)
    living: int | None = None
    uplinks: Mapping[int, str] = field(default_factory=dict)
    overrides: Mapping[Network, tuple[NextHop, ...]] = field(default_factory=dict)
    drained: Collection[NextHopKey] = ()
    next_hops: Mapping[NextHopKey, int] = field(default_factory=dict)


class UnknownPath(LookupError):  # noqa: N818 - reads as what it says
    """No path has this name. ``known``: the names that there are."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        hint = f"; paths are {', '.join(known)}" if known else "; there are no paths yet"
        super().__init__(f"no path is named {name}{hint}")
        self.name = name
        self.known = known
