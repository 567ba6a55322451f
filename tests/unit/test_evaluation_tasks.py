"""Says what each protocol asks, word for word; where items come from; what is said of bad files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megaopus.errors import DataError
from megaopus.evaluation.local_data import LocalData
from megaopus.evaluation.opus_protocol import NORMALISED
from megaopus.evaluation.results import Results
from megaopus.evaluation.scored import Score, Scored, headline, of_group
from megaopus.evaluation.task_list import LM_EVAL, OPUS, SUITES, task_names
from megaopus.evaluation.tasks import Part, Wanted, load_parts
from tests.evaluation_items import ROWS, write_items

OPUS_ASKS: Mapping[str, tuple[str, list[str], int]] = {
    "mmlu": ("What is 0?", [" river", " stone", " lamp", " garden"], 0),
    "anli": (
        "A river is here.\nQuestion: No river is here. True, False, or Neither?\nAnswer:",
        [" True", " Neither", " False"],
        0,
    ),
    "hellaswag": (
        "Cooking: A man takes the river. He",
        [" puts it on the river.", " puts it on the stone.", " puts it on the lamp.", " puts it on the garden."],
        0,
    ),
    "piqa": ("Clean a river", [" Use a cloth.", " Use a lamp."], 0),
    "social_iqa": ("Ann gave Bob a river. Why?", [" to be kind", " to sleep", " to see the river"], 0),
    "winogrande": ("The river broke the stone because", [" river was hard.", " stone was hard."], 0),
    "arc_easy": (
        "Which river is near the stone?",
        [" the river of river", " the stone of stone", " the lamp of lamp", " the garden of garden"],
        0,
    ),
    "arc_challenge": (
        "Which river is near the stone?",
        [" the river of river", " the stone of stone", " the lamp of lamp", " the garden of garden"],
        0,
    ),
    "commonsense_qa": (
        "Where is a river?",
        [
            " the river of river",
            " the stone of stone",
            " the lamp of lamp",
            " the garden of garden",
            " the window of window",
        ],
        0,
    ),
    "wsc273": (
        "The river did not fit the stone because",
        [" the river was large.", " the stone was large."],
        0,
    ),
}
"""Task -> (prompt, continuations, number of the right one) of its first item by the protocol of the paper."""
LM_EVAL_ASKS: Mapping[str, tuple[str, str]] = {
    "arc_easy": ("Question: Which river is near the stone?\nAnswer:", " the river of river"),
    "race_middle": ("Article: There was a river. It lay by a lamp.\n\nQuestion: What lay there?\nAnswer:", " A river."),
    "ax_b": ("The river fell.\nQuestion: Something fell. True or False?\nAnswer:", " True"),
    "ax_g": ("The river fell.\nQuestion: She fell. True or False?\nAnswer:", " True"),
    "lambada_openai": ("He took the river and walked along the", " garden"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items"))


def parts_of(names: list[str], folder: Path, **more: Any) -> dict[str, Part]:
    """The first part of each task."""
    parts, _ = load_parts(names, Wanted(data=LocalData(folder), count_tokens=lambda text: len(text.split()), **more))
    return {part.group: part for part in reversed(parts)}


def first(part: Part) -> list[tuple[str, str]]:
    part.task.build_all_requests(limit=1)
    return [instance.args for instance in part.task.instances]


def test_the_protocol_of_the_paper_asks_the_question_alone(data: Path) -> None:
    assert OPUS_ASKS.keys() == set(SUITES["paper10"])
    for name, part in parts_of(list(OPUS_ASKS), data, protocol=OPUS).items():
        prompt, continuations, right = OPUS_ASKS[name]
        assert first(part) == [(prompt, continuation) for continuation in continuations], name
        # by tokens, here words: the right answer is the better one per token though not as a whole
        count = [len(each.split()) for each in continuations]
        logprobs = [-1.0 * words for words in count]
        logprobs[right] = -0.9 * count[right]
        whole = max(range(len(count)), key=lambda place: (logprobs[place], -place))
        doc = part.task.eval_docs[0]
        found = part.task.process_results(doc, [(each, False) for each in logprobs])
        assert found == {"acc": float(whole == right), NORMALISED: 1.0}, name


def test_lm_evals_protocol_and_our_tasks_are_asked_word_for_word(data: Path) -> None:
    parts = parts_of(list(LM_EVAL_ASKS), data, protocol=LM_EVAL)
    assert {name: first(parts[name])[0] for name in LM_EVAL_ASKS} == dict(LM_EVAL_ASKS)


def test_items_with_a_whole_prompt_get_no_template(tmp_path: Path) -> None:
    row = {"query": "Question: Is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
    (tmp_path / "arc_easy_test.jsonl").write_text(json.dumps(row) + "\n")
    for protocol, prompt in ((LM_EVAL, row["query"]), (OPUS, "Is it?")):
        part = parts_of(["arc_easy"], tmp_path, protocol=protocol)["arc_easy"]
        assert first(part) == [(prompt, " yes"), (prompt, " no")]
        assert part.task.doc_to_target(part.task.eval_docs[0]) == 1


def test_files_are_found_by_other_names_and_forms(tmp_path: Path) -> None:
    rows = [ROWS["commonsense_qa_validation"](number) for number in range(3)]
    with gzip.open(tmp_path / "csqa_val.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([ROWS["hellaswag_validation"](number) for number in range(4)]),
        tmp_path / "hellaswag_val_subset.parquet",
    )
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(ROWS["arc_easy_test"](0)) + "\n")
    parts = parts_of(["commonsense_qa", "hellaswag", "arc_easy"], tmp_path)
    assert {name: len(part.task.eval_docs) for name, part in parts.items()} == {
        "commonsense_qa": 3,
        "hellaswag": 4,
        "arc_easy": 1,
    }


def test_examples_before_an_item_come_from_their_own_split(data: Path, tmp_path: Path) -> None:
    rows = [json.dumps(ROWS["arc_easy_test"](number)) + "\n" for number in range(4)]
    (tmp_path / "arc_easy_test.jsonl").write_text(rows[0])
    with pytest.raises(DataError, match=r"no file arc_easy_train.jsonl.*few-shot examples are of its split train"):
        parts_of(["arc_easy"], tmp_path, num_fewshot=2)
    (tmp_path / "arc_easy_train.jsonl").write_text("".join(rows[1:]))
    prompt, _ = first(parts_of(["arc_easy"], tmp_path, num_fewshot=2)["arc_easy"])[0]
    assert prompt.count("Question:") == 3
    assert prompt.endswith("Question: Which river is near the stone?\nAnswer:")
    again, _ = first(parts_of(["arc_easy"], tmp_path, num_fewshot=2)["arc_easy"])[0]
    assert again == prompt


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no file piqa_validation.jsonl \(\[.gz\], or .parquet\) for task piqa"),
        ({"piqa_val_a.jsonl": "{}", "piqa_val_b.jsonl": "{}"}, "several files may be the validation split of piqa"),
        ({"piqa_val.jsonl": ""}, "piqa_val.jsonl: no item in it"),
        ({"piqa_val.jsonl": '{"goal": 1}\nnot'}, "piqa_val.jsonl, line 2: cannot be read"),
        ({"piqa_val.jsonl": "[1]"}, "piqa_val.jsonl, line 1: not an object"),
        ({"piqa_val.jsonl": '{"goal": "a"}'}, "piqa_val.jsonl: not items of piqa: "),
        ({"piqa_val.jsonl": '{"goal": "a"}\n{}'}, "piqa_val.jsonl, item 2: no 'goal', which the first has"),
        ({"piqa_val.parquet": "x"}, "piqa_val.parquet: not a whole Parquet file"),
    ],
)
def test_bad_files_are_told(files: Mapping[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        parts_of(["piqa"], tmp_path)


def test_a_groups_file_must_say_whose_an_item_is(tmp_path: Path) -> None:
    (tmp_path / "mmlu_test.jsonl").write_text('{"question": "a", "choices": ["b", "c", "d", "e"], "answer": 0}\n')
    with pytest.raises(DataError, match=r"no column .subject, .* says which part of mmlu an item is of"):
        parts_of(["mmlu"], tmp_path)


def test_the_protocol_of_the_paper_has_its_ten_tasks_alone(data: Path) -> None:
    with pytest.raises(DataError, match="--protocol opus has no prompt for race_high"):
        load_parts(["race_high"], Wanted(protocol=OPUS, data=LocalData(data)))


def test_names_of_suites_and_tasks_are_one_list() -> None:
    assert task_names("outside6, arc_easy,bbh") == [*SUITES["outside6"], "arc_easy"]


def scored(name: str, values: list[float], weighted: bool) -> Scored:
    part = Part(name=name, group="all", task=None, file=None, weighted=weighted)  # type: ignore[arg-type]
    own = Score(metric="acc", n=len(values), value=sum(values) / len(values), stderr=0.1, higher_is_better=True)
    return Scored(part=part, num_fewshot=0, prompts="", scores=[own], items=[{"acc": value} for value in values])


def test_a_group_counts_its_items_or_its_parts() -> None:
    parts = {weighted: [scored("a", [1, 1, 1], weighted), scored("b", [0], weighted)] for weighted in (True, False)}
    by_items, by_parts = (of_group(each)[0] for each in parts.values())
    assert (by_items.value, by_items.n) == (0.75, 4)
    assert by_items.stderr == pytest.approx(0.25)
    assert (by_parts.value, by_parts.stderr) == (0.5, pytest.approx(0.02**0.5 / 2))


def test_the_headline_is_the_metric_that_is_normalised() -> None:
    def named(*names: str) -> list[Score]:
        return [Score(metric=name, n=1, value=0, stderr=None, higher_is_better=True) for name in names]

    assert headline(named("acc", "acc_norm", "bits_per_byte")) == "acc_norm"
    assert headline(named("perplexity", "acc")) == "acc"
    assert headline(named("exact_match,strict-match", "exact_match,flexible-extract")).endswith("flexible-extract")


def test_a_kill_while_parts_are_taken_over_loses_none(tmp_path: Path) -> None:
    """Of a group with two parts, both done: the second is still there after the first has been written again."""
    file = tmp_path / "eval.json"
    about = {"model": "m", "weights": "w", "step": None, "protocol": LM_EVAL, "settings": {"seed": 1}}
    first, second = scored("a", [1, 1, 0], True), scored("b", [0, 1], True)
    results = Results(file, about)
    for each in (first, second):
        results.add_new(each, "key")
    whole = json.loads(file.read_text())
    again = Results(file, about)
    found = again.kept(first.part, "key")
    assert found is not None
    again.add_new(found, "key")  # and no more: killed
    after = Results(file, about)
    for each in (first, second):
        kept = after.kept(each.part, "key")
        assert kept is not None
        assert kept.items == each.items
        after.add(kept, "key")
    assert after.write() == whole
