"""Weighted domains as arithmetic: counts by formula are counts by counting; no change loses or repeats a sequence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megaopus.data import mixture
from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.mixture import Mixture, Stage, continued, count_below, parse_stages, plain, reversed_bits
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

DOMAINS = ["a", "b", "c"]


def stages(*given: tuple[int, dict[str, float]]) -> list[Stage]:
    return parse_stages([list(entry) for entry in given])


@pytest.mark.parametrize("bits", [3, 5, 24])
def test_counts_by_formula_are_counts_by_counting(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "_BITS", bits)
    size = 1 << bits
    bounds = np.array([0, 1, size // 3, size // 2, size - 1, size])
    values = reversed_bits(np.arange(200) % size, bits)
    assert sorted(reversed_bits(np.arange(min(size, 32)), min(bits, 5)).tolist()) == list(range(min(size, 32)))
    for count in (0, 1, 2, 7, 64, 65, 199):
        expected = [(values[:count] < bound).sum() for bound in bounds]
        assert count_below(count, bounds).tolist() == expected


CHANGING = stages(
    (0, {"a": 5, "b": 3, "c": 2}), (7, {"b": 1}), (11, {"a": 0.001, "c": 1}), (30, {"a": 1, "b": 1, "c": 1})
)


@pytest.mark.parametrize("steps_per_buffer", [1, 4])
def test_places_of_each_domain_are_counted_without_a_gap(steps_per_buffer: int) -> None:
    mixed = Mixture(CHANGING, DOMAINS, 10, steps_per_buffer)
    seen = np.zeros(3, dtype=int)
    for buffer in range(40):
        assert mixed.drawn(buffer).tolist() == seen.tolist()
        domains, ranks = mixed.at(buffer)
        assert len(domains) == 10
        for domain in range(3):
            here = ranks[domains == domain]
            assert here.tolist() == list(range(seen[domain], seen[domain] + len(here)))
            seen[domain] += len(here)


def test_shares_follow_the_weights_closely_at_any_point() -> None:
    mixed = Mixture(stages((0, {"a": 5, "b": 3, "c": 2})), DOMAINS, 7)
    for buffer in (1, 3, 10, 100, 12345):
        assert np.abs(mixed.drawn(buffer) - buffer * 7 * np.array([0.5, 0.3, 0.2])).max() < 4
    only = Mixture(CHANGING, DOMAINS, 10).at(8)[0]
    assert set(only.tolist()) == {1}


def test_what_was_drawn_stays_as_it_was_drawn() -> None:
    first = stages((0, {"a": 1}), (4, {"b": 1}), (20, {"c": 1}))
    other = stages((0, {"c": 3, "a": 1}), (12, {"b": 1}))
    assert plain(continued(first, first, 9)) == plain(first)
    assert plain(continued(first, other, 9)) == [
        [0, {"a": 1.0}],
        [4, {"b": 1.0}],
        [9, {"c": 3.0, "a": 1.0}],
        [12, {"b": 1.0}],
    ]
    again = continued(first, other, 9)
    assert plain(continued(again, other, 10)) == plain(again)  # the same command once more
    assert plain(continued(again, other, 15)) == plain(again)


@pytest.fixture(scope="module")
def pool(tiny_corpus: Path) -> Sequences:
    return Sequences(Corpus.open(tiny_corpus), "pool", 16)


def test_a_change_of_weights_neither_repeats_nor_loses_a_sequence(pool: Sequences) -> None:
    names = pool.domains
    assert len(names) > 1
    chosen = stages((0, {names[0]: 2, names[1]: 1}), (5, {names[0]: 1}), (9, {names[1]: 1}))
    stream = CandidateStream(pool, 12, 3, stages=chosen)
    steps = 40
    buffers = [stream.at(step) for step in range(steps)]
    ids = np.concatenate([buffer.ids.numpy() for buffer in buffers])
    assert len(set(ids.tolist())) == len(ids)
    numbers = np.concatenate([buffer.sequence_ids for buffer in buffers])
    np.testing.assert_array_equal(ids % len(pool), numbers)
    epochs = stream.epochs(steps)
    domains = pool.domain_of(numbers)
    for index, (name, count) in enumerate(pool.counts.items()):
        drawn = Counter(numbers[domains == index].tolist())
        assert epochs[name] == pytest.approx(drawn.total() / count)
        if drawn:  # each as often as any other, or once more
            least = min(drawn.values()) if len(drawn) == count else 0
            assert max(drawn.values()) <= least + 1
    assert stream.at(7).share()[names[0]] == 1.0
    np.testing.assert_array_equal(stream.at(21).ids, CandidateStream(pool, 12, 3, stages=chosen).at(21).ids)
    assert CandidateStream(pool, 12, 3).epochs(steps)[names[0]] == pytest.approx(12 * steps / len(pool))


def test_one_domain_alone_is_that_domains_permutation_at_any_buffer_size(pool: Sequences) -> None:
    alone = stages((0, {pool.domains[1]: 1}))
    small = np.concatenate([CandidateStream(pool, 4, 3, stages=alone).at(step).ids for step in range(6)])
    np.testing.assert_array_equal(small, CandidateStream(pool, 24, 3, stages=alone).at(0).ids)


def test_a_domain_without_sequences_is_refused(pool: Sequences) -> None:
    with pytest.raises(DataError, match="no sequences of domain 'nowhere'; there are"):
        CandidateStream(pool, 4, 3, stages=stages((0, {"nowhere": 1})))
    CandidateStream(pool, 4, 3, stages=stages((0, {"nowhere": 0, pool.domains[0]: 1})))


MISTAKES = {
    "[1]": ([1], "1 is not a pair"),
    "step": ([["x", {"a": 1}]], "'x' is not a step"),
    "order": ([[0, {"a": 1}], [0, {"a": 2}]], "step 0 does not come after step 0"),
    "late": ([[3, {"a": 1}]], "the first stage begins at step 3, not 0"),
    "negative": ([[0, {"a": -1}]], "the weight of a is -1"),
    "nothing": ([[0, {"a": 0}]], "no weight is above 0 from step 0 on"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    given, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        parse_stages(given)
