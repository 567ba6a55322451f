"""A plain PyTorch GPT-2 with no framework around it: the yardstick for throughput, and a check on the engine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        # Rows of the qkv matrix lie as megatron's do: head by head, each with its q, k and v.
        qkv = self.qkv(self.norm1(x)).view(batch, length, self.heads, 3, hidden // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ReferenceGPT(nn.Module):
    """GPT-2: learned positions, LayerNorm, GELU, biases, tied head. ``forward``: (B, S + 1) tokens -> (B, S) losses."""

    def __init__(self, layers: int, hidden: int, heads: int, vocab: int, positions: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
        return losses.view(labels.shape)

    @torch.no_grad()
    def copy_weights(self, megatron: Iterable[tuple[str, Tensor]]) -> None:
        """Take the named weights of a megatron GPTModel of the same shape (tp = pp = 1)."""
        source = dict(megatron)
        names = {
            "norm1": "input_layernorm",
            "qkv": "self_attention.linear_qkv",
            "proj": "self_attention.linear_proj",
            "norm2": "pre_mlp_layernorm",
            "fc1": "mlp.linear_fc1",
            "fc2": "mlp.linear_fc2",
        }
        for name, parameter in self.named_parameters():
            first, rest = name.split(".", 1)
            if first == "blocks":
                layer, module, kind = rest.split(".")
                key = f"decoder.layers.{layer}.{names[module]}.{kind}"
            elif first == "norm":
                key = f"decoder.final_layernorm.{rest}"
            else:
                key = {"tokens": "embedding.word_embeddings", "positions": "embedding.position_embeddings"}[first]
                key = f"{key}.{rest}"
            parameter.copy_(source[key][: len(parameter)])  # a vocabulary is padded there
