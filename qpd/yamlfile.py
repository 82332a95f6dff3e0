"""A YAML file as configuration: data, the line of every key, and one clear line for whatever is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    ``where``: file and line, or variable. ``key``: '' for the file itself.
    ``message``: what, and how to mend it.
    """

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class SettingsError(Exception):
    """The configuration cannot be used. ``problems`` has every error; ``str()`` gives one line for each."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML file: its data, the line of every key, and what was wrong with its form."""

    name: str
    data: Mapping[str, Any]
    lines: Mapping[str, int]
    problems: tuple[Problem, ...]

    @classmethod
    def read(cls, path: Path) -> Document:
        """Parse ``path``; one that cannot be read or parsed raises at once, as no more can be said of it."""
        name = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SettingsError((Problem(name, "", "no such file; check its name"),)) from None
        except IsADirectoryError:
            raise SettingsError((Problem(name, "", "is a directory; give the YAML file in it"),)) from None
        except UnicodeDecodeError as error:
            message = f"byte {error.start} is no UTF-8; save the file as UTF-8 text"
            raise SettingsError((Problem(name, "", message),)) from None
        except OSError as error:
            message = f"cannot be read: {error.strerror}; check owner and mode"
            raise SettingsError((Problem(name, "", message),)) from None
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if node is None:
                return cls(name, {}, {}, ())
            data = loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = name if mark is None else f"{name}:{mark.line + 1}"
            said = error.problem or error.context or "cannot be parsed"
            column = "" if mark is None else f" in column {mark.column + 1}"
            raise SettingsError((Problem(where, "", f"is no YAML: {said}{column}; mend the line"),)) from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
            said = " ".join(str(error).split())
            raise SettingsError((Problem(name, "", f"is no YAML: {said}; mend the file"),)) from None
        if not isinstance(node, yaml.MappingNode):
            raise SettingsError(
                (Problem(f"{name}:1", "", "must map keys to values, such as `placement: hash`"),)
            )
        lines: dict[str, int] = {}
        problems = tuple(_walk(name, node, "", lines))
        return cls(name, {str(key): value for key, value in data.items()}, lines, problems)

    def where(self, key: str) -> str:
        """File and line of a key, or of the nearest key above it."""
        probe = key
        while probe not in self.lines and "." in probe:
            probe = probe.rpartition(".")[0]
        line = self.lines.get(probe)
        return self.name if line is None else f"{self.name}:{line}"


def _walk(name: str, node: yaml.MappingNode, prefix: str, lines: dict[str, int]) -> Iterator[Problem]:
    """Note the line of every key; report keys given twice (YAML itself would keep the last in silence)."""
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            yield Problem(f"{name}:{line}", key, f"is given twice, first on line {lines[key]}; keep one")
        lines.setdefault(key, line)
        yield from _walk_value(name, value_node, f"{key}.", lines)


def _walk_value(name: str, node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator[Problem]:
    """A list's elements are keys by their index."""
    if isinstance(node, yaml.MappingNode):
        yield from _walk(name, node, prefix, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, element in enumerate(node.value):
            lines.setdefault(f"{prefix}{index}", element.start_mark.line + 1)
            yield from _walk_value(name, element, f"{prefix}{index}.", lines)
