"""Wide-area links: what a link delays, loses and carries at most, as data; profiles with their sources; netem's words.

A shape is what one direction of a link does. It is written down once, in a node's `exec` line of the topology file
(`wan.sh PORT ...`), so that containerlab and qplab make the same of it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import PurePath
from typing import Any

from qpd.lab import scripts
from qpd.lab.errors import LabError
from qpd.lab.topology import Endpoint, Link, Topology

SCRIPT = "wan.sh"

_ORDERED_RATE = "100gbit"
"""netem sends in the order of arrival only where it has a rate; this one delays nothing."""
_PACKET = 1500
_QUEUE_MS = 50.0
_LEAST_LIMIT = 1000
_MOST_LIMIT = 200_000
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?)ms")


@dataclass(frozen=True)
class Shape:
    """What one direction of a link does to packets."""

    delay_ms: float = 0.0
    """Milliseconds, one way."""
    jitter_ms: float = 0.0
    """Each packet's delay is uniformly within plus and minus this; packets keep their order, so that under load, where
    they follow each other closely, the delay tends to the upper end."""
    loss_percent: float = 0.0
    rate: int | None = None
    """Bits per second with Ethernet headers; None: as fast as the machine is."""

    def __post_init__(self) -> None:
        if not 0 <= self.jitter_ms <= self.delay_ms <= 10_000:
            raise LabError(
                f"delay {self.delay_ms:g} ms +- {self.jitter_ms:g} ms: give 0 to 10000, jitter below delay"
            )
        if not 0 <= self.loss_percent < 100:
            raise LabError(f"loss {self.loss_percent:g} %: give 0 or more, below 100")
        if self.rate is not None and self.rate < 8000:
            raise LabError(f"rate {self.rate} bit/s: give 8000 or more")

    @property
    def needs_netem(self) -> bool:
        """True where a kernel without netem leaves something out; a rate and a loss can be had without."""
        return self.delay_ms > 0

    def later(self, ms: float, jitter_ms: float = 0.0) -> Shape:
        """The same with more delay."""
        return replace(self, delay_ms=self.delay_ms + ms, jitter_ms=self.jitter_ms + jitter_ms)

    def words(self) -> list[str]:
        """The words for netem, and so for wan.sh; none for a plain wire."""
        words = []
        if self.delay_ms:
            words += ["limit", str(self.limit), "delay", f"{self.delay_ms:g}ms"]
            words += [f"{self.jitter_ms:g}ms"] if self.jitter_ms else []
        elif self.rate:
            words += ["limit", str(self.limit)]
        if self.loss_percent:
            words += ["loss", f"{self.loss_percent:g}%"]
        if self.rate:
            words += ["rate", rate_text(self.rate)]
        elif self.jitter_ms:
            words += ["rate", _ORDERED_RATE]
        return words

    @property
    def limit(self) -> int:
        """Packets that the link holds: those on their way, and a queue of 50 ms before them."""
        rate = self.rate or parse_rate(_ORDERED_RATE)
        packets = rate * (self.delay_ms + self.jitter_ms + _QUEUE_MS) / 1000 / (8 * _PACKET)
        return min(max(int(packets), _LEAST_LIMIT), _MOST_LIMIT)

    def __str__(self) -> str:
        """The shape in one line, for people."""
        parts = []
        if self.delay_ms:
            parts.append(f"{self.delay_ms:g} ms" + (f" ± {self.jitter_ms:g} ms" if self.jitter_ms else ""))
        if self.loss_percent:
            parts.append(f"{self.loss_percent:g} % loss")
        if self.rate:
            parts.append(rate_text(self.rate))
        return ", ".join(parts) or "a plain wire"


PLAIN = Shape()
"""A wire that does nothing to packets."""


@dataclass(frozen=True)
class Profile:
    """A wide-area link as somebody has measured it."""

    rtt_ms: float
    """Round trip, both ways through the link."""
    jitter_ms: float = 0.0
    """One way, plus and minus."""
    loss_percent: float = 0.0
    source: str = ""

    @property
    def shape(self) -> Shape:
        """Each direction of such a link."""
        return Shape(self.rtt_ms / 2, self.jitter_ms, self.loss_percent)


_AZURE = "median of the 30 days to 9 April 2024; learn.microsoft.com/azure/networking/azure-network-latency"
_PAPER = (
    "arXiv:2606.12963: netem with 5 ms ± 1 ms in the fabric, 22 ms between the sites; here all of it is on the "
    "inter-site link"
)

PROFILES: Mapping[str, Profile] = {
    "paper": Profile(22.0, 1.0, source=_PAPER),
    "australiacentral-australiacentral2": Profile(3.0, source=_AZURE),
    "germanywestcentral-westeurope": Profile(11.0, source=_AZURE),
    "canadacentral-eastus": Profile(22.0, source=_AZURE),
    "westus-centralus": Profile(40.0, source=_AZURE),
    "westus2-canadaeast": Profile(75.0, source=_AZURE),
    "westeurope-eastus": Profile(84.0, source=_AZURE),
    "germanywestcentral-canadacentral": Profile(103.0, source=_AZURE),
    "japaneast-northcentralus": Profile(143.0, source=_AZURE),
    "southeastasia-eastus": Profile(227.0, source=_AZURE),
}
"""Wide-area links by name. Pairs of regions are source-destination as the table has them; it gives round trips only."""

_KEYS = ("profile", "rtt_ms", "jitter_ms", "loss_percent", "rate")


def parse(raw: Mapping[str, Any], where: str) -> Shape:
    """The shape in a mapping: a `profile`, over it `rtt_ms`, `jitter_ms`, `loss_percent`, `rate` ("1gbit").

    Raises:
        LabError: with `where` and the key that is wrong.
    """
    for key in raw:
        if key not in _KEYS:
            raise LabError(f"{where}: {key!r} is not among {', '.join(_KEYS)}")
    name = raw.get("profile")
    if name is not None and name not in PROFILES:
        raise LabError(f"{where}.profile: {name!r} is none of {', '.join(PROFILES)}")
    shape = PROFILES[name].shape if name is not None else PLAIN
    try:
        rtt = _number(raw, "rtt_ms", 2 * shape.delay_ms)
        rate = parse_rate(raw["rate"]) if "rate" in raw else None
        jitter = _number(raw, "jitter_ms", shape.jitter_ms)
        return Shape(rtt / 2, jitter, _number(raw, "loss_percent", shape.loss_percent), rate)
    except LabError as error:
        raise LabError(f"{where}: {error}") from error


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LabError(f"{key}: {value!r}: give a number")
    return float(value)


def parse_rate(text: object) -> int:
    """Bits per second of "1gbit", "200mbit", "1.5gbit"."""
    match = _RATE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise LabError(f"rate: {text!r}: write it as tc does: 200mbit, 1gbit")
    return round(float(match[1]) * _UNITS[match[2].lower()])


def rate_text(rate: int) -> str:
    """A rate as tc writes it."""
    for unit in ("g", "m", "k"):
        if rate % _UNITS[unit] == 0:
            return f"{rate // _UNITS[unit]}{unit}bit"
    return f"{rate}bit"


def of_words(words: Sequence[str]) -> Shape:
    """The shape that `Shape.words` has written.

    Raises:
        LabError: where a word is not one of them.
    """
    shape, rest = PLAIN, list(words)
    while rest:
        word, value = rest.pop(0), rest.pop(0) if rest else ""
        if word == "delay":
            jitter = _ms(rest.pop(0)) if rest and _TIME.fullmatch(rest[0]) else 0.0
            shape = replace(shape, delay_ms=_ms(value), jitter_ms=jitter)
        elif word == "loss" and value.endswith("%"):
            shape = replace(shape, loss_percent=float(value[:-1]))
        elif word == "rate":
            shape = replace(shape, rate=None if value == _ORDERED_RATE else parse_rate(value))
        elif word != "limit":
            raise LabError(
                f"{SCRIPT}: {word} {value}: give limit PACKETS, delay 5ms [1ms], loss 1%, rate 1gbit"
            )
    return shape


def _ms(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        raise LabError(f"{SCRIPT}: delay {text}: give milliseconds as 5ms")
    return float(match[1])


def shapes(topology: Topology) -> dict[Endpoint, Shape]:
    """What each port does to the packets that it sends, as the nodes' `exec` lines say; plain ones are left out."""
    found = {}
    for node in topology.machines:
        for command in node.commands():
            names = [PurePath(word).name for word in command]
            if SCRIPT in names[:2]:
                port, *words = command[names.index(SCRIPT) + 1 :]
                try:
                    found[Endpoint(node.name, port)] = of_words(words)
                except LabError as error:
                    raise LabError(f"{topology.path}: node {node.name}: exec: {error}") from error
    return found


def shaped_links(topology: Topology) -> list[tuple[Link, Shape]]:
    """The wide-area links with what they do from `a` to `b`."""
    every = shapes(topology)
    return [(link, every[link.a]) for link in topology.links if link.a in every]


def script() -> str:
    """Where this machine has the script that makes a link of a shape's words."""
    return str(scripts.find(SCRIPT))


@cache
def missing() -> str | None:
    """One line that says that this kernel has no netem and what to do; None where it has."""
    probe = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    done = subprocess.run(probe, check=False, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return "this kernel has no netem, so no delay and no jitter; `qplab --guest` runs the lab on one that has"
