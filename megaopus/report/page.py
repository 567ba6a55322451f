"""One HTML page about one or more runs; pictures and style inside, so that it can be mailed or archived as it is."""

from __future__ import annotations

import html
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaopus.errors import DataError
from megaopus.record.formatting import format_count, format_duration
from megaopus.record.types import SelectionRecord
from megaopus.report import benchmarks, sections
from megaopus.report.arms import find_arms, over_seeds, partner
from megaopus.report.choice_summary import ChoiceSummary, summarise_choices
from megaopus.report.compare import (
    SEED_NOISE,
    Comparison,
    Curve,
    Run,
    compare,
    share_changed,
    stretch_curve,
    validation_at,
)
from megaopus.report.sections import STYLE, Texts, table
from megaopus.report.target import headline_of

WINDOW = 3
PLATEAU_FALL = 0.15  # nats: below this fall of the baseline, "tokens to reach" is mostly noise
START_GAP = 0.01  # nats


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
    texts: Texts | None = None,
) -> Path:
    """Write the page to ``out`` (made in one go) and return its path.

    ``runs``: by name, in order of display. ``start_step``: updates before which the runs are one (default: the largest
    first step among them). ``comparisons``: by arm, against the baseline (default: made here where there are two runs
    or more). ``notes``: paragraphs under the summary, plain text. ``texts``: what sequences say. Raises DataError if
    ``out`` cannot be written.
    """
    if not runs:
        raise ValueError("no runs to report on")
    if start_step is None:
        start_step = max((each.steps[0].step for each in runs.values() if each.steps), default=0)
    out = Path(out)
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # what cannot be written is told before the pictures are drawn
        try:
            text = _Page(runs, start_step, comparisons, list(notes), texts).render(title)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{out}: the page cannot be written ({error.strerror}); name another file with --out"
        ) from error
    return out


def _checked(rows: Sequence[SelectionRecord]) -> list[SelectionRecord]:
    """Those with a predicted and a realised fall of the proxy loss, all finite."""
    return [row for row in rows if row.falls is not None and all(map(math.isfinite, row.falls))]


def _agreement(rows: Sequence[SelectionRecord]) -> str:
    """Return how well falls were predicted, in words; medians and ranks, which outliers do not rule."""
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
        texts: Texts | None,
    ):
        from megaopus.report import drawing, figures  # matplotlib is slow to import, and only this verb needs it

        self.drawing, self.figures = drawing, figures
        self.headline = headline_of(runs)
        self.runs = runs = self.headline.runs
        self.start_step = start_step
        self.notes = notes
        self.texts = texts
        self.warnings = [self.headline.warning] if self.headline.warning else []
        self.baseline = find_baseline(runs) if len(runs) > 1 else None
        self.arms = find_arms(runs)
        self.same = next((list(arm.runs.values()) for arm in self.arms if self.baseline in arm.runs.values()), [])
        """The baseline's arm."""
        self.comparisons = dict(comparisons) if comparisons is not None else self._compare()
        self.seeds = over_seeds(self.arms, self.baseline, self.comparisons) if self.baseline is not None else {}
        self.inks = drawing.inks(self.arms, self.baseline)
        self.curves = self._curves()
        # Where an arm has several seeds its first run stands for it in pictures of one run each.
        self.rows = {arm.first: self._selected(runs[arm.first]) for arm in self.arms}
        self.summaries = {name: summarise_choices(each, start_step) for name, each in runs.items()}
        self._judge()

    def _compare(self) -> dict[str, Comparison]:
        found = {}
        if self.baseline is None:
            return {}
        for name in self.runs:
            other = partner(self.arms, self.baseline, name)
            if name not in self.same:
                try:
                    found[name] = compare(self.runs[other], self.runs[name], self.start_step, WINDOW)
                except DataError as error:
                    self.warnings.append(f"{name} is not compared with {other}: {error}")
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

    def _selected(self, each: Run) -> list[SelectionRecord]:
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
        opening = html.escape(self.headline.sentence(self.arms, self.curves))
        parts = [f"<h1>{html.escape(title)}</h1><p>{opening}</p>", self._lead()]
        parts.append(sections.origins(self.runs, self._name))
        parts += [self._summary(), self._over_seeds()]
        parts += [f'<p class="warn">{html.escape(text)}</p>' for text in dict.fromkeys(self.warnings)]
        parts += [f"<p>{html.escape(text)}</p>" for text in self.notes]
        parts += [benchmarks.section(self.runs, self.arms, self.baseline, self._name, self._benchmark_curves)]
        parts += [self._figures(), self._domains(), sections.repeats(self.summaries, self._name)]
        parts += [sections.useful_text(self.runs, self._stand_ins(), self.texts, self._name)]
        parts += [
            sections.events(self.runs, self._name),
            sections.skipped_updates(self.runs, self._name),
            sections.settings(self._settings_of()),
            sections.environment(self.runs),
        ]
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
        )

    def _name(self, name: str) -> str:
        return f'<span class="swatch" style="background:{self.inks[name].colour}"></span>{html.escape(name)}'

    def _lead(self) -> str:
        sentences, loss = [], self.headline.loss
        for arm, mean in self.seeds.items():
            own = f"{mean.final_loss:.3f} ± {mean.final_loss_std:.3f}"
            base = f"{mean.uniform_final_loss:.3f} ± {mean.uniform_final_loss_std:.3f}"
            sentences.append(
                f"Over {mean.seeds} seeds {arm} ends at {own}, the baseline at {base} (p = {mean.p_value:.2g})."
            )
        for name, found in {} if self.seeds else self.comparisons.items():
            if not found.uniform_fall > 0:
                sentences.append(f"{self.baseline}'s {loss} does not fall, so there is nothing for {name} to reach.")
            elif not found.measurable:
                sentences.append(
                    f"No difference measurable with one seed: {name} ends at {found.final_loss:.3f}, {self.baseline} "
                    f"at {found.uniform_final_loss:.3f}, and another seed alone may change such a difference by "
                    f"{SEED_NOISE:g}."
                )
            elif found.tokens_ratio is None or found.time_ratio is None:
                sentences.append(
                    f"{name} does not reach {self.baseline}'s final {loss} of {found.uniform_final_loss:.3f}."
                )
            else:
                sentences.append(
                    f"{name} reaches {self.baseline}'s final {loss} of {found.uniform_final_loss:.3f} after "
                    f"{found.tokens_ratio:.0%} of its update tokens and {found.time_ratio:.0%} of its time."
                )
        if self.start_step:
            sentences.append(f"Tokens and seconds in the table are counted from update {self.start_step} on.")
        return f"<p>{html.escape(' '.join(sentences))}</p>" if sentences else ""

    def _summary(self) -> str:
        named = self.headline.target.named
        header = ["run", f"final {self.headline.loss}", *(["mean over all domains"] if named else [])]
        header += ["tokens", "time", "selection / training"]
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
                *([f"{curve.mean_loss:.4f}" if curve else "–"] if named else []),
                format_count(curve.tokens[-1]) if curve else "–",
                format_duration(curve.time_s[-1]) if curve else "–",
                f"{select_s / train_s:.1%}" if train_s > 0 else "–",
            ]
            if self.comparisons:
                found = self.comparisons.get(name)
                for key in ("tokens_ratio", "time_ratio"):
                    row.append(self._reached(found, key) if found else "baseline" if name in self.same else "–")
            rows.append(row)
        window = next(iter(self.curves.values())).window if self.curves else WINDOW
        caption = (
            f"Losses are means over the last {window} validations, in nats per token. Time is data, "
            " selection and training, without validation and saving. Ratios: fractions of what the baseline used."
        )
        return f'{table(header, rows, range(1, len(header)))}<p class="quiet">{caption}</p>'

    def _reached(self, found: Comparison, key: str) -> str:
        """A ratio of one pair of runs, if it says anything."""
        return _ratio(getattr(found, key)) if found.measurable or self.seeds else "not measurable"

    def _over_seeds(self) -> str:
        """Arms against the baseline's, paired by seed."""
        if not self.seeds:
            return ""
        header = [
            "arm",
            "seeds",
            f"final {self.headline.loss}",
            "baseline's",
            "difference",
            "p",
            "tokens to it",
            "time to it",
        ]
        rows = []
        for arm, found in self.seeds.items():
            losses = (found.final_loss, found.final_loss_std), (found.uniform_final_loss, found.uniform_final_loss_std)
            rows.append(
                [
                    html.escape(arm),
                    str(found.seeds),
                    *(f"{mean:.4f} ± {std:.4f}" for mean, std in losses),
                    f"{found.final_loss - found.uniform_final_loss:+.4f}",
                    f"{found.p_value:.2g}",
                    *(_ratio(ratio) for ratio in (found.tokens_ratio, found.time_ratio)),
                ]
            )
        caption = (
            "Means and standard deviations over seeds; p: two-sided paired t-test of the final losses, paired by seed. "
            "Runs whose settings differ by the seed alone are one arm."
        )
        return f'<h2>Over seeds</h2>{table(header, rows, range(1, len(header)))}<p class="quiet">{caption}</p>'

    def _stand_ins(self) -> dict[str, ChoiceSummary]:
        """Digests of the runs that stand for their arms."""
        return {arm.first: self.summaries[arm.first] for arm in self.arms}

    def _settings_of(self) -> dict[str, Run]:
        """By name, the runs that stand for their arms; named after the arm where that has more."""
        return {arm.name if len(arm.runs) > 1 else arm.first: self.runs[arm.first] for arm in self.arms}

    def _benchmark_curves(self, histories: benchmarks.Histories, keys: Sequence[benchmarks.Key]) -> str:
        return self.drawing.to_png(self.figures.benchmark_figure(histories, keys, self.inks))

    def _figures(self) -> str:
        figures, found = self.figures, []
        if self.curves:
            several = any(len(arm.runs) > 1 for arm in self.arms)  # too many marks to read
            measurable = {name: each for name, each in self.comparisons.items() if each.measurable}
            marks, target = ({}, None) if several else (measurable, self.baseline)
            for over, text in (("tokens", "update tokens"), ("time", "time, every cost of selection counted")):
                picture = figures.loss_figure(self.curves, self.inks, marks, over, target)
                caption = f"Validation loss over {text}, as measured; target: {self.headline.target.told}."
                marked = (
                    " Marked: where the mean of the last validations (thin) is what the baseline's is at its end; "
                    "while a loss falls that mean lies above it, in all runs alike."
                    if marks
                    else ""
                )
                found.append((picture, caption + marked))
        if any(record.step >= self.start_step for each in self.runs.values() for record in each.steps):
            caption = (
                "Loss of the batches trained on (running median): of other text in each run, so not to be compared."
            )
            found.append((figures.train_figure(self.runs, self.inks, self.start_step), caption))
        found += self._selection_figures()
        if (picture := figures.metrics_figure(self.runs, self.inks, self.start_step)) is not None:
            caption = "Further numbers of each update, as docs/report.md explains them (running medians)."
            found.append((picture, caption))
        if any(record.select_s > 0 for each in self.runs.values() for record in each.steps):
            caption = "Seconds spent choosing each batch over the other seconds of its step (running median)."
            found.append((figures.overhead_figure(self.runs, self.inks, self.start_step), caption))
        if any(len(record.domains) > 1 for each in self.runs.values() for record in each.validations):
            caption = "Validation loss of each domain and of each part of a held-out target, as measured."
            found.append((figures.domain_figure(self.runs, self.inks, self.start_step), caption))
        shown = [
            f'<figure><img alt="{html.escape(caption)}" src="{self.drawing.to_png(picture)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for picture, caption in found
        ]
        first = 2 if self.curves else 0  # losses stand side by side, the others fill two columns
        parts = "".join(shown[:first]), "".join(shown[first:])
        if not shown:
            return ""
        return f'<h2>Curves</h2><div class="shown">{parts[0]}</div><div class="columns">{parts[1]}</div>'

    def _selection_figures(self) -> list[tuple[Any, str]]:
        """(picture, caption) of what was picked, and by what."""
        figures, found = self.figures, []
        rows = {name: part for name, part in self.rows.items() if part}
        firsts = [arm.first for arm in self.arms]
        every = {name: [row for row in self.runs[name].selections if row.step >= self.start_step] for name in firsts}
        shown = {name: part for name, part in every.items() if part}
        if shown:
            caption = "Which domains the picks come from (moving mean). Dashed: the same borders among all candidates."
            found.append((figures.share_figure(self.runs, shown), caption))
        if rows:
            caption = (
                "Effective sample size of the selection probabilities; low: a few candidates take nearly all of it."
            )
            found.append((figures.ess_figure(self.runs, shown, self.inks), caption))
        if spread := {name: each for name, each in self._stand_ins().items() if each.spreads}:
            caption = (
                "Utilities as estimated, of the candidates scored in each step (running medians of quantiles). Those "
                "of opus and greats are about one update, and shrink with the learning rate."
            )
            found.append((figures.utility_figure(self.runs, spread), caption))
        found += self._influence_figures()
        if any(share > 0 for each in self.summaries.values() for _, share in each.repeat_share):
            picked = {name: each for name, each in self.summaries.items() if each.repeat_share}
            caption = "Share of each batch that the run had trained on before (moving mean)."
            found.append((figures.repeat_figure(self.runs, picked, self.inks), caption))
        if checked := {name: part for name, each in self.rows.items() if (part := _checked(each))}:
            caption = (
                "Fall of the proxy loss in one update on the picks: realised, predicted from the picks' utilities, and "
                "predicted for a uniform draw. What is realised also holds the optimizer's history and higher orders. "
            )
            words = " ".join(f"{name}: {_agreement(part)}" for name, part in checked.items())
            found.append((figures.check_figure(self.runs, checked), caption + words))
        return found

    def _influence_figures(self) -> list[tuple[Any, str]]:
        """(picture, caption) of what utilities did to the picks; none where no step says it."""
        figures, told = self.figures, {}
        for name, part in self.rows.items():
            if said := [row for row in part if row.changed_by_utilities is not None]:
                told[name] = said
        if not told:
            return []
        shares = "; ".join(f"{name}: {share_changed(part):.1%} of all picks" for name, part in told.items())
        caption = (
            "Share of each batch that would not have been picked by what is known without utilities (dots: each step; "
            f"line: moving mean). {shares}."
        )
        found = [(figures.changed_figure(self.runs, told, self.inks), caption)]
        spread = (
            "What each signal adds to the number that is picked by: its standard deviation over those that may be "
            "picked (running median). The larger has the say."
        )
        weights = "Weight of each signal in the log-odds that are picked by (running median)."
        for metric, text, caption in (
            ("signal_spread", "standard deviation", spread),
            ("odds_weights", "weight", weights),
        ):
            if (picture := figures.signal_figure(self.runs, told, metric, text)) is not None:
                found.append((picture, caption))
        if (picture := figures.swapped_figure(self.runs, told, self.inks)) is not None:
            caption = (
                "Picks that utilities brought in less those that had to go for them: means of what is known of them, "
                "importance as its logarithm (dots: each step; lines: running medians)."
            )
            found.append((picture, caption))
        if (picture := figures.swapped_domains_figure(told)) is not None:
            caption = "Domains of the picks that utilities brought in, and of those that had to go for them."
            found.append((picture, caption))
        return found

    def _domains(self) -> str:
        curves = {arm.first: self.curves[arm.first] for arm in self.arms if arm.first in self.curves}
        names = sorted({domain for curve in curves.values() for domain in curve.domains})
        if not names:
            return ""
        selected = {name: part for name, part in self.rows.items() if part}
        header = ["domain", *(f"loss: {html.escape(name)}" for name in curves)]
        header += [text for name in selected for text in (f"pool: {html.escape(name)}", f"picks: {html.escape(name)}")]
        body = []
        for held in sorted({held for curve in curves.values() for held in curve.held_out}):
            losses = [f"{curve.held_out[held]:.3f}" if held in curve.held_out else "–" for curve in curves.values()]
            body.append([f"target: {html.escape(held)}", *losses, *["–"] * (2 * len(selected))])
        for domain in names:
            row = [html.escape(domain)]
            for curve in curves.values():
                row.append(f"{curve.domains[domain]:.3f}" if domain in curve.domains else "–")
            for part in selected.values():
                for shares in ([each.pool_share for each in part], [each.share for each in part]):
                    row.append(f"{sum(share.get(domain, 0.0) for share in shares) / len(shares):.1%}")
            body.append(row)
        return f"<h2>Domains</h2>{table(header, body, range(1, len(header)))}"
