"""Writes files with five items of every benchmark, in the columns that each has on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COUNT = 5
_SUBJECTS = ("anatomy", "astronomy", "virology", "philosophy", "anatomy")
_BBH = ("boolean_expressions", "navigate", "navigate", "sports_understanding", "web_of_lies")
_WORDS = ("river", "stone", "lamp", "garden", "window", "letter", "winter", "bread")


def word(number: int) -> str:
    return _WORDS[number % len(_WORDS)]


def _letters(number: int, count: int) -> dict[str, Any]:
    texts = [f"the {word(number + each)} of {word(number * 3 + each)}" for each in range(count)]
    letters = list("ABCDE"[:count])
    return {"choices": {"text": texts, "label": letters}, "answerKey": letters[number % count]}


def _arc(number: int) -> dict[str, Any]:
    return {"question": f"Which {word(number)} is near the {word(number + 1)}?", **_letters(number, 4)}


def _race(number: int) -> dict[str, Any]:
    options = [f"A {word(number + each)}." for each in range(4)]
    article = f"There was a {word(number)}. It lay by a {word(number + 2)}."
    return {"article": article, "question": "What lay there?", "options": options, "answer": "ABCD"[number % 4]}


def _mmlu(number: int) -> dict[str, Any]:
    choices = [word(number + each) for each in range(4)]
    return {"subject": _SUBJECTS[number], "question": f"What is {number}?", "choices": choices, "answer": number % 4}


def _wsc(number: int) -> dict[str, Any]:
    text = f"The {word(number)} did not fit the {word(number + 1)} because it was large."
    options = [f"The {word(number)}", f"The {word(number + 1)}"]
    return {"text": text, "options": options, "pronoun": "it", "pronoun_loc": text.index("it was"), "label": number % 2}


def _story(number: int) -> dict[str, Any]:
    sentences = {f"input_sentence_{each}": f"He saw a {word(number + each)}." for each in range(1, 5)}
    ends = {"sentence_quiz1": "He went home.", "sentence_quiz2": f"The {word(number)} sang."}
    return {**sentences, **ends, "answer_right_ending": 1 + number % 2}


ROWS: Mapping[str, Any] = {
    "mmlu_test": _mmlu,
    "anli_test": lambda n: {
        "round": f"r{1 + n % 3}",
        "premise": f"A {word(n)} is here.",
        "hypothesis": f"No {word(n)} is here.",
        "label": n % 3,
    },
    "hellaswag_validation": lambda n: {
        "activity_label": "Cooking",
        "ctx_a": f"A man takes the {word(n)}.",
        "ctx_b": "he",
        "endings": [f"puts it on the {word(n + each)}." for each in range(4)],
        "label": str(n % 4),
    },
    "piqa_validation": lambda n: {
        "goal": f"Clean a {word(n)}",
        "sol1": "Use a cloth.",
        "sol2": f"Use a {word(n + 2)}.",
        "label": n % 2,
    },
    "siqa_validation": lambda n: {
        "context": f"Ann gave Bob a {word(n)}.",
        "question": "Why?",
        "answerA": "to be kind",
        "answerB": "to sleep",
        "answerC": f"to see the {word(n)}",
        "label": str(1 + n % 3),
    },
    "winogrande_validation": lambda n: {
        "sentence": f"The {word(n)} broke the {word(n + 1)} because _ was hard.",
        "option1": word(n),
        "option2": word(n + 1),
        "answer": str(1 + n % 2),
    },
    "arc_easy_test": _arc,
    "arc_challenge_test": _arc,
    "commonsense_qa_validation": lambda n: {"question": f"Where is a {word(n)}?", **_letters(n, 5)},
    "wsc273_test": _wsc,
    "bbh_test": lambda n: {"task": _BBH[n], "input": f"Is a {word(n)} true?", "target": ("True", "False")[n % 2]},
    "race_middle_test": _race,
    "race_high_test": _race,
    "axb_test": lambda n: {"sentence1": f"The {word(n)} fell.", "sentence2": "Something fell.", "label": n % 2},
    "axg_test": lambda n: {"premise": f"The {word(n)} fell.", "hypothesis": "She fell.", "label": (n + 1) % 2},
    "storycloze_2016_test": _story,
    "lambada_openai_test": lambda n: {"text": f"He took the {word(n)} and walked along the {word(n + 3)}"},
}
"""Name of a file -> what makes its rows."""


def write_items(folder: Path) -> Path:
    """Write all files; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, make in ROWS.items():
        lines = [json.dumps(make(number)) + "\n" for number in range(COUNT)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder
