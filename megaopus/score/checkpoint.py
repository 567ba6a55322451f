"""Documents as a checkpoint of ours sees them: their loss, and their OPUS utility as a static score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megaopus.build import build_engine
from megaopus.checkpoint.checkpointer import read_state, resolve
from megaopus.checkpoint.manifest import verify
from megaopus.config.parse import restored
from megaopus.config.run_config import RunConfig
from megaopus.data.candidates import CandidateBuffer, CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.scores import HIGHEST, LOWEST
from megaopus.data.sequences import Sequences
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.gpt_forward import PLAIN, SequenceRules, token_losses
from megaopus.engine.megatron.scoring import MegatronScoringBackend
from megaopus.errors import CheckpointError
from megaopus.plugins import notes_on_missing
from megaopus.score.base import Begin
from megaopus.score.hub import FIRST, MEAN
from megaopus.selection import directional_utilities, exact_utilities
from megaopus.selection.backend import Candidates, Gradient, UpdateOperator
from megaopus.selection.config import PASS_TOKENS
from megaopus.selection.pieces import finite, whole_gradient, whole_operator
from megaopus.start import check_same_tokenizer

PROXY_SEQUENCES = 64


class Windows:
    """Stretches of a corpus's tokens as candidates: n windows of positions [start, start + count], labels one on.

    A batch is (tokens (n, T + 1) int64, count of each (n,)), T the largest count in it; what is beyond a window is
    filled with its own last token, and must not count.
    """

    def __init__(self, corpus: Corpus, starts: np.ndarray, counts: np.ndarray):
        self._corpus, self._starts, self.counts = corpus, starts, counts
        self.ids = torch.arange(len(starts))

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, indices: Tensor) -> Windows:
        """The windows at ``indices`` (n,), in that order."""
        rows = torch.as_tensor(indices).cpu().numpy()
        return Windows(self._corpus, self._starts[rows], self.counts[rows])

    def batch(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """See the class; ``length``: labels of each window, at most."""
        counts = self.counts if length is None else np.minimum(self.counts, length)
        steps = np.minimum(np.arange(int(counts.max()) + 1), counts[:, None])
        tokens = self._corpus.tokens[(self._starts[:, None] + steps).ravel()].reshape(steps.shape)
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(np.array(counts, dtype=np.int64))


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


def window_losses(model: nn.Module, batch: Any, rules: SequenceRules = PLAIN) -> Tensor:
    """(n,) float64 mean loss of the labels that count, of (tokens (n, T + 1), counts (n,)).

    ``rules`` as ``token_losses``.
    """
    tokens, counts = batch
    losses = token_losses(model, tokens, rules=rules).double()
    inside = torch.arange(losses.shape[1], device=losses.device) < counts[:, None]
    return (losses * inside).sum(1) / counts


class WindowBackend(MegatronScoringBackend):
    """The engine as the estimators see it, over ``Windows``: one process, passes of about as many tokens each."""

    def __init__(self, engine: Any):
        super().__init__(engine)
        self.loss = partial(window_losses, rules=engine.rules)

    def losses(self, candidates: Candidates, *, length: int | None = None, micro_batch_size: int = 16) -> Tensor:
        """(n,) float64 mean loss of each window; their own number of tokens decides how many go into a pass."""
        assert isinstance(candidates, Windows)
        found = torch.empty(len(candidates), dtype=torch.float64, device=self.device)
        order = torch.from_numpy(np.argsort(candidates.counts, kind="stable"))
        most = PASS_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]
        with self._mesh.megatron(), self.scoring(), torch.no_grad():
            while len(order):
                size = max(1, most // int(candidates.counts[order[-1]]))
                rows, order = order[-size:], order[:-size]
                found[rows] = self._losses(self.module, candidates.take(rows).batch(length))
        return found


class _OfCheckpoint(ABC):
    batch_tokens = 1 << 15
    chunk_tokens = 1 << 18

    def __init__(self, corpus: Corpus, checkpoint: Path, windows: str = MEAN, device: str = "auto"):
        """Args:
        corpus: whose documents are scored; made with the tokenizer that the checkpoint was trained with.
        checkpoint: a checkpoint's folder, or a run's: its newest.
        windows: first: only the first ``seq_len`` tokens of a document count; mean: all, by windows of seq_len.
        device: auto, cpu or cuda.

        Raises:
            CheckpointError: no such checkpoint, or one of another engine.
            DataError: the corpus has another tokenizer than the one that it was trained on.
        """
        folder = resolve(str(checkpoint), checkpoint / "none")[0]
        state = read_state(folder)
        self._corpus, self._first_only = corpus, windows == FIRST
        self.config, self._folder, self._step = _one_process(state, folder, device), folder, state["step"]
        check_same_tokenizer(corpus, state, self.config)
        self.about: dict[str, Any] = {
            "checkpoint": str(folder),
            "step": self._step,
            "seq_len": self.config.data.seq_len,
            "windows": windows,
        }
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        self._mesh: Mesh | None = None

    def ready(self, work: Path, begin: Begin) -> None:
        """Check the checkpoint's files, build the model, read the weights and the optimizer's state."""
        self._mesh = Mesh(self.config.parallel, self.config.engine.device, self.config.engine.timeout_minutes)
        if problem := verify(self._folder, self._mesh):
            raise CheckpointError(f"{problem}; restore it, or name another with --checkpoint")
        rules = SequenceRules(document_end=self._corpus.eod_id, isolated=self.config.data.document_mask)
        engine = build_engine(self.config, self._mesh, self._corpus.vocab_size, rules=rules)
        engine.load(self._folder / "weights", [])
        engine.step = self._step
        self.backend = WindowBackend(engine)

    def scores(self, documents: np.ndarray) -> np.ndarray:
        """(n,) float64: mean over a document's windows, by their number of labels; NaN where there is no label."""
        size = self.config.data.seq_len
        windows, owners = windows_of(self._corpus, documents, size, self._first_only)
        totals = np.zeros((2, len(documents)))
        if len(windows):
            values = self._values(windows).cpu().numpy()
            np.add.at(totals[0], owners, values * windows.counts)
            np.add.at(totals[1], owners, windows.counts)
        return np.divide(totals[0], totals[1], out=np.full(len(documents), np.nan), where=totals[1] > 0)

    @abstractmethod
    def _values(self, windows: Windows) -> Tensor:
        """(n,) of each window."""

    def finish(self, folder: Path, work: Path) -> None:
        """Leave nothing but the column."""
        return None

    def close(self) -> None:
        """End the process group."""
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None


class CheckpointPerplexity(_OfCheckpoint):
    """Mean token loss (nats) of a document under a checkpoint."""

    best = LOWEST

    def __init__(self, corpus: Corpus, checkpoint: Path, windows: str = MEAN, device: str = "auto"):
        super().__init__(corpus, checkpoint, windows, device)
        self.about = {"method": "perplexity", **self.about}

    def _values(self, windows: Windows) -> Tensor:
        return self.backend.losses(windows)


class Utility(_OfCheckpoint):
    """The OPUS utility of a document (arXiv 2602.05400): by how much the optimizer's update on it, P grad L, would
    lower the proxy's loss, to first order, at the peak learning rate; nats.

    L is the mean token loss of a window, the proxy's gradient the mean over ``proxy_sequences`` of its sequences, P
    bounded as in training (docs/decisions/006). Directional scoring; ``exact``: float64 gradients, for small models.
    ``contrast``: less the gradient of as many of the pool's sequences: what helps the proxy more than the rest.
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
    ):
        super().__init__(corpus, checkpoint, windows, device)
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
            raise CheckpointError(f"{self._folder}: its optimizer has no state, so that its update is not known")
        advance = begin("proxy gradient", len(self._proxy) * self.config.data.seq_len)
        lent = self.backend.gradient(self._proxy, against=self._pool)
        self._gradient = {name: value.clone() for name, value in lent.items()}
        if not bool(finite(self._gradient, self.backend.device)):
            raise CheckpointError(
                f"{self._folder}: the gradient of the proxy's loss is not finite; use another checkpoint"
            )
        self._operator = operator.bounded(self._gradient) if selection.bounded else operator
        advance(len(self._proxy) * self.config.data.seq_len)

    def _values(self, windows: Windows) -> Tensor:
        assert self._operator is not None
        if self._estimator != "exact":
            return directional_utilities(self.backend, windows, self._operator, self._gradient)
        gradient = whole_gradient(self.backend, self._gradient)
        with whole_operator(self._operator) as operator:
            return exact_utilities(self.backend, windows, operator, gradient)


def _one_process(state: dict[str, Any], folder: Path, device: str) -> RunConfig:
    """The checkpoint's settings with its model whole on this process."""
    config = restored(state["config"], str(folder / "state.json"))
    if config.engine.name != "megatron":
        raise CheckpointError(
            f"{folder}: a checkpoint of engine.name={config.engine.name}; score reads those of the megatron engine"
        )
    if not config.optim.is_known():
        missing = "; ".join(notes_on_missing(config.plugins, folder)) or "no plugin of it is named"
        raise CheckpointError(f"{folder}: no optimizer {config.optim.name!r} here ({missing}): give --plugin MODULE")
    config.parallel = ParallelConfig(distributed_optimizer=config.parallel.distributed_optimizer)
    config.engine = replace(config.engine, device=device)
    config.model = replace(config.model, dropout=0.0)
    return config
