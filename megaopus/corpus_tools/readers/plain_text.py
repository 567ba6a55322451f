"""Reads plain text files, each of which is one document."""

from __future__ import annotations

from megaopus.corpus_tools.readers.registry import Reader, register_reader
from megaopus.corpus_tools.readers.stored import Stored, decoded


def _text(stored: Stored) -> str:
    return decoded(stored.content(), str(stored.path))


register_reader("plain_text", Reader(endings=(".txt", ".md"), text=_text, unit="line", packed=True))
