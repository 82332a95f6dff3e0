"""docs/cli.md shows what the commands really say."""

from __future__ import annotations

import json
import re
import typing
from typing import Any

import pytest
from pydantic import TypeAdapter

from qpd.api import schemas
from tests.unit.cli.conftest import ROOT
from tests.unit.cli.test_qpctl import COMMANDS

TEXT = (ROOT / "docs/cli.md").read_text()
SCHEMAS = {
    "status": schemas.StatusInfo,
    "paths": list[schemas.PathRow],
    "groups": list[schemas.GroupRow],
    "qps": list[schemas.QpRow],
    "explain": schemas.Explanation,
    "drain": schemas.PathRow,
    "events": schemas.EventRecord,
}


def section(command: str) -> str:
    match = re.search(rf"^## qpctl {command}\b.*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match is not None, f"docs/cli.md has no section on {command}"
    return match[0]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "undrain"])
def test_every_command_has_a_section(command: str) -> None:
    assert section(command)


@pytest.mark.parametrize(("command", "schema"), SCHEMAS.items())
def test_the_json_examples_are_as_the_schemas_say(command: str, schema: Any) -> None:
    blocks = re.findall(r"```json\n(.*?)```", section(command), re.DOTALL)
    assert blocks, command
    for block in blocks:
        TypeAdapter(schema).validate_python(json.loads(block), strict=True)


@pytest.mark.parametrize("schema", [schemas.QpRow, schemas.PathRow])
def test_every_key_is_explained(schema: Any) -> None:
    for key in typing.get_type_hints(schema):
        assert re.search(rf"^\| (?:`\w+`, )*`{key}`", TEXT, re.MULTILINE), (
            f"docs/cli.md does not explain {key}"
        )


def test_every_kind_of_event_is_listed() -> None:
    from qpd.model import Tell

    assert Tell.__doc__ is not None
    kinds = re.findall(r"[a-z]+(?:-[a-z]+)+", Tell.__doc__.partition("Kinds:")[2])
    assert len(kinds) > 10
    assert [kind for kind in kinds if f"`{kind}`" not in section("events")] == []
