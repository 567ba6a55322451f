"""RunConfig: the packages' own settings composed into one object, and every error reported at once."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from megaopus.checkpoint.config import CheckpointConfig
from megaopus.config.resume_policy import flat
from megaopus.config.validation import validate
from megaopus.data.config import DataConfig
from megaopus.distributed.config import ParallelConfig
from megaopus.engine.config import EngineConfig
from megaopus.errors import ConfigError, Problem
from megaopus.models.config import ModelConfig
from megaopus.monitor.config import LoggingConfig
from megaopus.optim.config import OptimConfig
from megaopus.selection.config import SelectionConfig
from megaopus.train_config import TrainConfig

__all__ = [
    "RunConfig",
    "compose",
    "data_settings",
    "default_config_dir",
    "default_settings",
    "differences",
    "load",
    "to_yaml",
    "validate",
]


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Everything a run depends on; written as ``config.yaml`` into its folder."""

    run_dir: str = "runs/default"
    seed: int = 1234
    resume: str = "auto"
    """auto: go on from the newest checkpoint if there is one; never; required; or the path of a checkpoint."""
    resume_allow: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's though they change the training, such as optim.lr."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def num_candidates(self) -> int:
        """N = global_batch_size / rho, to the nearest integer (``validate`` refuses a rho that is not close to one)."""
        return round(self.train.global_batch_size / self.selection.rho)

    def buffer_size(self) -> int:
        """Sequences of one buffer: the candidates of all the steps it serves, times what a prescreen looks through."""
        return self.num_candidates() * self.selection.score_every * self.selection.screened

    def num_scored(self) -> int:
        """Candidates scored at a time, over all data-parallel ranks."""
        if self.selection.prescreen.mode == "predict":
            return self.selection.prescreen.slice
        return self.num_candidates() * self.selection.score_every


class _Issues:
    """Problems found so far, and the keys whose value is therefore not the one the user meant."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.tainted: set[str] = set()

    def add(self, key: str, value: object, reason: str, remedy: str, taints: Iterable[str] = ()) -> None:
        self.problems.append(Problem(key, value, reason, remedy))
        self.tainted.update((key, *taints))


def default_config_dir() -> Path:
    """The shipped configs: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "run.yaml").is_file():
            return folder
    reason = "no run.yaml there, nor in configs/ inside the installed package"
    remedy = "install megaopus from a checkout (pip install -e .)"
    raise ConfigError([Problem("configs", str(package.parent / "configs"), reason, remedy)])


def compose(overrides: list[str], config_dir: Path | None = None, world_size: int | None = None) -> RunConfig:
    """Compose ``run.yaml``, its groups and ``overrides`` (Hydra syntax) into typed settings.

    ``config_dir`` adds choices to the shipped configs; with a ``run.yaml`` of its own it comes first and may replace
    them. With ``world_size`` the batch sizes are checked against the data-parallel ranks too.
    Raises ConfigError with every problem found: override text, unknown names, types, values, and what must hold
    between settings. A check that depends on a setting already refused is left out.
    """
    folders = _config_folders(config_dir)
    groups = _groups(folders)
    issues = _Issues()
    accepted = [text for text in overrides if _acceptable(text, groups, issues)]
    tree = _compose_tree(folders, accepted, issues)
    config = _typed(RunConfig, tree, "", f"a file under {' or '.join(map(str, folders))}", issues)
    issues.problems += validate(config, world_size, frozenset(issues.tainted))
    if issues.problems:
        raise ConfigError(issues.problems)
    return config


def data_settings(name: str, config_dir: Path | None = None) -> DataConfig:
    """The settings of configs/data/NAME.yaml, of which ``data.path`` need not lie there yet.

    Raises ConfigError if there is no such file, or for what it has that is no setting.
    """
    folders, issues = _config_folders(config_dir), _Issues()
    accepted = [text for text in (f"data={name}",) if _acceptable(text, _groups(folders), issues)]
    tree = _compose_tree(folders, accepted, issues)
    config = _typed(RunConfig, tree, "", f"a file under {' or '.join(map(str, folders))}", issues)
    if issues.problems:
        raise ConfigError(issues.problems)
    return config.data


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
    issues = _Issues()
    if not isinstance(tree, dict):
        issues.add("config", source, "holds no settings", "name a config.yaml of a run")
        tree = {}
    config = _typed(RunConfig, typing.cast(dict[str, Any], tree), "", source, issues)
    if issues.problems:
        raise ConfigError(issues.problems)
    return config


def to_yaml(config: RunConfig) -> str:
    """All settings as YAML; ``load`` gives back an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def differences(config: RunConfig) -> dict[str, tuple[object, object]]:
    """Dotted key -> (value, default) for each setting that differs from its default."""
    ours, default = flat(asdict(config)), default_settings(config)
    return {key: (value, default.get(key)) for key, value in ours.items() if value != default.get(key)}


def default_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> default of every setting that a run with ``config``'s optimizer has."""
    own = {f"optim.settings.{name}": value for name, value in config.optim.spec().settings.items()}
    return flat(asdict(RunConfig())) | own


_OPEN = ("optim.settings.",)
"""Sections of settings that depend on another one; what they may hold, ``problems()`` of their owner says."""


def _settings() -> list[str]:
    return list(flat(asdict(RunConfig())))


def _config_folders(config_dir: Path | None) -> list[Path]:
    """Folders in the order Hydra searches them; the first holds run.yaml (it reads that before any search path)."""
    shipped = default_config_dir()
    if config_dir is None:
        return [shipped]
    if not config_dir.is_dir():
        remedy = "name a folder with files such as experiment/NAME.yaml, or leave --config-dir out"
        raise ConfigError([Problem("--config-dir", str(config_dir), "no such folder", remedy)])
    folder = config_dir.resolve()
    if (folder / "run.yaml").is_file():
        return [folder, shipped]
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.yaml"))
    if clashes := [name for name in names if (shipped / name).is_file()]:
        reason = f"the shipped configs have files of the same name: {', '.join(clashes)}"
        remedy = "rename them, or put a run.yaml into the folder to make it come first"
        raise ConfigError([Problem("--config-dir", str(config_dir), reason, remedy)])
    return [shipped, folder]


def _groups(folders: list[Path]) -> dict[str, list[str]]:
    """Group -> its choices, over all folders."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.rglob("*.yaml"):
            group, *rest = file.relative_to(folder).with_suffix("").parts
            if rest:
                groups.setdefault(group, set()).add("/".join(rest))
    return {group: sorted(choices) for group, choices in sorted(groups.items())}


def _nearest(key: str, valid: Iterable[str]) -> str | None:
    """The valid key most like ``key``: as a whole, else by its last part."""
    valid = list(valid)
    if close := difflib.get_close_matches(key, valid, 1, 0.7):
        return close[0]
    by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(valid)}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.7)
    return by_leaf[close[0]] if close else None


def _acceptable(text: str, groups: dict[str, list[str]], issues: _Issues) -> bool:
    """Whether Hydra may see this override; if not, why goes to ``issues``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        remedy = "write key=value; quote what has spaces, commas, brackets or $: 'data.path=\"a b\"'"
        key = text.split("=", 1)[0].lstrip("+~")
        issues.add(key or text, text, f"not an override: {str(error).splitlines()[0]}", remedy, _settings_under(key))
        return False
    key = override.key_or_group
    if override.is_delete():
        issues.add(key, text, "a setting cannot be deleted", f"set it instead: {key}=VALUE", _settings_under(key))
        return False
    value = override.value() if not override.is_sweep_override() else text.split("=", 1)[1]
    if override.is_sweep_override():
        issues.add(key, value, "a sweep of several values", "one run takes one value; write a list as [a,b]")
        return False
    if override.package is not None:
        issues.add(f"{key}@{override.package}", value, "settings cannot be moved", f"write {key}=NAME", [key])
        return False
    if key in groups:
        return _acceptable_choice(key, value, groups[key], issues)
    if key in _settings() or key.startswith(_OPEN) or (isinstance(value, dict) and _settings_under(key)):
        return True
    _add_unknown(key, value, [*_settings(), *groups], "no such setting", issues)
    return False


def _acceptable_choice(group: str, value: object, choices: list[str], issues: _Issues) -> bool:
    if value in choices or (group == "experiment" and value is None):
        return True
    close = difflib.get_close_matches(value, choices, 1, 0.4) if isinstance(value, str) else []
    hint = f"did you mean {group}={close[0]}? " if close else ""
    issues.add(group, value, "no such choice", f"{hint}choices: {', '.join(choices)}", _settings_under(group))
    if group == "experiment":  # an experiment may set anything
        issues.tainted.update(_settings())
    return False


def _settings_under(section: str) -> list[str]:
    return [key for key in _settings() if key.startswith(f"{section}.")]


def _add_unknown(key: str, value: object, valid: list[str], reason: str, issues: _Issues) -> None:
    """Refuse an unknown key, naming the nearest valid one, else the settings of its section."""
    if near := _nearest(key, valid):
        issues.add(key, value, reason, f"did you mean {near}?", [near])
        return
    section = key.split(".", 1)[0]
    siblings = _settings_under(section) or [f.name for f in fields(RunConfig)]
    issues.add(key, value, reason, f"settings there: {', '.join(siblings)}")


def _compose_tree(folders: list[Path], overrides: list[str], issues: _Issues) -> dict[str, Any]:
    """What Hydra makes of the files and the accepted overrides, interpolations resolved, not yet typed."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = _groups(folders)
    arguments = [_forced(text, groups) for text in overrides]
    if folders[1:]:
        quoted = str(folders[1]).replace("\\", "\\\\").replace("'", "\\'")
        arguments.append(f"hydra.searchpath=['file://{quoted}']")
    try:
        with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3"):
            tree = hydra_compose(config_name="run", overrides=arguments)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = "the files cannot be composed: " + " ".join(str(error).split())
        remedy = f"see {folders[-1] / 'run.yaml'} for the folders and files it expects"
        raise ConfigError([*issues.problems, Problem("configs", str(folders[0]), reason, remedy)]) from error
    OmegaConf.set_struct(tree, False)
    while True:
        try:
            return typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
        except OmegaConfBaseException as error:
            if not error.full_key:
                raise
            reason, raw = str(error).splitlines()[0], OmegaConf.to_container(tree, resolve=False)
            value = flat(typing.cast(dict[str, Any], raw)).get(error.full_key)
            issues.add(error.full_key, value, reason, "name an existing setting: ${section.key}, or ${oc.env:NAME}")
            parent, _, leaf = error.full_key.rpartition(".")
            del (OmegaConf.select(tree, parent) if parent else tree)[leaf]


def _forced(text: str, groups: dict[str, list[str]]) -> str:
    """Settings are set whether or not a file names them; they are checked against the dataclasses afterwards."""
    plain = text.lstrip("+")
    return plain if plain.split("=", 1)[0] in groups else f"++{plain}"


def _typed(cls: type, tree: dict[str, Any], prefix: str, source: str, issues: _Issues) -> Any:
    """``cls`` with the values of ``tree``; a refused value leaves the default in place."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    for key in tree:
        if key not in names:
            valid = [name for name in _settings() if name.startswith(prefix)]
            _add_unknown(f"{prefix}{key}", tree[key], valid, f"no such setting (in {source})", issues)
    values: dict[str, Any] = {}
    for name in names:
        if is_dataclass(hints[name]):
            section = tree.get(name, {})
            if not isinstance(section, dict):
                remedy = f"write {name}.KEY=VALUE"
                issues.add(f"{prefix}{name}", section, "is a section, not a value", remedy, _settings_under(name))
                section = {}
            values[name] = _typed(typing.cast(type, hints[name]), section, f"{prefix}{name}.", source, issues)
        elif name in tree:
            try:
                values[name] = _convert(tree[name], hints[name])
            except ValueError as error:
                expected, remedy = error.args
                issues.add(f"{prefix}{name}", tree[name], expected, remedy.format(key=f"{prefix}{name}"))
    return cls(**values)


_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}
_EXAMPLES = {
    int: "for example {key}=8",
    float: "for example {key}=0.1",
    bool: "write {key}=true or {key}=false",
    str: "quote what YAML would read as something else: '{key}=\"text\"'",
    list[float]: "write '{key}=[0.9,0.95]'",
    list[str]: "write '{key}=[a,b]'",
    list[Any]: "write '{key}=[...]'",
}


def _convert(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``; raises ValueError(what is wanted, remedy with a {key} slot)."""
    if isinstance(hint, types.UnionType):
        first, *others = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        if value is None and type(None) in typing.get_args(hint):
            return None
        try:
            return _convert(value, first)
        except ValueError:
            for other in others:
                with suppress(ValueError):
                    return _convert(value, other)
            raise
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        if not isinstance(value, list):
            raise ValueError(f"must be a list, not {type(value).__name__}", _EXAMPLES[hint])
        if item is Any:
            return value
        try:
            return [_convert(element, item) for element in value]
        except ValueError as error:
            raise ValueError(f"each element {error.args[0]}", _EXAMPLES[hint]) from None
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"is a section, not a {type(value).__name__}", "write {key}.NAME=VALUE")
        return dict(value)
    fits = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        bool: isinstance(value, bool),
        str: isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)),
    }
    if not fits[hint]:
        raise ValueError(f"must be {_NAMES[hint]}, not {type(value).__name__}", _EXAMPLES[hint])
    return hint(value)
