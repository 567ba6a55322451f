"""The candidate buffer of each step, a pure function of (seed, purpose, step, corpus)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from megaopus.data.mixture import Mixture, Stage
from megaopus.data.permutation import permute
from megaopus.data.read_ahead import Reads, TokenReader
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError


class CandidateBuffer:
    """N sequences, by number; their tokens are read when ``batch`` asks for them."""

    def __init__(
        self,
        sequences: Sequences,
        ids: np.ndarray,
        sequence_ids: np.ndarray,
        reader: TokenReader | None = None,
        signatures: np.ndarray | None = None,
    ):
        """Args:
        sequences: where the tokens come from.
        ids: (N,) what the selector calls them, unique in the buffer.
        sequence_ids: (N,) their numbers in ``sequences``.
        reader: reads them once a step; None: they are read whenever they are asked for.
        signatures: of every one of ``sequences``, as ``read_signatures`` maps them; None: not known unread.
        """
        self._sequences, self._reader, self._signatures = sequences, reader, signatures
        self.ids: Tensor = torch.from_numpy(np.array(ids, dtype=np.int64))
        self.sequence_ids = np.asarray(sequence_ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def domain_names(self) -> list[str]:
        """Every domain of the sequences, present in this buffer or not."""
        return self._sequences.domains

    @property
    def domains(self) -> np.ndarray:
        """(N,) index into ``domain_names``."""
        return self._sequences.domain_of(self.sequence_ids)

    def take(self, indices: Tensor) -> CandidateBuffer:
        """The candidates at ``indices`` (n,), in that order."""
        rows = torch.as_tensor(indices).cpu().numpy()
        ids, numbers = self.ids.numpy()[rows], self.sequence_ids[rows]
        return CandidateBuffer(self._sequences, ids, numbers, self._reader, self._signatures)

    @property
    def signatures(self) -> Tensor | None:
        """(N,) int64 that tell their tokens apart; None where they would have to be read for it."""
        return None if self._signatures is None else torch.from_numpy(self._signatures[self.sequence_ids])

    @property
    def reads(self) -> Reads:
        """Return what a ``TokenReader`` is told to have the tokens read ahead."""
        return self._sequences, self.sequence_ids

    def batch(self, length: int | None = None) -> Tensor:
        """(N, length + 1) int64 tokens: inputs ``[:, :-1]``, labels ``[:, 1:]``; ~t for a token t outside the loss.

        All seq_len positions by default, and where ``length`` is more.
        """
        length = None if length is None else min(length, self._sequences.seq_len)
        if self._reader is None:
            return torch.from_numpy(self._sequences.read(self.sequence_ids, length).astype(np.int64))
        return self._reader.tokens(self._sequences, self.sequence_ids, length)

    def share(self) -> dict[str, float]:
        """Fraction of the buffer that each domain has; the fractions add up to 1."""
        counts = np.bincount(self.domains, minlength=len(self.domain_names))
        return {name: float(count) / max(len(self), 1) for name, count in zip(self.domain_names, counts, strict=True)}


def evaluation_buffers(sequences: Sequences, n_per_domain: int) -> dict[str, CandidateBuffer]:
    """Evenly spaced sequences of each domain to evaluate on, at most ``n_per_domain``, always the same ones.

    Those of which no label counts in the loss are left out. Raises DataError if none remains in a domain.
    """
    chosen = sequences.evenly_spaced(n_per_domain)
    if sequences.corpus.masked:
        chosen = {name: numbers[sequences.have_labels(numbers)] for name, numbers in chosen.items()}
    if empty := [name for name, numbers in chosen.items() if not len(numbers)]:
        path = sequences.corpus.path
        raise DataError(
            f"{path}: no token of domain {empty[0]!r} that validation reads counts in the loss: prepare more"
        )
    return {name: CandidateBuffer(sequences, numbers, numbers) for name, numbers in chosen.items()}


class CandidateStream:
    """An endless run of epochs, each a fresh permutation of all sequences, cut into buffers of N.

    Buffer b has the places [b*N, (b+1)*N) of the run, so no sequence is lost or repeated within an epoch whatever N is,
    and a buffer may straddle two epochs. A place in epoch e with sequence i has the id e*n + i (n sequences): unique
    over the whole run, equal on every rank and at every world size, and ``id % n`` gives the sequence back.

    With ``stages`` each domain has epochs of its own, and its places in the buffers follow its weight (mixture.py): a
    change of weights neither repeats nor loses a sequence.
    """

    def __init__(
        self,
        sequences: Sequences,
        num_candidates: int,
        seed: int,
        purpose: str = "candidates",
        *,
        steps_per_buffer: int = 1,
        stages: Items[Stage] = (),
        reader: TokenReader | None = None,
        signatures: np.ndarray | None = None,
        serves: int | None = None,
    ):
        """Args:
        sequences: what to draw from.
        num_candidates: N, buffer size over all ranks.
        seed: the run's seed.
        purpose: keeps streams with the same seed apart (candidates, proxy, ...).
        steps_per_buffer: consecutive steps that get the same buffer.
        stages: weights of the domains over the steps; none: every sequence alike.
        reader: reads the tokens of the buffers.
        signatures: as ``CandidateBuffer`` takes them.
        serves: the name of ``steps_per_buffer`` in version 0.1.

        Raises:
            DataError: N is not positive, or a weight is given to a domain without sequences.
        """
        if num_candidates < 1:
            raise DataError(f"a buffer of {num_candidates} candidates cannot be drawn; use at least 1")
        if serves is not None:
            warnings.warn("serves= is called steps_per_buffer= now", DeprecationWarning, stacklevel=2)
            steps_per_buffer = serves
        self.sequences = sequences
        self.num_candidates = num_candidates
        self._steps_per_buffer = steps_per_buffer
        self._reader, self._signatures = reader, signatures
        self._key = f"{seed}/{purpose}/{sequences.key}"
        self._latest: dict[int, CandidateBuffer] = {}
        self._mixture = None
        if stages:
            unknown = sorted({name for s in stages for name, w in s.weights.items() if w} - set(sequences.domains))
            if unknown:
                has = ", ".join(sequences.domains)
                raise DataError(f"{sequences.corpus.path}: no sequences of domain {unknown[0]!r}; there are: {has}")
            self._mixture = Mixture(stages, sequences.domains, num_candidates, steps_per_buffer)

    def at(self, step: int) -> CandidateBuffer:
        """Give the buffer of ``step`` (from 0). Any thread may ask."""
        assert step >= 0
        buffer = step // self._steps_per_buffer
        if (found := self._latest.get(buffer)) is None:
            # Asked for several times in a step and once ahead of it; drawing takes milliseconds.
            found = self._latest[buffer] = self._draw(buffer)
            for old in list(self._latest)[:-2]:
                self._latest.pop(old, None)
        return found

    def _draw(self, buffer: int) -> CandidateBuffer:
        n = len(self.sequences)
        if self._mixture is not None:
            return self._mixed(self._mixture, buffer, n)
        epochs, places = np.divmod(buffer * self.num_candidates + np.arange(self.num_candidates), n)
        numbers = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            numbers[here] = permute(places[here], n, f"{self._key}/{epoch}")
        return CandidateBuffer(self.sequences, epochs * n + numbers, numbers, self._reader, self._signatures)

    def _mixed(self, mixture: Mixture, buffer: int, n: int) -> CandidateBuffer:
        domains, ranks = mixture.at(buffer)
        counts = np.array(list(self.sequences.counts.values()))
        firsts = np.cumsum(counts) - counts
        epochs, places = np.divmod(ranks, counts[domains])
        numbers = np.empty_like(places)
        for domain, epoch in np.unique(np.stack([domains, epochs]), axis=1).T:
            here = (domains == domain) & (epochs == epoch)
            key = f"{self._key}/{self.sequences.domains[domain]}/{epoch}"
            numbers[here] = firsts[domain] + permute(places[here], int(counts[domain]), key)
        return CandidateBuffer(self.sequences, epochs * n + numbers, numbers, self._reader, self._signatures)

    def epochs(self, step: int) -> dict[str, float]:
        """Times that the candidates of each domain were gone through before ``step``."""
        buffers = -(-step // self._steps_per_buffer)
        counts = self.sequences.counts
        if self._mixture is None:
            return dict.fromkeys(counts, buffers * self.num_candidates / len(self.sequences))
        drawn = self._mixture.drawn(buffers).tolist()
        return {name: given / count for (name, count), given in zip(counts.items(), drawn, strict=True)}
