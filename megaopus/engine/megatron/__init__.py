"""Registers the megatron engine, which serves every layout and optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from megaopus.distributed.config import ParallelConfig
from megaopus.engine.config import EngineConfig
from megaopus.engine.registry import EngineSpec, Refusal, register_engine
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import OPTIMIZERS
from megaopus.selection.config import SelectionConfig


def _load_class() -> type:
    from megaopus.engine.megatron.engine import MegatronEngine

    return MegatronEngine


def _refusals(
    engine: EngineConfig, parallel: ParallelConfig, optim: OptimConfig, selection: SelectionConfig | None
) -> Iterator[Refusal]:
    if parallel.distributed_optimizer and not optim.spec().adam_moments:
        served = ", ".join(name for name, spec in OPTIMIZERS.items() if spec.adam_moments)
        reason = f"shards the state of {served} only, not of optim.name = {optim.name}"
        yield Refusal("parallel.distributed_optimizer", True, reason, f"set it to false, or use optim.name={served}")


register_engine(
    "megatron",
    EngineSpec(
        load_class=_load_class,
        package="megatron-core",
        describe=lambda engine: engine.name,
        refusals=_refusals,
        shards_optimizer=lambda parallel: parallel.distributed_optimizer,
        serves_experts=True,
        memory=lambda engine, count, precision, shards, scores: {},
    ),
)
