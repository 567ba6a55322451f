"""Cuts documents into windows, and has an engine find the loss of each, at every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megaopus.data.corpus import Corpus
from megaopus.engine.megatron.scoring import MegatronScoringBackend
from megaopus.selection.backend import Candidates
from megaopus.selection.config import PASS_TOKENS

_PIPELINE_FILL = 4
"""Micro-batches per stage that keep the idle share of a pipeline small."""


class Windows:
    """Stretches of a corpus's tokens as candidates: n windows of positions [start, start + count], labels one on.

    A batch is tokens (n, T + 1) int64; what is beyond a window is filled with its own last token t as ~t, which counts
    in no loss (``SequenceRules.marked``).
    """

    def __init__(self, corpus: Corpus, starts: np.ndarray, counts: np.ndarray):
        self._corpus, self._starts, self.counts = corpus, starts, counts
        self.ids = torch.arange(len(starts))

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, indices: Tensor) -> Windows:
        """The windows at ``indices`` (n,), in that order; an index may repeat."""
        rows = torch.as_tensor(indices).cpu().numpy()
        return Windows(self._corpus, self._starts[rows], self.counts[rows])

    def batch(self, length: int | None = None) -> Tensor:
        """See the class; ``length``: T, by which longer windows are cut; None: the largest count."""
        places = np.arange((int(self.counts.max()) if length is None else length) + 1)
        steps = np.minimum(places, self.counts[:, None])
        tokens = self._corpus.tokens[(self._starts[:, None] + steps).ravel()].reshape(steps.shape).astype(np.int64)
        return torch.from_numpy(np.where(places > self.counts[:, None], ~tokens, tokens))


def windows_of(corpus: Corpus, documents: np.ndarray, size: int, first_only: bool) -> tuple[Windows, np.ndarray]:
    """(windows of ``documents`` (n,), the place among them of the document each is of).

    As in training, a document is read after an end-of-document token, and each of its tokens, its own end included, is
    a label once: window j has the labels [j size, (j + 1) size). The corpus's first document has none before it, and
    its first token is no label.
    """
    lengths = corpus.lengths[documents]
    begins = corpus.offsets[documents] - 1
    skipped = np.where(begins < 0, 1, 0)
    begins, lengths = begins + skipped, lengths - skipped
    per_document = np.minimum(-(-lengths // size), 1 if first_only else np.iinfo(np.int64).max)
    owners = np.repeat(np.arange(len(documents)), per_document)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    starts = begins[owners] + number * size
    return Windows(corpus, starts, np.minimum(size, lengths[owners] - number * size)), owners


class WindowBackend(MegatronScoringBackend):
    """The engine as the estimators see it, over ``Windows``: passes of about as many tokens each."""

    def losses(self, candidates: Candidates, *, length: int | None = None, micro_batch_size: int = 16) -> Tensor:
        """(n,) float64: this rank's part; the windows' own number of tokens decides how many go into a pass."""
        assert isinstance(candidates, Windows)
        found = torch.zeros(len(candidates), dtype=torch.float64, device=self.device)
        with self.scoring():
            for rows, copies, micro, width in self._passes(candidates.counts):
                parts = self._engine.local_losses(candidates, torch.cat([rows, rows[-1:].expand(copies)]), micro, width)
                found[rows] = parts[: len(rows)]
        return found if self._mesh.tp_rank == 0 else torch.zeros_like(found)

    def _passes(self, counts: np.ndarray) -> Iterator[tuple[Tensor, int, int, int]]:
        """(windows of one run of the schedule, copies of the last that fill it up, windows of a micro-batch, T)."""
        most = PASS_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]
        unit, group, pp = self._engine.length_unit, self._engine.micro_batch_group, self._mesh.shape.pp
        fill = 1 if pp == 1 else _PIPELINE_FILL * pp
        order = torch.from_numpy(np.argsort(-counts, kind="stable"))
        while len(order):
            width = -(-int(counts[order[0]]) // unit) * unit
            size = max(1, most // width)
            rows, order = order[: size * fill], order[size * fill :]
            micro = -(-len(rows) // fill)
            yield rows, -len(rows) % (micro * group), micro, width

    def over_ranks(self, windows: Windows, values: Callable[[Windows], Tensor]) -> np.ndarray:
        """(n,) ``values`` of the windows, the same on every rank: each data-parallel one finds those of its share.

        Windows of all lengths are dealt out evenly. ``values``: (m,) float64, this rank's part of each. Collective.
        """
        ranks, count = self.world_size, len(windows)
        order = torch.from_numpy(np.argsort(-windows.counts, kind="stable"))
        places = torch.arange(-(-count // ranks)) * ranks + self.rank
        own = values(windows.take(order[places.clamp(max=count - 1)]))
        dealt, _ = self.sum_over_ranks(own, own.new_zeros(1))
        found = np.empty(count)
        found[order.numpy()] = dealt.view(ranks, -1).t().flatten()[:count].cpu().numpy()
        return found
