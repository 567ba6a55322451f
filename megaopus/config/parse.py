"""Makes a RunConfig of plain values, from files that we wrote or that Hydra composed, and reports every misfit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from megaopus.config.aliases import REFUSED, as_saved, renamed
from megaopus.config.run_config import SETTINGS, RunConfig, settings_under
from megaopus.errors import ConfigError, Problem
from megaopus.settings import Misfit, fit, kinds


class Issues:
    """Collects problems, and the keys whose value is therefore not the one the user meant."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.tainted: set[str] = set()

    def add(self, key: str, value: object, reason: str, remedy: str, taints: Iterable[str] = ()) -> None:
        self.problems.append(Problem(key, value, reason, remedy))
        self.tainted.update((key, *taints))

    def add_unknown(self, key: str, value: object, valid: Iterable[str], reason: str) -> None:
        """Refuse an unknown key, naming the nearest valid one, else the settings of its section."""
        if near := nearest(key, valid):
            return self.add(key, value, reason, f"did you mean {near}?", [near])
        siblings = settings_under(key.split(".", 1)[0]) or [each.name for each in fields(RunConfig)]
        self.add(key, value, reason, f"settings there: {', '.join(siblings)}")

    def refuse(self) -> None:
        """Raise ConfigError if there are problems."""
        if self.problems:
            raise ConfigError(self.problems)


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The valid key most like ``key``: as a whole, else by its last part."""
    valid = list(valid)
    if close := difflib.get_close_matches(key, valid, 1, 0.7):
        return close[0]
    by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(valid)}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.7)
    return by_leaf[close[0]] if close else None


def load(path: Path) -> RunConfig:
    """Read settings written with ``to_yaml``; raises ConfigError for a missing, broken or unknown entry."""
    from omegaconf import OmegaConf

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError([Problem("config", str(path), str(error.strerror), "name a config.yaml of a run")]) from error
    except Exception as error:  # yaml and omegaconf share no base class
        raise ConfigError([Problem("config", str(path), f"not YAML: {error}", "restore the file")]) from error
    return restored(tree, str(path))


def restored(tree: Any, source: str) -> RunConfig:
    """Settings from plain values, as ``asdict`` made them; ``source`` is where they lay. Raises ConfigError."""
    issues = Issues()
    if not isinstance(tree, dict):
        issues.add("config", source, "holds no settings", "name a config.yaml of a run")
        tree = {}
    config = typed(as_saved(tree), source, issues)
    issues.refuse()
    return config


def to_yaml(config: RunConfig) -> str:
    """All settings as YAML; ``load`` gives back an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def typed(tree: dict[str, Any], source: str, issues: Issues) -> RunConfig:
    """The settings of a tree, old names included; a refused value goes to ``issues`` and leaves the default."""
    return _section(RunConfig, renamed(tree), "", source, issues)


def _section(cls: Any, tree: dict[str, Any], prefix: str, source: str, issues: Issues) -> Any:
    names = kinds(cls)
    for name in tree:
        if f"{prefix}{name}" in REFUSED:
            issues.add(f"{prefix}{name}", tree[name], *REFUSED[f"{prefix}{name}"])
        elif name not in names:
            valid = [key for key in SETTINGS if key.startswith(prefix)]
            issues.add_unknown(f"{prefix}{name}", tree[name], valid, f"no such setting (in {source})")
    values: dict[str, Any] = {}
    for name, kind in names.items():
        key, value = f"{prefix}{name}", tree.get(name, {})
        if is_dataclass(kind):
            if not isinstance(value, dict):
                issues.add(key, value, "is a section, not a value", f"write {name}.KEY=VALUE", settings_under(key))
                value = {}
            values[name] = _section(kind, value, f"{key}.", source, issues)
        elif name in tree:
            try:
                values[name] = fit(value, SETTINGS[key])
            except Misfit as misfit:
                issues.add(key, value, *misfit.args)
    return cls(**values)
