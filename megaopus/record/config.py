"""Says what a person sees of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from megaopus.settings import HARMLESS, setting

WANDB_MODES = ("off", "offline", "online")
WANDB_REMEDY = "pip install 'megaopus[wandb]'"


def _span(value: list[int]) -> str | None:
    return None if not value or (len(value) == 2 and 0 <= value[0] <= value[1]) else "must be two steps, first and last"


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    """Console lines, files in the run folder, and Weights & Biases."""

    RESUME: ClassVar[str] = HARMLESS

    every: int = setting(10, min=1, doc="Steps between progress lines; metrics.jsonl has every step.")
    selection: bool = setting(
        True,
        doc="Record every choice: selection.jsonl, a line per step, and choices/, a row per candidate "
        "(docs/report.md).",
    )
    selection_every: int = setting(
        1,
        min=1,
        doc="Steps from one that keeps all its candidates in choices/ to the next; the picks of every step are kept.",
        hint="1 keeps all candidates; selection=false records nothing",
    )
    overlaps_mb: float = setting(
        1.0,
        min=0,
        doc="With a redundancy term: megabytes a step up to which choices/ keeps the inner products it rests on; "
        "0: never.",
        hint="1 is usual; 0 keeps no inner products",
    )
    profile_steps: list[int] = setting(
        [],
        check=_span,
        doc="First and last step whose work torch.profiler records on every rank, as profile/rank_R.json of the run "
        "folder, for chrome://tracing or Perfetto; empty: none.",
        hint="[10, 12] records three steps",
    )
    layer_grad_norm_every: int = setting(
        0,
        min=0,
        doc="Steps from one that records the gradient norm of each layer, before clipping, to the next; 0: none does.",
        hint="0 records none, 10 those of every tenth step",
    )
    tensorboard: bool = setting(False, doc="Write the same numbers for TensorBoard, in tensorboard/ of the run folder.")
    wandb: str = setting("off", choices=WANDB_MODES, doc="Send metrics to Weights & Biases, now or later.")
    wandb_project: str = setting("megaopus", doc="Project in Weights & Biases.")

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for what is not installed."""
        if self.wandb in WANDB_MODES[1:] and find_spec("wandb") is None:
            yield "wandb", "the package wandb is not installed", WANDB_REMEDY
