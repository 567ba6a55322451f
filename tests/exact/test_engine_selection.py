"""Selection inside the engine: alike at dp = 1 and 2, equal to plain PyTorch, true to the oracle, and without trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.reference_gpt import ReferenceGPT
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig
from megaopus.selection import ModuleBackend, Selector
from megaopus.selection.config import SelectionConfig
from megaopus.selection.estimators.countsketch import CountSketchEstimator
from megaopus.selection.estimators.directional import directional_utilities
from megaopus.selection.estimators.exact import exact_utilities
from tests.exact.estimators_toy import SEQ_LEN, VOCAB, buffer, proxy, spearman
from tests.harness import MODELS, TINY, TokenCandidates, random_batch, state_of, tiny_engine
from tests.pool import Jobs, Pool

OPTIMIZERS = {
    "adamw": OptimConfig(name="adamw", lr=3e-3, warmup_steps=5, schedule="constant"),
    "muon": OptimConfig(name="muon", lr=3e-3, matrix_lr=0.02, warmup_steps=5, schedule="constant"),
}
METHODS = {
    "directional": SelectionConfig(method="opus", proxy_batch_size=4, proxy_half_life=7.0, score_micro_batch_size=4),
    "countsketch": SelectionConfig(
        method="opus",
        estimator="countsketch",
        sampler="boltzmann",
        redundancy=0.5,
        proxy_batch_size=4,
        sketch_dim=1024,
        score_micro_batch_size=4,
    ),
    "exact": SelectionConfig(method="opus", estimator="exact", proxy_batch_size=4),
    "high_ppl": SelectionConfig(method="high_ppl", score_micro_batch_size=4),
}


def text(size: int, step: int) -> TokenCandidates:
    """Windows of documentation, code and shuffled text, the same on every rank."""
    return TokenCandidates(buffer(size, seed=1000 + 7 * step).batch(), step * size + torch.arange(size))


def wanted(size: int, step: int) -> TokenCandidates:
    return TokenCandidates(proxy(step).batch()[:size], torch.arange(size))


def build(
    mesh: Mesh,
    optimizer: str,
    model: ModelConfig = TINY,
    precision: str = "fp32",
    parallel: ParallelConfig | None = None,
) -> MegatronEngine:
    return tiny_engine(
        mesh,
        model=model,
        optim=OPTIMIZERS[optimizer],
        engine=EngineConfig(device="cpu", precision=precision),
        parallel=parallel,
        micro_batch_size=2,  # at every layout: in 16 bits other micro-batches have other sums
        seq_len=SEQ_LEN,
        vocab_size=VOCAB,
    )


def selector(engine: MegatronEngine, method: str, num_selected: int = 4) -> Selector:
    config = METHODS[method]
    return Selector(
        config,
        engine.scoring_backend(),
        num_selected=num_selected,
        proxy=lambda step: wanted(config.proxy_batch_size, step),
        seed=7,
    )


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    alone = Mesh(ParallelConfig(), "cpu")
    yield alone
    alone.close()


# -- data-parallel ranks ---------------------------------------------------------------------------------------------


def select_and_train(mesh: Mesh, method: str, optimizer: str) -> list[tuple[list[int], Tensor | None]]:
    """(picked ids, utilities) of seven steps of the training loop."""
    engine = build(mesh, optimizer)
    choose = selector(engine, method)
    picked = []
    for step in range(7):
        candidates = text(8, step)
        selection = choose.select(candidates, step)
        engine.train_step(candidates.take(selection.indices))
        picked.append((selection.picked_ids.tolist(), selection.utilities))
    return picked


def select_and_train_case(case: tuple[str, str]) -> list[tuple[list[int], Tensor | None]]:
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        return select_and_train(mesh, *case)
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def two_ranks(pool: Pool, selected: Callable[..., list[tuple[str, str]]]) -> Jobs[tuple[str, str]]:
    """(method, optimizer) -> what each of two ranks found."""
    cases = dict.fromkeys(product(METHODS, OPTIMIZERS), 2)
    return pool.jobs(cases, select_and_train_case).begin(selected("method", "optimizer"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_pick_what_one_picks(
    method: str, optimizer: str, two_ranks: Jobs[tuple[str, str]], mesh: Mesh
) -> None:
    alone = select_and_train(mesh, method, optimizer)
    selecting = [utilities for _, utilities in alone if utilities is not None]
    assert len(selecting) == (7 if method == "high_ppl" else 6)  # the optimizer has no state before the first update
    assert len({tuple(ids) for ids, _ in alone}) == 7
    for found in two_ranks[method, optimizer]:
        assert [ids for ids, _ in found] == [ids for ids, _ in alone]
        for (_, utilities), (_, expected) in zip(found, alone, strict=True):
            if expected is not None:
                torch.testing.assert_close(utilities, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


DIFFERING = {
    "dp2": (ParallelConfig(), "megatron"),
    "tp2": (ParallelConfig(tp=2), "megatron"),
    "pp2": (ParallelConfig(pp=2), "megatron"),
    "dp2-zero": (ParallelConfig(), "deepspeed"),
}


def train_on_other_picks(layout: str) -> tuple[str, bool]:
    """(what is said where the second rank has other picks, whether weights and state are as before)."""
    parallel, name = DIFFERING[layout]
    mesh = Mesh(parallel, "cpu")
    try:
        engine = tiny_engine(
            mesh, parallel=parallel, engine=EngineConfig(name=name, device="cpu", precision="fp32"), micro_batch_size=2
        )
        engine.stop_asked = lambda: mesh.rank == 1
        first = engine.train_step(random_batch(8, 0))
        assert first.applied
        assert first.stop_asked  # on each rank, though one alone was
        before, batch = state_of(engine), random_batch(16, 1)
        own = torch.arange(8) + (torch.arange(8) > 6) * mesh.rank
        with pytest.raises(EngineError) as caught:
            engine.train_step(batch.take(own))
        same = all(torch.equal(new, old) for new, old in zip(state_of(engine), before, strict=True))
        return str(caught.value), same
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def differing(pool: Pool, selected: Callable[..., list[str]]) -> Jobs[str]:
    """Layout -> what each of two ranks said."""
    return pool.jobs(dict.fromkeys(DIFFERING, 2), train_on_other_picks).begin(selected("differs"))


@pytest.mark.parametrize("differs", DIFFERING)
def test_no_weight_changes_where_ranks_picked_differently(differs: str, differing: Jobs[str]) -> None:
    """Any two ranks may differ, of one model too; who picked what is said on each."""
    if DIFFERING[differs][1] == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is an optional extra (megaopus[deepspeed])")
    for said, same in differing[differs]:
        assert same
        picks = "7 of 8 are the same: rank 0 picked 23; rank 1 picked 24."
        assert said.startswith(f"step 1: ranks picked different sequences, {picks}")


# -- against plain PyTorch -------------------------------------------------------------------------------------------


def plain_backend(engine: MegatronEngine) -> ModuleBackend:
    """A ReferenceGPT with the engine's weights, under torch optimizers with the engine's state and learning rates."""

    def gpt(values: dict[str, Tensor]) -> ReferenceGPT:
        model = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=VOCAB, positions=SEQ_LEN)
        model.copy_weights(values.items())
        return model

    names = dict(engine.module.named_parameters())
    model = gpt({name: p.detach() for name, p in names.items()})
    of = {id(p): q for p, q in zip(gpt_order(engine), model.parameters(), strict=True)}
    optimizers = []
    for optimizer in engine.optimizer.torch_optimizers:
        kind = {"AdamW": torch.optim.AdamW, "Muon": torch.optim.Muon}[type(optimizer).__name__]
        keep = ("lr", "weight_decay", "betas", "eps", "momentum", "ns_steps", "nesterov")
        groups = [
            {"params": [of[id(p)] for p in group["params"]], **{key: group[key] for key in keep if key in group}}
            for group in optimizer.param_groups
        ]
        copy = kind(groups)
        for p, state in optimizer.state.items():
            copy.state[of[id(p)]] = {key: value.clone() for key, value in state.items()}
        optimizers.append(copy)
    return ModuleBackend(model, optimizers, lambda model, tokens: model(tokens).double().mean(1))


def gpt_order(engine: MegatronEngine) -> list[Tensor]:
    """The engine's parameters in the order of ReferenceGPT's, found by marking each with its number."""
    parameters = list(engine.module.named_parameters())
    marks = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=VOCAB, positions=SEQ_LEN)
    marks.copy_weights((name, torch.full_like(p, float(i))) for i, (name, p) in enumerate(parameters))
    return [parameters[int(mark.flatten()[0])][1] for mark in marks.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_scores_equal_those_of_a_plain_gpt(optimizer: str, mesh: Mesh) -> None:
    engine = build(mesh, optimizer)
    for step in range(12):
        engine.train_step(text(8, step))
    scored = engine.scoring_backend()
    operator = scored.operator()
    plain = plain_backend(engine)
    candidates, target = text(16, 50), wanted(16, 3)
    gradient, plain_gradient = scored.gradient(target), plain.gradient(target)
    pairs = {
        "losses": (scored.losses(candidates), plain.losses(candidates)),
        "exact": (
            exact_utilities(scored, candidates, operator, gradient),
            exact_utilities(plain, candidates, plain.operator(), plain_gradient),
        ),
        "directional": (
            directional_utilities(scored, candidates, operator, gradient),
            directional_utilities(plain, candidates, plain.operator(), plain_gradient),
        ),
    }
    for what, (found, expected) in pairs.items():
        assert expected.std() > 0
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-4, f"{what}: {error:.1e}"


# -- against the oracle ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(mesh: Mesh) -> Callable[[str, str], MegatronEngine]:
    """Engines after 150 updates on all three kinds of text, each trained once."""
    engines: dict[tuple[str, str], MegatronEngine] = {}

    def get(model: str, optimizer: str) -> MegatronEngine:
        if (model, optimizer) not in engines:
            engine = build(mesh, optimizer, MODELS[model])
            losses = [engine.train_step(text(8, step)).loss for step in range(150)]
            assert losses[-1] < losses[0] - 1
            engines[model, optimizer] = engine
        return engines[model, optimizer]

    return get


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_estimators_agree_with_the_oracle(model: str, optimizer: str, trained: Callable) -> None:
    engine = trained(model, optimizer)
    backend = engine.scoring_backend()
    operator, gradient = backend.operator("full"), backend.gradient(wanted(32, 3))
    candidates = text(24, 500)
    exact = exact_utilities(backend, candidates, operator, gradient)
    directional = directional_utilities(backend, candidates, operator, gradient)
    assert spearman(directional, exact) >= 0.99
    estimator = CountSketchEstimator(8192, 42)
    linear = {layer.parameter for layer in estimator.layers(backend)}
    assert len(linear) == 4 * 2 + 1
    exact_linear = exact_utilities(backend, candidates, operator, gradient, parameters=linear)
    sketched, _ = estimator.estimate(backend, candidates, operator, gradient)
    assert spearman(sketched, exact_linear) >= 0.95


# -- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_perturbed_weights_come_back_to_the_last_bit(precision: str, fails: bool, mesh: Mesh) -> None:
    engine = build(mesh, "adamw", precision=precision)
    engine.train_step(text(8, 0))
    backend = engine.scoring_backend()
    before = [p.detach().clone() for p in (*engine.module.parameters(), *backend.parameters().values())]
    direction = {name: torch.randn_like(p) for name, p in backend.parameters().items()}
    inside = []
    try:
        with backend.perturbed(direction) as move:
            move(0.37)
            inside = [p.detach().clone() for p in engine.module.parameters()]
            move(-1.0)
            move(0.37)
            again = engine.module.parameters()
            assert all(torch.equal(p, first) for p, first in zip(again, inside, strict=True))
            move(0.25)
            inside = [p.detach().clone() for p in engine.module.parameters()]
            move(torch.tensor(0.25, dtype=torch.float64))  # as where it is on a device
            again = engine.module.parameters()
            assert all(torch.equal(p, first) for p, first in zip(again, inside, strict=True))
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass
    assert all(not torch.equal(moved, old) for moved, old in zip(inside, before, strict=False))
    after = [*engine.module.parameters(), *backend.parameters().values()]
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_selecting_leaves_no_trace_in_training(method: str, optimizer: str, precision: str, mesh: Mesh) -> None:
    """Weights, optimizer state and random states; the next update, dropout on, is the same with and without."""
    model = replace(TINY, dropout=0.1)
    ends = []
    for selects in (False, True):
        engine = build(mesh, optimizer, model, precision)
        for step in range(3):
            engine.train_step(text(4, step))
        if selects:
            before, random_state = state_of(engine), torch.get_rng_state()
            modes = [module.training for module in engine.ddp.modules()]
            selection = selector(engine, method).select(text(8, 3), 3)
            assert selection.utilities is not None
            assert all(torch.equal(x, y) for x, y in zip(state_of(engine), before, strict=True))
            assert torch.equal(torch.get_rng_state(), random_state)
            assert [module.training for module in engine.ddp.modules()] == modes
        results = [engine.train_step(text(4, step)) for step in (3, 4)]
        ends.append((results, state_of(engine)))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(x, y) for x, y in zip(ends[0][1], ends[1][1], strict=True))
