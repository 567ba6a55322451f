"""Isolated documents are as each on its own, and masked tokens are context alone: at every layout, scoring included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.gpt_forward import SequenceRules, document_starts, token_losses
from megaopus.models.gpt import canonical_names, full_parameters
from megaopus.selection import SelectionConfig, Selector
from tests.harness import LLAMA, TINY, TokenCandidates, gentle, tiny_engine
from tests.pool import Jobs, Pool

END, LENGTH = 7, 16
ISOLATED = SequenceRules(document_end=END, isolated=True)
MASKED = replace(ISOLATED, marked=True, skip_first=True)
MODELS = {"learned": TINY, "rotary, window": replace(LLAMA, window=6), "loss mask": TINY}
RULES = {"loss mask": MASKED}
CPU = EngineConfig(device="cpu", precision="fp32")
LAYOUTS: Mapping[str, tuple[int, ParallelConfig, EngineConfig]] = {
    "one": (1, ParallelConfig(), CPU),
    "tp2-sp": (2, ParallelConfig(tp=2, sequence_parallel=True), CPU),
    "pp2": (2, ParallelConfig(pp=2), CPU),
    "cp2": (2, ParallelConfig(cp=2), CPU),
    "zero3-dp2": (2, ParallelConfig(), replace(CPU, name="deepspeed", zero_stage=3)),
}


def texts(count: int, step: int, marked: bool = False) -> TokenCandidates:
    """Sequences in which a fifth of the tokens ends a document, and, if ``marked``, about half are context alone.

    The second has no other then, as a long question may.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 128, (count, LENGTH + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = END
    if marked:
        context = torch.rand(tokens.shape, generator=generator) < torch.linspace(0.2, 0.8, count)[:, None]
        context[1:2] = True
        tokens = torch.where(context, ~tokens, tokens)
    return TokenCandidates(tokens, step * 100 + torch.arange(count))


def build(mesh: Mesh, model: str, parallel: ParallelConfig, engine: EngineConfig) -> Any:
    rules = RULES.get(model, ISOLATED)
    settings = {"model": MODELS[model], "parallel": parallel, "engine": engine, "optim": gentle("adamw")}
    return tiny_engine(mesh, **settings, rules=rules)


def numbers(layout: str) -> dict[str, dict[str, Any]]:
    """Model -> losses, weights after two updates, utilities."""
    _, parallel, engine = LAYOUTS[layout]
    mesh, found = Mesh(parallel, "cpu"), {}
    try:
        for model in MODELS:
            built = build(mesh, model, parallel, engine)
            marked = built.rules.marked
            steps = [built.train_step(texts(8, step, marked)) for step in range(2)]
            config = SelectionConfig(
                method="opus", estimator="adjoint", score_micro_batch_size=2, proxy_half_life=0.0, proxy_batch_size=4
            )
            selector = Selector(config, built.scoring_backend(), num_selected=4, proxy=partial(_proxy, marked), seed=1)
            found[model] = {
                "losses": torch.tensor([step.loss for step in steps]),
                "counted": [step.loss_tokens for step in steps],
                "validation": built.evaluate(texts(5, 9, marked)),
                "utilities": selector.select(texts(8, 3, marked), 2).utilities,
                "weights": full_parameters(built.module, mesh, _main(built)),
            }
        return found
    finally:
        mesh.close()


def _proxy(marked: bool, step: int) -> TokenCandidates:
    return texts(4, 50 + step, marked)


def _main(built: Any) -> dict[str, Tensor]:
    weights = built.optimizer.main_weights()
    return {name: weights[own] for own, name in canonical_names(built.module)}


@pytest.fixture(scope="module")
def ranks(pool: Pool) -> Jobs[str]:
    return pool.jobs({layout: size for layout, (size, *_) in LAYOUTS.items()}, numbers).begin(["one"])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_equals_one_process(layout: str, ranks: Jobs[str]) -> None:
    (one,) = ranks["one"]
    for found in ranks[layout]:
        for model, expected in one.items():
            assert found[model]["counted"] == expected["counted"]
            for key in ("losses", "validation"):
                torch.testing.assert_close(found[model][key], expected[key], rtol=1e-5, atol=1e-6)
            error = (found[model]["utilities"] - expected["utilities"]).norm() / expected["utilities"].norm()
            assert error < 1e-4, (model, error)
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(found[model]["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=name)


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    made = Mesh(ParallelConfig(), "cpu")
    yield made
    made.close()


@pytest.mark.parametrize("model", MODELS)
def test_a_document_in_a_sequence_is_as_one_alone(model: str, mesh: Mesh) -> None:
    masked = build(mesh, model, ParallelConfig(), CPU)
    tokens = texts(3, 0).tokens
    with mesh.megatron(), torch.no_grad():
        together = token_losses(masked.module, tokens, rules=ISOLATED)
        for row, sequence in enumerate(tokens):
            ends = [place + 1 for place in range(LENGTH) if sequence[place] == END]
            for first, last in zip([0, *ends], [*ends, LENGTH], strict=True):
                if first < last:
                    alone = token_losses(masked.module, sequence[None, first : last + 1])[0]
                    torch.testing.assert_close(together[row, first:last], alone, rtol=1e-5, atol=1e-5)
        assert (token_losses(masked.module, tokens) - together).abs().max() > 1e-3


def test_where_documents_start() -> None:
    tokens = torch.tensor([[5, END, END, 1, 2, END], [END, 1, 1, 1, 1, 1]])
    assert document_starts(tokens, END).tolist() == [[0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1]]


def test_a_masked_token_is_context_alone(mesh: Mesh) -> None:
    masked = build(mesh, "loss mask", ParallelConfig(), CPU)
    tokens = texts(6, 0, marked=True).tokens
    plain, counted = _of(tokens)
    assert not counted[1].any()
    with mesh.megatron(), torch.no_grad():
        alone = token_losses(masked.module, plain, rules=ISOLATED)
        found = token_losses(masked.module, tokens, rules=MASKED)
    assert (found[~counted] == 0).all()
    means = torch.where(counted.any(1), (alone * counted).sum(1) / counted.sum(1), 0)
    torch.testing.assert_close(found.mean(1), means)
    step = masked.train_step(TokenCandidates(tokens[:4], torch.arange(4)))
    assert step.loss_tokens == int(counted[:4].sum())
    assert step.loss == pytest.approx(float(means[:4].double().mean()), rel=1e-6)


def test_the_gradient_is_of_the_labels_that_count(mesh: Mesh) -> None:
    masked = build(mesh, "loss mask", ParallelConfig(), CPU)
    batch = texts(4, 2, marked=True)
    found = masked.mean_gradient(batch)
    plain, counted = _of(batch.tokens)
    names, weights = dict(canonical_names(masked.module)), dict(masked.module.named_parameters())
    with mesh.megatron():
        losses = token_losses(masked.module, plain, rules=ISOLATED)
        loss = ((losses * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()
        expected = torch.autograd.grad(loss, list(weights.values()))
    for local, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(found[names[local]], gradient, rtol=1e-4, atol=1e-7, msg=local)
    backend = masked.scoring_backend()
    assert backend.count_labelled(batch) == 3
    assert backend.losses(batch)[1] == 0


def _of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens as they are, and which labels count."""
    plain = torch.where(tokens < 0, ~tokens, tokens)
    return plain, (tokens[:, 1:] >= 0) & (plain[:, :-1] != END)
