"""Numbers that strings and seeds decide are those of version 0.1: noise, picks, orders, keys, folder names, weights.

Each depends on a word somewhere in the code ("uniform", "turns", "candidates", a parameter's name, ...). Whoever
renames one changes the batches of every run that goes on. ``golden.json`` has the numbers with what they were asked
with (``tests/fixtures/golden_v01.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from megaopus.build import build_engine
from megaopus.config.compose import compose
from megaopus.data.candidates import CandidateStream, evaluation_buffers
from megaopus.data.config import FilterConfig
from megaopus.data.corpus import Corpus
from megaopus.data.mixture import parse_stages
from megaopus.data.permutation import permute
from megaopus.data.score_filter import kept_documents
from megaopus.data.sequences import Sequences
from megaopus.data.text_features import ensure_text_features, text_features_folder
from megaopus.distributed.mesh import Mesh
from megaopus.engine.batch_split import seed_dropout
from megaopus.engine.gpt_forward import SampledLabels
from megaopus.selection import (
    CountSketch,
    ModuleBackend,
    SelectionConfig,
    Selector,
    TensorCandidates,
    counter_rng,
    guards,
    sampler,
)
from megaopus.selection.config import GuardConfig, PrescreenConfig
from tests.compat.v01 import FIXTURE, copied, frozen, inside, megaopus

GOLDEN = frozen("golden.json")
SEED = 1234


def close(found: Any, expected: list[str], rel: float = 1e-12) -> bool:
    """Return whether numbers equal those written by ``float.hex``."""
    return list(found) == pytest.approx([float.fromhex(value) for value in expected], rel=rel)


# -- noise and picks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", GOLDEN["noise"]["keys"], ids=lambda asked: "-".join(map(str, asked["parts"])))
def test_keys_of_noise(asked: dict[str, Any]) -> None:
    assert counter_rng.key(*asked["parts"]) == asked["key"]


def test_noise() -> None:
    golden = GOLDEN["noise"]
    counters = torch.tensor(golden["counters"])
    assert counter_rng.bits(golden["seed"], counters).tolist() == golden["bits"]
    assert close(counter_rng.uniform(golden["seed"], counters).tolist(), golden["uniform"])
    assert close(counter_rng.gumbel(golden["seed"], counters).tolist(), golden["gumbel"])
    assert guards.token_signatures(torch.tensor(golden["tokens"])).tolist() == golden["signatures"]
    assert CountSketch("weight", torch.arange(12), 5, 42)(torch.arange(24.0).view(2, 12)).tolist() == golden["sketch"]


@pytest.mark.parametrize("draws", GOLDEN["picks"]["draws"], ids=lambda draws: f"{draws['seed']}-{draws['step']}")
def test_picks_of_the_samplers(draws: dict[str, Any]) -> None:
    golden = GOLDEN["picks"]
    ids, domains = torch.tensor(golden["ids"]), torch.tensor(golden["domains"])
    utilities, penalty = (torch.tensor(golden[name], dtype=torch.float64) for name in ("utilities", "penalty"))
    key = {"seed": draws["seed"], "step": draws["step"]}
    found = {
        "uniform": sampler.pick_uniform(ids, 5, **key),
        "boltzmann": sampler.pick(utilities, ids, 5, sampler.Draws("boltzmann", 0.9, **key)),
        "diverse": sampler.pick(utilities, ids, 5, sampler.Draws("boltzmann", 0.9, **key), penalty),
        "greedy": sampler.pick(utilities, ids, 5, sampler.Draws("top_k", 0.9, **key), penalty),
    }
    assert {name: picks.tolist() for name, picks in found.items()} == {name: draws[name] for name in found}
    quotas = guards.quotas(0.7, domains, domains, 5, **key)
    assert {str(domain): count for domain, count in quotas.items()} == draws["quotas"]
    assert sampler.pick_top_k(utilities, ids, 5).tolist() == golden["top_k"]


class Toy(nn.Module):
    """Two weights, which make a sequence's loss: their products with the means of its numbers and of their squares."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x * x], -1) @ self.weights


class ToyTraits:
    """Traits of a candidate that its id tells, as a user of version 0.1 would write them."""

    def features(self, ids: Tensor) -> Tensor:
        return torch.stack([ids % 5, ids % 7], 1).float() / 5

    def log_odds(self, ids: Tensor) -> Tensor:
        return (ids % 11).double()

    def importance(self, ids: Tensor) -> Tensor:
        return (ids * 37 % 101).double() / 50

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        return ids % 40 if near else ids

    def domains(self, ids: Tensor) -> Tensor:
        return ids % 3


def numbers(ids: Tensor) -> Tensor:
    """(n, 6) a sequence of each id."""
    return ((ids[:, None] * 7919 + torch.arange(6) * 104729) % 1009).float() / 1009


def settings() -> dict[str, Callable[[], SelectionConfig]]:
    """One for each word that noise is keyed by."""
    off = GuardConfig(exposure_cap=0, min_ess=0, min_distinct=0, min_unique=0)
    by_loss = {"method": "high_ppl", "guards": off, "temperature": 0.3}
    exact = {"method": "opus", "estimator": "exact", "guards": off, "proxy_ema": 0.0, "bounded": False}
    capped = {"exposure_cap": 1, "min_ess": 0, "min_distinct": 0}
    return {
        "uniform": lambda: SelectionConfig(method="uniform"),
        "boltzmann": lambda: SelectionConfig(sampler="boltzmann", **by_loss),
        "turns": lambda: SelectionConfig(score_every=3, **by_loss),
        "window": lambda: SelectionConfig(score_length=2, score_window="random", **by_loss),
        "floor": lambda: SelectionConfig(method="high_ppl", guards=GuardConfig(domain_floor=0.7, **capped)),
        "near_duplicates": lambda: SelectionConfig(
            method="high_ppl", guards=GuardConfig(near_duplicates=True, **capped)
        ),
        "domain_oracle": lambda: SelectionConfig(method="domain_oracle", guards=off),
        "importance": lambda: SelectionConfig(method="importance", guards=off),
        "dsir": lambda: SelectionConfig(method="dsir", guards=off, sampler="boltzmann"),
        "diverse": lambda: SelectionConfig(redundancy=0.5, sampler="boltzmann", **exact),
        "slice": lambda: SelectionConfig(prescreen=PrescreenConfig(mode="predict", slice=6, every=2), **exact),
    }


@pytest.mark.parametrize("name", GOLDEN["selectors"])
def test_picks_of_selectors(name: str) -> None:
    """Ids picked and scored in six steps, through the library's public classes."""
    config, model = settings()[name](), Toy()
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, x: model(x).mean(1))
    selector = Selector(
        config,
        backend,
        num_selected=4,
        proxy=lambda step: TensorCandidates(numbers(torch.arange(6) + 100 * step)),
        seed=SEED,
        wanted=lambda candidates: candidates.ids % 3 == 1,
        text_features=ToyTraits(),
    )
    every, picked, scored = config.score_every, [], []
    for step in range(6):
        ids = 48 * (step // every) + torch.arange(16 * every) * 5 % 48
        found = selector.select(TensorCandidates(numbers(ids), ids), step)
        picked.append(found.picked_ids.tolist())
        scored.append([] if found.scored is None else ids[found.scored].tolist())
    assert {"picked": picked, "scored": scored} == GOLDEN["selectors"][name]


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", GOLDEN["permutation"], ids=lambda asked: str(asked["n"]))
def test_permutations(asked: dict[str, Any]) -> None:
    places = np.arange(min(asked["n"], 12))
    assert permute(places, asked["n"], asked["key"]).tolist() == asked["images"]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.open(FIXTURE / "corpus", verify=True)


@pytest.mark.parametrize("name", GOLDEN["data"]["streams"])
def test_orders_of_candidates(name: str, corpus: Corpus) -> None:
    """With weights, stages, filters, serving several steps; of the proxy and the contrast."""
    golden = GOLDEN["data"]["streams"][name]
    asked = golden["asked"]
    kept = kept_documents(corpus, FilterConfig(**asked["filter"])) if "filter" in asked else None
    assert ([] if kept is None else np.flatnonzero(kept.documents).tolist()) == golden["kept"]
    sequences = Sequences(corpus, asked["split"], 32, asked.get("domains"), kept)
    assert sequences.key == golden["key"]
    more = {"serves": asked.get("serves", 1), "stages": parse_stages(asked.get("weights", []))}
    for seed, steps in golden["ids"].items():
        stream = CandidateStream(sequences, asked["count"], int(seed), asked["purpose"], **more)
        assert {step: stream.at(int(step)).ids.tolist() for step in steps} == steps


def test_sequences_to_validate_on(corpus: Corpus) -> None:
    sequences = Sequences(corpus, "validation", 32)
    assert sequences.key == GOLDEN["data"]["validation_key"]
    assert {name: part.ids.tolist() for name, part in evaluation_buffers(sequences, 4).items()} == GOLDEN["data"][
        "fixed"
    ]


def test_traits_are_the_same_and_lie_where_they_lay(corpus: Corpus, tmp_path: Path) -> None:
    pool, proxy = Sequences(corpus, "pool", 32), Sequences(corpus, "proxy", 32, ["rivers"])
    (frozen_folder,) = (FIXTURE / "corpus.traits").iterdir()
    assert text_features_folder(pool, proxy, None) == frozen_folder
    assert frozen_folder.name == GOLDEN["data"]["traits_folder"]
    again = ensure_text_features(pool, proxy, str(tmp_path), Console(quiet=True))
    assert {path.name for path in again.iterdir()} == {path.name for path in frozen_folder.iterdir()}
    for path in frozen_folder.iterdir():
        found, expected = np.load(again / path.name), np.load(path)
        assert found.dtype == expected.dtype
        if expected.dtype.kind == "i":
            assert (found == expected).all()
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-2 if found.itemsize == 2 else 1e-4, atol=1e-4)


def test_the_same_documents_make_the_same_corpus(tmp_path: Path) -> None:
    """Splits and fingerprint, with the tokenizer given."""
    golden = GOLDEN["data"]
    sources = [f"{name}={FIXTURE}/sources/{name}.jsonl" for name in ("rivers", "code", "noise")]
    rule = ["--wanted", "rivers", "--wanted", "code", "--proxy-fraction", "0.2", "--validation-fraction", "0.15"]
    named = [part for source in sources for part in ("--source", source)]
    given = ["--tokenizer", str(FIXTURE / "corpus" / "tokenizer.json"), "--out", "corpus"]
    assert megaopus(tmp_path, "prepare", *named, *rule, *given) == 0
    made = Corpus.open(tmp_path / "corpus")
    assert made.split_codes.tolist() == golden["splits"]
    assert made.fingerprint == golden["fingerprint"]


def test_the_same_items_make_the_same_proxy(tmp_path: Path) -> None:
    golden = GOLDEN["data"]["bench_proxy"]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in golden["items"]))
    asked = ["--corpus", "corpus", "--items", "items.jsonl", "--tokens", "600", "--workers", "1", "--out", "out"]
    asked += ["--min-tokens", "0", "--per-item", "0", "--per-near-duplicate", "0", "--held-out", "0"]  # not in 0.1
    assert megaopus(copied(tmp_path), "proxy", *asked) == 0
    made = Corpus.open(tmp_path / "out")
    assert made.split_codes.tolist() == golden["splits"]
    assert made.fingerprint == golden["fingerprint"]


def test_scores_are_the_same(tmp_path: Path) -> None:
    asked = ["--corpus", "corpus", "--method", "dsir", "--name", "again"]
    assert megaopus(copied(tmp_path), "score", *asked) == 0
    found, expected = (np.load(tmp_path / "corpus.scores" / name / "scores.npy") for name in ("again", "dsir"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# -- model -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_weights_before_the_first_update(name: str, tmp_path: Path) -> None:
    """Each whole parameter is drawn by its name in the whole model, which is the same at every layout.

    Dropout and the labels that Sophia-G samples, too, are drawn by seed and step.
    """
    golden = GOLDEN["models"][name]
    with inside(copied(tmp_path)):
        config = compose(golden["overrides"])
        mesh = Mesh(config.parallel, "cpu")
        try:
            weights = {key: value.detach() for key, value in build_engine(config, mesh, 320).named_parameters()}
            seed_dropout(mesh, SEED, 5)
            assert torch.initial_seed() == golden["dropout"]
            chances = SampledLabels(mesh, SEED, 5).uniforms(torch.tensor([0, 3]), 2)
        finally:
            mesh.close()
    assert all(close(row, wanted) for row, wanted in zip(chances.tolist(), golden["chances"], strict=True))
    assert {key: list(value.shape) for key, value in weights.items()} == {
        key: value["shape"] for key, value in golden["weights"].items()
    }
    for key, expected in golden["weights"].items():
        values = weights[key].flatten()
        same = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == expected["sha256"]
        assert same or close(values[:3].tolist(), expected["first"], rel=1e-5), key
