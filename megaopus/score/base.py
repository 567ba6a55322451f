"""Says what a way of scoring documents is, and how a column is made with it: chunk by chunk, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console

from megaopus.corpus_tools.progress import Advance, Stage, stages
from megaopus.corpus_tools.sources import Source
from megaopus.data.corpus import Corpus
from megaopus.data.folder import StoppedError, new_folder, refuse_existing, where_else, work_folder
from megaopus.data.scores import COLUMN, column_folder, kept_columns, write_column
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh
from megaopus.errors import DataError

T = TypeVar("T")
Begin = Callable[[str, int], Advance]
"""(what is done, tokens in all) -> what is called with the tokens that are done."""


class Method(Protocol):
    """A way of scoring the documents of one corpus."""

    best: str
    """Which scores are best: highest or lowest."""
    about: dict[str, Any]
    """Everything that the numbers depend on, in plain values; column.json keeps it."""
    stamps: list[Any]
    """What tells the files it reads from changed ones; a run that was stopped goes on only if they are the same."""
    batch_tokens: int
    """Tokens of the documents that ``scores`` is given at a time."""
    chunk_tokens: int
    """Tokens after which what is done is kept for a run that may be killed."""

    # A method that works on several ranks has ``join()`` too, which comes first and gives their mesh: all of them then
    # call ``ready``, ``scores`` and ``close``, and the first alone writes.

    def ready(self, work: Path, begin: Begin) -> None:
        """Load, count or train what ``scores`` needs; what took long is kept in ``work`` and found again."""

    def scores(self, documents: np.ndarray) -> np.ndarray:
        """(n,) scores of documents (n,) that follow one another in the corpus; NaN where there is none."""

    def finish(self, folder: Path, work: Path) -> None:
        """Put what others may want to use again (a trained model) beside the column."""

    def close(self) -> None:
        """Let go of what ``ready`` took."""


class _Ranks:
    """Says who writes, and tells the others what came of it; without a mesh there is one rank."""

    def __init__(self, mesh: Mesh | None):
        self._mesh = mesh
        self.writes = mesh is None or mesh.rank == 0
        self.several = mesh is not None and mesh.shape.world_size > 1

    def first(self, action: Callable[[], T]) -> T:
        """Return what ``action()`` returns on the rank that writes, on every rank; DataErrors too. Collective."""
        return action() if self._mesh is None else on_rank_0(self._mesh, action)


def make_column(
    corpus: Corpus, name: str, method: Method, *, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Score every document of every split; a killed run goes on where it was. Returns the column's folder.

    Every rank of a launch calls it, if the method can make use of several.

    Raises:
        DataError: a name that is taken; anything that the method finds wrong; StoppedError: a rank was lost.
    """
    console = console or Console(quiet=True)
    out = column_folder(corpus.path, name)
    try:
        ranks = _Ranks(method.join() if hasattr(method, "join") else None)
        ranks.first(partial(_refuse, corpus, name, out, overwrite))
        with ExitStack() as held:
            stage: Stage | None = None

            def enter() -> Path:
                nonlocal stage
                stage, work = held.enter_context(_workplace(corpus, out, method, console))
                return work

            work = ranks.first(enter)

            def begin(what: str, tokens: int) -> Advance:
                return _nothing if stage is None else stage(what, tokens, "k tokens/s", 1e3)

            if ranks.several:
                held.enter_context(_kept_for_another_try(out))
            method.ready(work, begin)
            values = _scored(corpus, method, work, ranks, begin(f"scoring, {name}", int(corpus.lengths.sum())))
            ranks.first(partial(_write, corpus, out, method, values, work, console))
    finally:
        method.close()
    return out


def _refuse(corpus: Corpus, name: str, out: Path, overwrite: bool) -> None:
    if name in kept_columns(corpus):
        raise DataError(
            f"{corpus.path}: its documents already have a column {name!r}, from prepare; choose another --name"
        )
    refuse_existing(out, overwrite, COLUMN, "score column")


@contextmanager
def _workplace(corpus: Corpus, out: Path, method: Method, console: Console) -> Iterator[tuple[Stage, Path]]:
    """Yield what starts lines of progress, and the folder for what is kept until the column is whole."""
    plan = json.dumps([corpus.fingerprint, method.about, method.stamps, method.chunk_tokens])
    remedy = f"scores lie beside the corpus: ln -s {corpus.path.absolute()} FOLDER, a new name where you may write, and"
    remedy += " --corpus FOLDER"
    with where_else(out, remedy), stages(console) as stage, work_folder(out, plan, console) as work:
        yield stage, work


@contextmanager
def _kept_for_another_try(out: Path) -> Iterator[None]:
    """Have what is done stay where the ranks cannot go on together, as when one of them was killed."""
    try:
        yield
    except RuntimeError as error:
        raise StoppedError(
            f"{out}: the ranks cannot go on together ({str(error).splitlines()[0]}); what is done is kept: the same"
            " command goes on"
        ) from error


def _nothing(count: int) -> None:
    """Show no progress."""


def _write(corpus: Corpus, out: Path, method: Method, values: np.ndarray, work: Path, console: Console) -> None:
    with new_folder(out, console) as folder:
        write_column(folder, corpus, values, method.best, method.about)
        method.finish(folder, work)


def _scored(corpus: Corpus, method: Method, work: Path, ranks: _Ranks, advance: Advance) -> np.ndarray:
    """All scores (D,), chunk by chunk, on the rank that writes; what ``work`` has there already is read."""
    parts = []
    for number, chunk in enumerate(spans(corpus.lengths, method.chunk_tokens)):
        file = work / f"scores-{number:06d}.npy"
        if ranks.first(file.is_file):
            advance(int(corpus.lengths[chunk].sum()))
        else:
            found = []
            for batch in spans(corpus.lengths[chunk], method.batch_tokens):
                documents = chunk[batch]
                found.append(np.asarray(method.scores(documents), dtype="<f4"))
                advance(int(corpus.lengths[documents].sum()))
            ranks.first(partial(_keep, file, np.concatenate(found)))
        if ranks.writes:
            parts.append(np.load(file, allow_pickle=False))
    return np.concatenate(parts) if ranks.writes else np.empty(0, dtype="<f4")


def _keep(file: Path, scores: np.ndarray) -> None:
    partial_file = file.with_name(f"{file.name}.partial")
    with partial_file.open("wb") as stream:
        np.save(stream, scores)
    os.replace(partial_file, file)


def spans(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Numbers 0 .. n - 1 in runs of about so many of their ``lengths`` (n,); a longer one is a run by itself."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + tokens, side="right")))
        yield np.arange(first, last)
        first = last


def file_stamps(source: Source) -> list[Any]:
    """Names, sizes and ages of a source's files."""
    if source.by_prefix is not None:
        return [str(source.path)]
    return source.stamps()
