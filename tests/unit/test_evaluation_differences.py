"""Differences of evaluations: paired by item, and told only where they are more than noise."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaopus.errors import DataError
from megaopus.evaluation.differences import NotComparable, RunScores, compare_scores, read_scores
from megaopus.evaluation.items import item_texts, read_evaluation, read_history, read_items
from megaopus.evaluation.noise import (
    CHECKPOINTS,
    CORRELATION,
    SEEDS,
    Difference,
    Noise,
    Verdict,
    bootstrap_interval,
    noise_between_checkpoints,
    noise_between_seeds,
    student_t_p,
)
from tests.unit.evaluations import add_history, score_rows, simulated, simulated_arms, write_evaluation, write_items

TOLD = (Verdict.BETTER, Verdict.WORSE)


def answers(seed: int, items: int = 40, share: float = 0.5, task: str = "q") -> list[dict[str, float | str]]:
    random = np.random.default_rng(seed)
    return [
        {"text": f"{task} {n}", "acc": float(random.random() < share), "bits_per_byte": float(random.normal(2, 0.3))}
        for n in range(items)
    ]


def run_of(folder: Path) -> RunScores:
    found = read_scores(folder)
    assert found is not None
    return found


# -- what is told ------------------------------------------------------------------------------------------------------


def crowned(pairs: int, **arms: float) -> tuple[int, int]:
    """(pairs of one configuration's runs in which any score is told apart, how many would be by items alone)."""
    random, found, by_items = np.random.default_rng(0), 0, 0
    for _ in range(pairs):
        first, second = simulated_arms(random, runs=2, **arms)  # type: ignore[arg-type]
        differences, _ = compare_scores([first], [second], resamples=0)
        found += any(each.verdict(len(differences)) in TOLD for each in differences)
        by_items += any(abs(each.value) > 1.96 * (each.items_stderr or 0) for each in differences)
    return found, by_items


@pytest.mark.parametrize(
    ("pairs", "arms"),
    [(120, {"noise": 0.5}), (60, {"noise": 0.5, "final": True}), (30, {"noise": 0.3, "tasks": 5, "items": 120})],
    ids=["mean of the last", "final", "many tasks"],
)
def test_no_winner_between_two_seeds(pairs, arms):
    found, by_items = crowned(pairs, **arms)
    assert found <= 0.05 * pairs
    assert by_items > 0.2 * pairs, "the runs have no training noise, so that the case shows nothing"


def test_no_winner_between_arms_of_three_seeds():
    random, found = np.random.default_rng(1), 0
    for _ in range(40):
        runs = simulated_arms(random, runs=6, items=100, noise=0.5)
        differences, _ = compare_scores(runs[:3], runs[3:], resamples=0)
        assert differences[0].noise is not None
        assert differences[0].noise.source == SEEDS
        found += differences[0].verdict() in TOLD
    assert found <= 2


def test_three_standard_errors_are_always_told():
    """The observed difference is planted: with a true one noise is against it as often as for it, whatever the rule."""
    random = np.random.default_rng(2)
    for _ in range(40):
        first, second = simulated_arms(random, runs=2, items=100, noise=0.5)
        (difference,), _ = compare_scores([first], [second], resamples=0)
        error = difference.stderr
        assert error is not None
        for looked_at in (1, 20, 500):
            assert replace(difference, value=3 * error).verdict(looked_at) is Verdict.BETTER
            assert replace(difference, value=-3 * error).verdict(looked_at) is Verdict.WORSE
            assert replace(difference, value=1.9 * error).verdict(looked_at) is Verdict.NOISE


def difference(value: float, noise: Noise | None, items_stderr: float | None = 0.01) -> Difference:
    return Difference(
        task="q",
        metric="bits_per_byte",
        higher_is_better=False,
        headline=False,
        n=1000,
        value=value,
        items_stderr=items_stderr,
        interval=None,
        paired=True,
        noise=noise,
    )


def test_verdicts():
    quiet, loud = (Noise(CHECKPOINTS, ((std**2 / 2, 4), (std**2 / 2, 4))) for std in (1e-4, 0.1))
    assert difference(-0.04, quiet).verdict() is Verdict.BETTER  # lower is better
    assert difference(0.04, quiet).verdict() is Verdict.WORSE
    assert difference(0.04, loud).verdict() is Verdict.NOISE  # it holds against items, not against training
    assert difference(0.04, None).verdict() is Verdict.UNKNOWN
    assert difference(0.01, None).verdict() is Verdict.NOISE
    assert difference(0.04, quiet, items_stderr=0.0).verdict() is Verdict.NOISE  # five items, all of them alike
    assert difference(0.04, quiet, items_stderr=None).verdict() is Verdict.NOISE
    assert difference(0.025, quiet).verdict(1) is Verdict.WORSE
    assert difference(0.025, quiet).verdict(20) is Verdict.NOISE
    seeds = Noise(SEEDS, ((1e-8, 2),))  # two seeds each: t of two degrees of freedom, 4.3 standard errors
    assert difference(0.042, seeds).verdict() is Verdict.NOISE
    assert difference(0.044, seeds).verdict() is Verdict.WORSE


def test_noise_is_the_spread_between_checkpoints_or_seeds():
    """By simulation of scores alone: the estimates are the variances that differences have."""
    random = np.random.default_rng(3)
    chol = np.linalg.cholesky(np.full((5, 5), CORRELATION) + (1 - CORRELATION) * np.eye(5))
    scores = random.normal(size=(800, 2, 5)) @ chol.T
    for compared in (1, 5):
        estimated = np.mean([noise_between_checkpoints(pair[:, None], compared).std ** 2 for pair in scores])
        means = scores[:, :, -compared:].mean(axis=2)
        assert estimated == pytest.approx(np.var(means[:, 1] - means[:, 0]), rel=0.12)
    seeds = random.normal(size=(2000, 5))
    pairs = [(each[:2].tolist(), each[2:].tolist()) for each in seeds]
    estimated = np.mean([noise_between_seeds(pair).std ** 2 for pair in pairs])
    assert estimated == pytest.approx(np.var(seeds[:, :2].mean(axis=1) - seeds[:, 2:].mean(axis=1)), rel=0.12)


def test_training_noise_takes_evaluations_enough():
    runs = simulated_arms(np.random.default_rng(4), runs=2, checkpoints=4, noise=3.0)
    (found,), _ = compare_scores(runs[:1], runs[1:])
    assert found.noise is None
    assert found.verdict() not in TOLD


def test_t_of_many_degrees_of_freedom_is_normal():
    assert student_t_p(2.0, 1e4) == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=1e-3)


# -- pairing -----------------------------------------------------------------------------------------------------------


def test_paired_by_item_in_any_order_with_equal_items(tmp_path):
    first, second = answers(0), answers(1)
    for rows in (first, second):
        rows[7]["text"] = rows[3]["text"]  # two items of one text: the first is paired with the first
    write_evaluation(tmp_path / "a", {"q": first})
    turned = [second[n] for n in (*range(3, 40), 0, 1, 2)]  # keeps the order of the two
    write_evaluation(tmp_path / "b", {"q": turned})
    found, refused = compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "b")])
    assert refused == []
    assert [each.metric for each in found] == ["acc", "bits_per_byte"]
    for each in found:
        gaps = [float(b[each.metric]) - float(a[each.metric]) for a, b in zip(first, second, strict=True)]
        mean = math.fsum(gaps) / 40
        error = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / 39 / 40)
        assert each.value == pytest.approx(mean, abs=1e-12)
        assert each.items_stderr == pytest.approx(error, rel=1e-12)
        assert each.paired
        assert each.n == 40
        assert each.interval is not None
        assert each.interval[0] == pytest.approx(mean - 1.96 * error, abs=0.4 * error)
        assert each.interval[1] == pytest.approx(mean + 1.96 * error, abs=0.4 * error)


def test_bootstrap_of_weighted_parts_is_seeded():
    random = np.random.default_rng(5)
    parts = [(0.75, random.normal(1.0, 1.0, 300)), (0.25, random.normal(-1.0, 2.0, 100))]
    low, high = bootstrap_interval(parts, seed=1, resamples=2000)
    assert (low, high) == bootstrap_interval(parts, seed=1, resamples=2000)
    assert (low, high) != bootstrap_interval(parts, seed=2, resamples=2000)
    mean = sum(weight * values.mean() for weight, values in parts)
    error = math.sqrt(sum(weight**2 * values.var() / len(values) for weight, values in parts))
    assert (low, high) == (
        pytest.approx(mean - 1.96 * error, abs=0.2 * error),
        pytest.approx(mean + 1.96 * error, abs=0.2 * error),
    )


@pytest.mark.parametrize("mean_over", ["items", "parts"])
def test_a_group_is_paired_by_the_items_of_its_parts(tmp_path, mean_over):
    weights = (0.8, 0.2) if mean_over == "items" else (0.5, 0.5)
    runs, parts = [], []
    for seed in (0, 10):
        tasks = {"x": answers(seed, 40, task="x"), "y": answers(seed + 1, 10, task="y")}
        run = tmp_path / str(seed)
        write_evaluation(run, tasks, part_of="xy")
        content = json.loads((run / "eval.json").read_text())
        of_part = {row["task"]: row for row in content["rows"] if row["metric"] == "acc"}
        value = sum(w * of_part[task]["value"] for w, task in zip(weights, "xy", strict=True))
        group = of_part["x"] | {"task": "xy", "n": 50, "value": value, "part_of": None}
        (run / "eval.json").write_text(json.dumps(content | {"rows": [group, *content["rows"]]}))
        runs.append(run_of(run))
        parts.append([np.array([float(item["acc"]) for item in tasks[task]]) for task in "xy"])
    (found,), _ = compare_scores(runs[:1], runs[1:])
    gaps = [second - first for first, second in zip(*parts, strict=True)]
    error = math.sqrt(sum(w**2 * gap.var(ddof=1) / len(gap) for w, gap in zip(weights, gaps, strict=True)))
    assert found.paired
    assert found.task == "xy"
    assert found.value == pytest.approx(sum(w * gap.mean() for w, gap in zip(weights, gaps, strict=True)))
    assert found.items_stderr == pytest.approx(error)


def test_parts_of_one_item_are_one_sample_with_the_others(tmp_path):
    runs, values = [], []
    for seed in (0, 10):
        tasks = {name: answers(seed + at, n, task=name) for at, (name, n) in enumerate((("x", 9), ("y", 1)))}
        write_evaluation(tmp_path / str(seed), tasks, part_of="xy")
        content = json.loads((tmp_path / str(seed) / "eval.json").read_text())
        values.append(np.array([float(item["bits_per_byte"]) for each in tasks.values() for item in each]))
        row = next(row for row in content["rows"] if row["metric"] == "bits_per_byte")
        group = row | {"task": "xy", "n": 10, "value": float(values[-1].mean()), "part_of": None}
        (tmp_path / str(seed) / "eval.json").write_text(json.dumps(content | {"rows": [group, *content["rows"]]}))
        runs.append(run_of(tmp_path / str(seed)))
    (found,), _ = compare_scores(runs[:1], runs[1:])
    gaps = values[1] - values[0]
    assert (found.value, found.items_stderr) == (
        pytest.approx(gaps.mean()),
        pytest.approx(gaps.std(ddof=1) / math.sqrt(10)),
    )


def test_the_average_over_tasks(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    sets = [{task: answers(seed + at, 30, task=task) for at, task in enumerate("uvw")} for seed in (0, 10)]
    for folder, tasks in zip(folders, sets, strict=True):
        write_evaluation(folder, tasks)
    found, _ = compare_scores([run_of(folders[0])], [run_of(folders[1])])
    assert [(each.task, each.metric) for each in found[:2]] == [
        ("average of 3 tasks", "acc"),
        ("average of 3 tasks", "bits_per_byte"),
    ]
    for average in found[:2]:
        gaps = [
            np.array([float(b[average.metric]) - float(a[average.metric]) for a, b in zip(*rows, strict=True)])
            for rows in zip(sets[0].values(), sets[1].values(), strict=True)
        ]
        assert average.value == pytest.approx(np.mean([gap.mean() for gap in gaps]))
        assert average.items_stderr == pytest.approx(math.sqrt(sum(gap.var(ddof=1) / 30 for gap in gaps)) / 3)


def test_a_score_that_is_no_mean_of_items_is_not_paired(tmp_path):
    """A perplexity: the mean is taken over logarithms."""
    for name, seed in (("a", 0), ("b", 1)):
        items = [{"text": f"{n}", "perplexity": n + seed} for n in range(5)]
        write_evaluation(tmp_path / name, {"q": items}, value=math.e**seed, stderr=0.3, higher_is_better=False)
    (found,), _ = compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "b")])
    assert not found.paired
    assert found.interval is None
    assert (found.value, found.items_stderr) == (pytest.approx(math.e - 1), pytest.approx(math.hypot(0.3, 0.3)))


def test_without_items_the_scores_errors_stand(tmp_path):
    write_evaluation(tmp_path / "a", {"q": answers(0)})
    write_evaluation(tmp_path / "b", {"q": answers(1)})
    (tmp_path / "b/eval_items/q.jsonl").unlink()
    found, _ = compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "b")])
    errors = [read_evaluation(tmp_path / name / "eval.json").scores["q", "acc"].stderr for name in "ab"]
    assert not found[0].paired
    assert found[0].items_stderr == pytest.approx(math.hypot(*map(float, map(str, errors))))


def test_the_last_evaluations_of_training_are_averaged_item_by_item(tmp_path):
    sets = {name: [answers(seed + step, 20) for step in range(7)] for name, seed in (("a", 0), ("b", 50))}
    for name, evaluations in sets.items():
        for step, items in enumerate(evaluations):
            add_history(tmp_path / name, step, {"q": items}, tokens=step)
    runs = [run_of(tmp_path / name) for name in "ab"]
    assert [each.step for each in runs[0].history] == list(range(7))
    found, _ = compare_scores(runs[:1], runs[1:])
    scores = {name: np.array([[float(item["acc"]) for item in each] for each in sets[name][-5:]]) for name in sets}
    gaps = scores["b"].mean(axis=0) - scores["a"].mean(axis=0)
    assert found[0].value == pytest.approx(gaps.mean())
    assert found[0].items_stderr == pytest.approx(gaps.std(ddof=1) / math.sqrt(20))
    assert found[0].noise is not None
    assert found[0].noise.source == CHECKPOINTS
    grows = (1 + 4 * CORRELATION) / (5 * (1 - CORRELATION))
    spreads = sum(grows * each.mean(axis=1).var(ddof=1) for each in scores.values())
    assert found[0].noise.std == pytest.approx(math.sqrt(spreads))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"prompts": "f" * 16}, "other prompts"), ({"protocol": "opus"}, "by protocol lm-eval, .* by opus")],
)
def test_other_prompts_or_protocols_are_not_compared(tmp_path, facts, said):
    write_evaluation(tmp_path / "a", {"q": answers(0), "r": answers(2, task="r")})
    write_evaluation(tmp_path / "b", {"q": answers(1), "r": answers(3, task="r")})
    content = json.loads((tmp_path / "b/eval.json").read_text())
    content["rows"] = [row | (facts if row["task"] == "q" else {}) for row in content["rows"]]
    (tmp_path / "b/eval.json").write_text(json.dumps(content))
    found, refused = compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "b")])
    assert {each.task for each in found} == {"r"}
    assert len(refused) == 1
    assert re.search(said, refused[0])


def test_nothing_in_common_is_not_compared(tmp_path):
    write_evaluation(tmp_path / "a", {"q": answers(0)})
    write_evaluation(tmp_path / "b", {"r": answers(0)})
    with pytest.raises(NotComparable, match="no task and metric in common"):
        compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "b")])
    add_history(tmp_path / "c", 1, {"q": answers(0)})
    (tmp_path / "a/eval.jsonl").unlink(missing_ok=True)
    with pytest.raises(NotComparable, match=r"a has no evaluation during training and others no eval\.json"):
        compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "c")])
    assert read_scores(tmp_path) is None


def test_items_of_another_evaluation_are_refused(tmp_path):
    write_evaluation(tmp_path / "a", {"q": answers(0)})
    write_evaluation(tmp_path / "b", {"q": answers(1)})
    write_items(tmp_path / "b/eval_items", "q", answers(1)[:-1])
    with pytest.raises(DataError, match=r"q\.jsonl: its 39 items have a mean acc of .*they are of two evaluations"):
        compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "b")])
    other = answers(1)
    other[0]["text"] = "another question"
    write_items(tmp_path / "b/eval_items", "q", other)
    with pytest.raises(DataError, match=r"q\.jsonl: other items than .*though the prompts are said to be the same"):
        compare_scores([run_of(tmp_path / "a")], [run_of(tmp_path / "b")])


ROW = score_rows("q", [{"acc": 1.0}, {"acc": 0.0}])[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "eval.json: cannot be read"),
        ("[]", "eval.json: format 'list', this megaopus reads 1"),
        ('{"format": 2}', "eval.json: format 2, this megaopus reads 1"),
        (json.dumps({"format": 1, "rows": [ROW, {"task": "q"}]}), "row 1: no text under 'metric'"),
        (json.dumps({"format": 1, "rows": [ROW | {"value": "much"}]}), "row 0: value is 'much', not a number"),
        (json.dumps({"format": 1, "rows": [ROW | {"n": 2.5}]}), "row 0: n is 2.5, not a whole number"),
        (json.dumps({"format": 1, "rows": [ROW, ROW]}), "acc of q is there twice"),
        (json.dumps({"format": 1, "perplexity": [{"corpus": "c"}]}), "perplexity 0: no text under 'domain'"),
    ],
)
def test_a_bad_evaluation_says_where(tmp_path, content, said):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_evaluation(tmp_path / "eval.json")


def test_bad_items_and_history_say_where(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"item": "a", "text": "x", "acc": true}\n{"item": "a", "text": "x", "acc": "nan", "f1": null}\n')
    items = read_items(path)
    assert items.names == ("a", "a/1")
    assert items.values["acc"].tolist() == [1.0, pytest.approx(math.nan, nan_ok=True)]
    assert np.isnan(items.values["f1"]).all()
    assert item_texts(tmp_path) == {"q": ["x", "x"]}
    path.write_text('{"item": "a", "text": "x", "acc": "good"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: acc is 'good', not a number"):
        read_items(path)
    path.write_text('{"text": "x", "acc": 1}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: no text under 'item'"):
        read_items(path)
    with pytest.raises(DataError, match="no items of an evaluation; run 'python -m megaopus eval' first"):
        item_texts(tmp_path / "nothing")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"tokens": 1} | ROW) + "\n")
    with pytest.raises(DataError, match=r"eval\.jsonl, line 1: step is None, not a whole number"):
        read_history(tmp_path)


def test_simulated_evaluations_are_as_written_ones(tmp_path):
    """The simulation of this file goes through the same code as files do."""
    correct = np.array([1.0, 0.0, 1.0, 1.0])
    write_evaluation(tmp_path, {"q": [{"text": str(n), "acc": value} for n, value in enumerate(correct.tolist())]})
    written, made = read_evaluation(tmp_path / "eval.json"), simulated(1, {"q": correct})
    score = made.scores["q", "acc"]
    assert (written.scores["q", "acc"].value, written.scores["q", "acc"].stderr) == (score.value, score.stderr)
    first, second = written.values("q", "acc"), made.values("q", "acc")
    assert first is not None
    assert second is not None
    assert first[1].tolist() == second[1].tolist()
