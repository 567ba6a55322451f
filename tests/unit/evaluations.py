"""Writes evaluations by hand, in the form that they have in run folders, and makes up those of simulated runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.evaluation.differences import RunScores
from megaopus.evaluation.items import Evaluation, Items, Score

ItemRows = Sequence[Mapping[str, Any]]
"""Of one task: by metric what each item adds, and its "text"."""


def score_rows(task: str, items: ItemRows, **facts: Any) -> list[dict[str, Any]]:
    """The rows of a task with these items; ``facts``: what is otherwise than usual."""
    rows = []
    for metric in [name for name in items[0] if name != "text"]:
        values = np.array([each[metric] for each in items], dtype=float)
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        row = {"task": task, "metric": metric, "n": len(values), "value": float(values.mean()), "stderr": error}
        row |= {"higher_is_better": metric != "bits_per_byte", "headline": metric == "acc", "num_fewshot": 0}
        row |= {"seed": 1234, "prompts": "0123456789abcdef", "protocol": "lm-eval", "part_of": None}
        rows.append(row | facts)
    return rows


def write_items(folder: Path, task: str, items: ItemRows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{task}.jsonl").open("w") as out:
        for number, item in enumerate(items):
            text = item.get("text", f"{task} question {number}")
            name = hashlib.sha256(text.encode()).hexdigest()[:16]
            out.write(json.dumps({"item": name, "doc_id": number, "text": text, **item}) + "\n")


def write_evaluation(
    run: Path, tasks: Mapping[str, ItemRows], *, step: int = 100, perplexity: Sequence[Any] = (), **facts: Any
) -> None:
    """RUN/eval.json and its items; ``facts``: of every row."""
    run.mkdir(parents=True, exist_ok=True)
    rows = []
    for task, items in tasks.items():
        rows += score_rows(task, items, **facts)
        write_items(run / "eval_items", task, items)
    content = {"format": 1, "model": str(run), "step": step, "protocol": "lm-eval", "settings": {}, "rows": rows}
    run.joinpath("eval.json").write_text(json.dumps(content | {"perplexity": list(perplexity)}))


def add_history(run: Path, step: int, tasks: Mapping[str, ItemRows], *, tokens: int = 0, **facts: Any) -> None:
    """One evaluation during training."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "eval.jsonl").open("a") as out:
        for task, items in tasks.items():
            write_items(run / "eval_items" / f"step_{step:08d}", task, items)
            for row in score_rows(task, items, **facts):
                out.write(json.dumps({"step": step, "tokens": tokens, "time_s": 1.0} | row) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated(Evaluation):
    """An evaluation whose items are in memory."""

    held: Mapping[str, Items]

    def items(self, task: str) -> Items | None:
        return self.held[task]


def simulated(step: int, values: Mapping[str, np.ndarray]) -> Simulated:
    """An evaluation with these accuracies (n,) of the items of each task."""
    scores, held = {}, {}
    for task, correct in values.items():
        names = tuple(map(str, range(len(correct))))
        held[task] = Items(names, {"acc": correct})
        error = float(correct.std(ddof=1) / np.sqrt(len(correct)))
        scores[task, "acc"] = Score(
            task=task,
            metric="acc",
            n=len(correct),
            value=float(correct.mean()),
            stderr=error,
            higher_is_better=True,
            headline=True,
            protocol="lm-eval",
            prompts="p",
        )
    return Simulated(path=Path("simulated"), step=step, scores=scores, items_folder=Path("simulated"), held=held)


def simulated_arms(
    random: np.random.Generator,
    *,
    runs: int,
    tasks: int = 1,
    items: int = 400,
    checkpoints: int = 5,
    correlation: float = 0.5,
    noise: float = 0.15,
    rise: float = 0.05,
    final: bool = False,
) -> list[RunScores]:
    """Runs of one configuration on the same items, each with training noise of its own.

    An item's log-odds of a right answer are the run's ability on its task less the item's difficulty. Abilities rise
    by ``rise`` a checkpoint and wander about that: a first-order autoregression with standard deviation ``noise`` and
    ``correlation`` between neighbours, half of its variance common to all tasks. What a model happens to know of each
    item persists (a correlation of .8 between neighbours).
    """
    difficulty = random.normal(size=(tasks, items))
    found = []
    for number in range(runs):
        common, own = (_wander(random, checkpoints, correlation, shape) for shape in ((1, 1), (tasks, 1)))
        ability = noise * (common + own) / np.sqrt(2)
        ability = ability + rise * np.arange(checkpoints)[:, None, None]
        luck = _wander(random, checkpoints, 0.8, (tasks, items))  # standard normal, for a logistic one below
        odds = ability - difficulty
        correct = (np.log(_uniform(luck) / (1 - _uniform(luck))) < odds).astype(float)
        history = [simulated(step, {f"task{t}": correct[step, t] for t in range(tasks)}) for step in range(checkpoints)]
        found.append(RunScores(f"run{number}", history[-1] if final else None, history))
    return found


def _wander(random: np.random.Generator, steps: int, correlation: float, shape: tuple[int, ...]) -> np.ndarray:
    """(steps, *shape) of a stationary first-order autoregression of variance 1."""
    found = [random.normal(size=shape)]
    for _ in range(steps - 1):
        found.append(correlation * found[-1] + np.sqrt(1 - correlation**2) * random.normal(size=shape))
    return np.stack(found)


def _uniform(normal: np.ndarray) -> np.ndarray:
    """The normal distribution function, by its logistic approximation (Bowling et al. 2009), off by .0001 at most."""
    return 1 / (1 + np.exp(-(0.07056 * normal**3 + 1.5976 * normal)))
