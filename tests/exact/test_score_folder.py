"""Documents scored under a Hugging Face folder: transformers' numbers, an optimizer that saw the pool, any layout."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaopus.__main__ import main
from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.folder import StoppedError
from megaopus.data.scores import COLUMN, load_column
from megaopus.data.sequences import Sequences
from megaopus.errors import ConfigError, DataError, ModelError
from megaopus.score.base import make_column
from megaopus.score.checkpoint import CheckpointPerplexity, Utility
from megaopus.score.windows import windows_of
from tests.exact.test_huggingface import make
from tests.pool import Jobs, Pool

LENGTH, WARM, PROXY = 32, 2, 6
LAYOUTS: Mapping[str, tuple[int, list[str]]] = {
    "tp2-pp2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "dp3": (3, []),
}
"""Name -> (ranks, overrides)."""
COLUMNS: Mapping[str, tuple[int, list[str]]] = {"whole": (2, ["parallel.cp=2"]), "half": (2, [])}
"""The same of what is written; a process takes part in one job alone, for its ranks meet at one port."""


@pytest.fixture(scope="module")
def model(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a folder with the corpus's tokenizer, transformers' model of it)."""
    folder = tmp_path_factory.mktemp("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = make("llama", folder)
    shutil.copyfile(tiny_corpus / "tokenizer.json", folder / "tokenizer.json")
    return folder, found.double()


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place = tmp_path_factory.mktemp("folder") / "corpus"
    place.symlink_to(tiny_corpus)
    return Corpus.open(place)


class Stopping(CheckpointPerplexity):
    """Stops before document ``until``, on every rank; tells the first that it was asked for."""

    chunk_tokens = 4000
    first, until = 1 << 30, 1 << 30

    def scores(self, documents: np.ndarray) -> np.ndarray:
        if documents[-1] >= self.until:
            raise StoppedError("stopped")
        self.first = min(self.first, int(documents[0]))
        return super().scores(documents)


def perplexity(
    corpus: Corpus, folder: Path, overrides: Sequence[str] = (), kind: type[CheckpointPerplexity] = CheckpointPerplexity
) -> Any:
    return kind(corpus, folder, device="cpu", max_tokens=LENGTH, overrides=overrides)


def utility(corpus: Corpus, folder: Path, overrides: Sequence[str] = (), **more: Any) -> Utility:
    settings = {"proxy_sequences": PROXY, "max_tokens": LENGTH, "warm_steps": WARM, "overrides": overrides, **more}
    return Utility(corpus, folder, device="cpu", **settings)


def some(corpus: Corpus) -> np.ndarray:
    """The first document, which follows no other, and ten that follow one another."""
    return np.concatenate([[0], np.arange(36, 46)])


def scored(method: Any, documents: np.ndarray) -> np.ndarray:
    try:
        method.ready(Path(), lambda what, tokens: lambda count: None)
        return method.scores(documents)
    finally:
        method.close()


def on_ranks(job: str, place: Path, folder: Path) -> np.ndarray | None:
    """Utilities of some documents at one layout; of the others a column of losses, or half a one."""
    corpus, (_, overrides) = Corpus.open(place), (LAYOUTS | COLUMNS)[job]
    if job in LAYOUTS:
        return scored(utility(corpus, folder, overrides, contrast=True), some(corpus))
    if job == "half":
        half = perplexity(corpus, folder, overrides, Stopping)
        half.until = len(corpus) // 2
        with pytest.raises(StoppedError, match="stopped"):
            make_column(corpus, "resumed", half)
        return None
    command = ["score", "--corpus", str(place), "--method", "perplexity", "--checkpoint", str(folder)]
    assert main([*command, "--max-tokens", str(LENGTH), "--name", job, "--device", "cpu", *overrides]) == 0
    return None


@pytest.fixture(scope="module")
def jobs(corpus: Corpus, model: tuple[Path, Any], pool: Pool) -> Jobs[str]:
    sizes = {job: size for job, (size, _) in (LAYOUTS | COLUMNS).items()}
    return pool.jobs(sizes, on_ranks, corpus.path, model[0]).begin(sizes)


@pytest.fixture(scope="module")
def alone(corpus: Corpus, model: tuple[Path, Any]) -> dict[str, np.ndarray]:
    """The same by one process."""
    return {
        "utility": scored(utility(corpus, model[0], contrast=True), some(corpus)),
        "loss": scored(perplexity(corpus, model[0]), some(corpus)),
    }


# -- what the numbers are ----------------------------------------------------------------------------------------------


def windows(corpus: Corpus, document: int) -> list[Tensor]:
    """The tokens of each window of a document, (1, labels + 1)."""
    found, _ = windows_of(corpus, np.array([document]), LENGTH, first_only=False)
    rows = found.batch()
    return [row[None, : count + 1] for row, count in zip(rows, found.counts.tolist(), strict=True)]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean()


def gradient(model: Any, tokens: Tensor) -> Tensor:
    """(weights,) float64, of the mean loss."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, tokens), list(model.parameters()))])


def test_perplexity_is_that_of_transformers(
    corpus: Corpus, model: tuple[Path, Any], alone: dict[str, np.ndarray]
) -> None:
    for place, document in list(enumerate(some(corpus)))[::4]:
        parts, total = windows(corpus, int(document)), 0.0
        with torch.no_grad():
            total = sum(float(loss_of(model[1], part)) * (part.shape[1] - 1) for part in parts)
        expected = total / sum(part.shape[1] - 1 for part in parts)
        assert alone["loss"][place] == pytest.approx(expected, rel=1e-5)


def test_utility_is_by_an_optimizer_that_saw_gradients_of_the_pool(corpus: Corpus, model: tuple[Path, Any]) -> None:
    """Held to AdamW worked out by hand on transformers' model: clipped gradients at its own weights."""
    folder, theirs = model
    optim = {"betas": [0.8, 0.9], "lr": 0.01, "clip_grad": 0.3, "eps": 1e-7}
    method = utility(corpus, folder, [f"optim.{key}={value}" for key, value in optim.items()], estimator="exact")
    few = corpus.lengths.argsort()[:3]
    found = scored(method, few)
    second, batch = torch.zeros(sum(p.numel() for p in theirs.parameters()), dtype=torch.float64), 32
    stream = CandidateStream(Sequences(corpus, "pool", LENGTH), batch, method.config.seed, "static warm")
    for step in range(WARM):
        seen = gradient(theirs, stream.at(step).batch())
        assert seen.norm() > 0.3  # so that clipping counts
        second = 0.9 * second + 0.1 * (seen * 0.3 / seen.norm()) ** 2
    proxy = gradient(theirs, method._proxy.batch())
    bounded = (0.9 * second + 0.1 * proxy**2) / (1 - 0.9 ** (WARM + 1))
    scale = 0.01 * (1 - 0.8) / (1 - 0.8 ** (WARM + 1)) / (bounded.sqrt() + 1e-7)
    for place, document in enumerate(few):
        parts = windows(corpus, int(document))
        each = [float(scale @ (gradient(theirs, part) * proxy)) * (part.shape[1] - 1) for part in parts]
        assert found[place] == pytest.approx(sum(each) / sum(part.shape[1] - 1 for part in parts), rel=1e-3)
    about = method.about
    assert about["optim"] | optim == about["optim"]
    assert (about["warm_steps"], about["warm_sequences"]) == (WARM, batch)


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_same(layout: str, jobs: Jobs[str], alone: dict[str, np.ndarray]) -> None:
    expected = alone["utility"]
    for found in jobs[layout]:
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * expected.std())


def test_ranks_write_one_column(jobs: Jobs[str], corpus: Corpus, alone: dict[str, np.ndarray]) -> None:
    jobs["whole"]
    column = load_column(corpus, "whole")
    np.testing.assert_allclose(column.values[some(corpus)], alone["loss"], rtol=1e-5)
    folder = corpus.path.with_name("corpus.scores") / "whole"
    assert "parallel" not in json.loads((folder / COLUMN).read_text())  # a column of any layout is the same


def test_what_ranks_left_is_gone_on_with_by_one_process(
    jobs: Jobs[str], corpus: Corpus, model: tuple[Path, Any]
) -> None:
    jobs["half"]
    jobs["whole"]
    rest = perplexity(corpus, model[0], (), Stopping)
    make_column(corpus, "resumed", rest)
    assert 0 < rest.first <= len(corpus) // 2
    expected = load_column(corpus, "whole").values
    np.testing.assert_allclose(load_column(corpus, "resumed").values, expected, rtol=1e-5)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_used(corpus: Corpus, model: tuple[Path, Any], tmp_path: Path) -> None:
    folder = model[0]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ModelError, match=r"was tokenised otherwise .*'python -m megaopus prepare --tokenizer"):
        CheckpointPerplexity(corpus, other)
    with pytest.raises(DataError, match=r"--max-tokens 9999: .* reads 1 to 2,048 tokens"):
        CheckpointPerplexity(corpus, folder, max_tokens=9999)
    with pytest.raises(DataError, match=r"--warm-steps 0: must be at least 1, or the optimizer has no state"):
        utility(corpus, folder, warm_steps=0)
    with pytest.raises(DataError, match=r"optim.name=sophia_g: .* labels that the model draws.*choose another"):
        utility(corpus, folder, ["optim=sophia_g"])
    with pytest.raises(ConfigError, match=r"optim.lr .*is not of parallel or engine: the rest is the model's own"):
        CheckpointPerplexity(corpus, folder, overrides=["optim.lr=1"])
    with pytest.raises(ConfigError, match=r"train.steps .*is not of parallel, engine or optim"):
        utility(corpus, folder, ["train.steps=1"])
    with pytest.raises(DataError, match=r"engine.name=deepspeed: score runs on the megatron engine alone"):
        CheckpointPerplexity(corpus, folder, overrides=["engine=deepspeed"])
