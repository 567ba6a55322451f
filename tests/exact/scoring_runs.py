"""Selections at every layout, to compare with one process: for the tests and the table of benchmarks/scoring.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.selection import Scores, SelectionConfig, Selector
from megaopus.selection.estimators.registry import ESTIMATORS
from megaopus.selection.estimators.step_size import predicted_change, step_size
from megaopus.selection.methods.registry import METHODS
from tests.harness import MODELS, example, random_batch, tiny_engine

FIRST = ("adamw", "muon")
"""Compared at every layout; the others in test_scoring_optimizers.py, at fewer."""
CASES = tuple((model, optimizer) for model in ("gpt2-4-layers", "llama-4-layers") for optimizer in FIRST)
COMMON: dict[str, Any] = {"method": "opus", "proxy_batch_size": 4, "score_micro_batch_size": 8, "sketch_dim": 256}
SETTINGS: dict[str, dict[str, Any]] = {
    "directional-blocks": {"layers": r"layers\.[13]\.", "epsilon": 4.0, "score_length": 8, "proxy_half_life": 0.0},
    **{
        entry.name: {"estimator": entry.name, **entry.example}
        for entry in ESTIMATORS
        if "whole_model" not in entry.needs
    },
    **{
        entry.name: {"method": entry.name, **entry.example}
        for entry in METHODS
        if entry.name != COMMON["method"] and not entry.needs.keys() & {"whole_model", "text_features"}
    },
}
"""Every estimator and method that works at more layouts than one process, by the settings of its entry."""
LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "dp4": (4, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2-sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2-vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
    "tp2-sp-pp2": (4, ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
    "dp2-tp2-sp": (4, ParallelConfig(tp=2, sequence_parallel=True)),
    "dp2-pp2": (4, ParallelConfig(pp=2)),
    "dp2-cp2": (4, ParallelConfig(cp=2)),
    "cp2-tp2-sp": (4, ParallelConfig(cp=2, tp=2, sequence_parallel=True)),
    "cp2-pp2-vpp2": (4, ParallelConfig(cp=2, pp=2, vpp=2)),
    "dp2-distributed-optimizer": (2, ParallelConfig(distributed_optimizer=True)),
}
"""Name -> (ranks, parallel)."""
Picks = list[tuple[list[int], list[Tensor]]]
"""(picked ids, [utilities, the Gram matrix if there is one]) of each step."""


@contextmanager
def meshed(layout: str) -> Iterator[tuple[Mesh, ParallelConfig]]:
    """The mesh of ``layout`` on this rank; "one": of one process."""
    parallel = ParallelConfig() if layout == "one" else LAYOUTS[layout][1]
    mesh = Mesh(parallel, "cpu")
    try:
        yield mesh, parallel
    finally:
        mesh.close()


def cases(parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
    """(model, optimizer) pairs that the layout serves."""
    return (case for case in CASES if case[1] == "adamw" or not parallel.distributed_optimizer)


def trained(
    mesh: Mesh, case: tuple[str, str], parallel: ParallelConfig, kind: EngineConfig | None = None, **model: Any
) -> Any:
    """An engine after two updates; ``model`` replaces settings of the case's."""
    shape, optim = replace(MODELS[case[0]], **model), example(case[1])
    engine = tiny_engine(mesh, model=shape, optim=optim, parallel=parallel, engine=kind)
    for step in range(2):
        engine.train_step(random_batch(8, step))
    return engine


class ShowingGram(Selector):
    """Keeps the Gram matrix of the last selection: picks tell little of it."""

    gram: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        score = self._scorer.score

        def noted(*asked: Any) -> Scores:
            found = score(*asked)
            self.gram = found.gram
            return found

        self._scorer.score = noted  # type: ignore[method-assign]


def select(engine: Any, candidates: int = 16, proxies: int = 4, **settings: Any) -> Picks:
    """Step 2 of a selector of its own, and step 3 where the proxy gradient's average goes on from one to the next."""
    config = SelectionConfig(**{**COMMON, **settings})
    selector = ShowingGram(
        config,
        engine.scoring_backend(),
        num_selected=6,
        proxy=lambda step: random_batch(proxies, 700 + step),
        pool=lambda step: random_batch(5, 800 + step),
        seed=7,
        wanted=lambda buffer: buffer.ids % 3 == 0,
    )
    steps = (2, 3) if config.needs_proxy and config.proxy_half_life > 0 else (2,)
    found: Picks = []
    for step in steps:
        selection = selector.select(random_batch(candidates, step), step)
        assert selection.method == config.method
        # a whole optimizer step is too far for some: what layouts make of it is compared, not the oracle
        assert {event.kind for event in selection.events} <= {"selection.imprecise"}, selection.events
        values = [value for value in (selection.utilities, selector.gram) if value is not None]
        assert len(values) == 1 + (config.redundancy > 0)
        found.append((selection.picked_ids.tolist(), values))
    return found


def select_uneven(engine: Any) -> dict[str, Picks]:
    """Numbers of candidates and proxy sequences that divide over no ranks; some ranks have none of the latter.

    The last passes a rank's whole share of the proxy at once, where a pipeline does not want more micro-batches.
    """
    sizes = {"directional": 3, "adjoint": 1, "mid_ppl": 3}
    found = {name: select(engine, 13, proxies, **SETTINGS[name]) for name, proxies in sizes.items()}
    found["contrast"] = select(engine, 13, 3, **SETTINGS["directional"] | {"contrast": True})
    return found | {"step size": select(engine, 13, 3, proxy_micro_batch_size=3)}


def proxy_loss(engine: Any) -> list[float]:
    """Return what the check of predictions measures, of four proxy sequences and of one."""
    config, backend = SelectionConfig(**COMMON), engine.scoring_backend()
    proxies = [partial(random_batch, size) for size in (4, 1)]
    return [Selector(config, backend, num_selected=6, proxy=proxy, seed=7).proxy_loss(2) for proxy in proxies]


def step_of_differences(engine: Any) -> tuple[float, float]:
    """(the change of the proxy's loss that an optimizer step predicts, the step that directional scoring takes)."""
    backend = engine.scoring_backend()
    gradient = backend.gradient(random_batch(4, 702))
    direction = backend.operator().bounded(gradient).direction(gradient, gradient)
    return float(predicted_change(backend, direction, gradient)), float(step_size(backend, direction, gradient))


def served(engine: Any, names: Iterable[str] = SETTINGS) -> list[str]:
    """Those of the settings that work at the engine's layout."""
    split = engine.mesh.shape.cp > 1
    return [
        name for name in names if not (split and "whole_sequence" in SelectionConfig(**COMMON | SETTINGS[name]).needs())
    ]


def select_each(engine: Any, names: Iterable[str] = SETTINGS) -> dict[str, Picks]:
    return {name: select(engine, **SETTINGS[name]) for name in served(engine, names)}


def select_all(layout: str) -> dict[tuple[str, str], dict[str, Picks]]:
    """Every setting of every case on this rank."""
    with meshed(layout) as (mesh, parallel):
        return {case: select_each(trained(mesh, case, parallel)) for case in cases(parallel)}


def relative_error(found: Picks, expected: Picks) -> float:
    """Largest error of any step's utilities or Gram matrix, by norm."""
    steps = zip(found, expected, strict=True)
    pairs = [pair for (_, mine), (_, one) in steps for pair in zip(mine, one, strict=True)]
    return max(float((mine - one).norm() / one.norm()) for mine, one in pairs)


def same_picks(found: Picks, expected: Picks) -> bool:
    return [ids for ids, _ in found] == [ids for ids, _ in expected]
