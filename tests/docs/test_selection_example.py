"""The code of docs/selection.md runs, and its loop picks what the proxy asks for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaopus.selection import ModuleBackend, SelectionConfig
from megaopus.selection.operators import registry

DOC = Path(__file__).parents[2] / "docs" / "selection.md"
VOCAB, LENGTH, STEPS = 24, 17, 120


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.S)


def sequences(stride: int, count: int, seed: int) -> Tensor:
    """Tokens that count up in strides, one in ten of them wrong; stride 0: random ones."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, VOCAB, (count, LENGTH), generator=generator)
    start = torch.randint(0, VOCAB, (count, 1), generator=generator)
    wrong = torch.rand(count, LENGTH, generator=generator) < (0.1 if stride else 1)
    return torch.where(wrong, random, (start + stride * torch.arange(LENGTH)) % VOCAB)


def per_sequence_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def run_loop(code: str) -> tuple[float, float]:
    """(share of the wanted kind among the picks after warm-up, final loss on it); it is 8 of 32 candidates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, VOCAB))
    namespace: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-3),
        "per_sequence_loss": per_sequence_loss,
        "proxy_of_step": lambda step: sequences(1, 16, 500_000 + step),
    }
    wanted = []

    def loader() -> Iterator[Tensor]:
        for step in range(STEPS):
            kinds = [sequences(stride, 8, 4 * step + i) for i, stride in enumerate((5, 1, 0, 7))]
            yield torch.cat(kinds)
            if step >= 50:
                wanted.append((namespace["picked"] // 8 == 1).float().mean().item())

    namespace["loader"] = loader()
    exec(code, namespace)
    with torch.no_grad():
        return sum(wanted) / len(wanted), float(per_sequence_loss(model, sequences(1, 64, 999)).mean())


def test_the_ten_line_loop_picks_better_than_random() -> None:
    code = blocks()[0]
    assert len(code.strip().splitlines()) <= 13
    share, loss = run_loop(code)
    uniform = code.replace('method="opus"', 'method="uniform"')
    assert uniform != code
    uniform_share, uniform_loss = run_loop(uniform)
    assert uniform_share == pytest.approx(0.25, abs=0.06)
    assert share > 0.7
    assert loss < 0.8 * uniform_loss


def test_the_example_of_another_optimizer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    model = nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="RMSprop"):
        ModuleBackend(model, optimizer, per_sequence_loss)
    exec(blocks()[1], {})
    backend = ModuleBackend(model, optimizer, per_sequence_loss)
    assert backend.operator() is None
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    gradient = {name: torch.ones_like(p) for name, p in backend.parameters().items()}
    update = backend.operator().apply(gradient)["weight"]
    torch.testing.assert_close(update, torch.full((2, 3), 0.1 / 0.1), rtol=1e-4, atol=0)  # v = 0.01 after one step


def test_every_setting_is_documented_with_its_default() -> None:
    table = DOC.read_text().split("## Settings")[1]
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| `\w[\w.]*\w`", line)]
    documented: dict[str, str] = {}
    for row in rows:
        names, defaults = re.findall(r"`([\w.]+)`", row[1]), [d.strip(" `") for d in row[2].split(",")]
        documented |= dict(zip(names, defaults, strict=True))
    defaults = flat(SelectionConfig())
    assert set(documented) == set(defaults)
    for name, text in documented.items():
        default = defaults[name]
        if isinstance(default, str):
            assert text == default
        elif isinstance(default, list):
            assert text.split() == default
        elif default is None:
            assert text == "null"
        elif isinstance(default, bool):
            assert text == str(default).lower()
        else:
            assert float(text) == default


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every setting."""
    found: dict[str, Any] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        found |= flat(value, f"{prefix}{each.name}.") if is_dataclass(value) else {f"{prefix}{each.name}": value}
    return found


def test_the_package_imports_without_anything_but_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['megatron', 'hydra', 'omegaconf', 'rich', 'matplotlib']))\n"
        "import megaopus.selection\n"
        "own = {m for m in sys.modules if m.startswith('megaopus.') and not m.startswith('megaopus.selection')}\n"
        "print(sorted(own - {f'megaopus.{leaf}' for leaf in ('errors', 'events', 'fs', 'registry', 'settings')}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
