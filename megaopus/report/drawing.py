"""Draws what the report's pictures have in common: colours, axes, legends, smoothed series."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from itertools import accumulate, cycle
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megaopus.record.formatting import format_count
from megaopus.report.arms import Arm
from megaopus.report.compare import Run

# Okabe and Ito's colours, told apart with every common colour blindness; grey is kept for the baseline.
BASELINE_COLOUR = "#6b6b6b"
ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DOMAIN_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
OTHER_COLOUR = "#c4c4c4"
WIDTH = 6.4  # inches; at 100 dots per inch and half the pixels shown, the text reads like that of the page
DPI = 200
STYLE_PT = {"title": 11.0, "label": 10.0, "tick": 9.0}


def to_png(figure: Figure) -> str:
    """The figure as a ``data:`` address."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Ink(NamedTuple):
    """Says how a run is drawn; the runs of an arm alike."""

    colour: str
    label: str
    width: float
    """Points."""
    baseline: bool = False
    """Drawn in dashes and in front, so that it is seen where another run lies on it, and the other as well."""


def inks(arms: Sequence[Arm], baseline: str | None) -> dict[str, Ink]:
    """By run: a colour for each arm, grey for that of the run ``baseline``."""
    found: dict[str, Ink] = {}
    others = cycle(ARM_COLOURS)
    for arm in arms:
        own = baseline in arm.runs.values()
        colour, width = BASELINE_COLOUR if own else next(others), 2.0 if len(arm.runs) == 1 else 1.2
        found |= {run: Ink(colour, arm.name, width, own) for run in arm.runs.values()}
    return found


def legend_once(axis: Axes, **where: Any) -> None:
    """Show each label of a panel once, in the panel."""
    handles = _handles([axis])
    axis.legend(handles.values(), handles.keys(), frameon=False, fontsize=STYLE_PT["tick"], **where)


def legend_above(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """Show each label of all panels once, above them."""
    handles = _handles(axes)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(len(handles), columns),
        frameon=False,
        fontsize=STYLE_PT["tick"],
    )


def _handles(axes: Sequence[Axes]) -> dict[str, Any]:
    """Return what a legend shows, once for each label: the runs of an arm share theirs."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return handles


def panels(rows: int = 1, columns: int = 1, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """Make a figure of so many panels, ``height`` inches high."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#999999")
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=STYLE_PT["tick"], color="#999999")
    return figure, axes


def plot_line(axis: Axes, x: Sequence[float], y: Sequence[float], ink: Ink, marker: str = "") -> None:
    """Draw a run's line."""
    dashes: dict[str, Any] = {"linestyle": (0, (4, 1.5)), "zorder": 3} if ink.baseline else {}
    axis.plot(x, y, color=ink.colour, linewidth=ink.width, marker=marker, label=ink.label, **dashes)


def name_axes(axis: Axes, x: str, y: str, title: str = "") -> None:
    """Write beside a panel what it shows."""
    axis.set_xlabel(x, fontsize=STYLE_PT["label"])
    axis.set_ylabel(y, fontsize=STYLE_PT["label"])
    if title:
        axis.set_title(title, fontsize=STYLE_PT["title"], loc="left")


def token_axis(axis: Axes, ticks: int = 6) -> None:
    """Write tokens below a panel as 1M, 1.5M."""
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _trim(format_count(value))))
    axis.xaxis.set_major_locator(MaxNLocator(ticks))


def _trim(text: str) -> str:
    """ "1.50M" -> "1.5M", "1.00M" -> "1M"."""
    number, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit


def percent_axis(axis: Axes, *, below: bool = False) -> None:
    """Write shares beside a panel, or ``below`` it, as percentages."""
    (axis.xaxis if below else axis.yaxis).set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean over about ``window`` values, over fewer at the ends."""
    half = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, at - half), min(len(values), at + half + 1)) for at in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def smoothing_window(number: int) -> int:
    """Steps over which per-step series are smoothed: a thirtieth of the run, an odd number."""
    return max(1, number // 30) // 2 * 2 + 1


def running_median(values: Sequence[float]) -> list[float]:
    """Centred, over the smoothing window (five values at least), so that single outliers do not show."""
    half = max(2, smoothing_window(len(values)) // 2)
    return [statistics.median(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def running_sum(values: Sequence[float]) -> list[float]:
    """Centred, over a tenth of the run."""
    half = max(2, len(values) // 20)
    total = list(accumulate(values, initial=0.0))
    return [total[min(len(values), at + half + 1)] - total[max(0, at - half)] for at in range(len(values))]


def step_tokens(run: Run) -> dict[int, float]:
    """Give the update tokens after each step."""
    return {record.step: float(record.tokens) for record in run.steps}


def share_of_each_step(figure: Figure, top: float, label: str) -> Figure:
    """The figure, its one panel dressed as shares over update tokens."""
    (axis,) = figure.axes
    axis.set_ylim(0, top)
    percent_axis(axis)
    token_axis(axis)
    name_axes(axis, "update tokens", label)
    legend_once(axis)
    return figure
