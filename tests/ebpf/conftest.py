from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpd.kernel.tell import Teller
from tests.ebpf.harness import Classifier, loaded


@pytest.fixture(scope="session")
def headers_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


@pytest.fixture(scope="session")
def session_classifier(headers_cache: Path) -> Iterator[Classifier]:
    if os.geteuid():
        pytest.skip("needs root: loads BPF programs")
    with loaded("main", cache=headers_cache) as classifier:
        yield classifier


@pytest.fixture
def classifier(session_classifier: Classifier) -> Classifier:
    session_classifier.reset()
    return session_classifier


@pytest.fixture
def teller(classifier: Classifier) -> Iterator[Teller]:
    opened = Teller(classifier.pins.tell)
    try:
        yield opened
    finally:
        opened.close()
