"""RunConfig: the packages' own settings composed into one object, and every error reported at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from megaopus.checkpoint.config import CheckpointConfig
from megaopus.data.config import DataConfig
from megaopus.distributed.config import ParallelConfig
from megaopus.engine.config import EngineConfig
from megaopus.models.config import ModelConfig
from megaopus.monitor.config import LoggingConfig
from megaopus.optim.config import OptimConfig
from megaopus.selection.config import SelectionConfig
from megaopus.train_config import TrainConfig


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Everything a run depends on; written as ``config.yaml`` into its folder."""

    run_dir: str = "runs/default"
    seed: int = 1234
    resume: str = "auto"
    """auto: go on from the newest checkpoint if there is one; never; required; or the path of a checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
