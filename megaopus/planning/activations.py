"""Counts what the graph of a forward pass keeps of each position, layer by layer. Torch is not imported.

Figures are bytes of one position (of one sequence) in one layer: those that tensor-parallel ranks split, and those that
each of them has whole. They follow from what each operation of megatron-core's unfused layers keeps for its derivative.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from megaopus.config.run_config import RunConfig
from megaopus.models.config import ModelConfig
from megaopus.models.flops import padded_vocab

WIDTH = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Bytes of a number of the model's precision; fp64: where the oracle scores."""


class Share(NamedTuple):
    """Bytes that tensor-parallel ranks split among them, and bytes that each has whole."""

    split: float
    whole: float = 0.0

    def plus(self, other: Share) -> Share:
        return Share(self.split + other.split, self.whole + other.whole)

    def times(self, factor: float) -> Share:
        return Share(factor * self.split, factor * self.whole)

    def over(self, ranks: int) -> float:
        """Bytes of one of ``ranks`` tensor-parallel ranks."""
        return self.split / ranks + self.whole


def kept_by_layer(config: RunConfig, precision: str, device: str, experts: bool = False) -> Share:
    """Bytes of a position that a layer keeps for its backward pass; ``experts``: it has some, each of an even load."""
    model, width = config.model, WIDTH[precision]
    hidden = model.hidden_size
    # both residual sums, and what the two norms make of them
    stream = 2.0 * width * hidden + 2 * _norm(model.norm, hidden, width, device)
    if model.dropout > 0:
        stream += 2 * hidden  # masks of one byte
    fused = is_fused(config, device)
    inside = _attention(config, width, device) + (
        _mixture(model, fused, width) if experts else _mlp(model, fused) * width
    )
    masks = Share(0, _masks(config, width))
    kept = Share(inside + stream) if config.parallel.sequence_parallel else Share(inside, stream)
    return kept.plus(masks)


def worked_on(config: RunConfig, precision: str, experts: bool = False) -> Share:
    """Bytes of a position that one layer's backward pass makes beyond what is kept: gradients inside its MLP.

    Of experts, whose passes follow each other, the gradients of what they were given and gave back.
    """
    model, width = config.model, WIDTH[precision]
    if experts:
        return Share(2.0 * width * model.experts_per_token * model.hidden_size, 2.0 * width * model.hidden_size)
    return Share(width * model.derived_ffn() * (2.0 if model.gated else 1.0), 2.0 * width * model.hidden_size)


def backward_of_layer(config: RunConfig, precision: str, device: str, experts: bool = False) -> Share:
    """Bytes of a position that a layer's backward pass takes at once: what was recomputed counts, if it is to be."""
    found = worked_on(config, precision, experts)
    return found.plus(kept_by_layer(config, precision, device, experts)) if config.engine.recompute else found


def without_graph(config: RunConfig, precision: str, device: str, experts: bool = False) -> Share:
    """Bytes of a position in one layer's forward pass that keeps nothing: its MLP and the stream beside it.

    Of experts: what they are given, what they gave back, and that put together.
    """
    model, width = config.model, WIDTH[precision]
    if experts:
        return Share(3.0 * width * model.experts_per_token * model.hidden_size, 3.0 * width * model.hidden_size)
    return Share(width * _mlp(model, is_fused(config, device)), 3.0 * width * model.hidden_size)


def is_fused(config: RunConfig, device: str) -> bool:
    """Say whether losses, rotary positions and SwiGLU take one kernel each, which keeps what it reads alone."""
    return config.engine.is_fused(device == "cpu")


def logit_bytes(tp: int, precision: str, *, backward: bool, fused: bool) -> int:
    """Bytes of one logit (of this rank's part of the vocabulary) when there are most.

    In one kernel: logits, and in a backward pass their gradient. Else, one rank: torch's log-softmax of fp32 logits and
    two gradients, or in a forward pass logits and log-softmax; beside fp32 ones the 16-bit logits until the graph is
    left. More: megatron's works in place on fp32 logits.
    """
    if fused:
        return WIDTH[precision] * (2 if backward else 1)
    if precision == "fp64":
        return 16  # fp64 ones, the same in fp32, their log-softmax, and its gradient
    half = 0 if precision == "fp32" else 2
    if tp > 1:
        return 4 + half
    return 12 if backward else 8 + half


def logits(
    config: RunConfig, vocab_size: int, precision: str, device: str, positions: int, *, backward: bool
) -> tuple[int, int]:
    """(bytes of the logits of ``positions`` positions, or of the gradient of the output layer if that is more; each)"""
    tp, width = config.parallel.tp, WIDTH[precision]
    vocab = padded_vocab(vocab_size) // tp
    each = logit_bytes(tp, precision, backward=backward, fused=is_fused(config, device))
    found = positions * vocab * each
    if backward:  # the gradients of logits and of the matrix behind them, once the softmax has gone
        found = max(found, width * vocab * (positions + config.model.hidden_size))
    return found, each


def _norm(kind: str, size: int, width: int, device: str) -> float:
    """Bytes that a norm of ``size`` numbers keeps beside its input: its output and, in fp32, statistics.

    torch's RMSNorm is one operation on CUDA (since 2.9) and several on the CPU, each of which keeps its own input.
    """
    if kind == "layernorm":
        return width * size + 8
    return _rms_inside(size, width, device) + width * size


def _rms_inside(size: int, width: int, device: str) -> float:
    if device == "cuda":
        return 4
    return 4 + (4 * size if width == 4 else 8 * size)


def _masks(config: RunConfig, width: int) -> float:
    """Bytes of a position of what it sees of the others: of documents one mask for all layers, of a window one each."""
    model, seq_len = config.model, config.data.seq_len
    each = width * seq_len
    windowed = model.window is not None and model.window < seq_len
    return each * windowed + each / model.num_layers * config.data.document_mask


def _attention(config: RunConfig, width: int, device: str) -> float:
    """Bytes of a position between the norm before attention and the projection after it."""
    model = config.model
    heads, groups, size = model.num_heads, model.derived_kv_heads(), model.derived_head_dim()
    query, key_value = heads * size, groups * size
    rope, shared = model.position == "rope", groups != heads
    total = 4.0 * heads + width * query  # log-sum-exp and output
    if model.qk_norm:
        norms = _rms_inside(size, width, device) * (heads + groups)
        total += norms + (width * query if shared else 0)  # a copy of shared queries in order of heads
    if device == "cpu":  # copies of q, k, v with positions side by side, and of the output in the other order
        total += width * (query + 2 * key_value) + width * query
        if model.qk_norm:
            total += width * (query + 2 * key_value)  # the norms keep the layer's output
    else:
        total += width * (query + 2 * key_value)
        if rope or model.qk_norm:
            total += width * (query + key_value)  # turned or normalised
        elif shared:
            total += width * query
    if shared and (config.data.document_mask or model.window is not None):
        total += 2 * width * (query - key_value)  # no kernel takes a mask and shared keys and values
    if rope and not is_fused(config, device):
        # cosines and sines of each layer's positions, for queries and keys, shared by the sequences
        total += 4 * width * size / config.train.micro_batch_size
    return total


def _mixture(model: ModelConfig, fused: bool, width: int) -> float:
    """Bytes of a position in a mixture of experts: a copy for each that it is given to, and what they keep of it.

    Unfused an expert's product is kept before and after it is weighed. Scores, choices and masks of the router:
    measured (saved tensors of a layer at several sizes, on a CPU).
    """
    assert model.num_experts is not None
    ffn, fused_here = model.derived_expert_ffn(), fused and model.activation == "swiglu"
    inside = ffn * ((3.0 if fused_here else 6.0) if model.gated else 3.0)
    shared = replace(model, ffn_hidden_size=model.shared_expert_ffn_hidden_size or 0)
    router = 9.0 * model.num_experts + 32.0 * model.experts_per_token
    return width * (model.experts_per_token * (model.hidden_size + inside) + _mlp(shared, fused)) + router


def _mlp(model: ModelConfig, fused: bool) -> float:
    """Numbers: GELU's input and output; SwiGLU's gate and up and, not fused, its silu and a copy of up; the product."""
    if not model.gated:
        return 2.0 * model.derived_ffn()
    return model.derived_ffn() * (3.0 if fused and model.activation == "swiglu" else 5.0)
