"""Imports modules of users that register optimizers, operators, estimators, methods, samplers, engines or data sources.

Named by ``plugins`` on the command line or in a file of settings that is composed, or installed with an entry point of
the group ``megaopus.plugins``. What somebody else's run folder names is never imported: code would run for reading it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib import metadata

from megaopus.errors import ConfigError, Problem

GROUP = "megaopus.plugins"


def import_plugins(modules: Iterable[str]) -> tuple[list[str], list[Problem]]:
    """Import ``modules`` and those of installed entry points; returns (all their names, what could not be imported).

    A second import of a module does nothing. To be called on every rank before settings are validated.
    """
    names = list(dict.fromkeys([*modules, *sorted(each.module for each in metadata.entry_points(group=GROUP))]))
    problems: list[Problem] = []
    for name in names:
        try:
            importlib.import_module(name)
        except ConfigError as error:  # it registers a name that is taken
            problems += error.problems
        except Exception as error:  # a user's module may raise anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            remedy = "name a module that Python finds here: installed, or in the folder that the command is given in"
            problems.append(Problem("plugins", name, f"cannot be imported ({said})", remedy))
    return names, problems


def require_plugins(modules: Iterable[str]) -> None:
    """Import ``modules`` and those of installed entry points; raises ConfigError for what could not be imported."""
    if problems := import_plugins(modules)[1]:
        raise ConfigError(problems)


def notes_on_missing(modules: Iterable[str], source: object) -> list[str]:
    """A line for each of the ``modules`` that ``source`` names and that are not imported here; imports nothing."""
    return [
        f"{source} names the plugin {name}, which is not imported here: what it registers is unknown"
        for name in dict.fromkeys(modules)
        if name not in sys.modules
    ]
