"""Says what a run comes to whatever its layout: tokens, parameters, passes over the pool, cost of selection."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaopus.config.run_config import RunConfig
from megaopus.models.flops import count_active_parameters, count_parameters
from megaopus.planning.scorer_cost import online
from megaopus.planning.step_time import tokens_per_step
from megaopus.selection.methods.registry import UNIFORM

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """Counts a run."""

    steps: int
    tokens: int
    parameters: int
    active: int
    """Parameters that a token uses."""
    pool: int | None
    """Sequences that candidates are drawn from; None: not known."""

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int, pool: int | None) -> WholeRun:
        """Count the run of ``config``."""
        size = config.model, vocab_size, config.data.seq_len
        return cls(
            steps=config.train.steps,
            tokens=config.train.steps * tokens_per_step(config),
            parameters=count_parameters(*size),
            active=count_active_parameters(*size),
            pool=pool,
        )

    def rows(self, config: RunConfig) -> dict[str, str]:
        """Name -> value, in words."""
        used = f", {self.active:,} used by a token" if self.active != self.parameters else ""
        per_parameter = f"{self.tokens / self.active:,.2f}" + (" (of those that a token uses)" if used else "")
        return {
            "length": f"{self.steps:,} steps of {tokens_per_step(config):,} tokens, {self.tokens:,} in all",
            "parameters": f"{self.parameters:,}{used}",
            "tokens per parameter": per_parameter,
            "epochs of the pool": self._epochs(config),
            "cost of selection": self._selection(config),
        }

    def warnings(self, config: RunConfig) -> list[str]:
        """Say where the pool is too small for what is to be picked of it within the cap on exposures."""
        selection, guards = config.selection, config.selection.guards
        if self.pool is None or selection.method == UNIFORM or not guards.exposure_cap:
            return []
        steps = min(self.steps, guards.exposure_window)
        times = steps * config.train.global_batch_size / self.pool
        if times <= guards.exposure_cap:
            return []
        needed = math.ceil(steps * config.train.global_batch_size / guards.exposure_cap)
        return [
            f"in {steps:,} steps {times:.2f} times the pool's sequences are picked, more than"
            f" selection.guards.exposure_cap = {guards.exposure_cap} allows within"
            f" selection.guards.exposure_window = {guards.exposure_window}: the cap would be lifted as far as it must"
            f" be. Use a pool of {needed:,} sequences or more, fewer steps, or a larger cap"
        ]

    def _epochs(self, config: RunConfig) -> str:
        if self.pool is None:
            return f"{UNKNOWN} without a corpus: tell its size with --pool-tokens"
        trained = self.steps * config.train.global_batch_size / self.pool
        text = f"{trained:.2f} trained on, of {self.pool:,} sequences"
        if config.selection.method != UNIFORM:
            seen = self.steps / config.selection.score_every * config.buffer_size() / self.pool
            text += f"; {seen:.2f} as candidates"
        return text

    @staticmethod
    def _selection(config: RunConfig) -> str:
        if config.selection.method == UNIFORM:
            return "omega 0: nothing is scored"
        return online(config).told()
