"""Names the tasks that are evaluated: the suites of the OPUS paper, tasks that lm-eval lacks, where lm-eval's lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LM_EVAL, OPUS = "lm-eval", "opus"
PROTOCOLS = (LM_EVAL, OPUS)
"""lm-eval's own prompts, and those of the paper's evaluation (opus_protocol.py)."""

SUITES: Mapping[str, tuple[str, ...]] = {
    "paper10": (
        "mmlu",
        "anli",
        "hellaswag",
        "piqa",
        "social_iqa",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "commonsense_qa",
        "wsc273",
    ),
    "outside6": ("bbh_zeroshot", "race_middle", "race_high", "ax_b", "ax_g", "storycloze_2016"),
}
"""Benchmarks that the paper's proxy is drawn from, and others (arXiv 2602.05400, section 5), by lm-eval's names."""

OTHER_NAMES: Mapping[str, str] = {
    "siqa": "social_iqa",
    "wsc": "wsc273",
    "csqa": "commonsense_qa",
    "bbh": "bbh_zeroshot",
    "race_m": "race_middle",
    "race_h": "race_high",
    "axb": "ax_b",
    "axg": "ax_g",
    "storycloze": "storycloze_2016",
    "lambada": "lambada_openai",
}
"""What tasks are called too, here and in the names of files -> the task."""

FOLDERS: Mapping[str, str] = {
    "mmlu": "mmlu/default",
    "anli": "anli",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "social_iqa": "siqa",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "commonsense_qa": "commonsense_qa",
    "wsc273": "wsc273",
    "bbh_zeroshot": "bbh/zeroshot",
    "storycloze_2016": "storycloze",
    "openbookqa": "openbookqa",
    "lambada_openai": "lambada",
}
"""Task -> its folder among lm-eval's, whose thousands of files take seconds to look through."""

_ACCURACY = {"aggregation": "mean", "higher_is_better": True}
_RACE: dict[str, Any] = {
    "dataset_path": "ehovy/race",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Article: {{article}}\n\nQuestion: {{question}}\nAnswer:",
    "doc_to_choice": "options",
    "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
    "metric_list": [{"metric": "acc", **_ACCURACY}, {"metric": "acc_norm", **_ACCURACY}],
}
_AX: dict[str, Any] = {
    "dataset_path": "aps/super_glue",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_choice": ["True", "False"],
    "doc_to_target": "label",
    "metric_list": [
        {"metric": "acc", **_ACCURACY},
        {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
    ],
}
OWN: Mapping[str, dict[str, Any]] = {
    "race_middle": {"task": "race_middle", "dataset_name": "middle", **_RACE},
    "race_high": {"task": "race_high", "dataset_name": "high", **_RACE},
    "ax_b": {
        "task": "ax_b",
        "dataset_name": "axb",
        "doc_to_text": "{{sentence1}}\nQuestion: {{sentence2}} True or False?\nAnswer:",
        **_AX,
    },
    "ax_g": {
        "task": "ax_g",
        "dataset_name": "axg",
        "doc_to_text": "{{premise}}\nQuestion: {{hypothesis}} True or False?\nAnswer:",
        **_AX,
    },
}
"""Tasks of ours in lm-eval's form: the diagnostics of SuperGLUE (label 0: entailment), and RACE by school."""


def task_names(suite: str) -> list[str]:
    """Tasks of a suite, or of a list of suites and tasks with commas between them, each once, in order."""
    found: list[str] = []
    for name in filter(None, (each.strip() for each in suite.split(","))):
        found += SUITES.get(name, (OTHER_NAMES.get(name, name),))
    return list(dict.fromkeys(found))
