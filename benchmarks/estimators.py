"""Utility estimators against the float64 oracle: fidelity, cost per candidate token, extra memory.

A small GPT is trained uniformly on the demo corpus, with AdamW and with Muon; then every estimator scores one buffer of
candidates for one proxy batch. Prints a table and writes rows {optimizer, estimator, spearman, spearman_linear,
cost_ratio, floor_ratio, peak_mb, bias_z, ...}:

spearman         rank correlation with the exact utilities of all parameters
spearman_linear  the same, with the exact utilities of the matrices that countsketch sees
cost_ratio       time per candidate token over time per token of a training step (forward, backward, optimizer);
                 the proxy gradient and the optimizer's operator, which all share, are counted apart
floor_ratio      cost_ratio over the least it can be by FLOPs
peak_mb          growth of resident memory while scoring (exact: one candidate after the other)
over_seeds       countsketch: mean of spearman_linear over hash seeds (the two above: seed 42), over_seeds_low the least
bias_z           countsketch: largest |mean error over seeds| in standard errors; bias_z_limit is exceeded by chance
                 in 1 of 100 such tests
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.common import (
    Ratio,
    interleaved,
    machine,
    parser,
    peak_mb,
    progress,
    single_engine,
    start,
    write_results,
)
from megaopus.cli.demo import WANTED, ensure_corpus
from megaopus.data.candidates import CandidateBuffer, CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig
from megaopus.models.flops import count_parameters, training_flops_per_token
from megaopus.optim.config import OptimConfig
from megaopus.selection import (
    CountSketchEstimator,
    Gradient,
    KroneckerEstimator,
    ScoringBackend,
    UpdateOperator,
    adjoint_utilities,
    directional_utilities,
    exact_utilities,
)

SEED = 1234


@dataclass(frozen=True)
class Plan:
    """Model, training, buffer, and how often things are measured."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(num_layers=4, hidden_size=128, num_heads=4))
    seq_len: int = 128
    train_steps: int = 250
    micro_batch_size: int = 16
    num_candidates: int = 64
    proxy_batch_size: int = 32
    exact_timed: int = 8
    """Candidates of a timed pass of an exact estimator; it works through them one by one."""
    repeats: int = 9
    seeds: int = 32
    """Hash seeds over which the bias and the mean fidelity of countsketch are taken."""
    optimizers: tuple[OptimConfig, ...] = (
        OptimConfig(name="adamw", lr=3e-3, warmup_steps=40, schedule="constant"),
        OptimConfig(name="muon", lr=3e-3, matrix_lr=0.02, warmup_steps=40, schedule="constant"),
    )


FULL = Plan()
QUICK = Plan(train_steps=150, repeats=3, seeds=12)


class PlainGradient:
    """P = I: utilities become raw-gradient alignments, as in GREATS (``UpdateOperator``)."""

    def apply(self, gradient: Gradient) -> Gradient:
        return gradient

    def diagonal(self, name: str) -> Tensor | None:
        return torch.ones(())

    def sides(self, name: str) -> None:
        return None

    def direction(self, gradient: Mapping[str, Tensor], names: Iterable[str]) -> Gradient:
        return {name: gradient[name] for name in names}

    def whole(self, keeps: bool = True) -> AbstractContextManager[PlainGradient]:
        return nullcontext(self)

    def transposed(self) -> PlainGradient:
        return self

    def bounded(self, gradient: Mapping[str, Tensor]) -> PlainGradient:
        return self


@dataclass(frozen=True)
class Scene:
    """A trained model's view of one step: what every estimator is given."""

    backend: ScoringBackend
    operator: UpdateOperator
    proxy_gradient: Gradient
    micro_batch_size: int

    def directional(self, candidates: CandidateBuffer, epsilon: float | None = None, sides: str = "central") -> Tensor:
        return directional_utilities(
            self.backend,
            candidates,
            self.operator,
            self.proxy_gradient,
            epsilon=epsilon,
            sides=sides,
            micro_batch_size=self.micro_batch_size,
        )

    def adjoint(self, candidates: CandidateBuffer) -> Tensor:
        return adjoint_utilities(
            self.backend, candidates, self.operator, self.proxy_gradient, micro_batch_size=self.micro_batch_size
        )

    def sketched(self, estimator: CountSketchEstimator | KroneckerEstimator, candidates: CandidateBuffer) -> Tensor:
        return estimator.estimate(
            self.backend, candidates, self.operator, self.proxy_gradient, micro_batch_size=self.micro_batch_size
        )[0]

    def exact(self, candidates: CandidateBuffer, linear_only: bool = False, raw: bool = False) -> Tensor:
        layers = CountSketchEstimator(1, 0).layers(self.backend)
        return exact_utilities(
            self.backend,
            candidates,
            PlainGradient() if raw else self.operator,
            self.proxy_gradient,
            parameters=list(dict.fromkeys(layer.parameter for layer in layers)) if linear_only else None,
        )

    def losses(self, candidates: CandidateBuffer) -> Tensor:
        return self.backend.losses(candidates, micro_batch_size=self.micro_batch_size)


@dataclass(frozen=True)
class Estimator:
    """One row of the table."""

    name: str
    floor: float
    """Least cost_ratio by FLOPs."""
    score: Callable[[CandidateBuffer], Tensor]
    fresh: Callable[[CandidateBuffer], Tensor]
    """As ``score``, with nothing kept from an earlier call: for its memory."""
    exact: bool = False
    sketch_dim: int | None = None


def estimators(scene: Scene, plan: Plan, vocab_size: int) -> list[Estimator]:
    """Every estimator with its FLOP floor; directional with its default step and with a whole optimizer step.

    Per token, forward is a third of training (2P of 6P for the matrices, and a third of the attention). Two forwards
    cost 2/3. Ghost methods need forward and the gradients of activations: 4P, but all of the attention's backward;
    adjoint, and countsketch, which is adjoint of the carried-back proxy sketch, a product with Q as well: 6P.
    """
    weights = training_flops_per_token(plan.model, vocab_size, 0)
    ghost = 1 - weights / training_flops_per_token(plan.model, vocab_size, plan.seq_len) / 3

    def plain(name: str, floor: float, score: Callable[[CandidateBuffer], Tensor], exact: bool = False) -> Estimator:
        return Estimator(name, floor, score, score, exact)

    def countsketch(dim: int) -> Estimator:
        kept = CountSketchEstimator(dim, 42)
        return Estimator(
            f"countsketch_{dim}",
            1.0,
            lambda buffer: scene.sketched(kept, buffer),
            lambda buffer: scene.sketched(CountSketchEstimator(dim, 42), buffer),
            sketch_dim=dim,
        )

    def kronecker(dim: int) -> Estimator:
        kept = KroneckerEstimator(dim, 42)
        return plain(f"kronecker_{dim}", ghost, lambda buffer: scene.sketched(kept, buffer))

    return [
        plain("exact", 1.0, lambda buffer: scene.exact(buffer), exact=True),
        plain("exact_linear", 1.0, lambda buffer: scene.exact(buffer, linear_only=True), exact=True),
        plain("directional", 2 / 3, scene.directional),
        plain("directional_e1", 2 / 3, lambda buffer: scene.directional(buffer, 1.0)),
        plain("directional_one_sided", 2 / 3, lambda buffer: scene.directional(buffer, sides="one")),
        plain("adjoint", 1.0, scene.adjoint),
        countsketch(8192),
        countsketch(1024),
        kronecker(8192),
        plain("raw_gradient", 1.0, lambda buffer: scene.exact(buffer, raw=True), exact=True),
        plain("high_ppl", 1 / 3, scene.losses),
    ]


def measure(
    optim: OptimConfig, plan: Plan, corpus: Corpus, clock: str, bar: Progress, only: Collection[str] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one optimizer, and what they share. Raises EngineError if the model has not learned.

    ``only``: estimators whose costs are measured, and not their fidelity.
    """
    pool = Sequences(corpus, "pool", plan.seq_len)
    with single_engine(
        plan.model,
        optim,
        vocab_size=corpus.vocab_size,
        seq_len=plan.seq_len,
        micro_batch_size=plan.micro_batch_size,
        total_steps=plan.train_steps,
    ) as engine:
        losses = _train(engine, CandidateStream(pool, plan.micro_batch_size, SEED), plan, bar, optim.name)
        candidates = CandidateStream(pool, plan.num_candidates, SEED, "benchmark").at(0)
        proxies = Sequences(corpus, "proxy", plan.seq_len, [WANTED])
        proxy = CandidateStream(proxies, plan.proxy_batch_size, SEED, "proxy").at(0)
        backend = engine.scoring_backend()
        operator = backend.operator()
        assert operator is not None  # the optimizer has just been used
        gradient = backend.gradient(proxy)
        scene = Scene(backend, operator.bounded(gradient), gradient, plan.micro_batch_size)
        every = estimators(scene, plan, corpus.vocab_size)
        shared: dict[str, Any] = {"optimizer": optim.name, "loss_first": losses[0], "loss_last": losses[-1]}
        if only is None:
            rows = _fidelity(every, candidates, scene, plan, bar, optim.name)
        else:
            every = [estimator for estimator in every if estimator.name in only]
            rows = [{"estimator": estimator.name} for estimator in every]
        _add_costs(rows, shared, every, engine, candidates, proxy, plan, clock, bar)
    return [{"optimizer": optim.name, **row} for row in rows], shared


def _train(
    engine: MegatronEngine, stream: CandidateStream, plan: Plan, bar: Progress, name: str
) -> tuple[float, float]:
    """Uniform training; mean losses of the first and last ten steps."""
    task = bar.add_task(f"{name}: training", total=plan.train_steps)
    losses = []
    for step in range(plan.train_steps):
        losses.append(engine.train_step(stream.at(step)).loss)
        bar.update(task, advance=1, description=f"{name}: training, loss {losses[-1]:.2f}")
    span = min(10, plan.train_steps)
    first, last = sum(losses[:span]) / span, sum(losses[-span:]) / span
    if not last < first:
        raise EngineError(f"{name}: the loss went from {first:.3f} to {last:.3f}; its utilities would mean nothing")
    return first, last


def _fidelity(
    every: list[Estimator], candidates: CandidateBuffer, scene: Scene, plan: Plan, bar: Progress, name: str
) -> list[dict[str, Any]]:
    """Rank correlations with the oracle, and the bias of countsketch over seeds."""
    task = bar.add_task(f"{name}: utilities", total=len(every))
    utilities = {}
    for estimator in every:
        utilities[estimator.name] = estimator.score(candidates)
        bar.advance(task)
    dims = [estimator.sketch_dim for estimator in every if estimator.sketch_dim]
    task = bar.add_task(f"{name}: bias over seeds", total=plan.seeds * len(dims))
    rows = []
    for estimator in every:
        row: dict[str, Any] = {
            "estimator": estimator.name,
            "spearman": spearman(utilities[estimator.name], utilities["exact"]),
            "spearman_linear": spearman(utilities[estimator.name], utilities["exact_linear"]),
        }
        if estimator.sketch_dim:
            drawn = []
            for seed in range(plan.seeds):
                drawn.append(scene.sketched(CountSketchEstimator(estimator.sketch_dim, seed), candidates))
                bar.advance(task)
            exact = utilities["exact_linear"]
            found = [spearman(each, exact) for each in drawn]
            row["over_seeds"], row["over_seeds_low"] = sum(found) / plan.seeds, min(found)
            row["bias_z"] = largest_z(torch.stack(drawn) - exact)
            row["bias_z_limit"] = chance_z(plan.seeds, plan.num_candidates)
        rows.append(row)
    return rows


def _add_costs(
    rows: list[dict[str, Any]],
    shared: dict[str, Any],
    every: list[Estimator],
    engine: MegatronEngine,
    candidates: CandidateBuffer,
    proxy: CandidateBuffer,
    plan: Plan,
    clock: str,
    bar: Progress,
) -> None:
    """Add memory and time to ``rows``, and those of training and of the proxy to ``shared``."""
    few = candidates.take(torch.arange(plan.exact_timed))
    batch = candidates.take(torch.arange(plan.num_candidates // 2))
    backend = engine.scoring_backend()
    scored = {estimator.name: few if estimator.exact else candidates for estimator in every}

    def prepare() -> None:
        backend.operator()
        backend.gradient(proxy)

    task = bar.add_task(f"{shared['optimizer']}: memory", total=len(every) + 1)
    shared["training_peak_mb"] = peak_mb(lambda: engine.train_step(batch))
    bar.advance(task)
    for row, estimator in zip(rows, every, strict=True):
        row["peak_mb"] = peak_mb(lambda estimator=estimator: estimator.fresh(scored[estimator.name]))  # type: ignore[misc]
        bar.advance(task)
    passes: dict[str, Callable[[], Any]] = {"train": lambda: engine.train_step(batch), "proxy": prepare}
    passes |= {e.name: (lambda e=e: e.score(scored[e.name])) for e in every}  # type: ignore[misc]
    seconds = interleaved(passes, plan.repeats, clock, bar, f"{shared['optimizer']}: timing")
    for row, estimator in zip(rows, every, strict=True):
        ratio = Ratio.of(seconds[estimator.name], seconds["train"], len(batch) / len(scored[estimator.name]))
        row["cost_ratio"], row["cost_ratio_low"], row["cost_ratio_high"] = ratio.median, ratio.low, ratio.high
        row["floor"] = estimator.floor
        row["floor_ratio"] = ratio.median / estimator.floor
    shared["proxy_cost_ratio"] = Ratio.of(seconds["proxy"], seconds["train"], len(batch) / len(proxy)).median


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two (n,) tensors; equal values get the ranks of the order they stand in."""
    ranks = torch.stack([values.argsort(stable=True).argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def largest_z(errors: Tensor) -> float:
    """Largest |mean| / standard error over the candidates of (seeds, candidates) errors."""
    return float((errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)).abs().max())


@cache
def chance_z(seeds: int, candidates: int, trials: int = 2000) -> float:
    """Return what ``largest_z`` of unbiased, independent normal errors exceeds in 1 of 100 trials (simulated)."""
    generator = torch.Generator().manual_seed(0)
    found = [largest_z(torch.randn(seeds, candidates, generator=generator)) for _ in range(trials)]
    return float(torch.tensor(found).quantile(0.99))


def print_rows(rows: list[dict[str, Any]], shared: list[dict[str, Any]], console: Console) -> None:
    """The table a person reads."""
    table = Table(
        title="spearman: with the exact utilities of all parameters; linear: of the matrices", box=SIMPLE, padding=0
    )
    for name in ("", "estimator", "spearman", "linear", "seeds", "cost", "/floor", "MB", "bias z"):
        table.add_column(name, justify="left" if name in ("", "estimator") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["optimizer"],
            row["estimator"],
            f"{row['spearman']:.3f}",
            f"{row['spearman_linear']:.3f}",
            f"{row['over_seeds']:.3f}" if "over_seeds" in row else "",
            f"{row['cost_ratio']:.2f}",
            f"{row['floor_ratio']:.2f}",
            "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
            f"{row['bias_z']:.1f}<{row['bias_z_limit']:.1f}" if "bias_z" in row else "",
        )
    console.print(table)
    for each in shared:
        peak = "" if each["training_peak_mb"] is None else f"; a training step takes {each['training_peak_mb']:.0f} MB"
        console.print(
            f"{each['optimizer']}: loss {each['loss_first']:.2f} -> {each['loss_last']:.2f}; a proxy token costs"
            f" {each['proxy_cost_ratio']:.2f} training tokens{peak}",
            highlight=False,
        )


def main(arguments: list[str] | None = None, plan: Plan | None = None) -> int:
    """Measure, print, write; ``plan`` replaces what --quick chooses from."""
    args = parser(__doc__).parse_args(arguments)
    plan = plan or (QUICK if args.quick else FULL)
    console = Console()
    start(args, console)
    corpus = Corpus.open(ensure_corpus(args.corpus, console))
    rows: list[dict[str, Any]] = []
    shared = []
    with progress(console) as bar:
        for optim in plan.optimizers:
            found, about = measure(optim, plan, corpus, args.clock, bar)
            rows += found
            shared.append(about)
    print_rows(rows, shared, console)
    if args.json:
        parameters = count_parameters(plan.model, corpus.vocab_size, plan.seq_len)
        about = {**machine(args), "parameters": parameters, "plan": asdict(plan), "optimizers": shared}
        write_results(args.json, rows, about)
        console.print(f"rows: {args.json}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
