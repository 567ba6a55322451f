"""List every setting: type, default, range, meaning."""

from __future__ import annotations

import argparse
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megaopus.cli._notes import tell
from megaopus.cli._paths import local_path
from megaopus.config.aliases import current, notes
from megaopus.config.compose import group_choices
from megaopus.config.parse import nearest
from megaopus.config.run_config import SETTINGS, RunConfig
from megaopus.errors import ConfigError, Problem
from megaopus.plugins import require_plugins
from megaopus.settings import Entry, member_entries, sections, written

DESCRIPTION = (
    "List settings with type, default, range or choices, whether they may change on resume, and what they mean."
)
EXAMPLES = (
    "  python -m megaopus settings\n"
    "  python -m megaopus settings selection.guards\n"
    "  python -m megaopus settings schedule"
)
TOP = "run"
"""What settings that stand in no section are listed under."""
WIDTH = 118
RESUME = {
    "harmless": "may change on resume",
    "training": "may change on resume if resume_allow names it",
    "fixed": "never changes on resume",
}
_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text"}
_LISTS = {int: "list of whole numbers", float: "list of numbers", str: "list of text", Any: "list"}
_PREAMBLE = """\
# Settings

Made by `python -m megaopus settings --markdown`; `python -m megaopus settings SECTION` (or a setting) prints the same.
Write a setting as `SECTION.KEY=VALUE` on the command line, choose a file of a group with `GROUP=NAME`
([configuration](config.md)). After each default stand its type and range, and its class when a run goes on from a
checkpoint ([resume](resume.md)): *harmless* may change, *training* if `resume_allow` names it, *fixed* never.
"""


class Part(NamedTuple):
    """Settings that are listed together."""

    name: str
    about: str
    choices: list[str]
    """Files that ``name=`` chooses from."""
    entries: list[Entry]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is to be listed, and how."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a section, a group or a setting (default: all)")
    parser.add_argument("--markdown", action="store_true", help="all of it as docs/settings.md has it")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="module that registers yours")
    parser.add_argument("--config-dir", type=local_path, metavar="FOLDER", help="more choices, beside the shipped")


def run(args: argparse.Namespace) -> None:
    """Print what the command line asks for. Raises ConfigError for a name that nothing has."""
    if args.markdown:
        if args.name or args.plugin or args.config_dir:
            raise ConfigError([Problem("--markdown", "", "lists what is shipped, all of it", "leave the rest out")])
        print(markdown(), end="")
        return
    require_plugins(args.plugin)
    tell(notes([args.name or ""]))
    width = min(WIDTH, shutil.get_terminal_size().columns)
    lines = [line for part in _named(args.name, args.config_dir) for line in [*_text(part, width), ""]]
    print("\n".join(lines[:-1]))


def _parts(config_dir: Path | None = None) -> list[Part]:
    """Every setting section by section, without what a dictionary of settings by name may hold."""
    groups, found = group_choices(config_dir), []
    for name, section in sections(RunConfig).items():
        own = [entry for key, entry in SETTINGS.items() if key.rpartition(".")[0] == name]
        found.append(Part(name or TOP, (section.__doc__ or "").split("\n\n")[0], groups.pop(name, []), own))
    about = "A whole run: choices of the groups above and values."
    return found + [Part(name, about, choices, []) for name, choices in groups.items()]


def _whole(parts: Iterable[Part]) -> Iterator[Part]:
    """Each part, and then what its dictionaries may hold, by whose it is; this imports optimizers."""
    for part in parts:
        yield part
        for entry in part.entries:
            for owner in entry.known.members or ():
                if members := list(member_entries(entry, owner).values()):
                    about = f"What {part.name}.name={owner} alone has."
                    yield Part(f"{entry.key} of {owner}", about, [], members)


def _named(name: str | None, config_dir: Path | None) -> list[Part]:
    """The parts, or single settings, that a person means by a name. Raises ConfigError."""
    parts = _parts(config_dir)
    if name is None:
        return list(_whole(parts))
    name = current(name)
    if found := [part for part in parts if f"{part.name}.".startswith(f"{name}.")]:
        return list(_whole(found))
    for place in (parts, _whole(parts)):
        for part in place:
            own = [entry for entry in part.entries if name in (entry.key, entry.key.rpartition(".")[2])]
            if own:
                found.append(part._replace(choices=[], entries=own))
        if found:
            return list(_whole(found))
    names = [part.name for part in parts]
    near = nearest(name, [*names, *SETTINGS])
    remedy = f"did you mean {near}?" if near else f"sections: {', '.join(names)}"
    raise ConfigError([Problem("settings", name, "no such section, group or setting", remedy)])


def kind_of(entry: Entry) -> str:
    """The type of a setting in words, with its range or choices."""
    if entry.known.schemes is not None:
        return "path" + (" or null" if entry.known.default is None else "")
    if choices := entry.known.options():
        several = "some of" if typing.get_origin(entry.kind) is list else "one of"
        return f"{several} {', '.join(map(str, choices))}"
    options = typing.get_args(entry.kind) if isinstance(entry.kind, types.UnionType) else (entry.kind,)
    words = [_KINDS.get(option) or _container(option) for option in options if option is not types.NoneType]
    if bounds := entry.known.bounds():
        words[-1] += f" {'in ' if bounds[0] in '[(' else ''}{bounds}"
    return " or ".join([*words, *(["null"] if types.NoneType in options else [])])


def _container(kind: Any) -> str:
    return _LISTS[typing.get_args(kind)[0]] if typing.get_origin(kind) is list else "settings by name"


def _text(part: Part, width: int) -> Iterator[str]:
    """A part for the terminal."""
    yield f"{part.name}: {part.about}".replace("`", "")
    if part.choices:
        yield from textwrap.wrap(f"{part.name}=NAME picks one of: {', '.join(part.choices)}", width)
    for entry in part.entries:
        yield f"  {entry.key} = {written(entry.known.default)}"
        facts = f"{kind_of(entry)}; {RESUME[entry.resume]}"
        for paragraph in (facts, entry.known.doc.replace("`", "")):
            yield from textwrap.wrap(paragraph, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def markdown() -> str:
    """All settings as a page."""
    lines = [_PREAMBLE]
    for part in _whole(_parts()):
        lines += [f"## {part.name}", "", *textwrap.wrap(part.about, WIDTH), ""]
        if part.choices:
            lines += [*textwrap.wrap(f"`{part.name}=` " + " ".join(f"`{each}`" for each in part.choices), WIDTH), ""]
        for entry in part.entries:
            head = f"**`{entry.key}`** = `{written(entry.known.default)}` ({kind_of(entry)}; *{entry.resume}*):"
            lines += textwrap.wrap(
                f"{head} {entry.known.doc}",
                WIDTH,
                initial_indent="- ",
                subsequent_indent="  ",
                break_on_hyphens=False,
                break_long_words=False,
            )
        lines += [""] if part.entries else []
    return "\n".join(lines).rstrip() + "\n"
