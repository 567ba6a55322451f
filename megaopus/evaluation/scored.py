"""Scores tasks with lm-eval, and makes of its results rows of a table and a line for each item."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate

from megaopus.evaluation import opus_protocol
from megaopus.evaluation.harness_model import HarnessModel
from megaopus.evaluation.items import BITS
from megaopus.evaluation.tasks import Part

_HEADLINES = (opus_protocol.NORMALISED, "acc_norm", "acc", "exact_match")
RESAMPLES = 200
"""Of a bootstrap over items, where a metric is no mean."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Holds one metric of a task or of a group of them."""

    metric: str
    n: int
    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Holds what came of one task."""

    part: Part
    num_fewshot: int
    prompts: str
    """Sixteen hexadecimal digits of a hash over all prompts and continuations."""
    scores: list[Score]
    items: list[dict[str, Any]]
    """A line for each item: what it is, and its value by every metric that is a mean over items."""


def score(part: Part, model: HarnessModel, *, limit: int | None, chat: bool, seed: int) -> Scored:
    """Run one task. Collective: every rank gets the same.

    ``limit``: items, at most, from the first. ``chat``: prompts are written as a conversation by the model's template.
    Random numbers that others draw go on as if this had not been.
    """
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        part.task.set_fewshot_seed(seed=seed)
        tasks: Any = {"tasks": {part.name: part.task}, "groups": {}}
        found: Any = evaluate(
            model,
            tasks,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
    samples = found["samples"][part.name]
    items = _items(part, samples)
    scores = _scores(part, found["results"][part.name], samples, seed)
    bits = [item[BITS] for item in items if BITS in item]
    if bits and not any(each.metric == BITS for each in scores):
        scores.append(_mean_of(BITS, bits, False))
    used = [(str(each["arguments"]), str(each["target"])) for each in samples]
    prompts = hashlib.sha256(repr(used).encode()).hexdigest()[:16]
    return Scored(
        part=part, num_fewshot=int(part.task.config.num_fewshot or 0), prompts=prompts, scores=scores, items=items
    )


def headline(scores: Sequence[Score]) -> str:
    """Name the metric that speaks for a task."""
    names = [each.metric for each in scores]
    for wanted in _HEADLINES:
        if found := [name for name in names if name.split(",")[0] == wanted]:
            return found[-1]  # of several ways to read an answer, the most lenient
    return names[0]


def of_group(parts: Sequence[Scored]) -> list[Score]:
    """Put the scores of a group's parts together, metrics that are means alone: over its items, or over its parts."""
    found = []
    for metric in dict.fromkeys(each.metric for part in parts for each in part.scores):
        of_parts = [each for part in parts for each in part.scores if each.metric == metric]
        values = [[item[metric] for item in part.items if metric in item] for part in parts]
        if len(of_parts) < len(parts) or not all(values):
            continue
        higher = of_parts[0].higher_is_better
        if all(part.part.weighted for part in parts):
            found.append(_mean_of(metric, [value for of_part in values for value in of_part], higher))
        else:
            errors = [each.stderr for each in of_parts]
            known = [each for each in errors if each is not None]
            stderr = math.hypot(*known) / len(of_parts) if len(known) == len(errors) else None
            value = sum(each.value for each in of_parts) / len(of_parts)
            n = sum(each.n for each in of_parts)
            found.append(Score(metric=metric, n=n, value=value, stderr=stderr, higher_is_better=higher))
    return found


def _mean_of(metric: str, values: Sequence[float], higher_is_better: bool) -> Score:
    count = len(values)
    stderr = float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None
    return Score(metric=metric, n=count, value=float(np.mean(values)), stderr=stderr, higher_is_better=higher_is_better)


def _names(part: Part, key: str) -> str:
    """A metric's name of lm-eval's "metric,filter": with the filter where a task has several."""
    metric, _, way = key.partition(",")
    return metric if len(part.task._filters) == 1 else f"{metric},{way}"


def _scores(part: Part, results: dict[str, Any], samples: list[dict[str, Any]], seed: int) -> list[Score]:
    found, aggregation, higher = [], part.task.aggregation(), part.task.higher_is_better()
    for key in results:
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = [sample[metric] for sample in samples if sample["filter"] == way and metric in sample]
        rule, better = aggregation.get(metric, mean), bool(higher.get(metric, True))
        if rule is mean:
            found.append(_mean_of(_names(part, key), [float(each) for each in values], better))
            continue
        stderr = _bootstrapped(rule, values, seed) if len(values) > 1 else None
        value = float(results[key])
        name = _names(part, key)
        found.append(Score(metric=name, n=len(values), value=value, stderr=stderr, higher_is_better=better))
    return found


def _bootstrapped(rule: Callable[[list[Any]], float], values: list[Any], seed: int) -> float | None:
    """Standard error of what is no mean, by drawing items anew; None where that has none."""
    generator, found = random.Random(seed), []
    for _ in range(RESAMPLES):
        found.append(float(rule(generator.choices(values, k=len(values)))))
    spread = float(np.std(found, ddof=1))
    return spread if math.isfinite(spread) else None


def _items(part: Part, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each item, whatever the number of filters."""
    found: dict[int, dict[str, Any]] = {}
    for sample in samples:
        line = found.get(sample["doc_id"])
        if line is None:
            line = {"item": sample["doc_hash"][:16], "doc_id": sample["doc_id"], "text": _text(part, sample["doc"])}
            if (bits := _bits(part, sample)) is not None:
                line[BITS] = bits
            found[sample["doc_id"]] = line
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float | np.number):
                line[_names(part, f"{metric},{sample['filter']}")] = float(sample[metric])
    return [found[number] for number in sorted(found)]


def _text(part: Part, doc: dict[str, Any]) -> str:
    """The question of an item and its right answer, without examples before it."""
    task, right = part.task, _right(part, doc)
    if task.multiple_input:
        return f"{task.doc_to_choice(doc)[right]} {task.doc_to_target(doc)}"
    answer = task.doc_to_target(doc) if right is None else task.doc_to_choice(doc)[right]
    return f"{task.doc_to_text(doc)} {answer}"


def _right(part: Part, doc: dict[str, Any]) -> int | None:
    """Number of the right answer, of several the first; None: there are no answers to choose from."""
    task = part.task
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    gold = gold[0] if isinstance(gold, list) else gold
    return task.doc_to_choice(doc).index(gold) if isinstance(gold, str) else int(gold)


def _bits(part: Part, sample: dict[str, Any]) -> float | None:
    """See ``BITS``; None for answers that are generated."""
    if part.task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return None
    place = _right(part, sample["doc"]) or 0
    logprob, continuation = sample["resps"][place][0][0], sample["arguments"][place][1]
    return -float(logprob) / math.log(2) / len(continuation.encode("utf-8"))
