"""P_t of every optimizer against the optimizer's own update."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from megaopus.selection import build_operator, register_operator
from megaopus.selection.operators.maps import Diagonal
from tests.unit.optim_references import newton_schulz

SHAPES = {"wide": (4, 7), "tall": (9, 3), "vector": (6,)}
SGD_SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "weight_decay": 0.1},
]
ADAM_SETTINGS = [{}, {"betas": (0.8, 0.95), "eps": 1e-3}, {"weight_decay": 0.1}, {"amsgrad": True}]


def trained(make, names=tuple(SHAPES), steps: int = 3):
    """(parameters by name, optimizer) after a few steps on random gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)) for name in names
    }
    optimizer = make(list(parameters.values()))
    for _ in range(steps):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return parameters, optimizer


def updates(parameters: dict[str, Tensor], optimizer, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the optimizer's next step would add to each weight, given a gradient; nothing is changed."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    state = copy.deepcopy(optimizer.state_dict())
    for name, p in parameters.items():
        p.grad = gradient[name].clone()
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
    optimizer.load_state_dict(state)
    return moved


@pytest.mark.parametrize("settings", SGD_SETTINGS)
@pytest.mark.parametrize("steps", [0, 3])
def test_sgd_operator_is_the_difference_of_its_updates(settings, steps) -> None:
    parameters, optimizer = trained(lambda p: torch.optim.SGD(p, lr=0.2, **settings), steps=steps)
    operator = build_operator(parameters, [optimizer])
    gradient = {name: torch.randn_like(p) for name, p in parameters.items()}
    zero = {name: torch.zeros_like(p) for name, p in parameters.items()}
    applied = operator.apply(gradient)
    with_g, without = updates(parameters, optimizer, gradient), updates(parameters, optimizer, zero)
    for name in parameters:
        torch.testing.assert_close(-applied[name], with_g[name] - without[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", ADAM_SETTINGS)
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_operator_is_the_difference_of_its_updates(cls, settings) -> None:
    if cls is torch.optim.Adam:  # its weight decay is part of the gradient, so it moves v too
        settings = {**settings, "weight_decay": 0.0}
    parameters, optimizer = trained(lambda p: cls(p, lr=0.01, **settings))
    if settings.get("amsgrad"):  # let v be its own maximum, as after a rise
        for state in optimizer.state.values():
            state["max_exp_avg_sq"].copy_(state["exp_avg_sq"])
    operator = build_operator(parameters, [optimizer])
    beta2 = optimizer.param_groups[0]["betas"][1]
    # a gradient with g^2 = v / (1 - b2^(t-1)) leaves the corrected v as it is: frozen state, exactly
    gradient = {}
    for name, p in parameters.items():
        state = optimizer.state[p]
        sign = torch.randint(0, 2, p.shape, generator=torch.Generator().manual_seed(1)) * 2.0 - 1
        gradient[name] = sign * (state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))).sqrt()
    applied = operator.apply(gradient)
    plus = updates(parameters, optimizer, gradient)
    minus = updates(parameters, optimizer, {name: -g for name, g in gradient.items()})
    for name in parameters:
        torch.testing.assert_close(-applied[name], (plus[name] - minus[name]) / 2, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(operator.diagonal(name) * gradient[name], applied[name])


@pytest.mark.parametrize("settings", [{}, {"betas": (0.8, 0.95), "eps": 1e-3}, {"amsgrad": True}])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_bounded_adam_operator_is_the_update_without_its_history(settings, size) -> None:
    """For gradients of any size, the tiny second moment of a row hardly ever seen included."""
    parameters, optimizer = trained(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, **settings))
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"][0] = 1e-20
        if settings.get("amsgrad"):
            state["max_exp_avg_sq"][0] = 1e-20
    gradient = {name: size * torch.randn_like(p) for name, p in parameters.items()}
    operator = build_operator(parameters, [optimizer]).bounded(gradient)
    moved, applied = updates(parameters, optimizer, gradient), operator.apply(gradient)
    (beta1, beta2), step = optimizer.param_groups[0]["betas"], 4
    bound = 0.01 * (1 - beta1) / (1 - beta1**step) * ((1 - beta2**step) / (1 - beta2)) ** 0.5
    for name in parameters:
        torch.testing.assert_close(-applied[name], moved[name], rtol=1e-9, atol=1e-15)
        assert float(applied[name].abs().max()) <= bound * (1 + 1e-12)
        twice = operator.apply({name: 2 * gradient[name]})[name]
        torch.testing.assert_close(twice, 2 * applied[name])  # linear: the gradient that bounds it is another matter


def test_states_that_bound_no_step_stay_frozen() -> None:
    for make in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Muon(p, lr=0.1)):
        parameters, optimizer = trained(make, names=("wide", "tall"))
        operator = build_operator(parameters, [optimizer])
        gradient = {name: torch.randn_like(p) for name, p in parameters.items()}
        for name, value in operator.bounded(gradient).apply(gradient).items():
            assert torch.equal(value, operator.apply(gradient)[name])


MUON_SETTINGS = [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 3, "momentum": 0.8}]


@pytest.mark.parametrize("settings", MUON_SETTINGS)
def test_full_muon_operator_is_the_derivative_of_the_iteration_at_its_momentum(settings) -> None:
    """torch's class, which iterates in bfloat16, too coarsely to take differences of its own steps."""
    make = lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.0, **settings)  # noqa: E731
    parameters, optimizer = trained(make, names=("wide", "tall"))
    operator, group = build_operator(parameters, [optimizer], "full"), optimizer.param_groups[0]
    for name, p in parameters.items():
        momentum, g = optimizer.state[p]["momentum_buffer"].numpy(), torch.randn_like(p).detach().numpy()
        rows, columns = momentum.shape
        matched = group["adjust_lr_fn"] == "match_rms_adamw"
        scale = 0.2 * max(rows, columns) ** 0.5 if matched else max(1, rows / columns) ** 0.5
        kappa, h = 1 - group["momentum"] ** (2 if group["nesterov"] else 1), 1e-6
        ahead, back = (newton_schulz(momentum + sign * h * g, group["ns_steps"]) for sign in (1, -1))
        expected = torch.tensor(0.02 * scale * kappa * (ahead - back) / (2 * h))
        found = operator.apply({name: torch.tensor(g)})[name]
        assert (found - expected).norm() < 1e-6 * expected.norm()


def test_paper_muon_operator_is_the_first_factor_at_the_scale_of_the_momentum() -> None:
    parameters, optimizer = trained(lambda p: torch.optim.Muon(p, lr=0.02, momentum=0.95), names=("wide", "tall"))
    operator = build_operator(parameters, [optimizer], "paper")
    a, b, c = optimizer.param_groups[0]["ns_coefficients"]
    for name, p in parameters.items():
        g = torch.randn_like(p)
        q = optimizer.state[p]["momentum_buffer"]
        norm = q.norm()
        q = q / norm
        if name == "tall":
            expected = (a * torch.eye(3) + b * q.t() @ q + c * (q.t() @ q) @ (q.t() @ q)).double()
            expected = g @ expected * (9 / 3) ** 0.5
        else:
            expected = (a * torch.eye(4) + b * q @ q.t() + c * (q @ q.t()) @ (q @ q.t())).double() @ g
        expected = expected * 0.02 * (1 - 0.95**2) / norm
        torch.testing.assert_close(operator.apply({name: g})[name], expected, rtol=1e-5, atol=1e-7)


ALL = {
    "sgd": lambda p: [torch.optim.SGD(p, lr=0.1, momentum=0.9)],
    "adamw": lambda p: [torch.optim.AdamW(p, lr=0.01)],
    "hybrid": lambda p: [torch.optim.Muon(p[:2], lr=0.02), torch.optim.AdamW(p[2:], lr=0.01)],
}


@pytest.mark.parametrize("muon_operator", ["paper", "full"])
@pytest.mark.parametrize("kind", sorted(ALL))
def test_operators_are_linear_and_all_but_a_full_muon_self_adjoint_and_positive(kind, muon_operator) -> None:
    generator = torch.Generator().manual_seed(3)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    optimizers = ALL[kind](list(parameters.values()))
    for _ in range(3):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    operator = build_operator(parameters, optimizers, muon_operator)
    g, h = ({n: torch.randn(p.shape, generator=generator).double() for n, p in parameters.items()} for _ in range(2))
    pg, ph = operator.apply(g), operator.apply(h)
    both = operator.apply({name: 2 * g[name] - h[name] for name in g})
    for name in parameters:
        if (kind, muon_operator) != ("hybrid", "full") or name == "vector":
            assert (pg[name] * h[name]).sum().item() == pytest.approx((g[name] * ph[name]).sum().item(), rel=1e-6)
            assert (pg[name] * g[name]).sum() > 0
        torch.testing.assert_close(both[name], 2 * pg[name] - ph[name])
        stacked = operator.apply({name: torch.stack([g[name], h[name]])})[name]  # a leading batch axis
        torch.testing.assert_close(stacked, torch.stack([pg[name], ph[name]]))


def test_there_is_no_operator_before_the_optimizer_has_state() -> None:
    parameters, optimizer = trained(lambda p: torch.optim.AdamW(p), steps=0)
    assert build_operator(parameters, [optimizer]) is None
    for p in parameters.values():  # zeros as a checkpoint loader allocates them
        zero = torch.zeros_like(p)
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": zero.clone()}
    assert build_operator(parameters, [optimizer]) is None
    muon_parameters, muon = trained(lambda p: torch.optim.Muon(p), names=("wide",), steps=0)
    assert build_operator(muon_parameters, [muon]) is None
    ready, adam = trained(lambda p: torch.optim.AdamW(p), names=("vector",))
    assert build_operator({**muon_parameters, **ready}, [muon, adam]) is None  # half a step is no step


def test_a_weight_that_never_had_a_gradient_does_not_move() -> None:
    parameters, optimizer = trained(lambda p: torch.optim.AdamW(p))
    del optimizer.state[parameters["wide"]]
    operator = build_operator(parameters, [optimizer])
    assert operator.apply({"wide": torch.ones(4, 7)})["wide"].abs().max() == 0
    assert operator.diagonal("wide").item() == 0
    assert operator.apply({"tall": torch.ones(9, 3)})["tall"].abs().min() > 0


def test_apex_style_fused_adam_keeps_its_step_in_the_group() -> None:
    parameters, optimizer = trained(lambda p: torch.optim.AdamW(p, lr=0.01))

    class FusedAdam(torch.optim.Optimizer):
        pass

    fused = FusedAdam(list(parameters.values()), {**optimizer.defaults, "step": 3, "bias_correction": True})
    for p in parameters.values():
        fused.state[p] = {key: optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    g = {name: torch.randn_like(p) for name, p in parameters.items()}
    expected, found = (build_operator(parameters, [o]).apply(g) for o in (optimizer, fused))
    torch.testing.assert_close(found, expected)


def test_unknown_optimizers_are_refused_until_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class SignDescent(torch.optim.Optimizer):
        pass

    parameter = nn.Parameter(torch.ones(3))
    optimizer = SignDescent([parameter], {"lr": 0.5})
    with pytest.raises(TypeError, match=r"SignDescent.*register_operator"):
        build_operator({"w": parameter}, [optimizer])
    monkeypatch.setattr("megaopus.selection.operators.registry._REGISTERED", {})
    register_operator("SignDescent", lambda group, state, parameter: Diagonal(torch.tensor(group["lr"])))
    operator = build_operator({"w": parameter}, [optimizer])
    assert operator.apply({"w": torch.ones(3)})["w"].tolist() == [0.5] * 3


def test_subclasses_inherit_their_operator_and_maximize_is_refused() -> None:
    class Renamed(torch.optim.AdamW):
        pass

    parameters, optimizer = trained(lambda p: Renamed(p))
    assert build_operator(parameters, [optimizer]) is not None
    parameters, optimizer = trained(lambda p: torch.optim.SGD(p, lr=0.1, maximize=True))
    with pytest.raises(ValueError, match="negate the loss"):
        build_operator(parameters, [optimizer])
