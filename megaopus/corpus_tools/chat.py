"""Writes a conversation as one text, by the chat template of a model, and says which parts of it are to be learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megaopus.errors import DataError

Spans = tuple[tuple[int, int], ...]
"""Ranges [first, last) of characters of a text, in order; they do not overlap."""
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class ChatTemplate:
    """Holds a Jinja template as models bring it along (``chat_template``), and the roles whose messages are learnt."""

    source: str
    roles: tuple[str, ...] = ("assistant",)
    tokens: tuple[tuple[str, str], ...] = ()
    """Special tokens that the template writes, by their name in it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what is compiled: it cannot be sent to another process."""
        return ChatTemplate, (self.source, self.roles, self.tokens)

    @classmethod
    def load(cls, path: str | Path, roles: Sequence[str] = ("assistant",)) -> ChatTemplate:
        """Read it from a model folder, its ``tokenizer_config.json``, or a file with the template alone.

        Raises DataError if there is none, or it is no template.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        config = folder / "tokenizer_config.json"
        try:
            settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
            alone = path / "chat_template.jinja" if path.is_dir() else path
            template: Any = None
            if alone.is_file() and alone != config:
                template = alone.read_text(encoding="utf-8")
            elif isinstance(settings, dict):
                template = settings.get("chat_template")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: the chat template cannot be read ({error})") from error
        if isinstance(template, list):  # several, by name
            template = next((each.get("template") for each in template if each.get("name") == "default"), None)
        if not isinstance(template, str):
            raise DataError(
                f"{path}: no chat template; give a model folder with chat_template.jinja or a 'chat_template' in its"
                " tokenizer_config.json, or a file with the template"
            )
        tokens = {name: _content(settings[name]) for name in _TOKENS if settings.get(name)}
        made = cls(template, tuple(roles), tuple(sorted(tokens.items())))
        _ = made._compiled
        return made

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.source)
        except TemplateError as error:
            raise DataError(f"the chat template is not one of Jinja: {error}") from error

    def write(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, Spans]:
        """Write a conversation; returns the text and the ranges of what the ``roles`` say, with what ends a message.

        A message is what the template adds for it, without what prompts the model to speak. Raises ValueError if the
        template refuses the conversation, or does not write one message after the other.
        """
        text = self.rendered(messages, False)
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") in self.roles:
                after = self.rendered(messages[: number + 1], False)
                before = self.rendered(messages[:number], True) if number else ""
                if not after.startswith(before):  # the prompt is for another to speak
                    before = self.rendered(messages[:number], False)
                if not (text.startswith(after) and after.startswith(before)):
                    raise ValueError(
                        f"the template writes message {number + 1} otherwise when more follow: its part of the text"
                        " cannot be told"
                    )
                spans.append((len(before), len(after)))
        return text, tuple(spans)

    def rendered(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        """Write a conversation, and with ``prompt`` what asks the model to speak. Raises ValueError if refused."""
        from jinja2 import TemplateError

        try:
            return self._compiled.render(messages=list(messages), add_generation_prompt=prompt, **dict(self.tokens))
        except (TemplateError, TypeError, AttributeError) as error:
            raise ValueError(f"the chat template cannot write it: {error}") from error


def _refuse(message: str) -> None:
    """Serve templates that refuse a conversation."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _content(token: Any) -> str:
    """A special token, which may be written as an object with further settings."""
    return str(token["content"] if isinstance(token, dict) else token)
