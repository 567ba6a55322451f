"""Weighs importance and the model's scores of a candidate by what each tells of the proxy, as training goes.

Candidates stand by the log-odds of a logistic regression: of sequences of the proxy that no direction was made from
(``TextFeatures.judges``) against the candidates that were scored beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaopus.logistic import fit_logistic

SIGNALS = ("importance", "utility", "loss", "loss squared")
"""What has a weight; the model's as normal scores of their ranks among the candidates of the step. The losses of what
is wanted may lie in the middle, hence the square."""
EXPECTED = (1.0, 0.5, 0.0, 0.0)
"""Weights without evidence: importance is log-odds as it is, and among equals utility decides."""
WINDOW = 64
"""Scorings that the fit looks back to."""
KEPT = 64
"""Candidates of a scoring that it is fitted to, at most, evenly spaced."""

PROVEN = 64
"""Judges that weights rest on before anything is scored less often."""
DECISIVE = 1.0
"""Variance, in nats squared, that the model's scores make in the log-odds of candidates, from which they are worth
having at every step: most candidates are then apart by a factor of e and more."""
SELDOM = (1, 2, 4, 8, 16, 32)


class Signals(NamedTuple):
    """Says what is known of n sequences, each (n,) float64."""

    importance: Tensor
    utilities: Tensor
    losses: Tensor | None
    """None: the estimator sees none."""


def standing(values: Tensor, among: Tensor | None = None) -> Tensor:
    """(n,) normal scores of the ranks of ``values`` (n,) among the finite ones of ``among`` (m,), ties in the middle.

    None: among themselves, each among the others. Not finite where ``values`` is not.
    """
    others = values if among is None else among
    others = others[others.isfinite()].sort().values
    below = torch.searchsorted(others, values.contiguous())
    above = torch.searchsorted(others, values.contiguous(), right=True)
    count = len(others) + (among is not None)
    # among themselves one of the equal ones is the value itself
    middle = (below + above).double() / 2 + (0.5 if among is not None else 0.0)
    found = torch.special.ndtri(middle / max(count, 1))
    return found.masked_fill(~values.isfinite(), torch.nan)


def design(signals: Signals, among: Signals | None = None) -> Tensor:
    """(n, F) float64: the numbers that ``SIGNALS`` weigh, standing ``among`` others or among themselves.

    Where there are no losses theirs are 0.
    """
    utility = standing(signals.utilities, None if among is None else among.utilities)
    if signals.losses is None or (among is not None and among.losses is None):
        loss = torch.zeros_like(utility)
        squared = loss
    else:
        loss = standing(signals.losses, None if among is None else among.losses)
        squared = loss.square() - 1
    return torch.stack([signals.importance, utility, loss, squared], dim=1)


def parts_of(signals: Signals, weights: Tensor) -> dict[str, Tensor]:
    """Signal -> (n,) float64 what it adds to the log-odds of candidates; ``weights`` (F,) as ``Odds`` has them."""
    importance, utility, loss, squared = (design(signals) * weights).unbind(1)
    return {"importance": importance, "utility": utility, "loss": loss + squared}


class Odds:
    """Fits the weights of ``SIGNALS`` to the sequences that were scored lately; a function of what it has learnt."""

    def __init__(self) -> None:
        self.weights = torch.tensor(EXPECTED, dtype=torch.float64)
        """(F,)."""
        self.every = 1
        """Buffers from one that is scored to the next, with ``cadence`` auto."""
        self._rows: list[tuple[Tensor, Tensor]] = []
        """Of each scoring (candidates (m, F), judges (j, F)), the latest last."""

    def learn(self, candidates: Signals, judges: Signals) -> None:
        """Take in a scoring: its candidates, and sequences of the proxy scored beside them; fits the weights again.

        Those with a number that is not finite are left out.
        """
        of_judges = _finite(design(judges, candidates))
        if not len(of_judges):
            return
        of_candidates = _finite(design(candidates))
        if len(of_candidates) > KEPT:
            spaced = torch.linspace(0, len(of_candidates) - 1, KEPT, dtype=torch.float64)
            of_candidates = of_candidates[spaced.round().long()]
        # what no candidate is like says nothing about a choice among them
        least = candidates.importance[candidates.importance.isfinite()].min()
        self._rows.append((of_candidates, of_judges[of_judges[:, 0] >= least]))
        del self._rows[:-WINDOW]
        self._fit()
        self.every = self._cadence(of_candidates)

    def _fit(self) -> None:
        """Make judges and candidates count alike, a judge by 1."""
        pool, proxy = (torch.cat(rows) for rows in zip(*self._rows, strict=True))
        if not len(proxy) or not len(pool):
            return
        x = torch.cat([pool, proxy])
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        y = (torch.arange(len(x)) >= len(pool)).double()
        weight = torch.where(y > 0, 1.0, len(proxy) / len(pool)).double()
        expected = torch.tensor([*EXPECTED, 0.0], dtype=torch.float64)
        self.weights = fit_logistic(x, y, weight, expected)[:-1]

    def _cadence(self, candidates: Tensor) -> int:
        """Take how often it is worth scoring from the variance that the model's scores make in log-odds."""
        if sum(len(proxy) for _, proxy in self._rows) < PROVEN or len(candidates) < 2:
            return 1
        variance = float((candidates * self.weights)[:, 1:].sum(1).var())
        return next((every for every in SELDOM if variance * every >= DECISIVE), SELDOM[-1])

    def named(self, weights: Tensor) -> dict[str, float]:
        """Signal -> its weight."""
        return dict(zip(SIGNALS, weights.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain values; ``load_state_dict`` makes the weights what they were, to the last bit."""
        rows = [[pool.tolist(), proxy.tolist()] for pool, proxy in self._rows]
        return {"weights": self.weights.tolist(), "every": self.every, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.weights = torch.tensor(state["weights"], dtype=torch.float64)
        self.every = int(state["every"])
        self._rows = [(_matrix(pool), _matrix(proxy)) for pool, proxy in state["rows"]]


def _matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(SIGNALS))


def _finite(rows: Tensor) -> Tensor:
    return rows[rows.isfinite().all(1)]
