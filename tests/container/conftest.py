"""The engine, the images, containerlab and the two-dc lab: each made once a session, all removed at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from . import clab, images
from .engine import Engine
from .lab import ContainerLab

WORK = images.REPOSITORY / "build/container"
"""What may be kept from session to session: images, layers, containerlab's binary."""
LAB = images.REPOSITORY / "deploy/containerlab/two-dc/two-dc.clab.yml"


@pytest.fixture(scope="session")
def containerlab_build() -> Iterator[Future[Path]]:
    """containerlab, compiled while the images are built."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(clab.build, WORK)


@pytest.fixture(scope="session")
def engine(containerlab_build: Future[Path]) -> Iterator[Engine]:
    """A Docker engine with the images of `images`."""
    made = Engine(WORK / "docker")
    try:
        made.start()
        images.build_all(made, WORK)
        yield made
    finally:
        made.stop()


MANY_CORES = 4
SECOND_AND_THIRD = [
    f"dc{site}-{kind}{number}" for site in (1, 2) for kind in ("leaf", "host") for number in (2, 3)
]


def left_out() -> list[str]:
    """Grafana, whose image only a registry has; on a small machine all leaves but one a site, and their hosts."""
    return ["grafana", *(SECOND_AND_THIRD if (os.cpu_count() or 1) < MANY_CORES else ())]


@pytest.fixture(scope="session")
def lab(engine: Engine, containerlab_build: Future[Path]) -> Iterator[ContainerLab]:
    """The two-dc lab, deployed by containerlab, but for `left_out`."""
    try:
        binary = containerlab_build.result()
    except clab.UnavailableError as reason:
        pytest.skip(str(reason))
    variables = {
        "QPLAB_LEAF_IMAGE": images.LEAF,
        "QPLAB_HOST_IMAGE": images.LEAF,
        "QPLAB_QPD_IMAGE": images.QPD,
        "QPLAB_PROMETHEUS_IMAGE": images.PROMETHEUS,
    }
    if not engine.knows_capability("BPF", images.LEAF):
        variables |= {"QPLAB_CAP_BPF": "SYS_ADMIN", "QPLAB_CAP_PERFMON": "NET_RAW"}
    made = ContainerLab(engine, binary, LAB, variables, left_out())
    try:
        made.deploy()
        yield made
    finally:
        made.destroy()
