"""Packing, the candidate stream and its buffers: arithmetic checked against plain loops."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.candidates import CandidateBuffer, CandidateStream, evaluation_buffers
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.permutation import permute
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

L = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequences")
    draw = random.Random(0)
    rows = []
    for i in range(300):
        text = "".join(draw.choice("abcdefgh ") for _ in range(draw.choice([1, 3, 15, 40, 90]))) + str(i)
        rows.append({"id": f"d{i}", "domain": draw.choice(["news", "code", "verse"]), "text": text})
    rows.append({"id": "short", "domain": "tiny", "text": "x"})
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = SplitRule(0.1, 0.1, wanted=("news",), seq_len=L)
    return Corpus.open(prepare([Source(folder / "s.jsonl")], folder / "c", vocab_size=257, rule=rule))


@pytest.fixture(scope="module")
def sequences(corpus):
    return Sequences(corpus, "pool", L)


def stream_of(corpus, split, domain):
    """(tokens, document id of each token) of one domain's stream, by a plain loop."""
    tokens, owners = [], []
    for i, name in enumerate(corpus.ids):
        if corpus.domains[corpus.domain_codes[i]] == domain and SPLITS[corpus.split_codes[i]] == split:
            start = corpus.offsets[i]
            tokens += corpus.tokens[start : start + corpus.lengths[i]].tolist()
            owners += [name] * int(corpus.lengths[i])
    return tokens, owners


def test_sequences_are_the_stream_of_each_domain_cut_up(corpus, sequences):
    assert sequences.domains == ["code", "news", "verse"]
    number = 0
    for code, domain in enumerate(sequences.domains):
        tokens, owners = stream_of(corpus, "pool", domain)
        count = (len(tokens) - 1) // L
        assert sequences.counts[domain] == count
        assert sequences.left_out[domain] == len(tokens) - (count * L + 1)
        for j in range(count):
            expected = tokens[j * L : j * L + L + 1]
            assert sequences.tokens([number]).tolist() == [expected]
            assert sequences.domain_of([number]).tolist() == [code]
            assert sequences.documents_of(number) == list(dict.fromkeys(owners[j * L : j * L + L + 1]))
            number += 1
    assert number == len(sequences)


def test_reading_many_in_any_order_and_only_their_start(sequences):
    ids = np.random.default_rng(0).permutation(len(sequences))
    together = sequences.tokens(ids)
    assert together.dtype == torch.int64
    assert together.shape == (len(sequences), L + 1)
    assert torch.equal(together, torch.cat([sequences.tokens([i]) for i in ids]))
    assert torch.equal(sequences.tokens(ids, length=5), together[:, :6])
    assert sequences.tokens([]).shape == (0, L + 1)
    for length in (0, L + 1):
        with pytest.raises(ValueError, match="length must lie in"):
            sequences.tokens(ids, length=length)
    for outside in (-1, len(sequences)):
        with pytest.raises(IndexError):
            sequences.tokens([outside])


def test_a_domain_that_fills_no_sequence(corpus, sequences):
    assert "tiny" not in sequences.domains
    assert sequences.left_out["tiny"] == 2
    with pytest.raises(
        DataError, match=r"domain 'tiny' has 2 tokens in split 'pool', too few .* seq_len = 16; use a sm"
    ):
        Sequences(corpus, "pool", L, domains=["news", "tiny"])
    with pytest.raises(DataError, match=r"no domain fills one sequence of seq_len = 100000 in split 'proxy'"):
        Sequences(corpus, "proxy", 100000)
    with pytest.raises(DataError, match="no domain 'prose'; it has: code, news, tiny, verse"):
        Sequences(corpus, "pool", L, domains=["prose"])
    with pytest.raises(DataError, match="no split 'train'; use one of: pool, proxy, validation"):
        Sequences(corpus, "train", L)


def test_a_sequence_needs_one_token_more_than_its_length(tmp_path):
    rows = [{"domain": f"d{size}", "text": "x" * (size - 1)} for size in (L, L + 1, 2 * L, 2 * L + 1)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus.open(prepare([Source(tmp_path / "s.jsonl")], tmp_path / "c", vocab_size=257, rule=SplitRule(0, 0)))
    sequences = Sequences(corpus, "pool", L)
    assert sequences.counts == {f"d{L + 1}": 1, f"d{2 * L}": 1, f"d{2 * L + 1}": 2}
    assert sequences.left_out == {f"d{L}": L, f"d{L + 1}": 0, f"d{2 * L}": L - 1, f"d{2 * L + 1}": 0}
    assert (sequences.tokens(range(len(sequences)))[:, :-1] == sequences.tokens([0])[0, 0]).all()


def test_numbers_mean_the_same_whatever_order_domains_are_named_in(corpus, sequences):
    one, two = (Sequences(corpus, "pool", L, domains=names) for names in (["verse", "code"], ["code", "verse"]))
    assert one.key == two.key != sequences.key
    assert torch.equal(one.tokens(range(len(one))), two.tokens(range(len(two))))


def test_the_proxy_split_holds_wanted_domains_only(corpus):
    assert Sequences(corpus, "proxy", L).domains == ["news"]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097])
def test_permutation_is_one_to_one_and_depends_on_its_key(n):
    image = permute(np.arange(n), n, "key")
    assert sorted(image.tolist()) == list(range(n))
    assert permute(np.array([n - 1]), n, "key")[0] == image[-1]
    if n > 16:
        assert (permute(np.arange(n), n, "other") != image).any()
        assert (image != np.arange(n)).any()


@pytest.mark.slow
def test_permutation_spreads_evenly():
    n, keys = 12, 6000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, str(key))] += 1
    chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi_square < 121 + 6 * np.sqrt(2 * 121)  # 121 degrees of freedom, six standard deviations


def test_permutation_reaches_large_ranges():
    n = 10**15 + 7
    image = permute(np.arange(1000), n, "key")
    assert len(set(image.tolist())) == 1000
    assert image.min() >= 0
    assert image.max() < n
    assert image.mean() == pytest.approx(n / 2, rel=0.1)


def test_every_sequence_once_per_epoch_across_buffers(sequences):
    n = len(sequences)
    size = 7
    assert n % size, "the test wants buffers that straddle epochs"
    stream = CandidateStream(sequences, size, seed=3)
    buffers = [stream.at(step) for step in range(2 * n // size + 1)]
    run = np.concatenate([buffer.sequence_ids for buffer in buffers])
    assert sorted(run[:n]) == sorted(run[n : 2 * n]) == list(range(n))
    assert (run[:n] != run[n : 2 * n]).any()
    ids = torch.cat([buffer.ids for buffer in buffers])
    assert len(set(ids.tolist())) == len(ids)
    np.testing.assert_array_equal(ids.numpy() % n, run)
    np.testing.assert_array_equal(ids.numpy() // n, np.arange(len(run)) // n)


def test_a_buffer_is_a_function_of_seed_purpose_and_step(corpus, sequences):
    def at(step, seed=3, purpose="candidates", over=sequences):
        return CandidateStream(over, 20, seed, purpose).at(step).sequence_ids.tolist()

    assert at(5) == at(5, over=Sequences(corpus, "pool", L))
    others = [at(6), at(5, seed=4), at(5, purpose="proxy"), at(5, over=Sequences(corpus, "pool", L - 1))]
    assert all(other != at(5) for other in others)


def test_a_buffer_is_drawn_once_while_it_is_among_the_latest_two(sequences, monkeypatch):
    stream, drawn, draw = CandidateStream(sequences, 5, 0, steps_per_buffer=2), [], CandidateStream._draw
    expected = [CandidateStream(sequences, 5, 0).at(buffer).ids for buffer in range(33)]
    monkeypatch.setattr(CandidateStream, "_draw", lambda self, buffer: drawn.append(buffer) or draw(self, buffer))
    for step in (0, 1, 2, 0, 3, 64, 65, 2, 0):
        np.testing.assert_array_equal(stream.at(step).ids, expected[step // 2])
    assert drawn == [0, 1, 32, 0]


def test_buffers_of_another_size_follow_the_same_run(sequences):
    small = [CandidateStream(sequences, 5, 0).at(step).ids for step in range(4)]
    assert torch.equal(torch.cat(small), CandidateStream(sequences, 20, 0).at(0).ids)


def test_a_buffer_larger_than_the_split_has_unique_ids(sequences):
    buffer = CandidateStream(sequences, 3 * len(sequences) + 1, 0).at(1)
    assert len(set(buffer.ids.tolist())) == len(buffer)
    assert max(Counter(buffer.sequence_ids.tolist()).values()) <= 4


def test_no_candidates(sequences):
    with pytest.raises(DataError, match="a buffer of 0 candidates"):
        CandidateStream(sequences, 0, 0)


def test_taking_from_a_buffer(sequences):
    buffer = CandidateStream(sequences, 24, 1).at(2)
    picked = torch.tensor([20, 3, 11])
    part = buffer.take(picked)
    assert len(part) == 3
    assert torch.equal(part.ids, buffer.ids[picked])
    assert torch.equal(part.batch(), buffer.batch()[picked])
    assert torch.equal(part.batch(4), buffer.batch()[picked][:, :5])
    assert part.domain_names == sequences.domains
    np.testing.assert_array_equal(part.domains, buffer.domains[picked.numpy()])
    part.ids[0] = -1
    assert buffer.ids.min() >= 0


def test_share_of_each_domain(sequences):
    counts = list(sequences.counts.values())
    ids = np.array([0, counts[0], counts[0] + 1, counts[0] + counts[1]])
    share = CandidateBuffer(sequences, ids, ids).share()
    assert share == {"code": 0.25, "news": 0.5, "verse": 0.25}


def test_fixed_sequences_are_spread_over_each_domain(sequences):
    fixed = evaluation_buffers(sequences, 4)
    start = 0
    for code, (name, count) in enumerate(sequences.counts.items()):
        chosen = fixed[name].sequence_ids - start
        assert set(fixed[name].domains) == {code}
        quarters = [int(4 * place / count) for place in chosen]
        assert quarters == [0, 1, 2, 3]
        start += count
    everything = evaluation_buffers(sequences, 10**6)
    assert sorted(np.concatenate([buffer.sequence_ids for buffer in everything.values()])) == list(range(start))
