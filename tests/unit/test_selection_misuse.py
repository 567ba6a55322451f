"""Mistakes with the library are told where they are made, in words; shipped recipes are at hand by name."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaopus.config.compose import compose
from megaopus.selection import ModuleBackend, SelectionConfig, Selector
from megaopus.selection.presets import preset_names
from tests.unit.config_corpus import write_manifest


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean(1)


def backend(loss: Any = loss, **more: Any) -> ModuleBackend:
    model = nn.Linear(3, 3)
    return ModuleBackend(model, torch.optim.AdamW(model.parameters()), loss, **more)


def selector(config: SelectionConfig | None = None, proxy: Any = lambda step: torch.ones(4, 3)) -> Selector:
    return Selector(config or SelectionConfig(method="opus"), backend(), num_selected=2, proxy=proxy, seed=1)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_what_the_command_line_makes_of_its_name(name: str, tmp_path) -> None:
    corpus = write_manifest(tmp_path / "corpus")
    lengths = ["data.seq_len=1024", "train.steps=1000"]
    config = compose([f"data.path={corpus}", "data.target_domains=[docs]", *lengths, f"selection={name}"])
    assert SelectionConfig.preset(name) == config.selection


def test_a_preset_with_settings_of_ones_own() -> None:
    config, own = SelectionConfig.preset("opus"), {"rho": 0.25, "prescreen": {"every": 8}}
    expected = asdict(config) | {"rho": 0.25}
    expected["prescreen"]["every"] = 8
    assert asdict(SelectionConfig.preset("opus", **own)) == expected


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SelectionConfig.preset("opsu"), ValueError, r"no recipe 'opsu': there are .*opus_paper"),
        (lambda: SelectionConfig.preset("opus", rho=3), ValueError, r"rho=3: must lie in \(0, 1\]"),
        (lambda: SelectionConfig.preset("opus", rhoo=0.5), ValueError, r"unexpected keyword argument 'rhoo'"),
        (lambda: selector(SelectionConfig(method="opsu")), ValueError, r"method='opsu': unknown choice \(did you mean"),
        (lambda: selector(proxy=torch.ones(4, 3)), TypeError, r"proxy= must be a function of the step, such as lambda"),
        (
            lambda: backend(lambda model, batch: model(batch).square().mean(), example=torch.ones(2, 3)),
            ValueError,
            r"returned shape \(\) for 2 sequences: it must return \(2,\)",
        ),
        (
            lambda: ModuleBackend(nn.Linear(3, 3), torch.optim.SGD(nn.Linear(3, 3).parameters()), loss),
            ValueError,
            r"none of the 2 parameters that the optimizer holds is a trained one of this model",
        ),
    ],
)
def test_mistakes_are_told_at_construction(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def of_width(width: int) -> Selector:
    model = nn.Linear(width, 3)
    config = SelectionConfig(method="opus", estimator="exact", proxy_half_life=3.0, score_micro_batch_size=2)
    shown = ModuleBackend(model, torch.optim.SGD(model.parameters(), momentum=0.9), loss)
    made = Selector(config, shown, num_selected=2, proxy=lambda step: torch.ones(4, width), seed=1)
    loss(model, torch.ones(4, width)).mean().backward()
    shown.optimizers[0].step()
    return made


def test_a_wrong_state_is_refused_and_changes_nothing() -> None:
    right, wide = of_width(3), of_width(4)
    for each, width in ((right, 3), (wide, 4)):
        each.select(torch.arange(8.0 * width).reshape(8, width), 0)
    before = right.state_dict()
    for state, words in (
        (wide.state_dict(), r"of another model: 1 of its 2 tensors .* weight of shape \(3, 4\) \(here: \(3, 3\)\)"),
        (nn.Linear(3, 3).state_dict(), r"not what Selector.state_dict\(\) gave: bias, weight"),
        (None, r"not what Selector.state_dict\(\) gave: <class 'NoneType'>"),
    ):
        with pytest.raises(ValueError, match=words):
            right.load_state_dict(state)
    assert str(right.state_dict()) == str(before)
    assert before["count"] == 1
    of_width(3).load_state_dict(before)
