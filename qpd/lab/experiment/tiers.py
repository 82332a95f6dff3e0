"""The links whose loads are compared: of the sending leaves their uplinks, of the sending sites their way out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qpd.lab.load import jain, max_to_mean
from qpd.lab.topology import Endpoint, Role, Topology

LEAF, SPINE = "leaf", "spine"


@dataclass(frozen=True)
class Group:
    """Links among which a choice is made, by their sending ends."""

    tier: str
    """`leaf`: one leaf's uplinks; `spine`: the inter-site links of one site."""
    name: str
    """The leaf, or the site."""
    ends: tuple[Endpoint, ...]


def groups(topology: Topology, senders: Iterable[str]) -> list[Group]:
    """The groups that packets of these hosts pass; a site without another has no spine group."""
    leaves = list(dict.fromkeys(topology.leaf_of(host) for host in senders))
    found = [Group(LEAF, leaf, tuple(link.end(leaf) for link in topology.uplinks(leaf))) for leaf in leaves]
    spines = {node.name for node in topology.of_role(Role.SPINE)}
    for site in dict.fromkeys(topology.site(leaf) for leaf in leaves):
        ends = tuple(
            end
            for link in topology.inter_site_links
            for end in link.ends
            if end.node in spines and topology.site(end.node) == site
        )
        if ends:
            found.append(Group(SPINE, site, ends))
    return found


def far_ends(topology: Topology, chosen: Sequence[Group]) -> dict[Endpoint, Endpoint]:
    """Where the packets of each sending end arrive: sending end -> receiving end."""
    return {end: topology.link(str(end)).other(end.node) for group in chosen for end in group.ends}


def factors(chosen: Sequence[Group], loads: Mapping[Endpoint, float]) -> dict[str, float]:
    """The measures of how even the loads are; of several groups of a tier the worst one counts."""
    found: dict[str, float] = {}
    for tier in (LEAF, SPINE):
        values = [[loads[end] for end in group.ends] for group in chosen if group.tier == tier]
        carried = [one for one in values if sum(one) > 0]
        if carried:
            found[f"{tier}_max_to_mean"] = max(map(max_to_mean, carried))
            found[f"{tier}_jain"] = min(map(jain, carried))
    return found
