"""Documents as a model that is there already sees them: their loss, and their OPUS utility as a static score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megaopus.data.candidates import CandidateBuffer, CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.scores import HIGHEST, LOWEST
from megaopus.data.sequences import Sequences
from megaopus.distributed.mesh import Mesh
from megaopus.errors import CheckpointError, DataError
from megaopus.score.base import Begin
from megaopus.score.frozen_model import Asked, find_model
from megaopus.score.hub import FIRST, MEAN
from megaopus.score.windows import WindowBackend, Windows, windows_of
from megaopus.selection import directional_utilities, exact_utilities
from megaopus.selection.backend import Gradient, UpdateOperator
from megaopus.selection.pieces import finite, whole_gradient, whole_operator

PROXY_SEQUENCES = 64


class _OfCheckpoint(ABC):
    batch_tokens = 1 << 15
    chunk_tokens = 1 << 18

    def __init__(
        self,
        corpus: Corpus,
        checkpoint: Path,
        windows: str = MEAN,
        device: str = "auto",
        *,
        max_tokens: int | None = None,
        overrides: Sequence[str] = (),
        **optimizer: Any,
    ):
        """Args:
        corpus: whose documents are scored; made with the tokenizer of the model.
        checkpoint: a checkpoint's folder, a run's (its newest), or a Hugging Face model folder.
        windows: first: only the first window of a document counts; mean: all of them do.
        device: auto, cpu or cuda.
        max_tokens: of a window, for a Hugging Face folder; a run's are its ``data.seq_len``.
        overrides: settings of ``parallel`` and ``engine``: how the model lies on the ranks of this launch.
        optimizer: what ``Asked`` has besides.

        Raises:
            CheckpointError, ModelError: no such model, or one of another engine or family.
            ConfigError: the overrides do not fit it.
            DataError: the corpus has another tokenizer than the one that it was trained on.
        """
        asked = Asked(overrides=overrides, device=device, max_tokens=max_tokens, **optimizer)
        self._corpus, self._first_only = corpus, windows == FIRST
        self._path, self._model = checkpoint, find_model(checkpoint, corpus, asked)
        self.config, self.stamps = self._model.config, self._model.stamps
        self.about: dict[str, Any] = self._model.about | {"seq_len": self.config.data.seq_len, "windows": windows}
        self._mesh: Mesh | None = None

    def join(self) -> Mesh:
        """Take this rank's place among those of the launch; more of them take more documents at a time."""
        if self._mesh is None:
            engine = self.config.engine
            self._mesh = Mesh(self.config.parallel, engine.device, engine.timeout_minutes, engine.deterministic)
            self.batch_tokens = type(self).batch_tokens * self._mesh.shape.dp
        return self._mesh

    def ready(self, work: Path, begin: Begin) -> None:
        """Check the model's files, build it, read its weights and the optimizer's state. Collective."""
        engine = self._model.engine(self.join(), self._corpus)
        self._model.warm(engine, begin)
        self.backend = WindowBackend(engine)

    def scores(self, documents: np.ndarray) -> np.ndarray:
        """(n,) float64: mean over a document's windows, by their number of labels; NaN where there is no label.

        Collective; the same on every rank.
        """
        size = self.config.data.seq_len
        windows, owners = windows_of(self._corpus, documents, size, self._first_only)
        totals = np.zeros((2, len(documents)))
        if len(windows):
            values = self.backend.over_ranks(windows, self._values)
            np.add.at(totals[0], owners, values * windows.counts)
            np.add.at(totals[1], owners, windows.counts)
        return np.divide(totals[0], totals[1], out=np.full(len(documents), np.nan), where=totals[1] > 0)

    @abstractmethod
    def _values(self, windows: Windows) -> Tensor:
        """(n,) of each window: this rank's part."""

    def finish(self, folder: Path, work: Path) -> None:
        """Leave nothing but the column."""
        return None

    def close(self) -> None:
        """End the process group."""
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None


class CheckpointPerplexity(_OfCheckpoint):
    """Mean token loss (nats) of a document under a checkpoint, or a Hugging Face model folder."""

    best = LOWEST

    def __init__(
        self,
        corpus: Corpus,
        checkpoint: Path,
        windows: str = MEAN,
        device: str = "auto",
        *,
        max_tokens: int | None = None,
        overrides: Sequence[str] = (),
    ):
        super().__init__(corpus, checkpoint, windows, device, max_tokens=max_tokens, overrides=overrides)
        self.about = {"method": "perplexity", **self.about}

    def _values(self, windows: Windows) -> Tensor:
        return self.backend.losses(windows)


class Utility(_OfCheckpoint):
    """The OPUS utility of a document (arXiv 2602.05400): by how much the optimizer's update on it, P grad L, would
    lower the proxy's loss, to first order, at the peak learning rate; nats.

    L is the mean token loss of a window, the proxy's gradient the mean over ``proxy_sequences`` of its sequences, P
    bounded as in training (docs/decisions/006). Directional scoring; ``exact``: float64 gradients, for small models.
    ``contrast``: less the gradient of as many of the pool's sequences: what helps the proxy more than the rest.

    A Hugging Face folder has no optimizer: one is made that has seen ``warm_steps`` gradients of the pool at these
    weights, as ``optim`` of the overrides says, else as for a run of ``experiment=continue``.
    """

    best = HIGHEST

    def __init__(
        self,
        corpus: Corpus,
        checkpoint: Path,
        windows: str = MEAN,
        device: str = "auto",
        proxy_sequences: int = PROXY_SEQUENCES,
        estimator: str = "directional",
        contrast: bool = False,
        *,
        max_tokens: int | None = None,
        warm_steps: int | None = None,
        overrides: Sequence[str] = (),
    ):
        more: dict[str, Any] = {"max_tokens": max_tokens, "overrides": overrides, "warm_steps": warm_steps}
        super().__init__(corpus, checkpoint, windows, device, optimizer=True, **more)
        if estimator == "exact" and self.config.parallel.model_ranks > 1:
            raise DataError("--estimator exact: needs the whole model on every rank: leave tp, pp and cp at 1")
        self._estimator = estimator
        self._proxy = self._some("proxy", proxy_sequences)
        self._pool = self._some("pool", proxy_sequences) if contrast else None
        # A run may end at a learning rate of 0, at which nothing moves; it is a scale alone.
        self.config.optim.schedule, self.config.optim.warmup_steps = "constant", 0
        used = {"proxy_sequences": len(self._proxy), "estimator": estimator, "contrast": contrast}
        used["seed"] = self.config.seed
        self.about = {"method": "utility", **self.about, **used, "optimizer": self.config.optim.name}
        self._operator: UpdateOperator | None = None
        self._gradient: Gradient = {}

    def _some(self, split: str, count: int) -> CandidateBuffer:
        sequences = Sequences(self._corpus, split, self.config.data.seq_len)
        return CandidateStream(sequences, min(len(sequences), count), self.config.seed, f"static {split}").at(0)

    def ready(self, work: Path, begin: Begin) -> None:
        """Take the proxy's gradient too."""
        super().ready(work, begin)
        selection = self.config.selection
        operator = self.backend.operator(selection.muon_operator)
        if operator is None:
            raise CheckpointError(f"{self._path}: its optimizer has no state, so that its update is not known")
        advance = begin("proxy gradient", len(self._proxy) * self.config.data.seq_len)
        lent = self.backend.gradient(self._proxy, against=self._pool)
        self._gradient = {name: value.clone() for name, value in lent.items()}
        if self.join().any(not bool(finite(self._gradient, self.backend.device))):
            raise CheckpointError(f"{self._path}: the gradient of the proxy's loss is not finite; use another model")
        self._operator = operator.bounded(self._gradient) if selection.bounded else operator
        advance(len(self._proxy) * self.config.data.seq_len)

    def _values(self, windows: Windows) -> Tensor:
        assert self._operator is not None
        if self._estimator != "exact":
            return directional_utilities(self.backend, windows, self._operator, self._gradient)
        gradient = whole_gradient(self.backend, self._gradient)
        with whole_operator(self._operator) as operator:
            return exact_utilities(self.backend, windows, operator, gradient)
