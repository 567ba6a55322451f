"""Two data-parallel ranks pick what one process picks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaopus.selection import ModuleBackend, SelectionConfig, Selector, TensorCandidates, sampler
from megaopus.selection.agreement import alike, digest, disagreement, fingerprint
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.guards import own_share, shared_signatures, token_signatures
from tests.pool import Pool

SETTINGS: dict[str, dict[str, Any]] = {
    "directional": {"proxy_half_life": 7.0},
    "boltzmann": {"sampler": "boltzmann"},
    "countsketch": {"estimator": "countsketch", "redundancy": 0.5, "sketch_dim": 512},
    "exact": {"estimator": "exact", "redundancy": 0.5},
    "high_ppl": {"method": "high_ppl"},
    "uniform": {"method": "uniform"},
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sin()).square().mean((1, 2))


def batch(seed: int, count: int) -> Tensor:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(seed))


def make_backend(group: dist.ProcessGroup | None) -> ModuleBackend:
    """Of a small net after three updates."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, batch(50 + step, 8)).mean().backward()
        optimizer.step()
    scored = model if group is None else DistributedDataParallel(model, process_group=group)
    return ModuleBackend(scored, optimizer, loss, group=group, micro_batch_size=2)


def run(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Selections of three steps under every setting, and of one with a NaN candidate and a NaN proxy."""
    backend = make_backend(group)
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        config = SelectionConfig(**{"method": "opus", "score_micro_batch_size": 3, **settings})
        selector = Selector(config, backend, num_selected=5, proxy=lambda step: batch(90 + step, 7), seed=3)
        found[name] = [selector.select(batch(step, 16), step) for step in range(3)]
    config = SelectionConfig(method="opus")
    bad = batch(0, 16)
    bad[11] = torch.nan  # on the second rank only
    found["bad candidate"] = [
        Selector(config, backend, num_selected=5, proxy=lambda _: batch(90, 7), seed=3).select(bad, 0)
    ]
    bad_proxy = batch(90, 7)
    bad_proxy[6] = torch.nan
    found["bad proxy"] = [Selector(config, backend, num_selected=5, proxy=lambda _: bad_proxy, seed=3).select(bad, 0)]
    for size, proxies in ((15, 5), (3, 1)):  # uneven shares; no proxy for the second rank
        few = Selector(config, backend, num_selected=2, proxy=lambda _, n=proxies: batch(90, n), seed=3)
        found[f"{size} candidates"] = [few.select(batch(0, size), 0)]
    results: dict[str, Any] = {
        name: [
            (s.method, s.picked_ids.tolist(), s.utilities, [str(event) for event in s.events], s.ess)
            for s in selections
        ]
        for name, selections in found.items()
    }
    sizes = (7, 1)  # uneven shares; none for the second rank
    proxies = [Selector(config, backend, num_selected=5, proxy=lambda step, n=n: batch(step, n), seed=3) for n in sizes]
    return results | {"proxy losses": [selector.proxy_loss(4) for selector in proxies]}


class TextFeatures:
    """Of candidates by their ids; ``off``: as another rank has them, whose files are not the same."""

    def __init__(self, off: float):
        self.off = off

    def features(self, ids: Tensor) -> Tensor:
        return torch.stack([ids % 5, ids % 7, ids % 3], 1).float() * (1 - self.off) + self.off * (ids % 11).view(-1, 1)

    def log_odds(self, ids: Tensor) -> Tensor:
        return (1 - 2 * self.off) * (ids * 37 % 101).double()

    importance = log_odds

    def proxy_importance(self, ids: Tensor) -> Tensor:
        return (1 - 2 * self.off) * (ids * 53 % 101).double()

    def judges(self, ids: Tensor) -> Tensor:
        return ids % 3 == int(self.off)

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        return ids // (1 + int(8 * self.off))

    def domains(self, ids: Tensor) -> Tensor:
        return ids % (3 + int(self.off))


BY_TEXT: dict[str, dict[str, Any]] = {
    "dsir": {"method": "dsir"},
    "importance": {"method": "importance"},
    "floor": {"method": "high_ppl", "guards": GuardConfig(domain_floor=0.9, min_distinct=0)},
    "near copies": {"method": "high_ppl", "guards": GuardConfig(near_duplicates=True, min_distinct=0)},
    "predict": {"method": "high_ppl", "prescreen": PrescreenConfig(mode="predict", slice=64, every=2)},
    "odds": {"utilities": "odds", "prescreen": PrescreenConfig(mode="importance", multiple=2), "proxy_every": 2},
    "wanted": {"method": "domain_oracle"},
}


def picks_by_text(backend: ModuleBackend, off: float) -> dict[str, list[list[int]]]:
    """Setting -> ids picked in four steps with text features that are ``off``."""
    found = {}
    for name, settings in BY_TEXT.items():
        config = SelectionConfig(**settings)
        if name == "odds":
            config.method = "opus"
        if name == "predict":
            config.method, config.prescreen.prior = "opus", 0.5
        selector = Selector(
            config,
            backend,
            num_selected=5,
            proxy=lambda step: batch(90 + step, 8),
            wanted=lambda candidates: candidates.ids % (2 + int(off)) == 0,
            text_features=TextFeatures(off),
            seed=3,
        )
        size = 80 if name == "predict" else 16
        found[name] = [selector.select(batch(step, size), step).picked_ids.tolist() for step in range(4)]
    return found


def reductions(backend: ModuleBackend) -> list[list[int]]:
    """Give the lengths of what is summed over ranks in each of 32 selections of the shipped default recipe."""
    selector = Selector(
        SelectionConfig.preset("opus"),
        backend,
        num_selected=4,
        proxy=lambda step: batch(90 + step, 8),
        pool=lambda step: batch(190 + step, 8),
        text_features=TextFeatures(0.0),
        seed=3,
    )
    found: list[list[int]] = []
    add = backend.sum_over_ranks

    def noted(parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        if len(parts):
            found[-1].append(len(parts))
        return add(parts, tally)

    with mock.patch.object(backend, "sum_over_ranks", noted):
        for step in range(32):
            found.append([])
            selector.select(batch(step, 32), step)
    return found


def disagree(backend: ModuleBackend) -> str:
    """Give what is said where the second rank's sampler has a mind of its own."""
    selector = Selector(SelectionConfig(method="high_ppl"), backend, num_selected=5, proxy=None, seed=3)
    selector.seed += backend.rank
    selector.config.method = "uniform"
    with pytest.raises(RuntimeError) as caught:
        selector.select(batch(0, 16), 0)
    return str(caught.value)


def hashed(backend: ModuleBackend) -> list[tuple[Tensor, int]]:
    """Give the signatures of 5 candidates and of 1, each with how many of them this rank hashed."""
    found = []
    for count in (5, 1):
        candidates = TensorCandidates(batch(7, count))
        found.append((shared_signatures(candidates, backend), len(own_share(candidates, backend))))
    return found


SKETCHED: dict[str, dict[str, Any]] = {
    "directional": {"gram": "countsketch"},
    "adjoint": {"estimator": "adjoint", "gram": "kronecker"},
    "countsketch": {"estimator": "countsketch"},
}


def gathered(backend: ModuleBackend) -> dict[tuple[str, str], list[torch.Size]]:
    """(estimator, gram_sketch) -> the shape of what this rank sends in each gathering of a scored step."""
    found: dict[tuple[str, str], list[torch.Size]] = {}
    send = dist.all_gather
    for name, settings in SKETCHED.items():
        for way in ("summed", "per_layer"):
            config = SelectionConfig(method="opus", redundancy=0.5, sketch_dim=64, gram_sketch=way, **settings)
            config.score_micro_batch_size = 3
            selector = Selector(config, backend, num_selected=5, proxy=lambda step: batch(90 + step, 7), seed=3)
            sent = found[name, way] = []

            def noted(parts: list[Tensor], own: Tensor, *args: Any, sent: Any = sent, **kwargs: Any) -> Any:
                if own.is_floating_point():  # what tells copies apart are whole numbers
                    sent.append(own.shape)
                return send(parts, own, *args, **kwargs)

            with mock.patch.object(dist, "all_gather", noted):
                selector.select(batch(0, 16), 0)
    return found


def worker() -> dict[str, Any]:
    dist.init_process_group("gloo")
    try:
        found = run(dist.group.WORLD)
        backend = make_backend(dist.group.WORLD)
        by_text = picks_by_text(backend, float(backend.rank))
        found |= {"by text": by_text, "disagreement": disagree(backend), "hashed": hashed(backend)}
        return found | {"gathered": gathered(backend), "reductions": reductions(backend)}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(pool: Pool) -> list[dict[str, Any]]:
    return pool.run(2, worker)


def test_picks_rest_on_what_rank_0_knows_of_text(ranks: list[dict[str, Any]]) -> None:
    one, other = (picks_by_text(make_backend(None), off) for off in (0.0, 1.0))
    for rank in ranks:
        assert rank["by text"] == one
    for name, picks in one.items():
        assert picks != other[name], name  # the second rank's own would have picked otherwise


def test_the_default_recipe_reduces_utilities_over_ranks_before_every_batch(ranks: list[dict[str, Any]]) -> None:
    """Of 8 candidates and some judges, half on each rank; with each utility goes a loss."""
    for rank in ranks:
        assert len(rank["reductions"]) == 32
        for lengths in rank["reductions"]:
            assert lengths
            assert 2 * 4 <= lengths[-1] <= 2 * 8


def test_each_rank_hashes_its_share_of_the_candidates(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for (signatures, own), (count, share) in zip(rank["hashed"], ((5, 3), (1, 1)), strict=True):
            assert own == share
            assert torch.equal(signatures, token_signatures(batch(7, count)))


def test_a_gram_matrix_takes_one_message_and_not_one_for_each_layer(ranks: list[dict[str, Any]]) -> None:
    """Of 8 candidates on each rank, 64 numbers of each; the net has two matrices."""
    for rank in ranks:
        for name in SKETCHED:
            assert rank["gathered"][name, "summed"] == [(8, 64)]
            assert rank["gathered"][name, "per_layer"] == [(8, 64)] * 2


def test_ranks_that_picked_differently_are_named_with_their_picks(ranks: list[dict[str, Any]]) -> None:
    ids = torch.arange(16)
    picks = [ids[sampler.pick_uniform(ids, 5, 3 + rank, 0)].sort().values.tolist() for rank in range(2)]
    common = set(picks[0]) & set(picks[1])
    own = [", ".join(str(each) for each in ids if each not in common) for ids in picks]
    said = f"{len(common)} of 5 are the same: rank 0 picked {own[0]}; rank 1 picked {own[1]}. "
    assert all(said in rank["disagreement"] for rank in ranks)
    assert "ranks 0, 2 picked 1, 2; rank 1 picked 2, 1." in disagreement([[1, 2], [2, 1], [1, 2]])
    assert "rank 0 picked 0, 1, 2, 3, 4, 5, 6, 7 and 92 more;" in disagreement([[*range(100)], [*range(100, 200)]])
    assert len({digest(torch.tensor(each)) for each in ([1, 2], [2, 1], [1], [1, 2, 0], [0, 1, 2], [2, 2])}) == 6


@pytest.mark.parametrize("ranks", [1, 2, 3, 2048])
def test_fingerprints_add_up_to_whether_all_are_alike(ranks: int) -> None:
    """As one sum in any order gives them, at sizes where a float32 would round."""
    ids = torch.tensor([5, 3, 8])
    same, other = fingerprint(ids), fingerprint(torch.tensor([3, 5, 8]))
    assert alike((same * ranks).tolist(), ranks)
    assert not alike((same * (ranks - 1) + other).tolist(), ranks) or ranks == 1
    largest = torch.tensor([65535.0, 65535.0**2], dtype=torch.float64).repeat_interleave(4)
    assert alike((largest * 2**21).tolist(), 2**21)
    one_less = largest * (2**21 - 1) + torch.tensor([65534.0, 65534.0**2], dtype=torch.float64).repeat_interleave(4)
    assert not alike(one_less.tolist(), 2**21)


def test_two_ranks_select_what_one_process_selects(ranks: list[dict[str, Any]]) -> None:
    one = run(None)
    expected_losses = one.pop("proxy losses")
    assert len(set(expected_losses)) == 2
    for rank in ranks:
        assert rank["proxy losses"] == pytest.approx(expected_losses, rel=1e-6)
    for name, expected in one.items():
        for index, (method, picked, utilities, events, ess) in enumerate(expected):
            both = [rank[name][index] for rank in ranks]
            for found in both:
                assert found[0] == method, name
                assert found[1] == picked, name
                assert found[3] == events, name
                assert found[4] == pytest.approx(ess, rel=1e-3)
                if utilities is not None:
                    spread = utilities[utilities.isfinite()].std()
                    torch.testing.assert_close(found[2], utilities, rtol=0, atol=1e-3 * float(spread), equal_nan=True)
            if utilities is not None:  # bitwise on both ranks
                assert torch.equal(both[0][2].nan_to_num(7.0), both[1][2].nan_to_num(7.0))
    assert one["bad candidate"][0][3] == ["utility not finite: candidates [11]"]
    assert one["bad proxy"][0][0] == "uniform"
