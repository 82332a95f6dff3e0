"""Which labs the tests deploy, of what size, and with which releases of FRR: the variable QPDT_LABS. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qpd.lab import topology
from qpd.lab.topology import Role, Topology

VARIABLE = "QPDT_LABS"
LABS = Path(__file__).resolve().parents[2] / "deploy/containerlab"
FRR_RELEASES = "a Debian release such as trixie"
MANY_CORES = 4


class ChoiceError(ValueError):
    """What is wrong with QPDT_LABS, in one line."""


@dataclass(frozen=True)
class Choice:
    """One lab to deploy, written LAB[:small][:spines=RELEASE][:leaves=RELEASE][:frr=RELEASE]."""

    lab: str
    small: bool = False
    """One leaf a site and its hosts; where there is one site, its first and its last leaf."""
    spines: str = ""
    """The Debian release whose FRR the spines have; empty: the one of this machine."""
    leaves: str = ""
    """Likewise for the leaves."""

    def __str__(self) -> str:
        """As in QPDT_LABS."""
        releases = {"spines": self.spines, "leaves": self.leaves}
        if self.spines == self.leaves:
            releases = {"frr": self.spines}
        words = [f"{key}={value}" for key, value in releases.items() if value]
        return ":".join([self.lab, *(["small"] if self.small else []), *words])

    @property
    def file(self) -> Path:
        """Its topology file."""
        return LABS / self.lab / f"{self.lab}.clab.yml"

    def left_out(self) -> set[str]:
        """Nodes that are not deployed: Grafana, whose image only a registry has, and what makes the lab whole."""
        whole = topology.load(self.file)
        return {"grafana"} | (_spare(whole) if self.small else set())


def _spare(whole: Topology) -> set[str]:
    leaves = [node.name for node in whole.of_role(Role.LEAF)]
    first = {whole.site(leaf): leaf for leaf in reversed(leaves)}
    kept = set(first.values()) if len(first) > 1 else {leaves[0], leaves[-1]}
    spare = set(leaves) - kept
    return spare | {host.name for host in whole.of_role(Role.HOST) if whole.leaf_of(host.name) in spare}


def default(cores: int) -> list[Choice]:
    """What is deployed where nobody has chosen."""
    return [Choice("two-dc", small=cores < MANY_CORES)]


def chosen(environment: Mapping[str, str], cores: int) -> list[Choice]:
    """The labs that QPDT_LABS names, in its order; `all` stands for every lab, whole.

    Raises:
        ChoiceError: with the word that is wrong.
    """
    words = environment.get(VARIABLE, "").split()
    if not words:
        return default(cores)
    return [one for word in words for one in _parse(word)]


def names() -> list[str]:
    """The labs of deploy/containerlab."""
    return sorted(file.parent.name for file in LABS.glob("*/*.clab.yml"))


def _parse(word: str) -> list[Choice]:
    name, *options = word.split(":")
    if name != "all" and name not in names():
        raise ChoiceError(
            f"{VARIABLE}: {word}: there is no lab {name!r}; there are {', '.join(names())}, or all"
        )
    one = Choice(name)
    for option in options:
        key, _, value = option.partition("=")
        if option == "small":
            one = replace(one, small=True)
        elif key in {"spines", "leaves", "frr"} and value.isalpha():
            one = replace(
                one,
                spines=one.spines if key == "leaves" else value,
                leaves=one.leaves if key == "spines" else value,
            )
        else:
            raise ChoiceError(
                f"{VARIABLE}: {word}: {option!r} is none of small, frr=RELEASE, spines=RELEASE, leaves=RELEASE "
                f"(RELEASE is {FRR_RELEASES})"
            )
    return [replace(one, lab=lab) for lab in names()] if name == "all" else [one]


def of_this_machine() -> list[Choice]:
    """`chosen`, from this process's environment."""
    return chosen(os.environ, os.cpu_count() or 1)
