"""The study on a real model: its methods, its pools, the figures of its tables, and rows of a toy's size."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import pools, real_arms, real_rows, real_study, real_table, study
from megaopus.config.compose import compose
from megaopus.data.candidates import CandidateBuffer
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.folder import new_folder
from megaopus.data.scores import HIGHEST, column_folder, write_column
from megaopus.data.sequences import Sequences
from megaopus.selection import Scores, SelectionConfig, Selector
from megaopus.selection.config import GuardConfig
from tests.unit.selection_net import UNGUARDED, K, batch, make_backend, proxy
from tests.unit.test_selection_prescreen import LinearTraits


class Features(LinearTraits):
    def importance(self, ids: Tensor) -> Tensor:
        return super().importance(ids % len(self.table))

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        return ids


TRAITS = Features()
WORTH = {"docs": 0.3, "code": 0.3, "noise": -0.1}


@pytest.fixture
def corpus(tiny_corpus: Path, tmp_path: Path) -> Corpus:
    """The tiny corpus under a name of its own, so that columns lie beside that."""
    (tmp_path / "corpus").symlink_to(tiny_corpus)
    return Corpus.open(tmp_path / "corpus")


def buffer_of(corpus: Corpus, each: int) -> CandidateBuffer:
    sequences = Sequences(corpus, "pool", 16)
    numbers = np.concatenate(list(sequences.evenly_spaced(each).values()))
    return CandidateBuffer(sequences, numbers, numbers)


def selector_of(method: str, picks: int) -> Selector:
    guards = GuardConfig(exposure_cap=1, min_distinct=0, min_unique=0)
    config = SelectionConfig(method=method, guards=guards)
    return Selector(config, make_backend(), num_selected=picks, proxy=None, seed=3, text_features=TRAITS)


# -- methods ---------------------------------------------------------------------------------------------------------


def test_the_oracle_takes_the_kinds_worth_most_by_chance_and_no_sequence_twice(corpus: Corpus) -> None:
    real_study.ensure_worth(corpus, WORTH)
    buffer = buffer_of(corpus, 6)
    selector = selector_of("study_oracle", 4)
    picks = [buffer.take(selector.select(buffer, step).indices) for step in range(4)]
    kinds = [[pick.domain_names[code] for code in pick.domains] for pick in picks]
    assert {*kinds[0], *kinds[1], *kinds[2]} == {"docs", "code"}
    assert len({*kinds[0], *kinds[1]}) == 2  # equals come by chance, not one kind after the other
    assert kinds[3] == ["noise"] * 4
    taken = [number for pick in picks for number in pick.sequence_ids.tolist()]
    assert len(set(taken)) == 16
    real_study.ensure_worth(corpus, WORTH)
    with pytest.raises(SystemExit, match="of other numbers than --worth"):
        real_study.ensure_worth(corpus, WORTH | {"noise": 1.0})
    with pytest.raises(SystemExit, match="says nothing of noise"):
        real_study.ensure_worth(corpus, {"docs": 1.0, "code": 0.0})


def test_a_column_made_ahead_of_time_is_that_of_the_document_a_sequence_begins_in(corpus: Corpus) -> None:
    values = np.random.default_rng(0).normal(size=len(corpus)).astype("<f4")
    buffer = buffer_of(corpus, 6)
    first = buffer.reads[0].first_document_of(buffer.sequence_ids)
    values[first[2]] = np.nan
    with new_folder(column_folder(corpus.path, "frozen"), Console(quiet=True)) as folder:
        write_column(folder, corpus, values, HIGHEST, {})
    frozen = selector_of("study_frozen", 4).select(buffer, 0)
    assert np.array_equal(frozen.utilities, values[first].astype(np.float64), equal_nan=True)
    assert 2 not in frozen.indices
    both = selector_of("study_frozen_sum", 4).select(buffer, 0).utilities
    expected = z(torch.from_numpy(values[first].astype(np.float64))) + z(TRAITS.importance(buffer.ids))
    assert torch.allclose(both, expected, equal_nan=True)


def z(values: Tensor) -> Tensor:
    known = values.numpy()
    return torch.from_numpy((known - np.nanmean(known)) / np.nanstd(known))


def selected(method: str, backend: Any) -> Any:
    config = SelectionConfig(method=method, proxy_half_life=0.0, guards=UNGUARDED)
    selector = Selector(config, backend, num_selected=K, proxy=proxy, seed=5, text_features=TRAITS)
    return selector.select(batch(9), 0)


def test_the_sum_is_that_of_the_z_scores() -> None:
    backend = make_backend()
    utilities = selected("opus", backend).utilities
    found = selected("study_sum", backend).utilities
    assert torch.allclose(found, z(utilities) + z(TRAITS.importance(torch.arange(len(utilities)))))
    before = selected("study_sum", make_backend(steps=0))  # the optimizer has no state
    assert before.method == "study_sum"
    assert set(before.indices.tolist()) == set(z(TRAITS.importance(torch.arange(12))).argsort()[-K:].tolist())


def test_the_placebo_hands_the_same_utilities_to_others() -> None:
    backend = make_backend()
    utilities = selected("opus", backend).utilities
    found = selected("study_placebo", backend).utilities
    assert torch.equal(found.sort().values, utilities.sort().values)
    assert not torch.equal(found, utilities)
    assert torch.equal(found, selected("study_placebo", backend).utilities)
    assert selected("study_placebo", make_backend(steps=0)).method == "uniform"


def test_the_placebo_keeps_whom_the_model_is_judged_by_and_pairs_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.arange(20.0, dtype=torch.float64)
    opus = SimpleNamespace(score=lambda step: Scores(utilities=numbers, losses=numbers + 100))
    monkeypatch.setattr(real_arms, "METHODS", SimpleNamespace(find=lambda name: opus))

    class Buffer(SimpleNamespace):
        def __len__(self) -> int:
            return 20

    def found(seed: int, step: int) -> Any:
        buffer = Buffer(ids=torch.arange(20) + 7)
        return real_arms.placebo(SimpleNamespace(buffer=buffer, judged=6, seed=seed, step=step))

    one = found(1, 2)
    assert torch.equal(one.losses, one.utilities + 100)
    assert torch.equal(one.utilities[14:], numbers[14:])
    assert torch.equal(one.utilities[:14].sort().values, numbers[:14])
    assert not torch.equal(one.utilities, numbers)
    assert torch.equal(one.utilities, found(1, 2).utilities)
    others = [found(seed, step).utilities for seed, step in ((1, 3), (2, 2))]
    assert not any(torch.equal(one.utilities, each) for each in others)


# -- pools -----------------------------------------------------------------------------------------------------------


def write_texts(path: Path, count: int, words: Sequence[str]) -> None:
    draw = random.Random(path.name)
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as stream:
        for number in range(count):
            text = " ".join(draw.choices(words, k=60))
            stream.write(json.dumps({"id": f"author{number % 4}/{path.name}/{number}", "text": text}) + "\n")


@pytest.mark.parametrize("name", ["real_clean", "real_mixed", "lambada"])
def test_wanted_text_that_is_validated_on_is_in_no_pool(name: str, tmp_path: Path, tiny_corpus: Path) -> None:
    data, words = tmp_path / "data", ["one", "two", "three", "four", "five", "six", "seven"]
    for file in ("books", "code", "tldr_pages", "french_novels", "wikitext2_test", "wikitext2_valid"):
        write_texts(data / f"{file}.jsonl.gz", 60, [f"{word}{file}" for word in words])
    write_texts(data / "benchmarks" / "lambada_openai_test.jsonl.gz", 60, words)
    folder = tmp_path / "pools"
    settings = pools.ensure_real_pool(name, data, folder, tiny_corpus)
    config = compose([*settings, "data.seq_len=16"]).data
    pool, held_out = Corpus.open(config.path), Corpus.open(config.validation_path or "")
    assert held_out.domains == config.target_domains

    def documents(corpus: Corpus, *splits: str) -> set[str]:
        codes = [SPLITS.index(split) for split in splits]
        return set(corpus.texts(np.flatnonzero(np.isin(corpus.split_codes, codes))))

    validated = documents(held_out, "validation")
    assert len(validated) > 2
    proxies = documents(Corpus.open(config.proxy_path or config.path), "proxy")
    assert not validated & (documents(pool, "pool") | proxies)
    assert len(proxies) > 5
    if name != "real_clean":
        return
    again = pools.ensure_real_pool(name, data, tmp_path / "again", tiny_corpus)
    assert Corpus.open(compose([*again, "data.seq_len=16"]).data.path).fingerprint == pool.fingerprint


# -- tables ----------------------------------------------------------------------------------------------------------

LOSSES = {
    "uniform": (3.80, 3.82, 3.79),
    "importance": (3.700, 3.710, 3.690),
    "oracle": (3.662, 3.672, 3.652),
    "opus": (3.670, 3.685, 3.655),
    "placebo": (3.698, 3.711, 3.689),
}


def row_of(arm: str, seed: int, final: float, curve: Sequence[float] = (4.2, 4.0, 3.9)) -> dict[str, Any]:
    losses = [*curve, final]
    about = {"key": f"{arm}/{seed}", "pool": "real_hard", "arm": arm, "seed": seed, "branch": False, "model": "toy"}
    about |= {"updates": 30, "decay": 10, "final_loss": final, "tokens_per_step": 8, "changed_share": 0.25}
    return {
        **about,
        "update_s": 10.0 if arm == "uniform" else 15.0,
        "share": {"books": 0.4, "wiki": 0.6},
        "uniform_steps": 0,
        "wanted": ["books"],
        "swapped": {"came": {"books": 3, "wiki": 1}, "went": {"books": 1, "wiki": 3}},
        "validations": [
            {"step": 10 * at, "tokens": 80 * at, "time_s": 1.0 * at, "loss": loss, "domains": {"books": loss}}
            for at, loss in enumerate(losses)
        ],
        "sequences": {"losses": [final - 0.5, final + 0.5, final, final], "documents": [1, 1, 2, 5]},
    }


def made_up() -> dict[str, dict[int, Any]]:
    return {
        arm: {seed: row_of(arm, seed, loss) for seed, loss in enumerate(losses, 1)} for arm, losses in LOSSES.items()
    }


def test_the_share_of_the_way_is_a_ratio_of_means() -> None:
    arms = made_up()
    found = real_table.way(arms, "opus")
    assert found is not None
    gains, possible = (np.subtract(LOSSES["importance"], LOSSES[arm]) for arm in ("opus", "oracle"))
    assert found["share"] == pytest.approx(gains.mean() / possible.mean())
    each = [[gains[list(at)].mean() / possible[list(at)].mean()] for at in itertools.product(range(3), repeat=3)]
    assert (found["low"], found["high"]) == (pytest.approx(min(each)[0]), pytest.approx(max(each)[0]))
    assert real_table.way({**arms, "oracle": arms["uniform"]}, "opus") is None
    alone = real_table.way({arm: {1: rows[1]} for arm, rows in arms.items()}, "placebo")
    assert alone == {"share": pytest.approx(0.002 / 0.038), "seeds": 1, "low": None, "high": None}


def test_p_values_are_corrected_for_how_many_there_are() -> None:
    assert real_table.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert real_table.holm([0.9, 0.6]) == [1.0, 1.0]
    assert real_table.holm([]) == []


def test_rows_become_a_table() -> None:
    rows = [row for arm in made_up().values() for row in arm.values()]
    (table,) = real_table.tables(rows)
    found = {row["arm"]: row for row in table["arms"]}
    assert list(found) == ["uniform", "importance", "placebo", "opus", "oracle"]
    opus = found["opus"]
    assert opus["gain"] == pytest.approx(np.mean([0.030, 0.025, 0.035]))
    assert opus["lower_in"] == 3
    t = 0.03 / (0.005 / 3**0.5)
    assert opus["p"] == pytest.approx(1 - t / (t * t + 2) ** 0.5, abs=1e-6)  # Student's t with two degrees of freedom
    assert opus["decided"] is None  # three seeds are no look
    assert opus["p_holm"] is None
    assert found["placebo"]["p_holm"] >= found["placebo"]["p"]
    low, high = opus["document_intervals"][0]
    assert low == pytest.approx(0.03)
    assert high == pytest.approx(0.03)
    assert (opus["clean_in"], opus["clean_out"], opus["clean"]) == (0.75, 0.25, pytest.approx(0.4))
    # from 3.9 after 20 updates to 3.67 after 30, uniform's 3.80 lies 10/23 of the way
    pairs = zip(LOSSES["uniform"], LOSSES["opus"], strict=True)
    ratios = [(2 + (3.9 - uniform) / (3.9 - own)) / 3 for uniform, own in pairs]
    assert opus["tokens_ratio"] == pytest.approx(np.mean(ratios))
    assert opus["time_ratio"] == pytest.approx(1.5 * np.mean(ratios))
    assert opus["tokens_ratio_at_one_rate"] == pytest.approx(1)
    assert found["uniform"]["tokens_ratio"] == pytest.approx(1)


def test_the_claim_is_judged_at_two_numbers_of_seeds_alone() -> None:
    def decided(count: int, gains: Sequence[float]) -> Any:
        arms = {
            "importance": {seed: row_of("importance", seed, 3.7) for seed in range(count)},
            "opus": {
                seed: row_of("opus", seed, 3.7 - gain) for seed, gain in zip(range(count), itertools.cycle(gains))
            },
        }
        return next(row for row in real_table.arms_of(arms) if row["arm"] == "opus")["decided"]

    assert [decided(count, (0.02, 0.021)) for count in range(3, 9)] == [None, None, True, None, None, True]
    assert decided(5, (0.02, -0.02)) is False


def test_targets_are_met_or_missed_or_not_known() -> None:
    def met(arms: Any) -> list[Any]:
        return [each["met"] for each in real_table.targets(arms)]

    arms = made_up()
    # every seed; no look at three; 79 % of the way; no sum; no frozen column; clean; a thirtieth; tokens; time
    assert met(arms) == [True, None, True, None, None, True, True, False, False]
    better = {seed: row_of("sum", seed, loss - 0.001) for seed, loss in enumerate(LOSSES["opus"], 1)}
    frozen = {2: row_of("frozen", 2, 3.685)}
    arms |= {"sum": better, "frozen": frozen, "placebo": better}
    assert met(arms)[2:7] == [True, False, True, True, False]
    arms["opus"][3]["final_loss"] = 3.70
    assert met(arms)[:3] == [False, None, False]
    assert met({"opus": arms["opus"]}) == []


def test_branches_say_when_an_arm_is_where_uniform_ends() -> None:
    curves = {
        "uniform": {30: 3.9, 60: 3.8, 120: 3.7},
        "opus": {30: 3.8, 60: 3.6, 120: 3.5},
        "slow": {30: 3.9, 120: 3.8},
    }
    rows = [
        {**row_of(arm, seed, loss), "branch": True, "updates": updates}
        for arm, curve in curves.items()
        for updates, loss in curve.items()
        for seed in (1, 2)
    ]
    (found,) = real_table.decayed(rows)
    assert found["updates"] == 120
    assert found["arms"]["uniform"] == {"mean": 1.0, "seeds": 2}
    assert found["arms"]["opus"]["mean"] == pytest.approx(45 / 120)
    assert found["arms"]["slow"]["mean"] is None
    rows[-1]["final_loss"] = 3.6  # one seed gets there
    assert real_table.decayed(rows)[0]["arms"]["slow"]["mean"] is None
    assert real_table.decayed([row_of("opus", 1, 3.7)]) == []


def test_differences_by_document_are_drawn_by_document() -> None:
    base, own = row_of("importance", 1, 3.7), row_of("opus", 1, 3.7)
    base["sequences"] = {"losses": [4.0, 4.0, 3.0, 3.0], "documents": [1, 1, 2, 2]}
    own["sequences"] = {"losses": [3.9, 3.9, 3.1, 3.1], "documents": [1, 1, 2, 2]}
    assert real_table.document_interval(base, own) == (pytest.approx(-0.1), pytest.approx(0.1))
    own["sequences"]["documents"] = [1, 1, 2, 3]
    with pytest.raises(SystemExit, match="other sequences"):
        real_table.document_interval(base, own)


def test_items_of_a_benchmark_are_paired() -> None:
    base, own = ({1: row_of("x", 1, 3.7)} for _ in range(2))
    base[1]["judged"] = {"items": 4, "nats": [1.0, 2.0, 3.0, 4.0], "right": [1, 0, 0, 0]}
    own[1]["judged"] = {"items": 4, "nats": [0.5, 1.5, 2.5, 4.5], "right": [1, 1, 0, 0]}
    found = real_table._judged(own, base)
    assert (found["nats"], found["right"]) == (2.25, 0.5)
    assert (found["nats_less_importance"], found["nats_stderr"]) == (-0.25, pytest.approx(0.25))
    assert found["right_less_importance"] == 0.25


# -- runs ------------------------------------------------------------------------------------------------------------


def test_stages_have_the_runs_that_were_asked_for(tiny_corpus: Path) -> None:
    plan = real_study.Plan()
    first = real_study.jobs_of(plan, 1, None, None)
    assert [job.arm for job in first[:2]] == ["uniform", "importance"]
    assert len(first) == 3 * len(real_study.ALL)
    again = real_study.jobs_of(plan, 2, ["opus"], [6, 7, 8])
    assert [(job.arm, job.seed) for job in again] == [("opus", 6), ("opus", 7), ("opus", 8)]
    curve = real_study.jobs_of(plan, 5, ["uniform"], [1])
    assert [(job.updates, job.branch) for job in curve] == [(30, True), (60, True), (90, True), (120, True)]
    for arm, settings in real_study.ARMS.items():
        config = compose([*real_study.COMMON[:1], f"data.path={tiny_corpus}", "data.seq_len=16", *settings]).selection
        picked = {"greats": 16, "opus_paper": 16}.get(arm, real_study.BUFFER)
        assert config.screened * real_study.BATCH / config.rho == picked


def test_what_kinds_are_worth_is_read_in_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "worth"
    rows = [{"what": "auc", "kind": "x"}, *({"what": "worth", "kind": kind, "fall": WORTH[kind]} for kind in WORTH)]
    for text in (json.dumps(WORTH), "".join(json.dumps(row) + "\n" for row in rows)):
        path.write_text(text)
        assert real_study.read_worth(path) == WORTH
    for text in ("[1]", "no", '{"docs": "many"}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match="neither rows of real_gate"):
            real_study.read_worth(path)


@pytest.mark.slow
def test_rows_of_a_toys_size(corpus: Corpus, tmp_path: Path) -> None:
    work, said = tmp_path / "work", []

    def verb(name: str, *more: Any) -> None:
        said.append(name)
        study.verb_here(name, *more)

    def quick(arms: Sequence[str]) -> tuple[real_study.Study, list[real_study.Job]]:
        made = real_study.quick_study(work, corpus.path, work / "rows.jsonl", Console(quiet=True))
        stages = {1: made.plan.stages[1], 5: replace(made.plan.stages[5], curve=(2,))}
        one = replace(made, verb=verb, plan=replace(made.plan, stages=stages))
        jobs = [job for stage in (1, 5) for job in real_study.jobs_of(one.plan, stage, arms, None)]
        one.run(jobs)
        return one, jobs

    arms = ("uniform", "importance")
    one, jobs = quick(arms)
    rows = {(job.arm, job.updates, job.branch): one.results.rows[one.task(job).key] for job in jobs}
    assert len(rows) == 3
    assert [path.name for path in (work / "runs").iterdir()] == []
    for (_, updates, branch), row in rows.items():
        assert row["updates"] == updates + 1
        assert row["final_loss"] == pytest.approx(np.mean(row["sequences"]["losses"]), abs=1e-5)
        assert [each["step"] for each in row["validations"]][-1] == row["updates"]
        assert row["tokens_per_step"] == 8 * 32
        assert {row["pool"], row["model"]} == {"demo", "model"}
        assert (row["tokens_ratio"] is None) or not branch
        assert 0 <= row["changed_share"] <= 1
    assert rows["importance", 3, False]["swapped"]["changed"] == 0  # the same noise, the same picks
    assert rows["uniform", 3, False]["swapped"]["changed"] > 0
    assert len({row["final_loss"] for row in rows.values()}) == 3
    assert len(said) == 4  # the trunk has no row
    quick(arms)
    assert len(said) == 4
    real_table.show(one.results, Console(quiet=True), tmp_path / "table.json")
    tables = json.loads((tmp_path / "table.json").read_text())["tables"]
    assert [(table["updates"], table["branch"], len(table["arms"])) for table in tables] == [
        (4, False, 2),
        (3, True, 1),
    ]


def test_a_run_whose_losses_are_others_than_it_said_is_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = real_study.quick_study(tmp_path / "work", corpus.path, tmp_path / "rows.jsonl", Console(quiet=True))
    monkeypatch.setattr(real_rows, "_NEAR", -1.0)
    with pytest.raises(RuntimeError, match="have a mean loss of"):
        one.run(real_study.jobs_of(one.plan, 1, ["uniform"], None))
    assert not one.results.rows
    monkeypatch.undo()
    assert len(list((tmp_path / "work" / "runs").iterdir())) == 1  # kept, so that the study goes on with it
