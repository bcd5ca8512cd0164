"""Figures of the documentation, drawn from a run's tables, as data: URIs.

A figure is drawn twice, for light and for dark pages, with a transparent ground. Same inputs, same
bytes: no dates, no random ids.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pipeline.vision.thumbnails import data_uri

MAX_POINTS = 800  # of a line; more are thinned out
SIZE = (5.4, 3.1)  # inches of 72 units: text stays readable on a narrow page
UNEVEN = 30  # largest over smallest cluster; above, sizes are drawn on a logarithmic scale


@dataclass(frozen=True)
class Ink:
    """Colours of one theme of the page."""

    text: str
    grid: str
    lines: tuple[str, str, str]
    chosen: str
    flat: str


LIGHT = Ink("#3f4653", "#d9dde3", ("#2458c5", "#0f8a6d", "#8a4fbe"), "#c2410c", "#0f8a6d")
DARK = Ink("#c3c9d4", "#3a414d", ("#86aefc", "#4fd1ad", "#c79bf2"), "#fb923c", "#4fd1ad")

Drawing = Callable[..., None]


class Themed(NamedTuple):
    """One figure as two data: URIs."""

    light: str
    dark: str


def themed(draw: Drawing, *content: Any) -> Themed:
    """`draw(axes, ink, *content)` on a light and on a dark ground."""
    return Themed(*(_svg(draw, ink, *content) for ink in (LIGHT, DARK)))


def _svg(draw: Drawing, ink: Ink, *content: Any) -> str:
    settings: Any = {"svg.hashsalt": "ratecluster", "svg.fonttype": "path", "font.size": 9.5}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        _style(axes, ink)
        draw(axes, ink, *content)
        out = io.BytesIO()
        canvas = FigureCanvasSVG(figure)
        canvas.print_svg(out, metadata={"Date": None})
    return data_uri("image/svg+xml", out.getvalue())


def _style(axes: Axes, ink: Ink) -> None:
    axes.figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=ink.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink.text, length=3, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink.grid)
    for name in (axes.xaxis, axes.yaxis):
        name.label.set_color(ink.text)
        name.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def legend(axes: Axes, ink: Ink) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=4,
        columnspacing=1.2,
        frameon=False,
        fontsize=9,
        handlelength=1.3,
        labelcolor=ink.text,
    )


def coding_length(axes: Axes, ink: Ink, curve: pa.Table, chosen: dict[str, Any]) -> None:
    """Bits per sample for every k (CURVE), the chosen k, the flat region."""
    k = curve["k"].to_numpy()
    per_sample = [curve[name].to_numpy() / chosen["samples"] for name in ("bits", "low", "high")]
    bits, low, high = per_sample
    axes.axvspan(
        *(chosen["flat_from"] / 1.03, chosen["flat_to"] * 1.03),
        color=ink.flat,
        alpha=0.16,
        linewidth=0,
        label=f"within 0.5 % of the fewest bits: {chosen['flat_from']:,} – {chosen['flat_to']:,}",
    )
    axes.fill_between(k, low, high, color=ink.lines[0], alpha=0.25, linewidth=0)
    axes.plot(k, bits, color=ink.lines[0], linewidth=1.6, marker="o" if len(k) < 40 else "", ms=3)
    axes.axvline(chosen["k"], color=ink.chosen, linewidth=1.2, linestyle=(0, (4, 2)))
    at = int(np.searchsorted(k, chosen["k"]))
    label = f"chosen: {chosen['k']:,}"
    axes.plot(k[at], bits[at], "o", color=ink.chosen, ms=6, label=label)
    axes.set_xscale("log")
    _round_ticks(axes, int(k.max()))
    saving = bits[0] - bits.min()
    if saving > 0:  # beyond what one cluster costs the curve is of no interest
        top = min(max(bits.max(), high.max()), bits[0] + 0.1 * saving)
        axes.set_ylim(min(bits.min(), low.min()) - 0.06 * saving, top + 0.02 * saving)
    axes.set_xlabel("clusters, k")
    axes.set_ylabel("bits per sample")
    legend(axes, ink)


def _round_ticks(axes: Axes, last: int) -> None:
    steps = (1, 2, 5) if last <= 300 else (1,)
    ticks = [s * 10**power for power in range(len(str(last))) for s in steps]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0.9, max(last, 2) * 1.12)


def looks(axes: Axes, ink: Ink, made: list[dict[str, Any]]) -> None:
    """Neighbour information of every look at the network; the best is the one that was kept."""
    steps, information = zip(*((look["step"], look["information"]) for look in made), strict=True)
    axes.plot(steps, information, color=ink.lines[2], lw=1.3, marker="o", ms=4)
    best = information.index(max(information))
    axes.axvline(steps[best], color=ink.chosen, lw=1.3, label=f"kept: step {steps[best]:,}")
    axes.set_xlabel("step")
    axes.set_ylabel("neighbour information, nats")
    axes.margins(x=0.03)
    legend(axes, ink)


def sizes(axes: Axes, ink: Ink, counts: list[int]) -> None:
    """Samples in each cluster, largest first."""
    ordered = sorted(counts, reverse=True)
    edges = np.arange(len(ordered) + 1) + 0.5
    uneven = ordered[0] > UNEVEN * max(1, ordered[-1])
    gap = 0.12 if len(ordered) <= 60 else 0.0
    if gap:
        axes.bar(edges[:-1] + 0.5, ordered, width=1 - gap, color=ink.lines[0], log=uneven)
    else:
        axes.stairs(ordered, edges, fill=True, color=ink.lines[0], baseline=0.5 if uneven else 0)
    if uneven:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0.4, len(ordered) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("clusters, largest first")
    axes.set_ylabel("samples")
