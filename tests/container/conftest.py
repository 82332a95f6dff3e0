"""The engine, the images, containerlab and the labs: each made once a session, all removed at its end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from . import clab, images
from .choice import Choice, ChoiceError, of_this_machine
from .engine import Engine
from .lab import ContainerLab

WORK = images.REPOSITORY / "build/container"
"""What may be kept from session to session: images, layers, containerlab's binary."""


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


@pytest.fixture(scope="session")
def lab(
    request: pytest.FixtureRequest, engine: Engine, containerlab_build: Future[Path]
) -> Iterator[ContainerLab]:
    """Each lab of QPDT_LABS in turn, deployed by containerlab."""
    choice: Choice = request.param
    try:
        binary = containerlab_build.result()
    except clab.UnavailableError as reason:
        pytest.skip(str(reason))
    variables = {
        "QPLAB_SPINE_IMAGE": images.leaf(engine, WORK, choice.spines),
        "QPLAB_LEAF_IMAGE": images.leaf(engine, WORK, choice.leaves),
        "QPLAB_HOST_IMAGE": images.LEAF,
        "QPLAB_QPD_IMAGE": images.QPD,
        "QPLAB_PROMETHEUS_IMAGE": images.PROMETHEUS,
    }
    if not engine.knows_capability("BPF", images.LEAF):
        variables |= {"QPLAB_CAP_BPF": "SYS_ADMIN", "QPLAB_CAP_PERFMON": "NET_RAW"}
    made = ContainerLab(engine, binary, choice.file, variables, choice.left_out())
    try:
        made.deploy()
        yield made
    finally:
        made.destroy()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `lab` run for each one that QPDT_LABS names."""
    if "lab" in metafunc.fixturenames:
        try:
            choices = of_this_machine()
        except ChoiceError as error:
            raise pytest.UsageError(str(error)) from None
        metafunc.parametrize("lab", choices, ids=str, indirect=True, scope="session")
