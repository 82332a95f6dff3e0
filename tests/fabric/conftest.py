"""The fabrics of this tier: each comes up once a session, without qpd, and is put right after every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpd.lab import frr
from qpd.lab.fabric import Fabric

LABS = Path(__file__).parents[2] / "deploy/containerlab"
CONVERGE = 90.0
"""Seconds; two busy cores have needed 30."""


def lab_name(what: str) -> str:
    """A name that no other test session uses."""
    return f"qpdt-{os.getpid()}-{what}"


def _fabric(lab: str) -> Iterator[Fabric]:
    reason = "needs root: network namespaces; run as root" if os.geteuid() != 0 else frr.missing()
    if reason:
        pytest.skip(reason)
    fabric = Fabric.load(LABS / lab, lab_name(lab))
    try:
        fabric.up(qpd=False, deadline=CONVERGE)
        yield fabric
    finally:
        fabric.down()


@pytest.fixture(scope="session")
def two_dc_session() -> Iterator[Fabric]:
    """Two data centres; tests take `two_dc`."""
    yield from _fabric("two-dc")


@pytest.fixture(scope="session")
def four_spine_session() -> Iterator[Fabric]:
    """One site with four spines; tests take `four_spine`."""
    yield from _fabric("four-spine")


def _healthy(fabric: Fabric) -> Iterator[Fabric]:
    fabric.wait_converged(CONVERGE)
    try:
        yield fabric
    finally:
        fabric.restore()


@pytest.fixture
def two_dc(two_dc_session: Fabric) -> Iterator[Fabric]:
    """Two data centres, numbered links, converged, without qpd; healed after the test."""
    yield from _healthy(two_dc_session)


@pytest.fixture
def four_spine(four_spine_session: Fabric) -> Iterator[Fabric]:
    """Four spines, BGP unnumbered, converged, without qpd; healed after the test."""
    yield from _healthy(four_spine_session)


@pytest.fixture(params=["two_dc", "four_spine"])
def fabric(request: pytest.FixtureRequest) -> Fabric:
    """Each of the fabrics in turn."""
    made = request.getfixturevalue(request.param)
    assert isinstance(made, Fabric)
    return made
