"""Dropout masks differ wherever ranks hold different numbers, and are equal where they hold the same ones."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh, MeshShape
from megaopus.engine.config import EngineConfig
from tests.harness import MODELS, random_batch, tiny_engine
from tests.pool import Pool

LAYOUTS = {
    "dp2-tp2": (4, ParallelConfig(tp=2), "megatron"),
    "tp2-sp-pp2": (4, ParallelConfig(tp=2, pp=2, sequence_parallel=True), "megatron"),
    "cp2-pp2-vpp2": (4, ParallelConfig(cp=2, pp=2, vpp=2), "megatron"),
    "deepspeed-dp2-tp2": (4, ParallelConfig(tp=2), "deepspeed"),
    "deepspeed-tp2-sp": (2, ParallelConfig(tp=2, sequence_parallel=True), "deepspeed"),
}
"""Name -> (ranks, parallel, engine)."""
Masks = dict[str, list[str]]
"""Digests of the masks of hidden activations and of attention probabilities, in the order in which they were drawn."""


@contextmanager
def recorded() -> Iterator[Masks]:
    """Record the masks that are drawn inside."""
    found: Masks = {"hidden": [], "attention": []}
    dropout, attend = F.dropout, F.scaled_dot_product_attention

    def keep(kind: str, kept: Tensor) -> None:
        found[kind].append(hashlib.sha256(kept.numpy().tobytes()).hexdigest())

    def seen_dropout(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = torch.get_rng_state()
        kept = dropout(torch.ones_like(x), *args, **kwargs)
        torch.set_rng_state(state)
        dropped = dropout(x, *args, **kwargs)
        torch.testing.assert_close(dropped, x * kept)
        assert 0.4 < float((kept != 0).double().mean()) < 0.6
        keep("hidden", kept != 0)
        return dropped

    def seen_attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        state = torch.get_rng_state()
        length = value.shape[-2]
        with torch.no_grad():  # of the identity as values it is the probabilities, those that were dropped being zero
            probabilities = attend(query, key, torch.eye(length).expand(*value.shape[:2], -1, -1), **options)
        torch.set_rng_state(state)
        context = attend(query, key, value, **options)
        torch.testing.assert_close(context, probabilities @ value)
        keep("attention", probabilities != 0)
        return context

    with (
        mock.patch.object(F, "dropout", seen_dropout),
        mock.patch.object(F, "scaled_dot_product_attention", seen_attend),
    ):
        yield found


def masks(layout: str) -> Masks:
    """Those of the second update, on one rank; a new engine that goes on there, and recomputes, draws them again."""
    _, parallel, name = LAYOUTS[layout]
    mesh = Mesh(parallel, "cpu")

    def build(recompute: bool) -> Any:
        kind = EngineConfig(name=name, device="cpu", precision="fp32", recompute=recompute)
        model = replace(MODELS["gpt2-4-layers"], dropout=0.5)
        return tiny_engine(mesh, model=model, parallel=parallel, engine=kind)

    try:
        straight, resumed = build(False), build(True)
        straight.train_step(random_batch(8, 0))
        resumed.step = 1
        with recorded() as found:
            straight.train_step(random_batch(8, 1))
        with recorded() as repeated:
            resumed.train_step(random_batch(8, 1))
        assert Counter(repeated["attention"]) == Counter(2 * found["attention"])
        assert set(repeated["hidden"]) == set(found["hidden"])  # the embedding's are not recomputed
        return found
    finally:
        mesh.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_differ_where_the_numbers_do(layout: str, pool: Pool) -> None:
    """Over data, context, pipeline (and virtual) and tensor ranks, these by heads and under sequence parallelism by
    positions; what tensor-parallel ranks both hold is masked alike.
    """
    size, parallel, _ = LAYOUTS[layout]
    shape = MeshShape(size, parallel.tp, parallel.pp, parallel.cp)
    ranks = pool.run(size, masks, layout)
    for found in ranks:
        for kind, drawn in found.items():
            assert len(set(drawn)) == len(drawn) >= 4, kind  # over layers and micro-batches
    for (one, mine), (other, theirs) in combinations(enumerate(ranks), 2):
        same_tokens = shape.coordinates(one)[1:] == shape.coordinates(other)[1:]
        assert not set(mine["attention"]) & set(theirs["attention"]), (one, other)
        if same_tokens and not parallel.sequence_parallel:
            assert mine["hidden"] == theirs["hidden"], (one, other)
        else:
            assert not set(mine["hidden"]) & set(theirs["hidden"]), (one, other)
