"""What a generated lab shall be: sites, spines, leaves, uplinks, the links between the sites. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import yaml

from qpd.lab import wan
from qpd.lab.errors import LabError
from qpd.lab.wan import Shape

DESCRIPTION = "lab.yaml"
"""The name under which a generated lab keeps its description."""

IMAGE = "qpd-leaf"

_KEYS = ("name", "sites", "spines", "leaves", "uplinks", "hosts", "wan", "image", "bfd")
_MOST = {"sites": 9, "spines": 10, "leaves": 89, "uplinks": 32, "hosts": 15}
_NAME = re.compile(r"[a-z][a-z0-9]{0,7}")
_LAB = re.compile(r"[a-z][a-z0-9-]{0,19}")
_TIMERS = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Site:
    """One data centre."""

    name: str
    number: int
    """1 for the first; the addresses' D."""
    spines: int
    leaves: int
    uplinks: int
    """Uplinks of each leaf; uplink U goes to spine (U-1) mod spines + 1."""
    hosts: int
    """Hosts at each leaf."""

    def spine(self, number: int) -> str:
        """A spine's node name."""
        return f"{self.name}-spine{number}"

    def leaf(self, number: int) -> str:
        """A leaf's node name."""
        return f"{self.name}-leaf{number}"

    def host(self, leaf: int, number: int) -> str:
        """A host's node name; hosts are numbered through the site."""
        return f"{self.name}-host{(leaf - 1) * self.hosts + number}"

    def spine_of(self, uplink: int) -> int:
        """The spine at which an uplink ends."""
        return (uplink - 1) % self.spines + 1

    @property
    def spine_as(self) -> int:
        """The AS number of its spines."""
        return 64500 + 100 * self.number

    def leaf_as(self, leaf: int) -> int:
        """The AS number of a leaf."""
        return self.spine_as + 10 + leaf


@dataclass(frozen=True)
class Wan:
    """Inter-site links between two sites that are all alike."""

    a: Site
    b: Site
    links: int
    shape: Shape

    def ends(self) -> Iterator[tuple[int, int]]:
        """The spines that each link joins: every spine in turn, and all pairs before any pair twice."""
        turn = lcm(self.a.spines, self.b.spines)
        for k in range(self.links):
            yield k % self.a.spines + 1, (k + k // turn) % self.b.spines + 1


@dataclass(frozen=True)
class Description:
    """What a lab shall be."""

    name: str
    sites: tuple[Site, ...]
    wans: tuple[Wan, ...]
    image: str
    """Image of spines, leaves and hosts: it has FRR in the version that is wanted."""
    bfd: tuple[int, int]
    """Milliseconds and multiplier."""
    text: str
    """The description as it was written."""


def parse(text: str, where: str) -> Description:
    """Read a description.

    Raises:
        LabError: with `where` and the key that is wrong.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LabError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    top = _mapping(
        raw,
        where,
        "the file",
        ("name", "sites", "spines", "leaves", "uplinks", "hosts", "wan", "image", "bfd"),
    )
    name = top.get("name")
    if not isinstance(name, str) or not _LAB.fullmatch(name):
        raise LabError(f"{where}: name: {name!r}: give 1 to 20 of a-z, 0-9 and '-', a letter first")
    raw_sites = top.get("sites")
    if not isinstance(raw_sites, dict) or not 1 <= len(raw_sites) <= _MOST["sites"]:
        raise LabError(
            f"{where}: sites: give a mapping of 1 to {_MOST['sites']} sites; a site may be left empty (`dc1:`)"
        )
    sites = {
        key: _site(key, number, value, top, where) for number, (key, value) in enumerate(raw_sites.items(), 1)
    }
    image = top.get("image", IMAGE)
    if not isinstance(image, str) or not image:
        raise LabError(f"{where}: image: {image!r}: give the name of a container image")
    raw_wans = top.get("wan") or []
    if not isinstance(raw_wans, list):
        raise LabError(f"{where}: wan: expected a list, found {type(raw_wans).__name__}")
    wans = tuple(_wan(one, sites, f"{where}: wan[{number}]") for number, one in enumerate(raw_wans))
    _check_connected(sites, wans, where)
    return Description(name, tuple(sites.values()), wans, image, _bfd(top.get("bfd", "100x3"), where), text)


def _mapping(raw: object, where: str, what: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise LabError(f"{where}: {what}: expected a mapping, found {type(raw).__name__}")
    for key in raw:
        if key not in keys:
            raise LabError(f"{where}: {what}: {key!r} is not among {', '.join(keys)}")
    return raw


def _site(name: object, number: int, raw: object, top: Mapping[str, Any], where: str) -> Site:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LabError(f"{where}: sites: {name!r}: give 1 to 8 of a-z and 0-9, a letter first")
    own = _mapping(raw or {}, where, f"sites.{name}", ("spines", "leaves", "uplinks", "hosts"))

    def count(key: str, default: int, least: int = 1) -> int:
        value = own.get(key, top.get(key, default))
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST[key]:
            raise LabError(f"{where}: sites.{name}: {key}: {value!r}: give {least} to {_MOST[key]}")
        return value

    spines = count("spines", 2)
    uplinks = count("uplinks", spines)
    if uplinks < spines:
        raise LabError(
            f"{where}: sites.{name}: uplinks: {uplinks}: some of {spines} spines would have no leaf"
        )
    return Site(name, number, spines, count("leaves", 2), uplinks, count("hosts", 1, least=0))


def _wan(raw: object, sites: Mapping[str, Site], where: str) -> Wan:
    keys = ("between", "links", "profile", "rtt_ms", "jitter_ms", "loss_percent", "rate")
    own = _mapping(raw, where, "the entry", keys)
    between = own.get("between")
    if not isinstance(between, list) or len(between) != 2 or between[0] == between[1]:
        raise LabError(f"{where}: between: {between!r}: give two sites")
    for name in between:
        if name not in sites:
            raise LabError(f"{where}: between: there is no site {name!r}; sites are {', '.join(sites)}")
    a, b = (sites[name] for name in between)
    least = max(a.spines, b.spines)
    links = own.get("links", least)
    if isinstance(links, bool) or not isinstance(links, int) or not least <= links <= 64:
        raise LabError(f"{where}: links: {links!r}: give {least} to 64, so that every spine has one")
    return Wan(a, b, links, wan.parse({k: v for k, v in own.items() if k not in {"between", "links"}}, where))


def _check_connected(sites: Mapping[str, Site], wans: Sequence[Wan], where: str) -> None:
    reached = {next(iter(sites))}
    while more := {
        name for one in wans for name in (one.a.name, one.b.name)
        if {one.a.name, one.b.name} & reached and name not in reached
    }:  # fmt: skip
        reached |= more
    if alone := [name for name in sites if name not in reached]:
        raise LabError(f"{where}: wan: nothing leads to site {alone[0]}; add an entry with it in `between`")


def _bfd(raw: object, where: str) -> tuple[int, int]:
    match = _TIMERS.fullmatch(raw) if isinstance(raw, str) else None
    if match is None or not 10 <= int(match[1]) <= 60000 or not 2 <= int(match[2]) <= 255:
        raise LabError(f"{where}: bfd: {raw!r}: write 100x3 for 100 ms, three times")
    return int(match[1]), int(match[2])
