"""Output that is given up, without an error, once nobody can read it any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class QuietStream:
    """Writes to a stream until that fails (a closed terminal or pipe, a full disk); from then on to nowhere.

    What else the stream can do, it can too.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or not; returns the length of the text in any case."""
        with self._given_up():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines that have their ends."""
        with self._given_up():
            self._stream.writelines(lines)

    def flush(self) -> None:
        """Hand on what is waiting, or not."""
        with self._given_up():
            self._stream.flush()

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        try:
            yield
        except UnicodeError:
            raise
        except (OSError, ValueError):  # ValueError: the stream was closed
            # Under the stream, for what is waiting in it is written once more when the process ends.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet(stream: TextIO | None) -> TextIO:
    """Give a stream whose writing never fails; None, where a process has no such stream, is one to nowhere."""
    if isinstance(stream, QuietStream):
        return cast(TextIO, stream)
    return cast(TextIO, QuietStream(stream or open(os.devnull, "w")))


@contextmanager
def quiet_output() -> Iterator[None]:
    """Let nothing that prints inside fail because its output cannot be written."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(quiet, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
