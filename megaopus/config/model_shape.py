"""Takes the model's shape from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megaopus.config.run_config import RunConfig, flat
from megaopus.errors import ModelError
from megaopus.models.config import ModelConfig

OWN = ("hf", "dropout", "init_std")
"""Settings of a model that config.json does not decide."""


def set_shape(config: RunConfig, refuse: Callable[[str, object, str, str], None]) -> None:
    """Set ``config.model`` to what ``model.hf``/config.json says, if ``model.hf`` is given.

    ``refuse``: key, value, reason, remedy of a folder that cannot be used, or of a setting that says otherwise.
    """
    if not config.model.hf:
        return
    from megaopus.huggingface.families import model_config
    from megaopus.huggingface.folder import CONFIG, read_config

    folder = Path(config.model.hf)
    try:
        found = model_config(read_config(folder))
    except ModelError as error:
        refuse("model.hf", config.model.hf, str(error), "'python -m megaopus import FOLDER' says all that it has")
        return
    theirs, given, default = (flat(asdict(each)) for each in (found, config.model, ModelConfig()))
    for key, value in theirs.items():
        if key not in OWN and given[key] not in (default[key], value):
            refuse(f"model.{key}", given[key], f"{folder / CONFIG} has {value}", "leave it out")
    for each in fields(ModelConfig):
        if each.name not in OWN:
            setattr(config.model, each.name, getattr(found, each.name))


def shape_yaml(model: ModelConfig) -> str:
    """Write what differs from the defaults as YAML, as a file in configs/model/ has it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_changed(asdict(model), asdict(ModelConfig()))))


def _changed(values: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if inner := _changed(value, default[key]):
                found[key] = inner
        elif value != default[key]:
            found[key] = value
    return found
