"""How fabric tests judge: subsets of JSON, and polling until a fact is true (as FRR's topotests do)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from qpd.lab.errors import LabError


def difference(expected: Any, actual: Any, where: str = "") -> str | None:
    """The first place where `actual` does not hold what `expected` asks for; None where it does.

    Mappings may hold more than is asked for; lists must hold a match for every element; anything else must be equal.
    """
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping):
            return f"{where or 'it'}: expected a mapping, found {actual!r}"
        for key, value in expected.items():
            if key not in actual:
                return f"{where}.{key}: missing; there are {sorted(map(str, actual))}"
            if found := difference(value, actual[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(expected, list):
        if not isinstance(actual, list):
            return f"{where or 'it'}: expected a list, found {actual!r}"
        for index, value in enumerate(expected):
            if all(difference(value, candidate) for candidate in actual):
                return f"{where}[{index}]: nothing matches {value!r}"
        return None
    return None if expected == actual else f"{where or 'it'}: expected {expected!r}, found {actual!r}"


def until(question: Callable[[], str | None], deadline: float = 30.0, pause: float = 0.05) -> None:
    """Ask until the answer is None (nothing is wrong any more); fails with the last answer after `deadline` seconds."""
    limit = time.monotonic() + deadline
    while True:
        try:
            answer = question()
        except LabError as error:
            answer = str(error)
        if answer is None:
            return
        assert time.monotonic() < limit, f"after {deadline:.0f} s still: {answer}"
        time.sleep(pause)


def until_equal(read: Callable[[], Any], wanted: Any, deadline: float = 30.0) -> None:
    """Read until the value is the wanted one."""

    def question() -> str | None:
        value = read()
        return None if value == wanted else f"wanted {wanted!r}, found {value!r}"

    until(question, deadline)
