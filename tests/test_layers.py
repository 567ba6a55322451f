"""Who may import whom: the layers of the package, and the one place of each heavy dependency."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megaopus"
ANY = None
SETTINGS = {"checkpoint", "data", "distributed", "engine", "models", "monitor", "optim", "selection"}
# Package or module -> what it may import from megaopus, besides the leaves. ".config" is a package's dataclass alone.
LEAVES = {"settings"}
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "settings": {"errors"},
    "files": set(),
    "train_config": set(),
    "distributed": {"errors"},
    "selection": set(),
    "data": {"errors", "distributed", "files"},
    "models": {"errors", "distributed"},
    "optim": {"errors", "distributed"},
    "engine": {"errors", "distributed", "models", "optim", "selection"},
    "checkpoint": {"errors", "distributed", "files"},
    "monitor": {"errors", "distributed", "files", "config.aliases"},
    "pace": set(),
    "safety": set(),
    "config": {"errors", "models.arithmetic", "train_config"} | {f"{package}.config" for package in SETTINGS},
    "score": {"errors", "data", "build", "checkpoint", "config", "distributed", "engine", "selection"},
    "trainer": {"checkpoint", "data", "engine", "errors", "monitor", "pace", "safety", "selection"},
    "check": ANY,
    "cli": ANY,
    "build": ANY,
    "demo": ANY,
    "replay": ANY,
    "__main__": ANY,
}
ONLY_IN = {
    "megatron": {"models", "engine", "distributed", "optim", "checkpoint", "data"},
    "deepspeed": {"engine"},
    "hydra": {"config"},
    "omegaconf": {"config"},
    "wandb": {"monitor"},
    "tokenizers": {"data"},
    "matplotlib": {"monitor"},
    "pyarrow": {"data", "monitor"},
    "pytorch_optimizer": {"optim"},
    "transformers": {"score"},
    "fasttext": {"score"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str) -> set[str]:
    """Modules named by any import statement, wherever it stands (inside functions and TYPE_CHECKING too)."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names |= {f"megaopus.{alias.name}" for alias in node.names} if module == "megaopus" else {module}
    return names


def layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def breaches(name: str, source: str) -> list[str]:
    """What a file of layer ``name`` imports against the tables above."""
    allowed, found = MAY_IMPORT[name], []
    for module in sorted(imported(source)):
        root, *rest = module.split(".")
        if root == "megaopus" and rest and rest[0] != "__version__":
            own = rest[0] == name
            granted = allowed is ANY or rest[0] in allowed | (LEAVES - {name}) or ".".join(rest[:2]) in allowed
            if not (own or granted):
                found.append(f"{name} must not import {module}")
        elif root in ONLY_IN and name not in ONLY_IN[root]:
            found.append(f"{root} is not for {name}")
        elif name == "selection" and root not in sys.stdlib_module_names | {"torch", "megaopus"}:
            found.append(f"selection needs torch and the standard library only, not {module}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_layers(file):
    assert breaches(layer(file), file.read_text()) == []


def test_the_launcher_needs_the_standard_library_only():
    for file in (PACKAGE.parent / "launch").glob("*.py"):
        assert {name.split(".")[0] for name in imported(file.read_text())} <= sys.stdlib_module_names


def test_a_breach_is_seen():
    assert breaches("data", "from megaopus.selection import Selector") == ["data must not import megaopus.selection"]
    assert breaches("data", "def f():\n    from megaopus import config") == ["data must not import megaopus.config"]
    assert breaches("config", "import megaopus.data.corpus") == ["config must not import megaopus.data.corpus"]
    assert breaches("selection", "import numpy") == ["selection needs torch and the standard library only, not numpy"]
    assert breaches("selection", "import megatron.core") == ["megatron is not for selection"]
    assert breaches("monitor", "import wandb\nimport hydra") == ["hydra is not for monitor"]
    assert breaches("config", "from megaopus.data.config import DataConfig\nimport hydra") == []
