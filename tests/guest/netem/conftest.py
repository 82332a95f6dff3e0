"""One leaf for all tests: to compile the classifier takes a minute on an emulated processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qpd.lab import wan

from .leaf import Leaf


@pytest.fixture(scope="session")
def leaf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaf]:
    """Steering, with qpd's default configuration, plain wires, and BFD up on all of them."""
    if reason := wan.missing():
        pytest.skip(reason)
    made = Leaf(tmp_path_factory.mktemp("leaf"))
    try:
        made.open()
        made.start()
        made.respond()
        yield made
    finally:
        made.close()
