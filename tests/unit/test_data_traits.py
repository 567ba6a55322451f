"""Traits of sequences against plain loops; their files are made once, whole or not at all."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megaopus.data import traits
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.data.traits import SequenceTraits, ensure_traits, exact_signature, near_signature
from megaopus.errors import DataError

SEQ_LEN = 32


@pytest.fixture(scope="module")
def pool(tiny_corpus: Path) -> Sequences:
    return Sequences(Corpus.open(tiny_corpus), "pool", SEQ_LEN)


@pytest.fixture(scope="module")
def proxy(tiny_corpus: Path) -> Sequences:
    return Sequences(Corpus.open(tiny_corpus), "proxy", SEQ_LEN, ["docs"])


@pytest.fixture(scope="module")
def folder(pool: Sequences, proxy: Sequences, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_traits(pool, proxy, str(tmp_path_factory.mktemp("traits")), Console(quiet=True))


def buckets(tokens: list[int]) -> tuple[list[int], list[int]]:
    """Hashed uni- and bigrams of one sequence."""
    row = np.array([tokens], dtype=np.uint64)
    uni, bi = traits._hashed(row)
    return uni[0].tolist(), bi[0].tolist()


def counted(sequences: Sequences) -> tuple[Counter[int], Counter[int]]:
    uni, bi = Counter[int](), Counter[int]()
    for row in sequences.tokens(np.arange(len(sequences))).tolist():
        first, second = buckets(row)
        uni.update(first)
        bi.update(second)
    return uni, bi


def test_log_odds_are_those_of_a_plain_count(pool: Sequences, proxy: Sequences, folder: Path) -> None:
    found = SequenceTraits(pool, folder).log_odds(torch.arange(len(pool)))
    target, whole = counted(proxy), counted(pool)
    expected = []
    for tokens in pool.tokens(np.arange(len(pool))).tolist():
        total = 0.0
        for kind, hashes in enumerate(buckets(tokens)):
            odds = [
                math.log((target[kind][h] + 1) / (target[kind].total() + traits.BUCKETS))
                - math.log((whole[kind][h] + 1) / (whole[kind].total() + traits.BUCKETS))
                for h in hashes
            ]
            total += sum(odds) / len(odds)
        expected.append(total)
    by_hand = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, (by_hand - by_hand.mean()) / by_hand.std(correction=0), rtol=1e-4, atol=1e-4)
    wanted = torch.from_numpy(pool.domain_of(np.arange(len(pool))) == pool.domains.index("docs"))
    assert found[wanted].mean() > found[~wanted].mean() + 0.5


def test_features_of_like_text_are_alike_and_blocks_stand_side_by_side(pool: Sequences, folder: Path) -> None:
    ids = torch.arange(0, len(pool), 3)
    whole = SequenceTraits(pool, folder).features(ids)
    parts = [SequenceTraits(pool, folder, [block]).features(ids) for block in traits.BLOCKS]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    ngrams, domain, likelihood, shape = parts
    assert ngrams.norm(dim=1).mean() == pytest.approx(1, abs=0.1)
    assert torch.equal(domain.argmax(dim=1), SequenceTraits(pool, folder).domains(ids))
    assert domain.sum() == len(ids)
    assert torch.cat([likelihood, shape], 1).std(dim=0) == pytest.approx([1] * 6, abs=0.3)
    again = SequenceTraits(pool, folder).features(ids + 5 * len(pool))  # ids of a later epoch
    assert torch.equal(again, whole)


def test_signatures_tell_copies_from_neighbours() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, (200, 33)).astype(np.uint64)
    copies = tokens[::-1].copy()
    copies[5, 7] += np.uint64(1)
    exact, others = exact_signature(tokens), exact_signature(copies)[::-1]
    assert len(set(exact.tolist())) == 200
    assert [i for i in range(200) if exact[i] != others[i]] == [194]
    assert exact_signature(np.roll(tokens, 1, axis=1))[0] != exact[0]  # places count
    shifted = np.concatenate([tokens[:, 4:], tokens[:, :4]], axis=1)  # 18 of 33 - 7 shingles of the two are shared
    shared = (near_signature(tokens) == near_signature(shifted)).mean()
    assert 0.55 < shared < 0.85
    assert (near_signature(tokens) == near_signature(np.roll(tokens, 1, axis=0))).mean() == 0


def test_files_are_made_once_and_belong_to_pool_and_proxy(
    pool: Sequences, proxy: Sequences, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = str(folder.parent)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure_traits(pool, proxy, parent, Console(quiet=True)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert traits.traits_folder(pool, pool, parent) != folder
    other = Sequences(pool.corpus, "pool", SEQ_LEN // 2)
    with pytest.raises(DataError, match="delete its folder"):
        SequenceTraits(other, folder)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "near.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"near\.npy: cannot be read"):
        SequenceTraits(pool, broken)
    monkeypatch.setattr(traits, "_sketch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure_traits(pool, proxy, str(tmp_path / "new"), Console(quiet=True))
    assert not any((tmp_path / "new").iterdir())
