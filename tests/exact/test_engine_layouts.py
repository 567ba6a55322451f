"""Training at every layout equals one process; the engine's maths equals a plain PyTorch GPT's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reference_gpt import ReferenceGPT
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.engine.megatron.weights import CheckpointWeights
from megaopus.models.gpt import canonical_names, full_parameters
from megaopus.optim.build import state_names
from megaopus.optim.registry import OPTIMIZERS
from tests.exact import resume_runs
from tests.harness import MODELS, gentle, random_batch, save_engine, tiny_engine, wholes
from tests.pool import Jobs, Pool

Case = tuple[str, str]
"""(model, optimizer)"""
STEPS = 4


def build(mesh: Mesh, case: Case, parallel: ParallelConfig, engine: EngineConfig | None = None) -> MegatronEngine:
    model, optimizer = case
    return tiny_engine(mesh, model=MODELS[model], optim=gentle(optimizer), parallel=parallel, engine=engine)


def train(built: MegatronEngine, first: int = 0, last: int = STEPS) -> dict[str, dict[str, torch.Tensor]]:
    """Losses, gradient norms (by layer too) and validation losses of updates of eight sequences; weights, a gradient,
    state.

    The state is what the update operator needs, and whatever is not of a parameter's shape.
    """
    results = [built.train_step(random_batch(8, step), layer_grad_norms=True) for step in range(first, last)]
    layers = [r.layer_grad_norms or {} for r in results]
    names = dict(canonical_names(built.module))
    states, whole = states_of(built)
    weights = {names[own]: value for own, value in built.optimizer.main_weights().items()}
    return {
        "weights": full_parameters(built.module, built.mesh, weights),
        "state": full_parameters(built.module, built.mesh, wholes(built, states)),
        "state of another shape": whole,
        "gradient": full_parameters(built.module, built.mesh, wholes(built, built.mean_gradient(random_batch(8, 98)))),
        "numbers": {
            "losses": torch.tensor([r.loss for r in results]),
            "gradient norms": torch.tensor([r.grad_norm for r in results]),
            "validation losses": built.evaluate(random_batch(5, 99)),
        },
        "layer gradient norms": {part: torch.tensor([norms[part] for norms in layers]) for part in layers[0]},
    }


def states_of(built: MegatronEngine) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State of each parameter's shape (none: 1), and every other state over the stages, by whole-model name."""
    names, weights = dict(canonical_names(built.module)), dict(built.module.named_parameters())
    states, whole = {}, {}
    for each in built.optimizer.states():
        last = (state_names(each.optimizer) or ("",))[-1]
        states[names[each.name]] = each.state.get(last, torch.ones_like(weights[each.name]))
        others = getattr(each.optimizer, "whole", ())
        whole |= {f"{names[each.name]} {key}": each.state[key] for key in others if key in each.state}
    if (pp := built.mesh.shape.pp) > 1:
        stages: list = [None] * pp
        torch.distributed.all_gather_object(stages, whole, group=built.mesh.pp_group)
        whole = {name: value for stage in reversed(stages) for name, value in stage.items()}
    # the signs of singular vectors are anybody's
    return states, {name: value for name, value in whole.items() if not name.endswith(" projection")}


def save(built: MegatronEngine, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_engine(built, folder, {"average": built.mean_gradient(random_batch(8, 97))})


def resume(built: MegatronEngine, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The update after the saved one, and the group that was saved with it."""
    average = built.load(folder, ["average"])["average"]
    built.step = STEPS
    return {
        "average": full_parameters(built.module, built.mesh, wholes(built, average)),
        **train(built, STEPS, STEPS + 1),
    }


EVERY = [(m, o) for m in ("gpt2", "llama") for o in ("adamw", "muon")]
MORE = [("llama", o) for o in OPTIMIZERS if o not in ("adamw", "muon")]
BIASES = [("gpt2", o) for o, spec in OPTIMIZERS.items() if not (spec.elementwise or spec.matrices) and o != "sophia_g"]
"""Vectors of which tensor-parallel ranks hold parts, under updates that may need the whole. Keys' biases have no
gradient but rounding, of which Sophia makes a whole step."""
ADAMW = [("llama", "adamw"), ("gpt2", "adamw")]
DEEP = [("llama-4-layers", "muon"), ("gpt2-4-layers", "adamw")]
LAYOUTS = {
    "dp2": (2, ParallelConfig(), EVERY + MORE),
    "tp2": (2, ParallelConfig(tp=2), EVERY + MORE + BIASES),
    "tp2-sequence-parallel": (2, ParallelConfig(tp=2, sequence_parallel=True), EVERY),
    "pp2": (2, ParallelConfig(pp=2), EVERY + MORE),
    "pp2-vpp2": (2, ParallelConfig(pp=2, vpp=2), DEEP),
    "cp2": (2, ParallelConfig(cp=2), [*EVERY, ("llama", "sophia_g")]),
    "dp2-distributed-optimizer": (2, ParallelConfig(distributed_optimizer=True), ADAMW),
    "tp2-pp2": (4, ParallelConfig(tp=2, pp=2), EVERY),
    "cp2-tp2-sequence-parallel": (4, ParallelConfig(cp=2, tp=2, sequence_parallel=True), EVERY),
    "cp2-pp2-vpp2": (4, ParallelConfig(cp=2, pp=2, vpp=2), DEEP),
    "dp2-cp2": (4, ParallelConfig(cp=2), EVERY),
    "dp2-cp2-distributed-optimizer": (4, ParallelConfig(cp=2, distributed_optimizer=True), ADAMW),
    "dp2-tp2-distributed-optimizer": (4, ParallelConfig(tp=2, distributed_optimizer=True), ADAMW),
    "dp2-pp2-vpp2-distributed-optimizer": (4, ParallelConfig(pp=2, vpp=2, distributed_optimizer=True), DEEP[1:]),
}
SAVED = {
    "tp2": MORE,
    "pp2": MORE,
    **{
        layout: LAYOUTS[layout][2][:1]
        for layout in (
            "tp2-pp2",
            "cp2-tp2-sequence-parallel",
            "pp2-vpp2",
            "dp2-distributed-optimizer",
            "dp2-tp2-distributed-optimizer",
            "dp2-pp2-vpp2-distributed-optimizer",
        )
    },
}
"""Layout -> cases whose checkpoints are tried: they go on from one process's, and one process from theirs."""
REWRITTEN = {("llama", "adamw"), ("llama", "muon"), *DEEP}
"""Cases whose checkpoint of one process every layout that has them reads and writes again."""
RESUMED = {case for cases in SAVED.values() for case in cases} | REWRITTEN


def train_layout(layout: str, folder: Path) -> dict:
    """Its cases; where checkpoints are tried, they also save one and go on from one process's."""
    _, parallel, cases = LAYOUTS[layout]
    mesh = Mesh(parallel, "cpu")
    try:
        found: dict = {}
        for case in cases:
            built = build(mesh, case, parallel)
            found[case] = train(built)
            if case in REWRITTEN:
                again = build(mesh, case, parallel)
                groups = again.load(folder / "-".join(case), ["average"])
                place = folder / f"{layout}-again" / "-".join(case)
                place.mkdir(parents=True, exist_ok=True)
                save_engine(again, place, groups)
            if case in SAVED.get(layout, ()):
                save(built, folder / layout / "-".join(case))
                found["resumed", case] = resume(build(mesh, case, parallel), folder / "-".join(case))
        return found
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def train_alone(case: Case, folder: Path) -> dict:
    """A case on one process; what it gives when it goes on, under ("resumed", case)."""
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        built = build(mesh, case, ParallelConfig())
        found: dict = {case: train(built)}
        if case in RESUMED:
            save(built, folder / "-".join(case))
            found["resumed", case] = resume(build(mesh, case, ParallelConfig()), folder / "-".join(case))
        return found
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def one_process(pool: Pool, folder: Path) -> Jobs[Case]:
    """Case -> [what one process found]."""
    return pool.jobs(dict.fromkeys((*EVERY, *MORE, *BIASES, *DEEP), 1), train_alone, folder)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    alone = Mesh(ParallelConfig(), "cpu")
    yield alone
    alone.close()


@pytest.fixture(scope="module")
def ranks(pool: Pool, one_process: Jobs[Case], folder: Path, selected: Callable[[str], list[str]]) -> Jobs[str]:
    """Layout -> what each rank found; it reads checkpoints that one process wrote."""
    layouts = selected("layout")
    one_process.begin(case for layout in layouts for case in LAYOUTS[layout][2])
    for layout in layouts:
        for case in LAYOUTS[layout][2]:
            assert one_process[case]
    return pool.jobs({layout: size for layout, (size, _, _) in LAYOUTS.items()}, train_layout, folder).begin(layouts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, ranks: Jobs[str], one_process: Jobs[Case]) -> None:
    for found in ranks[layout]:
        for case in LAYOUTS[layout][2]:
            assert_close(found[case], one_process[case][0][case], case)
            assert_sums_up(found[case], case[0])


@pytest.mark.parametrize("layout", SAVED)
def test_checkpoints_go_from_one_layout_to_another(
    layout: str, ranks: Jobs[str], one_process: Jobs[Case], folder: Path, mesh: Mesh
) -> None:
    for case in SAVED[layout]:
        expected = one_process[case][0]["resumed", case]
        for found in ranks[layout]:
            assert_close(found["resumed", case], expected, (case, "from one process"))
        alone = build(mesh, case, ParallelConfig())
        assert_close(resume(alone, folder / layout / "-".join(case)), expected, (case, "to one process"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_the_same_at_every_layout(layout: str, ranks: Jobs[str], folder: Path) -> None:
    """Read and written again it is the same to the last bit: so whatever one layout wrote, any other goes on from."""
    assert ranks[layout]
    cases = REWRITTEN & set(LAYOUTS[layout][2])
    assert cases
    for case in cases:
        place, again = folder / "-".join(case), folder / f"{layout}-again" / "-".join(case)
        found, expected = resume_runs.tensors(again), resume_runs.tensors(place)
        assert found.keys() == expected.keys()
        assert any("exp_avg_sq" in name for name in expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (case, name)
        counts = [steps_of(torch.load(path / "common.pt", weights_only=True)) for path in (again, place)]
        assert counts[0] == counts[1] == [float(STEPS)] * len(counts[0])


def steps_of(tree: dict) -> list[float]:
    """Every count of updates in common.pt, which else holds settings that a run sets anew."""
    found = [float(value) for key, value in tree.items() if key == "common_step"]
    return found + [count for value in tree.values() if isinstance(value, dict) for count in steps_of(value)]


def assert_close(found: dict, expected: dict, case: object) -> None:
    """Each tensor within 1e-5, by norm."""
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys()
        for name, value in tensors.items():
            error = (found[kind][name] - value).norm() / value.norm()
            assert error < 1e-5, f"{case} {kind} {name}: relative error {error:.1e}"


def assert_sums_up(found: dict, model: str) -> None:
    """Each layer of the whole model has a gradient norm, and their squares add up to that of the whole gradient."""
    layers = found["layer gradient norms"]
    assert list(layers) == ["embedding", *(f"layers.{n}" for n in range(MODELS[model].num_layers)), "head"]
    total = torch.stack(list(layers.values())).square().sum(0).sqrt()
    torch.testing.assert_close(total, found["numbers"]["gradient norms"], rtol=1e-6, atol=0)


def test_layer_gradient_norms_are_those_of_plain_pytorch_in_float64(mesh: Mesh) -> None:
    """They are of the gradient before clipping, which here makes it a thousandth of a norm of about two."""
    engine = tiny_engine(mesh, optim=replace(gentle("adamw"), clip_grad=0.002))
    plain = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=128, positions=16).double()
    plain.copy_weights(engine.module.named_parameters())
    plain(random_batch(8, 0).batch()).mean().backward()
    parts = {"embedding": [plain.tokens, plain.positions], "head": [plain.norm]}
    parts |= {f"layers.{number}": [block] for number, block in enumerate(plain.blocks)}
    expected = {
        part: float(sum(p.grad.square().sum() for each in modules for p in each.parameters())) ** 0.5
        for part, modules in parts.items()
    }
    assert engine.train_step(random_batch(8, 0), layer_grad_norms=True).layer_grad_norms == pytest.approx(
        expected, rel=1e-5
    )


def test_recompute_changes_nothing(mesh: Mesh) -> None:
    plain, recompute = (EngineConfig(device="cpu", precision="fp32", recompute=each) for each in (False, True))
    model = replace(MODELS["gpt2"], dropout=0.3)
    found = train(tiny_engine(mesh, model=model, engine=recompute))
    for kind, tensors in train(tiny_engine(mesh, model=model, engine=plain)).items():
        assert all(torch.equal(value, found[kind][name]) for name, value in tensors.items()), kind


def test_gradient_equals_plain_pytorch(mesh: Mesh) -> None:
    engine = tiny_engine(mesh)
    plain = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=128, positions=16)
    plain.copy_weights(engine.module.named_parameters())
    batch = random_batch(8, 0)
    found = engine.mean_gradient(batch)
    loss = plain(batch.batch()).mean()
    loss.backward()
    torch.testing.assert_close(engine.evaluate(batch).mean().float(), loss.detach(), rtol=1e-6, atol=0)
    gradient = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=128, positions=16)
    gradient.copy_weights(found.items())
    for (name, parameter), value in zip(plain.named_parameters(), gradient.parameters(), strict=True):
        error = (parameter.grad - value).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_a_gradient_makes_as_few_passes_as_it_may(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes four sequences at a time."""
    engine, seen, batch = tiny_engine(mesh), [], random_batch(12, 0)
    schedule = engine._schedule

    def watched(**given: Any) -> Any:
        seen.append((given["micro_batch_size"], given["num_microbatches"]))
        return schedule(**given)

    monkeypatch.setattr(engine, "_schedule", watched)
    expected = {name: value.clone() for name, value in engine.mean_gradient(batch).items()}
    for most in (1, 5, 6, 11, 12, 99):
        found = engine.mean_gradient(batch, micro_batch_size=most)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert seen == [(4, 3), (1, 12), (4, 3), (6, 2), (6, 2), (12, 1), (12, 1)]
    engine.mean_gradient(batch, against=random_batch(8, 1), micro_batch_size=12)
    assert seen[-1] == (4, 5)  # one schedule runs over both


def test_bf16_keeps_fp32_main_weights(mesh: Mesh) -> None:
    engine = tiny_engine(mesh, engine=EngineConfig(device="cpu", precision="bf16"))
    losses = [engine.train_step(random_batch(8, 0)).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in engine.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.main_param.dtype == torch.float32, name
        assert torch.equal(parameter.main_param.to(torch.bfloat16), parameter), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_single_weights_are_read_from_a_checkpoint_as_the_optimizer_has_them(
    optimizer: str, mesh: Mesh, tmp_path: Path
) -> None:
    built = build(mesh, ("llama", optimizer), ParallelConfig(), EngineConfig(device="cpu", precision="bf16"))
    built.train_step(random_batch(8, 0))
    save(built, tmp_path)
    names, read = dict(canonical_names(built.module)), CheckpointWeights(tmp_path)
    expected = {names[own]: value for own, value in built.optimizer.main_weights().items()}
    assert read.names() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read(name), value), name


def test_bf16_with_sharded_main_weights(mesh: Mesh, tmp_path: Path) -> None:
    engine, whole = EngineConfig(device="cpu", precision="bf16"), ParallelConfig()
    sharded = ParallelConfig(distributed_optimizer=True)
    built = {parallel.distributed_optimizer: build(mesh, ADAMW[0], parallel, engine) for parallel in (whole, sharded)}
    expected, found = train(built[False]), train(built[True])
    assert_close(found, expected, "bf16")
    for kind, engine_ in built.items():
        save(engine_, tmp_path / str(kind))
    going_on = resume(built[False], tmp_path / "False")
    for kind in (False, True):  # its own checkpoint, and the other's
        assert_close(resume(build(mesh, ADAMW[0], sharded, engine), tmp_path / str(kind)), going_on, f"saved {kind}")


def test_a_non_finite_gradient_leaves_every_weight_alone(mesh: Mesh) -> None:
    engine = tiny_engine(mesh)
    engine.train_step(random_batch(8, 0))
    with torch.no_grad():
        engine.module.decoder.final_layernorm.bias[0] = torch.nan
    before = {name: p.clone() for name, p in engine.module.named_parameters()}
    assert not engine.train_step(random_batch(8, 1)).applied
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
