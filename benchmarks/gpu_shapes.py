"""Lists the models, layouts and batches that benchmarks/gpu.py measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.memory import LLAMA, LLAMA_70B, QWEN_06B
from megaopus.config.run_config import RunConfig
from megaopus.models.config import ModelConfig
from megaopus.selection.config import GuardConfig, PrescreenConfig, SelectionConfig, most_per_pass
from megaopus.selection.presets import read_preset

PRESET = "screened"
LLAMA_8B: dict[str, Any] = {
    **LLAMA,
    "num_layers": 32,
    "hidden_size": 4096,
    "num_heads": 32,
    "num_kv_heads": 8,
    "ffn_hidden_size": 14336,
    "tied": False,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model at a layout, with the batches of one step."""

    model: Mapping[str, Any]
    vocab_size: int
    seq_len: int
    micro: int
    micro_batches: int
    """Of a training step, on each data-parallel rank."""
    parallel: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    optimizer: str = "adamw"
    proxy_micro: int | None = None
    """Proxy sequences of a pass on each rank; None: as in training, where a run takes what is free."""
    eager: bool = False
    """Whether torch's own kernels run one after another, and gradients are summed over ranks once all are there."""
    deterministic: bool = False

    @property
    def layout(self) -> str:
        """The degrees above 1, in a few letters."""
        parallel = self.config().parallel
        dp = self.ranks // parallel.model_ranks
        degrees = {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "dp": dp}
        named = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
        marks = {"sp": parallel.sequence_parallel, "zero": parallel.distributed_optimizer}
        return " ".join([*named, *(mark for mark, on in marks.items() if on)]) or "1"

    def config(self) -> RunConfig:
        """The settings of a run of one such step, with the default selection."""
        config = RunConfig()
        config.model = ModelConfig(**self.model)
        config.optim.name = self.optimizer
        config.engine.device, config.engine.precision = "cuda", "bf16"
        config.engine.deterministic = self.deterministic
        if self.eager:
            config.engine.kernels = "eager"
            config.parallel.overlap_grad_reduce = config.parallel.overlap_param_gather = False
        for key, value in self.parallel.items():
            setattr(config.parallel, key, value)
        config.data.seq_len = self.seq_len
        dp = self.ranks // config.parallel.model_ranks
        config.train.micro_batch_size = self.micro
        config.train.global_batch_size = dp * self.micro * self.micro_batches
        config.selection = selection_of(PRESET)
        config.selection.proxy_micro_batch_size = self.proxy_micro or self.micro
        config.selection.score_micro_batch_size = most_per_pass(-(-config.num_scored() // dp), self.seq_len, "cuda")
        return config


def selection_of(preset: str) -> SelectionConfig:
    """The settings of a shipped recipe."""
    nested: Mapping[str, Any] = {"prescreen": PrescreenConfig, "guards": GuardConfig}
    settings = {key: nested[key](**value) if key in nested else value for key, value in read_preset(preset).items()}
    return SelectionConfig(**settings)


_GPT2 = {"num_layers": 12, "hidden_size": 768, "num_heads": 12}
_GPT2_MEDIUM = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16}
_GPT2_XL = {"num_layers": 48, "hidden_size": 1600, "num_heads": 25}
CASES: Mapping[str, Case] = {
    "gpt2_small": Case(model=_GPT2, vocab_size=50257, seq_len=1024, micro=16, micro_batches=2),
    "gpt2_medium": Case(model=_GPT2_MEDIUM, vocab_size=50257, seq_len=1024, micro=8, micro_batches=2),
    "gpt2_xl": Case(model=_GPT2_XL, vocab_size=50257, seq_len=1024, micro=4, micro_batches=2),
    "qwen3_0p6b": Case(model=QWEN_06B, vocab_size=151936, seq_len=4096, micro=2, micro_batches=2),
    "llama_8b": Case(
        model=LLAMA_8B,
        vocab_size=128256,
        seq_len=4096,
        micro=1,
        micro_batches=4,
        parallel={"tp": 8, "sequence_parallel": True},
        ranks=8,
    ),
    "llama_70b": Case(
        model=LLAMA_70B,
        vocab_size=128256,
        seq_len=4096,
        micro=1,
        micro_batches=8,  # a pipeline with fewer is idle for longer
        parallel={"tp": 8, "pp": 4, "cp": 2, "sequence_parallel": True, "distributed_optimizer": True},
        ranks=2048,
    ),
}
"""Name -> case; those of several ranks are measured on a GPU only by as many."""
