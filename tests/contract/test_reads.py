"""A rank reads in a step just what it scores, compares and trains on, each sequence once; foresight is right."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megaopus import build
from megaopus.config.compose import compose
from megaopus.config.run_config import RunConfig
from megaopus.corpus_tools.signatures import write_signatures
from megaopus.data.read_ahead import TokenReader
from megaopus.data.run_data import RunData
from megaopus.data.sequences import Sequences
from megaopus.data.signatures import signatures_path
from megaopus.data.text_features import SequenceTextFeatures
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.record.config import LoggingConfig
from megaopus.record.recorder import Recorder
from megaopus.record.types import SelectionRecord
from megaopus.selection import Selector, sampler
from megaopus.training.signals import StopSignal
from tests.exact.resume_runs import settings

PICKED, PROXY = 4, 8
RECIPES = {
    "default": ["selection=opus"],
    "screened": ["selection=screened", "selection.prescreen.slice=8", "selection.prescreen.every=3"],
    "screened without a prior": [
        "selection=screened",
        "selection.prescreen.slice=8",
        "selection.prescreen.every=3",
        "selection.prescreen.prior=0",
        "selection.score_every=2",
    ],
    "cascade": ["selection=opus_cascade"],
    "exact": ["selection=opus_exact", "selection.score_length=8"],
    "oracle": ["selection=domain_oracle"],
    "oracle, signed": ["selection=domain_oracle"],
    "uniform": ["selection=uniform"],
}


class Log:
    """Says who was foreseen, chosen and read, by step."""

    def __init__(self) -> None:
        self.reads: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self.in_all = 0
        self.foreseen: dict[int, list[int]] = {}
        self.records: list[SelectionRecord] = []


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log()
    read, foresee, count = TokenReader._read, Selector.foresee, Sequences.read

    def logged(self: TokenReader, step: int, sequences: Sequences, numbers: Any) -> dict[int, np.ndarray]:
        rows = read(self, step, sequences, numbers)
        found.reads[step] += [(sequences.split, number) for number in rows]
        return rows

    def foreseen(self: Selector, candidates: Any, step: int) -> Any:
        reads, picks = foresee(self, candidates, step)
        found.foreseen[step] = picks.tolist()
        return reads, picks

    def counted(self: Sequences, ids: Any, length: int | None = None) -> np.ndarray:
        found.in_all += len(ids)
        return count(self, ids, length)

    monkeypatch.setattr(TokenReader, "_read", logged)
    monkeypatch.setattr(Selector, "foresee", foreseen)
    monkeypatch.setattr(Sequences, "read", counted)
    monkeypatch.setattr(Recorder, "step", lambda self, record, selection, *rest: found.records.append(selection))
    return found


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = Mesh(ParallelConfig(), "cpu")
    yield mesh
    mesh.close()


def run(config: RunConfig, mesh: Mesh, log: Log, steps: int, in_time: Callable[[TokenReader], None]) -> RunData:
    """Make updates; ``in_time`` is called before each."""
    data = RunData.open(config.data, config.data_needs())
    trainer = build.build_trainer(config, mesh, data, StopSignal())
    log.in_all = 0
    recorder = Recorder(LoggingConfig(), "", steps, is_writer=False)
    try:
        for _ in range(steps):
            trainer.update(recorder)
            in_time(trainer.reader)
    finally:
        trainer.reader.close()
    return data


def idle(reader: TokenReader) -> None:
    """Let the thread get everything done."""
    while True:
        with reader._turn:
            if not (reader._plans or reader._pending):
                return
        time.sleep(0.001)


def expected(config: RunConfig, data: RunData, record: SelectionRecord, signed: bool) -> set[tuple[str, int]]:
    """Return what one process needs to score, to compare token pairs, and to train in this step.

    ``signed``: preparation has told copies apart.
    """
    step, selection, choices = record.step, config.selection, record.choices
    assert choices is not None
    sequences, utility = choices["sequence"], choices.get("utility")
    by_names = selection.method == "domain_oracle"  # whose utilities ask for no token
    scored = np.zeros(len(choices), dtype=bool) if utility is None or by_names else utility.known.numpy()
    pool = {*sequences[choices["picked"].numpy()], *sequences[scored]}
    proxy: set[int] = set()
    proxies, contrasts = data.proxy_batches(), data.contrast_batches()
    period, first = step // selection.score_every, step % selection.score_every == 0
    known = signed or selection.needs_text_features
    if selection.method != "uniform" and first and not (known or record.method == "uniform"):
        pool |= set(sequences)  # signatures are of tokens then
    if scored.any() and (step % selection.proxy_every == 0 or step == selection.warmup_steps):  # the first, or in turn
        assert proxies is not None
        proxy |= set(proxies.at(step).sequence_ids)
        if contrasts is not None:
            pool |= set(contrasts.at(step).sequence_ids)
    if scored.any() and selection.utilities == "odds":
        assert proxies is not None
        batch = proxies.at(step)
        features = SequenceTextFeatures(data.pool, data.ensure_text_features(Console(quiet=True)))
        proxy |= set(batch.sequence_ids[features.judges(batch.ids).numpy()])
    if record.method != "uniform" and first:  # the alarm compares as many pairs of tokens
        chosen = PICKED * selection.score_every
        several = sampler.pick_uniform(choices["id"], chosen, config.seed, period)
        count = chosen if proxies is None else min(chosen, PROXY)
        pool |= set(sequences[several[:count]])
        proxy |= set() if proxies is None else set(proxies.at(step).sequence_ids[:count])
    return {("pool", int(n)) for n in pool} | {("proxy", int(n)) for n in proxy}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_reads_what_it_uses_once(recipe: str, tiny_corpus: Path, tmp_path: Path, mesh: Mesh, log: Log) -> None:
    more = [
        *RECIPES[recipe],
        "selection.warmup_steps=2",
        "train.steps=9",
        f"data.text_features_path={tmp_path / 'traits'}",
    ]
    overrides = settings(tiny_corpus, tmp_path, *more)
    config = compose([each for each in overrides if not each.startswith("selection.proxy_batch_size")])
    config.selection.proxy_batch_size = PROXY
    signed = recipe.endswith("signed")
    if signed:
        pool = RunData.open(config.data, config.data_needs()).pool
        write_signatures(pool, 1, lambda done: None)
    try:
        data = run(config, mesh, log, 9, idle)
    finally:
        if signed:
            signatures_path(pool).unlink()
    assert len(log.records) == 9
    for record in log.records:
        found = log.reads[record.step]
        assert len(found) == len(set(found)), record.step
        missing, needless = (
            expected(config, data, record, signed) - set(found),
            set(found) - expected(config, data, record, signed),
        )
        assert not missing, record.step
        assert not needless, record.step
    assert log.in_all == sum(map(len, log.reads.values()))  # nothing is read past the reader
    if recipe == "screened":
        usual = [len(log.reads[record.step]) for record in log.records if record.choices.get("utility") is None]
        assert max(usual) < 32 == log.records[0].candidates
    picks = {record.step: np.flatnonzero(record.choices["picked"]).tolist() for record in log.records}
    known = {step: foreseen for step, foreseen in log.foreseen.items() if foreseen}
    assert known == {step: picks[step] for step in known}
    # what scores decide is not known ahead
    by_scores = {"default": {0, 1}, "cascade": {0, 1}, "exact": {0, 1}, "oracle": {0, 1}}
    assert known.keys() >= set(range(1, 9)) & by_scores.get(recipe.removesuffix(", signed"), set(range(9)))


def test_picks_do_not_depend_on_what_is_read_ahead(tiny_corpus: Path, tmp_path: Path, mesh: Mesh, log: Log) -> None:
    more = [
        *RECIPES["default"],
        "selection.warmup_steps=2",
        "train.steps=5",
        f"data.text_features_path={tmp_path / 'traits'}",
    ]
    config = compose(settings(tiny_corpus, tmp_path, *more))
    run(config, mesh, log, 5, idle)
    ahead, log.records = log.records, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenReader, "ahead", lambda self, step, plan: None)
        run(config, mesh, log, 5, lambda reader: None)
    unhurried, log.records = log.records, []
    config.data.read_ahead_mb = 0
    run(config, mesh, log, 5, lambda reader: None)
    assert log.records
    for one, other in [*zip(ahead, unhurried, strict=True), *zip(ahead, log.records, strict=True)]:
        assert one.choices is not None
        assert other.choices is not None
        np.testing.assert_array_equal(one.choices["picked"], other.choices["picked"])
        np.testing.assert_array_equal(one.choices["probability"], other.choices["probability"])
