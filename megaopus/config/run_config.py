"""Holds every setting of a run in one object, RunConfig, composed of the packages' own sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from megaopus.checkpoint.config import CheckpointConfig, InitConfig
from megaopus.data.config import DataConfig
from megaopus.data.needs import DataNeeds
from megaopus.distributed.config import ParallelConfig
from megaopus.engine.config import EngineConfig
from megaopus.evaluation.config import TasksConfig
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig
from megaopus.record.config import LoggingConfig
from megaopus.selection.config import SelectionConfig
from megaopus.settings import FIXED, HARMLESS, Entry, entries, member_entries, setting
from megaopus.training.config import TrainConfig


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Everything a run depends on; written as `config.yaml` into its folder."""

    RESUME: ClassVar[str] = HARMLESS

    run_dir: str = setting(
        "runs/default",
        check=lambda value: None if value else "is empty",
        schemes=(),
        doc="Folder of the run: settings, checkpoints, record.",
        hint="name a folder, for example run_dir=runs/first",
    )
    seed: int = setting(1234, resume=FIXED, doc="Seed of weights, dropout, candidates and draws.")
    resume: str = setting(
        "auto",
        schemes=(),
        doc="auto: go on from the newest checkpoint if there is one; never; required; or the path of a checkpoint.",
    )
    resume_allow: list[str] = setting(
        [], doc="Settings that may differ from the checkpoint's though they change the training, such as optim.lr."
    )
    plugins: list[str] = setting(
        [],
        doc="Modules of yours that register optimizers, operators, estimators, methods, samplers, engines or data "
        "sources (docs/plugins.md).",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def num_candidates(self) -> int:
        """N = global_batch_size / rho, to the nearest integer (``validate`` refuses a rho that is not close to one)."""
        return round(self.train.global_batch_size / self.selection.rho)

    def buffer_size(self) -> int:
        """Sequences of one buffer: the candidates of all the steps it serves, times what a prescreen looks through."""
        return self.num_candidates() * self.selection.score_every * self.selection.screened

    def num_scored(self) -> int:
        """Candidates scored at a time, over all data-parallel ranks."""
        if self.selection.prescreen.mode == "predict":
            return self.selection.prescreen.slice
        return self.num_candidates() * self.selection.score_every

    def scored_length(self) -> int:
        """Tokens of each candidate that are scored: ``score_length``, as far as sequences go."""
        return min(self.selection.score_length or self.data.seq_len, self.data.seq_len)

    def data_needs(self) -> DataNeeds:
        """Return what the run asks of its corpora, for ``RunData.open`` and ``RunData.describe``."""
        selection = self.selection
        return DataNeeds(
            seed=self.seed,
            steps=self.train.steps,
            buffer_size=self.buffer_size(),
            steps_per_buffer=selection.score_every,
            proxy_batch_size=selection.proxy_batch_size,
            proxy=selection.needs_proxy,
            contrast=selection.needs_pool,
            text_features=selection.seen_blocks if selection.needs_text_features else None,
            judges=selection.utilities == "odds",
            eval_sequences=self.train.eval_sequences,
        )


SETTINGS: dict[str, Entry] = entries(RunConfig)
"""Every setting by its dotted key; what an optimizer alone has is in ``settings_of``."""


def settings_of(optimizer: str) -> dict[str, Entry]:
    """Every setting of a run with an optimizer, by its dotted key; of one that is unknown here, none of its own."""
    return SETTINGS | member_entries(SETTINGS["optim.settings"], optimizer)


def settings_under(section: str) -> list[str]:
    """The dotted keys of a section's settings."""
    return [key for key in SETTINGS if key.startswith(f"{section}.")]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def default_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> default of every setting that a run with ``config``'s optimizer has."""
    return flat({key: entry.known.default for key, entry in settings_of(config.optim.name).items()})


def differences(config: RunConfig) -> dict[str, tuple[object, object]]:
    """Dotted key -> (value, default) for each setting that differs from its default."""
    default = default_settings(config)
    return {key: (value, default.get(key)) for key, value in flat(asdict(config)).items() if value != default.get(key)}
