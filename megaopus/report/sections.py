"""Parts of the report's page, as HTML; every text from a run folder is escaped."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaopus.errors import MegaopusError
from megaopus.events import Event
from megaopus.record.formatting import format_count
from megaopus.report.choice_summary import ChoiceSummary, Standout
from megaopus.report.compare import Run

Texts = Callable[[Path, Sequence[int]], list[tuple[str, str]]]
"""(run folder, numbers of sequences) -> (their documents, their text) of each; a MegaopusError says why not."""
Name = Callable[[str], str]
"""A run's name -> the same as HTML, with its colour."""
LONGEST = 600  # characters of a text that are shown
MOST_SKIPPED = 50  # skipped updates of a run that are listed
SKIPPED = "update.skipped"
"""How the kinds of events begin that tell of an update that was not applied."""

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
.columns { columns: 2 460px; column-gap: 1.4rem; margin-top: 1.4rem; }
.columns figure { break-inside: avoid; padding-bottom: 1.2rem; }
figure { margin: 0; } img { width: 100%; max-width: 640px; height: auto; display: block; }
.documents { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 1.4rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .2rem; } h4 { font-size: .93rem; margin: .6rem 0 .2rem; }
pre { font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      background: #f6f6f6; padding: .5rem .7rem; margin: .15rem 0 .8rem; max-height: 9.5em; overflow-y: auto; }
.warn { background: #fff6e5; border-left: 4px solid #E69F00; padding: .4rem .8rem; max-width: 46rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #444; }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """An HTML table of cells that are HTML already; ``numbers``: columns aligned to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="n"' if at in numbers else "" for at in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def origins(runs: Mapping[str, Run], shown: Name) -> str:
    """Say which runs these are: where they lie, what was trained on how much, when, and by which revision."""
    header = ["run", "folder", "model", "update tokens", "started", "revision"]
    rows = []
    for name, run in runs.items():
        facts, tokens = run.environment, f"{run.steps[-1].tokens:,}" if run.steps else "–"
        started = str(facts.get("started", "–")).split("+")[0].replace("T", " ")
        cells = [str(run.path), _model(run), tokens, started, str(facts.get("git") or "–")[:10]]
        rows.append([shown(name), *map(html.escape, cells)])
    return table(header, rows, (3,))


def _model(run: Run) -> str:
    """Describe the model and its optimizer in a few words, as far as the run folder tells."""
    model, optim = run.config.get("model") or {}, run.config.get("optim") or {}
    if "num_layers" not in model or "hidden_size" not in model:
        return "–"
    count = run.environment.get("parameters")
    size = f"{format_count(count)} parameters, " if isinstance(count, int) else ""
    return f"{size}{model['num_layers']} layers of {model['hidden_size']}, {optim.get('name', '–')}"


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and text."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if item is None else str(item)
    return flat


def repeats(summaries: Mapping[str, ChoiceSummary], shown: Name) -> str:
    """Return how often sequences were trained on."""
    body = []
    for name, found in summaries.items():
        counts, total = found.counts, len(found.counts)
        if total:
            groups = (counts == 1), (counts == 2), (counts > 2) & (counts < 6), counts > 5
            row = [shown(name), f"{int(counts.sum()):,}", f"{total:,}", f"{int(counts.max())}"]
            body.append(row + [f"{group.sum() / total:.1%}" for group in groups])
    if not body:
        return ""
    header = ["run", "picks", "different sequences", "most often", "once", "twice", "3 to 5", "more"]
    caption = "Shares of the different sequences that the run trained on so many times, copies not counted as one."
    return f'<h2>Repeats</h2>{table(header, body, range(1, len(header)))}<p class="quiet">{caption}</p>'


def useful_text(
    runs: Mapping[str, Run], summaries: Mapping[str, ChoiceSummary], texts: Texts | None, shown: Name
) -> str:
    """The sequences that stood out, and what they say."""
    summaries = {name: found for name, found in summaries.items() if found.best}
    if not summaries:
        return ""
    parts = [
        "<h2>Most and least useful text</h2><p>Sequences whose utility was furthest from the mean of those scored in "
        "the same step, in standard deviations (sd). One step's view, under the weights of the day: early steps and "
        "rare tokens stand out too.</p>"
    ]
    for name, found in summaries.items():
        both = [*found.best, *found.worst]
        said: list[tuple[str, str]] = [("", "")] * len(both)
        try:
            if texts is not None:
                said = texts(runs[name].path, [each.sequence for each in both])
        except MegaopusError as error:
            parts.append(f'<p class="warn">The text of {html.escape(name)} is not shown: {html.escape(str(error))}</p>')
        told = [_document(each, *text) for each, text in zip(both, said, strict=True)]
        split = len(found.best)
        columns = (("most useful", told[:split]), ("least useful", told[split:]))
        inside = "".join(f"<div><h4>{title}</h4>{''.join(items)}</div>" for title, items in columns)
        parts.append(f'<h3>{shown(name)}</h3><div class="documents">{inside}</div>')
    return "".join(parts)


def _document(found: Standout, documents: str, text: str) -> str:
    """A sequence that stood out, as HTML."""
    picked = "picked" if found.picked else "not picked"
    facts = f"{found.deviations:+.1f} sd, utility {found.utility:.3g}, step {found.step}, {picked}; {found.domain}"
    where = f", {documents}" if documents else f", sequence {found.sequence}"
    clean = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text[:LONGEST])
    clipped = clean + ("…" if len(text) > LONGEST else "")
    body = f"<pre>{html.escape(clipped)}</pre>" if text else ""
    return f'<div class="quiet">{html.escape(facts + where)}</div>{body}'


def events(runs: Mapping[str, Run], shown: Name) -> str:
    """Return how often each kind of event came, and the first of it."""
    rows = []
    for name, run in runs.items():
        kinds: dict[str, list[tuple[int, Event]]] = {}
        for step, event in _happened(run):
            kinds.setdefault(event.kind, []).append((step, event))
        for kind, found in kinds.items():
            step, first = found[0]
            rows.append([shown(name), str(len(found)), str(step), html.escape(kind), html.escape(str(first))])
    if not rows:
        return "<h2>Events</h2><p>None was recorded.</p>"
    return f"<h2>Events</h2>{table(['run', 'times', 'first at step', 'kind', 'first of its kind'], rows, (1, 2))}"


def _happened(run: Run) -> list[tuple[int, Event]]:
    """(step, event) of a run by step; a skipped update of which no event was recorded, as in version 0.1, has one."""
    found = [(row.step, event) for row in run.selections for event in row.events] + run.events
    told = {step for step, event in run.events if event.kind.startswith(SKIPPED)}
    for record in run.steps:
        if record.skip_reason is not None and record.step not in told:
            found.append((record.step, Event(SKIPPED, f"update skipped: {record.skip_reason}")))
    return sorted(found, key=lambda pair: pair[0])


def skipped_updates(runs: Mapping[str, Run], shown: Name) -> str:
    """Every update that was not applied, with its reason; of many, the first of each run."""
    rows, hidden = [], 0
    for name, run in runs.items():
        skipped = [record for record in run.steps if record.skip_reason is not None]
        hidden += max(0, len(skipped) - MOST_SKIPPED)
        for record in skipped[:MOST_SKIPPED]:
            numbers = [str(record.step), f"{record.loss:.4g}", f"{record.grad_norm:.4g}"]
            rows.append([shown(name), *numbers, html.escape(str(record.skip_reason))])
    if not rows:
        return ""
    more = f'<p class="quiet">{hidden} more are in metrics.jsonl.</p>' if hidden else ""
    header = ["run", "step", "loss", "gradient norm", "reason"]
    return f"<h2>Skipped updates</h2>{table(header, rows, (1, 2, 3))}{more}"


def settings(runs: Mapping[str, Run]) -> str:
    """Return where the runs differ, and all settings folded away."""
    flat = {name: flatten(each.config) for name, each in runs.items()}
    missing = [name for name, settings in flat.items() if not settings]
    text = f"<p>No config.yaml in: {html.escape(', '.join(missing))}.</p>" if missing else ""
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    parts = [text] if text else []
    header = ["setting", *(html.escape(name) for name in flat)]

    def row(key: str) -> list[str]:
        return [html.escape(key), *(html.escape(settings.get(key, "–")) for settings in flat.values())]

    if len(flat) > 1:
        differing = (key for key in keys if len({settings.get(key) for settings in flat.values()}) > 1)
        different = [key for key in differing if key not in ("run_dir", "seed")]
        parts.append(table(header, [row(key) for key in different]) if different else "<p>The same in all runs.</p>")
    whole = table(header, [row(key) for key in keys])
    parts.append(f"<details><summary>All {len(keys)} settings</summary>{whole}</details>" if keys else "")
    heading = "Settings that differ" if len(flat) > 1 else "Settings"
    return f"<h2>{heading}</h2>{''.join(parts)}"


def environment(runs: Mapping[str, Run]) -> str:
    """Return where and from what the runs were made."""
    flat = {name: flatten(each.environment) for name, each in runs.items()}
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
    inside = table(["", ""], rows)
    return f"<h2>Environment</h2><details><summary>Machine, versions and commands</summary>{inside}</details>"
