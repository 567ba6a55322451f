"""Asks the ten benchmarks of the OPUS paper as its evaluation does, which lm-eval's prompts are not.

The paper's figures are of a lighteval set-up: the question alone is the prompt (no "Question:", no "Answer:", no
letters), every answer is a continuation of it in its own words, encoded apart from the prompt, and the answer with the
largest log-probability per token is the choice. What the paper does not print, the exact words, is pinned here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NORMALISED = "acc_token"
"""Share of items whose right answer has the largest log-probability per token."""
_WRAPPED = re.compile(r"Question: (.*)\nAnswer:", re.DOTALL)


def _bare(doc: Mapping[str, Any]) -> str:
    """The question of a prompt that is whole already."""
    return match[1] if (match := _WRAPPED.fullmatch(doc["query"])) else doc["query"]


def _before_blank(doc: Mapping[str, Any]) -> str:
    return doc["sentence"].split("_")[0].strip()


def _filled(doc: Mapping[str, Any]) -> list[str]:
    after = doc["sentence"].split("_", 1)[1]
    return [doc[name] + after for name in ("option1", "option2")]


def _before_pronoun(doc: Mapping[str, Any]) -> str:
    return doc["text"][: doc["pronoun_loc"]].strip()


def _with_noun(doc: Mapping[str, Any]) -> list[str]:
    after = doc["text"][doc["pronoun_loc"] + len(doc["pronoun"]) :]
    return [option + after for option in doc["options"]]


PROMPTS: Mapping[str, dict[str, Any]] = {
    "mmlu": {"doc_to_text": "{{question.strip()}}", "doc_to_choice": "choices", "doc_to_target": "answer"},
    "anli": {"doc_to_text": "{{premise}}\nQuestion: {{hypothesis}} True, False, or Neither?\nAnswer:"},
    "hellaswag": {"doc_to_text": "{{query}}"},
    "piqa": {"doc_to_text": "{{goal}}"},
    "social_iqa": {"doc_to_text": "{{context}} {{question}}"},
    "winogrande": {
        "doc_to_text": _before_blank,
        "doc_to_choice": _filled,
        "doc_to_target": "{{['1', '2'].index(answer|string)}}",
    },
    "arc_easy": {"doc_to_text": "{{question}}"},
    "arc_challenge": {"doc_to_text": "{{question}}"},
    "commonsense_qa": {
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
    },
    "wsc273": {"doc_to_text": _before_pronoun, "doc_to_choice": _with_noun, "doc_to_target": "label"},
}
"""Task -> what of lm-eval's settings of it is another: prompt, and where they differ answers and right answer."""

_MEAN = {"aggregation": "mean", "higher_is_better": True}


def settings(task: str, *, whole_prompt: bool) -> dict[str, Any]:
    """Return what replaces lm-eval's settings of a task; ``whole_prompt``: its items have a prompt already."""
    found = {"doc_to_text": _bare} if whole_prompt else PROMPTS[task]
    return {
        "description": "",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "process_results": _unset,
        "metric_list": [{"metric": "acc", **_MEAN}, {"metric": NORMALISED, **_MEAN}],
        **found,
    }


def _unset(doc: Mapping[str, Any], results: Any) -> dict[str, float]:
    raise AssertionError("by_token takes its place once the task is made")


def by_token(task: Any, count: Callable[[str], int]) -> Callable[[Mapping[str, Any], Any], dict[str, float]]:
    """Return how an item of a made task is scored; ``count`` counts the tokens of a continuation encoded by itself."""

    def scored(doc: Mapping[str, Any], results: Any) -> dict[str, float]:
        logprobs = np.array([logprob for logprob, _ in results])
        gold, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        tokens = np.array([count(f" {choice}") for choice in choices])
        gold = choices.index(gold) if isinstance(gold, str) else int(gold)
        return {"acc": float(logprobs.argmax() == gold), NORMALISED: float((logprobs / tokens).argmax() == gold)}

    return scored
