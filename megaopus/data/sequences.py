"""Training sequences cut from a corpus by arithmetic: which tokens belong to sequence i is a function of i alone."""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megaopus.data.corpus import SPLITS, TARGET, Corpus
from megaopus.data.layout import layout_of
from megaopus.errors import DataError

if TYPE_CHECKING:
    from megaopus.data.score_filter import Kept


class Sequences:
    """The sequences of one split, numbered 0 to n-1, domain after domain.

    The documents of a domain, in corpus order, form one stream of tokens. Its sequence j has the tokens
    [j*L, j*L + L] of that stream, L = seq_len: L inputs and, shifted by one, L labels. So every label is predicted
    exactly once, a sequence has one domain, and it may span documents. The rest of each stream is left out.

    With a filter (``keeping.py``) only the documents it keeps are there, one after the other. Numbers mean the same for
    the same (corpus fingerprint, split, seq_len, domains, filter): see ``key``.
    """

    def __init__(
        self, corpus: Corpus, split: str, seq_len: int, domains: Items[str] | None = None, kept: Kept | None = None
    ):
        """Lay the streams out; no token is read.

        Args:
            corpus: an open corpus.
            split: pool, proxy, validation, or target (of a ``Corpus.target``).
            seq_len: L, at least 1.
            domains: names to take; None: every domain that fills at least one sequence.
            kept: the documents of the pool to take; None: all.

        Raises:
            DataError: unknown split or domain, or a named domain (or the whole split) fills no sequence.
        """
        if split not in (known := (*SPLITS, TARGET)):
            raise DataError(f"{corpus.path}: no split {split!r}; use one of: {', '.join(known)}")
        if seq_len < 1:
            raise DataError(f"{corpus.path}: seq_len = {seq_len}; sequences need at least 1 token")
        unknown = sorted(set(domains or ()) - set(corpus.domains))
        if unknown:
            raise DataError(f"{corpus.path}: no domain {unknown[0]!r}; it has: {', '.join(corpus.domains)}")
        self.corpus, self.split, self.seq_len = corpus, split, seq_len
        self.domains: list[str] = []
        """Names of the domains that have sequences, in corpus order."""
        self.left_out: dict[str, int] = {}
        """Tokens of each domain that fill no sequence, none of them ever a label."""
        self.kept = kept
        self._places: dict[int, slice] = {}
        """Code of each domain that has sequences -> places of its documents on the line."""
        self._lay_out(set(corpus.domains if domains is None else domains), explicit=domains is not None)
        filtered = [] if kept is None else [kept.identity]
        self.key = json.dumps([corpus.fingerprint, split, seq_len, self.domains, *filtered])
        """Says what the numbers stand for."""

    def _lay_out(self, wanted: set[str], explicit: bool) -> None:
        corpus, seq_len = self.corpus, self.seq_len
        remedy = "use a smaller seq_len, or prepare more text"
        if self.kept is not None:
            remedy += ", or let data.filter keep more"
        # One long line of documents, the streams back to back; `starts` are positions on it.
        self._documents, self._starts, place = layout_of(corpus, self.split, self.kept)
        counts, begins = [], []
        for code, name in enumerate(corpus.domains):
            if name not in wanted:
                continue
            begin, end = (int(self._starts[place[code + each]]) for each in (0, 1))
            tokens = end - begin
            count = max(tokens - 1, 0) // seq_len
            if explicit and not count:
                raise DataError(
                    f"{corpus.path}: domain {name!r} has {tokens:,} tokens in split {self.split!r}, too few for one "
                    f"sequence of seq_len = {seq_len}; {remedy}"
                )
            if tokens:
                self.left_out[name] = tokens - count * seq_len - bool(count)
            if count:
                self.domains.append(name)
                counts.append(count)
                begins.append(begin)
                self._places[code] = slice(*place[code : code + 2])
        if not counts:
            raise DataError(
                f"{corpus.path}: no domain fills one sequence of seq_len = {seq_len} in split {self.split!r}; "
                f"{remedy} or a larger fraction for this split"
            )
        self._begins = np.array(begins)
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        """Number of sequences, n."""
        return int(self._first[-1])

    @property
    def counts(self) -> dict[str, int]:
        """Sequences of each domain."""
        return dict(zip(self.domains, np.diff(self._first).tolist(), strict=True))

    def domain_of(self, ids: np.ndarray | Items[int]) -> np.ndarray:
        """Index into ``domains`` of each sequence, (n,) int64."""
        return np.searchsorted(self._first, self._checked(ids), side="right") - 1

    def tokens(self, ids: np.ndarray | Items[int], length: int | None = None) -> Tensor:
        """Read sequences: (n, length + 1) int64, ``[:, :-1]`` the inputs and ``[:, 1:]`` the labels.

        Args:
            ids: sequence numbers, (n,).
            length: positions from the start, 1 to seq_len; None: all of them.

        Raises:
            DataError: the tokens cannot be read.
        """
        found = self.read(ids, length).astype(np.int64)
        return torch.from_numpy(np.where(found < 0, ~found, found) if self.corpus.masked else found)

    @property
    def dtype(self) -> np.dtype:
        """The type of what ``read`` returns: the file's, or a signed one where the corpus has a loss mask."""
        return np.dtype(np.int32) if self.corpus.masked else self.corpus.tokens.dtype

    def width(self, length: int | None = None) -> int:
        """Count the tokens of ``length`` positions (None: all) and their labels. Raises ValueError for too many."""
        width = (self.seq_len if length is None else length) + 1
        if not 2 <= width <= self.seq_len + 1:
            raise ValueError(f"length must lie in [1, {self.seq_len}], not {length}")
        return width

    def read(self, ids: np.ndarray | Items[int], length: int | None = None) -> np.ndarray:
        """Read sequences as ``tokens`` does: (n, length + 1) of ``dtype``; with ~t for a token t outside the loss."""
        width = self.width(length)
        begin, first, last = self._span(ids, width)
        # Each row is a run of segments, one per document; a segment's tokens lie at a fixed distance in the file.
        per_row = last - first + 1
        rows = np.repeat(np.arange(len(begin)), per_row)
        segments = np.arange(len(rows)) - (np.cumsum(per_row) - per_row)[rows] + first[rows]
        lengths = np.minimum(self._starts[segments + 1], begin[rows] + width) - np.maximum(
            self._starts[segments], begin[rows]
        )
        starts = np.maximum(self._starts[segments], begin[rows]) + self._shift(segments)
        found = self.corpus.read(starts, lengths)
        if self.corpus.masked:
            found = found.astype(self.dtype)
            np.invert(found, out=found, where=~self.corpus.read_mask(starts, lengths))
        return found.reshape(-1, width)

    def have_labels(self, ids: np.ndarray) -> np.ndarray:
        """Say of which sequences some label counts in the loss, (n,) bool; they are read for it."""
        counted: np.ndarray = self.read(ids)[:, 1:] >= 0
        return np.asarray(counted.any(axis=1))

    def first_document_of(self, ids: np.ndarray | Items[int]) -> np.ndarray:
        """Number in the corpus of the document that each sequence begins in, (n,) int64."""
        return self._documents[self._span(ids, 1)[1]]

    def documents_of(self, sequence: int) -> list[str]:
        """Ids of the documents a sequence has tokens of, in order."""
        _, first, last = self._span([sequence], self.seq_len + 1)
        return [self.corpus.ids[index] for index in self._documents[first[0] : last[0] + 1]]

    def stretches_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Say which tokens of ``documents``, by their numbers in the corpus, which sequences have.

        Returns:
            (sequences, documents, first tokens, ends), (n,) int64 each, a row for each sequence that has tokens of a
            document; the last two are positions in the token file. Documents of no stream have none.
        """
        at = self._places_of(documents)
        codes = np.searchsorted(self._begins, self._starts[at], side="right") - 1
        begin, end = self._starts[at] - self._begins[codes], self._starts[at + 1] - self._begins[codes]
        first = np.maximum(0, -(-(begin - self.seq_len) // self.seq_len))  # a sequence has the next one's first token
        last = np.minimum(np.diff(self._first)[codes] - 1, (end - 1) // self.seq_len)
        counts = np.maximum(0, last - first + 1)
        rows = np.repeat(np.arange(len(at)), counts)
        inside = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows] + first[rows]
        starts = np.maximum(begin[rows], inside * self.seq_len)
        ends = np.minimum(end[rows], (inside + 1) * self.seq_len + 1)
        shift = self._begins[codes][rows] + self._shift(at)[rows]
        return self._first[codes][rows] + inside, self._documents[at][rows], starts + shift, ends + shift

    def _places_of(self, documents: np.ndarray) -> np.ndarray:
        """Find the places on the line of those of ``documents`` that are of a stream."""
        codes, found = self.corpus.domain_codes[documents], np.full(len(documents), -1, dtype=np.int64)
        for code, place in self._places.items():
            here = np.flatnonzero(codes == code)
            members = self._documents[place]  # in order
            at = np.searchsorted(members, documents[here]).clip(max=len(members) - 1)
            there = members[at] == documents[here]
            found[here[there]] = place.start + at[there]
        return found[found >= 0]

    def _shift(self, places: np.ndarray) -> np.ndarray:
        """Say how much further on in the token file than on the line documents lie, by their places on it."""
        return self.corpus.offsets_of(self._documents[places]) - self._starts[places]

    def evenly_spaced(self, n_per_domain: int) -> dict[str, np.ndarray]:
        """Numbers of evenly spaced sequences of each domain, at most ``n_per_domain``, always the same ones."""
        chosen = {}
        for code, name in enumerate(self.domains):
            available = int(self._first[code + 1] - self._first[code])
            taken = min(n_per_domain, available)
            chosen[name] = self._first[code] + (2 * np.arange(taken) + 1) * available // (2 * taken)
        return chosen

    def _checked(self, ids: np.ndarray | Items[int]) -> np.ndarray:
        numbers = np.asarray(ids, dtype=np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"sequence numbers must lie in [0, {len(self)})")
        return numbers

    def _span(self, ids: np.ndarray | Items[int], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position on the line of each sequence's first token, and the first and last document it touches."""
        numbers = self._checked(ids)
        codes = np.searchsorted(self._first, numbers, side="right") - 1
        begin = self._begins[codes] + (numbers - self._first[codes]) * self.seq_len
        first = np.searchsorted(self._starts, begin, side="right") - 1
        last = np.searchsorted(self._starts, begin + width - 1, side="right") - 1
        return begin, first, last
