"""Shape of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

POSITIONS = ("learned", "rope", "none")
NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "swiglu")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """A GPT: GPT-2 style by default, Llama/Qwen3 style through its options."""

    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); null: as many as ``num_heads``."""
    head_dim: int | None = None
    """Width of one head; null: hidden_size / num_heads (Qwen3-0.6B has 128 where that gives 64)."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null: 4 x hidden (GELU) or 8/3 x hidden rounded up to a multiple of 64 (SwiGLU)."""
    vocab_size: int | None = None
    """Null: the tokenizer's size. Padded up to a multiple of 128 (``arithmetic.padded_vocab``)."""
    max_positions: int | None = None
    """Length of the learned position table; null: data.seq_len."""
    position: str = "learned"
    rope_base: int = 10000
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    """RMSNorm on queries and keys (Qwen3)."""
    activation: str = "gelu"
    bias: bool = True
    tied: bool = True
    """Input embedding and output layer share one matrix."""
    dropout: float = 0.0
    init_std: float = 0.02

    def derived_head_dim(self) -> int:
        """Width of one attention head after the default is applied."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    def derived_kv_heads(self) -> int:
        """Key/value heads after the default is applied."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    def derived_ffn(self) -> int:
        """Width of the MLP after the default is applied."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        for key in ("num_layers", "hidden_size", "num_heads"):
            if getattr(self, key) < 1:
                yield key, "must be at least 1", "see configs/model/"
                return
        for key in ("head_dim", "ffn_hidden_size", "vocab_size", "max_positions"):
            if (size := getattr(self, key)) is not None and size < 1:
                yield key, "must be at least 1", "null derives it"
        if self.head_dim is None and self.hidden_size % self.num_heads:
            reason = f"does not divide hidden_size = {self.hidden_size}"
            yield "num_heads", reason, "choose a divisor of hidden_size, or set model.head_dim"
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            yield "num_kv_heads", f"does not divide num_heads = {self.num_heads}", "choose a divisor of num_heads"
        if self.position not in POSITIONS:
            yield "position", "unknown choice", f"use one of: {', '.join(POSITIONS)}"
        if self.position == "rope" and self.derived_head_dim() % 2:
            yield "num_heads", "rotary positions need an even head size", "change num_heads or hidden_size"
        if self.norm not in NORMS:
            yield "norm", "unknown choice", f"use one of: {', '.join(NORMS)}"
        if self.activation not in ACTIVATIONS:
            yield "activation", "unknown choice", f"use one of: {', '.join(ACTIVATIONS)}"
        if not 0 <= self.dropout < 1:
            yield "dropout", "must lie in [0, 1)", "0 is usual for pre-training"
        for key in ("rope_base", "norm_epsilon"):
            if not getattr(self, key) > 0:
                yield key, "must be positive", "rope_base = 10000 and norm_epsilon = 1e-5 are usual"
        if not self.init_std > 0:
            yield "init_std", "must be positive", "0.02 is GPT-2's value"
