"""Exposure, copies, domain floors and alarms: what is kept out, when, and that a resumed count goes on."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import Tensor

from megaopus.selection import Selection, SelectionConfig, Selector, TensorCandidates
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.guards import Exposure, quotas, token_signatures
from tests.unit.test_selection_prescreen import LinearTraits

K = 4


class ByTable:
    """A backend that knows losses alone: those of a table; a candidate's batch is its row of tokens."""

    rank, world_size, multiple, device, computes_in_16_bits = 0, 1, 1, torch.device("cpu"), False

    def losses(self, candidates, **passes) -> Tensor:
        return candidates.batch()[:, -1].double()

    def sum_over_ranks(self, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        return parts, tally

    def from_rank_0(self, values: Tensor) -> Tensor:
        return values


def selector(text_features=None, sampler="top_k", **guards) -> Selector:
    """Picks the K largest last tokens."""
    off = {"min_ess": 0, "min_distinct": 0, "min_unique": 0}
    config = SelectionConfig(method="high_ppl", sampler=sampler, guards=GuardConfig(**{**off, **guards}))
    return Selector(config, ByTable(), num_selected=K, proxy=None, seed=0, text_features=text_features)  # type: ignore[arg-type]


def sentences(selection: Selection) -> list[str]:
    return [str(event) for event in selection.events]


def rows(values: list[int], width: int = 6, seed: int = 0) -> Tensor:
    """A sequence for each value: random tokens that depend on the value, the value last."""
    found = []
    for value in values:
        generator = torch.Generator().manual_seed(seed + value)
        found.append(torch.cat([torch.randint(0, 90, (width,), generator=generator), torch.tensor([value])]))
    return torch.stack(found)


# -- exposure ----------------------------------------------------------------------------------------------------------


def test_a_sequence_is_trained_on_once_in_a_window_of_steps() -> None:
    chosen = selector(exposure_window=2)
    candidates = rows(list(range(12)))
    picks = [sorted(candidates[chosen.select(candidates, step).indices, -1].tolist()) for step in range(5)]
    assert picks[:3] == [[8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert picks[3:] == [[8, 9, 10, 11], [4, 5, 6, 7]]  # the third step after they may come again


def test_a_cap_of_two_allows_two() -> None:
    chosen = selector(exposure_cap=2)
    candidates = rows(list(range(12)))
    picks = Counter(candidates[chosen.select(candidates, step).indices, -1].sum().item() for step in range(4))
    assert picks == {38: 2, 22: 2}


def test_copies_in_one_buffer_count_as_one_sequence() -> None:
    candidates = rows([50, 50, 50, 50, 7, 6, 5, 4])
    picked = candidates[selector().select(candidates, 0).indices, -1].tolist()
    assert sorted(picked) == [5, 6, 7, 50]
    lifted = selector().select(rows([50] * 6 + [1, 2]), 0)
    assert "cap lifted to 2" in str(lifted.events[0])
    assert len(lifted.indices) == K


def test_an_exhausted_pool_goes_on_with_what_was_trained_on_least() -> None:
    chosen = selector()
    candidates = rows(list(range(6)))
    first = chosen.select(candidates, 0)
    second = chosen.select(candidates, 1)
    assert not first.events
    assert "cap lifted to 2" in str(second.events[0])
    assert candidates[second.indices, -1].tolist() == [0, 1, 4, 5]  # the new ones, then the best
    assert candidates[chosen.select(candidates, 2).indices, -1].tolist() == [0, 1, 2, 3]


def test_exposures_go_through_json() -> None:
    straight, first = Exposure(4), Exposure(4)
    steps = [torch.tensor([2**62, -5, 7]), torch.tensor([7]), torch.tensor([8, 8])]
    for step, found in enumerate(steps):
        straight.record(step, found)
        first.record(step, found)
    second = Exposure(4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    asked, ids = torch.tensor([7, 8, -5, 2**62, 9, 7]), torch.tensor([3, 1, 2, 0, 4, 5])
    for step in range(3, 8):
        assert second.times(asked, ids).tolist() == straight.times(asked, ids).tolist()
        if step == 3:
            assert straight.times(asked, ids).tolist() == [3, 3, 2, 2, 1, 4]
        for each in (straight, second):
            each.record(step, torch.tensor([9]))
    assert straight.times(asked, ids).tolist() == [1, 1, 1, 1, 5, 2]


def test_signatures_of_tokens_count_every_place() -> None:
    tokens = torch.randint(0, 3, (500, 9), generator=torch.Generator().manual_seed(0)).unique(dim=0)
    assert len(token_signatures(tokens).unique()) == len(tokens)
    assert torch.equal(token_signatures((tokens, tokens)), token_signatures(tokens))
    floats = torch.tensor([[0.25, 0.5], [0.5, 0.25], [0.25, 0.5]])
    assert token_signatures(floats).unique().numel() == 2


class Signed:
    """Candidates whose signatures are known; says how often tokens were asked for."""

    def __init__(self, tokens: Tensor, ids: Tensor, known: bool, asked: list[int]):
        self.tokens, self.ids, self.known, self.asked = tokens, ids, known, asked

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def signatures(self) -> Tensor | None:
        return token_signatures(self.tokens) if self.known else None

    def take(self, indices: Tensor) -> Signed:
        return Signed(self.tokens[indices], self.ids[indices], self.known, self.asked)

    def batch(self, length: int | None = None) -> Tensor:
        self.asked.append(len(self))
        return self.tokens


@pytest.mark.parametrize("every", [1, 2])
def test_known_signatures_are_those_of_tokens_that_need_not_be_read(every: int) -> None:
    """A checkpoint of a run that hashed goes on with them, and each buffer is hashed once."""

    def chosen() -> Selector:
        off = GuardConfig(min_ess=0, min_distinct=0, min_unique=0, exposure_window=3)
        config = SelectionConfig(
            method="high_ppl", sampler="top_k", guards=off, score_every=every, score_micro_batch_size=30
        )
        return Selector(config, ByTable(), num_selected=K, proxy=None, seed=0)  # type: ignore[arg-type]

    tokens, ids = rows(list(range(30))), torch.arange(30)
    hashing, signed = chosen(), chosen()
    for step in range(6):
        asked: tuple[list[int], list[int]] = ([], [])
        picks = [
            each.select(Signed(tokens, ids + 30 * (step // every), known, log), step).indices.tolist()
            for each, known, log in zip((hashing, signed), (False, True), asked, strict=True)
        ]
        assert picks[0] == picks[1]
        state = hashing.state_dict()
        assert state == signed.state_dict()
        assert asked[0] == ([30, 30] if step % every == 0 else [])  # to be hashed, and for its losses
        assert asked[1] == ([30] if step % every == 0 else [])
        signed = chosen()
        signed.load_state_dict(json.loads(json.dumps(state)))


class CountedByHand:
    """Says what ``Exposure`` is to say, from a list of all that was ever recorded."""

    def __init__(self, window: int):
        self.window, self.seen = window, list[tuple[int, int]]()

    def times(self, signatures: list[int], ids: list[int]) -> list[int]:
        trained = [each for _, each in self.seen]
        return [
            trained.count(own) + sum(s == own and i <= place for s, i in zip(signatures, ids, strict=True))
            for own, place in zip(signatures, ids, strict=True)
        ]

    def record(self, step: int, signatures: list[int]) -> None:
        self.seen += [(step, each) for each in signatures]
        self.seen = [(then, each) for then, each in self.seen if then > step - self.window]


def test_exposures_are_counted_over_the_window_whatever_steps_are_left_out() -> None:
    generator = torch.Generator().manual_seed(4)
    found, expected, step = Exposure(5), CountedByHand(5), 0
    for turn in range(40):
        step += int(torch.randint(1, 4, (), generator=generator))
        asked, ids = torch.randint(-6, 6, (9,), generator=generator), torch.randperm(9, generator=generator)
        assert found.times(asked, ids).tolist() == expected.times(asked.tolist(), ids.tolist())
        trained = torch.randint(-6, 6, (int(torch.randint(0, 7, (), generator=generator)),), generator=generator)
        found.record(step, trained)
        expected.record(step, trained.tolist())
        if turn % 9 == 0:
            state = json.loads(json.dumps(found.state_dict()))
            found = Exposure(5)
            found.load_state_dict(state)


def test_a_step_forgets_what_it_recorded_and_looks_at_nothing_else() -> None:
    """Its cost follows from its own sequences: however many the window holds, as many counts are looked at."""

    class Watched(dict):
        def __init__(self) -> None:
            super().__init__()
            self.looks = 0

        def __getitem__(self, key: int) -> int:
            self.looks += 1
            return int(super().__getitem__(key))

        def get(self, key: int, default: int) -> int:  # type: ignore[override]
            self.looks += 1
            return int(super().get(key, default))

        def __iter__(self):
            raise AssertionError("walks the window")

        keys = values = items = __iter__

    looks = []
    for window in (2, 100):
        exposure = Exposure(window)
        exposure._counts = counts = Watched()
        for step in range(window + 3):
            counts.looks = 0
            exposure.times(torch.arange(6) + 5 * step, torch.arange(6))
            exposure.record(step, torch.arange(5) + 5 * step)
        looks.append(counts.looks)
    assert looks[0] == looks[1] < 30


# -- domains -----------------------------------------------------------------------------------------------------------


class Domains(LinearTraits):
    def domains(self, ids: Tensor) -> Tensor:
        return ids % 3

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        return ids


def test_each_domain_keeps_its_floor_on_average() -> None:
    chosen = selector(Domains(), domain_floor=0.5, exposure_cap=0)
    candidates = TensorCandidates(rows([30 if i % 3 == 0 else i for i in range(12)], seed=5))
    counts = Counter[int]()
    for step in range(400):
        selection = chosen.select(candidates, step)
        assert len(selection.indices.unique()) == K
        counts.update((selection.picked_ids % 3).tolist())
    # floor x share x K = 2/3 a step and domain; the best are all of domain 0
    for domain in (1, 2):
        assert counts[domain] / 400 == pytest.approx(2 / 3, abs=0.1)
    domains = torch.arange(12) % 3
    assert quotas(0.0, domains, domains, K, 0, 0) == {0: 0, 1: 0, 2: 0}
    assert sum(quotas(1.0, domains, domains, K, 0, 0).values()) <= K
    left = quotas(1.0, domains, torch.tensor([0, 0, 2]), K, 0, 0)  # shares are of the buffer, not of what is left
    assert (left[1], left[2]) == (0, 1)
    assert 1 <= left[0] <= 2


# -- alarms ------------------------------------------------------------------------------------------------------------


def test_a_draw_that_few_can_win_raises_the_alarm() -> None:
    """One utility far above the others, though no outlier; picks that nothing draws have no sample size."""
    candidates = rows([*range(31), 150])
    guards = {"min_ess": 1.2}
    selection = selector(sampler="boltzmann", **guards).select(candidates, 0)
    assert selection.method == "uniform"
    assert sentences(selection) == ["alarm: effective sample size 1.18, below 1.2; picked uniformly"]
    assert selection.utilities is not None
    assert selector(sampler="boltzmann", **guards).select(rows(list(range(32))), 0).method == "high_ppl"
    assert selector(**guards).select(candidates, 0).method == "high_ppl"


def test_an_outlier_is_picked_and_disarms_no_alarm() -> None:
    """It does not hide that few of the others can win, nor raise the alarm where many can."""
    far = 10**9
    for others, method in (([*range(30), 150], "uniform"), (list(range(31)), "high_ppl")):
        selection = selector(sampler="boltzmann", min_ess=1.2).select(rows([*others, far]), 0)
        assert selection.method == method
        assert selection.events[0].kind == "selection.utility_outlying"
        assert selection.events[0].facts == {"ids": [31]}


def test_picks_that_repeat_themselves_raise_the_alarm() -> None:
    dull = torch.cat([torch.full((8, 40), 3), torch.arange(50, 58).unsqueeze(1)], dim=1)
    candidates = torch.cat([dull, rows(list(range(24)), width=40)])
    selection = selector(min_distinct=0.5, exposure_cap=0).select(candidates, 0)
    assert selection.method == "uniform"
    assert "different token pairs" in str(selection.events[0])
    assert selector(min_distinct=0, exposure_cap=0).select(candidates, 0).method == "high_ppl"


def test_picks_that_were_all_trained_on_before_raise_the_alarm() -> None:
    chosen = selector(min_unique=0.5, exposure_cap=0)
    candidates = rows(list(range(12)))
    assert chosen.select(candidates, 0).method == "high_ppl"
    again = chosen.select(candidates, 1)
    assert again.method == "uniform"
    assert sentences(again) == ["alarm: 0% of the picks are new in the window, 67% of the candidates; picked uniformly"]


# -- what traits are needed for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "dsir"}, "selection.method=dsir"),
        ({"method": "opus", "prescreen": PrescreenConfig(mode="predict")}, "selection.prescreen.mode=predict"),
        ({"method": "high_ppl", "guards": GuardConfig(domain_floor=0.1)}, "selection.guards.domain_floor"),
        ({"method": "high_ppl", "guards": GuardConfig(near_duplicates=True)}, "selection.guards.near_duplicates"),
    ],
)
def test_settings_that_need_traits_say_so(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} needs text features"):
        Selector(SelectionConfig(**settings), ByTable(), num_selected=K, proxy=lambda step: None, seed=0)  # type: ignore[arg-type]
