"""Adafactor against torch's, and its operator against the steps of torch's, transformers' and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TransformersAdafactor

from megaopus.distributed.config import ParallelConfig
from megaopus.engine.config import EngineConfig
from megaopus.optim.adafactor import Adafactor
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import spec_of
from megaopus.selection import build_operator
from tests.harness import example

SHAPES = {"wide": (4, 7), "tall": (9, 3), "vector": (6,), "row": (1, 5)}
FIXED_RATE = {"relative_step": False, "lr": 0.01}
MADE_BY: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "ours": lambda p: Adafactor(p, lr=0.02),
    "ours, another decay": lambda p: Adafactor(p, lr=0.9, beta2_decay=-0.5, eps=(1e-4, 0.3), d=1.5),
    "torch": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "transformers": lambda p: TransformersAdafactor(p),
    "transformers, warm-up": lambda p: TransformersAdafactor(p, warmup_init=True),
    "transformers, fixed rate": lambda p: TransformersAdafactor(p, scale_parameter=False, **FIXED_RATE),
    "transformers, momentum": lambda p: TransformersAdafactor(p, beta1=0.9, clip_threshold=0.5),
}


def gradients(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** (step % 5 - 2)).to(dtype)
        for name, shape in SHAPES.items()
    }


def trained(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: torch.dtype = torch.float64, steps: int = 4
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(99)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }
    optimizer = make(list(parameters.values()))
    for step in range(steps):
        take(parameters, optimizer, gradients(step, dtype))
    return parameters, optimizer


def take(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, gradient: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.grad = gradient[name].clone()
    optimizer.step()


def moved_by(make: Any, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the next step would add to each weight; transformers' history of updates left out."""
    parameters, optimizer = trained(make)
    for state in optimizer.state.values():
        if "exp_avg" in state:
            state["exp_avg"].zero_()
    before = copy.deepcopy(parameters)
    take(parameters, optimizer, gradient)
    return {name: parameter.detach() - before[name].detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"eps": (1e-3, 1e-2), "d": 2.0, "beta2_decay": -0.5}])
def test_it_is_torchs_step_by_step(settings: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        ours, mine = trained(lambda p: Adafactor(p, lr=0.3, **settings), dtype, steps=0)
        theirs, torchs = trained(lambda p: torch.optim.Adafactor(p, lr=0.3, **settings), dtype, steps=0)
        for step in range(20):
            for parameters, optimizer in ((ours, mine), (theirs, torchs)):
                take(parameters, optimizer, gradients(step, dtype))
            for name, parameter in ours.items():
                torch.testing.assert_close(parameter, theirs[name], rtol=tolerance, atol=tolerance)
        for one, other in zip(ours.values(), theirs.values(), strict=True):
            assert mine.state[one].keys() == torchs.state[other].keys()


@pytest.mark.parametrize("made_by", MADE_BY)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_bounded_operator_is_the_optimizers_own_step(made_by: str, size: float) -> None:
    parameters, optimizer = trained(MADE_BY[made_by])
    gradient = {name: size * value for name, value in gradients(50, torch.float64).items()}
    operator = build_operator(parameters, [optimizer]).bounded(gradient)
    applied, moved = operator.apply(gradient), moved_by(MADE_BY[made_by], gradient)
    for name, value in moved.items():
        assert value.abs().min() > 0
        torch.testing.assert_close(-applied[name], value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("made_by", MADE_BY)
def test_the_operator_is_the_difference_of_updates_that_leave_the_state_alone(made_by: str) -> None:
    parameters, optimizer = trained(MADE_BY[made_by])
    gradient = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if parameter.dim() == 1:
            second = state["variance" if "variance" in state else "exp_avg_sq"]
        elif "row_var" in state:
            second = state["row_var"] @ state["col_var"] / state["row_var"].mean()
        else:
            second = torch.outer(state["exp_avg_sq_row"], state["exp_avg_sq_col"]) / state["exp_avg_sq_row"].mean()
        gradient[name] = second.sqrt() * gradients(7, torch.float64)[name].sign()
    applied = build_operator(parameters, [optimizer]).apply(gradient)
    plus = moved_by(MADE_BY[made_by], gradient)
    minus = moved_by(MADE_BY[made_by], {name: -value for name, value in gradient.items()})
    group = optimizer.param_groups[0]
    shrunk = max(1.0, 1 / group.get("d", group.get("clip_threshold")))  # updates of root mean square 1, by the step
    for name in parameters:
        torch.testing.assert_close(-applied[name] / shrunk, (plus[name] - minus[name]) / 2, rtol=1e-8, atol=1e-12)


def test_zero_refuses_it_with_the_reason_and_megatron_serves_it_whole() -> None:
    optim = example("adafactor")
    (refusal,) = EngineConfig(name="deepspeed").refusals(ParallelConfig(), optim)
    assert refusal.key == "optim.name"
    assert "row and column means of whole matrices" in refusal.reason
    assert list(EngineConfig().refusals(ParallelConfig(), optim)) == []
    assert spec_of("adafactor").defaults() == OptimConfig(name="adafactor").own_settings()
