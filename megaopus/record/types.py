"""Holds what the recorder is told of each step: plain values, and arrays for what there is of every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megaopus.events import Event, read_event
from megaopus.record.formatting import format_bytes, format_count, format_lr
from megaopus.record.metrics import last, mean, metric, values_of, write_record
from megaopus.selection.candidate_table import CandidateTable

NOT_RECORDED = "not recorded"
"""The reason of a skipped update in a row of version 0.1, which kept none."""


def _token_rate(records: Sequence[StepRecord], name: str) -> str:
    """Tokens per second over the steps since the last progress line."""
    first, latest, seconds = records[0], records[-1], sum(values_of(records, name))
    if not seconds > 0:
        return ""
    several = len(records) > 1
    each = (latest.tokens - first.tokens) / (len(records) - 1) if several else latest.tokens / (latest.step + 1)
    return f"{format_count(each * len(records) / seconds)} tok/s"


def _peak_memory(records: Sequence[StepRecord], name: str) -> str:
    """The largest peak beside the estimate: of the device, or of the process where the model is on the CPU."""
    values, estimate = values_of(records, name), records[-1].memory_estimate
    if not values or (name == "memory_resident" and records[-1].memory_allocated is not None):
        return ""
    return f"mem {format_bytes(max(values))}" + (f" of {format_bytes(estimate)} est." if estimate else "")


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """Records one optimizer step: the list of all per-step metrics."""

    step: int = field(metadata=metric("", "From 0; row s describes update s + 1.", wandb="step"))
    tokens: int = field(metadata=metric("tokens", "Update tokens so far, this step included.", wandb="tokens"))
    loss: float = field(
        metadata=metric(
            "nats per token",
            "Mean loss of the batch, before the update.",
            wandb="train/loss",
            console=mean("loss {:.3f}".format),
            style="bold cyan",
        )
    )
    grad_norm: float = field(
        metadata=metric(
            "",
            "Norm of the whole gradient, before clipping.",
            wandb="train/grad_norm",
            console=last("grad {:.2f}".format),
            plot=True,
        )
    )
    lr: float = field(
        metadata=metric(
            "",
            "Learning rate.",
            wandb="train/lr",
            console=last(lambda value: f"lr {format_lr(value)}"),
            plot=True,
        )
    )
    time_s: float = field(
        metadata=metric(
            "s",
            "Time of data, selection and training so far, over every process of the run.",
            wandb="time_s",
            reproducible=False,
        )
    )
    step_s: float = field(
        metadata=metric(
            "s",
            "Time of this step, selection included.",
            wandb="train/step_s",
            console=_token_rate,
            plot=True,
            reproducible=False,
        )
    )
    select_s: float = field(
        metadata=metric("s", "Part of that spent choosing the batch.", wandb="selection/select_s", reproducible=False)
    )
    matrix_lr: float | None = field(
        default=None,
        metadata=metric(
            "",
            "That of the blocks' matrices, where they have an optimizer of their own; else null.",
            wandb="train/matrix_lr",
            plot=True,
        ),
    )
    loss_tokens: int | None = field(
        default=None,
        metadata=metric(
            "tokens",
            "Tokens of the batch that count in the loss; null: all of them do.",
            wandb="train/loss_tokens",
        ),
    )
    layer_grad_norms: dict[str, float] | None = field(
        default=None,
        metadata=metric(
            "",
            "That of `embedding`, each of `layers.0` on, and `head`; null: not asked for.",
            wandb="train/layer_grad_norm",
        ),
    )
    expert_busiest: float | None = field(
        default=None,
        metadata=metric(
            "",
            "Load of the busiest expert over the even one, mean over layers; null: no experts.",
            wandb="train/expert_busiest",
            console=mean("busiest expert {:.2f}x".format),
            plot=True,
        ),
    )
    experts_idle: float | None = field(
        default=None,
        metadata=metric(
            "",
            "Share of the experts that no token of the batch was given to.",
            wandb="train/experts_idle",
            plot=True,
        ),
    )
    skipped: bool = field(default=False, metadata=metric("", "The update was not applied.", wandb="train/skipped"))
    skip_reason: str | None = field(default=None, metadata=metric("", "Why the update was not applied; null: it was."))
    memory_allocated: int | None = field(
        default=None,
        metadata=metric(
            "bytes",
            "Peak of tensors on rank 0's GPU since the step before; null on CPU.",
            wandb="memory/allocated",
            console=_peak_memory,
            plot=True,
            reproducible=False,
        ),
    )
    memory_reserved: int | None = field(
        default=None,
        metadata=metric(
            "bytes",
            "Peak that torch's allocator held there, tensors included.",
            wandb="memory/reserved",
            plot=True,
            reproducible=False,
        ),
    )
    memory_resident: int | None = field(
        default=None,
        metadata=metric(
            "bytes",
            "Peak of rank 0's process in the host's memory, over its life so far.",
            wandb="memory/resident",
            console=_peak_memory,
            plot=True,
            reproducible=False,
        ),
    )
    memory_estimate: int | None = field(
        default=None,
        metadata=metric(
            "bytes", "Memory of rank 0 as `check` estimates it.", wandb="memory/estimate", reproducible=False
        ),
    )

    tflops_per_second: float | None = field(
        default=None,
        metadata=metric(
            "TFLOP/s",
            "Training's model FLOPs over this step's time and the ranks.",
            wandb="throughput/tflops_per_second",
            console=mean("{:.3g} TFLOP/s".format),
            plot=True,
            reproducible=False,
        ),
    )
    model_flops_utilisation: float | None = field(
        default=None,
        metadata=metric(
            "",
            "That over the GPU's dense bf16 peak; null where none is known.",
            wandb="throughput/model_flops_utilisation",
            console=mean("MFU {:.1%}".format),
            plot=True,
            reproducible=False,
        ),
    )

    def __post_init__(self) -> None:
        """Make ``skipped``, which readers of version 0.1's files know, and ``skip_reason`` say the same."""
        if self.skip_reason is not None:
            self.skipped = True
        elif self.skipped:
            self.skip_reason = NOT_RECORDED


@dataclass(slots=True, kw_only=True)
class SelectionRecord:
    """Records what was chosen in one step, and why."""

    step: int = field(metadata=metric("", "As of the step."))
    method: str = field(
        metadata=metric("", "How was chosen: `uniform` in a warm-up without a prior and after a fallback.")
    )
    candidates: int = field(metadata=metric("", "Number of candidates."))
    picked: int = field(metadata=metric("", "Number of picks."))
    correlation: float | None = field(
        default=None, metadata=metric("", "Rank correlation of the prescreen's scores with utilities of uniform draws.")
    )
    share: dict[str, float] = field(
        metadata=metric("", "Share of each domain among the picks.", wandb="selection/share")
    )
    pool_share: dict[str, float] = field(
        metadata=metric("", "Share of each domain among the candidates.", wandb="selection/pool_share")
    )
    ess: float = field(metadata=metric("", "Effective sample size 1 / Σp².", wandb="selection/ess"))
    max_p_ratio: float = field(
        metadata=metric("", "Largest probability over the uniform one.", wandb="selection/max_p_ratio")
    )
    signal_to_error: float | None = field(
        default=None,
        metadata=metric(
            "",
            "Spread of the utilities over the error of each; null: not measured.",
            wandb="selection/signal_to_error",
        ),
    )
    changed_by_utilities: float | None = field(
        default=None,
        metadata=metric(
            "",
            "Share of the picks that utilities changed; null: not known.",
            wandb="selection/changed_by_utilities",
        ),
    )
    swapped_utility: float | None = field(
        default=None,
        metadata=metric(
            "",
            "Mean utility of those picks less that of the ones they replaced.",
            wandb="selection/swapped_utility",
        ),
    )
    swapped_importance: float | None = field(
        default=None,
        metadata=metric(
            "",
            "The same of the log importance by n-grams.",
            wandb="selection/swapped_importance",
        ),
    )
    swapped_loss: float | None = field(
        default=None,
        metadata=metric("nats per token", "The same of the candidate's own loss.", wandb="selection/swapped_loss"),
    )
    share_swapped_in: dict[str, float] = field(
        default_factory=dict,
        metadata=metric(
            "",
            "Share of each domain among the picks that utilities brought in.",
            wandb="selection/share_swapped_in",
        ),
    )
    share_swapped_out: dict[str, float] = field(
        default_factory=dict,
        metadata=metric(
            "",
            "Share of each domain among those that they replaced.",
            wandb="selection/share_swapped_out",
        ),
    )
    signal_spread: dict[str, float] = field(
        default_factory=dict,
        metadata=metric(
            "",
            "Standard deviation of what each signal adds to what is picked by.",
            wandb="selection/signal_spread",
        ),
    )
    odds_weights: dict[str, float] = field(
        default_factory=dict,
        metadata=metric(
            "",
            "Weight of each signal in the log-odds that are picked by.",
            wandb="selection/odds_weights",
        ),
    )
    events: list[Event] = field(
        default_factory=list,
        metadata=metric("", "What went another way than asked; see [events](#events).", wandb="selection/events"),
    )
    predicted_fall: float | None = field(
        default=None,
        metadata=metric(
            "nats per token",
            "Fall of the proxy loss as the picks' utilities predict it.",
            wandb="selection/predicted_fall",
        ),
    )
    uniform_fall: float | None = field(
        default=None,
        metadata=metric("nats per token", "The fall predicted for a uniform draw.", wandb="selection/uniform_fall"),
    )
    realised_fall: float | None = field(
        default=None,
        metadata=metric(
            "nats per token",
            "The fall as it was; all three are null without a check.",
            wandb="selection/realised_fall",
        ),
    )
    choices: CandidateTable | None = None
    """Every candidate; None where it is not kept."""

    def __post_init__(self) -> None:
        """Take events also as rows, and as the sentences of version 0.1."""
        self.events = [read_event(each) for each in self.events]

    @property
    def falls(self) -> tuple[float, float, float] | None:
        """(predicted, of a uniform draw, realised) fall of the proxy loss; None where it was not checked."""
        if self.predicted_fall is None or self.uniform_fall is None or self.realised_fall is None:
            return None
        return self.predicted_fall, self.uniform_fall, self.realised_fall

    def facts(self) -> dict[str, Any]:
        """Make the row of selection.jsonl: all but ``choices``."""
        return write_record(self)


@dataclass(slots=True, kw_only=True)
class TasksRecord:
    """Records what a run scored on benchmarks after ``step`` updates."""

    step: int
    tokens: int
    """Update tokens before it."""
    time_s: float
    """Time before it, as of the step."""
    rows: list[dict[str, Any]]
    """A row for each metric of each task, as in a table of ``eval`` (docs/evaluation.md)."""

    @property
    def headlines(self) -> list[dict[str, Any]]:
        """The row of each whole task that speaks for it."""
        return [row for row in self.rows if row["headline"] and row["part_of"] is None]

    def bits_per_byte(self, task: str) -> float | None:
        """Find those of a task's right answers, which move before its headline does; None: they are not known."""
        return next(
            (row["value"] for row in self.rows if (row["task"], row["metric"]) == (task, "bits_per_byte")), None
        )

    def lines(self) -> list[dict[str, Any]]:
        """Make the rows of eval.jsonl."""
        when = {"step": self.step, "tokens": self.tokens, "time_s": self.time_s}
        return [{**when, **row} for row in self.rows]

    def tracked(self) -> dict[str, Any]:
        """Make what W&B and TensorBoard are sent: tasks/TASK/METRIC of whole tasks."""
        own = {f"tasks/{row['task']}/{row['metric']}": row["value"] for row in self.rows if row["part_of"] is None}
        return {"step": self.step, "tokens": self.tokens, **own}


@dataclass(slots=True, kw_only=True)
class ValidationRecord:
    """Records the mean token loss on the validation split after ``step`` updates."""

    step: int = field(metadata=metric("", "Updates before the validation.", wandb="step"))
    tokens: int = field(metadata=metric("tokens", "Update tokens before it.", wandb="tokens"))
    time_s: float = field(metadata=metric("s", "Time before it, as of the step.", wandb="time_s", reproducible=False))
    loss: float = field(
        metadata=metric(
            "nats per token",
            "The headline: mean over `target`; over `domains` if that is empty.",
            wandb="validation/loss",
        )
    )
    target: dict[str, float] = field(
        default_factory=dict,
        metadata=metric(
            "nats per token",
            "Mean loss on each part of the target; see [the target](#the-target).",
            wandb="validation/target",
        ),
    )
    mean_loss: float | None = field(
        default=None,
        metadata=metric("nats per token", "The mean over `domains`.", wandb="validation/mean_loss"),
    )
    domains: dict[str, float] = field(
        metadata=metric("nats per token", "Mean loss on each domain.", wandb="validation/domain")
    )

    def __post_init__(self) -> None:
        """Work out ``mean_loss``, which rows of older versions lack."""
        if self.mean_loss is None and self.domains:
            self.mean_loss = sum(self.domains.values()) / len(self.domains)

    @property
    def held_out(self) -> dict[str, float]:
        """Return the loss of each part of a held-out target; none where the target is domains."""
        same = {name: repr(loss) for name, loss in self.domains.items()}  # not a number is equal to itself here
        return {name: loss for name, loss in self.target.items() if repr(loss) != same.get(name)}
