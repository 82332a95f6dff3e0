"""The README of a generated lab. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from qpd.lab import wan
from qpd.lab.description import DESCRIPTION, Description

_BETWEEN = (
    "Each direction of a link has this delay, loss and rate. A kernel without netem gives no delay; "
    "`qplab --guest` runs the lab on one that has it."
)


def readme(lab: Description) -> str:
    """README.md: a drawing, the links between the sites, the address plan."""
    spines, leaves = sum(s.spines for s in lab.sites), sum(s.leaves for s in lab.sites)
    hosts = sum(s.leaves * s.hosts for s in lab.sites)
    what = (
        f"{len(lab.sites)} site{'s' * (len(lab.sites) > 1)}, {spines} spines, {leaves} leaves, {hosts} hosts. "
        f"Made by `qplab generate` from [{DESCRIPTION}]({DESCRIPTION})."
    )
    start = (
        "| | |\n|---|---|\n"
        f"| without a container engine | `qplab up` this folder, later `qplab down {lab.name}` |\n"
        f"| with containerlab | `containerlab deploy -t {lab.name}.clab.yml` |"
    )
    ports = (
        "On a leaf, `ethU` is uplink U, and the hosts follow. On a spine, the leaves come first, in their order, "
        f"then the inter-site links. BFD at {lab.bfd[0]} ms x {lab.bfd[1]} on every underlay link; eBGP for IPv4 "
        "unicast and EVPN; L2VNI 100 on every leaf; qpd beside every leaf."
    )
    parts = [f"# {lab.name}", what, "```\n" + "\n".join(_drawing(lab)) + "\n```", "## Start", start]
    if lab.wans:
        parts += ["## Between the sites", _BETWEEN, _wan_table(lab)]
    parts += ["## Address plan", _plan(lab), ports]
    return "\n\n".join(parts) + "\n"


def _drawing(lab: Description) -> Iterator[str]:
    width = max(len(site.name) for site in lab.sites)
    for site in lab.sites:
        fan = f"{site.uplinks} uplinks each" if site.uplinks > 1 else "1 uplink each"
        hosts = f" -- {site.hosts} host{'s' * (site.hosts > 1)} each" if site.hosts else ""
        yield (
            f"{site.name:{width}}  AS {site.spine_as}   spine1..{site.spines} == {fan} == leaf1..{site.leaves}{hosts}"
        )
    if lab.wans:
        yield ""
    for one in lab.wans:
        yield f"{one.a.name:{width}} <== {one.links} x {one.shape} ==> {one.b.name}"


def _wan_table(lab: Description) -> str:
    rows = ["| link | delay, one way | round trip | loss | rate |", "|---|---|---|---|---|"]
    for one in lab.wans:
        shape = one.shape
        jitter = f" ± {shape.jitter_ms:g}" if shape.jitter_ms else ""
        for i, j in one.ends():
            rows.append(
                f"| {one.a.spine(i)} - {one.b.spine(j)} | {shape.delay_ms:g}{jitter} ms | {2 * shape.delay_ms:g} ms "
                f"| {shape.loss_percent:g} % | {wan.rate_text(shape.rate) if shape.rate else '-'} |"
            )
    return "\n".join(rows)


def _plan(lab: Description) -> str:
    rows = ["| what | addresses |", "|---|---|"]
    sites = ", ".join(f"{site.number} {site.name}" for site in lab.sites)
    rows += [
        f"| site `D` | {sites} |",
        "| loopback of spine `S` | `10.255.D.S/32` |",
        "| loopback of leaf `L`, which is its VTEP | `10.255.D.(10+L)/32` |",
        "| uplink `U` of leaf `L` | `10.D.(10+L).(2U-2)/31`: spine even, leaf odd |",
    ]
    rows += ["| inter-site link `k`, from 0 in the order above | `10.0.(k/128).(2(k mod 128))/31` |"] * bool(
        lab.wans
    )
    rows += [
        "| host `H` of leaf `L` | `172.(15+H).D.L/12`, `fd00:100::H:D:L/64` |",
        "| AS number of a site's spines, of a leaf | `64500+100D`, `64510+100D+L` |",
    ]
    return "\n".join(rows)
