"""The benchmark's plots, as PNG files in memory. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = "osD^vPX*<>"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))

# Intervals are drawn for so many lines at most: more bands over each other show nothing (the tables have them all).
_BANDS = 3

# (x, y, low, high) of one line; the bounds may be None.
Line = tuple[Sequence[float], Sequence[float], Sequence[float] | None, Sequence[float] | None]


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the n-th method: two methods share at most one of them."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def line_plot(
    panels: Mapping[str, Mapping[str, Line]],
    methods: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    ticks: Callable[[float], str] | None = None,
    levels: Mapping[str, float] | None = None,
) -> bytes:
    """Lines over a logarithmic axis, a panel for each probe set, all with the same y axis.

    Args:
        panels: by probe set, then by method.
        methods: fixes each method's style across plots.
        x_label: with its unit.
        y_label: with its unit.
        ticks: writes the x ticks, which are the points; none: matplotlib's own choice.
        levels: a horizontal line for each panel, the chance.
    """

    def draw(axes: Axes, title: str, lines: Mapping[str, Line]) -> None:
        axes.set_xscale("log")
        points: set[float] = set()
        for name, (x, y, low, high) in lines.items():
            number = methods.index(name)
            axes.plot(x, y, label=name, markersize=5, linewidth=1.6, **style(number))
            if len(lines) <= _BANDS and low is not None and high is not None:
                axes.fill_between(x, low, high, color=style(number)["color"], alpha=0.10, linewidth=0)
            points |= set(x)
        if levels is not None and title in levels:
            axes.axhline(levels[title], color="#777777", linewidth=1, linestyle=":")
            axes.annotate("chance", (min(points, default=1), levels[title]), fontsize=8, color="#555555",
                          xytext=(0, 3), textcoords="offset points")  # fmt: skip
        if ticks is not None and points:
            axes.set_xticks(sorted(points))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: ticks(value)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(axis="x", labelsize=8)

    return _figure(panels, draw, methods, x_label, y_label)


def hub_plot(
    panels: Mapping[str, Mapping[str, npt.NDArray[np.floating[Any]]]], methods: Sequence[str]
) -> bytes:
    """The hub curves (N,) of every method, a panel for each probe set."""

    def draw(axes: Axes, title: str, curves: Mapping[str, npt.NDArray[np.floating[Any]]]) -> None:
        axes.set_xscale("log")
        for name, curve in curves.items():
            places = np.arange(1, len(curve) + 1)
            axes.plot(
                places, 100 * curve, label=name, linewidth=1.6, **{**style(methods.index(name)), "marker": ""}
            )
        axes.axhline(50, color="#777777", linewidth=1, linestyle=":")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))

    return _figure(panels, draw, methods, "most returned logits", "share of the first places they take (%)")


# Of every bin the mean confidence, the share of right hits, and the number of hits.
Bins = tuple[list[float], list[float], list[int]]


def reliability_plot(panels: Mapping[str, Mapping[str, Bins]]) -> bytes:
    """Confidence against the share of right hits, and below it how many hits there were.

    Args:
        panels: by part of the concepts, then by name of the line.
    """
    figure = Figure(figsize=(4.6 * len(panels) + 2.6, 5.4), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1.2])
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    shown: dict[str, Any] = {}
    for (above, below), (title, lines) in zip(grid.T, panels.items(), strict=True):
        above.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle=":")
        above.annotate("calibrated", (0.62, 0.60), fontsize=8, color="#555555")
        for name, (confidences, right, hits) in lines.items():
            look = style(names.index(name))
            (shown[name],) = above.plot(confidences, right, markersize=5, linewidth=1.6, **look)
            below.plot(confidences, hits, markersize=4, linewidth=1.2, **look)
        above.set_title(title, fontsize=10)
        above.set_ylim(0, 1)
        below.set_yscale("log")
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        below.yaxis.set_minor_formatter(NullFormatter())
        below.set_xlabel("confidence")
        below.set_xlim(0, 1)
        for axes in (above, below):
            _plain(axes)
    grid[0, 0].set_ylabel("share of right hits")
    grid[1, 0].set_ylabel("hits")
    figure.legend(
        list(shown.values()), [name.replace("$", r"\$") for name in shown],
        loc="outside right upper", frameon=False, fontsize=9,
    )  # fmt: skip
    return _png(figure)


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def _plain(axes: Axes) -> None:
    axes.grid(True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(
    panels: Mapping[str, Any],
    draw: Callable[[Axes, str, Any], None],
    methods: Sequence[str],
    x_label: str,
    y_label: str,
) -> bytes:
    # The legend stands beside the panels: in them it would cover lines.
    figure = Figure(figsize=(4.6 * len(panels) + 2.6, 4.2), dpi=120, layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    shown: dict[str, Any] = {}
    for axes, (title, content) in zip(row, panels.items(), strict=True):
        draw(axes, title, content)
        # Names come from outside: a dollar sign must not be read as the beginning of a formula.
        axes.set_title(title.replace("$", r"\$"), fontsize=10)
        axes.set_xlabel(x_label)
        _plain(axes)
        handles, names = axes.get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    row[0].set_ylabel(y_label)
    row[0].set_ylim(bottom=0)
    names = [name for name in methods if name in shown]
    figure.legend(
        [shown[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=9
    )
    return _png(figure)
