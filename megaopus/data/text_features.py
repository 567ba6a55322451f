"""Says what can be said of every sequence without a model, computed once and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megaopus.data.config import SAMPLE
from megaopus.data.feature_numbers import BUCKETS, LIKELIHOODS, SHINGLE, SKETCH_DIM, design, moments
from megaopus.data.feature_work import (
    NUMBERS,
    Again,
    Describe,
    Hands,
    Line,
    Order,
    Sides,
    here,
    plan_of,
    unit_folder,
    work_out,
    write_numbers,
    write_proxies,
)
from megaopus.data.folder import new_folder, where_else, work_folder
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 5
BLOCKS = ("ngrams", "domain", "likelihood", "shape")
_SKETCH = "sketch.npy"
_MOMENTS = "moments.npy"
"""Of a pool that was not counted whole; else they follow from its numbers."""
_MUCH = 1 << 31
"""Tokens of a pool, some minutes of one process, from which on it is told who else could work."""


class SequenceTextFeatures:
    """TextFeatures of the sequences of one pool, by candidate id; implements ``selection.backend.TextFeatures``.

    The files lie in a folder of their own beside the corpus, under a name that stands for the pool, the proxy and this
    version of the features.
    """

    def __init__(self, pool: Sequences, folder: Path, blocks: Items[str] = BLOCKS):
        """Map the files in ``folder`` (see ``ensure_text_features``). Raises DataError if they are not of this pool."""
        self._pool = pool
        self._blocks = tuple(blocks)
        arrays = (_load(folder / f"{name}.npy", len(pool)) for name in NUMBERS)
        self._scalars, self._log_odds, self._exact, self._near = arrays
        self._moments = _load(folder / _MOMENTS, 2) if is_of_a_sample(folder) else moments(self._scalars)
        fitted = _load(folder / "importance.npy", 2 * self._scalars.shape[1] + 2)
        self._weights, self._most = fitted[:-1], float(fitted[-1])
        self._folder = folder

    @property
    def domain_names(self) -> list[str]:
        """Return what ``domains`` counts."""
        return self._pool.domains

    def features(self, ids: Tensor) -> Tensor:
        """(n, F) float32: the blocks side by side; the n-gram block has norm 1, the others entries of about 1."""
        rows = self._rows(ids)
        parts = []
        for block in self._blocks:
            if block == "ngrams":
                part = np.asarray(self._sketch[rows], dtype=np.float32)
            elif block == "domain":
                part = np.eye(len(self._pool.domains), dtype=np.float32)[self._pool.domain_of(rows)]
            else:
                cut = slice(0, len(LIKELIHOODS)) if block == "likelihood" else slice(len(LIKELIHOODS), None)
                part = ((self._scalars[rows] - self._moments[0]) / self._moments[1]).astype(np.float32)[:, cut]
            parts.append(part)
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def log_odds(self, ids: Tensor) -> Tensor:
        """(n,) float64: log-likelihood of hashed n-grams under the proxy less that under the pool, nats a token.

        DSIR-like: the importance weight of Xie et al. (2023, arXiv 2302.03169) for n-grams of tokens, a table for each
        order, and means over unigrams and over bigrams, added. Their package ``data-selection`` sums over lower-cased
        words and pairs of them in one table, and ranks otherwise.
        """
        return torch.from_numpy(np.array(self._log_odds[self._rows(ids)], dtype=np.float64))

    def importance(self, ids: Tensor) -> Tensor:
        """(n,) float64: log of how much likelier the proxy holds such a sequence than the pool, as a classifier tells.

        Logistic regression of proxy against pool, as much weight on one as on the other, on how likely the sequence is
        under n-grams of both and how often it repeats its own, and on the squares of these numbers. At most what the
        proxy's median is: no text is more like the proxy than the proxy itself.
        """
        return self._importance(self._scalars[self._rows(ids)])

    def proxy_importance(self, ids: Tensor) -> Tensor:
        """(n,) float64: the same of sequences of the proxy, by their ids; n-grams of the other half describe each."""
        return self._importance(self._proxy[ids.cpu().numpy() % len(self._proxy), :-1])

    def judges(self, ids: Tensor) -> Tensor:
        """(n,) bool: which sequences of the proxy are kept to judge scores by, all of every fourth document."""
        return torch.from_numpy(self._proxy[ids.cpu().numpy() % len(self._proxy), -1] > 0)

    @cached_property
    def _proxy(self) -> np.ndarray:
        """(proxy sequences, F + 1): their numbers, and whether they judge."""
        return _load(_beside(self._folder, "proxy") / "proxy.npy", None)

    @cached_property
    def _sketch(self) -> np.ndarray:
        """(n, SKETCH_DIM)."""
        own = self._folder / _SKETCH
        return _load(own if own.is_file() else _beside(self._folder, "ngrams") / _SKETCH, len(self._pool))

    def _importance(self, scalars: np.ndarray) -> Tensor:
        return torch.from_numpy(np.minimum(design(scalars, self._moments) @ self._weights, self._most))

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        """(n,) int64: equal for equal tokens; ``near``: for sequences that share most of their 8-grams, mostly."""
        return torch.from_numpy(np.array((self._near if near else self._exact)[self._rows(ids)]))

    def domains(self, ids: Tensor) -> Tensor:
        """(n,) int64 index into ``domain_names``."""
        return torch.from_numpy(self._pool.domain_of(self._rows(ids)))

    def _rows(self, ids: Tensor) -> np.ndarray:
        return ids.cpu().numpy() % len(self._pool)


def text_features_folder(pool: Sequences, proxy: Sequences, parent: str | None, sample: int = SAMPLE) -> Path:
    """Return where the traits of ``pool`` lie; another proxy, seq_len or corpus has another place.

    ``sample``: sequences of the pool whose n-grams are counted, at most. A pool of more has a place for each such
    number, unless there are features of the whole, as earlier versions made them: these go on to be used.
    """
    path = pool.corpus.path
    folder = Path(parent) if parent else path.with_name(f"{path.name}.traits")
    meaning = [VERSION, BUCKETS, SKETCH_DIM, SHINGLE, pool.key, proxy.key]
    whole = folder / _digest(meaning)
    if len(pool) <= sample or whole.is_dir():
        return whole
    return folder / _digest([*meaning, sample])


def is_of_a_sample(folder: Path) -> bool:
    """Tell of a folder of features whether they are fitted to some of the pool's sequences, or to all."""
    return (folder / _MOMENTS).is_file()


def _digest(meaning: list[object]) -> str:
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]


def ensure_text_features(
    pool: Sequences,
    proxy: Sequences,
    parent: str | None,
    console: Console,
    *,
    judges: bool = False,
    ngrams: bool = True,
    sample: int = SAMPLE,
    hands: Hands | None = None,
    again: Again | None = None,
) -> Path:
    """The folder of the pool's traits, worked out with a progress bar if it is not there.

    What a killed process left is gone on from.

    Args:
        pool: whose sequences are described.
        proxy: what they are compared with.
        parent: where the folder lies; None: beside the corpus, in a folder called like it with ``.traits`` added.
        console: shows progress.
        judges: the same numbers of the proxy too, in a folder beside it, for what asks about sequences of the proxy.
        ngrams: the block of that name too, which takes ten times the room of all else: in a folder beside it, if it
            was made without.
        sample: sequences of the pool whose n-grams are counted, at most.
        hands: who works; None: this process.
        again: opens pool and proxy in other processes, where these work.

    Raises:
        DataError: the folder cannot be written; ``data.text_features_path`` is named.
    """
    folder = text_features_folder(pool, proxy, parent, sample)
    numbers = not folder.is_dir()
    places = {"numbers": folder, "proxy": _beside(folder, "proxy"), "ngrams": _beside(folder, "ngrams")}
    judges = judges and not places["proxy"].is_dir()
    ngrams = ngrams and not ((folder / _SKETCH).is_file() or places["ngrams"].is_dir())
    if not (numbers or judges or ngrams):
        return folder
    if folder == text_features_folder(pool, proxy, parent, len(pool)):
        sample = max(sample, len(pool))
    plan = plan_of(pool, proxy, sample, numbers, ngrams, judges)
    writers = {
        "numbers": write_numbers if numbers else None,
        "proxy": write_proxies if judges else None,
        "ngrams": partial(Describe.write, names=["sketch"]) if ngrams and not numbers else None,
    }
    if hands is None and (tokens := len(pool) * pool.seq_len) >= _MUCH:
        told = f"text features of {tokens:,} tokens, in one process: 'python -m megaopus features --executor ...' has"
        console.print(f"{told} tasks make them ahead of a run", highlight=False, markup=False, soft_wrap=True)
    with _place(folder), work_folder(folder, plan, console) as work:
        units = unit_folder(work, plan)
        sides = Sides(pool, proxy, sample, again or (lambda: (pool, proxy)), units)
        order = Order(units, sides, numbers, ngrams, judges)
        with _lines(console) as line:
            describing = work_out(order, hands or here, line)
        for name, write in writers.items():
            if write is not None:
                with _place(places[name]), new_folder(places[name], console) as growing:
                    write(describing, growing)
    return folder


def _place(folder: Path) -> AbstractContextManager[None]:
    return where_else(folder, "set data.text_features_path to a folder that can be written")


@contextmanager
def _lines(console: Console) -> Iterator[Line]:
    """Yield what starts lines of progress."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        yield lambda name, units: partial(bar.advance, bar.add_task(name, total=units))


def _beside(folder: Path, what: str) -> Path:
    """Say where what not every run asks for lies: numbers of the proxy, of which version 0.1 had none, and n-grams."""
    return folder.with_name(f"{folder.name}.{what}")


def _load(path: Path, count: int | None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete its folder, it is made again") from error
    if count is not None and len(array) != count:
        raise DataError(f"{path}: {len(array):,} rows for {count:,} sequences; delete its folder, it is made again")
    return array
