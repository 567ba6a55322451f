"""Counter-based noise and the samplers built on it."""

from __future__ import annotations

import itertools

import pytest
import torch

from megaopus.selection import counter_rng, sampler


def test_noise_is_splitmix64() -> None:
    # first outputs of the published generator for seed 0: its state advances by the same constant per draw
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = counter_rng.bits(0, torch.arange(1, 4)).tolist()
    assert [value % 2**64 for value in found] == expected


def test_uniform_noise_has_the_right_moments_and_no_correlation() -> None:
    count = 200_000
    x = counter_rng.uniform(counter_rng.key(3, "a", 5), torch.arange(count))
    assert x.dtype == torch.float64
    assert 0 < x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    assert abs(x.mean() - 0.5) < 4 * (1 / 12 / count) ** 0.5
    assert x.var() == pytest.approx(1 / 12, rel=0.01)
    counts = torch.histc(x, 64, 0, 1)
    assert ((counts - count / 64) ** 2 / (count / 64)).sum() < 63 + 4 * (2 * 63) ** 0.5  # chi-square
    others = [
        x.roll(1),  # the neighbouring id
        counter_rng.uniform(counter_rng.key(3, "a", 6), torch.arange(count)),  # the next step
        counter_rng.uniform(counter_rng.key(4, "a", 5), torch.arange(count)),  # the next seed
        counter_rng.uniform(counter_rng.key(3, "b", 5), torch.arange(count)),  # another purpose
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([x, other]))[0, 1]) < 4 / count**0.5


@pytest.mark.slow
def test_noise_of_one_id_over_many_steps_is_uniform() -> None:
    x = torch.cat(
        [counter_rng.uniform(counter_rng.key(1, "uniform", step), torch.tensor([17])) for step in range(20_000)]
    )
    assert abs(x.mean() - 0.5) < 4 * (1 / 12 / len(x)) ** 0.5
    assert abs(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1]) < 4 / len(x) ** 0.5


def test_extreme_bits_stay_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for extreme in (0, -1):  # all bits clear, all bits set
        monkeypatch.setattr(counter_rng, "bits", lambda seed, counters, value=extreme: torch.full_like(counters, value))
        assert 0 < counter_rng.uniform(0, torch.arange(1)).item() < 1
        assert torch.isfinite(counter_rng.gumbel(0, torch.arange(1))).all()


def test_keys_depend_on_every_part_and_their_order() -> None:
    keys = {counter_rng.key(*parts) for parts in itertools.product((0, 1, -1), ("a", "b"), (0, 1, 2**63))}
    assert len(keys) == 18
    assert counter_rng.key(1, 2) != counter_rng.key(2, 1)


def test_uniform_picks_each_candidate_and_pair_equally_often() -> None:
    ids, steps = torch.arange(100, 106), 6000
    pairs = torch.zeros(6, 6)
    for step in range(steps):
        picked = sampler.pick_uniform(ids, 2, seed=0, step=step)
        pairs[picked[0], picked[1]] += 1
        pairs[picked[1], picked[0]] += 1
    expected = steps / 15
    off_diagonal = pairs[~torch.eye(6, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 4.5 * expected**0.5
    assert pairs.diagonal().sum() == 0


def test_picks_depend_on_ids_not_on_positions() -> None:
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(0)) + 7
    utilities = torch.sin(ids.double() * 3)
    gram = torch.outer(utilities, utilities) + torch.eye(40)
    order = torch.argsort(ids)
    for pick in (
        lambda u, g, i: sampler.pick_uniform(i, 9, 1, 2),
        lambda u, g, i: sampler.pick_top_k(u, i, 9),
        lambda u, g, i: sampler.pick(u, i, 9, sampler.Draws("boltzmann", 0.9, 1, 2)),
        lambda u, g, i: sampler.pick(u, i, 9, sampler.Draws("boltzmann", 0.9, 1, 2), 0.1 * g),
    ):
        shuffled = ids[pick(utilities, gram, ids)]
        ordered = ids[order][pick(utilities[order], gram[order][:, order], ids[order])]
        assert shuffled.tolist() == ordered.tolist()
        assert len(set(shuffled.tolist())) == 9


def test_top_k_takes_the_smaller_id_of_equal_utilities() -> None:
    ids = torch.tensor([9, 3, 5, 1, 7])
    picked = sampler.pick_top_k(torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0], dtype=torch.float64), ids, 3)
    assert ids[picked].tolist() == [5, 3, 7]


def successive_draws(p: torch.Tensor, count: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered outcome of ``count`` draws without replacement."""
    outcomes = {}
    for outcome in itertools.permutations(range(len(p)), count):
        chance, left = 1.0, float(p.sum())
        for index in outcome:
            chance *= float(p[index]) / left
            left -= float(p[index])
        outcomes[outcome] = chance
    return outcomes


@pytest.mark.parametrize("one_by_one", [False, True])
def test_boltzmann_is_successive_draws_without_replacement(one_by_one: bool) -> None:
    utilities, ids = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64), torch.arange(4) + 1000
    expected = successive_draws(sampler.probabilities(utilities, 0.8), 2)
    steps, found = 5000, dict.fromkeys(expected, 0)
    for step in range(steps):
        draws = sampler.Draws("boltzmann", 0.8, 5, step)
        if one_by_one:
            none = torch.zeros(4, 4, dtype=torch.float64)
            picked = sampler.pick(utilities, ids, 2, draws, none)
        else:
            picked = sampler.pick(utilities, ids, 2, draws)
        found[tuple(picked.tolist())] += 1
    chi_square = sum((found[o] - steps * p) ** 2 / (steps * p) for o, p in expected.items())
    assert chi_square < 11 + 4 * (2 * 11) ** 0.5


def test_diverse_picks_follow_the_greedy_formula_and_avoid_duplicates() -> None:
    generator = torch.Generator().manual_seed(2)
    updates = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    updates[1] = updates[0]  # a duplicate
    utilities = updates @ torch.randn(5, generator=generator, dtype=torch.float64)
    utilities[:2] = utilities.max() + 0.1
    gram = updates @ updates.t()
    picked: list[int] = []
    for _ in range(3):
        score = [float(utilities[z] - sum(gram[z, s] for s in picked)) if z not in picked else -1e9 for z in range(7)]
        picked.append(score.index(max(score)))
    found = sampler.pick(utilities, torch.arange(7), 3, sampler.Draws("top_k", 0.9, 0, 0), gram)
    assert found.tolist() == picked
    assert found[0] == 0
    assert 1 not in picked


TOP = sampler.Draws("top_k", 0.9, 0, 0)


def by_hand(utilities, penalty, domains, least, count) -> list[int]:
    """The best of those after whom every quota can still be met, one after another, on plain numbers."""
    picked: list[int] = []
    for number in range(count):
        best, most = -1, -float("inf")
        for z in range(len(utilities)):
            after = [*picked, z]
            lacks = sum(max(0, due - sum(domains[s] == name for s in after)) for name, due in least.items())
            score = utilities[z] - sum(penalty[z][s] for s in picked)
            if z not in picked and lacks <= count - number - 1 and score > most:
                best, most = z, score
        picked.append(best)
    return picked


def test_quotas_bound_one_row_of_picks_that_all_take_their_overlap_off() -> None:
    """What a quota picked counts as picked: the second of two equal sequences is not taken after the first."""
    utilities, penalty = torch.tensor([1.0, 0.99, 0.5, 0.4], dtype=torch.float64), torch.zeros(4, 4)
    penalty[:2, :2] = 1.0
    for least in ({0: 1}, {0: 1, 1: 0}, {1: 1}):
        found = sampler.pick(utilities, torch.arange(4), 2, TOP, penalty, (torch.tensor([0, 0, 1, 1]), least))
        assert found.tolist() == [0, 2]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        updates = torch.randn(10, 3, generator=generator, dtype=torch.float64)
        gram, utilities = updates @ updates.t(), torch.randn(10, generator=generator, dtype=torch.float64)
        domains = torch.randint(0, 3, (10,), generator=generator)
        least = {name: min(int(domains.eq(name).sum()), 2) for name in range(3)}
        for penalty in (gram, None):
            found = sampler.pick(utilities, torch.arange(10), 7, TOP, penalty, (domains, least))
            taken_off = (torch.zeros(10, 10) if penalty is None else penalty).tolist()
            assert found.tolist() == by_hand(utilities.tolist(), taken_off, domains.tolist(), least, 7)


def one_after_another(utilities, ids, count, draws, penalty=None, quotas=None, levels=None) -> torch.Tensor:
    """Do what ``sampler.pick`` says it does, a look at every candidate for every pick."""
    order = torch.argsort(ids)
    left, ids = utilities[order], ids[order]
    free, picked = torch.ones(len(ids), dtype=torch.bool), []
    due = {} if quotas is None else dict(quotas[1])
    domains = None if quotas is None else quotas[0][order].tolist()
    scores = draws(left, ids, draws.sampler)
    for number in range(count):
        may = free.clone()
        if domains is not None and count - number <= sum(due.values()):
            may &= torch.tensor([due.get(domain, 0) > 0 for domain in domains])
        may = may.nonzero().flatten()
        if levels is not None:
            may = may[levels[order][may] == levels[order][may].min()]
        if penalty is not None:
            scores = draws(left, ids, "diverse", number)
        best = int(may[scores[may].argmax()])  # the first of equal ones: the smallest id
        picked.append(best)
        free[best] = False
        if domains is not None and due.get(domains[best], 0) > 0:
            due[domains[best]] -= 1
        if penalty is not None:
            left = left - penalty[order][:, order][:, best]
    return order[picked]


def test_picks_are_those_of_a_plain_loop() -> None:
    """To the last one, over ties, quotas, levels, penalties and utilities that are infinite, in any combination."""
    generator = torch.Generator().manual_seed(3)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    for case in range(150):
        n = int(integers(30)) + 1
        ids, count = 10 * torch.randperm(n, generator=generator), int(integers(n)) + 1
        utilities = integers(4, n).double() if case % 3 else torch.randn(n, generator=generator, dtype=torch.float64)
        if case % 7 == 0:
            utilities[integers(2, n) == 0] = -torch.inf
        domains, levels, penalty, quotas = integers(4, n), None, None, None
        if case % 2:
            members = domains.bincount(minlength=4)
            wished = [int(integers(int(each) + 1)) for each in members]
            least = {name: min(due, count // 4) for name, due in enumerate(wished) if name != 3}
            quotas = domains, least
        if case % 4 > 1:
            levels = integers(3, n)
        if case % 8 > 3:
            penalty = integers(3, n, n).double() / 2 if case % 3 else torch.randn(n, n, generator=generator).double()
        draws = sampler.Draws(("top_k", "boltzmann")[case % 5 % 2], 0.7, 1, case)
        expected = one_after_another(utilities, ids, count, draws, penalty, quotas, levels)
        assert sampler.pick(utilities, ids, count, draws, penalty, quotas, levels).tolist() == expected.tolist(), case
        if penalty is not None:
            found = sampler.pick(utilities, ids, count, draws, penalty.t().__getitem__, quotas, levels)
            assert found.tolist() == expected.tolist(), case


def test_quotas_of_more_than_there_is_are_refused() -> None:
    with pytest.raises(ValueError, match="leave 2"):
        sampler.pick(torch.zeros(4).double(), torch.arange(4), 3, TOP, None, (torch.tensor([0, 1, 1, 1]), {0: 2}))


@pytest.mark.parametrize("penalty", [None, torch.zeros(40, 40, dtype=torch.float64)])
def test_levels_come_first_and_leave_values_to_the_last_bit(penalty: torch.Tensor | None) -> None:
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    utilities = 1 + 1e-15 * torch.arange(40, dtype=torch.float64)  # far finer than beside any large number
    levels = torch.tensor([2, 0, 1, 0]).repeat(10)
    found = sampler.pick(utilities, ids, 25, TOP, penalty, levels=levels)
    expected = sorted(range(40), key=lambda z: (int(levels[z]), -float(utilities[z])))[:25]
    assert found.tolist() == expected


def test_an_outlier_moves_no_other_pick() -> None:
    """Whatever it is, and with every sampler; ordinary utilities are z-scored to the last bit as ever."""
    generator = torch.Generator().manual_seed(1)
    for count in (16, 64, 1024):
        ids, utilities = torch.arange(count), torch.randn(count, generator=generator, dtype=torch.float64)
        others = ids != 3
        plain = (utilities[others] - utilities[others].mean()) / utilities[others].std(correction=0)
        assert torch.equal(sampler.standardise(utilities[others]), plain)
        for name in ("top_k", "boltzmann"):
            draws = sampler.Draws(name, 0.9, 5, 6)
            without = ids[others][sampler.pick(plain, ids[others], 6, draws)].tolist()
            for value in (1e2, 1e30, 1e308, -1e30):
                outlying = sampler.standardise(utilities.index_fill(0, torch.tensor(3), value))
                assert torch.equal(outlying[others], plain)
                found = sampler.pick(outlying, ids, 7, draws).tolist()
                assert found == ([3, *without] if value > 0 else [*without, found[-1]])
    several = torch.cat([torch.zeros(40, dtype=torch.float64), torch.arange(1.0, 23.0).double(), 1e29 * torch.ones(2)])
    several[-1] *= 10
    assert bool((sampler.standardise(several)[39:].diff() > 0).all())  # most equal, two far out: in order still


def test_standardise_is_the_population_z_score() -> None:
    z = sampler.standardise(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    assert z.mean().item() == pytest.approx(0)
    assert z.square().mean().item() == pytest.approx(1)
