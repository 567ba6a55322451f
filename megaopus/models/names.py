"""Names every weight of a model, with its shape, from the settings alone."""

from __future__ import annotations

from collections.abc import Iterator

from megaopus.models.config import ModelConfig
from megaopus.models.flops import padded_vocab

EXPERT = "experts.local_experts."
"""Before an expert's number in the names of its weights, as megatron has it."""
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def whole_shapes(model: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, tuple[int, ...]]:
    """Name in the whole model -> shape of the whole weight.

    ``vocab_size`` is the true one, which is padded here; ``seq_len`` is the length of the learned position table where
    ``model.max_positions`` is null.
    """
    hidden, table = model.hidden_size, padded_vocab(vocab_size)
    found: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (table, hidden)}
    if model.position == "learned":
        found["embedding.position_embeddings.weight"] = (model.max_positions or seq_len, hidden)
    for layer in range(model.num_layers):
        found |= {f"decoder.layers.{layer}.{name}": shape for name, shape in _layer(model, layer)}
    found |= dict(_norm("decoder.final_layernorm", model))
    if not model.tied:
        found["output_layer.weight"] = (table, hidden)
    return found


def _layer(model: ModelConfig, layer: int) -> Shapes:
    hidden, size = model.hidden_size, model.derived_head_dim()
    query, key_value = model.num_heads * size, model.derived_kv_heads() * size
    yield from _norm("input_layernorm", model)
    yield from _linear("self_attention.linear_qkv", query + 2 * key_value, hidden, model.derived_qkv_bias())
    yield from _linear("self_attention.linear_proj", hidden, query, model.bias)
    if model.qk_norm:
        for name in ("q", "k"):
            yield from _norm(f"self_attention.{name}_layernorm", model, size)
    yield from _norm("pre_mlp_layernorm", model)
    if not model.has_experts(layer):
        yield from _mlp("mlp", model, model.derived_ffn())
        return
    assert model.num_experts is not None
    yield "mlp.router.weight", (model.num_experts, hidden)
    if model.router.bias_rate is not None:
        yield "mlp.router.expert_bias", (model.num_experts,)  # no gradient moves it
    for number in range(model.num_experts):
        yield from _mlp(f"mlp.{EXPERT}{number}", model, model.derived_expert_ffn())
    if model.shared_expert_ffn_hidden_size is not None:
        yield from _mlp("mlp.shared_experts", model, model.shared_expert_ffn_hidden_size)


def _mlp(name: str, model: ModelConfig, ffn: int) -> Shapes:
    yield from _linear(f"{name}.linear_fc1", ffn * (2 if model.gated else 1), model.hidden_size, model.bias)
    yield from _linear(f"{name}.linear_fc2", model.hidden_size, ffn, model.bias)


def _norm(name: str, model: ModelConfig, size: int | None = None) -> Shapes:
    yield f"{name}.weight", (size or model.hidden_size,)
    if model.norm == "layernorm":
        yield f"{name}.bias", (size or model.hidden_size,)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
