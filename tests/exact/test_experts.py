"""A mixture of experts computes what plain PyTorch does, and trains and scores the same at every layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.cpu import prepare_megatron
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig, RouterConfig
from megaopus.models.flops import count_active_parameters, count_parameters, training_flops_per_token
from megaopus.models.gpt import full_parameters
from megaopus.models.names import whole_shapes
from megaopus.optim.registry import OPTIMIZERS
from tests.exact import test_engine_layouts as layouts
from tests.exact.scoring_runs import Picks, relative_error, same_picks, select, step_of_differences
from tests.exact.test_fused_kernels import FUSED, uncompiled
from tests.harness import LLAMA, gentle, random_batch, state_of, tiny_engine
from tests.pool import Jobs, Pool

SOFTMAX = replace(
    LLAMA,
    num_experts=4,
    expert_ffn_hidden_size=32,
    shared_expert_ffn_hidden_size=16,
    first_dense_layers=1,
    router=RouterConfig(balance_loss=0.1, z_loss=0.01),
)
SIGMOID = replace(
    LLAMA,
    num_experts=4,
    expert_ffn_hidden_size=32,
    router=RouterConfig(scores="sigmoid", scale=2.5, bias_rate=0.001, balance_loss=0.01),
)
CASES = {"softmax": (SOFTMAX, "adamw"), "sigmoid": (SIGMOID, "muon")}
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = {
    "ep2": (2, ParallelConfig(ep=2)),
    "ep2-pp2": (4, ParallelConfig(ep=2, pp=2)),
    "ep2-dp2": (4, ParallelConfig(ep=2)),
    "tp2-sp": (2, ParallelConfig(**SP)),
    "ep2-cp2": (2, ParallelConfig(ep=2, cp=2)),
    "ep2-tp2-sp": (2, ParallelConfig(ep=2, **SP)),
    "ep2-dp2-distributed-optimizer": (4, ParallelConfig(ep=2, distributed_optimizer=True)),
    "ep2-tp2-sp-distributed-optimizer": (4, ParallelConfig(ep=2, distributed_optimizer=True, **SP)),
}
"""Name -> (ranks, parallel); under ``tp2-sp`` tensor-parallel ranks split each expert."""
OTHERS = [name for name in OPTIMIZERS if name not in {optimizer for _, optimizer in CASES.values()}]
OTHERS_AT = {"one": OTHERS, "tp2-sp": OTHERS, "ep2-dp2": [name for name in OTHERS if not OPTIMIZERS[name].elementwise]}
"""Where ranks hold parts of an expert, and where several hold the same, which some optimizers have to know."""


def cases(layout: str) -> list[str]:
    """Name those that run at a layout: pieces are AdamW's."""
    sharded = layout in LAYOUTS and LAYOUTS[layout][1].distributed_optimizer
    return [case for case, (_, optimizer) in CASES.items() if not sharded or optimizer == "adamw"]


def build(mesh: Mesh, case: str, parallel: ParallelConfig, optimizer: str | None = None, **more: Any) -> Any:
    model, usual = CASES[case]
    return tiny_engine(mesh, model=model, optim=gentle(optimizer or usual), parallel=parallel, **more)


def biases(engine: Any) -> dict[int, list[float]]:
    """Layer -> the biases that its experts are chosen by, of this rank's layers."""
    routers = [module for module in engine.module.modules() if getattr(module, "expert_bias", None) is not None]
    return {router.layer: router.expert_bias.tolist() for router in routers}


def alone_or_at(layout: str, folder: Path) -> dict[str, Any]:
    """Return what a rank finds; one process ("one") writes checkpoints, which the others read and write again."""
    parallel = ParallelConfig() if layout == "one" else LAYOUTS[layout][1]
    mesh = Mesh(parallel, "cpu")
    found: dict[str, Any] = {}
    try:
        for case in cases(layout):
            engine = build(mesh, case, parallel)
            found[case] = copy.deepcopy(layouts.train(engine))  # its weights are the engine's own
            found[case, "loads"] = engine.train_step(random_batch(8, 50)).expert_loads
            found[case, "biases"] = biases(engine)
            found[case, "picks"] = {
                "plain": select(engine, epsilon=1.0),
                "uneven": select(engine, 13, 3, epsilon=1.0, contrast=True),
            }
            found[case, "step"] = step_of_differences(engine)
            if layout == "one":
                layouts.save(engine, folder / case)
            again = build(mesh, case, parallel)
            found[case, "resumed"] = layouts.resume(again, folder / case)
            layouts.save(again, folder / layout / case)
        if parallel.distributed_optimizer and parallel.tp == 1:
            found["bf16"] = whole_and_in_pieces(mesh, parallel, folder / "bf16")
        for optimizer in OTHERS_AT.get(layout, ()):
            engine = build(mesh, "softmax", parallel, optimizer)
            for step in range(2):
                engine.train_step(random_batch(8, step))
            found[optimizer] = {"weights": full_parameters(engine.module, mesh)}
    finally:
        mesh.close()
    return found


def whole_and_in_pieces(mesh: Mesh, parallel: ParallelConfig, folder: Path) -> list[dict[str, Any]]:
    """Train in bf16 with an optimizer that shares nothing, then with ``parallel``; both go on from the first's save."""
    engine, found = EngineConfig(device="cpu", precision="bf16"), []
    for each in (replace(parallel, distributed_optimizer=False), parallel):
        built = build(mesh, "softmax", each, engine=engine)
        found.append({"trained": layouts.train(built)})
        if not each.distributed_optimizer:
            layouts.save(built, folder)
        found[-1]["resumed"] = layouts.resume(build(mesh, "softmax", each, engine=engine), folder)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def one_process(pool: Pool, folder: Path) -> dict[str, Any]:
    return pool.run(1, alone_or_at, "one", folder)[0]


@pytest.fixture(scope="module")
def ranks(pool: Pool, one_process: dict[str, Any], folder: Path, selected: Callable[[str], list[str]]) -> Jobs[str]:
    """Layout -> what each rank found; it reads checkpoints that one process wrote."""
    return pool.jobs({layout: size for layout, (size, _) in LAYOUTS.items()}, alone_or_at, folder).begin(
        selected("layout")
    )


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    alone = Mesh(ParallelConfig(), "cpu")
    yield alone
    alone.close()


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_one_process(layout: str, ranks: Jobs[str], one_process: dict[str, Any]) -> None:
    for found in ranks[layout]:
        for case in cases(layout):
            layouts.assert_close(found[case], one_process[case], (layout, case))
            assert found[case, "loads"] == pytest.approx(one_process[case, "loads"], abs=1e-12)
            for layer, values in found[case, "biases"].items():
                assert values == one_process[case, "biases"][layer]
        for optimizer in OTHERS_AT.get(layout, ()):
            layouts.assert_close(found[optimizer], one_process[optimizer], (layout, optimizer))


def test_main_weights_of_experts_are_updated_in_pieces(ranks: Jobs[str]) -> None:
    for found in ranks["ep2-dp2-distributed-optimizer"]:
        whole, in_pieces = found["bf16"]
        for kind, expected in whole.items():
            layouts.assert_close(in_pieces[kind], expected, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_go_from_one_layout_to_another(
    layout: str, ranks: Jobs[str], one_process: dict[str, Any], folder: Path, mesh: Mesh
) -> None:
    for case in cases(layout):
        for found in ranks[layout]:
            layouts.assert_close(found[case, "resumed"], one_process[case, "resumed"], (case, "from one process"))
        own, expected = (build(mesh, case, ParallelConfig()) for _ in range(2))
        for engine, written in ((own, layout), (expected, "one")):
            engine.load(folder / written / case, ["average"])
            engine.step = layouts.STEPS + 1
        layouts.assert_close(layouts.train(own, 5, 6), layouts.train(expected, 5, 6), (case, "to one process"))
        assert biases(own) == biases(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_picks_are_those_of_one_process(layout: str, ranks: Jobs[str], one_process: dict[str, Any]) -> None:
    for case in cases(layout):
        expected: dict[str, Picks] = one_process[case, "picks"]
        change, epsilon = one_process[case, "step"]
        for found in ranks[layout]:
            for name, picks in found[case, "picks"].items():
                assert relative_error(picks, expected[name]) < 1e-4, (case, name)
                assert same_picks(picks, expected[name]), (case, name)
            assert found[case, "step"] == (pytest.approx(change, rel=1e-4), epsilon)


# -- what is computed ------------------------------------------------------------------------------------------------


def swiglu(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    gate, up = (x @ weights[f"{name}.linear_fc1.weight"].t()).chunk(2, -1)
    return (F.silu(gate) * up) @ weights[f"{name}.linear_fc2.weight"].t()


def plain(model: ModelConfig, x: Tensor, weights: dict[str, Tensor], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output of the layer for x (S, B, H), auxiliary losses added up), every expert computed for every token."""
    router, logits = model.router, x @ weights["router.weight"].t()
    scores = logits.softmax(-1) if router.scores == "softmax" else logits.sigmoid()
    chosen = (scores if bias is None else scores + bias).topk(model.experts_per_token, -1).indices
    mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    taken = scores * mask
    taken = taken / taken.sum(-1, keepdim=True) * (router.scale or 1.0)
    each = [swiglu(x, weights, f"experts.local_experts.{number}") for number in range(model.num_experts or 0)]
    output = sum(taken[..., [number]] * value for number, value in enumerate(each))
    if model.shared_expert_ffn_hidden_size:
        output = output + swiglu(x, weights, "shared_experts")
    shares = scores / scores.sum(-1, keepdim=True)
    by_score = torch.zeros_like(scores).scatter(-1, shares.topk(model.experts_per_token, -1).indices, 1.0)
    loads = by_score.mean(0) / model.experts_per_token  # (B, E) share of a sequence's tokens
    balance = (model.num_experts or 0) * (loads * shares.mean(0)).sum(-1).mean()
    return output, router.balance_loss * balance + router.z_loss * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_that_of_plain_pytorch_in_float64(case: str, mesh: Mesh) -> None:
    from megatron.core.transformer.moe import moe_utils

    model = CASES[case][0]
    layer = build(mesh, case, ParallelConfig()).module.decoder.layers[1].mlp
    bias = torch.tensor([0.03, -0.02, 0.01, 0.0]) if layer.router.expert_bias is not None else None
    if bias is not None:
        layer.router.expert_bias.copy_(bias)
    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = torch.randn(16, 3, model.hidden_size, generator=torch.Generator().manual_seed(5))
    expected, auxiliary = plain(model, x.double(), weights, bias)
    by = torch.randn_like(x)
    ((expected * by).sum() + auxiliary).backward()
    layer.train()
    with mesh.megatron():
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)  # which a schedule sets
        found = layer(x)[0]
        gradients = torch.autograd.grad((found * by).sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    for (name, _), gradient in zip(layer.named_parameters(), gradients, strict=True):
        assert (gradient - weights[name].grad).norm() < 1e-5 * weights[name].grad.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_fused_kernels_of_all_experts_are_those_of_each(case: str, mesh: Mesh) -> None:
    expected = copy.deepcopy(layouts.train(build(mesh, case, ParallelConfig())))
    with uncompiled():
        engine = build(mesh, case, ParallelConfig(), engine=FUSED)
        assert any(isinstance(each, _grouped()) for each in engine.module.modules())
        layouts.assert_close(layouts.train(engine), expected, case)


def test_grouped_products_are_those_of_each_matrix_also_of_none() -> None:
    prepare_megatron(on_cpu=True)
    from megaopus.models.experts import _Products

    generator = torch.Generator().manual_seed(4)
    rows, ends = torch.randn(12, 8, generator=generator), torch.tensor([5, 5, 12], dtype=torch.int32)
    matrices = [torch.randn(16, 8, generator=generator) for _ in ends]
    by, found = torch.randn(12, 16, generator=generator), []
    for way in ("grouped", "each"):
        given = [each.clone().requires_grad_() for each in (rows, *matrices)]
        if way == "grouped":
            result = _Products.apply(given[0], ends, *given[1:])
        else:
            parts = given[0].tensor_split(ends[:-1].tolist())
            result = torch.cat([part @ matrix.t() for part, matrix in zip(parts, given[1:], strict=True)])
        (result * by).sum().backward()
        found.append([result, *(each.grad for each in given)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    assert not found[0][3].any()


def _grouped() -> type:
    from megaopus.models.experts import GroupedExperts

    return GroupedExperts


def test_tokens_are_permuted_as_megatron_does() -> None:
    prepare_megatron(on_cpu=True)
    from megatron.core.transformer.moe.moe_utils import permute

    from megaopus.models.experts import permuted

    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(40, 8, generator=generator)
    chosen = torch.zeros(40, 8, dtype=torch.bool).scatter(1, scores.topk(3, 1).indices, True)
    found = []
    for way in (permute, permuted):
        tokens, weights = (each.clone().requires_grad_() for each in (scores[:, :5], scores))
        moved, scales, numbers = way(tokens, chosen, probs=weights, num_out_tokens=120)
        (moved * scales.unsqueeze(1)).square().sum().backward()
        found.append((moved, scales, numbers, tokens.grad, weights.grad))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_scoring_leaves_the_balance_as_it_is(mesh: Mesh) -> None:
    """Proxy gradients and forward passes are counted nowhere, and give the router no auxiliary loss."""
    first, second = (build(mesh, "sigmoid", ParallelConfig()) for _ in range(2))
    for step in range(3):
        assert first.train_step(random_batch(8, step)) == second.train_step(random_batch(8, step))
        if step:  # the optimizer has a state
            select(second, 12, contrast=True)
        assert biases(first) == biases(second)
        assert all(torch.equal(a, b) for a, b in zip(state_of(first), state_of(second), strict=True))
    assert any(value for values in biases(first).values() for value in values)


@pytest.mark.parametrize(("case", "bound"), [("softmax", 0.06), ("sigmoid", 0.25), ("none", 0.001)])
def test_the_error_of_a_difference_has_tokens_in_it_that_change_experts(case: str, bound: float, mesh: Mesh) -> None:
    """Over a step of differences the loss jumps where they do; the derivative in float64 knows no such jump."""
    model = replace(SOFTMAX, num_experts=None, first_dense_layers=0) if case == "none" else CASES[case][0]
    engine = tiny_engine(mesh, model=model, optim=gentle("adamw"))
    for step in range(20):
        engine.train_step(random_batch(8, step))
    (_, (found,)), (_, (exact,)) = (select(engine, 64, estimator=name)[0] for name in ("directional", "exact"))
    assert (found - exact).square().mean().sqrt() < bound * exact.std()
    ranks = [values.argsort().argsort().double() for values in (found, exact)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.97


def test_an_expert_takes_no_more_than_its_capacity(mesh: Mesh) -> None:
    """Half of the even share of a micro-batch of 64 tokens, of which each would have two experts of four."""
    engine = tiny_engine(mesh, model=replace(SIGMOID, expert_capacity=0.5), optim=gentle("adamw"))
    router = engine.module.decoder.layers[0].mlp.router
    found, route = [], router.routing

    def watched(*given: Any, **more: Any) -> Any:
        weights, chosen = route(*given, **more)
        found.append((weights, chosen))
        return weights, chosen

    router.routing = watched
    result = engine.train_step(random_batch(8, 0))
    assert result.applied
    assert len(found) == 2
    for weights, chosen in found:
        assert chosen.sum(0).tolist() == [16] * 4
        assert torch.equal(weights > 0, chosen)
    assert result.expert_loads == (1.0, 0.0)


def test_curvature_is_that_of_the_losses_alone(mesh: Mesh) -> None:
    """Sophia-G's passes on sampled labels take none of the router's losses, whatever their weight."""
    router = RouterConfig(balance_loss=100.0, z_loss=10.0)
    found = []
    for each in (SOFTMAX.router, router):
        engine = tiny_engine(mesh, model=replace(SOFTMAX, router=each), optim=gentle("sophia_g"))
        engine.train_step(random_batch(8, 0))
        found.append({state.name: state.state["hessian"].clone() for state in engine.optimizer.states()})
    assert any(value.any() for value in found[0].values())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_every_chunk_of_a_virtual_pipeline_has_its_biases(pool: Pool) -> None:
    for layers in pool.run(2, _layers_with_biases):
        assert len(layers) == 2


def _layers_with_biases() -> list[int]:
    parallel = ParallelConfig(pp=2, vpp=2)
    mesh = Mesh(parallel, "cpu")
    try:
        return list(biases(tiny_engine(mesh, model=replace(SIGMOID, num_layers=4), parallel=parallel)))
    finally:
        mesh.close()


# -- counts and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_names_and_counts_are_those_of_the_model(case: str, mesh: Mesh) -> None:
    model = CASES[case][0]
    found = full_parameters(build(mesh, case, ParallelConfig()).module, mesh)
    shapes = {name: shape for name, shape in whole_shapes(model, 128, 16).items() if not name.endswith("expert_bias")}
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    total = count_parameters(model, 128, 16)
    assert total == sum(value.numel() for value in found.values())
    idle = sum(value.numel() for name, value in found.items() if ".local_experts." in name) // 2
    assert count_active_parameters(model, 128, 16) == total - idle
    dense = replace(model, num_experts=None)
    experts = sum(map(model.has_experts, range(model.num_layers)))
    gone, router = 3 * 32 * dense.derived_ffn(), 4 * 32
    come = 3 * 32 * (2 * 32 + (model.shared_expert_ffn_hidden_size or 0)) + router
    difference = training_flops_per_token(model, 128, 16) - training_flops_per_token(dense, 128, 16)
    assert difference == 6 * experts * (come - gone)


def test_deepspeed_has_no_experts(mesh: Mesh) -> None:
    with pytest.raises(EngineError, match=r"engine\.name=deepspeed: it has no experts: use engine\.name=megatron"):
        build(mesh, "softmax", ParallelConfig(), engine=EngineConfig(name="deepspeed", device="cpu"))


def test_activations_of_experts_are_not_captured(mesh: Mesh) -> None:
    with pytest.raises(EngineError, match="experts are given tokens of several"):
        build(mesh, "softmax", ParallelConfig()).scoring_backend().ghost_layers()
