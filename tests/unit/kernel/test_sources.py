"""The C sources as one text, and what changes their fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpd.kernel import sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.h").write_text('#include <uapi/linux/bpf.h>\n#include "b.h"\nint a;\n')
    (tmp_path / "b.h").write_text("int b;\n")
    (tmp_path / "qpd.c").write_text('#include "a.h"\n#include "b.h"\nint c;\n')
    return tmp_path


def test_each_file_comes_once_before_its_user_and_system_headers_stay(folder: Path) -> None:
    code = [line for line in sources.flattened(folder).splitlines() if not line.startswith("#line")]
    assert code == ["#include <uapi/linux/bpf.h>", "int b;", "int a;", "int c;"]


def test_each_line_keeps_its_file_and_number(folder: Path) -> None:
    file, number, at = "", 0, {}
    for line in sources.flattened(folder).splitlines():
        if line.startswith("#line"):
            _, digits, name = line.split()
            file, number = name.strip('"'), int(digits)
        else:
            at[line] = (file, number)
            number += 1
    assert at["int a;"] == ("a.h", 3)
    assert at["int b;"] == ("b.h", 1)
    assert at["int c;"] == ("qpd.c", 3)


def test_the_fingerprint_changes_with_files_and_flags(folder: Path) -> None:
    first = sources.fingerprint(folder, ("-O2",))
    assert sources.fingerprint(folder, ("-O2",)) == first
    assert sources.fingerprint(folder, ("-O2", "-DX")) != first
    (folder / "b.h").write_text("long b;\n")
    assert sources.fingerprint(folder, ("-O2",)) != first


def test_the_layout_version_is_a_number_of_the_header() -> None:
    assert sources.layout_version() >= 1


def test_missing_sources_say_where_they_should_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "_CANDIDATES", (tmp_path / "one", tmp_path / "two"))
    with pytest.raises(sources.SourcesMissingError, match=r"one or .*two"):
        sources.directory()
