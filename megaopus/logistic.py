"""Fits a logistic regression."""

from __future__ import annotations

import torch
from torch import Tensor


def fit_logistic(x: Tensor, y: Tensor, weight: Tensor, expected: Tensor | None = None) -> Tensor:
    """Find the (F,) float64 weights of least logistic loss plus |w - expected|^2 / 2, by Newton's method.

    Args:
        x: (n, F) float64; the last column is ones, whose weight (the intercept) is free.
        y: (n,) float64, 1 or 0.
        weight: (n,) float64, how much each row counts.
        expected: (F,) what the weights are without evidence; None: 0.
    """
    penalty = torch.ones(x.shape[1], dtype=torch.float64)
    penalty[-1] = 1e-9
    expected = torch.zeros_like(penalty) if expected is None else expected

    columns = x.t().contiguous()

    def loss(weights: Tensor) -> float:
        odds = x @ weights
        return float(weight @ (torch.nn.functional.softplus(odds) - y * odds) + penalty @ (weights - expected) ** 2 / 2)

    found = expected.clone()
    for _ in range(50):
        p = torch.sigmoid(x @ found)
        slope = columns @ (weight * (p - y)) + penalty * (found - expected)
        # sums along contiguous rows: a product of such thin float64 matrices can be far slower on a CPU
        each = columns * (weight * p * (1 - p))
        curvature = (each.unsqueeze(0) * columns.unsqueeze(1)).sum(-1) + penalty.diag()
        step = torch.linalg.solve(curvature, slope)
        while loss(found - step) > loss(found) and float(step.abs().max()) > 1e-9:
            step = step / 2
        found = found - step
        if float(step.abs().max()) < 1e-9:
            break
    return found
