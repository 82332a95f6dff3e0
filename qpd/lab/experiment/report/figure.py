"""What all plots of a report share: size, colours, and how they get into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette: told apart by readers with any colour vision."""

FAULT = "#c0392b"
WIDTH = 10.0
"""Inches; all plots are equally wide, so that their text is equally large."""

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "qpd",
}


@dataclass(frozen=True)
class Plot:
    """A plot for the page."""

    title: str
    caption: str
    """What is seen, how it was measured."""
    svg: bytes

    @property
    def uri(self) -> str:
        """The picture as a data: URI; each SVG is a document of its own there, and its ids cannot meet others'."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


def panels(
    rows: int, columns: int, height: float, *, sharex: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a grid of panels, `height` inches each."""
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(WIDTH, height * rows + 0.5),
            squeeze=False,
            sharex=sharex,
            layout="constrained",
        )
    return figure, [list(row) for row in axes]


def finish(figure: Figure, title: str, caption: str) -> Plot:
    """The plot, and the figure given back."""
    with mpl.rc_context(_STYLE):
        out = io.BytesIO()
        # A date inside would make two equal runs' reports differ.
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return Plot(title, caption, out.getvalue())


def colour(names: Sequence[str], name: str) -> str:
    """The colour of a name among names."""
    return COLOURS[list(names).index(name) % len(COLOURS)]
