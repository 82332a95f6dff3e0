"""Tables for terminals and pipes: columns are never cut.

In a terminal that is too narrow, the columns that matter least are left out (and named below the table);
in a pipe all are there, without colours and without blanks at the end.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

_GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    """``rank`` 0 is never left out; the highest goes first. ``wide``: shown with ``-o wide`` only.

    ``cell``: the text of a row. ``style``: rich's style for it.
    """

    name: str
    cell: Callable[[Any], str]
    rank: int = 0
    right: bool = False
    wide: bool = False
    style: Callable[[Any], str] | None = None


def console() -> Console:
    """Standard output; in a pipe without colours and without a width."""
    plain = Console(highlight=False, soft_wrap=True)
    if not plain.is_terminal:
        plain.width = 100_000
    return plain


def lines(
    columns: Sequence[Column],
    rows: Sequence[Any],
    width: int | None,
    wide: bool = False,
    remedy: str = "-o wide shows all",
) -> list[Text]:
    """The table's lines, header first. ``width``: of the terminal; None: no limit, as with ``wide``.

    ``remedy``: what helps where columns had to be left out.
    """
    shown = [column for column in columns if wide or not column.wide]
    texts = {column.name: [column.cell(row) for row in rows] for column in shown}
    widths = {name: max(len(text) for text in (name, *cells)) for name, cells in texts.items()}
    left_out: list[str] = []
    while (
        not wide and width is not None and sum(widths[column.name] + _GAP for column in shown) - _GAP > width
    ):
        least = max(shown, key=lambda column: column.rank)
        if least.rank == 0:
            break
        shown.remove(least)
        left_out.append(least.name)
    result = [_line(shown, widths, {column.name: (column.name, "bold") for column in shown})]
    for number, row in enumerate(rows):
        cells = {
            column.name: (texts[column.name][number], column.style(row) if column.style else "")
            for column in shown
        }
        result.append(_line(shown, widths, cells))
    if left_out:
        note = f"(no room for {', '.join(left_out)}: {remedy})"
        longest = max(len(name) for name in left_out) + len("(no room for ,")
        result += [Text(part, style="dim") for part in textwrap.wrap(note, max(width or 0, longest))]
    return result


def _line(columns: Sequence[Column], widths: dict[str, int], cells: dict[str, tuple[str, str]]) -> Text:
    line = Text()
    for position, column in enumerate(columns):
        text, style = cells[column.name]
        last = position == len(columns) - 1
        pad = " " * (widths[column.name] - len(text))
        if column.right:
            line.append(pad)
        line.append(text, style=style or None)
        if not last:
            line.append(("" if column.right else pad) + " " * _GAP)
    line.rstrip()
    return line


def show(out: Console, columns: Sequence[Column], rows: Sequence[Any], wide: bool = False) -> None:
    """Print the table."""
    for line in lines(columns, rows, out.width if out.is_terminal else None, wide):
        out.print(line, no_wrap=True, overflow="ignore", crop=False)


def field(out: Console, name: str, value: str, style: str = "") -> None:
    """A line `name: value`, with the values below each other."""
    wrapped(out, Text(f"{name + ':':<14}" if len(name) < 14 else f"{name}: ", style="dim"), value, style)


def wrapped(out: Console, label: Text, value: str, style: str = "") -> None:
    """A label, and beside it a text in as many lines as it needs."""
    indent = " " * len(label)
    width = max(out.width, len(label) + 20) - len(label)
    texts = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False) or [""]
    for number, text in enumerate(texts):
        line = Text.assemble(indent if number else label, (text, style))
        line.rstrip()
        out.print(line, no_wrap=True, overflow="ignore", crop=False)
