"""One HTML page about one or more runs; pictures and style inside, so that it can be mailed or archived as it is."""

from __future__ import annotations

import argparse
import html
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaopus.errors import DataError
from megaopus.monitor.compare import (
    Comparison,
    Curve,
    Run,
    SelectionRow,
    compare,
    load_run,
    stretch_curve,
    validation_at,
)
from megaopus.monitor.console import format_count, format_duration, kind_of

WINDOW = 3
PLATEAU_FALL = 0.15  # nats: below this fall of the baseline, "tokens to reach" is mostly noise
START_GAP = 0.01  # nats

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222; background: #fff;
       margin: 0 auto; max-width: 1100px; padding: 1.2rem; }
h1 { font-size: 1.5rem; font-weight: 600; margin: .3rem 0; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.quiet, figcaption { color: #5c5c5c; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; color: #444; }
td.n, th.n { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 3rem; max-width: 26rem; } td:first-child { white-space: nowrap; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1.4rem; }
figure { margin: 0; } img { width: 100%; max-width: 640px; height: auto; display: block; }
.warn { background: #fff6e5; border-left: 4px solid #E69F00; padding: .4rem .8rem; max-width: 46rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #444; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m megaopus report``."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run folders; the uniform one is the baseline")
    parser.add_argument("--out", metavar="FILE.html", help="page to write (default: report.html beside the runs)")
    parser.add_argument(
        "--start-step",
        type=int,
        metavar="N",
        help="compare after N updates, the warm-up that all runs share (default: where the last of them begins)",
    )
    parser.add_argument(
        "--replay",
        metavar="STEP[,STEP...]",
        help="instead of a page: make the picks of these steps (or all) again from the record of one run, and say "
        "whether they are the same; exit status 1 if not, 3 if some step's record is not enough",
    )


def run(args: argparse.Namespace) -> int:
    """The ``report`` verb. Raises DataError before anything is written if a run folder cannot be read."""
    paths = [Path(path) for path in args.runs]
    if args.start_step is not None and args.start_step < 0:
        raise DataError(f"--start-step {args.start_step}: must not be negative")
    runs = {name: load_run(path, name) for name, path in zip(_names(paths), paths, strict=True)}
    resolved = [path.resolve() for path in paths]
    out = Path(args.out) if args.out else Path(os.path.commonpath(resolved)) / "report.html"
    print(f"wrote {write_report(runs, out, start_step=args.start_step)}")
    return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """Shortest path endings that tell the folders apart. Raises DataError for a folder named twice."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise DataError("a run folder is named twice; name each once")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def find_baseline(runs: Mapping[str, Run]) -> str:
    """The first run whose configuration selects uniformly, else the first run."""
    for name, each in runs.items():
        if (each.config.get("selection") or {}).get("method") == "uniform":
            return name
    return next(iter(runs))


def write_report(
    runs: Mapping[str, Run],
    out: str | Path,
    *,
    start_step: int | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
    title: str = "Training report",
    notes: Sequence[str] = (),
) -> Path:
    """Write the page to ``out`` (made in one go) and return its path.

    ``runs``: by name, in order of display. ``start_step``: updates before which the runs are one (default: the largest
    first step among them). ``comparisons``: by arm, against the baseline (default: made here where there are two runs
    or more). ``notes``: paragraphs under the summary, plain text.
    """
    if not runs:
        raise ValueError("no runs to report on")
    if start_step is None:
        start_step = max((each.steps[0].step for each in runs.values() if each.steps), default=0)
    page = _Page(runs, start_step, comparisons, list(notes))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(page.render(title), encoding="utf-8")
    os.replace(temporary, out)
    return out


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """An HTML table of cells that are HTML already; ``numbers``: columns aligned to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="n"' if at in numbers else "" for at in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and text."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if item is None else str(item)
    return flat


def _checked(rows: Sequence[SelectionRow]) -> list[SelectionRow]:
    """Those with a predicted and a realised fall of the proxy loss, all finite."""
    return [row for row in rows if row.falls is not None and all(map(math.isfinite, row.falls))]


def _agreement(rows: Sequence[SelectionRow]) -> str:
    """How well falls were predicted, in words; medians and ranks, which outliers do not rule."""
    predicted, uniform, realised = zip(*(row.falls for row in rows if row.falls is not None), strict=True)
    middle = [statistics.median(values) for values in (realised, predicted, uniform)]
    text = "median {:.2g} realised, {:.2g} predicted, {:.2g} for a uniform draw".format(*middle)
    if len(set(predicted)) < 3 or len(set(realised)) < 3:
        return f"{text}; too few checks to correlate."
    ranks = [[sorted(values).index(value) for value in values] for values in (predicted, realised)]
    correlation = statistics.correlation(*ranks)
    return f"{text}; rank correlation of predicted and realised {correlation:.2f} over {len(rows)} checks."


def _ratio(ratio: float | None) -> str:
    return "not reached" if ratio is None else f"{ratio:.2f}"


class _Page:
    """The parts of one page; every text from a run folder is escaped."""

    def __init__(
        self,
        runs: Mapping[str, Run],
        start_step: int,
        comparisons: Mapping[str, Comparison] | None,
        notes: list[str],
    ):
        from megaopus.monitor import plots  # matplotlib is slow to import, and only this verb needs it

        self.plots = plots
        self.runs = runs
        self.start_step = start_step
        self.notes = notes
        self.warnings: list[str] = []
        self.baseline = find_baseline(runs) if len(runs) > 1 else None
        self.comparisons = dict(comparisons) if comparisons is not None else self._compare()
        self.colours = plots.arm_colours(runs, self.baseline)
        self.curves = self._curves()
        self.rows = {name: self._selected(each) for name, each in runs.items()}
        self._judge()

    def _compare(self) -> dict[str, Comparison]:
        found = {}
        for name in self.runs:
            if self.baseline is not None and name != self.baseline:
                try:
                    found[name] = compare(self.runs[self.baseline], self.runs[name], self.start_step, WINDOW)
                except DataError as error:
                    self.warnings.append(f"{name} is not compared with {self.baseline}: {error}")
        return found

    def _curves(self) -> dict[str, Curve]:
        """Curve of each run that was validated; arms that share a start share its validation, as in ``compare``."""
        window = next((each.window for each in self.comparisons.values()), WINDOW)
        starts = {name: validation_at(each, self.start_step) for name, each in self.runs.items()}
        shared = starts[self.baseline] if self.baseline is not None else None
        shared = shared or next((start for start in starts.values() if start), None)
        curves = {}
        for name, each in self.runs.items():
            try:
                curves[name] = stretch_curve(each, self.start_step, window, starts[name] or shared)
            except DataError as error:
                self.warnings.append(f"No validation curve of {name}: {error}")
        return curves

    def _selected(self, each: Run) -> list[SelectionRow]:
        """Rows of the stretch if any of them was chosen by utility, else none."""
        rows = [row for row in each.selections if row.step >= self.start_step]
        return rows if any(row.method != "uniform" for row in rows) else []

    def _judge(self) -> None:
        """Say where the ratios should not be trusted."""
        for name, found in self.comparisons.items():
            if found.uniform_fall < PLATEAU_FALL:
                self.warnings.append(
                    f"The baseline's loss falls by only {found.uniform_fall:.3f} over the stretch; on such a plateau "
                    f"the ratios of {name} mean little."
                )
            if found.self_ratio is not None and found.self_ratio < 0.95:
                self.warnings.append(
                    f"Noise: the baseline itself first touches its final loss after {found.self_ratio:.0%} of its "
                    f"tokens; read the tokens ratio of {name} against that."
                )
            if found.start_gap > START_GAP:
                self.warnings.append(
                    f"{name} and the baseline do not start from one point: their losses at step {self.start_step} "
                    f"differ by {found.start_gap:.3f}."
                )

    def render(self, title: str) -> str:
        """The whole page."""
        parts = [f"<h1>{html.escape(title)}</h1>", self._lead(), self._summary()]
        parts += [f'<p class="warn">{html.escape(text)}</p>' for text in dict.fromkeys(self.warnings)]
        parts += [f"<p>{html.escape(text)}</p>" for text in self.notes]
        parts += [self._figures(), self._domains(), self._events(), self._settings(), self._environment()]
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
        )

    def _name(self, name: str) -> str:
        return f'<span class="swatch" style="background:{self.colours[name]}"></span>{html.escape(name)}'

    def _lead(self) -> str:
        sentences = []
        for name, found in self.comparisons.items():
            if not found.uniform_fall > 0:
                sentences.append(f"{self.baseline}'s loss does not fall, so there is nothing for {name} to reach.")
            elif found.tokens_ratio is None or found.time_ratio is None:
                sentences.append(
                    f"{name} does not reach {self.baseline}'s final loss of {found.uniform_final_loss:.3f}."
                )
            else:
                sentences.append(
                    f"{name} reaches {self.baseline}'s final loss of {found.uniform_final_loss:.3f} after "
                    f"{found.tokens_ratio:.0%} of its update tokens and {found.time_ratio:.0%} of its time."
                )
        if self.start_step:
            sentences.append(f"Tokens and seconds in the table are counted from update {self.start_step} on.")
        return f"<p>{html.escape(' '.join(sentences))}</p>" if sentences else ""

    def _summary(self) -> str:
        header = ["run", "final loss", "tokens", "time", "selection / training"]
        if self.comparisons:
            header += ["tokens to baseline's loss", "time to baseline's loss"]
        rows = []
        for name, each in self.runs.items():
            curve = self.curves.get(name)
            steps = [record for record in each.steps if record.step >= self.start_step]
            select_s = sum(record.select_s for record in steps)
            train_s = sum(record.step_s for record in steps) - select_s
            row = [
                self._name(name),
                f"{curve.losses[-1]:.4f}" if curve else "–",
                format_count(curve.tokens[-1]) if curve else "–",
                format_duration(curve.time_s[-1]) if curve else "–",
                f"{select_s / train_s:.1%}" if train_s > 0 else "–",
            ]
            if self.comparisons:
                found = self.comparisons.get(name)
                for key in ("tokens_ratio", "time_ratio"):
                    row.append(_ratio(getattr(found, key)) if found else "baseline" if name == self.baseline else "–")
            rows.append(row)
        window = next(iter(self.curves.values())).window if self.curves else WINDOW
        caption = (
            f"Losses are means over the last {window} validations on the wanted domains, in nats per token. Time is "
            "data, selection and training, without validation and saving. Ratios: fractions of what the baseline used."
        )
        return f'{table(header, rows, range(1, len(header)))}<p class="quiet">{caption}</p>'

    def _figures(self) -> str:
        plots, found = self.plots, []
        if self.curves:
            for over, text in (("tokens", "update tokens"), ("time", "time, every cost of selection counted")):
                picture = plots.loss_figure(self.curves, self.colours, self.comparisons, over, self.baseline)
                caption = (
                    f"Validation loss on the wanted domains over {text}. Dots: as measured; lines: trailing means, "
                    "which lag a falling loss and are what is compared."
                )
                marked = " Marked: the baseline's final loss is reached." if self.comparisons else ""
                found.append((picture, caption + marked))
        rows = {name: part for name, part in self.rows.items() if part}
        shown = rows or {name: each.selections for name, each in self.runs.items() if each.selections}
        if shown:
            caption = "Which domains the picks come from (moving mean). Dashed: the same borders among all candidates."
            found.append((plots.share_figure(self.runs, shown), caption))
        if rows:
            caption = (
                "Effective sample size of the selection probabilities; low: a few candidates take nearly all of it."
            )
            found.append((plots.ess_figure(self.runs, rows, self.colours), caption))
        if checked := {name: part for name, each in self.rows.items() if (part := _checked(each))}:
            caption = (
                "Fall of the proxy loss in one update on the picks: realised, predicted from the picks' utilities, and "
                "predicted for a uniform draw. What is realised also holds the optimizer's history and higher orders. "
            )
            words = " ".join(f"{name}: {_agreement(part)}" for name, part in checked.items())
            found.append((plots.check_figure(self.runs, checked), caption + words))
        if any(record.select_s > 0 for each in self.runs.values() for record in each.steps):
            caption = "Seconds spent choosing each batch over the other seconds of its step (running median)."
            found.append((plots.overhead_figure(self.runs, self.colours, self.start_step), caption))
        if any(len(record.domains) > 1 for each in self.runs.values() for record in each.validations):
            caption = "Validation loss of each domain, as measured."
            found.append((plots.domain_figure(self.runs, self.colours, self.start_step), caption))
        figures = "".join(
            f'<figure><img alt="{html.escape(caption)}" src="{plots.to_png(picture)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for picture, caption in found
        )
        return f'<h2>Curves</h2><div class="figures">{figures}</div>' if figures else ""

    def _domains(self) -> str:
        names = sorted({domain for curve in self.curves.values() for domain in curve.domains})
        if not names:
            return ""
        selected = {name: part for name, part in self.rows.items() if part}
        header = ["domain", *(f"loss: {html.escape(name)}" for name in self.curves)]
        header += [text for name in selected for text in (f"pool: {html.escape(name)}", f"picks: {html.escape(name)}")]
        body = []
        for domain in names:
            row = [html.escape(domain)]
            for curve in self.curves.values():
                row.append(f"{curve.domains[domain]:.3f}" if domain in curve.domains else "–")
            for part in selected.values():
                for shares in ([each.pool_share for each in part], [each.share for each in part]):
                    row.append(f"{sum(share.get(domain, 0.0) for share in shares) / len(shares):.1%}")
            body.append(row)
        return f"<h2>Domains</h2>{table(header, body, range(1, len(header)))}"

    def _events(self) -> str:
        kinds: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for name, each in self.runs.items():
            happened = [(row.step, event) for row in each.selections for event in row.events]
            happened += [
                (record.step, "update skipped: a gradient was not finite") for record in each.steps if record.skipped
            ]
            for step, event in happened:
                kinds.setdefault((name, kind_of(event)), []).append((step, event))
        rows = [
            [self._name(name), str(len(found)), str(found[0][0]), html.escape(found[0][1])]
            for (name, _), found in kinds.items()
        ]
        if not rows:
            return "<h2>Fallbacks</h2><p>None was recorded.</p>"
        return f"<h2>Fallbacks</h2>{table(['run', 'times', 'first at step', 'first of its kind'], rows, (1, 2))}"

    def _settings(self) -> str:
        flat = {name: flatten(each.config) for name, each in self.runs.items()}
        missing = [name for name, settings in flat.items() if not settings]
        text = f"<p>No config.yaml in: {html.escape(', '.join(missing))}.</p>" if missing else ""
        keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
        parts = [text] if text else []
        header = ["setting", *(html.escape(name) for name in flat)]

        def row(key: str) -> list[str]:
            return [html.escape(key), *(html.escape(settings.get(key, "–")) for settings in flat.values())]

        if len(flat) > 1:
            different = [key for key in keys if len({settings.get(key) for settings in flat.values()}) > 1]
            parts.append(
                table(header, [row(key) for key in different]) if different else "<p>The same in all runs.</p>"
            )
        whole = table(header, [row(key) for key in keys])
        parts.append(f"<details><summary>All {len(keys)} settings</summary>{whole}</details>" if keys else "")
        heading = "Settings that differ" if len(flat) > 1 else "Settings"
        return f"<h2>{heading}</h2>{''.join(parts)}"

    def _environment(self) -> str:
        flat = {name: flatten(each.environment) for name, each in self.runs.items()}
        keys = list(dict.fromkeys(key for facts in flat.values() for key in facts))
        if not keys:
            return "<h2>Environment</h2><p>No environment.json.</p>"
        rows = []
        for key in keys:
            values = [facts.get(key, "–") for facts in flat.values()]
            shown = (
                values[:1]
                if len(set(values)) == 1
                else [f"{name}: {value}" for name, value in zip(flat, values, strict=True)]
            )
            rows.append([html.escape(key), "<br>".join(html.escape(value) for value in shown)])
        return f"<h2>Environment</h2>{table(['', ''], rows)}"
