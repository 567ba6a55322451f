"""TextFeatures of sequences against plain loops; their files are made once, whole or not at all."""

from __future__ import annotations

import errno
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megaopus.data import feature_numbers, feature_work, text_features
from megaopus.data.corpus import Corpus
from megaopus.data.feature_numbers import exact_signature, near_signature
from megaopus.data.sequences import Sequences
from megaopus.data.text_features import SequenceTextFeatures, ensure_text_features
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
    return ensure_text_features(pool, proxy, str(tmp_path_factory.mktemp("traits")), Console(quiet=True))


def buckets(tokens: list[int]) -> tuple[list[int], list[int]]:
    """Hashed uni- and bigrams of one sequence."""
    row = np.array([tokens], dtype=np.uint64)
    uni, bi = feature_numbers.hashed(row)
    return uni[0].tolist(), bi[0].tolist()


def counted(sequences: Sequences, rows: Iterable[int] | None = None) -> tuple[Counter[int], Counter[int]]:
    uni, bi = Counter[int](), Counter[int]()
    for row in sequences.tokens(np.array(range(len(sequences)) if rows is None else rows)).tolist():
        first, second = buckets(row)
        uni.update(first)
        bi.update(second)
    return uni, bi


@pytest.mark.slow
def test_log_odds_are_those_of_a_plain_count(pool: Sequences, proxy: Sequences, folder: Path) -> None:
    found = SequenceTextFeatures(pool, folder).log_odds(torch.arange(len(pool)))
    target, whole = counted(proxy), counted(pool)
    expected = []
    for tokens in pool.tokens(np.arange(len(pool))).tolist():
        total = 0.0
        for kind, hashes in enumerate(buckets(tokens)):
            odds = [
                math.log((target[kind][h] + 1) / (target[kind].total() + feature_numbers.BUCKETS))
                - math.log((whole[kind][h] + 1) / (whole[kind].total() + feature_numbers.BUCKETS))
                for h in hashes
            ]
            total += sum(odds) / len(odds)
        expected.append(total)
    by_hand = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    wanted = torch.from_numpy(pool.domain_of(np.arange(len(pool))) == pool.domains.index("docs"))
    assert found[wanted].mean() > found[~wanted].mean() + 0.25  # nats a token


def described(sequences: Sequences, row: int, others: list[tuple[Counter[int], Counter[int]]]) -> list[float]:
    """The numbers of one sequence, under counts of the proxy and of the pool."""
    uni, bi = buckets(sequences.tokens(np.array([row]))[0].tolist())

    def log_p(counts: Counter[int], bucket: int) -> float:
        return math.log((counts[bucket] + 1) / (counts.total() + feature_numbers.BUCKETS))

    found = []
    for unigrams, bigrams in others:
        first, both = [log_p(unigrams, h) for h in uni], [log_p(bigrams, h) for h in bi]
        following = [pair - one for pair, one in zip(both, first, strict=False)]
        found += [sum(each) / len(each) for each in (first, both, following)]
    return [*found, len(set(uni)) / len(uni), len(set(bi)) / len(bi)]


@pytest.mark.slow
def test_importance_is_a_classifier_s_log_odds_and_no_text_is_described_by_its_own_counts(
    pool: Sequences, proxy: Sequences, folder: Path
) -> None:
    sides = (proxy, pool)
    documents = [each.first_document_of(np.arange(len(each))).tolist() for each in sides]
    half_of = [[sorted(set(found)).index(document) % 2 for document in found] for found in documents]
    counts = [
        [counted(each, [row for row, h in enumerate(of) if h == half]) for each, of in zip(sides, half_of, strict=True)]
        for half in (0, 1)
    ]
    numbers = [
        torch.tensor([described(each, row, counts[1 - half]) for row, half in enumerate(of)], dtype=torch.float64)
        for each, of in zip(sides, half_of, strict=True)
    ]
    mean, std = numbers[1].mean(dim=0), numbers[1].std(dim=0, correction=0)
    z = [((each - mean) / std).clamp(-4, 4) for each in numbers]
    wanted, other = (torch.cat([each, each**2, torch.ones(len(each), 1)], dim=1) for each in z)
    weights = torch.zeros(17, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        softplus = torch.nn.functional.softplus
        value = softplus(-wanted @ weights).sum() + len(wanted) / len(other) * softplus(other @ weights).sum()
        value = value + weights[:-1].square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    found = SequenceTextFeatures(pool, folder).importance(torch.arange(len(pool)))
    most = float((wanted @ weights).detach().quantile(0.5))
    torch.testing.assert_close(found, (other @ weights).detach().clamp_max(most), rtol=1e-3, atol=1e-3)
    is_wanted = torch.from_numpy(pool.domain_of(np.arange(len(pool))) == pool.domains.index("docs"))
    assert found[is_wanted].mean() > found[~is_wanted].mean() + 0.25


def test_a_pool_like_the_proxy_has_no_important_sequences(pool: Sequences, tmp_path: Path) -> None:
    folder = ensure_text_features(pool, pool, str(tmp_path), Console(quiet=True))
    assert SequenceTextFeatures(pool, folder).importance(torch.arange(len(pool))).abs().max() < 1e-6


def test_features_of_like_text_are_alike_and_blocks_stand_side_by_side(pool: Sequences, folder: Path) -> None:
    ids = torch.arange(0, len(pool), 3)
    whole = SequenceTextFeatures(pool, folder).features(ids)
    parts = [SequenceTextFeatures(pool, folder, [block]).features(ids) for block in text_features.BLOCKS]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    ngrams, domain, likelihood, shape = parts
    assert ngrams.norm(dim=1).mean() == pytest.approx(1, abs=0.1)
    assert torch.equal(domain.argmax(dim=1), SequenceTextFeatures(pool, folder).domains(ids))
    assert domain.sum() == len(ids)
    assert torch.cat([likelihood, shape], 1).std(dim=0) == pytest.approx([1] * 8, abs=0.3)
    again = SequenceTextFeatures(pool, folder).features(ids + 5 * len(pool))  # ids of a later epoch
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


def read_only(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_files_are_made_once_and_belong_to_pool_and_proxy(
    pool: Sequences, proxy: Sequences, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = str(folder.parent)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure_text_features(pool, proxy, parent, Console(quiet=True)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert text_features.text_features_folder(pool, pool, parent) != folder
    other = Sequences(pool.corpus, "pool", SEQ_LEN // 2)
    with pytest.raises(DataError, match="delete its folder"):
        SequenceTextFeatures(other, folder)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "near.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"near\.npy: cannot be read"):
        SequenceTextFeatures(pool, broken)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(
            DataError, match=r"cannot be written .*Read-only.*; set data\.text_features_path to a folder"
        ):
            ensure_text_features(pool, Sequences(pool.corpus, "validation", SEQ_LEN), None, Console(quiet=True))
    monkeypatch.setattr(feature_work, "sketched", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure_text_features(pool, proxy, str(tmp_path / "new"), Console(quiet=True))
    assert not any((tmp_path / "new").iterdir())
