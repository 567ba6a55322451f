"""Opens what a run reads, and counts it: ``check`` describes the very objects that the run draws from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megaopus.data.candidates import CandidateBuffer, CandidateStream, evaluation_buffers
from megaopus.data.config import DataConfig
from megaopus.data.corpus import TARGET, Corpus
from megaopus.data.feature_work import Hands
from megaopus.data.mixture import parse_stages
from megaopus.data.needs import DataNeeds
from megaopus.data.read_ahead import TokenReader
from megaopus.data.score_filter import kept_documents
from megaopus.data.sequences import Sequences
from megaopus.data.signatures import read_signatures
from megaopus.data.store import Store
from megaopus.data.target import Target, held_out_target, target_of_domains
from megaopus.data.text_features import SequenceTextFeatures, ensure_text_features, text_features_folder
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDataSummary:
    """Counts what a run reads."""

    fingerprint: str
    """The pool corpus's."""
    vocab_size: int
    """The pool corpus's tokenizer's."""
    domains: list[str]
    """Domains of the pool corpus."""
    tokens: int
    """Tokens of all documents of the pool corpus, of every split and whether or not a filter keeps them."""
    sequences: dict[str, int]
    """Split -> sequences that the run draws from: pool (filtered), validation (every domain), target if something was
    held out, and proxy if it is read."""
    validation: dict[str, int]
    """Domain -> sequences that each validation runs through."""
    held_out: dict[str, int]
    """The same of each part of the target that was held out; empty: nothing was."""
    target: Target
    """What the headline loss is taken on."""
    epochs: dict[str, float]
    """Domain -> times that the run goes through its sequences of the pool; equal for all without weights."""
    weighted: bool
    """Whether domains are drawn by weight."""
    kept: dict[str, str] | None
    """What the filter keeps, in words; None: there is none."""
    loss_share: float | None
    """Share of the pool's tokens that count in the loss, by its loss mask; None: all do."""


class RunData:
    """Holds the sequences that a run reads, opened once; no token is read before a batch asks for it.

    ``describe`` and ``open`` share every line, so that what is told beforehand is what the run opens.
    """

    def __init__(self, data: DataConfig, needs: DataNeeds):
        """Open the corpora; see ``open``."""
        self._data, self._needs = data, needs
        self._opened: dict[str, Corpus] = {}
        pool = self._corpus(data.path)
        self.pool = Sequences(pool, "pool", data.seq_len, kept=kept_documents(pool, data.filter))
        """What candidates and contrast batches are drawn from."""
        self.validation = Sequences(self._corpus(data.validation_path or data.path), "validation", data.seq_len)
        """Every domain, wanted or not."""
        if needs.reads_proxy:
            _ = self.proxy  # a fault of it comes now

    @classmethod
    def open(cls, data: DataConfig, needs: DataNeeds) -> RunData:
        """Open the corpora of a run.

        Raises:
            DataError: a corpus or score column cannot be read, or a split that is read has no sequence.
        """
        return cls(data, needs)

    @classmethod
    def describe(cls, data: DataConfig, needs: DataNeeds) -> RunDataSummary:
        """Count what ``open`` opens; writes nothing. Raises DataError as ``open`` and ``candidates`` do."""
        return cls.open(data, needs).summary()

    @cached_property
    def proxy(self) -> Sequences:
        """Open, when first asked, what proxy batches are drawn from: the wanted domains. Raises DataError."""
        data = self._data
        return Sequences(self._corpus(data.proxy_path or data.path), "proxy", data.seq_len, data.target_domains or None)

    @cached_property
    def held_out(self) -> Sequences | None:
        """Open, when first asked, the target that the proxy's corpus held out, read or not; None: none was.

        Raises DataError, also where none of it fills a sequence.
        """
        path = self._data.proxy_path or self._data.path
        if (found := self._corpus(path).target) is None:
            return None
        self._opened[str(found.path)] = found
        return Sequences(found, TARGET, self._data.seq_len)

    @property
    def masked(self) -> bool:
        """Tell whether the loss leaves out some of the tokens of a corpus that is open."""
        _ = self.held_out  # which every validation reads
        return any(corpus.masked for corpus in self._opened.values())

    @property
    def remote(self) -> bool:
        """Tell whether tokens of a corpus that is open are in an object store."""
        return any(corpus.remote for corpus in self._opened.values())

    def candidates(self, reader: TokenReader | None = None, signatures: np.ndarray | None = None) -> CandidateStream:
        """Draw the buffer of candidates of each step. Raises DataError for a weight of a domain without sequences.

        ``reader``, here and below: reads the tokens of the buffers. ``signatures``: what ``signatures`` gives.
        """
        needs = self._needs
        return CandidateStream(
            self.pool,
            needs.buffer_size,
            needs.seed,
            steps_per_buffer=needs.steps_per_buffer,
            stages=parse_stages(self._data.weights),
            reader=reader,
            signatures=signatures,
        )

    def signatures(self, mesh: Mesh) -> np.ndarray | None:
        """Map what tells copies apart in the pool; None on every rank if one has none. Collective.

        Raises DataError if the file is broken.
        """
        found = read_signatures(self.pool)
        return None if mesh.any(found is None) else found

    def proxy_batches(self, reader: TokenReader | None = None) -> CandidateStream | None:
        """Draw the proxy batch of each step; None: the run takes none."""
        if not self._needs.proxy:
            return None
        return CandidateStream(self.proxy, self._needs.proxy_batch_size, self._needs.seed, "proxy", reader=reader)

    def contrast_batches(self, reader: TokenReader | None = None) -> CandidateStream | None:
        """Draw the batches of the pool that proxy batches are compared with; None: the run takes none."""
        if not self._needs.contrast:
            return None
        return CandidateStream(self.pool, self._needs.proxy_batch_size, self._needs.seed, "contrast", reader=reader)

    def evaluation_buffers(self) -> dict[str, CandidateBuffer]:
        """Choose the sequences of each domain that every validation runs through."""
        return evaluation_buffers(self.validation, self._needs.eval_sequences)

    def held_out_buffers(self) -> dict[str, CandidateBuffer]:
        """Choose the sequences of each part of the held-out target that every validation runs through; none: empty."""
        if (held_out := self.held_out) is None:
            return {}
        return evaluation_buffers(held_out, self._needs.eval_sequences)

    def target(self) -> Target:
        """Name what the headline loss is taken on: the held-out target, else the domains named, else all."""
        if self.held_out is not None:
            return held_out_target(self.held_out, self._data.proxy_path or self._data.path)
        return target_of_domains(self._data.target_domains)

    def in_wanted_domains(self, candidates: Any) -> Tensor:
        """Say which of N candidates are of a wanted domain, (N,) bool; none where no domain is named."""
        names = candidates.domain_names
        return torch.tensor([names[index] in self._data.target_domains for index in candidates.domains])

    def text_features(self, mesh: Mesh, console: Console) -> SequenceTextFeatures | None:
        """Read the text features of the pool, computed by rank 0 if they are not there; None: the run reads none.

        Collective. Raises DataError if their folder cannot be read or written.
        """
        if (blocks := self._needs.text_features) is None:
            return None
        folder = on_rank_0(mesh, lambda: self.ensure_text_features(console))
        return SequenceTextFeatures(self.pool, folder, blocks)

    @property
    def text_features_folder(self) -> Path:
        """Say where the text features of the pool lie, or will."""
        data = self._data
        return text_features_folder(self.pool, self.proxy, data.text_features_path, data.text_features_sample)

    def ensure_text_features(self, console: Console, hands: Hands | None = None) -> Path:
        """Compute the text features of the pool if they are not there; returns their folder. Raises DataError.

        ``hands``: who works; None: this process.
        """
        return ensure_text_features(
            self.pool,
            self.proxy,
            self._data.text_features_path,
            console,
            judges=self._needs.judges,
            ngrams="ngrams" in (self._needs.text_features or ()),
            sample=self._data.text_features_sample,
            hands=hands,
            again=partial(_pool_and_proxy, self._data, self._needs),
        )

    def summary(self) -> RunDataSummary:
        """Count what is open. Raises DataError as ``candidates`` does."""
        corpus, kept = self.pool.corpus, self.pool.kept
        drawn = {"pool": self.pool, "validation": self.validation}
        if self._needs.reads_proxy:
            drawn["proxy"] = self.proxy
        if self.held_out is not None:
            drawn[TARGET] = self.held_out
        return RunDataSummary(
            fingerprint=corpus.fingerprint,
            vocab_size=corpus.vocab_size,
            domains=list(corpus.domains),
            tokens=corpus.manifest["tokens"],
            sequences={split: len(sequences) for split, sequences in drawn.items()},
            validation={domain: len(buffer) for domain, buffer in self.evaluation_buffers().items()},
            held_out={part: len(buffer) for part, buffer in self.held_out_buffers().items()},
            target=self.target(),
            epochs=self.candidates().epochs(self._needs.steps),
            weighted=bool(self._data.weights),
            kept=None if kept is None else kept.told(corpus),
            loss_share=corpus.loss_share("pool"),
        )

    def _corpus(self, path: str) -> Corpus:
        if path not in self._opened:
            data = self._data
            store = Store(most_bytes=data.store_cache_mb << 20, patience_s=data.store_patience_s)
            self._opened[path] = Corpus.open(path, store=store)
        return self._opened[path]


def _pool_and_proxy(data: DataConfig, needs: DataNeeds) -> tuple[Sequences, Sequences]:
    """Open them in another process."""
    opened = RunData.open(data, needs)
    return opened.pool, opened.proxy
