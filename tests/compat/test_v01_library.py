"""Code that users wrote against ``megaopus.selection`` of version 0.1: names, fields, arguments, protocols.

A backend, candidates, traits and an operator written from the protocols of that version, method by method, must be
taken by a selector, and a subclass's own ``combine`` must be called. Names that were changed since go on as aliases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megaopus.selection
from megaopus.selection import (
    CountSketch,
    CountSketchEstimator,
    GhostLayer,
    KroneckerEstimator,
    ModuleBackend,
    Selection,
    SelectionConfig,
    Selector,
    Shard,
    TensorCandidates,
    adjoint_utilities,
    build_operator,
    directional_utilities,
    exact_utilities,
    register_operator,
)
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.operators import Diagonal, registry

NAMES = [
    *("Batch", "Candidates", "CountSketch", "CountSketchEstimator", "GhostLayer", "Gradient", "KroneckerEstimator"),
    *("ModuleBackend", "Proxy", "ScoringBackend", "Selection", "SelectionConfig", "Selector", "Shard"),
    *("TensorCandidates", "UpdateOperator", "adjoint_utilities", "build_operator", "directional_utilities"),
    *("exact_utilities", "register_operator"),
]
LR = 0.1
OFF = {"exposure_cap": 0, "min_ess": 0.0, "min_distinct": 0.0, "min_unique": 0.0}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_package(name: str) -> None:
    assert hasattr(megaopus.selection, name)
    assert name in megaopus.selection.__all__


# -- what a user wrote -------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """One matrix; the loss of a sequence is the mean square of what it makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 12).view(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean((1, 2))


def sequences(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(seed))


class OwnCandidates:
    """``Candidates``."""

    def __init__(self, x: Tensor, ids: Tensor):
        self._x, self._ids = x, ids

    @property
    def ids(self) -> Tensor:
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, indices: Tensor) -> OwnCandidates:
        return OwnCandidates(self._x[indices], self._ids[indices])

    def batch(self, length: int | None = None) -> Tensor:
        return self._x if length is None else self._x[:, :length]


class OwnTraits:
    """``backend.Traits``."""

    def features(self, ids: Tensor) -> Tensor:
        return torch.stack([ids % 5, ids % 7], 1).float() / 5

    def log_odds(self, ids: Tensor) -> Tensor:
        return (ids % 11).double()

    def importance(self, ids: Tensor) -> Tensor:
        return (ids * 37 % 101).double() / 50

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        return ids % 40 if near else ids

    def domains(self, ids: Tensor) -> Tensor:
        return ids % 3


class OwnOperator:
    """``UpdateOperator`` of plain SGD."""

    def apply(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: LR * value for name, value in gradient.items()}

    def transposed(self) -> OwnOperator:
        return self

    def diagonal(self, name: str) -> Tensor | None:
        return torch.tensor(LR)

    def bounded(self, gradient: dict[str, Tensor]) -> OwnOperator:
        return self

    def sides(self, name: str) -> None:
        return None


class OwnBackend:
    """``ScoringBackend`` of version 0.1, and nothing more, for ``Model`` on one process; notes what it is asked for."""

    rank = 0
    world_size = 1

    def __init__(self, model: Model):
        self.model = model
        self.asked: set[str] = set()

    @property
    def multiple(self) -> int:
        return 1

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def coarse(self) -> bool:
        self.asked.add("coarse")
        return False

    def parameters(self) -> dict[str, Tensor]:
        return {"layer.weight": self.model.layer.weight}

    def shards(self) -> dict[str, Shard]:
        return {}

    def operator(self, muon_operator: str = "paper") -> OwnOperator:
        return OwnOperator()

    def losses(self, candidates: Any, *, length: int | None = None, micro_batch_size: int = 16) -> Tensor:
        with torch.no_grad():
            return loss(self.model, candidates.batch(length)).double()

    def ghost_pass(
        self,
        candidates: Any,
        layers: Iterable[GhostLayer],
        consume: Callable[[GhostLayer, slice, Tensor, Tensor], None],
        *,
        length: int | None = None,
        micro_batch_size: int = 16,
    ) -> None:
        self.asked.add("ghost_pass")
        x = candidates.batch(length)
        with torch.no_grad():
            made = self.model(x)
        for layer in layers:
            consume(layer, slice(0, len(x)), x, 2 * made / made[0].numel())

    def ghost_layers(self) -> list[GhostLayer]:
        return [GhostLayer("layer.weight", self.model.layer, "linear")]

    def gradient(self, proxy: Any, length: int | None = None) -> dict[str, Tensor]:
        (found,) = torch.autograd.grad(loss(self.model, proxy.batch(length)).mean(), [self.model.layer.weight])
        return {"layer.weight": found}

    def exact_gradients(self, batch: Tensor) -> Iterator[dict[str, Tensor]]:
        self.asked.add("exact_gradients")
        weight = self.model.layer.weight.detach().double().requires_grad_()
        for x in batch.double():
            (found,) = torch.autograd.grad((x @ weight.t()).square().mean(), [weight])
            yield {"layer.weight": found}

    @contextmanager
    def perturbed(self, direction: dict[str, Tensor]) -> Iterator[Callable[[float], None]]:
        self.asked.add("perturbed")
        weight, step = self.model.layer.weight.data, direction["layer.weight"]
        before = weight.clone()
        try:
            yield lambda scale: weight.copy_(before + scale * step)
        finally:
            weight.copy_(before)

    def combine(self, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.add("combine")
        return parts, tally

    def from_rank_0(self, values: Tensor) -> Tensor:
        self.asked.add("from_rank_0")
        return values

    def sum_shards(self, values: Tensor) -> Tensor:
        self.asked.add("sum_shards")
        return values

    def sum_parts(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.asked.add("sum_parts")
        return values

    def gather_candidates(self, values: Tensor) -> Tensor:
        self.asked.add("gather_candidates")
        return values

    def sum_stages(self, values: Tensor) -> Tensor:
        self.asked.add("sum_stages")
        return values


def module_backend(kind: type[ModuleBackend] = ModuleBackend) -> ModuleBackend:
    model = Model()
    return kind(model, torch.optim.SGD(model.parameters(), lr=LR), loss, group=None, micro_batch_size=16)


NAMES_OF_CASES = ["directional", "adjoint", "countsketch", "kronecker", "exact", "greats", "high_ppl", "predict"]


def case(name: str) -> SelectionConfig:
    """The settings of a case; made when asked for, so that one name that is gone does not hide the others."""
    by_proxy: dict[str, Any] = {"method": "opus", "proxy_ema": 0.0, "guards": GuardConfig(**OFF)}
    if name == "greats":
        return SelectionConfig(method="greats", estimator="adjoint", guards=GuardConfig(**OFF))
    if name == "high_ppl":
        return SelectionConfig(method="high_ppl", score_length=3, score_window="strided")
    if name == "predict":
        few = PrescreenConfig(mode="predict", slice=8, every=1, window=64, refit=8, prior=1.0, traits=["domain"])
        return SelectionConfig(prescreen=few, **by_proxy)
    more: dict[str, dict[str, Any]] = {
        "directional": {"redundancy": 0.5, "sketch_dim": 64},
        "adjoint": {"contrast": True},
        "countsketch": {"sketch_dim": 64},
        "kronecker": {"redundancy": 1.0, "sketch_dim": 64},
        "exact": {"redundancy": 1.0},
    }
    return SelectionConfig(estimator=name, **more[name], **by_proxy)


def selector_of(config: SelectionConfig, backend: Any) -> Selector:
    return Selector(
        config,
        backend,
        num_selected=4,
        proxy=lambda step: OwnCandidates(sequences(6, 900 + step), torch.arange(6)),
        pool=lambda step: sequences(6, 700 + step),
        seed=7,
        wanted=lambda candidates: candidates.ids % 2 == 0,
        traits=OwnTraits(),
    )


def select(config: SelectionConfig, backend: Any, steps: int = 3) -> list[Selection]:
    selector, found = selector_of(config, backend), []
    for step in range(steps):
        ids = 12 * step + torch.arange(12)
        found.append(selector.select(OwnCandidates(sequences(12, step), ids), step))
        assert selector.check_due(found[-1]) is False
    if config.method == "opus":
        assert selector.proxy_loss(0) > 0
    again = selector_of(config, backend)
    again.load_state_dict(selector.state_dict())
    return found


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_an_own_backend_selects_as_the_librarys(name: str) -> None:
    own = select(case(name), OwnBackend(Model()))
    library = select(case(name), module_backend())
    for ours, theirs in zip(own, library, strict=True):
        assert ours.method == case(name).method
        assert ours.utilities is not None
        torch.testing.assert_close(ours.utilities, theirs.utilities, rtol=1e-3, atol=1e-7, equal_nan=True)
        assert torch.equal(ours.picked_ids, theirs.picked_ids)


def test_every_method_of_an_own_backend_is_called() -> None:
    asked: set[str] = set()
    for name in NAMES_OF_CASES:
        backend = OwnBackend(Model())
        select(case(name), backend)
        asked |= backend.asked
    own = {name for name in vars(OwnBackend) if not name.startswith("_")}
    always = {"rank", "world_size", "multiple", "device", "parameters", "shards", "operator", "losses"}
    always |= {"ghost_layers", "gradient"}
    assert asked == own - always


@pytest.mark.parametrize("name", ["combine", "sum_parts", "gather_candidates", "sum_stages", "sum_shards", "coarse"])
def test_what_a_subclass_overrides_is_called(name: str) -> None:
    """And what it calls in turn, by the same name, is there."""
    calls = []

    def method(self: ModuleBackend, *args: Tensor) -> Any:
        calls.append(name)
        return getattr(super(Own, self), name)(*args)

    def attribute(self: ModuleBackend) -> Any:
        calls.append(name)
        return super(Own, self).coarse

    Own = type("Own", (ModuleBackend,), {name: property(attribute) if name == "coarse" else method})
    for which in ("directional", "kronecker"):
        own = select(case(which), module_backend(Own))
        library = select(case(which), module_backend())
        assert [found.indices.tolist() for found in own] == [found.indices.tolist() for found in library]
    assert calls


def test_fields_of_a_selection() -> None:
    (found,) = select(case("exact"), module_backend(), steps=1)
    assert (found.step, found.method, found.correlation) == (0, "opus", None)
    assert found.ids.tolist() == list(range(12))
    assert torch.equal(found.ids[found.indices], found.picked_ids)
    assert found.scored.all()
    assert found.standing is None
    assert found.exposures is None
    assert found.redundancy.squared_norms.shape == (12,)
    assert found.redundancy.overlaps.shape == (len(found.redundancy.positions), 12)
    assert found.probabilities.sum() == pytest.approx(1)
    assert found.max_p_ratio == pytest.approx(12 * float(found.probabilities.max()))
    assert found.ess == pytest.approx(float(1 / found.probabilities.square().sum()))
    assert found.predicted_fall == pytest.approx(float(found.utilities[found.indices].mean()))
    assert found.uniform_fall == pytest.approx(float(found.utilities.mean()))
    assert (found.events, isinstance(found.notes, list), found.seconds > 0) == ([], True, True)


def test_fields_of_a_predictors_selection() -> None:
    config = SelectionConfig(method="opus", prescreen=case("predict").prescreen, guards=GuardConfig(exposure_cap=1))
    found = select(config, module_backend(), steps=9)[-1]
    assert found.standing.shape == (12,)
    assert found.exposures.tolist() == [1] * 12
    assert isinstance(found.correlation, float)  # 64 scores are known
    assert int(found.scored.sum()) == 8
    assert found.utilities.isnan().sum() == 4


def test_settings_by_their_old_names() -> None:
    config = SelectionConfig(prescreen=PrescreenConfig(traits=["ngrams", "shape"]), guards=GuardConfig(min_ess=3.0))
    assert config.prescreen.traits == ["ngrams", "shape"]
    assert config.guards.min_ess == 3.0
    config.prescreen.traits = ["likelihood"]
    assert config.prescreen.traits == ["likelihood"]
    assert not list(config.problems())
    refused = {key: reason for key, reason, _ in SelectionConfig(rho=2.0, method="best", check_every=-1).problems()}
    assert refused.keys() == {"rho", "method", "check_every"}
    assert refused["rho"] == "must lie in (0, 1]"
    (clash,) = SelectionConfig(method="high_ppl", check_every=5).problems()
    assert clash[1] == "method high_ppl predicts nothing for a proxy"
    assert dataclasses.replace(config, redundancy=0.5).redundancy == 0.5
    assert dataclasses.replace(config.prescreen, traits=["ngrams"]).text_features == ["ngrams"]
    assert (config.needs_proxy, config.needs_pool, config.needs_traits) == (False, False, "")
    with pytest.raises(ValueError, match=r"prescreen.text_features=\['unknown'\]"):
        selector_of(SelectionConfig(prescreen=PrescreenConfig(traits=["unknown"])), module_backend())


def test_functions_on_a_backend() -> None:
    """The estimators by themselves agree, by the arguments of version 0.1."""
    backend = module_backend()
    candidates = TensorCandidates(sequences(8, 1), torch.arange(8))
    gradient = backend.gradient(TensorCandidates(sequences(6, 2)), length=None)
    operator = build_operator(backend.parameters(), backend.optimizers, muon_operator="paper")
    given = (backend, candidates, operator, gradient)
    exact = exact_utilities(*given, parameters=["layer.weight"], length=None)
    close = {"rtol": 1e-2, "atol": 1e-5}
    passes = {"layers": "linear", "length": None, "micro_batch_size": 4}
    torch.testing.assert_close(adjoint_utilities(*given, **passes), exact, **close)
    directional = directional_utilities(*given, epsilon=0.01, sides="central", **{**passes, "layers": "all"})
    torch.testing.assert_close(directional, exact, rtol=0.05, atol=1e-3)
    for estimator in (CountSketchEstimator(4096, 1, "linear"), KroneckerEstimator(4096, 1, "linear")):
        parts, kept = estimator.estimate(*given, keep_sketches=True, length=None, micro_batch_size=4)
        assert torch.corrcoef(torch.stack([parts, exact]))[0, 1] > 0.9
        assert list(kept) == ["layer.weight"]
    sketch = CountSketch("layer.weight", torch.arange(12), 64, seed=1)
    assert sketch(torch.ones(2, 12)).shape == (2, sketch.dim)
    assert sketch.transpose(torch.ones(64)).shape == (12,)


def test_an_own_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule registered for a class, with the operator that docs/selection.md shows."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register_operator("Rprop", lambda group, state, parameter: Diagonal(torch.tensor(group["lr"])))
    model = Model()
    backend = ModuleBackend(model, torch.optim.Rprop(model.parameters(), lr=LR), loss)
    assert [found.picked_ids.tolist() for found in select(case("exact"), backend)] == [
        found.picked_ids.tolist() for found in select(case("exact"), module_backend())
    ]


def test_descriptions_of_layers() -> None:
    """By the keywords of version 0.1."""
    shard = Shard(dim=0, index=torch.arange(2), size=4, gather=lambda part: part)
    assert (shard.dim, shard.size) == (0, 4)
    layer = GhostLayer(
        parameter="weight",
        module=Model().layer,
        kind="linear",
        sequence_first=False,
        collect=None,
        first_row=0,
        counted=True,
        tied=False,
    )
    assert (layer.parameter, layer.kind, layer.counted, layer.tied) == ("weight", "linear", True, False)
