"""Reads the recipes that the command line knows as ``selection=NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaopus.fs import shipped_configs


def preset_names() -> list[str]:
    """List the shipped recipes."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """Read the settings of configs/selection/NAME.yaml, nested as the file is; what it leaves out has its default.

    Raises ValueError for a name that is not there.
    """
    import yaml  # what else is here needs torch alone

    path = _folder() / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no recipe {name!r}: there are {', '.join(preset_names())}")
    own = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    settings: dict[str, Any] = {}
    for base in own.pop("defaults", []):  # Hydra's list of files to begin with
        if base != "_self_":
            settings |= read_preset(base)
    return settings | own


def _folder() -> Path:
    configs = shipped_configs()
    if configs is None:
        raise ValueError("the package's configs/ are not there: install it whole, or give the settings themselves")
    return configs / "selection"
