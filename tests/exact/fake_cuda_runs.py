"""Runs the engines' CUDA branch on fake tensors, a rank of any job, and tells plainly what was counted.

python -m tests.exact.fake_cuda_runs        # write tests/fixtures/fake_cuda.json anew, for a change that is meant
"""

from __future__ import annotations

import gc
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.fake_cuda.measure import Zeros, fake_job, measure
from benchmarks.fake_cuda.work import Work
from megaopus.build import build_engine
from megaopus.config.run_config import RunConfig
from megaopus.models.config import ModelConfig
from megaopus.optim.registry import OPTIMIZERS
from megaopus.planning.memory import PROCESS_ROW, memory, peak
from megaopus.selection.config import SelectionConfig
from tests.harness import example
from tests.pool import Pool

FIXTURE = Path(__file__).parents[1] / "fixtures" / "fake_cuda.json"
RENEW = "python -m tests.exact.fake_cuda_runs"
VOCAB, SEQ_LEN = 2048, 128
GPT2 = ModelConfig(num_layers=1, hidden_size=128, num_heads=8)
LLAMA = replace(
    GPT2, num_kv_heads=8, position="rope", norm="rmsnorm", activation="swiglu", bias=False, tied=False, qk_norm=True
)
DEEP = replace(GPT2, num_layers=4)
_OPUS: dict[str, Any] = {"method": "opus"}
SELECTIONS: Mapping[str, dict[str, Any]] = {
    "directional": {**_OPUS, "contrast": True},
    "adjoint": {**_OPUS, "estimator": "adjoint"},
    "countsketch": {**_OPUS, "estimator": "countsketch"},
    "kronecker": {**_OPUS, "estimator": "kronecker"},
    "gram": {**_OPUS, "estimator": "adjoint", "redundancy": 0.5},
    "exact": {**_OPUS, "estimator": "exact"},
}
"""Every estimator, contrast, and a Gram matrix."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One rank of a job."""

    model: ModelConfig = field(default_factory=lambda: GPT2)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    rank: int = 0
    micro_batches: int = 2
    selections: tuple[str, ...] = tuple(name for name in SELECTIONS if name != "exact")

    def config(self, optimizer: str = "adamw") -> RunConfig:
        """The settings of such a run."""
        config = RunConfig()
        config.model, config.optim = self.model, example(optimizer)
        for key, value in self.parallel.items():
            setattr(config.parallel, key, value)
        for key, value in {"device": "cuda", "precision": "bf16", **self.engine}.items():
            setattr(config.engine, key, value)
        dp = self.ranks // config.parallel.model_ranks
        config.data.seq_len = SEQ_LEN
        config.train.micro_batch_size = 2
        config.train.global_batch_size = dp * 2 * self.micro_batches
        return config

    def selection(self, name: str) -> SelectionConfig:
        """The settings of a scoring of as many candidates as are trained on, by a proxy of one micro-batch."""
        config = self.config()
        size, parallel = config.train.global_batch_size, config.parallel
        proxies = size // self.micro_batches * (parallel.pp if parallel.vpp > 1 else 1)
        return SelectionConfig(
            **SELECTIONS[name], rho=1.0, proxy_batch_size=proxies, score_micro_batch_size=4, sketch_dim=64
        )


RUNS: Mapping[str, Run] = {
    "1": Run(selections=tuple(SELECTIONS)),
    "tp8 sp": Run(model=LLAMA, parallel={"tp": 8, "sequence_parallel": True}, ranks=8, rank=3),
    "pp4": Run(
        model=DEEP,
        parallel={"pp": 4},
        ranks=4,
        rank=3,
        selections=("directional", "gram"),
    ),
    "pp2 vpp2": Run(model=DEEP, parallel={"pp": 2, "vpp": 2}, ranks=2, selections=("directional",)),
    "cp2": Run(
        model=LLAMA,
        parallel={"cp": 2},
        ranks=2,
        rank=1,
        selections=("directional", "kronecker", "gram"),
    ),
    "dp32 zero": Run(
        parallel={"distributed_optimizer": True},
        ranks=32,
        rank=31,
        selections=("directional", "adjoint", "countsketch", "gram"),
    ),
    "tp8 sp pp4 cp2 dp32 zero": Run(
        model=replace(LLAMA, num_layers=4, hidden_size=256),  # tensors well above what an allocator rounds up to
        parallel={"tp": 8, "pp": 4, "cp": 2, "sequence_parallel": True, "distributed_optimizer": True},
        ranks=2048,
        rank=2047,
        selections=("directional", "adjoint"),
    ),
}
"""Layout -> a rank of a job of it."""
MIXTURE = replace(LLAMA, num_layers=2, num_experts=8, expert_ffn_hidden_size=128, shared_expert_ffn_hidden_size=64)
EXPERTS: Mapping[str, Run] = {
    "1": Run(model=MIXTURE, selections=("directional",)),
    "ep4": Run(model=MIXTURE, parallel={"ep": 4}, ranks=4, rank=2, selections=("directional",)),
    "ep2 dp4 zero": Run(
        model=MIXTURE,
        parallel={"ep": 2, "distributed_optimizer": True},
        ranks=8,
        rank=5,
        selections=("directional",),
    ),
    "tp2 sp ep2": Run(
        model=MIXTURE,
        parallel={"tp": 2, "ep": 2, "sequence_parallel": True},
        ranks=4,
        rank=3,
        selections=("directional",),
    ),
    "tp2 sp ep2 expert_tp2": Run(
        model=MIXTURE,
        parallel={"tp": 2, "ep": 2, "expert_tp": 2, "sequence_parallel": True},
        ranks=4,
        rank=3,
        selections=("directional",),
    ),
}
"""Layout of a mixture of experts, of even loads -> a rank of a job of it."""
SHARED = [Run(parallel={"distributed_optimizer": True}, ranks=2, rank=rank) for rank in (0, 1)]
"""Both ranks of a job whose checkpoint each writes a part of."""
TENSOR_PARALLEL = Run(model=replace(LLAMA, num_kv_heads=2), micro_batches=1, parallel={"tp": 2}, ranks=4, rank=3)
"""Where optimizers that need a whole matrix exchange it."""


def plain(work: Work) -> dict[str, Any]:
    """Say what was counted, in values that JSON has."""
    kinds: Counter[str] = Counter()
    for (kind, dtype), flops in work.flops.items():
        kinds[f"{kind} {str(dtype).removeprefix('torch.')}"] += flops
    return {
        "launches": work.kernels(),
        "pass_launches": work.pass_launches,
        "reads": dict(sorted(work.reads.items())),
        "waits": dict(sorted(work.waits.items())),
        "copies_in": dict(sorted(work.copies_in.items())),
        "messages": {str(key): [count, work.sizes[key]] for key, count in sorted(work.messages.items())},
        "flops": dict(sorted(kinds.items())),
    }


def layout(name: str) -> dict[str, Any]:
    """Train and score at a layout, by every estimator that there is for it."""
    return trained(RUNS[name])


def experts(name: str) -> dict[str, Any]:
    """The same of a mixture of experts."""
    return trained(EXPERTS[name])


def trained(run: Run) -> dict[str, Any]:
    """Train and score on a rank."""
    warnings.simplefilter("ignore")
    config = run.config()
    with fake_job(config, run.rank, run.ranks) as (mesh, meter):
        found = measure(config, VOCAB, mesh, meter, {each: run.selection(each) for each in run.selections})
    works = {"train": found.train_work, **found.score_work}
    return {
        "work": {step: plain(work) for step, work in works.items()},
        "peaks": {"train": found.training, **found.scoring},
    }


def launches() -> tuple[int, int]:
    """(kernels, kernels of passes) of a scoring with contrast, whose proxy makes one pass of four micro-batches."""
    warnings.simplefilter("ignore")
    config = replace(Run(), model=DEEP).config()
    config.train.micro_batch_size, config.train.global_batch_size = 1, 4
    sizes = {"proxy_batch_size": 4, "proxy_micro_batch_size": 4, "score_micro_batch_size": 8}
    with fake_job(config, 0, 1) as (mesh, meter):
        selections = {"": SelectionConfig(**SELECTIONS["directional"], **sizes)}
        work = measure(config, VOCAB, mesh, meter, selections).score_work[""]
    return work.kernels(), work.pass_launches


def estimated(run: Run) -> dict[str, int]:
    """Step -> bytes at its peak, as ``check`` estimates them."""
    config, found = run.config(), {}
    stage = run.rank * config.parallel.pp // run.ranks
    for step in ("train", *run.selections):
        config.selection = SelectionConfig() if step == "train" else run.selection(step)
        rows = memory(config, VOCAB, run.ranks, "bf16", stage, "cuda")
        del rows[PROCESS_ROW]
        found[step] = peak(rows)[1]
    return found


def optimizer(name: str) -> dict[str, Any]:
    """Make two updates with an optimizer and the map that selection needs of it, tensor- and data-parallel."""
    warnings.simplefilter("ignore")
    run = TENSOR_PARALLEL
    config = run.config(name)
    found: dict[str, Any] = {}
    with fake_job(config, run.rank, run.ranks) as (mesh, meter):
        engine = build_engine(config, mesh, VOCAB)
        batch = Zeros(config.train.global_batch_size, SEQ_LEN)
        for step in ("first", "second"):
            gc.collect()
            meter.reset_peak()
            meter.work = Work()
            engine.train_step(batch)
            found[step] = plain(meter.work)
        peaks = {"train": meter.peak}
        meter.work = Work()
        operator = engine.scoring_backend().operator()
        gradient = {key: torch.zeros_like(value) for key, value in engine.scoring_backend().parameters().items()}
        moved = operator.transposed().apply(gradient)
        assert all(moved[key].shape == value.shape for key, value in gradient.items())
        found["operator"] = plain(meter.work)
    return {"work": found, "peaks": peaks}


def saved(run: Run) -> dict[str, list[Any]]:
    """Key -> [whole shape, type] of every tensor that a rank would put into a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    warnings.simplefilter("ignore")
    config = run.config()
    with fake_job(config, run.rank, run.ranks) as (mesh, _):
        engine = build_engine(config, mesh, VOCAB)
        engine.train_step(Zeros(config.train.global_batch_size, SEQ_LEN))
        weights = engine.scoring_backend().parameters()
        mine = {name for name, p in zip(weights, engine.module.parameters(), strict=True) if engine.optimizer.saves(p)}
        groups = {"average": {name: weights[name] for name in mine}}
        with mesh.megatron():
            state = engine._sharded_state(groups, is_loading=False)
        tensors = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    return {each.key: [list(each.global_shape), str(each.dtype)] for each in tensors}


def main() -> None:
    """Write the fixture's numbers for this version of torch, each case in a process of its own as in the test."""
    kinds = {"layouts": (layout, RUNS), "optimizers": (optimizer, OPTIMIZERS), "experts": (experts, EXPERTS)}
    known = json.loads(FIXTURE.read_text()) if FIXTURE.exists() else {}
    with Pool() as pool:
        jobs = {kind: {name: pool.submit(1, case, name) for name in names} for kind, (case, names) in kinds.items()}
        found = {kind: {name: job.result()[0] for name, job in each.items()} for kind, each in jobs.items()}
    known[torch.__version__.split("+")[0]] = found
    FIXTURE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{FIXTURE}: {', '.join(known)}")


if __name__ == "__main__":
    main()
