"""The verb check tells of a run's data what the run opens, draws from and validates on."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megaopus import build
from megaopus.cli.check import show
from megaopus.config.compose import compose
from megaopus.corpus_tools.benchmark_proxy import Limits
from megaopus.corpus_tools.benchmark_proxy import build as build_proxy
from megaopus.corpus_tools.nearest_documents import Item
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.candidates import CandidateStream
from megaopus.data.config import DataConfig
from megaopus.data.corpus import TOKENIZER, Corpus
from megaopus.data.needs import DataNeeds
from megaopus.data.run_data import RunData
from megaopus.data.sequences import Sequences
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.errors import DataError
from tests.exact.resume_runs import settings

DOMAINS = ("code", "docs", "notes")
HELD = {"items": "items", "nearest": "documents"}
EACH = 5
"""Sequences of a domain to validate on: fewer than there are of two domains, more than of the third."""


def written(folder: Path, name: str, sizes: tuple[int, ...], **options: Any) -> Path:
    """A corpus of documents of each domain, as many as ``sizes`` says; the field quality rises along each."""
    rows = []
    for domain, size in zip(DOMAINS, sizes, strict=True):
        for number in range(size):
            text = " ".join(f"{domain[0]}{(number * 7 + place) % 31}" for place in range(40))
            rows.append({"id": f"{name}-{domain}-{number}", "domain": domain, "text": text, "quality": number})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = SplitRule(proxy_fraction=0.2, validation_fraction=0.2, wanted=("docs",))
    source = Source.parse(str(folder / f"{name}.jsonl"), Fields(keep=("quality",)))
    return prepare([source], folder / name, vocab_size=300, rule=rule, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the corpora ``main`` and ``other``, of one tokenizer, and ``near``: that with a held-out target."""
    folder = tmp_path_factory.mktemp("run_data")
    main = written(folder, "main", (60, 40, 5))
    other = written(folder, "other", (30, 50, 20), tokenizer=main / TOKENIZER)
    items = [Item(str(number), " ".join(f"d{(number + place) % 31}" for place in range(12))) for number in range(12)]
    near = folder / "near"
    build_proxy(Corpus.open(other), items, near, tokens=1200, limits=Limits(), held_out=0.4, workers=1)
    return folder


VARIANTS = {
    "plain": ["selection=opus"],
    "uniform": ["selection=uniform"],
    "wanted nothing": ["selection=opus", "data.target_domains=[]"],
    "filtered": ["selection=opus", "data.filter.column=quality", "data.filter.keep=0.4"],
    "weighted": ["selection=opus", "data.weights=[[0,{docs:2,code:1}]]", "selection.score_every=2"],
    "filtered and weighted": ["data.filter={column: quality, at_least: 9}", "data.weights=[[0,{docs:2,code:1}]]"],
    "proxy elsewhere": ["selection=opus", "data.proxy_path=PLACE/other"],
    "proxy elsewhere, with a target": ["selection=opus", "data.proxy_path=PLACE/near"],
    "the target of an unread proxy": ["selection=uniform", "data.proxy_path=PLACE/near"],
    "validation elsewhere": ["selection=opus", "data.validation_path=PLACE/other"],
    "text features": ["selection=dsir", "data.text_features_path=NEW/features"],
}


class Opened:
    """Counts what a run opens, draws and validates on, at the functions that do it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sequences: dict[str, list[int]] = {}
        self.validated: Counter[str] = Counter()
        self.stream: CandidateStream | None = None
        lay_out, evaluate, trainer = Sequences._lay_out, MegatronEngine.evaluate, build.Trainer

        def laid_out(sequences: Sequences, *args: Any, **options: Any) -> None:
            lay_out(sequences, *args, **options)
            self.sequences.setdefault(sequences.split, []).append(len(sequences))

        def evaluated(engine: Any, buffer: Any) -> Any:
            losses = evaluate(engine, buffer)
            (domain,) = {buffer.domain_names[code] for code in buffer.domains}
            self.validated[domain] += len(losses)
            return losses

        def built(**parts: Any) -> Any:
            self.stream = parts["stream"]
            return trainer(**parts)

        patch.setattr(Sequences, "_lay_out", laid_out)
        patch.setattr(MegatronEngine, "evaluate", evaluated)
        patch.setattr(build, "Trainer", built)


@pytest.mark.parametrize("variant", VARIANTS)
def test_check_prints_what_the_run_opens(
    variant: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [text.replace("PLACE", str(place)).replace("NEW", str(tmp_path)) for text in VARIANTS[variant]]
    small = ["train.steps=1", "train.eval_every=0", f"train.eval_sequences={EACH}", "optim.warmup_steps=0"]
    config = compose(settings(place / "main", tmp_path / "run", *small, "selection.warmup_steps=0", *more))
    console = Console(file=io.StringIO(), width=300)
    show(config, console=console)
    printed = console.file.getvalue()
    with monkeypatch.context() as patch:
        opened = Opened(patch)
        assert build.train(config) == 0
    row = re.search(r"│ sequences +│ (.+?) +│", printed)
    assert row, printed
    counts = {split: [int(count.replace(",", ""))] for split, count in re.findall(r"(\w+) ([\d,]+)", row[1])}
    assert counts == opened.sequences
    parts = {part: opened.validated.pop(part) for part in ("items", "nearest") if part in opened.validated}
    each = ", ".join(f"{domain} {count}" for domain, count in opened.validated.items())
    line = f"│ {opened.validated.total()} sequences ({each})"
    target = "target: " + {"[]": "none named, the mean over all domains"}.get(
        str(config.data.target_domains), f"domains {', '.join(config.data.target_domains)}"
    )
    if "near" in str(config.data.proxy_path):
        told = ", ".join(f"{part} {count}" for part, count in parts.items())
        line += f", and {sum(parts.values())} of the held-out target ({told})"
        counts = Corpus.open(place / "near" / "target").manifest["counts"]
        held = [f"{counts[part]['target']['documents']} {what}" for part, what in HELD.items()]
        target = f"target: held-out slice of {' and '.join(held)} of corpus {place / 'near'}"
    assert f"{line} " in printed
    assert f"│ {target.removeprefix('target: ')} " in printed
    assert f" {target} " in " ".join((started := capsys.readouterr().out).split())
    assert list(opened.validated) == list(DOMAINS)
    assert max(opened.validated.values()) == EACH
    stream = opened.stream
    assert stream is not None
    if config.data.weights:
        epochs = ", ".join(f"{name} {drawn:.2f}" for name, drawn in stream.epochs(1).items())
        assert f"│ {epochs} in 1 steps" in printed
        assert epochs in " ".join(started.split())
    else:
        assert f"one in {len(stream.sequences) * config.selection.score_every / stream.num_candidates:,.1f}" in printed


NEEDS = DataNeeds(seed=1, steps=3, buffer_size=8, proxy_batch_size=4, eval_sequences=EACH)


def test_filters_and_weights_change_the_counts(place: Path) -> None:
    data = DataConfig(path=str(place / "main"), seq_len=16, target_domains=["docs"])
    plain = RunData.describe(data, NEEDS)
    whole = Sequences(Corpus.open(place / "main"), "validation", 16)
    assert plain.sequences == {"pool": len(RunData.open(data, NEEDS).pool), "validation": len(whole)}
    assert (plain.target.told, plain.held_out) == ("domains docs", {})
    assert len(set(plain.epochs.values())) == 1
    data.filter.column, data.filter.keep = "quality", 0.4
    filtered = RunData.describe(data, NEEDS)
    assert 0.3 < filtered.sequences["pool"] / plain.sequences["pool"] < 0.4
    assert filtered.kept is not None
    assert filtered.sequences["validation"] == len(whole)
    data.weights = [[0, {"docs": 1}]]
    weighted = RunData.describe(data, NEEDS)
    assert weighted.weighted
    assert weighted.epochs["code"] == 0 < weighted.epochs["docs"]


def test_streams_are_those_that_are_needed(place: Path) -> None:
    data = DataConfig(path=str(place / "main"), seq_len=16, target_domains=["docs"])
    opened = RunData.open(data, NEEDS)
    assert opened.proxy_batches() is opened.contrast_batches() is None
    opened = RunData.open(data, replace(NEEDS, proxy=True, contrast=True))
    proxy, contrast = opened.proxy_batches(), opened.contrast_batches()
    assert proxy is not None
    assert contrast is not None
    assert (len(proxy.at(0)), proxy.sequences.domains) == (4, ["docs"])
    assert contrast.sequences is opened.pool
    assert contrast.at(0).ids.tolist() != opened.candidates().at(0).ids[:4].tolist()
    assert opened.in_wanted_domains(opened.candidates().at(0)).tolist() == [
        opened.pool.domains[code] == "docs" for code in opened.candidates().at(0).domains
    ]


def test_a_proxy_that_is_read_is_opened_at_once(place: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(place / "main"), seq_len=16, proxy_path=str(tmp_path / "nowhere"))
    RunData.open(data, NEEDS)
    for needs in (replace(NEEDS, proxy=True), replace(NEEDS, text_features=("ngrams",))):
        with pytest.raises(DataError, match="nowhere"):
            RunData.open(data, needs)


def test_the_old_name_of_steps_per_buffer(place: Path) -> None:
    pool = Sequences(Corpus.open(place / "main"), "pool", 16)
    with pytest.warns(DeprecationWarning, match="steps_per_buffer"):
        old = CandidateStream(pool, 4, 0, serves=3)
    new = CandidateStream(pool, 4, 0, steps_per_buffer=3)
    assert [old.at(step).ids.tolist() for step in range(4)] == [new.at(step).ids.tolist() for step in range(4)]
    assert new.at(0).ids.tolist() == new.at(2).ids.tolist() != new.at(3).ids.tolist()
