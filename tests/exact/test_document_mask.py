"""Documents of one sequence do not see each other: as each on its own, at every layout, scoring included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.gpt_forward import document_starts, token_losses
from megaopus.models.gpt import canonical_names, full_parameters
from megaopus.selection import SelectionConfig, Selector
from tests.harness import LLAMA, TINY, TokenCandidates, gentle, tiny_engine
from tests.pool import Jobs, Pool

END, LENGTH = 7, 16
MODELS = {"learned": TINY, "rotary, window": replace(LLAMA, window=6)}
CPU = EngineConfig(device="cpu", precision="fp32")
LAYOUTS: Mapping[str, tuple[int, ParallelConfig, EngineConfig]] = {
    "one": (1, ParallelConfig(), CPU),
    "tp2-sp": (2, ParallelConfig(tp=2, sequence_parallel=True), CPU),
    "pp2": (2, ParallelConfig(pp=2), CPU),
    "cp2": (2, ParallelConfig(cp=2), CPU),
    "zero3-dp2": (2, ParallelConfig(), replace(CPU, name="deepspeed", zero_stage=3)),
}


def texts(count: int, step: int) -> TokenCandidates:
    """Sequences in which a fifth of the tokens ends a document."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 128, (count, LENGTH + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = END
    return TokenCandidates(tokens, step * 100 + torch.arange(count))


def build(mesh: Mesh, model: str, parallel: ParallelConfig, engine: EngineConfig, end: int | None = END) -> Any:
    settings = {"model": MODELS[model], "parallel": parallel, "engine": engine, "optim": gentle("adamw")}
    return tiny_engine(mesh, **settings, document_end=end)


def numbers(layout: str) -> dict[str, dict[str, Any]]:
    """Model -> losses, weights after two updates, utilities."""
    _, parallel, engine = LAYOUTS[layout]
    mesh, found = Mesh(parallel, "cpu"), {}
    try:
        for model in MODELS:
            built = build(mesh, model, parallel, engine)
            losses = [built.train_step(texts(8, step)).loss for step in range(2)]
            config = SelectionConfig(
                method="opus", estimator="adjoint", score_micro_batch_size=2, proxy_half_life=0.0, proxy_batch_size=4
            )
            selector = Selector(
                config, built.scoring_backend(), num_selected=4, proxy=lambda step: texts(4, 50 + step), seed=1
            )
            found[model] = {
                "losses": torch.tensor(losses),
                "validation": built.evaluate(texts(5, 9)),
                "utilities": selector.select(texts(8, 3), 2).utilities,
                "weights": full_parameters(built.module, mesh, _main(built)),
            }
        return found
    finally:
        mesh.close()


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
        together = token_losses(masked.module, tokens, end=END)
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
