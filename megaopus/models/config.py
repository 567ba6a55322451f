"""Shape of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from megaopus.settings import FIXED, HARMLESS, setting

POSITIONS = ("learned", "rope", "none")
NORMS = ("layernorm", "rmsnorm", "rmsnorm_plus_1")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "geglu_tanh")
ROUTER_SCORES = ("softmax", "sigmoid")
BALANCED_OVER = ("sequence", "micro_batch")
OF_EXPERTS = (
    *("num_experts", "experts_per_token", "expert_ffn_hidden_size", "shared_expert_ffn_hidden_size"),
    *("first_dense_layers", "expert_capacity", "router"),
)
"""Settings of a model that mean nothing without experts."""
_SHAPE = "see configs/model/"
_DERIVED = "null derives it"


@dataclass(slots=True, kw_only=True)
class RopeScaling:
    """Slows rotary frequencies down for longer texts: all of them, or Llama 3.1's slow ones."""

    factor: float | None = setting(
        None, min=1, doc="What rotary frequencies are divided by; null: nothing. Alone, all of them (linear scaling)."
    )
    low_freq_factor: float | None = setting(
        None,
        above=0,
        doc="Llama 3.1: frequencies with fewer turns than this in `original_max_positions` are divided by `factor`.",
    )
    high_freq_factor: float | None = setting(
        None, above=0, doc="Llama 3.1: those with more turns than this stay as they are; between them it is blended."
    )
    original_max_positions: int | None = setting(
        None, min=1, doc="Llama 3.1: the length that the model was trained with at first."
    )

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for settings that do not go together."""
        others = {
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_positions": self.original_max_positions,
        }
        given = [name for name, value in others.items() if value is not None]
        if given and (self.factor is None or len(given) < len(others)):
            key = next((name for name, value in {"factor": self.factor, **others}.items() if value is None), given[0])
            yield key, f"missing, with {', '.join(given)} set", "set all four (Llama 3.1), or factor alone (linear)"
        elif self.low_freq_factor is not None and self.low_freq_factor >= (self.high_freq_factor or 0):
            yield "low_freq_factor", "is not below high_freq_factor", "Llama 3.1 has 1 and 4"


@dataclass(slots=True, kw_only=True)
class RouterConfig:
    """Sends each token to the experts that score highest, and keeps their loads alike."""

    scores: str = setting(
        "softmax",
        choices=ROUTER_SCORES,
        doc="Of experts for a token: softmax over them (Switch, Mixtral, Qwen), or each its sigmoid (DeepSeek-V3).",
    )
    normalized: bool = setting(
        True, doc="The weights of a token's experts add up to 1 (Mixtral, Qwen3); false: they are softmax scores."
    )
    scale: float | None = setting(
        None, above=0, doc="What those weights are multiplied by (DeepSeek-V3: 2.5); null: nothing."
    )
    balance_loss: float = setting(
        0.01, min=0, doc="Weight of the auxiliary loss that keeps loads alike (Switch, arXiv 2101.03961); 0: none."
    )
    balance_over: str = setting(
        "sequence",
        choices=BALANCED_OVER,
        doc="Loads are compared within each sequence, the same at every layout, or each micro-batch of a rank.",
    )
    z_loss: float = setting(
        0.0, min=0, doc="Weight of the mean square of the log-sum-exp of scores (ST-MoE, arXiv 2202.08906); 0: none."
    )
    bias_rate: float | None = setting(
        None,
        above=0,
        doc="sigmoid: a bias of each expert, by which it is chosen, moves so much an update towards even loads"
        " (arXiv 2408.15664; DeepSeek-V3: 0.001); null: no biases.",
    )

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for settings that do not go together."""
        if self.scores == "sigmoid" and not self.normalized:
            yield "normalized", "sigmoid scores are always divided by their sum", "set it to true"
        if self.bias_rate is not None and self.scores != "sigmoid":
            yield "bias_rate", f"scores are by {self.scores}", "set model.router.scores=sigmoid"


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """A GPT: GPT-2 style by default, Llama/Qwen3 style through its options."""

    RESUME: ClassVar[str] = FIXED

    hf: str | None = setting(
        None,
        resume=HARMLESS,
        schemes=(),
        check=lambda value: None if value else "names no folder",
        doc="A Hugging Face model folder, of whose config.json all below are taken but `dropout` and `init_std`; its"
        " weights are those of `init.path`.",
        hint="model=hf model.hf=FOLDER takes the shape of FOLDER/config.json",
    )
    num_layers: int = setting(4, min=1, doc="Transformer blocks.", hint=_SHAPE)
    hidden_size: int = setting(128, min=1, doc="Width of the residual stream.", hint=_SHAPE)
    num_heads: int = setting(4, min=1, doc="Attention heads of a block.", hint=_SHAPE)
    num_kv_heads: int | None = setting(
        None, min=1, doc="Key/value heads (grouped-query attention); null: as many as `num_heads`.", hint=_DERIVED
    )
    head_dim: int | None = setting(
        None,
        min=1,
        doc="Width of one head; null: hidden_size / num_heads (Qwen3-0.6B has 128 where that gives 64).",
        hint=_DERIVED,
    )
    ffn_hidden_size: int | None = setting(
        None,
        min=1,
        doc="Width of the MLP; null: 4 x hidden, or 8/3 x hidden rounded up to a multiple of 64 where it is gated.",
        hint=_DERIVED,
    )
    vocab_size: int | None = setting(
        None,
        min=1,
        doc="Token ids that the model knows; given, it wins over the tokenizer's count (null), which is the least."
        " Its tables have rows up to a multiple of 128, of which those beyond count nowhere.",
        hint=_DERIVED,
    )
    max_positions: int | None = setting(
        None, min=1, doc="Length of the learned position table; null: data.seq_len.", hint=_DERIVED
    )
    position: str = setting("learned", choices=POSITIONS, doc="How a block knows positions: a table, rotary, or not.")
    rope_base: int = setting(10000, above=0, doc="Base of the rotary frequencies.")
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    window: int | None = setting(
        None,
        min=1,
        doc="A position sees itself and those before it, this many in all (Mistral's sliding window); null: all.",
    )
    norm: str = setting(
        "layernorm",
        choices=NORMS,
        doc="Normalisation before attention and MLP; rmsnorm_plus_1 multiplies by 1 + weight (Gemma).",
    )
    norm_epsilon: float = setting(1e-5, above=0, doc="Added to the variance that normalisation divides by.")
    qk_norm: bool = setting(False, doc="RMSNorm on queries and keys (Qwen3).")
    activation: str = setting("gelu", choices=ACTIVATIONS, doc="Nonlinearity of the MLP.")
    bias: bool = setting(True, doc="Linear layers and layer norms have biases.")
    qkv_bias: bool | None = setting(
        None, doc="Queries, keys and values have biases (Qwen2: they alone); null: as `bias`.", hint=_DERIVED
    )
    embedding_scale: float | None = setting(
        None, above=0, doc="What token embeddings are multiplied by (Gemma: the root of hidden_size); null: nothing."
    )
    tied: bool = setting(True, doc="Input embedding and output layer share one matrix.")
    num_experts: int | None = setting(
        None, min=2, doc="MLPs of a block of which each token uses some (a mixture of experts); null: one MLP."
    )
    experts_per_token: int = setting(2, min=1, doc="How many of them.")
    expert_ffn_hidden_size: int | None = setting(
        None, min=1, doc="Width of an expert; null: that of the MLP.", hint=_DERIVED
    )
    shared_expert_ffn_hidden_size: int | None = setting(
        None, min=1, doc="Width of an MLP that every token uses beside its experts (DeepSeek); null: none."
    )
    first_dense_layers: int = setting(0, min=0, doc="The first so many blocks have one MLP and no experts (DeepSeek).")
    expert_capacity: float | None = setting(
        None,
        above=0,
        doc="Tokens that an expert takes of a micro-batch, at most, over the even share; the others are dropped, the"
        " least sure ones first (GShard), so that a sequence's loss depends on those beside it; null: it takes all.",
    )
    router: RouterConfig = field(default_factory=RouterConfig)
    dropout: float = setting(
        0.0, min=0, below=1, doc="Share of activations dropped while training.", hint="0 is usual for pre-training"
    )
    init_std: float = setting(
        0.02, above=0, doc="Standard deviation of the initial weights.", hint="0.02 is GPT-2's value"
    )

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint's model must share with this one: every setting that has a say.

        Checkpoints that were written before there were experts say nothing of them.
        """
        left_out = {"hf"} if self.num_experts is not None else {"hf", *OF_EXPERTS}
        return {key: value for key, value in asdict(self).items() if key not in left_out}

    @property
    def gated(self) -> bool:
        """Return whether the MLP multiplies its activation by a second product of the input."""
        return self.activation in ("swiglu", "geglu_tanh")

    def derived_qkv_bias(self) -> bool:
        """Return whether queries, keys and values have biases, after the default is applied."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    def derived_vocab_size(self, of_tokenizer: int) -> int:
        """Token ids before padding: as set, or the tokenizer's."""
        return self.vocab_size or of_tokenizer

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
        if self.gated:
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    def derived_expert_ffn(self) -> int:
        """Width of an expert after the default is applied."""
        return self.derived_ffn() if self.expert_ffn_hidden_size is None else self.expert_ffn_hidden_size

    def has_experts(self, layer: int) -> bool:
        """Return whether block ``layer``, counted from 0, has experts."""
        return self.num_experts is not None and layer >= self.first_dense_layers

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for settings that do not go together."""
        yield from self._conflicts_of_experts()
        if self.num_heads < 1 or (self.num_kv_heads or 1) < 1:
            return
        if self.head_dim is None and self.hidden_size % self.num_heads:
            reason = f"does not divide hidden_size = {self.hidden_size}"
            yield "num_heads", reason, "choose a divisor of hidden_size, or set model.head_dim"
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"does not divide num_heads = {self.num_heads}", "choose a divisor of num_heads"
        if self.position == "rope" and self.derived_head_dim() % 2:
            yield "num_heads", "rotary positions need an even head size", "change num_heads or hidden_size"
        if self.rope_scaling.factor is not None and self.position != "rope":
            yield "rope_scaling.factor", f"position is {self.position}", "set model.position=rope, or leave it out"
        if self.embedding_scale is not None and self.position == "learned":
            yield "embedding_scale", "position is learned, whose table is not scaled", "set model.position=rope"
        if self.bias and self.qkv_bias is False:
            yield "qkv_bias", "other linear layers have biases", "model.bias=false with qkv_bias=true is Qwen2's form"

    def _conflicts_of_experts(self) -> Iterator[tuple[str, str, str]]:
        if self.num_experts is None:
            return
        if self.experts_per_token > self.num_experts:
            yield "experts_per_token", f"is above num_experts = {self.num_experts}", "choose fewer"
        if self.experts_per_token == 1 and self.router.normalized and self.router.scores == "softmax":
            reason = "is 1 with router.normalized: the one weight is always 1, and the router learns nothing"
            yield "experts_per_token", reason, "set model.router.normalized=false"
        if self.bias:
            yield "bias", "is true, and experts have no biases", "set model.bias=false"
        if self.first_dense_layers >= self.num_layers:
            yield "first_dense_layers", "leaves no block with experts", f"choose fewer than {self.num_layers}"
