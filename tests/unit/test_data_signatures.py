"""Signatures that preparation leaves in a corpus: those of its tokens, for the sequences that they were made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megaopus.corpus_tools.benchmark_proxy import Limits, build
from megaopus.corpus_tools.nearest_documents import Item
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.signatures import token_signatures, write_signatures
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.candidates import CandidateBuffer, CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.data.signatures import read_signatures, signatures_path
from megaopus.errors import DataError
from megaopus.selection import guards
from tests.unit.test_data_loss_mask import rows, write

SEQ_LEN = 24
WORD = (1 << 64) - 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One whose loss leaves out some of the tokens."""
    folder = tmp_path_factory.mktemp("signed")
    source = Source(write(folder / "rows.jsonl", rows(90)), fields=Fields(loss_spans="spans"))
    rule = SplitRule(0.2, 0.1, seq_len=SEQ_LEN)
    return Corpus.open(prepare([source], folder / "corpus", vocab_size=300, rule=rule))


def mixed(value: int) -> int:
    """The splitmix64 generator's first output from state ``value`` times its increment less one."""
    value = value * 0x9E3779B97F4A7C15 & WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def test_preparation_signs_the_tokens_that_a_run_reads(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """With marks of what is outside the loss, in every epoch, whoever hashes; and buffers know it unread."""
    pool = Sequences(corpus, "pool", SEQ_LEN)
    assert corpus.masked
    signed = read_signatures(pool)
    assert signed is not None
    stream = CandidateStream(pool, 2 * len(pool) // 3, 0, signatures=signed)
    batches = [stream.at(step).batch() for step in range(3)]
    hashed = [sum(mixed(t + (at << 32) & WORD) for at, t in enumerate(row)) for row in batches[1].tolist()]
    expected = [mixed(total & WORD) for total in hashed]
    monkeypatch.setattr(Sequences, "read", None)  # nothing reads from here on
    for step, batch in enumerate(batches):
        assert torch.equal(stream.at(step).signatures, guards.token_signatures(batch))  # type: ignore[arg-type]
        np.testing.assert_array_equal(token_signatures(batch.numpy()), guards.token_signatures(batch).numpy())
    assert [value & WORD for value in stream.at(1).signatures.tolist()] == expected  # type: ignore[union-attr]
    few = torch.tensor([4, 0, 4])
    assert torch.equal(stream.at(2).take(few).signatures, stream.at(2).signatures[few])  # type: ignore
    assert CandidateBuffer(pool, np.arange(2), np.arange(2)).signatures is None


def test_long_batches_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(-5, 1 << 20, (50, 7), generator=torch.Generator().manual_seed(0))
    whole = guards.token_signatures(tokens)
    for module in ("megaopus.selection.guards", "megaopus.corpus_tools.signatures"):
        monkeypatch.setattr(f"{module}._CACHED", 20)
    assert torch.equal(guards.token_signatures(tokens), whole)
    assert token_signatures(tokens.numpy()).tolist() == whole.tolist()


def test_they_are_of_one_pool_and_length(corpus: Corpus, tmp_path: Path) -> None:
    assert read_signatures(Sequences(corpus, "pool", SEQ_LEN - 1)) is None
    items = [Item(str(n), f"Question {n}: what is so blue? Answer {n}: the ether.") for n in range(5)]
    built = Corpus.open(build(corpus, items, tmp_path / "out", tokens=300, limits=Limits()).path)
    pool, other = Sequences(corpus, "pool", SEQ_LEN), Sequences(built, "pool", SEQ_LEN)
    assert len(other) != len(pool)
    found = read_signatures(other)
    assert found is not None
    whole = CandidateBuffer(other, np.arange(len(other)), np.arange(len(other)))
    assert found.tolist() == guards.token_signatures(whole.batch()).tolist()
    done: list[int] = []
    write_signatures(other, 3, done.append)
    assert sum(done) == len(other)
    np.testing.assert_array_equal(read_signatures(other), found)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_broken_file_says_what_to_do(content: bytes | None, corpus: Corpus, tmp_path: Path) -> None:
    pool = Sequences(corpus, "pool", SEQ_LEN - 2)
    path = signatures_path(pool)
    if content is None:
        np.save(path, np.zeros(3, dtype=np.int64))
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: .*delete it, runs work without it"):
        read_signatures(pool)
    path.unlink()
