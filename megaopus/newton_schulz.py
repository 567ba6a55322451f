"""Orthogonalises matrices, as Muon and its kin move by."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """Newton-Schulz iteration X <- aX + (bA + cA^2)X, A = XX^T, from X = matrix / ||matrix||_F, on the short side.

    Source: Keller Jordan et al., "Muon", 2024. ``matrix``: (m, n), or several of one shape (k, m, n). fp32 on CUDA
    becomes bf16, in which it was meant to run: tensor cores take fifteen times less for it than fp32 takes outside
    them (H100). Any other runs, and returns, in its own type. Shape kept; differentiable.
    """
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    norm = x.norm() if x.ndim == 2 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / (norm + eps)
    x = x.to(working_type(x))
    multiplied = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = multiplied(x, multiplied(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def working_type(matrix: Tensor) -> torch.dtype:
    """Say in which type ``orthogonalise`` works and returns."""
    return torch.bfloat16 if matrix.device.type == "cuda" and matrix.dtype == torch.float32 else matrix.dtype


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of one type as ``orthogonalise`` does, and return that type."""
    kind = working_type(left)
    return (left.to(kind) @ right.to(kind)).to(left.dtype)
