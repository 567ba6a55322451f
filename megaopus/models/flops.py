"""Parameters and FLOPs of a model from its settings alone: nothing is built, torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    expert: bool = False
    """Of one of the experts: it is spread over other ranks than the rest, and some tokens alone are multiplied."""

    def parts(self, tp: int, expert_tp: int) -> int:
        """Into how many parts tensor parallelism splits it."""
        return (expert_tp if self.expert else tp) if self.sharded else 1


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


def layer_weights(model: ModelConfig, layer: int = 0, *, ep: int = 1) -> list[Weight]:
    """The parameters of transformer layer ``layer``, in order of use; of its experts those of one of ``ep`` ranks."""
    hidden = model.hidden_size
    query, key_value = model.num_heads * model.derived_head_dim(), model.derived_kv_heads() * model.derived_head_dim()
    qk_norm = [Weight("qk_norm", 2 * model.derived_head_dim(), sharded=False)] if model.qk_norm else []
    weights = [
        _norm("input_norm", model),
        *_linear("qkv", query + 2 * key_value, hidden, bias=model.derived_qkv_bias(), column_parallel=True),
        *qk_norm,
        *_linear("proj", hidden, query, bias=model.bias, column_parallel=False),
        _norm("pre_mlp_norm", model),
    ]
    if not model.has_experts(layer):
        return [*weights, *_mlp("", model, model.derived_ffn())]
    assert model.num_experts is not None
    weights.append(Weight("router", model.num_experts * hidden, sharded=False, matrix=True, columns=hidden))
    of_expert = [replace(weight, expert=True) for weight in _mlp("expert_", model, model.derived_expert_ffn())]
    weights += of_expert * (model.num_experts // ep)
    if model.shared_expert_ffn_hidden_size is not None:
        weights += _mlp("shared_", model, model.shared_expert_ffn_hidden_size)
    return weights


def _mlp(prefix: str, model: ModelConfig, ffn: int) -> list[Weight]:
    gate, hidden = 2 if model.gated else 1, model.hidden_size
    return [
        *_linear(f"{prefix}fc1", gate * ffn, hidden, bias=model.bias, column_parallel=True),
        *_linear(f"{prefix}fc2", hidden, ffn, bias=model.bias, column_parallel=False),
    ]


def layers_of(model: ModelConfig, pp: int = 1, stage: int = 0, vpp: int = 1) -> list[int]:
    """Number the layers of pipeline stage ``stage`` of ``pp``, from 0; ``vpp``: runs of them that a stage has."""
    run = model.num_layers // (pp * vpp)
    firsts = [(chunk * pp + stage) * run for chunk in range(vpp)]
    return [layer for first in firsts for layer in range(first, first + run)]


def stage_weights(
    model: ModelConfig, vocab_size: int, seq_len: int, *, pp: int = 1, stage: int = 0, vpp: int = 1, ep: int = 1
) -> list[Weight]:
    """The parameters of pipeline stage ``stage`` of ``pp``, before tensor parallelism splits them.

    ``vpp``: as in ``layers_of``. Of experts those of one of ``ep`` expert-parallel ranks.

    The first stage has the embeddings, the last the final norm and the output layer. A tied output layer shares the
    embedding on one stage and is a copy of it where the two lie on different stages.
    """
    hidden, first, last = model.hidden_size, stage == 0, stage == pp - 1
    table = padded_vocab(vocab_size) * hidden
    layers = layers_of(model, pp, stage, vpp)
    kinds = {model.has_experts(layer): layer for layer in layers}
    of_kind = {experts: layer_weights(model, layer, ep=ep) for experts, layer in kinds.items()}
    weights = [weight for layer in layers for weight in of_kind[model.has_experts(layer)]]
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


def count_active_parameters(model: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """Parameters that a token uses: of experts those of ``model.experts_per_token``, of all others all."""
    return _active(stage_weights(model, vocab_size, seq_len), model)


def _active(weights: list[Weight], model: ModelConfig) -> int:
    """Numbers of whole layers' weights that a token uses."""
    of_experts = sum(weight.numel for weight in weights if weight.expert)
    used = of_experts * model.experts_per_token // (model.num_experts or 1)
    return sum(weight.numel for weight in weights if not weight.expert) + used


def count_rank_parameters(
    model: ModelConfig, vocab_size: int, seq_len: int, *, tp: int, pp: int, stage: int, ep: int = 1, expert_tp: int = 1
) -> int:
    """Parameters held by one rank of pipeline stage ``stage``, where ``tp`` (of experts: ``expert_tp``) ranks share."""
    weights = stage_weights(model, vocab_size, seq_len, pp=pp, stage=stage, ep=ep)
    return sum(weight.numel // weight.parts(tp, expert_tp) for weight in weights)


def training_flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """FLOPs of forward and backward for one token of a sequence of ``seq_len``.

    6 per matrix parameter that a token uses (2 forward, 4 backward; the output layer counts, the embedding look-up
    does not) plus 12 x layers x heads x head_dim x seq_len for attention, the causal half not deducted (PaLM, arXiv
    2204.02311, appendix B). Norms, activations and softmax are left out.
    """
    blocks = [weight for layer in range(model.num_layers) for weight in layer_weights(model, layer) if weight.matrix]
    matrices = padded_vocab(vocab_size) * model.hidden_size + _active(blocks, model)
    attention = 12 * model.num_layers * model.num_heads * model.derived_head_dim() * seq_len
    return 6 * matrices + attention
