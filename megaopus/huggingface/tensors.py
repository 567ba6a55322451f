"""Says which Hugging Face tensors each of our parameters is made of, and takes a rank's own part of them.

Ours are megatron's: queries, keys and values of a group lie side by side in one matrix, gate and up in another, and
embeddings have rows up to a multiple of 128, of which those beyond the vocabulary are zero here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaopus.errors import ModelError
from megaopus.models.config import ModelConfig
from megaopus.models.flops import padded_vocab
from megaopus.models.names import EXPERT

Read = Callable[[str, tuple[slice, ...]], Tensor]
"""(name, slice of each dimension) -> that part of a source tensor, on the CPU."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A source tensor, or some of its rows, as rows of one of our parameters."""

    name: str
    rows: int
    columns: int | None
    """None: a vector."""
    first: int = 0
    """Of its rows, as we count them, in the source."""
    source_rows: int | None = None
    """Of the whole source tensor; None: ``rows``."""
    transposed: bool = False
    """The source has our columns as its rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the source tensor."""
        rows = self.rows if self.source_rows is None else self.source_rows
        if self.columns is None:
            return (rows,)
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def read(self, read: Read, rows: slice, columns: slice) -> Tensor:
        """Rows and columns of it, as we count them."""
        own = slice(self.first + rows.start, self.first + rows.stop)
        if self.columns is None:
            return read(self.name, (own,))
        return read(self.name, (columns, own)).t() if self.transposed else read(self.name, (own, columns))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Says how one of our parameters is put together."""

    pieces: tuple[Piece, ...]
    groups: int = 0
    """Above 0: the rows of the pieces (queries, keys, values) lie by group, those of a group together."""
    padded_rows: int = 0
    """Rows of zeros after them."""

    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        rows = sum(piece.rows for piece in self.pieces) + self.padded_rows
        columns = self.pieces[0].columns
        return (rows,) if columns is None else (rows, columns)

    def part(self, read: Read, rank: int = 0, size: int = 1, dim: int | None = None) -> Tensor:
        """Tensor-parallel rank ``rank`` of ``size``'s part where the parameter is split along ``dim``; None: all."""
        count = self.pieces[0].columns
        columns = slice(0, count or 0)
        if dim == 1:
            assert count is not None
            columns = _share(count, rank, size)
        if dim != 0:
            rank, size = 0, 1
        if self.padded_rows:
            return self._padded(read, columns, rank, size)
        parts = [piece.read(read, _share(piece.rows, rank, size), columns) for piece in self.pieces]
        if self.groups:
            parts = [part.unflatten(0, (self.groups // size, -1)) for part in parts]
            return torch.cat(parts, 1).flatten(0, 1)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _padded(self, read: Read, columns: slice, rank: int, size: int) -> Tensor:
        (piece,) = self.pieces
        rows = _share(piece.rows + self.padded_rows, rank, size)
        there = slice(min(rows.start, piece.rows), min(rows.stop, piece.rows))
        found = piece.read(read, there, columns)
        return torch.cat([found, found.new_zeros(rows.stop - rows.start - len(found), *found.shape[1:])])

    def sources(self, whole: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(source name, its first row as we count them, tensor in our orientation) of a whole parameter."""
        if self.groups:
            by_group = whole.unflatten(0, (self.groups, -1))
            sizes = [piece.rows // self.groups for piece in self.pieces]
            parts = [part.flatten(0, 1) for part in by_group.split(sizes, 1)]
        else:
            sizes = [piece.rows for piece in self.pieces]
            parts = list(whole[: sum(sizes)].split(sizes))
        for piece, part in zip(self.pieces, parts, strict=True):
            yield piece.name, piece.first, part


def _share(count: int, rank: int, size: int) -> slice:
    return slice(count * rank // size, count * (rank + 1) // size)


def recipes(model: ModelConfig, vocab_size: int, *, fused: bool = False, experts: str = "mlp") -> dict[str, Recipe]:
    """Our parameter's name in the whole model -> how it is made of Hugging Face's tensors.

    ``vocab_size``: rows of the source's embedding. ``fused``: GPT-2's names and forms, else Llama's. ``experts``: as in
    ``families.Family``.
    """
    return (_Gpt2(model, vocab_size) if fused else _Llama(model, vocab_size, experts)).all()


@dataclass(frozen=True, slots=True)
class _Names(ABC):
    """Holds what both forms share."""

    model: ModelConfig
    vocab_size: int

    def all(self) -> dict[str, Recipe]:
        found: dict[str, Recipe] = dict(self.outside())
        for layer in range(self.model.num_layers):
            found |= {f"decoder.layers.{layer}.{name}": recipe for name, recipe in self.layer(layer)}
        return found

    @abstractmethod
    def outside(self) -> Iterator[tuple[str, Recipe]]:
        """Yield (our name, recipe) of what is in no layer."""

    @abstractmethod
    def layer(self, number: int) -> Iterator[tuple[str, Recipe]]:
        """Yield (our name within the layer, recipe) of a layer's weights."""

    def table(self, name: str) -> Recipe:
        """The embedding or the output layer."""
        piece = Piece(name, self.vocab_size, self.model.hidden_size)
        return Recipe((piece,), padded_rows=padded_vocab(self.vocab_size) - self.vocab_size)

    def vector(self, name: str, size: int | None = None) -> Recipe:
        return Recipe((Piece(name, size or self.model.hidden_size, None),))


_EXPERT_NAMES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe": ("w1", "w3", "w2"),
}
"""What a layer's experts are called -> an expert's gate, up and down projection."""


@dataclass(frozen=True, slots=True)
class _Llama(_Names):
    """Llama, Mistral, Qwen2, Qwen3, Gemma; with experts Qwen3-MoE and Mixtral."""

    experts: str

    def outside(self) -> Iterator[tuple[str, Recipe]]:
        yield "embedding.word_embeddings.weight", self.table("model.embed_tokens.weight")
        yield "decoder.final_layernorm.weight", self.vector("model.norm.weight")
        if not self.model.tied:
            yield "output_layer.weight", self.table("lm_head.weight")

    def layer(self, number: int) -> Iterator[tuple[str, Recipe]]:
        model, at = self.model, f"model.layers.{number}"
        hidden, size = model.hidden_size, model.derived_head_dim()
        groups = model.derived_kv_heads()
        heads = {"q_proj": model.num_heads, "k_proj": groups, "v_proj": groups}
        yield "input_layernorm.weight", self.vector(f"{at}.input_layernorm.weight")
        for kind, columns in {"weight": hidden, **({"bias": None} if model.derived_qkv_bias() else {})}.items():
            pieces = (Piece(f"{at}.self_attn.{name}.{kind}", count * size, columns) for name, count in heads.items())
            yield f"self_attention.linear_qkv.{kind}", Recipe(tuple(pieces), groups=groups)
        if model.qk_norm:
            for name in ("q", "k"):
                recipe = self.vector(f"{at}.self_attn.{name}_norm.weight", size)
                yield f"self_attention.{name}_layernorm.weight", recipe
        projection = Piece(f"{at}.self_attn.o_proj.weight", hidden, model.num_heads * size)
        yield "self_attention.linear_proj.weight", Recipe((projection,))
        yield "pre_mlp_layernorm.weight", self.vector(f"{at}.post_attention_layernorm.weight")
        if not model.has_experts(number):
            yield from self.mlp("mlp", f"{at}.mlp", model.derived_ffn(), _EXPERT_NAMES["mlp"])
            return
        assert model.num_experts is not None
        there, names = f"{at}.{self.experts}", _EXPERT_NAMES[self.experts]
        yield "mlp.router.weight", Recipe((Piece(f"{there}.gate.weight", model.num_experts, hidden),))
        for each in range(model.num_experts):
            ours, theirs = f"mlp.{EXPERT}{each}", f"{there}.experts.{each}"
            yield from self.mlp(ours, theirs, model.derived_expert_ffn(), names)

    def mlp(self, ours: str, theirs: str, ffn: int, names: tuple[str, str, str]) -> Iterator[tuple[str, Recipe]]:
        """Yield (our name within the layer, recipe) of a gated MLP; ``names``: its gate, up and down projection."""
        hidden, (gate, up, down) = self.model.hidden_size, names
        pieces = tuple(Piece(f"{theirs}.{name}.weight", ffn, hidden) for name in (gate, up))
        yield f"{ours}.linear_fc1.weight", Recipe(pieces)
        yield f"{ours}.linear_fc2.weight", Recipe((Piece(f"{theirs}.{down}.weight", hidden, ffn),))


class _Gpt2(_Names):
    """GPT-2: matrices (inputs, outputs), queries, keys and values in one."""

    def outside(self) -> Iterator[tuple[str, Recipe]]:
        yield "embedding.word_embeddings.weight", self.table("transformer.wte.weight")
        positions = Piece("transformer.wpe.weight", self.model.max_positions or 0, self.model.hidden_size)
        yield "embedding.position_embeddings.weight", Recipe((positions,))
        for kind in ("weight", "bias"):
            yield f"decoder.final_layernorm.{kind}", self.vector(f"transformer.ln_f.{kind}")
        if not self.model.tied:
            yield "output_layer.weight", self.table("lm_head.weight")

    def layer(self, number: int) -> Iterator[tuple[str, Recipe]]:
        at, hidden, ffn = f"transformer.h.{number}", self.model.hidden_size, self.model.derived_ffn()
        for ours, theirs in {"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"}.items():
            for kind in ("weight", "bias"):
                yield f"{ours}.{kind}", self.vector(f"{at}.{theirs}.{kind}")
        for kind, columns in {"weight": hidden, "bias": None}.items():
            pieces = (
                Piece(f"{at}.attn.c_attn.{kind}", hidden, columns, part * hidden, 3 * hidden, columns is not None)
                for part in range(3)
            )
            yield f"self_attention.linear_qkv.{kind}", Recipe(tuple(pieces), groups=self.model.num_heads)
        matrices = {
            "self_attention.linear_proj": ("attn.c_proj", hidden, hidden),
            "mlp.linear_fc1": ("mlp.c_fc", ffn, hidden),
            "mlp.linear_fc2": ("mlp.c_proj", hidden, ffn),
        }
        for ours, (theirs, rows, columns) in matrices.items():
            yield f"{ours}.weight", Recipe((Piece(f"{at}.{theirs}.weight", rows, columns, transposed=True),))
            yield f"{ours}.bias", Recipe((Piece(f"{at}.{theirs}.bias", rows, None),))


_BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)$|(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$"
)
"""What older files hold beside weights, made anew by every program: causal masks and rotary frequencies."""


def check_tensors(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Recipe], tied: bool) -> None:
    """Raise ModelError, by name, unless the tensors that are there (name -> shape) are those that we need.

    A tied model's file may hold its output layer too: it must then be looked at by who reads it.
    """
    shapes = {piece.name: piece.shape for recipe in wanted.values() for piece in recipe.pieces}
    extra = {"lm_head.weight"} if tied else set()
    unknown = sorted(name for name in found.keys() - shapes.keys() - extra if not _BUFFERS.search(name))
    wrong = [f"missing: {name}" for name in sorted(shapes.keys() - found.keys())]
    wrong += [f"not known here: {name}" for name in unknown]
    wrong += [
        f"{name}: shape {tuple(found[name])}, here {shape}"
        for name, shape in shapes.items()
        if name in found and tuple(found[name]) != shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelError(f"the tensors are not this model's: {'; '.join(wrong[:5])}{more}")
