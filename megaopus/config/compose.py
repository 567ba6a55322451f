"""Composes run.yaml, its groups and the overrides of a command line (Hydra's syntax) into typed, validated settings."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaopus.config.aliases import CONVERTED, current_override, with_old_names, without_presets
from megaopus.config.corpus_rules import one_look
from megaopus.config.length import set_steps
from megaopus.config.model_shape import set_shape
from megaopus.config.parse import Issues, typed
from megaopus.config.run_config import SETTINGS, RunConfig, flat, settings_under
from megaopus.config.validation import validate
from megaopus.data.config import DataConfig
from megaopus.distributed.config import ParallelConfig
from megaopus.engine.config import EngineConfig
from megaopus.errors import ConfigError, Problem
from megaopus.fs import PACKAGE, shipped_configs
from megaopus.models.config import ModelConfig
from megaopus.plugins import import_plugins
from megaopus.settings import problems


def default_config_dir() -> Path:
    """Find the shipped configs. Raises ConfigError if they are not there."""
    if (folder := shipped_configs()) is not None:
        return folder
    reason = "no run.yaml there, nor in configs/ inside the installed package"
    remedy = "install megaopus from a checkout (pip install -e .)"
    raise ConfigError([Problem("configs", str(PACKAGE.parent / "configs"), reason, remedy)])


def compose(
    overrides: list[str], config_dir: Path | None = None, world_size: int | None = None, *, corpora: bool = True
) -> RunConfig:
    """Compose ``run.yaml``, its groups and ``overrides`` (Hydra syntax) into typed settings.

    ``config_dir`` adds choices to the shipped configs; with a ``run.yaml`` of its own it comes first and may replace
    them. With ``world_size`` the batch sizes are checked against the data-parallel ranks too. Without ``corpora`` those
    that the settings name need not lie here, and nothing is checked against them.
    Raises ConfigError with every problem found: override text, unknown names, types, values, and what must hold
    between settings. A check that depends on a setting already refused is left out.
    """
    issues = Issues()
    with one_look():
        config = _composed(overrides, config_dir, issues)
        issues.problems += validate(config, world_size, frozenset(issues.tainted), corpora=corpora)
    issues.refuse()
    return config


def data_settings(name: str, config_dir: Path | None = None) -> DataConfig:
    """The settings of configs/data/NAME.yaml, of which ``data.path`` need not lie there yet.

    Raises ConfigError if there is no such file, or for what it has that is no setting or no value of one.
    """
    issues = Issues()
    config = _composed([f"data={name}"], config_dir, issues)
    untouched = {"data.path", *issues.tainted}
    issues.problems += [each for each in problems(config.data, "data.") if each.key not in untouched]
    issues.refuse()
    return config.data


def group_choices(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Group -> the files that may be chosen from it."""
    return _groups(_config_folders(config_dir))


def _composed(overrides: list[str], config_dir: Path | None, issues: Issues) -> RunConfig:
    folders = _config_folders(config_dir)
    groups = _groups(folders)
    accepted = [text for text in map(current_override, overrides) if _acceptable(text, groups, issues)]
    tree = _compose_tree(folders, groups, accepted, issues)
    config = typed(tree, f"a file under {' or '.join(map(str, folders))}", issues)
    config.plugins, failed = import_plugins(config.plugins)  # so that what they register may be named
    for problem in failed:
        chosen = ("optim.name", "engine.name", "selection.estimator", "selection.method", "selection.sampler")
        issues.add(problem.key, problem.value, problem.reason, problem.remedy, chosen)  # may be what it registers
    set_shape(config, issues.add)
    set_steps(config, issues.add)
    return config


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


def _acceptable(text: str, groups: dict[str, list[str]], issues: Issues) -> bool:
    """Return whether Hydra may see this override; if not, why goes to ``issues``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        remedy = "write key=value; quote what has spaces, commas, brackets or $: 'data.path=\"a b\"'"
        key = text.split("=", 1)[0].lstrip("+~")
        issues.add(key or text, text, f"not an override: {str(error).splitlines()[0]}", remedy, settings_under(key))
        return False
    key = override.key_or_group
    value = override.value() if not override.is_sweep_override() else text.split("=", 1)[1]
    if override.is_delete():
        issues.add(key, text, "a setting cannot be deleted", f"set it instead: {key}=VALUE", settings_under(key))
    elif override.is_sweep_override():
        issues.add(key, value, "a sweep of several values", "one run takes one value; write a list as [a,b]")
    elif override.package is not None:
        issues.add(f"{key}@{override.package}", value, "settings cannot be moved", f"write {key}=NAME", [key])
    elif key in groups:
        return _acceptable_choice(key, value, groups[key], issues)
    elif _is_setting(key) or (isinstance(value, dict) and settings_under(key)):
        return True
    else:
        issues.add_unknown(key, value, [*SETTINGS, *groups], "no such setting")
    return False


def _is_setting(key: str) -> bool:
    """Return whether a setting has this key, or may, inside an open dictionary; what that holds, validation says."""
    above = SETTINGS.get(key.rpartition(".")[0])
    return key in SETTINGS or key in CONVERTED or (above is not None and above.known.members is not None)


def _acceptable_choice(group: str, value: object, choices: list[str], issues: Issues) -> bool:
    if value in choices or (group == "experiment" and value is None):
        return True
    close = difflib.get_close_matches(value, choices, 1, 0.4) if isinstance(value, str) else []
    hint = f"did you mean {group}={close[0]}? " if close else ""
    taints = SETTINGS if group == "experiment" else settings_under(group)  # an experiment may set anything
    issues.add(group, value, "no such choice", f"{hint}choices: {', '.join(choices)}", taints)
    return False


def _compose_tree(
    folders: list[Path], groups: dict[str, list[str]], overrides: list[str], issues: Issues
) -> dict[str, Any]:
    """Return what Hydra makes of the files and the accepted overrides, interpolations resolved, not yet typed."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    arguments = [_forced(text, groups) for text in overrides]
    if folders[1:]:
        quoted = str(folders[1]).replace("\\", "\\\\").replace("'", "\\'")
        arguments.append(f"hydra.searchpath=['file://{quoted}']")
    try:
        with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3"):
            composed = hydra_compose(config_name="run", overrides=arguments)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = "the files cannot be composed: " + " ".join(str(error).split())
        remedy = f"see {folders[-1] / 'run.yaml'} for the folders and files it expects"
        raise ConfigError([*issues.problems, Problem("configs", str(folders[0]), reason, remedy)]) from error
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    tree = OmegaConf.create(with_old_names(raw))
    while True:
        try:
            resolved = typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
            return without_presets(resolved, [text.lstrip("+").partition("=")[0] for text in overrides])
        except OmegaConfBaseException as error:
            if not error.full_key:
                raise
            reason, value = str(error).splitlines()[0], flat(raw).get(error.full_key)
            issues.add(error.full_key, value, reason, "name an existing setting: ${section.key}, or ${oc.env:NAME}")
            parent, _, leaf = error.full_key.rpartition(".")
            del (OmegaConf.select(tree, parent) if parent else tree)[leaf]


def _forced(text: str, groups: dict[str, list[str]]) -> str:
    """Settings are set whether or not a file names them; they are checked against the dataclasses afterwards."""
    plain = text.lstrip("+")
    return plain if plain.split("=", 1)[0] in groups else f"++{plain}"


def layout(overrides: list[str], model: ModelConfig, world_size: int) -> tuple[ParallelConfig, EngineConfig]:
    """Compose where and how a model that is there already is computed, of overrides of ``parallel`` and ``engine``.

    Raises ConfigError for an override of anything else, and for what does not fit the model or the ranks.
    """
    config = arranged(overrides, model, world_size)
    return config.parallel, config.engine


def arranged(
    overrides: Sequence[str],
    model: ModelConfig,
    world_size: int,
    also: Sequence[str] = (),
    *,
    first: Sequence[str] = (),
) -> RunConfig:
    """Compose the settings around a model that is there already; ``overrides`` may be of the sections ``also`` too.

    ``first``: overrides that theirs come after, of anything. Raises ConfigError as ``layout``.
    """
    issues, sections = Issues(), (*_LAYOUT, *also)
    for text in overrides:
        if (key := text.lstrip("+~").partition("=")[0]).split(".")[0] not in sections:
            named = f"{', '.join(sections[:-1])} or {sections[-1]}"
            issues.add(key, text, f"is not of {named}: the rest is the model's own", "leave it out")
    issues.refuse()
    config = _composed([*first, *overrides], None, issues)
    config.model, config.data.seq_len = model, 8 * config.parallel.cp * config.parallel.tp  # any length may be cut
    about = (*(f"{section}." for section in sections), "model.num_", "model.ffn_")
    found = validate(config, world_size, frozenset(issues.tainted), corpora=False)
    issues.problems += [problem for problem in found if problem.key.startswith(about)]
    issues.refuse()
    return config


_LAYOUT = ("parallel", "engine")
