"""Measures how well a model foretells text, by domain: as a run's validation does on a corpus, and on plain files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.data.candidates import CandidateBuffer, evaluation_buffers
from megaopus.data.corpus import MANIFEST, SPLIT_NAMES, TARGET, Corpus
from megaopus.data.sequences import Sequences
from megaopus.engine.base import Engine
from megaopus.engine.gpt_forward import SequenceRules
from megaopus.errors import DataError
from megaopus.evaluation.model import Found
from megaopus.huggingface.tokenizer import check_tokenizer
from megaopus.selection.backend import Candidates

LENGTH = 1024
"""Tokens of a sequence for a model that no run of ours says it of, at most."""
_ALL = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Holds what came of one domain."""

    corpus: str
    split: str | None
    domain: str
    length: int
    """Tokens of a sequence."""
    sequences: int
    tokens: int
    """Labels, those that do not count in the loss included."""
    nats_per_token: float
    """Mean over the sequences of their mean token losses, as a validation has it."""
    stderr: float | None
    """Of that mean, over the sequences."""
    bits_per_byte: float | None
    """The same by the bytes of the domain's text, of which a token has so many on average."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Names text that is read: sequences by domain, and how many bytes a token of each domain stands for."""

    name: str
    split: str | None
    buffers: dict[str, Candidates]
    bytes_per_token: dict[str, float]
    masked: bool
    end: int
    length: int


def length_of(found: Found, asked: int | None) -> int:
    """Say how long sequences are: as asked for, as the run has them, else ``LENGTH``.

    Raises DataError for more than the model has positions.
    """
    usual = min(found.max_length, LENGTH) if found.run is None else found.run.data.seq_len
    if asked is not None and not 0 < asked <= found.max_length:
        raise DataError(f"--length {asked}: {found.path} reads 1 to {found.max_length:,} tokens")
    return asked or usual


def open_texts(place: Path, found: Found, length: int, limit: int | None) -> list[Text]:
    """Open a corpus (its validation split, and what its proxy held out as the target), or files of text, whole.

    ``limit``: sequences of a domain, at most, spread evenly. Raises DataError or ModelError: it cannot be read, has
    other tokens than the model, or no whole sequence.
    """
    if not (place / MANIFEST).is_file():
        return [_of_files(place, found, length, limit)]
    corpus = Corpus.open(place)
    texts = [_of_corpus(corpus, "validation", found, length, limit)]
    if corpus.target is not None:
        texts.append(_of_corpus(corpus.target, TARGET, found, length, limit))
    return texts


def _of_corpus(corpus: Corpus, split: str, found: Found, length: int, limit: int | None) -> Text:
    check_tokenizer(found.words.folder, corpus)
    sequences = Sequences(corpus, split, length)
    buffers: dict[str, CandidateBuffer] = evaluation_buffers(sequences, limit or _ALL)
    in_split = corpus.split_codes == SPLIT_NAMES.index(split)
    rates = {}
    for domain in buffers:
        members = np.flatnonzero(in_split & (corpus.domain_codes == corpus.domains.index(domain)))
        size = sum(len(text.encode("utf-8")) for text in corpus.texts(members))
        rates[domain] = size / int(corpus.lengths[members].sum())
    return Text(
        name=str(corpus.path),
        split=split,
        buffers=dict(buffers),
        bytes_per_token=rates,
        masked=corpus.masked,
        end=corpus.eod_id,
        length=length,
    )


def _of_files(place: Path, found: Found, length: int, limit: int | None) -> Text:
    """Encode the documents of files, each ended by the model's token for that, one domain after the other."""
    tokens: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for document in SourceReader(Source.parse(str(place))):
        encoded = found.words.tokenizer.encode(document.text, add_special_tokens=False).ids
        tokens.setdefault(document.domain, []).extend([*encoded, found.words.end])
        sizes[document.domain] = sizes.get(document.domain, 0) + len(document.text.encode("utf-8"))
    buffers: dict[str, Candidates] = {}
    for domain, ids in tokens.items():
        count = (len(ids) - 1) // length
        if not count:
            raise DataError(
                f"{place}: domain {domain!r} has {len(ids):,} tokens, no sequence of {length}; give a smaller --length"
            )
        rows = (2 * np.arange(taken := min(limit or count, count)) + 1) * count // (2 * taken)
        whole = torch.tensor(ids[: count * length + 1])
        starts = torch.from_numpy(rows).unsqueeze(1) * length
        buffers[domain] = Rows(whole[starts + torch.arange(length + 1)])
    rates = {domain: sizes[domain] / len(ids) for domain, ids in tokens.items()}
    words = found.words
    return Text(
        name=str(place), split=None, buffers=buffers, bytes_per_token=rates, masked=False, end=words.end, length=length
    )


class Rows:
    """Holds sequences (n, T + 1) as candidates."""

    def __init__(self, tokens: Tensor):
        self._tokens = tokens
        self.ids = torch.arange(len(tokens))

    def __len__(self) -> int:
        return len(self._tokens)

    def take(self, indices: Tensor) -> Rows:
        return Rows(self._tokens[indices])

    def batch(self, length: int | None = None) -> Tensor:
        return self._tokens if length is None else self._tokens[:, : length + 1]


def measure(text: Text, engine: Engine, found: Found, advance: Callable[[int], None]) -> Iterator[Perplexity]:
    """Yield the loss on each domain; of a corpus the same as a run's validation has. Collective.

    The engine goes on with the text's length of sequences and rules. ``advance`` is told sequences.
    """
    data = None if found.run is None else found.run.data
    engine.micro_batch_size = max(1, engine.micro_batch_size * engine.seq_len // text.length)
    engine.seq_len = text.length
    engine.rules = SequenceRules(
        document_end=text.end,
        isolated=data is not None and data.document_mask,
        skip_first=data is not None and not data.first_token_loss,
        marked=text.masked,
    )
    for domain, buffer in text.buffers.items():
        losses = engine.evaluate(buffer)
        count, mean = len(losses), float(losses.mean())
        spread = float(losses.std()) / math.sqrt(count) if count > 1 else None
        bits = mean / math.log(2) / text.bytes_per_token[domain]
        advance(count)
        yield Perplexity(
            corpus=text.name,
            split=text.split,
            domain=domain,
            length=text.length,
            sequences=count,
            tokens=count * text.length,
            nats_per_token=mean,
            stderr=spread,
            bits_per_byte=None if text.masked else bits,
        )
