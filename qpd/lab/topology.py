"""containerlab topology files as plain data. Pure but for `load`, which reads the file.

Inheritance is containerlab's: defaults, then the node's kind, then its group, then the node itself; maps are
merged by key, lists are joined, single values are overridden (https://containerlab.dev/manual/topo-def-file/).
"""

from __future__ import annotations

import os
import re
import shlex
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from qpd.lab.errors import LabError

ROLE_LABEL = "qplab.role"
SITE_LABEL = "qplab.site"
DEFAULT_MTU = 9500
"""containerlab's own default for a link."""

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::?[=-](?P<default>[^}]*))?\}")
_LAB_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,39}")


class Role(str, Enum):
    """What a node is in the fabric; the label `qplab.role`."""

    SPINE = "spine"
    LEAF = "leaf"
    HOST = "host"
    QPD = "qpd"
    OTHER = "other"
    """Anything else (a monitoring container, say): qplab leaves it to containerlab."""


@dataclass(frozen=True)
class Bind:
    """A file of the machine (`source`, absolute) that the node sees as `target`."""

    source: Path
    target: str


@dataclass(frozen=True)
class Node:
    """One node with everything that it inherits."""

    name: str
    role: Role
    binds: tuple[Bind, ...] = ()
    exec: tuple[str, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    shares: str | None = None
    """The node whose network namespace this one lives in (`network-mode: container:NAME`)."""

    def bound(self, target: str) -> Path | None:
        """The machine's file behind `target`, None where nothing is bound there."""
        for bind in self.binds:
            if bind.target == target:
                return bind.source
        return None

    def commands(self) -> list[list[str]]:
        """The `exec` lines as argument vectors, with bound paths replaced by the machine's."""
        return [[self._on_this_machine(word) for word in shlex.split(line)] for line in self.exec]

    def _on_this_machine(self, word: str) -> str:
        for bind in self.binds:
            if word == bind.target or word.startswith(bind.target.rstrip("/") + "/"):
                return str(bind.source) + word[len(bind.target) :]
        return word


@dataclass(frozen=True)
class Endpoint:
    """One end of a link: an interface of a node, written NODE:INTERFACE."""

    node: str
    interface: str

    def __str__(self) -> str:
        return f"{self.node}:{self.interface}"

    @property
    def mac_address(self) -> str:
        """The same each time a lab comes up: BGP unnumbered's next hops are made of it, and are listed in order.

        Locally administered (IEEE 802, 8.4).
        """
        return f"02:71:{zlib.crc32(str(self).encode()).to_bytes(4, 'big').hex(':')}"


@dataclass(frozen=True)
class Link:
    """A wire between two nodes; `a` is the end that the topology file names first."""

    a: Endpoint
    b: Endpoint
    mtu: int = DEFAULT_MTU

    @property
    def ends(self) -> tuple[Endpoint, Endpoint]:
        """Both ends, in the order of the file."""
        return (self.a, self.b)

    def end(self, node: str) -> Endpoint:
        """The end at `node`; KeyError where the link does not touch it."""
        for end in self.ends:
            if end.node == node:
                return end
        raise KeyError(f"link {self} has no end at {node}")

    def other(self, node: str) -> Endpoint:
        """The end that is not at `node`."""
        return self.b if self.end(node) == self.a else self.a

    def receivers(self, towards: str | None) -> tuple[Endpoint, ...]:
        """The ends at which what goes towards this node arrives; both where none is named."""
        return (self.end(towards),) if towards else self.ends

    def senders(self, towards: str | None) -> tuple[Endpoint, ...]:
        """The ends that send what goes towards this node; both where none is named."""
        return (self.other(towards),) if towards else self.ends

    def cut_at(self, side: str | None) -> Endpoint:
        """The end that is set down to cut the link: at this node, or the first in the file."""
        return self.end(side) if side else self.a

    def __str__(self) -> str:
        return f"{self.a}--{self.b}"


@dataclass(frozen=True)
class Topology:
    """A parsed topology file."""

    name: str
    path: Path
    nodes: Mapping[str, Node]
    links: tuple[Link, ...]

    def of_role(self, *roles: Role) -> list[Node]:
        """The nodes of these roles, in the order of the file."""
        return [node for node in self.nodes.values() if node.role in roles]

    @property
    def machines(self) -> list[Node]:
        """The nodes that get a network namespace: spines, leaves and hosts."""
        return self.of_role(Role.SPINE, Role.LEAF, Role.HOST)

    @property
    def routers(self) -> list[Node]:
        """The nodes that run FRR."""
        return self.of_role(Role.SPINE, Role.LEAF)

    @property
    def fabric_links(self) -> list[Link]:
        """The links between routers: the underlay."""
        routers = {node.name for node in self.routers}
        return [link for link in self.links if link.a.node in routers and link.b.node in routers]

    def links_of(self, node: str) -> list[Link]:
        """The links that touch `node`, in the order of the file."""
        return [link for link in self.links if node in (link.a.node, link.b.node)]

    def uplinks(self, leaf: str) -> list[Link]:
        """The underlay links of a leaf."""
        return [link for link in self.fabric_links if leaf in (link.a.node, link.b.node)]

    def site(self, node: str) -> str:
        """The site of a node: the label `qplab.site`, else the name before the first dash; "" where there is none."""
        prefix, dash, _ = node.partition("-")
        return self.nodes[node].labels.get(SITE_LABEL, prefix if dash else "")

    @property
    def sites(self) -> list[str]:
        """The sites, in the order of the file."""
        return [site for site in dict.fromkeys(self.site(node.name) for node in self.routers) if site]

    @property
    def inter_site_links(self) -> list[Link]:
        """The underlay links between two sites."""
        return [link for link in self.fabric_links if self.site(link.a.node) != self.site(link.b.node)]

    def sidecar(self, node: str) -> Node | None:
        """The qpd node that shares this node's network namespace."""
        for candidate in self.of_role(Role.QPD):
            if candidate.shares == node:
                return candidate
        return None

    def leaf_of(self, host: str) -> str:
        """The leaf that a host is attached to."""
        for link in self.links_of(host):
            return link.other(host).node
        raise LabError(f"{self.path}: host {host} has no link; add one under topology.links")

    def link(self, name: str, *more: str) -> Link:
        """The link that is meant by two node names or endpoints, or by one "A--B" or endpoint "NODE:IF".

        Raises LabError where nothing fits, or where more than one link fits.
        """
        words = [word for text in (name, *more) for word in text.split("--")]
        found = [link for link in self.links if all(_touches(link, word) for word in words)]
        spoken = "--".join(words)
        if not found:
            near = [link for link in self.links if any(_touches(link, word) for word in words)]
            known = ", ".join(map(str, near)) or "write NODE, NODE:INTERFACE or A--B as in `qplab status`"
            raise LabError(f"topology {self.name} has no link {spoken}; {'near it: ' if near else ''}{known}")
        if len(found) > 1:
            raise LabError(f"{spoken} may be any of {', '.join(map(str, found))}; write NODE:INTERFACE")
        return found[0]


def _touches(link: Link, word: str) -> bool:
    return any(word in (end.node, str(end)) for end in link.ends)


def load(path: Path | str) -> Topology:
    """Read a topology file; a directory stands for the one `*.clab.yml` in it.

    Raises:
        LabError: with the file and the key that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        candidates = sorted(path.glob("*.clab.y*ml"))
        if len(candidates) != 1:
            raise LabError(f"{path}: expected one *.clab.yml there, found {len(candidates)}; name the file")
        path = candidates[0]
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}; give a containerlab topology file") from error
    return parse(text, path.resolve(), os.environ)


def parse(text: str, path: Path, env: Mapping[str, str]) -> Topology:
    """The topology in `text`; `path` locates relative binds and error messages, `env` fills ${VARIABLES}."""
    try:
        document = yaml.safe_load(_substitute(text, env))
    except yaml.YAMLError as error:
        raise LabError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    top = _mapping(document, path, "the file")
    name = top.get("name")
    if not isinstance(name, str) or not _LAB_NAME.fullmatch(name):
        raise LabError(f"{path}: name: {name!r}: give 1 to 40 letters, digits, '.', '_' or '-'")
    topology = _mapping(top.get("topology"), path, "topology")
    nodes = {
        node_name: _node(node_name, _mapping(raw or {}, path, f"topology.nodes.{node_name}"), topology, path)
        for node_name, raw in _mapping(topology.get("nodes"), path, "topology.nodes").items()
    }
    for node in nodes.values():
        if node.shares is not None and node.shares not in nodes:
            raise LabError(f"{path}: topology.nodes.{node.name}.network-mode: there is no node {node.shares}")
    links = tuple(_links(topology.get("links") or [], nodes, path))
    return Topology(name, path, nodes, links)


def _substitute(text: str, env: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return env.get(match["name"]) or match["default"] or ""

    return _VARIABLE.sub(value, text)


def _mapping(value: object, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LabError(f"{path}: {where}: expected a mapping, found {type(value).__name__}")
    return value


def _node(name: str, raw: Mapping[str, Any], topology: Mapping[str, Any], path: Path) -> Node:
    defaults = topology.get("defaults") or {}
    group_name = raw.get("group", defaults.get("group"))
    groups, kinds = topology.get("groups") or {}, topology.get("kinds") or {}
    group = groups.get(group_name) or {}
    kind = kinds.get(raw.get("kind", group.get("kind", defaults.get("kind")))) or {}
    layers = [_mapping(layer, path, f"what {name} inherits") for layer in (defaults, kind, group, raw)]

    labels = _merged(layers, "labels")
    role_text = labels.get(ROLE_LABEL, Role.OTHER.value)
    try:
        role = Role(role_text)
    except ValueError:
        known = ", ".join(role.value for role in Role)
        raise LabError(f"{path}: node {name}: label {ROLE_LABEL}: {role_text!r} is none of {known}") from None

    mode = next((layer["network-mode"] for layer in reversed(layers) if "network-mode" in layer), "")
    shares = mode.removeprefix("container:") if mode.startswith("container:") else None
    if role is Role.QPD and shares is None:
        raise LabError(f"{path}: node {name}: a qpd node needs network-mode: container:LEAF")
    return Node(
        name=name,
        role=role,
        binds=_binds(layers, name, path),
        exec=tuple(_magic(line, name) for layer in layers for line in layer.get("exec") or ()),
        sysctls=_merged(layers, "sysctls"),
        env=_merged(layers, "env"),
        labels=labels,
        shares=shares,
    )


def _merged(layers: Iterable[Mapping[str, Any]], key: str) -> dict[str, str]:
    merged: dict[str, str] = {}
    for layer in layers:
        merged.update({str(k): str(v) for k, v in (layer.get(key) or {}).items()})
    return merged


def _magic(text: str, node: str) -> str:
    return text.replace("__clabNodeName__", node)


def _binds(layers: Iterable[Mapping[str, Any]], node: str, path: Path) -> tuple[Bind, ...]:
    by_target: dict[str, Bind] = {}
    for layer in layers:
        for text in layer.get("binds") or ():
            parts = _magic(text, node).split(":")
            if len(parts) < 2:
                raise LabError(f"{path}: node {node}: binds: {text!r}: write SOURCE:TARGET")
            source = Path(os.path.normpath(path.parent / Path(parts[0]).expanduser()))
            by_target[parts[1]] = Bind(source, parts[1])
    return tuple(by_target.values())


def _links(raw_links: Iterable[Any], nodes: Mapping[str, Node], path: Path) -> Iterable[Link]:
    taken: dict[Endpoint, int] = {}
    for index, raw in enumerate(raw_links):
        where = f"topology.links[{index}]"
        ends = _mapping(raw, path, where).get("endpoints")
        if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, str) for end in ends):
            raise LabError(f"{path}: {where}.endpoints: write two of NODE:INTERFACE")
        a, b = (_endpoint(end, nodes, path, where) for end in ends)
        for end in (a, b):
            if end in taken:
                raise LabError(f"{path}: {where}: {end} is already used by topology.links[{taken[end]}]")
            taken[end] = index
        mtu = raw.get("mtu", DEFAULT_MTU)
        if not isinstance(mtu, int) or not 1280 <= mtu <= 65535:
            raise LabError(f"{path}: {where}.mtu: {mtu!r}: give bytes, 1280 to 65535")
        yield Link(a, b, mtu)


def _endpoint(text: str, nodes: Mapping[str, Node], path: Path, where: str) -> Endpoint:
    node, _, interface = text.partition(":")
    if node not in nodes:
        raise LabError(f"{path}: {where}: {text}: there is no node {node!r} under topology.nodes")
    if not 1 <= len(interface) <= 15:
        raise LabError(f"{path}: {where}: {text}: Linux wants interface names of 1 to 15 characters")
    return Endpoint(node, interface)
