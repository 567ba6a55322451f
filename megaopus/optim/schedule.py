"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from megaopus.optim.config import OptimConfig


def lr_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of update ``step`` (from 0) over its peak.

    Linear warm-up from 1/warmup_steps to 1 over warmup_steps; then constant, cosine to min_lr_ratio (or min_lr) at the
    last step, or (wsd) constant and a linear fall to it over the last decay_steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.last_share()
    if config.schedule == "cosine":
        span = max(1, total_steps - 1 - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / span)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd" and config.decay_steps:
        progress = (step - (total_steps - config.decay_steps) + 1) / config.decay_steps
        return 1 - (1 - floor) * min(1.0, max(0.0, progress))
    return 1.0
