"""Each optimizer's published update in float64, in plain numpy, and how to hold its state for a derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from megaopus.optim.conda import rotate

Array = np.ndarray


def newton_schulz(u: Array, steps: int = 5) -> Array:
    """Quintic iteration on the short side."""
    x = (u.T if u.shape[0] > u.shape[1] else u) / (np.linalg.norm(u) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def first_factor(momentum: Array, other: Array) -> Array:
    """The polynomial S_1 in ``momentum``'s Gram matrix, applied to ``other``, over ``momentum``'s norm."""
    tall = momentum.shape[0] > momentum.shape[1]
    x, y = (v.T if tall else v for v in (momentum, other))
    norm = np.linalg.norm(x)
    a = (x / norm) @ (x / norm).T
    found = (3.4445 * np.eye(len(a)) - 4.7750 * a + 2.0315 * a @ a) @ y / norm
    return found.T if tall else found


def hold_average(state: dict[str, Tensor], key: str, value: Tensor, beta: float) -> None:
    """Change an average so that ``value`` brings it, corrected for its start, to where it stood."""
    step = float(state["step"])
    target = state[key] * ((1 - beta ** (step + 1)) / (1 - beta**step))
    state[key].copy_((target - (1 - beta) * value) / beta)


REFERENCES: dict[str, type[Reference]] = {}
"""Name in the registry of optimizers -> its reference."""
MATRICES = [(7, 5), (5, 7), (6, 6), (33, 4), (1, 9)]


@dataclass
class Reference:
    """State of one weight. ``update``: what a step adds to ``w``, decay included, and the state after it.

    A subclass names the optimizer that it is of, and where they are not the ones below: its settings and its constants
    for them, a case more at another learning rate, and shapes of weights beside matrices.
    """

    optim: ClassVar[dict[str, Any]] = {"betas": [0.9, 0.95]}
    also_at: ClassVar[float | None] = None
    shapes: ClassVar[list[tuple[int, ...]]] = [*MATRICES, (6,)]

    def __init_subclass__(cls, of: str) -> None:
        REFERENCES[of] = cls

    w: Array
    lr: float
    wd: float = 0.0
    t: int = 0
    s: dict[str, Any] = field(default_factory=dict)

    def longest_step(self) -> float | None:
        """Learning rates that a bounded operator moves a weight by at most; None: nothing bounds it."""
        return None

    def stated(self, g: Array) -> Array | None:
        """P_t g by its formula (docs/optimizers.md), where the default P_t is not the derivative of the step."""
        return None

    @staticmethod
    def hold(state: dict[str, Tensor], group: dict[str, Any], gradient: Tensor) -> None:
        """Change an optimizer's ``state`` so that an update by ``gradient`` leaves what P_t freezes where it stood."""

    @staticmethod
    def near(state: dict[str, Tensor]) -> tuple[Tensor | float, Tensor | float]:
        """(gradient at which P_t is the derivative of the step, size of steps from there for a finite difference)."""
        return 0.0, 1.0

    def average(self, key: str, value: Any, weight: float) -> Any:
        self.s[key] = weight * self.s.get(key, np.zeros_like(value)) + (1 - weight) * value
        return self.s[key]


@dataclass
class Muon(Reference, of="muon"):
    shapes = MATRICES
    mu: float = 0.95

    def update(self, g: Array) -> None:
        u = (1 - self.mu) * g + self.mu * self.average("m", g, self.mu)
        scale = math.sqrt(max(1, g.shape[0] / g.shape[1]))
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * scale * newton_schulz(u)

    def stated(self, g: Array) -> Array:
        scale = math.sqrt(max(1, g.shape[0] / g.shape[1]))
        return self.lr * scale * (1 - self.mu**2) * first_factor(self.s["m"], g)

    @staticmethod
    def near(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return state["momentum_buffer"], 1e-6 * state["momentum_buffer"].norm()


@dataclass
class Namo(Reference, of="namo"):
    shapes = MATRICES
    also_at = 4.0  # where the step is clipped
    mu: float = 0.95
    mu2: float = 0.99

    def update(self, g: Array) -> None:
        self.t += 1
        v = self.average("v", np.float64((g**2).sum()), self.mu2)
        u = (1 - self.mu) * g + self.mu * self.average("m", g, self.mu)
        bias = math.sqrt(1 - self.mu2**self.t) / (1 - self.mu**self.t)
        a = self.lr * bias * np.linalg.norm(u) / (math.sqrt(v) + 1e-8)
        scale = min(0.2 * math.sqrt(max(g.shape)) * a, 1)
        self.w = (1 - a * self.wd) * self.w - scale * newton_schulz(u)

    def stated(self, g: Array) -> Array:
        bias = math.sqrt(1 - self.mu2**self.t) / (1 - self.mu ** (self.t + 1))
        a = self.lr * bias * np.linalg.norm(self.s["m"]) / (math.sqrt(self.s["v"]) + 1e-8)
        return min(0.2 * math.sqrt(max(g.shape)) * a, 1) * (1 - self.mu**2) * first_factor(self.s["m"], g)

    near = Muon.near

    @staticmethod
    def hold(state: dict[str, Tensor], group: dict[str, Any], gradient: Tensor) -> None:
        hold_average(state, "v_squared", gradient.square().sum(), group["mu2"])


@dataclass
class NamoD(Reference, of="namo_d"):
    shapes = MATRICES
    optim: ClassVar = {"settings": {"clamp": 0.5}}
    mu: float = 0.95
    mu2: float = 0.99
    c: float = 0.5

    def scales(self, norms: Array, t_second: int, t_first: int) -> tuple[Array, float]:
        eta = self.lr * math.sqrt(1 - self.mu2**t_second) / (1 - self.mu**t_first)
        s = norms / (np.sqrt(self.s["v"]) + 1e-8)
        clamped = np.clip(s, self.c * s.mean(), s.mean() / self.c)
        return np.minimum(0.2 * math.sqrt(max(self.w.shape)) * eta * clamped, 1), eta * s.mean()

    def update(self, g: Array) -> None:
        self.t += 1
        self.average("v", (g**2).sum(0), self.mu2)
        u = (1 - self.mu) * g + self.mu * self.average("m", g, self.mu)
        scales, a = self.scales(np.linalg.norm(u, axis=0), self.t, self.t)
        self.w = (1 - a * self.wd) * self.w - newton_schulz(u) * scales

    def stated(self, g: Array) -> Array:
        scales, _ = self.scales(np.linalg.norm(self.s["m"], axis=0), self.t, self.t + 1)
        return (1 - self.mu**2) * first_factor(self.s["m"], g) * scales

    near = Muon.near

    @staticmethod
    def hold(state: dict[str, Tensor], group: dict[str, Any], gradient: Tensor) -> None:
        hold_average(state, "V", gradient.square().sum(0), group["mu2"])


@dataclass
class SophiaG(Reference, of="sophia_g"):
    optim: ClassVar = {"betas": [0.9, 0.99]}
    b1: float = 0.9
    b2: float = 0.99
    rho: float = 0.05

    def longest_step(self) -> float:
        return 1.0

    def estimate(self, g: Array, tokens: int) -> None:
        self.average("h", tokens * g**2, self.b2)

    def update(self, g: Array) -> None:
        m = self.average("m", g, self.b1)
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * self.step(m)

    def step(self, m: Array) -> Array:
        return np.sign(m) * np.minimum(np.abs(m) / (self.rho * self.s["h"] + 1e-15), 1)

    @staticmethod
    def near(state: dict[str, Tensor]) -> tuple[float, Tensor]:
        return 0.0, 1e-4 * state["exp_avg"].abs()  # so small that no sign turns and nothing saturates on the way


@dataclass
class SgdSai(Reference, of="sgd_sai"):
    shapes: ClassVar = [*Reference.shapes, (1,)]
    mu: float = 0.9

    def update(self, g: Array) -> None:
        if "gsnr" not in self.s and np.any(g):
            flat = g.size == 1 or np.ptp(g) == 0
            self.s["gsnr"] = 1.0 if flat else np.linalg.norm(g) / (g.std(ddof=1) + 1e-8)
        m = self.average("m", g, self.mu)
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * self.s.get("gsnr", 0.0) * m


@dataclass
class Conda(Reference, of="conda"):
    shapes = MATRICES
    optim: ClassVar = {"betas": [0.9, 0.99], "settings": {"projection_every": 3}}
    b1: float = 0.9
    b2: float = 0.99
    scale: float = 0.25
    every: int = 3

    def longest_step(self) -> float:
        return 2.3 * self.scale * max(self.w.shape) ** 0.5  # in its basis: each entry

    def update(self, g: Array) -> None:
        m = self.average("m", g, self.b1)
        if self.t % self.every == 0:
            left, _, right = np.linalg.svd(m)
            self.s["q"] = left if m.shape[0] <= m.shape[1] else right.T
        self.t += 1
        v = self.average("v", self.rotated(g) ** 2, self.b2)
        bias = math.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        step = self.back(self.rotated(m) / (np.sqrt(v) + 1e-8))
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * self.scale * bias * step

    def rotated(self, x: Array) -> Array:
        return self.s["q"].T @ x if x.shape[0] <= x.shape[1] else x @ self.s["q"]

    def back(self, x: Array) -> Array:
        return self.s["q"] @ x if x.shape[0] <= x.shape[1] else x @ self.s["q"].T

    @staticmethod
    def near(state: dict[str, Tensor]) -> tuple[float, Tensor]:
        return 0.0, state["exp_avg_sq"].mean().sqrt()

    @staticmethod
    def hold(state: dict[str, Tensor], group: dict[str, Any], gradient: Tensor) -> None:
        hold_average(state, "exp_avg_sq", rotate(gradient, state["projection"]).square(), group["betas"][1])


@dataclass
class Lion(Reference, of="lion"):
    optim: ClassVar = {"betas": [0.95, 0.98]}
    b1: float = 0.95
    b2: float = 0.98

    def longest_step(self) -> float:
        return 1.0

    def update(self, g: Array) -> None:
        c = self.b1 * self.s.get("m", np.zeros_like(g)) + (1 - self.b1) * g
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * np.sign(c)
        self.average("m", g, self.b2)

    def stated(self, g: Array) -> Array:
        return self.lr * (1 - self.b1) * g / np.abs(self.b1 * self.s["m"])

    @staticmethod
    def near(state: dict[str, Tensor]) -> tuple[float, Tensor]:
        return 0.0, 1e-4 * state["exp_avg"].abs()  # so small that no sign turns


@dataclass
class AdamW(Reference, of="adamw"):
    b1: float = 0.9
    b2: float = 0.95

    def longest_step(self) -> float:
        return 2.3  # sqrt(1 / (1 - b2)) (1 - b1) / (1 - b1^t) < 1

    def update(self, g: Array) -> None:
        self.t += 1
        m, v = self.average("m", g, self.b1), self.average("v", g**2, self.b2)
        step = m / (1 - self.b1**self.t) / (np.sqrt(v / (1 - self.b2**self.t)) + 1e-8)
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * step

    @staticmethod
    def near(state: dict[str, Tensor]) -> tuple[float, Tensor]:
        return 0.0, state["exp_avg_sq"].sqrt()

    @staticmethod
    def hold(state: dict[str, Tensor], group: dict[str, Any], gradient: Tensor) -> None:
        hold_average(state, "exp_avg_sq", gradient.square(), group["betas"][1])


@dataclass
class Sgd(Reference, of="sgd"):
    mu: float = 0.9

    def update(self, g: Array) -> None:
        g = g + self.wd * self.w
        self.s["m"] = self.mu * self.s.get("m", 0) + g
        self.w = self.w - self.lr * self.s["m"]


@dataclass
class Adafactor(Reference, of="adafactor"):
    eps1: float = float(np.finfo(np.float32).eps)

    def rate(self, t: int) -> float:
        return max(1e-3, float(np.sqrt((self.w**2).mean()))) * min(self.lr, t**-0.5)

    def root(self) -> Array:
        if "v" in self.s:
            return np.maximum(np.sqrt(self.s["v"]), self.eps1)
        mean = max(float(self.s["r"].mean()), self.eps1)
        return np.maximum(np.sqrt(np.outer(self.s["r"], self.s["c"]) / mean), self.eps1)

    def update(self, g: Array) -> None:
        self.t += 1
        weight = self.t**-0.8
        moments = {"v": g**2} if g.ndim == 1 else {"r": (g**2).mean(1), "c": (g**2).mean(0)}
        for key, value in moments.items():
            self.average(key, value, 1 - weight)
        u, rate = g / self.root(), self.rate(self.t)
        step = rate * u / max(1.0, float(np.sqrt((u**2).mean())))
        self.w = (1 - self.lr * self.wd) * self.w - step

    @staticmethod
    def near(state: dict[str, Tensor]) -> tuple[float, Tensor]:
        return 0.0, 0.01 * next(state[key] for key in ("row_var", "variance") if key in state).mean().sqrt()

    @staticmethod
    def hold(state: dict[str, Tensor], group: dict[str, Any], gradient: Tensor) -> None:
        weight = (float(state["step"]) + 1) ** group["beta2_decay"]
        square = gradient.square()
        means = (
            {"row_var": square.mean(-1, keepdim=True), "col_var": square.mean(-2, keepdim=True)}
            if square.ndim > 1
            else {"variance": square}
        )
        for key, mean in means.items():
            state[key].sub_(weight * mean).div_(1 - weight)

    def longest_step(self) -> float:
        return self.w.size**0.5 * max(1e-3, float(np.sqrt((self.w**2).mean())))
