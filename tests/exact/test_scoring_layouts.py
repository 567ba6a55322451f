"""Scoring at every layout equals one process: the same utilities, Gram matrices and picks, and no trace in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.selection import Selection, SelectionConfig, Selector
from tests.exact.scoring_runs import (
    CASES,
    COMMON,
    LAYOUTS,
    SETTINGS,
    Picks,
    cases,
    meshed,
    proxy_loss,
    relative_error,
    same_picks,
    select,
    select_each,
    select_uneven,
    served,
    step_of_differences,
    trained,
)
from tests.harness import MODELS, example, random_batch, state_of, tiny_engine
from tests.pool import Jobs, Pool

EVERY_SETTING = (("gpt2-4-layers", "adamw"), ("llama-4-layers", "muon"))
PRODUCTS = {
    "dp4": ("gpt2-4-layers", "adamw"),
    "tp2-sp-pp2": ("llama-4-layers", "muon"),
    "dp2-tp2-sp": ("llama-4-layers", "muon"),
    "dp2-pp2": ("gpt2-4-layers", "adamw"),
    "dp2-cp2": ("llama-4-layers", "muon"),
    "cp2-tp2-sp": ("llama-4-layers", "muon"),
    "cp2-pp2-vpp2": ("gpt2-4-layers", "adamw"),
}
"""Layouts of which one case is enough here: benchmarks/scoring.py compares every setting of every case at every one."""
SOME_SETTINGS = ("directional", "adjoint", "countsketch")
CROSSED = ("one", "dp2", "tp2", "pp2", "cp2", "dp2-distributed-optimizer")
"""Where the other two cases are compared as well, by some settings."""
DROPOUT = ("one", "tp2", "pp2", "cp2")
ESTIMATORS = [name for name, settings in SETTINGS.items() if "method" not in settings]
UNEVEN = tuple(name for name, (size, each) in LAYOUTS.items() if size > each.model_ranks or each.vpp > 1)
"""Layouts over which numbers may not be shared evenly: data-parallel ranks, micro-batches of virtual stages."""
RECOMPUTE = ("one", "pp2", "pp2-vpp2")
FAULTS = ("one", *(name for name in LAYOUTS if name not in ("dp2-cp2", "cp2-tp2-sp", "cp2-pp2-vpp2")))


def select_layout(layout: str) -> dict[Any, Any]:
    """Return what one rank finds at one layout: picks by case, and the outcome of each check below by its name."""
    found: dict[Any, Any] = {}
    with meshed(layout) as (mesh, parallel):
        for case in cases(parallel):
            if case in EVERY_SETTING and PRODUCTS.get(layout, case) == case:
                found[case], found["traces", case] = select_and_go_on(mesh, case, parallel)
            elif layout in CROSSED:
                found[case] = select_each(trained(mesh, case, parallel), SOME_SETTINGS)
        engine = trained(mesh, EVERY_SETTING[0], parallel)
        found["proxy loss"], found["step"] = proxy_loss(engine), step_of_differences(engine)
        if layout in ("one", *UNEVEN):
            found["uneven"] = select_uneven(engine)
        if layout in FAULTS:
            found["faults"] = select_with_faults(mesh, parallel)
        if layout in DROPOUT:
            found["dropout"] = select_with_dropout(mesh, parallel)
        if layout in RECOMPUTE:
            found["recompute"] = select_with_recompute(mesh, parallel)
    return found


@pytest.fixture(scope="module")
def ranks(pool: Pool, selected: Callable[[str], list[str]]) -> Jobs[str]:
    """Layout -> what each rank found; "one": one process."""
    sizes = {"one": 1, **{layout: size for layout, (size, _) in LAYOUTS.items()}}
    return pool.jobs(sizes, select_layout).begin(["one", *selected("layout")])


@pytest.fixture
def one_process(ranks: Jobs[str]) -> dict:
    return ranks["one"][0]


# -- picks and utilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_picks_and_utilities_are_those_of_one_process(layout: str, ranks: Jobs[str], one_process: dict) -> None:
    for case in CASES:
        if case in ranks[layout][0]:
            assert_same_picks([found[case] for found in ranks[layout]], one_process[case], case)


@pytest.mark.parametrize("layout", UNEVEN)
def test_candidates_and_proxies_that_do_not_divide_over_the_ranks(
    layout: str, ranks: Jobs[str], one_process: dict
) -> None:
    assert_same_picks([found["uneven"] for found in ranks[layout]], one_process["uneven"], "uneven")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_proxy_loss_is_that_of_one_process(layout: str, ranks: Jobs[str], one_process: dict) -> None:
    for found in ranks[layout]:
        assert found["proxy loss"] == pytest.approx(one_process["proxy loss"], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_of_differences_is_that_of_one_process(layout: str, ranks: Jobs[str], one_process: dict) -> None:
    """Each weight counts once, whoever holds it: split, replicated or tied between stages."""
    change, epsilon = one_process["step"]
    assert change > 0
    for found in ranks[layout]:
        assert found["step"] == (pytest.approx(change, rel=1e-4), epsilon)


def assert_same_picks(ranks: list[dict[str, Picks]], expected: dict[str, Picks], case: object) -> None:
    """Return what ``select_each`` returned on each rank against what it returned on one process."""
    for name in ranks[0]:
        for found in ranks:
            error = relative_error(found[name], expected[name])
            bound = 1e-3 if name == "step size" else 1e-5  # a step of .005 nats: fp32 losses round by 1e-4 of that
            assert error < bound, f"{case} {name}: relative error {error:.1e}"
            assert same_picks(found[name], expected[name]), f"{case} {name}"
            assert identical(found[name], ranks[0][name])  # on every rank


def identical(found: Picks, expected: Picks) -> bool:
    """To the last bit."""
    pairs = zip(found, expected, strict=True)
    return all(ids == others and all(map(torch.equal, mine, one)) for (ids, mine), (others, one) in pairs)


# -- no trace --------------------------------------------------------------------------------------------------------


def select_and_go_on(mesh: Mesh, case: tuple[str, str], parallel: ParallelConfig) -> tuple[dict[str, Picks], list[str]]:
    """Picks of every setting, and the settings that left another weight or optimizer state to the last bit.

    "the next update" among them: it is not that of an engine which has not scored.
    """
    engine, untouched = (trained(mesh, case, parallel) for _ in range(2))
    before = state_of(untouched)
    found, traces = {}, []
    for name in served(engine):
        found[name] = select(engine, **SETTINGS[name])
        if not all(map(torch.equal, state_of(engine), before)):
            traces.append(name)
    results = [each.train_step(random_batch(8, 2)) for each in (engine, untouched)]
    assert not all(map(torch.equal, state_of(untouched), before))
    if results[0] != results[1] or not all(map(torch.equal, state_of(engine), state_of(untouched))):
        traces.append("the next update")
    return found, traces


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_state_and_the_next_update_are_those_without_scoring(layout: str, ranks: Jobs[str]) -> None:
    traces = [found["traces", case] for found in ranks[layout] for case in EVERY_SETTING if case in found]
    assert traces
    assert not any(traces), traces


# -- dropout and recomputation ---------------------------------------------------------------------------------------


def select_with_dropout(mesh: Mesh, parallel: ParallelConfig) -> dict[str, bool]:
    """Return whether a model with dropout picks to the last bit as one without, and trains otherwise."""
    plain = trained(mesh, EVERY_SETTING[0], parallel)
    dropping = trained(mesh, EVERY_SETTING[0], parallel, dropout=0.5)
    dropping.module.load_state_dict(plain.module.state_dict())
    for ours, theirs in zip(dropping.optimizer.torch_optimizers, plain.optimizer.torch_optimizers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    expected = select_each(plain, SOME_SETTINGS)
    found = {name: identical(picks, expected[name]) for name, picks in select_each(dropping, SOME_SETTINGS).items()}
    losses = [engine.train_step(random_batch(8, 2)).loss for engine in (plain, dropping)]
    return found | {"trains otherwise": abs(losses[0] - losses[1]) > 1e-3}


@pytest.mark.parametrize("layout", DROPOUT)
def test_dropout_is_off_while_scoring(layout: str, ranks: Jobs[str]) -> None:
    for found in ranks[layout]:
        assert found["dropout"] == dict.fromkeys((*SOME_SETTINGS, "trains otherwise"), True)


def select_with_recompute(mesh: Mesh, parallel: ParallelConfig) -> dict[str, Any]:
    """Return whether each estimator picks to the last bit as without recomputation; "passes": how many more."""
    found: list[dict[str, Picks]] = []
    passes: list[Counter[str]] = []
    for recompute in (False, True):
        kind = EngineConfig(device="cpu", precision="fp32", recompute=recompute)
        engine = trained(mesh, EVERY_SETTING[0], parallel, kind)
        picks = select_each(engine, ESTIMATORS)
        if mesh.shape.world_size == 1:
            picks["exact"] = select(engine, estimator="exact")
        found.append(picks)
        passes.append(count_passes(engine))
    same = {name: identical(picks, found[0][name]) for name, picks in found[1].items()}
    return same | {"passes": {name: passes[1][name] / passes[0][name] for name in passes[0]}}


def count_passes(engine: Any) -> Counter[str]:
    """Forward passes through this rank's first layer in an update and in each kind of scoring pass."""
    backend, batch = engine.scoring_backend(), random_batch(8, 2)
    kinds = {
        "update": lambda: engine.train_step(batch),
        "proxy gradient": lambda: backend.gradient(batch),
        "losses": lambda: backend.losses(batch),
        "ghost pass": lambda: backend.ghost_pass(batch, backend.ghost_layers(), lambda *factors: None),
    }
    counts: Counter[str] = Counter()
    for kind, run in kinds.items():
        hook = engine.chunks[0].decoder.layers[0].register_forward_hook(lambda *call: counts.update([kind]))  # noqa: B023
        run()
        hook.remove()
    return counts


@pytest.mark.parametrize("layout", RECOMPUTE)
def test_recomputation_changes_no_utility(layout: str, ranks: Jobs[str]) -> None:
    """Gradients of weights take each layer's forward pass twice; passes that capture activations keep them."""
    for found in ranks[layout]:
        outcome = dict(found["recompute"])
        assert outcome.pop("passes") == {"update": 2, "proxy gradient": 2, "losses": 1, "ghost pass": 1}
        assert outcome == dict.fromkeys(outcome, True)
        assert outcome.keys() == {*ESTIMATORS, *(["exact"] if layout == "one" else [])}


# -- faults ----------------------------------------------------------------------------------------------------------


def select_with_faults(mesh: Mesh, parallel: ParallelConfig) -> dict[str, Selection]:
    """Selections in which the last rank alone sees a fault: in the proxy gradient, in one candidate's loss, in all."""
    engine = tiny_engine(mesh, model=MODELS["gpt2-4-layers"], optim=example("adamw"), parallel=parallel)
    engine.train_step(random_batch(8, 0))
    real = engine.scoring_backend()
    gradient, losses = real.gradient, real.losses
    last = mesh.rank == mesh.shape.world_size - 1

    def bad_gradient(*args: Any) -> dict[str, torch.Tensor]:
        return {name: value * torch.nan if last else value for name, value in gradient(*args).items()}

    def bad_losses(rows: slice) -> Any:
        def found(*args: Any, **kwargs: Any) -> torch.Tensor:
            parts = losses(*args, **kwargs)
            if last:
                parts[rows] = torch.nan
            return parts

        return found

    results = {}
    patches = {
        "gradient": {"gradient": bad_gradient},
        "candidate": {"losses": bad_losses(slice(-1, None))},
        "all": {"losses": bad_losses(slice(None))},
    }
    for fault, patch in patches.items():
        backend = engine.scoring_backend()
        for name, function in patch.items():
            setattr(backend, name, function)
        config = SelectionConfig(**COMMON, proxy_half_life=7.0)
        selector = Selector(config, backend, num_selected=6, proxy=lambda step: random_batch(4, 700 + step), seed=7)
        results[fault] = selector.select(random_batch(16, 2), 2)
        assert ("average" in selector.state_dict()) == (fault != "gradient")
    return results


@pytest.mark.parametrize("layout", FAULTS[1:])
def test_a_fault_on_one_rank_is_every_rank_s(layout: str, ranks: Jobs[str]) -> None:
    share = 16 // (LAYOUTS[layout][0] // LAYOUTS[layout][1].model_ranks)
    for fault in ("gradient", "candidate", "all"):
        each = [found["faults"][fault] for found in ranks[layout]]
        assert len({tuple(selection.picked_ids.tolist()) for selection in each}) == 1
        assert len({tuple(map(str, selection.events)) for selection in each}) == 1
        selection = each[0]
        if fault == "gradient":
            assert selection.method == "uniform"
            assert "the proxy gradient is not finite" in str(selection.events[0])
        elif fault == "candidate":  # the last of the buffer
            assert selection.method == "opus"
            (event,) = selection.events
            assert (event.kind, event.facts) == ("selection.utility_not_finite", {"ids": [int(selection.ids[-1])]})
            assert str(event) == f"utility not finite: candidates [{int(selection.ids[-1])}]"
            assert int(selection.ids[-1]) not in selection.picked_ids
        elif share < 16:  # other ranks' candidates are left
            assert selection.method == "opus"
            assert not set(selection.ids[-share:].tolist()) & set(selection.picked_ids.tolist())
        else:
            assert selection.method == "uniform"
            assert selection.events[0].kind == "selection.fallback.losses_not_finite"
