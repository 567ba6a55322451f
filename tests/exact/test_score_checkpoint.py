"""Documents scored under a checkpoint: loss against a plain loop, utility against the exact estimator of float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megaopus.__main__ import main
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.data.corpus import Corpus
from megaopus.data.scores import load_column
from megaopus.engine.scoring_base import EngineScoringBackend
from megaopus.errors import CheckpointError, DataError
from megaopus.score.base import make_column
from megaopus.score.checkpoint import CheckpointPerplexity, Utility, windows_of
from megaopus.selection import TensorCandidates, exact_utilities

SEQ_LEN = 32
MODEL = ("model=tiny", "model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "engine=cpu")


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place = tmp_path_factory.mktemp("score") / "corpus"
    place.symlink_to(tiny_corpus)
    return Corpus.open(place)


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 updates that ends at a learning rate of 0."""
    run = tmp_path_factory.mktemp("run") / "run"
    settings = ("train.steps=12", "train.global_batch_size=4", "train.micro_batch_size=4", "train.eval_every=0")
    optim = ("optim.lr=3e-3", "optim.schedule=cosine", "optim.min_lr_ratio=0", "optim.warmup_steps=2")
    place = (f"data.path={corpus.path}", f"data.seq_len={SEQ_LEN}", f"run_dir={run}")
    assert main(["train", *MODEL, *settings, *optim, *place]) == 0
    return run


def documents(corpus: Corpus) -> list[int]:
    """The first, which follows no other, and the shortest and longest among some more."""
    some = np.arange(1, len(corpus), 9)
    return [0, int(some[corpus.lengths[some].argmin()]), int(some[corpus.lengths[some].argmax()]), 5]


def read(corpus: Corpus, number: int) -> torch.Tensor:
    """A document after the end of the one before, its own end included."""
    start = corpus.offsets[number]
    return torch.from_numpy(corpus.tokens[max(0, start - 1) : start + corpus.lengths[number]].astype(np.int64))


def test_windows_have_each_token_once(corpus: Corpus) -> None:
    numbers = np.arange(3, 9)
    windows, owners = windows_of(corpus, numbers, SEQ_LEN, first_only=False)
    tokens, counts = windows.batch(), windows.counts
    assert ((tokens < 0).sum(1) == counts.max() - counts).all()  # what fills up is marked
    for place, number in enumerate(numbers):
        mine = [row[1 : count + 1] for row, count, owner in zip(tokens, counts, owners, strict=True) if owner == place]
        assert torch.cat(mine).tolist() == read(corpus, number)[1:].tolist()
    first, _ = windows_of(corpus, numbers, SEQ_LEN, first_only=True)
    assert first.counts.tolist() == np.minimum(corpus.lengths[numbers], SEQ_LEN).tolist()


@pytest.mark.parametrize("windows", ["mean", "first"])
def test_perplexity_is_what_a_plain_loop_finds(corpus: Corpus, trained: Path, windows: str) -> None:
    method = CheckpointPerplexity(corpus, trained, windows, "cpu")
    make_column(corpus, f"loss_{windows}", method)
    values = load_column(corpus, f"loss_{windows}").values
    method.ready(trained, lambda what, tokens: lambda count: None)
    try:
        model = method.backend.module
        for number in documents(corpus):
            tokens, losses = read(corpus, number), []
            for start in range(0, len(tokens) - 1, SEQ_LEN):
                part = tokens[start : start + SEQ_LEN + 1]
                with method.backend.scoring(), torch.no_grad(), method._mesh.megatron():  # type: ignore[union-attr]
                    logits = model(part[None, :-1], torch.arange(len(part) - 1)[None], None)[0]
                chances = logits.double().log_softmax(-1)
                losses += [-float(row[token]) for row, token in zip(chances, part[1:], strict=True)]
                if windows == "first":
                    break
            assert values[number] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    finally:
        method.close()


@pytest.mark.parametrize("contrast", [False, True])
def test_utility_is_that_of_the_exact_estimator(corpus: Corpus, trained: Path, contrast: bool) -> None:
    made = {}
    for estimator in ("directional", "exact"):
        method = Utility(corpus, trained, device="cpu", proxy_sequences=16, estimator=estimator, contrast=contrast)
        method.ready(trained, lambda what, tokens: lambda count: None)
        gradients = []
        for each in (method._proxy, method._pool):
            lent = {} if each is None else method.backend.gradient(each)
            gradients += [{name: value.clone() for name, value in lent.items()}] if lent else []
        assert len(gradients) == 1 + contrast
        for name, value in method._gradient.items():
            whole = gradients[0][name] - gradients[1][name] if contrast else gradients[0][name]
            torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
        try:
            made[estimator] = np.concatenate([method.scores(np.array([number])) for number in documents(corpus)])
            if estimator == "exact":
                together = method.scores(np.arange(4, 7))  # of unequal length, filled up
                plain = EngineScoringBackend(method.backend._engine)  # windows as the library's own candidates
                oracle = []
                for number in [*documents(corpus), 4, 5, 6]:
                    total, count = 0.0, 0
                    for part in read(corpus, number)[1:].split(SEQ_LEN):
                        window = read(corpus, number)[count : count + len(part) + 1][None]
                        value = exact_utilities(plain, TensorCandidates(window), method._operator, method._gradient)
                        total, count = total + float(value) * len(part), count + len(part)
                    oracle.append(total / count)
        finally:
            method.close()
    np.testing.assert_allclose(made["exact"], oracle[: len(made["exact"])], rtol=1e-6)
    np.testing.assert_allclose(together, oracle[-3:], rtol=1e-6)
    assert np.abs(made["exact"]).min() > 0  # though the run ended at a learning rate of 0
    spread = np.std(made["exact"])
    np.testing.assert_allclose(made["directional"], made["exact"], atol=0.02 * spread, rtol=0.02)


def test_the_verb_scores_by_utility(corpus: Corpus, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "--corpus", str(corpus.path), "--method", "utility", "--checkpoint", str(trained)]
    assert main([*command, "--proxy-sequences", "16", "--device", "cpu"]) == 0
    assert "step_00000012" in capsys.readouterr().out
    column = load_column(corpus, "utility")
    assert column.best == "highest"
    assert np.isfinite(column.values).all()


def test_checkpoints_that_cannot_be_used(corpus: Corpus, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "some other text"}\n')
    other = Corpus.open(prepare([Source(source)], tmp_path / "other", vocab_size=300, rule=SplitRule(0, 0)))
    with pytest.raises(DataError, match=r"another tokenizer than that of .*; prepare it with --tokenizer"):
        CheckpointPerplexity(other, trained)
    copy = tmp_path / "copy"
    shutil.copytree(trained / "checkpoints" / "step_00000012", copy)
    text = (copy / "state.json").read_text()
    (copy / "state.json").write_text(text.replace(str(corpus.path), str(tmp_path / "gone")))
    with pytest.raises(DataError, match=r"whether it has the same tokenizer cannot be told"):
        CheckpointPerplexity(other, copy)
    CheckpointPerplexity(corpus, copy)  # the corpus it was trained on, by its fingerprint
    (copy / "state.json").write_text(text.replace('"megatron"', '"deepspeed"'))
    with pytest.raises(CheckpointError, match=r"engine.name=deepspeed; score reads those of the megatron engine"):
        CheckpointPerplexity(corpus, copy)
    (copy / "state.json").write_text(text)
    (copy / "weights" / "common.pt").write_bytes(b"")
    damaged = CheckpointPerplexity(corpus, copy, device="cpu")
    try:
        with pytest.raises(CheckpointError, match=r"common\.pt: has 0 bytes, .*; restore it, or name another"):
            damaged.ready(tmp_path, lambda what, tokens: lambda count: None)
    finally:
        damaged.close()
