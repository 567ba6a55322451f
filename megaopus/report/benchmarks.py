"""Parts of the report's page about benchmarks, as HTML: scores, what they differ by, and what was seen in training."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megaopus.errors import DataError
from megaopus.evaluation.differences import BITS, RunScores, compare_scores, last_scores, read_scores
from megaopus.evaluation.items import Evaluation, Score, read_contamination
from megaopus.evaluation.noise import LAST, LEVEL, SEEDS, SURE, Difference, Verdict, spread
from megaopus.report.arms import Arm
from megaopus.report.compare import Run
from megaopus.report.sections import Name, table

Key = tuple[str, str]
"""(task, metric)."""
Histories = Mapping[str, Sequence[Evaluation]]
"""By run."""
Curves = Callable[[Histories, Sequence[Key]], str]
"""(evaluations by run, scores to draw) -> the address of a picture."""
NONE = "–"


def section(runs: Mapping[str, Run], arms: Sequence[Arm], baseline: str | None, shown: Name, curves: Curves) -> str:
    """Everything about benchmarks; empty where no run was evaluated. Raises DataError for a file that is broken."""
    found = {name: each for name, run in runs.items() if (each := read_scores(run.path, name)) is not None}
    scored = {name: each for name, each in found.items() if each.latest is not None and each.latest.scores}
    parts = []
    if scored:
        parts = ["<h2>Benchmarks</h2>", _differences(scored, arms, baseline), _scores(scored, shown)]
        parts += [_noise(scored, arms), _curves(scored, curves)]
    return "".join([*parts, _perplexity(found, shown), _contamination(runs, shown)])


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.5g}"


def _error(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else _number(value)


def _latest(found: RunScores) -> Evaluation:
    assert found.latest is not None
    return found.latest


# -- scores -----------------------------------------------------------------------------------------------------------


def _keys(evaluations: Sequence[Evaluation]) -> dict[Key, Score]:
    """Every score of any of them, the first that has it."""
    keys: dict[Key, Score] = {}
    for each in evaluations:
        for key, score in each.scores.items():
            keys.setdefault(key, score)
    return keys


def _main(score: Score) -> bool:
    """Tell whether a score is among those that are shown first."""
    return score.part_of is None and (score.headline or score.metric == BITS)


def _scores(scored: Mapping[str, RunScores], shown: Name) -> str:
    """A table of scores with their standard errors, those of parts folded away."""
    latest = {name: _latest(each) for name, each in scored.items()}
    keys = _keys(list(latest.values()))
    protocols = dict.fromkeys(score.protocol for each in latest.values() for score in each.scores.values())
    header = ["task", "metric", "items", "few-shot"]
    header += [f"{shown(name)}<br>{_when(scored[name])}" for name in latest]
    rows = {
        key: [
            html.escape(score.task),
            html.escape(score.metric),
            str(score.n),
            NONE if score.num_fewshot is None else str(score.num_fewshot),
            *(_score_cell(each.scores.get(key), score) for each in latest.values()),
        ]
        for key, score in keys.items()
    }
    numbers = range(2, len(header))
    first = [rows[key] for key, score in keys.items() if _main(score)] or list(rows.values())
    caption = (
        f"Protocol {html.escape(', '.join(protocols))}. ±: standard error of the sampling of items. {BITS}: of the "
        "right answer, lower is better."
    )
    whole = ""
    if len(first) < len(rows):
        inside = table(header, list(rows.values()), numbers)
        whole = f"<details><summary>All {len(rows)} scores</summary>{inside}</details>"
    return f'{table(header, first, numbers)}<p class="quiet">{caption}</p>{whole}'


def _when(found: RunScores) -> str:
    step = _latest(found).step
    said = "" if step is None else f"step {step}"
    return said if found.final is not None else f"{said}, in training"


def _score_cell(score: Score | None, first: Score) -> str:
    if score is None:
        return NONE
    text = f"{_number(score.value)} ± {_error(score.stderr)}" if score.stderr is not None else _number(score.value)
    if score.protocol != first.protocol:
        return f"{text} (protocol {html.escape(score.protocol)})"
    return text if score.prompts == first.prompts else f"{text} (other prompts)"


def _noise(scored: Mapping[str, RunScores], arms: Sequence[Arm]) -> str:
    """A table of what scores vary by between checkpoints and between seeds, arm by arm."""
    rows = []
    for arm in arms:
        members = [scored[run] for run in arm.runs.values() if run in scored]
        for key, score in _keys([_latest(each) for each in members]).items():
            if not _main(score):
                continue
            lasts = [scores for each in members if len(scores := last_scores(each.history, {key: 1.0})) > 1]
            seeds = [each.scores[key].value for each in map(_latest, members) if key in each.scores]
            if not lasts and len(seeds) < 2:
                continue
            between = [spread(scores) for scores in lasts]
            cells = [html.escape(arm.name), html.escape(score.task), html.escape(score.metric)]
            if between:
                mean, std = (sum(getattr(each, of) for each in between) / len(between) for of in ("mean", "std"))
                cells += [str(between[0].n), _number(mean), _error(std)]
            else:
                cells += [NONE] * 3
            over = spread(seeds)
            rows.append([*cells, str(over.n), *([_number(over.mean), _error(over.std)] if over.n > 1 else [NONE] * 2)])
    if not rows:
        return ""
    header = ["arm", "task", "metric", "last evaluations", "their mean", "their spread"]
    header += ["seeds", "their mean", "their spread"]
    inside = table(header, rows, range(3, len(header)))
    caption = f"Spreads are sample standard deviations; of the last {LAST} evaluations during training at most."
    summary = "What scores vary by between checkpoints and seeds"
    return f'<details><summary>{summary}</summary>{inside}<p class="quiet">{caption}</p></details>'


def _curves(scored: Mapping[str, RunScores], curves: Curves) -> str:
    """Scores over update tokens, as they were evaluated during training."""
    histories = {name: each.history for name, each in scored.items() if len(each.history) > 1}
    keys = _keys([each for history in histories.values() for each in history])
    first = [key for key, score in keys.items() if score.part_of is None and score.headline]
    bits = [key for key, score in keys.items() if score.part_of is None and score.metric == BITS and key not in first]
    shown = []
    for part, what in ((first, "Benchmark scores during training"), (bits, "Bits per byte of the right answers")):
        if part:
            caption = f"{what}; bars: one standard error of the sampling of items."
            picture = f'<img alt="{caption}" src="{curves(histories, part)}">'
            shown.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


# -- differences ------------------------------------------------------------------------------------------------------


def _differences(scored: Mapping[str, RunScores], arms: Sequence[Arm], baseline: str | None) -> str:
    """Each arm against the baseline's, with what can be told."""
    own = next((arm for arm in arms if baseline in arm.runs.values()), None)
    if own is None:
        return ""
    base = [scored[run] for run in own.runs.values() if run in scored]
    parts = []
    for arm in arms:
        other = [scored[run] for run in arm.runs.values() if run in scored]
        if arm is own or not other:
            continue
        if not base:
            parts.append(_warning(f"{own.name} was not evaluated, so {arm.name} is not compared with it."))
            continue
        try:
            found, refused = compare_scores(base, other)
        except DataError as error:
            parts.append(_warning(f"{arm.name} is not compared with {own.name}: {error}"))
            continue
        parts += [_warning(f"Not compared: {text}") for text in refused]
        if found:
            parts.append(f"<p>{html.escape(_lead(arm.name, own.name, found))}</p>{_difference_table(arm, own, found)}")
    return "".join(parts)


def _warning(text: str) -> str:
    return f'<p class="warn">{html.escape(text)}</p>'


def _lead(arm: str, baseline: str, found: Sequence[Difference]) -> str:
    """Say in a sentence what can be told; nobody is ahead whose lead is within the noise."""
    first, verdicts = found[0], [each.verdict(len(found)) for each in found]
    better, worse = (verdicts.count(each) for each in (Verdict.BETTER, Verdict.WORSE))
    what = f"{first.task}, {first.metric}: {first.value:+.4f} ± {_error(first.stderr)}"
    if verdicts[0] in (Verdict.BETTER, Verdict.WORSE):
        text = f"{arm} is {verdicts[0]} than {baseline} ({what})."
    elif verdicts[0] is Verdict.UNKNOWN:
        text = (
            f"{arm} and {baseline} differ on these items by more than other items would change ({what}), but what "
            f"another seed would change is not known: evaluate {LAST} times in training (tasks.every), or more seeds."
        )
    else:
        text = f"Between {arm} and {baseline} no difference can be told from noise ({what})."
        if first.noise is not None and first.against_items():
            text += (
                f" It holds against the sampling of items ({_error(first.items_stderr)}), not against what training "
                f"alone changes ({_error(first.noise.std)}): more seeds, or evaluations nearer to the end, say more."
            )
    if len(found) > 1:
        text += f" Of {len(found)} differences {better} can be told to be better, {worse} to be worse."
    return text


def _difference_table(arm: Arm, own: Arm, found: Sequence[Difference]) -> str:
    header = ["task", "metric", "items", "difference", "± items", "95 % of items", "± training", "verdict"]
    rows = []
    for each in found:
        interval = NONE if each.interval is None else f"{each.interval[0]:+.4f} to {each.interval[1]:+.4f}"
        rows.append(
            [
                html.escape(each.task),
                html.escape(each.metric),
                f"{each.n}{'' if each.paired else ', not paired'}",
                f"{each.value:+.4f}",
                _error(each.items_stderr),
                interval,
                "not known" if each.noise is None else _error(each.noise.std),
                str(each.verdict(len(found))),
            ]
        )
    sources = {each.noise.source for each in found if each.noise is not None}
    source = (
        "the spread between seeds"
        if SEEDS in sources
        else f"the spread of the last {LAST} evaluations during training, which stands for that between seeds"
    )
    caption = (
        f"{arm.name} less {own.name}, paired by item; standard errors from the sampling of items, the bootstrap's "
        f"interval over items, and what training alone varies it by: {source}. A difference is told if it holds "
        f"against both together (p of {LEVEL:g} over all {len(found)}, or {SURE:g} standard errors). docs/report.md "
        "says what is assumed."
    )
    return f'{table(header, rows, range(2, 7))}<p class="quiet">{html.escape(caption)}</p>'


# -- perplexity and contamination -------------------------------------------------------------------------------------


def _perplexity(found: Mapping[str, RunScores], shown: Name) -> str:
    """A table of the losses on domains of text."""
    held = {name: each.final.perplexity for name, each in found.items() if each.final and each.final.perplexity}
    if not held:
        return ""
    by_domain = {
        name: {(each.corpus, each.split or NONE, each.domain): each for each in losses} for name, losses in held.items()
    }
    keys = list(dict.fromkeys(key for losses in by_domain.values() for key in losses))
    header = [
        "corpus",
        "split",
        "domain",
        *(text for name in held for text in (f"{shown(name)}<br>nats per token", "bits/byte")),
    ]
    rows = []
    for key in keys:
        row = list(map(html.escape, key))
        for losses in by_domain.values():
            if (each := losses.get(key)) is None:
                row += [NONE, NONE]
            else:
                error = "" if each.stderr is None else f" ± {each.stderr:.4f}"
                row += [f"{each.nats_per_token:.4f}{error}", _error(each.bits_per_byte)]
        rows.append(row)
    caption = "Nats per token can be compared between models of one tokenizer only, bits per byte between all."
    return f'<h2>Loss on domains of text</h2>{table(header, rows, range(3, len(header)))}<p class="quiet">{caption}</p>'


def _contamination(runs: Mapping[str, Run], shown: Name) -> str:
    """A table of the benchmark items whose words were met in what a run could read, and in what it trained on."""
    rows, notes, grams = [], [], {}
    for name, run in runs.items():
        found = read_contamination(run.path)
        if found is None:
            continue
        grams[found["ngram"], found["shortest"]] = True
        notes += [f"{name}: {text}" for text in found.get("notes", ())]
        for task in found["tasks"]:
            cells = [shown(name), html.escape(task["task"]), str(task["items"]), str(task["too_short"])]
            rows.append(cells + [_share(task, where) for where in ("pool", "proxy", "picks")])
    if not rows:
        return ""
    header = ["run", "task", "items", "too short", "in the pool", "in the proxy", "in the picks"]
    longest, shortest = next(iter(grams))
    caption = (
        f"Items that share {longest} words in a row with a document of the run's corpus (all words of an item of "
        f"{shortest} to {longest - 1}; fewer are too short to say). In the picks: the words lie within one sequence "
        "that the run trained on."
    )
    said = "".join(f'<p class="quiet">{html.escape(text)}</p>' for text in dict.fromkeys(notes))
    return f'<h2>Contamination</h2>{table(header, rows, range(2, len(header)))}<p class="quiet">{caption}</p>{said}'


def _share(task: Mapping[str, Any], where: str) -> str:
    count, items = task[where], task["items"] - task["too_short"]
    return "not known" if count is None else f"{count} ({count / items:.1%})" if items else str(count)
