"""Registers the DeepSpeed engine: ZeRO, data and tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator

from megaopus.distributed.config import ParallelConfig
from megaopus.engine.config import EngineConfig
from megaopus.engine.registry import EngineSpec, Refusal, register_engine
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import OPTIMIZERS
from megaopus.selection.config import SelectionConfig

_OTHER = "or engine.name=megatron"


def _load_class() -> type:
    from megaopus.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine


def _import() -> None:
    import torch

    from megaopus.engine.deepspeed.engine import import_deepspeed

    import_deepspeed(on_cpu=not torch.cuda.is_available())


def _refusals(
    engine: EngineConfig, parallel: ParallelConfig, optim: OptimConfig, selection: SelectionConfig | None
) -> Iterator[Refusal]:
    for key in ("pp", "cp"):
        if (degree := getattr(parallel, key)) > 1:
            reason = "the deepspeed engine has tensor and data parallelism only"
            yield Refusal(f"parallel.{key}", degree, reason, f"parallel.{key}=1, {_OTHER}")
    if parallel.distributed_optimizer:
        reason = "is megatron's way of sharding the optimizer; the deepspeed engine has engine.zero_stage for it"
        yield Refusal("parallel.distributed_optimizer", True, reason, f"parallel.distributed_optimizer=false, {_OTHER}")
    if why := optim.spec().refusal_of_pieces():
        served = ", ".join(name for name, spec in OPTIMIZERS.items() if spec.refusal_of_pieces() is None)
        reason = f"{why}, of which ZeRO keeps flat pieces"
        yield Refusal("optim.name", optim.name, reason, f"one of optim={served}, {_OTHER}")
    if engine.zero_stage == 3 and selection is not None and "whole_weights" in (needs := selection.needs()):
        key, value, why = needs["whole_weights"]
        instead = "selection.estimator=directional" if key == "estimator" else "selection.method=opus"
        reason = f"{why}, and engine.zero_stage = 3 partitions them"
        yield Refusal(f"selection.{key}", value, reason, f"{instead}, or engine.zero_stage=2")


def _memory(engine: EngineConfig, count: int, precision: str, shards: int, scores: bool) -> dict[str, tuple[int, str]]:
    """Weights and gradients of a rank's ``count`` parameters under ZeRO, whose update works on fp32 copies always."""
    width = 4 if precision == "fp32" else 2
    model, gradients = (shards if engine.zero_stage == 3 else 1), (shards if engine.zero_stage >= 2 else 1)
    parts = "both" if engine.zero_stage == 3 else "the copies"
    how = f"{precision} and fp32 copies, {parts} over {shards} ranks"
    return {
        "weights": (width * count // model + 4 * count // shards, how),
        "gradients": (4 * count // gradients, f"fp32, over {gradients} ranks, without buckets"),
    }


register_engine(
    "deepspeed",
    EngineSpec(
        load_class=_load_class,
        check_installed=_import,
        package="deepspeed",
        describe=lambda engine: f"{engine.name} (ZeRO stage {engine.zero_stage})",
        refusals=_refusals,
        shards_optimizer=lambda parallel: True,
        memory=_memory,
    ),
)
