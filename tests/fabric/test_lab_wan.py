"""Wide-area links on this kernel: rate and loss are what was asked for; a delay needs netem, and says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qpd.lab import wan
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link
from qpd.lab.wan import PLAIN, Shape
from tests.wan_probe import probe


@pytest.fixture
def link(two_dc: Fabric) -> Iterator[Link]:
    link = two_dc.link("dc1-spine1", "dc2-spine1")
    try:
        yield link
    finally:
        two_dc.set_shape(link, PLAIN)


def measure(fabric: Fabric, link: Link, what: str, packets: int) -> dict[str, float]:
    (address,) = fabric.conf(link.b.node).addresses[link.b.interface]
    names = [fabric.namespace(end.node) for end in link.ends]
    return probe(what, names[0], names[1], str(address.ip), packets)


def test_the_rate_is_within_five_percent(two_dc: Fabric, link: Link) -> None:
    two_dc.set_shape(link, Shape(rate=20_000_000))
    seen = measure(two_dc, link, "rate", 4000)
    assert seen["bits_per_second"] == pytest.approx(20e6, rel=0.05), seen


def test_the_loss_is_within_its_chance(two_dc: Fabric, link: Link) -> None:
    """30 000 packets at 20 %: five standard deviations are 6 % of it."""
    two_dc.set_shape(link, Shape(loss_percent=20))
    assert measure(two_dc, link, "loss", 30_000)["lost"] == pytest.approx(0.2, rel=0.06)
    two_dc.lose(link, probability=0.5)
    assert measure(two_dc, link, "loss", 30_000)["lost"] == pytest.approx(0.6, rel=0.03)
    two_dc.heal(link)
    assert measure(two_dc, link, "loss", 30_000)["lost"] == pytest.approx(0.2, rel=0.06)
    two_dc.set_shape(link, PLAIN)
    assert measure(two_dc, link, "loss", 1000)["lost"] == 0


def test_without_netem_a_delay_is_refused_and_nothing_changes(two_dc: Fabric, link: Link) -> None:
    if wan.missing() is None:
        pytest.skip("this kernel has netem")
    before = two_dc.exec(link.a.node, "tc", "qdisc", "show", "dev", link.a.interface).stdout
    with pytest.raises(LabError, match="11 ms, 1gbit: this kernel has no netem") as caught:
        two_dc.set_shape(link, Shape(11.0, rate=10**9))
    assert "\n" not in str(caught.value)
    assert two_dc.exec(link.a.node, "tc", "qdisc", "show", "dev", link.a.interface).stdout == before
    assert two_dc.shape(link.a) == PLAIN


def test_the_script_says_in_one_line_what_it_leaves_out(two_dc: Fabric, link: Link) -> None:
    if wan.missing() is None:
        pytest.skip("this kernel has netem")
    script = wan.script()
    said = two_dc.exec(
        link.a.node, "sh", script, link.a.interface, *Shape(5.0, rate=10**9).words()
    ).stdout.splitlines()
    assert said == [
        "wan.sh: this kernel has no netem: wide-area links have their rate, and no delay or jitter"
    ]
    shown = two_dc.exec(link.a.node, "tc", "qdisc", "show", "dev", link.a.interface).stdout
    assert "tbf" in shown
    assert "rate 1Gbit" in shown
