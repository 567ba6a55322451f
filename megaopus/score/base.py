"""Says what a way of scoring documents is, and how a column is made with it: chunk by chunk, whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console

from megaopus.corpus_tools.progress import Advance, Stage, stages
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.tasks.hands import Hands
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

    # A method whose ``ready`` can be shared out has ``units(again, work)`` too: what tasks do before it.
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


@dataclass(frozen=True)
class Again:
    """Opens a corpus and makes a method again, once in each process that does tasks."""

    corpus: Path
    fingerprint: str
    make: Callable[[Corpus], Method]
    """It can be sent to other processes."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("corpus", "fingerprint", "make")}

    @cached_property
    def opened(self) -> tuple[Corpus, Method]:
        """The two. Raises DataError if another corpus lies there now."""
        corpus = Corpus.open(self.corpus)
        if corpus.fingerprint != self.fingerprint:
            raise DataError(f"{self.corpus}: changed while it was scored; start again")
        return corpus, self.make(corpus)


@dataclass(frozen=True)
class ScoreChunks:
    """Scores chunks of a corpus's documents, for tasks."""

    again: Again
    folder: Path
    """Of the results, absolute."""
    count: int
    """Chunks."""
    name: str = "scoring"

    def numbers(self) -> Sequence[int]:
        """All of them."""
        return range(self.count)

    def done(self, number: int) -> bool:
        """Tell whether the scores are there."""
        return _chunk_file(self.folder, number).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Score a chunk. Raises DataError as the method does."""
        corpus, method, chunks = self._ready
        documents = chunks[number]
        keep_array(_chunk_file(self.folder, number), _chunk_scores(corpus, method, documents, _nothing))
        return {"documents": len(documents), "tokens": int(corpus.lengths[documents].sum())}

    @cached_property
    def _ready(self) -> tuple[Corpus, Method, list[np.ndarray]]:
        corpus, method = self.again.opened
        method.ready(self.folder, lambda what, tokens: _nothing)
        return corpus, method, list(spans(corpus.lengths, method.chunk_tokens))


def make_column(
    corpus: Corpus,
    name: str,
    method: Method,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    hands: Hands | None = None,
    again: Callable[[Corpus], Method] | None = None,
) -> Path:
    """Score every document of every split; a killed run goes on where it was. Returns the column's folder.

    Every rank of a launch calls it, if the method can make use of several. ``hands``: who scores, one rank given; None:
    this process. They need ``again``, which makes the method in another process.

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
            shared = None if again is None else Again(corpus.path, corpus.fingerprint, again)
            if hands is not None and shared is not None and hasattr(method, "units"):
                units = method.units(shared, work.absolute())
                hands(units, begin(units.name, len(units.numbers())))
            method.ready(work, begin)
            if hands is not None and shared is not None:
                chunks = ScoreChunks(
                    shared, work.absolute(), sum(1 for _ in spans(corpus.lengths, method.chunk_tokens))
                )
                hands(chunks, begin(chunks.name, chunks.count))
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
        file = _chunk_file(work, number)
        if ranks.first(file.is_file):
            advance(int(corpus.lengths[chunk].sum()))
        else:
            ranks.first(partial(keep_array, file, _chunk_scores(corpus, method, chunk, advance)))
        if ranks.writes:
            parts.append(np.load(file, allow_pickle=False))
    return np.concatenate(parts) if ranks.writes else np.empty(0, dtype="<f4")


def _chunk_file(work: Path, number: int) -> Path:
    return work / f"scores-{number:06d}.npy"


def _chunk_scores(corpus: Corpus, method: Method, chunk: np.ndarray, advance: Advance) -> np.ndarray:
    found = []
    for batch in spans(corpus.lengths[chunk], method.batch_tokens):
        documents = chunk[batch]
        found.append(np.asarray(method.scores(documents), dtype="<f4"))
        advance(int(corpus.lengths[documents].sum()))
    return np.concatenate(found)


def keep_array(file: Path, array: np.ndarray) -> None:
    """Write an array; the file appears when it is whole."""
    partial_file = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    with partial_file.open("wb") as stream:
        np.save(stream, array)
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
