"""Predicts utility by a linear function, fitted to the utilities already paid for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection import counter_rng, sampler
from megaopus.selection.backend import TextFeatures
from megaopus.selection.config import PrescreenConfig

_BLOCK = 16
"""Fewest scores that are ranked together: those of a step, or of several where a step has fewer.

All utilities of a step share what its proxy gradient has in common with any text, which tells no candidates apart.
"""
_JUDGED = 256
"""Latest uniform scores that its correlation is told of."""
_AGAINST = 0.15
"""Correlation below zero that the predictor is tested for."""
_PROOF = math.log(100)
"""Evidence of that, in nats, from which it is distrusted: about one step in a hundred where there is nothing to it."""
_RIDGES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Penalties to choose from; a predictor of noise wants the largest, whose predictions are next to nothing."""
_FEWEST = 64
"""Scores below which it neither predicts nor is judged."""


class Prescreen:
    """Regresses utilities' normal scores on candidates' text features (ridge), over a window of the latest scores.

    A candidate's prescreen score is the sum of what it predicts and ``prior`` times the log of the importance.
    A function of what it has learnt, so it is the same on every rank that has seen the same scores.
    """

    def __init__(self, config: PrescreenConfig, text_features: TextFeatures):
        self._config = config
        self._text_features = text_features
        self._ids = torch.empty(0, dtype=torch.int64)
        self._utilities = torch.empty(0, dtype=torch.float64)
        self._scores = torch.empty(0, dtype=torch.float64)  # at the time, before its score was known; nan: not yet
        self._uniform = torch.empty(0, dtype=torch.bool)
        self._steps = torch.empty(0, dtype=torch.int64)
        self._unfitted = 0  # scores since the last fit
        self._weights: Tensor | None = None  # (F + 1,), the intercept last
        self.correlation: float | None = None
        """Rank correlation of prescreen scores with what uniform draws then scored, the latest; None while too few."""
        self._against = 0.0  # nats of evidence

    def prescreen_score(self, ids: Tensor, prior: Tensor | None = None) -> Tensor | None:
        """(n,) float64 that candidates are screened and picked by; None before the first fit if there is no prior.

        Importance alone while what is learnt is distrusted. ``prior``: what ``prior`` gives for these, if it is known.
        """
        distrusted = self._config.prior > 0 and self._against > _PROOF
        return self._score(ids, None if distrusted else self._weights, prior)

    def _score(self, ids: Tensor, weights: Tensor | None, prior: Tensor | None = None) -> Tensor | None:
        prior = self.prior(ids) if prior is None else prior
        if weights is None:
            return prior
        learnt = self._text_features.features(ids).double() @ weights[:-1] + weights[-1]
        return learnt if prior is None else prior + learnt.clamp_max(0)

    def prior(self, ids: Tensor) -> Tensor | None:
        """(n,) float64 what of the scores owes nothing to utilities; None: nothing does."""
        weight = self._config.prior
        return weight * self._text_features.importance(ids) if weight > 0 else None

    def learn(self, ids: Tensor, utilities: Tensor, uniform: Tensor, step: int) -> None:
        """Take in a step's scores: ``ids`` (n,), ``utilities`` (n,), and which of them were drawn uniformly, (n,) bool.

        Utilities that are not finite are left out. Fits again once there are ``refit`` new ones.
        """
        kept = utilities.isfinite()
        ids, utilities, uniform = ids[kept], utilities[kept], uniform[kept]
        scores = self._score(ids, self._weights)  # also of what is distrusted, which may be trusted again
        if scores is None:
            scores = torch.full_like(utilities, torch.nan)
        steps = torch.full_like(ids, step)
        new_of = {"_ids": ids, "_utilities": utilities, "_scores": scores, "_uniform": uniform, "_steps": steps}
        for name, new in new_of.items():
            setattr(self, name, torch.cat([getattr(self, name), new])[-self._config.window :])
        self._unfitted += len(ids)
        if len(self._ids) >= _FEWEST and (self._weights is None or self._unfitted >= self._config.refit):
            self._fit()
        self._judge()

    def _judge(self) -> None:
        """Take the correlation of the latest uniform scores, and the evidence in all of them that it is below zero.

        Evidence is Page's cumulative sum (Biometrika 1954): of the log likelihood ratios of a correlation of
        -``_AGAINST`` to none, of normal scores, since the pair from which that sum is largest. In noise it is above h
        for at most exp(-h) of the time, however often one looks.
        """
        judged = (self._uniform & self._scores.isfinite()).nonzero().flatten()
        if len(judged) < _FEWEST:
            self.correlation, self._against = None, 0.0
            return
        pairs = [_normal_scores(values[judged], self._steps[judged]) for values in (self._scores, self._utilities)]
        self.correlation = float(torch.corrcoef(torch.stack(pairs)[:, -_JUDGED:])[0, 1].nan_to_num())
        r, (a, b) = _AGAINST, pairs
        ratios = -(r * r * (a * a + b * b) + 2 * r * a * b) / (2 * (1 - r * r)) - 0.5 * math.log1p(-r * r)
        sums = torch.cat([ratios.new_zeros(1), ratios.cumsum(0)])
        self._against = float(sums[-1] - sums.min())

    def doubt(self) -> Tensor:
        """(2,) float64 that ``distrust_reason`` takes: the correlation, nan for none, and the evidence against it."""
        r = torch.nan if self.correlation is None else self.correlation
        return torch.tensor([r, self._against], dtype=torch.float64)

    def distrust_reason(self, doubt: Tensor | None = None) -> Event | None:
        """Return why it is not to be trusted now; None: nothing speaks against it. ``doubt``: its own unless given."""
        r, against = (self.doubt() if doubt is None else doubt).tolist()
        if against <= _PROOF:
            return None
        by = "importance" if self._config.prior > 0 else "chance"
        what = "candidates screened" if self._config.mode == "cascade" else "picked"
        text = f"alarm: the predictor's correlation with utilities is {r:.2f}; {what} by {by} alone"
        return Event("selection.prescreen_distrusted", text, correlation=r, evidence=against, instead=by)

    def _fit(self) -> None:
        """w = argmin |X w - y|^2 + ridge |w|^2 over the window, columns centred; y: normal scores.

        ``ridge`` is the one of ``_RIDGES`` with the least squared error on each score when it is left out, which the
        fit to all tells: (y_i - y^_i) / (1 - H_ii), H = X (X^T X + ridge)^-1 X^T (Allen's PRESS, 1974).
        """
        features = self._text_features.features(self._ids).double()
        mean = features.mean(dim=0)
        target = _normal_scores(self._utilities, self._steps)
        centred = features - mean
        if len(centred) > centred.shape[1]:
            values, vectors = torch.linalg.eigh(centred.t() @ centred)
        else:
            _, singular, transposed = torch.linalg.svd(centred, full_matrices=False)
            values, vectors = singular.square(), transposed.t()
        rotated, values = centred @ vectors, values.clamp_min(0)
        along = rotated.t() @ target
        ridges = torch.tensor(_RIDGES, dtype=torch.float64).unsqueeze(1)
        solved = along / (values + ridges)  # (ridges, directions)
        errors = target - solved @ rotated.t()
        leverage = (1 / (values + ridges)) @ rotated.square().t()
        press = (errors / (1 - leverage)).square().sum(dim=1)
        weights = vectors @ solved[int(press.argmin())]
        self._weights = torch.cat([weights, -(mean @ weights).view(1)])
        self._unfitted = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values; ``load_state_dict`` makes the predictor what it was, to the last bit.

        'standing' is version 0.1's word for prescreen scores; checkpoints of either version are read by the other.
        """
        return {
            "ids": self._ids.tolist(),
            "utilities": self._utilities.tolist(),
            "standing": [None if value != value else value for value in self._scores.tolist()],
            "uniform": self._uniform.int().tolist(),
            "steps": self._steps.tolist(),
            "unfitted": self._unfitted,
            "weights": None if self._weights is None else self._weights.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        scores = [torch.nan if value is None else value for value in state["standing"]]
        self._ids = torch.tensor(state["ids"], dtype=torch.int64)
        self._utilities = torch.tensor(state["utilities"], dtype=torch.float64)
        self._scores = torch.tensor(scores, dtype=torch.float64)
        self._uniform = torch.tensor(state["uniform"], dtype=torch.bool)
        self._steps = torch.tensor(state["steps"], dtype=torch.int64)
        self._unfitted = int(state["unfitted"])
        weights = state["weights"]
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self._judge()


def screen(
    ids: Tensor,
    allowed: Tensor,
    scores: Tensor | None,
    count: int,
    uniform_count: int,
    key: int,
    levels: Tensor,
) -> tuple[Tensor, Tensor]:
    """(ascending positions to score exactly (count,), which of them are uniform draws (count,) bool).

    ``allowed``: positions to take from. ``scores``: (N,), the largest promise most; ``uniform_count`` are drawn
    uniformly beside them, by noise keyed by ``key``, and all where ``scores`` is None. ``levels``: (N,) int64, the
    lowest first whatever they promise.
    """
    drawn = count if scores is None else min(uniform_count, count)
    uniform = torch.zeros(len(ids), dtype=torch.bool)
    uniform[allowed[sampler.pick_top_k(counter_rng.uniform(key, ids[allowed]), ids[allowed], drawn)]] = True
    chosen = uniform.clone()
    if scores is not None:
        rest = allowed[~uniform[allowed]]
        chosen[rest[sampler.pick_top_k(scores[rest], ids[rest], count - drawn, levels[rest])]] = True
    scored = chosen.nonzero().flatten()
    return scored, uniform[scored]


def _normal_scores(utilities: Tensor, steps: Tensor) -> Tensor:
    """(n,) ranks as quantiles of a normal distribution, in blocks of steps that follow, ``_BLOCK`` or more each.

    Utilities have tails, a few rare tokens wide, that would make a least-squares fit their own.
    """
    _, sizes = steps.unique_consecutive(return_counts=True)
    blocks = [0]
    for size in sizes.tolist():
        if blocks[-1] >= _BLOCK:
            blocks.append(0)
        blocks[-1] += size
    if len(blocks) > 1 and blocks[-1] < _BLOCK:
        blocks[-2:] = [sum(blocks[-2:])]
    sizes = torch.tensor(blocks)
    block = torch.arange(len(blocks)).repeat_interleave(sizes)
    _, value = utilities.unique(return_inverse=True)
    _, rank, copies = (block * len(utilities) + value).unique(return_inverse=True, return_counts=True)
    middle = (copies.cumsum(0) - copies.double() / 2)[rank] - (sizes.cumsum(0) - sizes)[block]  # of equal ones
    return torch.special.ndtri(middle / sizes[block])
