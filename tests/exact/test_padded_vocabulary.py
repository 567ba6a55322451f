"""Padding the vocabulary changes no number: every layout equals one process whose vocabulary is not padded.

The 126 columns of padding lie on the last ranks; of four tensor-parallel ones the third has two of the true ones, the
fourth none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.reference_gpt import ReferenceGPT
from megaopus.build import build_engine
from megaopus.config.compose import compose
from megaopus.data.corpus import Corpus
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.gpt_forward import SampledLabels
from megaopus.models import gpt
from megaopus.models.flops import padded_vocab
from tests.compat.v01 import FIXTURE
from tests.exact.scoring_runs import SETTINGS, relative_error, same_picks, select, served
from tests.exact.test_engine_layouts import assert_close, train
from tests.harness import LLAMA, TINY, gentle, random_batch, tiny_engine
from tests.pool import Jobs, Pool

VOCAB = 130
CASES = {"tied": (TINY, "adamw"), "untied": (replace(LLAMA, num_kv_heads=4, num_layers=4), "sophia_g")}
"""Sophia-G learns from labels that it samples."""
MEGATRON = EngineConfig(device="cpu", precision="fp32")
ZERO_1, ZERO_3 = (replace(MEGATRON, name="deepspeed", zero_stage=stage) for stage in (1, 3))
LAYOUTS = {
    "one": (1, ParallelConfig(), MEGATRON, list(CASES)),
    "tp4": (4, ParallelConfig(tp=4), MEGATRON, ["tied"]),
    "tp2-sp-pp2-vpp2": (4, ParallelConfig(tp=2, pp=2, vpp=2, sequence_parallel=True), MEGATRON, ["untied"]),
    "zero1-tp2": (2, ParallelConfig(tp=2), ZERO_1, ["tied"]),
    "zero3-dp2": (2, ParallelConfig(), ZERO_3, ["tied"]),
}
"""Name -> (ranks, parallel, engine, cases)."""
ESTIMATORS = {name: 1e-4 for name, settings in SETTINGS.items() if "method" not in settings} | {"kronecker": 2e-3}
"""Name -> relative tolerance: differences of losses are rounded, and kronecker fits rows and columns to AdamW's
operator where it is 1 / eps too, in the padding (here a thousand; the usual 1e8 counts for nothing in that fit)."""
TABLES = (gpt.EMBEDDING, "output_layer.weight")


def build(mesh: Mesh, case: str, parallel: ParallelConfig, engine: EngineConfig = MEGATRON) -> Any:
    model, optimizer = CASES[case]
    return tiny_engine(mesh, model=model, optim=gentle(optimizer), parallel=parallel, engine=engine, vocab_size=VOCAB)


def without_padding(mesh: Mesh, case: str) -> Any:
    """Build an engine of one process with tables of VOCAB rows, of the same weights."""
    padded = build(mesh, case, ParallelConfig())
    with mock.patch.object(gpt, "padded_vocab", lambda size: size):
        built = build(mesh, case, ParallelConfig())
    assert len(built.module.embedding.word_embeddings.weight) == VOCAB
    weights = dict(padded.module.named_parameters())
    with torch.no_grad():
        for name, parameter in built.module.named_parameters():
            parameter.copy_(weights[name][: len(parameter)])
    return built


def numbers(engine: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """(everything that training gives, of the tables the true rows alone; the padded rows of a gradient)."""
    found = train(engine)
    tables = [table for table in TABLES if table in found["weights"]]
    padding = [found["gradient"][table][VOCAB:] for table in tables]
    for kind in ("weights", "state", "gradient"):
        found[kind] |= {table: found[kind][table][:VOCAB] for table in tables}
    return found, padding


def train_and_select(layout: str) -> dict[str, Any]:
    """Numbers by case, and picks by estimator, of one rank; "unpadded": of one process without padding."""
    _, parallel, engine, cases = LAYOUTS.get(layout, LAYOUTS["one"])
    mesh = Mesh(parallel, "cpu")
    try:
        found = {}
        for case in cases:
            built = without_padding(mesh, case) if layout == "unpadded" else build(mesh, case, parallel, engine)
            found[case] = numbers(built)
            if case == "tied":
                found["picks"] = {name: select(built, **SETTINGS[name]) for name in served(built, ESTIMATORS)}
        return found
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def ranks(pool: Pool) -> Jobs[str]:
    """Layout -> what each rank found."""
    sizes = {layout: size for layout, (size, *_) in LAYOUTS.items()}
    return pool.jobs({"unpadded": 1, **sizes}, train_and_select).begin(["unpadded"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_that_of_an_unpadded_vocabulary(layout: str, ranks: Jobs[str]) -> None:
    (alone,) = ranks["unpadded"]
    for found in ranks[layout]:
        for case in LAYOUTS[layout][-1]:
            trained, padding = found[case]
            assert all(len(rows) == 126 and not rows.any() for rows in padding)
            assert_close(trained, alone[case][0], case)
        for name, picks in found.get("picks", {}).items():
            assert relative_error(picks, alone["picks"][name]) < ESTIMATORS[name], name
            assert same_picks(picks, alone["picks"][name]), name


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    alone = Mesh(ParallelConfig(), "cpu")
    yield alone
    alone.close()


def test_losses_and_gradient_are_those_of_plain_pytorch_in_float64(mesh: Mesh) -> None:
    """Of true rows alone, whatever the padded ones hold, where all true logits are low."""
    engine = build(mesh, "tied", ParallelConfig())
    weights = dict(engine.module.named_parameters())
    with torch.no_grad():  # every true logit falls by about 33: one direction of the final norm's output is constant
        weights["decoder.final_layernorm.weight"][0] = 0
        weights["decoder.final_layernorm.bias"][0] = 33
        weights[gpt.EMBEDDING][:VOCAB, 0] -= 1
        weights[gpt.EMBEDDING][VOCAB:] = 30 * torch.randn(padded_vocab(VOCAB) - VOCAB, 32)
    plain = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=VOCAB, positions=16).double()
    plain.copy_weights({name: value[:VOCAB] for name, value in weights.items()}.items())
    batch = random_batch(8, 0, vocab_size=VOCAB)
    losses = plain(batch.batch()).mean(1)
    losses.mean().backward()
    losses = losses.detach()
    torch.testing.assert_close(engine.evaluate(batch), losses, rtol=1e-6, atol=0)
    found = engine.mean_gradient(batch)
    assert not found[gpt.EMBEDDING][VOCAB:].any()
    gradient = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=VOCAB, positions=16)
    gradient.copy_weights({name: value[:VOCAB] for name, value in found.items()}.items())
    for (name, parameter), value in zip(plain.named_parameters(), gradient.parameters(), strict=True):
        error = (parameter.grad - value).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"
    assert engine.train_step(batch).loss == pytest.approx(float(losses.mean()), rel=1e-6)


@pytest.mark.parametrize(("given", "counted"), [("null", 320), ("350", 350)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_models_vocabulary_wins_over_the_tokenizers(given: str, counted: int, precision: str, mesh: Mesh) -> None:
    """With all logits equal the loss is the logarithm of how many count; the corpus has 320, padded to 384."""
    shape = ["model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "data.seq_len=16"]
    corpus = [f"data.path={FIXTURE / 'corpus'}", "selection=uniform", "train.global_batch_size=4"]
    chosen = ["engine=cpu", f"engine.precision={precision}", f"model.vocab_size={given}"]
    config = compose([*shape, *corpus, *chosen, "train.micro_batch_size=4"])
    engine = build_engine(config, mesh, Corpus.open(config.data.path).vocab_size)
    with torch.no_grad():
        engine.module.embedding.word_embeddings.weight.zero_()
    losses = engine.evaluate(random_batch(4, 0))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(counted)), rtol=1e-6, atol=0)


def draw(layout: str) -> tuple[Tensor, Tensor]:
    """(labels sampled from given logits, labels at the top of the distribution) of one rank."""
    _, parallel, *_ = LAYOUTS[layout]
    mesh = Mesh(parallel, "cpu")
    try:
        logits, uniforms = drawn_from()
        columns = padded_vocab(VOCAB) // mesh.shape.tp
        own = torch.cat([logits, torch.full((*logits.shape[:2], 126), -torch.inf)], -1)
        own = own[..., mesh.tp_rank * columns : (mesh.tp_rank + 1) * columns]
        sampled = SampledLabels(mesh, 0, 0)
        return sampled._draw(own, uniforms), sampled._draw(own, torch.ones_like(uniforms))
    finally:
        mesh.close()


def drawn_from() -> tuple[Tensor, Tensor]:
    """((B, S, VOCAB) logits, (B, S) uniform numbers)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 500, VOCAB, generator=generator) * 8, torch.rand(4, 500, generator=generator).double()


@pytest.mark.parametrize("layout", ["one", "tp4"])
def test_no_label_of_the_padding_is_drawn(layout: str, pool: Pool) -> None:
    """Each is where the cumulated probability, in float64, reaches its number; the last true one where that is 1."""
    logits, uniforms = drawn_from()
    cumulated = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulated, uniforms.unsqueeze(-1)).squeeze(-1)
    for labels, last in pool.run(LAYOUTS[layout][0], draw, layout):
        assert (labels != expected).double().mean() < 0.002  # where rounding decides
        assert last.max() < VOCAB
        assert (last == VOCAB - 1).double().mean() > 0.5
