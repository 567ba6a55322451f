"""Errors a user can act on: each says what is wrong, where, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


class MegaopusError(Exception):
    """Base of every error meant for a user; the command line prints it without a traceback."""


class DataError(MegaopusError):
    """A data file or corpus folder cannot be used; names the file and, where known, the position."""


class StoreDownError(DataError):
    """An object store has not answered for as long as it was waited for; nothing is wrong with what lies there."""


class CheckpointError(MegaopusError):
    """A checkpoint is missing, incomplete or does not fit the run."""


class ModelError(MegaopusError):
    """A model of elsewhere cannot be used, or ours not written in another form; says by name what does not fit."""


class EngineError(MegaopusError):
    """The engine cannot run this model, layout or device."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration: ``key`` (dotted), its ``value``, why, and what to do."""

    key: str
    value: object
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.reason}\n    -> {self.remedy}"


class ConfigError(MegaopusError):
    """Every problem of a configuration in one message."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__(f"{count} in the configuration (nothing was written):\n{lines}")
