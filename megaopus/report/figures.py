"""Pictures of the report: each function draws one matplotlib figure; nothing here needs a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megaopus.evaluation.items import Evaluation
from megaopus.record.formatting import format_bytes
from megaopus.record.metrics import metrics_of, values_of
from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord
from megaopus.report.choice_summary import ChoiceSummary
from megaopus.report.compare import Comparison, Curve, Run
from megaopus.report.drawing import (
    ARM_COLOURS,
    BASELINE_COLOUR,
    DOMAIN_COLOURS,
    OTHER_COLOUR,
    STYLE_PT,
    Ink,
    legend_above,
    legend_once,
    name_axes,
    panels,
    percent_axis,
    plot_line,
    running_median,
    running_sum,
    share_of_each_step,
    smooth,
    smoothing_window,
    step_tokens,
    token_axis,
)

LOSS = "loss (nats per token)"
UNIFORM_DRAW = "predicted for a uniform draw"
SWAPPED = "swapped_"
"""Begins the name of a selection's metric that compares picks that came in with those that had to go."""
MIN_LOSS_SPAN = 0.1
MOST_MARKS = 60
"""Points of a line up to which each is marked."""


def time_unit(longest_s: float) -> tuple[float, str]:
    """(seconds per unit, its name) that suits a span of ``longest_s`` seconds."""
    return next(
        unit
        for unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if longest_s >= 3 * unit[0] or unit[0] == 1.0
    )


def loss_figure(
    curves: Mapping[str, Curve],
    ink: Mapping[str, Ink],
    comparisons: Mapping[str, Comparison],
    over: str,
    baseline: str | None,
) -> Figure:
    """Validation loss over "tokens" (each run's own count) or "time" (since the start of the stretch)."""
    figure, (axis,) = panels()
    longest = max(curve.time_s[-1] for curve in curves.values())
    scale, unit = time_unit(longest) if over == "time" else (1.0, "")

    def place(curve: Curve, tokens: float, seconds: float) -> float:
        return seconds / scale if over == "time" else curve.start_tokens + tokens

    for name, curve in curves.items():
        x = [place(curve, *point) for point in zip(curve.tokens, curve.time_s, strict=True)]
        if name in comparisons:
            axis.plot(x, curve.losses, color=ink[name].colour, alpha=0.4, linewidth=0.8)  # the mark lies on it
        plot_line(axis, x, curve.raw, ink[name], marker="." if len(x) < MOST_MARKS else "")
    if baseline is not None and baseline in curves:
        target = curves[baseline].losses[-1]
        if math.isfinite(target):
            axis.axhline(target, color=BASELINE_COLOUR, linestyle=":", linewidth=1, label=f"{baseline}'s final loss")
        for name, comparison in comparisons.items():
            if name in curves and comparison.reached_tokens is not None and comparison.reached_time_s is not None:
                curve = curves[name]
                x_reached = place(
                    curve,
                    comparison.reached_tokens - curve.start_tokens,
                    comparison.reached_time_s - curve.start_time_s,
                )
                ratio = comparison.time_ratio if over == "time" else comparison.tokens_ratio
                axis.plot(
                    [x_reached], [target], "o", color=ink[name].colour, markersize=8, markeredgecolor="white", zorder=5
                )
                axis.annotate(
                    f"{ratio:.0%}",
                    (x_reached, target),
                    (-4, -7),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    fontsize=STYLE_PT["label"],
                    color=ink[name].colour,
                    fontweight="bold",
                )
    if over == "time":
        name_axes(axis, f"data, selection and training time ({unit})", f"validation {LOSS}")
    else:
        token_axis(axis)
        name_axes(axis, "update tokens", f"validation {LOSS}")
    legend_once(axis)
    return figure


def domain_order(rows: Mapping[str, Sequence[SelectionRecord]], most: int = len(DOMAIN_COLOURS)) -> list[str]:
    """Domains by falling share of the pools, the ``most`` largest; what is left is drawn as "other"."""
    total: dict[str, float] = {}
    for row in (row for part in rows.values() for row in part):
        for domain, share in row.pool_share.items():
            total[domain] = total.get(domain, 0.0) + share
    return sorted(total, key=lambda domain: (-total[domain], domain))[:most]


def _bands(
    shares: Sequence[Mapping[str, float]], domains: Sequence[str], other: bool, window: int
) -> list[list[float]]:
    """One smoothed series of shares a domain; with ``other``, one more for the rest."""
    series = [[share.get(domain, 0.0) for share in shares] for domain in domains]
    if other:
        series.append([sum(share.values()) - sum(share.get(name, 0.0) for name in domains) for share in shares])
    return [smooth(values, window) for values in series]


def share_figure(runs: Mapping[str, Run], rows: Mapping[str, Sequence[SelectionRecord]]) -> Figure:
    """Domain shares of the picks, stacked, one panel a run; the pool's shares as dashed borders."""
    figure, axes = panels(rows=len(rows), height=0.9 + 2.5 * len(rows))
    domains = domain_order(rows)
    names = {domain for part in rows.values() for row in part for domain in row.pool_share}
    other = len(names) > len(domains)
    colours = [*DOMAIN_COLOURS[: len(domains)], *([OTHER_COLOUR] if other else [])]
    labels = [*domains, *([f"other ({len(names) - len(domains)})"] if other else [])]
    for axis, (name, part) in zip(axes, rows.items(), strict=True):
        tokens = step_tokens(runs[name])
        x = [tokens.get(row.step, math.nan) for row in part]
        window = smoothing_window(len(part))
        bands = _bands([row.share for row in part], domains, other, window)
        areas = axis.stackplot(x, bands, colors=colours, labels=labels, linewidth=0)
        level = [0.0] * len(part)
        # Every buffer is drawn from one pool, so its share may be smoothed more than what is made of it.
        for band in _bands([row.pool_share for row in part], domains, other, 4 * window)[:-1]:
            level = [below + value for below, value in zip(level, band, strict=True)]
            axis.plot(x, level, color="black", linestyle="--", linewidth=1.1)
        axis.set_ylim(0, 1)
        if x[0] < x[-1]:
            axis.set_xlim(x[0], x[-1])
        percent_axis(axis)
        token_axis(axis)
        name_axes(axis, "update tokens", "share of picks", name)
    figure.legend(
        reversed(areas),
        list(reversed(labels)),
        loc="outside right center",
        frameon=False,
        fontsize=STYLE_PT["tick"],
        title="domain",
        title_fontsize=STYLE_PT["tick"],
    )
    return figure


def ess_figure(
    runs: Mapping[str, Run], rows: Mapping[str, Sequence[SelectionRecord]], ink: Mapping[str, Ink]
) -> Figure:
    """Effective sample size over candidates: 1 where all are as likely."""
    figure, (axis,) = panels(height=3.2)
    for name, part in rows.items():
        tokens = step_tokens(runs[name])
        x = [tokens.get(row.step, math.nan) for row in part]
        y = [row.ess / max(row.candidates, 1) for row in part]
        axis.plot(x, y, color=ink[name].colour, alpha=0.25, linewidth=0.8)
        plot_line(axis, x, smooth(y, smoothing_window(len(y))), ink[name])
    axis.axhline(1, color="black", linestyle=":", linewidth=1, label="uniform sampling")
    axis.set_ylim(0, 1.08)
    percent_axis(axis)
    token_axis(axis)
    name_axes(axis, "update tokens", "effective sample size\n(share of candidates)")
    legend_once(axis, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return figure


def train_figure(runs: Mapping[str, Run], ink: Mapping[str, Ink], start_step: int) -> Figure:
    """Loss of the batches trained on, running median, one line a run."""
    figure, (axis,) = panels(height=3.2)
    for name, run in runs.items():
        steps = [record for record in run.steps if record.step >= start_step and math.isfinite(record.loss)]
        if steps:
            y = running_median([record.loss for record in steps])
            plot_line(axis, [record.tokens for record in steps], y, ink[name])
    token_axis(axis)
    name_axes(axis, "update tokens", f"training {LOSS}")
    legend_once(axis)
    return figure


def metrics_figure(runs: Mapping[str, Run], ink: Mapping[str, Ink], start_step: int) -> Figure | None:
    """Running medians of the per-step metrics that are marked to be plotted, a panel each; None where no run has any.

    Steps without a finite value are passed over, as those of a version that did not measure it.
    """
    steps = {name: [record for record in run.steps if record.step >= start_step] for name, run in runs.items()}
    plotted = [
        each
        for each in metrics_of(StepRecord)
        if each.plot and any(map(math.isfinite, (v for part in steps.values() for v in values_of(part, each.name))))
    ]
    if not plotted:
        return None
    columns = 2 if len(plotted) > 1 else 1
    rows = -(-len(plotted) // columns)
    figure, axes = panels(rows, columns, height=0.7 + 2.3 * rows)
    for at, (axis, each) in enumerate(zip(axes, plotted, strict=False)):
        for name, part in steps.items():
            values = [(record.tokens, getattr(record, each.name)) for record in part]
            values = [(tokens, value) for tokens, value in values if value is not None and math.isfinite(value)]
            if values:
                x, y = zip(*values, strict=True)
                plot_line(axis, x, running_median(y), ink[name])
        if each.unit == "bytes":
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(max(0.0, value))))
        token_axis(axis, ticks=4)
        name_axes(axis, "update tokens" if at >= len(plotted) - columns else "", "", each.name)
    for axis in axes[len(plotted) :]:
        axis.set_visible(False)
    legend_above(figure, axes, 3)
    return figure


def utility_figure(runs: Mapping[str, Run], summaries: Mapping[str, ChoiceSummary]) -> Figure:
    """Spread of the utilities of each scored step, one panel a run: 90% and 50% bands, medians of all and of picks."""
    figure, axes = panels(rows=len(summaries), height=0.7 + 2.5 * len(summaries))
    for axis, (name, found) in zip(axes, summaries.items(), strict=True):
        tokens = step_tokens(runs[name])
        x = [tokens.get(each.step, math.nan) for each in found.spreads]
        levels = [
            running_median(list(level)) for level in zip(*(each.quantiles for each in found.spreads), strict=True)
        ]
        colour = ARM_COLOURS[0]
        axis.fill_between(x, levels[0], levels[4], color=colour, alpha=0.18, linewidth=0, label="5% to 95%")
        axis.fill_between(x, levels[1], levels[3], color=colour, alpha=0.35, linewidth=0, label="25% to 75%")
        axis.plot(x, levels[2], color=colour, linewidth=1.8, label="median")
        picked = [(at, each.picked) for at, each in zip(x, found.spreads, strict=True) if each.picked is not None]
        if picked:
            places, medians = zip(*picked, strict=True)
            axis.plot(places, running_median(medians), color=ARM_COLOURS[1], linewidth=1.8, label="median of the picks")
        axis.ticklabel_format(axis="y", scilimits=(-2, 3))
        axis.yaxis.get_offset_text().set_fontsize(STYLE_PT["tick"])
        token_axis(axis)
        name_axes(axis, "update tokens", "utility", name)
    legend_above(figure, axes, 4)
    return figure


def repeat_figure(runs: Mapping[str, Run], summaries: Mapping[str, ChoiceSummary], ink: Mapping[str, Ink]) -> Figure:
    """Share of each step's picks that the run had trained on before, moving mean, one line a run."""
    figure, (axis,) = panels(height=3.2)
    highest = 0.0
    for name, found in summaries.items():
        tokens = step_tokens(runs[name])
        share = smooth([share for _, share in found.repeat_share], smoothing_window(len(found.repeat_share)))
        highest = max(highest, *share)
        plot_line(axis, [tokens.get(step, math.nan) for step, _ in found.repeat_share], share, ink[name])
    return share_of_each_step(figure, min(1.05, 1.15 * highest), "picks trained on before")


def changed_figure(
    runs: Mapping[str, Run], rows: Mapping[str, Sequence[SelectionRecord]], ink: Mapping[str, Ink]
) -> Figure:
    """Share of each step's picks that utilities changed, moving mean, one line a run; ``rows``: those that say it."""
    figure, (axis,) = panels(height=3.2)
    highest = 0.0
    for name, part in rows.items():
        tokens, shares = step_tokens(runs[name]), [row.changed_by_utilities or 0.0 for row in part]
        x, y = [tokens.get(row.step, math.nan) for row in part], smooth(shares, smoothing_window(len(part)))
        highest = max(highest, *shares)
        axis.plot(x, shares, ".", color=ink[name].colour, alpha=0.25, markersize=4)
        plot_line(axis, x, y, ink[name])
    return share_of_each_step(figure, min(1.05, max(0.01, 1.15 * highest)), "picks changed by utilities")


def signal_figure(
    runs: Mapping[str, Run], rows: Mapping[str, Sequence[SelectionRecord]], metric: str, text: str
) -> Figure | None:
    """Draw a metric that has a number for each signal, one panel a run, one line (running median) a signal.

    ``text``: what the numbers are. None: no row has any.
    """
    rows = {name: kept for name, part in rows.items() if (kept := [row for row in part if getattr(row, metric)])}
    if not rows:
        return None
    figure, axes = panels(rows=len(rows), height=0.7 + 2.5 * len(rows))
    signals = sorted({signal for part in rows.values() for row in part for signal in getattr(row, metric)})
    colours = dict(zip(signals, cycle(ARM_COLOURS), strict=False))
    for axis, (name, part) in zip(axes, rows.items(), strict=True):
        tokens = step_tokens(runs[name])
        for signal in signals:
            said = {row.step: getattr(row, metric)[signal] for row in part if signal in getattr(row, metric)}
            x = [tokens.get(step, math.nan) for step in said]
            axis.plot(x, running_median([*said.values()]), color=colours[signal], linewidth=1.8, label=signal)
        axis.axhline(0, color="#999999", linewidth=0.8)
        token_axis(axis)
        name_axes(axis, "update tokens", text, name)
    legend_above(figure, axes, 4)
    return figure


def swapped_figure(
    runs: Mapping[str, Run], rows: Mapping[str, Sequence[SelectionRecord]], ink: Mapping[str, Ink]
) -> Figure | None:
    """By how much picks that utilities brought in exceed those that had to go, a panel a signal; None: no row says it.

    Dots: each step; lines: running medians.
    """
    signals = {
        each.name.removeprefix(SWAPPED): {
            name: {
                row.step: value
                for row in part
                if (value := getattr(row, each.name)) is not None and math.isfinite(value)
            }
            for name, part in rows.items()
        }
        for each in metrics_of(SelectionRecord)
        if each.name.startswith(SWAPPED)
    }
    shown = {signal: parts for signal, parts in signals.items() if any(parts.values())}
    if not shown:
        return None
    figure, axes = panels(rows=len(shown), height=0.7 + 2.3 * len(shown))
    for axis, (signal, parts) in zip(axes, shown.items(), strict=True):
        for name, said in parts.items():
            x, y = [step_tokens(runs[name]).get(step, math.nan) for step in said], [*said.values()]
            axis.plot(x, y, ".", color=ink[name].colour, alpha=0.35, markersize=5)
            plot_line(axis, x, running_median(y), ink[name])
        axis.axhline(0, color="#999999", linewidth=0.8)
        axis.ticklabel_format(axis="y", scilimits=(-2, 3))
        axis.yaxis.get_offset_text().set_fontsize(STYLE_PT["tick"])
        token_axis(axis)
        name_axes(axis, "update tokens", "came in less went out", signal)
    legend_above(figure, axes, 3)
    return figure


def swapped_domains_figure(rows: Mapping[str, Sequence[SelectionRecord]]) -> Figure | None:
    """Domains of the picks that utilities brought in and of those that had to go, a panel a run; None: no row says it.

    Shares of all of a run's; the domains that the pool has most of, the rest as one.
    """
    swapped = {name: [row for row in part if row.share_swapped_in] for name, part in rows.items()}
    swapped = {name: part for name, part in swapped.items() if part}
    if not swapped:
        return None

    def mean(part: Sequence[SelectionRecord], metric: str) -> dict[str, float]:
        counts = [(row.changed_by_utilities or 0.0) * row.picked for row in part]
        found: dict[str, float] = {}
        for row, count in zip(part, counts, strict=True):
            for domain, share in getattr(row, metric).items():
                found[domain] = found.get(domain, 0.0) + share * count / sum(counts)
        return found

    domains, height = domain_order(swapped), 0.36
    other = len({domain for part in swapped.values() for row in part for domain in row.pool_share}) - len(domains)
    labels = [*domains, *([f"other ({other})"] if other else [])]
    figure, axes = panels(rows=len(swapped), height=0.7 + (0.5 + 0.3 * len(labels)) * len(swapped))
    bars = (("came in", "share_swapped_in", ARM_COLOURS[0], -1), ("had to go", "share_swapped_out", OTHER_COLOUR, 1))
    for axis, (name, part) in zip(axes, swapped.items(), strict=True):
        for label, metric, colour, lower in bars:
            found = mean(part, metric)
            shares = [found.get(domain, 0.0) for domain in domains]
            shares += [1 - sum(shares)] * bool(other)
            places = [place + lower * height / 2 for place in range(len(labels))]
            axis.barh(places, shares, height, color=colour, label=label)
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        percent_axis(axis, below=True)
        name_axes(axis, "share of the swapped picks", "", name)
    legend_above(figure, axes, 2)
    return figure


def check_figure(runs: Mapping[str, Run], rows: Mapping[str, Sequence[SelectionRecord]]) -> Figure:
    """Predicted and realised falls of the proxy loss, one panel a run; ``rows``: the checked ones, all finite.

    Dots: as measured, outliers as triangles at the border; lines: running medians.
    """
    figure, axes = panels(rows=len(rows), height=0.7 + 2.5 * len(rows))
    series = (("realised", 2, ARM_COLOURS[0]), ("predicted", 0, ARM_COLOURS[1]), (UNIFORM_DRAW, 1, BASELINE_COLOUR))
    for axis, (name, part) in zip(axes, rows.items(), strict=True):
        tokens = step_tokens(runs[name])
        x = [tokens.get(row.step, math.nan) for row in part]
        falls = [row.falls for row in part if row.falls is not None]
        ordered = sorted(value for fall in falls for value in fall)
        low, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.9))
        low, high = min(0.0, low - (high - low)), high + (high - low)
        for label, at, colour in series:
            y = [fall[at] for fall in falls]
            if label != UNIFORM_DRAW:
                inside = [value if low <= value <= high else math.nan for value in y]
                axis.plot(x, inside, ".", color=colour, alpha=0.35, markersize=5)
                for edge, marker, outside in ((high, "^", [v > high for v in y]), (low, "v", [v < low for v in y])):
                    places = [place for place, out in zip(x, outside, strict=True) if out]
                    axis.plot(places, [edge] * len(places), marker, color=colour, markersize=5)
            style = "--" if label == UNIFORM_DRAW else "-"
            axis.plot(x, running_median(y), style, color=colour, linewidth=1.8, label=label)
        axis.axhline(0, color="#999999", linewidth=0.8)
        margin = 0.05 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)
        token_axis(axis)
        name_axes(axis, "update tokens", "fall of the proxy loss\n(nats per token)", name)
    legend_above(figure, axes[:1], 3)
    return figure


def overhead_figure(runs: Mapping[str, Run], ink: Mapping[str, Ink], start_step: int) -> Figure:
    """Seconds of selection over the other seconds of a running window: some steps score, others do not."""
    figure, (axis,) = panels(height=3.2)
    highest = 0.0
    for name, run in runs.items():
        steps = [record for record in run.steps if record.step >= start_step and record.step_s > record.select_s]
        if not steps:
            continue
        selecting = running_sum([record.select_s for record in steps])
        training = running_sum([record.step_s - record.select_s for record in steps])
        share = [s / t for s, t in zip(selecting, training, strict=True)]
        highest = max(highest, *share)
        plot_line(axis, [record.tokens for record in steps], share, ink[name])
    return share_of_each_step(figure, max(0.01, 1.15 * highest), "selection time\n(share of training time)")


def _parts(record: ValidationRecord) -> dict[str, float]:
    return {f"target: {name}": loss for name, loss in record.held_out.items()} | record.domains


def domain_figure(runs: Mapping[str, Run], ink: Mapping[str, Ink], start_step: int) -> Figure:
    """Validation loss of each domain, and part of a held-out target, in a panel, one line a run, as measured."""
    domains = sorted({part for run in runs.values() for record in run.validations for part in _parts(record)})
    columns = 2 if len(domains) > 1 else 1
    rows = -(-len(domains) // columns)
    figure, axes = panels(rows, columns, height=0.7 + 2.3 * rows)
    for at, (axis, domain) in enumerate(zip(axes, domains, strict=False)):
        for name, run in runs.items():
            records = [each for each in run.validations if each.step >= start_step and domain in _parts(each)]
            x, y = [record.tokens for record in records], [_parts(record)[domain] for record in records]
            plot_line(axis, x, y, ink[name], marker=".")
        low, high = axis.get_ylim()
        if high - low < MIN_LOSS_SPAN:  # or noise would fill the panel like a difference that matters
            axis.set_ylim((low + high - MIN_LOSS_SPAN) / 2, (low + high + MIN_LOSS_SPAN) / 2)
        token_axis(axis, ticks=4)
        name_axes(axis, "update tokens" if at >= len(domains) - columns else "", "" if at % columns else LOSS, domain)
    for axis in axes[len(domains) :]:
        axis.set_visible(False)
    legend_above(figure, axes, 3)
    return figure


def benchmark_figure(
    histories: Mapping[str, Sequence[Evaluation]], keys: Sequence[tuple[str, str]], ink: Mapping[str, Ink]
) -> Figure:
    """Scores (task, metric) over update tokens with their standard errors, a panel each, one line a run."""
    columns = 2 if len(keys) > 1 else 1
    rows = -(-len(keys) // columns)
    figure, axes = panels(rows, columns, height=0.7 + 2.3 * rows)
    for at, (axis, key) in enumerate(zip(axes, keys, strict=False)):
        for name, history in histories.items():
            there = [(each.tokens or 0, each.scores[key]) for each in history if key in each.scores]
            x, y = [tokens for tokens, _ in there], [score.value for _, score in there]
            axis.errorbar(x, y, [score.stderr or 0.0 for _, score in there], fmt="none", ecolor=ink[name].colour)
            plot_line(axis, x, y, ink[name], marker=".")
        token_axis(axis, ticks=4)
        name_axes(axis, "update tokens" if at >= len(keys) - columns else "", key[1], key[0])
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    legend_above(figure, axes, 3)
    return figure
