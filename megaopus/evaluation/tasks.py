"""Makes lm-eval's tasks: by name, with items from local files where a folder is given, by either protocol."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jinja2
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from megaopus.errors import DataError
from megaopus.evaluation import opus_protocol
from megaopus.evaluation.local_data import CHOICES, PROMPT, Items, LocalData
from megaopus.evaluation.task_list import FOLDERS, LM_EVAL, OPUS, OWN
from megaopus.settings import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Part:
    """Holds one task that lm-eval can run: a whole one, or a part of one that was asked for."""

    name: str
    group: str
    """The task asked for; ``name`` itself if it has no parts."""
    task: ConfigurableTask
    file: Path | None
    """Where the items are from; None: from where lm-eval has them."""
    weighted: bool
    """Whether a part counts in its group by its number of items; else every part counts alike."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Says how tasks are to be made."""

    protocol: str = LM_EVAL
    data: LocalData | None = None
    num_fewshot: int | None = None
    """Examples before each item; None: as each task has it."""
    seed: int = 1234
    count_tokens: Callable[[str], int] | None = None
    """Counts the tokens of a text by itself; what the protocol of the paper normalises by."""


def load_parts(names: list[str], wanted: Wanted) -> tuple[list[Part], list[str]]:
    """Make the tasks ``names``, each with all its parts; returns them, and notes on what was left out.

    Raises DataError for an unknown task, a missing file or column, and for a task that the protocol does not have.
    """
    _quiet()
    if wanted.data is not None:
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.setdefault(variable, "1")
    if wanted.protocol == OPUS and (others := [name for name in names if name not in opus_protocol.PROMPTS]):
        known = ", ".join(opus_protocol.PROMPTS)
        raise DataError(f"--protocol {OPUS} has no prompt for {others[0]}; it has {known}: ask others apart")
    index = _Index(names)
    parts, notes = [], []
    for name in names:
        leaves = list(index.leaves(name))
        made = [found for leaf in leaves if (found := _made(name, leaf, wanted)) is not None]
        if not made:
            raise DataError(f"{name}: none of its {len(leaves)} parts has an item")
        if len(made) < len(leaves):
            notes.append(f"{name}: {len(leaves) - len(made)} of its {len(leaves)} parts have no item in {made[0].file}")
        parts += made
    return parts, notes


def _quiet() -> None:
    """Leave the terminal to us: warnings that a user can do nothing about, and bars of what takes no time."""
    import lm_eval.api.model
    import lm_eval.api.task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in (lm_eval.api.task, lm_eval.api.model):
        module.tqdm = lambda iterable, **more: iterable


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A task's settings as lm-eval has them, and what made it differ from what its name says."""

    settings: dict[str, Any]
    weighted: bool = True


class _Index:
    """Finds tasks by name among lm-eval's files and ours."""

    def __init__(self, names: list[str]):
        import lm_eval.tasks

        self._factory = TaskFactory()
        root = Path(lm_eval.tasks.__file__).parent
        named = [name for name in names if name not in OWN]
        known = all(name in FOLDERS for name in named)
        paths = [root / folder for folder in dict.fromkeys(FOLDERS[name] for name in named)] if known else None
        self._entries: Mapping[str, Entry] = {}
        if paths != []:
            manager = TaskManager(include_defaults=paths is None, include_path=paths)
            self._entries = manager.task_index

    def leaves(self, name: str) -> Iterator[_Leaf]:
        """Yield the tasks that ``name`` stands for. Raises DataError if there is none of that name."""
        if name in OWN:
            yield _Leaf(settings=dict(OWN[name]))
        else:
            yield from self._of(name, {}, True)

    def _of(self, name: str, overrides: dict[str, Any], weighted: bool) -> Iterator[_Leaf]:
        entry = self._entries.get(name)
        if entry is None:
            hint = did_you_mean(name, [*self._entries, *OWN])
            raise DataError(f"no task {name!r}; {hint}'lm-eval ls tasks' lists lm-eval's, docs/evaluation.md ours")
        if entry.kind is Kind.TAG:
            for each in sorted(entry.tags):
                yield from self._of(each, overrides, weighted)
        elif entry.kind is Kind.GROUP:
            yield from self._of_group(self._factory._load_full_config(entry), overrides)
        elif entry.kind is Kind.PY_TASK:
            raise DataError(f"{name}: a task of Python code in lm-eval; only those of settings are run here")
        else:
            yield _Leaf(settings=self._factory._load_full_config(entry, overrides), weighted=weighted)

    def _of_group(self, group: Mapping[str, Any], overrides: dict[str, Any]) -> Iterator[_Leaf]:
        rules = group.get("aggregate_metric_list") or []
        rules = rules if isinstance(rules, list) else [rules]
        weighted = all(rule.get("weight_by_size", True) for rule in rules)
        for member in group["task"]:
            if isinstance(member, str):
                yield from self._of(member, overrides, weighted)
            elif isinstance(member.get("task"), list):  # a group that is written out within this one
                yield from self._of_group(member, overrides)
            else:
                more = {key: value for key, value in member.items() if key not in ("task", "group")}
                yield from self._of(member.get("task") or member["group"], overrides | more, weighted)


def _made(group: str, leaf: _Leaf, wanted: Wanted) -> Part | None:
    """Make one task; None: the file of its group has no item of it."""
    settings = {key: value for key, value in leaf.settings.items() if key not in ("tag", "group", "task_list")}
    name, items = settings["task"], None
    if wanted.num_fewshot is not None and settings.get("num_fewshot") != 0:
        settings["num_fewshot"] = wanted.num_fewshot
    if wanted.data is not None:
        items = _from_files(group, settings, wanted.data)
        if items is None:
            return None
    task = _constructed(group, settings, items, wanted)
    if wanted.protocol == OPUS:
        assert wanted.count_tokens is not None
        task.config.process_results = opus_protocol.by_token(task, wanted.count_tokens)
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=wanted.seed)
    return Part(name=name, group=group, task=task, file=items.file if items else None, weighted=leaf.weighted)


def _constructed(group: str, settings: dict[str, Any], items: Items | None, wanted: Wanted) -> ConfigurableTask:
    """Make the task by its own columns, or if its items lack them and have a whole prompt, of that."""
    name, right = settings["task"], None if items is None else items.right
    forms = [settings] if right is None else [settings, settings | _WHOLE_PROMPT | {"doc_to_target": right}]
    missing = ""
    for whole_prompt, form in enumerate(forms):
        if wanted.protocol == OPUS:
            form = form | opus_protocol.settings(group, whole_prompt=bool(whole_prompt))
        try:
            return ConfigurableTask(config=dict(form))
        except _NOT_ITS_ITEMS as error:
            missing = missing or f"{type(error).__name__}: {error}"
        except (ConnectionError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise DataError(f"{name}: its items cannot be had ({said}); --data FOLDER reads them from files") from error
    where = settings.get("dataset_path") if items is None else items.file
    raise DataError(f"{where}: not items of {name}: {missing}; docs/evaluation.md lists the columns")


def _from_files(group: str, settings: dict[str, Any], data: LocalData) -> Items | None:
    """Have a task read files; returns the items that are scored, None if the group's file has none of it."""
    name, part = settings["task"], settings.get("dataset_name")
    scored = settings.get("test_split") or settings.get("validation_split")
    if scored is None:
        raise DataError(f"{name}: names no split whose items are scored")
    items = data.items(name, group, part, scored, evaluated=True)
    if items is None:
        return None
    splits = {scored: items.rows}
    fewshot = settings.get("fewshot_config")
    given = isinstance(fewshot, dict) and "samples" in fewshot
    examples = settings.get("fewshot_split") or settings.get("training_split") or settings.get("validation_split")
    if examples and examples != scored and not given:
        if settings.get("num_fewshot") or data.has(name, group, examples):
            shots = data.items(name, group, part, examples, evaluated=False)
            splits[examples] = items.rows if shots is None else shots.rows
        else:  # none are needed
            settings["fewshot_split"] = None
    for key in ("training_split", "validation_split", "test_split"):
        if settings.get(key) not in splits:
            settings[key] = None
    settings["dataset_kwargs"] = None
    settings["custom_dataset"] = partial(_dataset, splits)
    return items


_NOT_ITS_ITEMS = (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError, SyntaxError)
"""What lm-eval raises where the first item has not the columns that its templates and functions name."""

_WHOLE_PROMPT: dict[str, Any] = {
    "doc_to_text": f"{{{{{PROMPT}}}}}",
    "doc_to_choice": CHOICES,
    "output_type": "multiple_choice",
    "description": "",
    "process_docs": None,
    "fewshot_config": None,
    "process_results": None,
    "filter_list": None,
    "generation_kwargs": None,
    "doc_to_decontamination_query": None,
    "should_decontaminate": False,
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
"""What a task's settings become where its items have a prompt: no template goes around it."""


def _dataset(splits: Mapping[str, list[dict[str, Any]]], **ignored: Any) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
