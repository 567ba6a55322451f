"""Parameters and FLOPs of a model from its settings alone: nothing is built, torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass

from megaopus.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter tensor: how many numbers, and whether tensor parallelism splits it."""

    name: str
    numel: int
    sharded: bool
    matrix: bool = False
    """A matrix that every token is multiplied with."""
    columns: int = 0
    """Of any matrix, embeddings included; 0: a vector."""


VOCAB_MULTIPLE = 128
"""The embedding has a multiple of this many rows at every layout, so that a model is the same at every tp."""


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to a multiple of VOCAB_MULTIPLE."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _linear(name: str, rows: int, columns: int, *, bias: bool, column_parallel: bool) -> list[Weight]:
    """A (rows x columns) matrix and its bias; a row-parallel layer keeps its whole bias on every rank."""
    weights = [Weight(f"{name}.weight", rows * columns, sharded=True, matrix=True, columns=columns)]
    return [*weights, Weight(f"{name}.bias", rows, sharded=column_parallel)] if bias else weights


def _norm(name: str, model: ModelConfig) -> Weight:
    return Weight(name, model.hidden_size * (2 if model.norm == "layernorm" else 1), sharded=False)


def layer_weights(model: ModelConfig) -> list[Weight]:
    """The parameters of one transformer layer, in order of use."""
    hidden, ffn = model.hidden_size, model.derived_ffn()
    query, key_value = model.num_heads * model.derived_head_dim(), model.derived_kv_heads() * model.derived_head_dim()
    gate = 2 if model.gated else 1
    qk_norm = [Weight("qk_norm", 2 * model.derived_head_dim(), sharded=False)] if model.qk_norm else []
    return [
        _norm("input_norm", model),
        *_linear("qkv", query + 2 * key_value, hidden, bias=model.derived_qkv_bias(), column_parallel=True),
        *qk_norm,
        *_linear("proj", hidden, query, bias=model.bias, column_parallel=False),
        _norm("pre_mlp_norm", model),
        *_linear("fc1", gate * ffn, hidden, bias=model.bias, column_parallel=True),
        *_linear("fc2", hidden, ffn, bias=model.bias, column_parallel=False),
    ]


def stage_weights(model: ModelConfig, vocab_size: int, seq_len: int, *, pp: int = 1, stage: int = 0) -> list[Weight]:
    """The parameters of pipeline stage ``stage`` of ``pp``, before tensor parallelism splits them.

    The first stage has the embeddings, the last the final norm and the output layer. A tied output layer shares the
    embedding on one stage and is a copy of it where the two lie on different stages.
    """
    hidden, first, last = model.hidden_size, stage == 0, stage == pp - 1
    table = padded_vocab(vocab_size) * hidden
    weights = [weight for _ in range(model.num_layers // pp) for weight in layer_weights(model)]
    if first:
        weights.append(Weight("word_embeddings", table, sharded=True, columns=hidden))
        if model.position == "learned":
            positions = (model.max_positions or seq_len) * hidden
            weights.append(Weight("position_embeddings", positions, sharded=False, columns=hidden))
    if last:
        weights.append(_norm("final_norm", model))
        if not (model.tied and first):
            weights.append(Weight("output_layer", table, sharded=True, columns=hidden))
    return weights


def count_parameters(model: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """Trainable parameters of the whole model.

    ``vocab_size`` is padded here (a size already padded stays as it is); ``seq_len`` is the length
    of the learned position table where ``model.max_positions`` is null.
    """
    return sum(weight.numel for weight in stage_weights(model, vocab_size, seq_len))


def count_rank_parameters(model: ModelConfig, vocab_size: int, seq_len: int, *, tp: int, pp: int, stage: int) -> int:
    """Parameters held by one rank of pipeline stage ``stage`` under ``tp``-way tensor parallelism."""
    weights = stage_weights(model, vocab_size, seq_len, pp=pp, stage=stage)
    return sum(weight.numel // tp if weight.sharded else weight.numel for weight in weights)


def training_flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """FLOPs of forward and backward for one token of a sequence of ``seq_len``.

    6 per matrix parameter (2 forward, 4 backward; the output layer counts, the embedding look-up does not) plus
    12 x layers x heads x head_dim x seq_len for attention, the causal half not deducted (PaLM, arXiv 2204.02311,
    appendix B). Norms, activations and softmax are left out.
    """
    matrices = sum(weight.numel for weight in layer_weights(model) if weight.matrix) * model.num_layers
    matrices += padded_vocab(vocab_size) * model.hidden_size
    attention = 12 * model.num_layers * model.num_heads * model.derived_head_dim() * seq_len
    return 6 * matrices + attention
