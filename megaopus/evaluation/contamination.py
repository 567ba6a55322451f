"""Finds the benchmark items whose words are in a run's corpus: in its pool, its proxy, and what it trained on.

An item is met where it shares WORDS words in a row with a document: GPT-3's rule (Brown et al. 2020, arXiv 2005.14165,
appendix C), which lm-eval's decontamination follows. Words are in lower case and without punctuation, as the verb
``proxy`` finds them (``corpus_tools/similarity.py``): a mark within a word divides it. GPT-3 takes between 8 and 13
words by the length of a benchmark's items; here all words of an item of SHORTEST to WORDS - 1 count as one run, and
items of fewer are too short to say.

The corpus is decoded a document at a time, so that no run of words goes on from one document into the next. In the
*picks* a run of words is met if it lies within the tokens of one sequence that was trained on, whole words only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from megaopus.corpus_tools.nearest_documents import OVERLAP_WORDS as WORDS
from megaopus.corpus_tools.progress import stages
from megaopus.corpus_tools.similarity import WORD, among, runs_of_words, word_digests
from megaopus.corpus_tools.workers import cores, worker_pool
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.folder import StoppedError
from megaopus.errors import DataError
from megaopus.evaluation.items import CONTAMINATION_FILE, FORMAT
from megaopus.fs import write_whole
from megaopus.record.parquet import FOLDER, parts, read_part

if TYPE_CHECKING:  # workers need no torch
    from megaopus.config.run_config import RunConfig
    from megaopus.data.sequences import Sequences

SHORTEST = 8
"""Words of an item below which it is too short to say."""
BLOCK_TOKENS = 1 << 20
"""Decoded at a time by a worker; a longer document is a block of its own."""
FEW_TOKENS = 2 * BLOCK_TOKENS
"""Tokens that are looked through before a worker would have started."""
_AHEAD = 3
"""Blocks a worker that wait for it."""
_CUT = "\ufffd"
"""Stands in decoded text for a part of a character."""


class Spans(NamedTuple):
    """Holds stretches of the token file, (n,) int64 each, and the documents that they are of."""

    documents: np.ndarray
    """Numbers in the corpus."""
    starts: np.ndarray
    ends: np.ndarray


class Wanted(NamedTuple):
    """Holds the runs of words that are looked for."""

    known: np.ndarray
    """(n,) uint64 digests, ascending."""
    lengths: tuple[int, ...]
    """Words that they have."""


def find_contamination(
    run_folder: Path, items: Mapping[str, Sequence[str]], *, workers: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Count, task by task, the items whose words are in the pool, the proxy and the picks of a run.

    Args:
        run_folder: the run; the corpus must still be where its settings say.
        items: task -> the text of each item (``items.item_texts``).
        workers: processes that decode; None: one a core.
        console: shows progress; None: nobody is told.

    Returns:
        the content of contamination.json: ``tasks``, a row a task with ``items``, ``too_short``, ``pool``, ``proxy``
        and ``picks`` (None: there is no proxy, or no record of the picks; ``notes`` say why), the rule, the corpus.

    Raises:
        DataError: the corpus is not what the run read, or a record cannot be read.
        StoppedError: a worker died.
    """
    notes: list[str] = []
    pool, proxy = _open(run_folder, notes)
    picked = _picked(run_folder, pool, notes)
    runs = {task: [_runs(text) for text in texts] for task, texts in items.items()}
    every = [each for texts in runs.values() for each, _ in texts]
    lengths = {length for texts in runs.values() for each, length in texts if len(each)}
    wanted = Wanted(np.unique(np.concatenate([np.empty(0, np.uint64), *every])), tuple(sorted(lengths)))
    met: dict[str, np.ndarray | None] = {"pool": None, "proxy": None, "picks": None}
    with stages(console or Console(quiet=True)) as stage:

        def search(name: str, corpus: Corpus, blocks: Iterable[Spans], total: int) -> tuple[np.ndarray, np.ndarray]:
            advance = stage(f"looking in the {name}", total, "M tokens/s")
            processes = 1 if total <= FEW_TOKENS else workers or cores()
            return _search(corpus, blocks, wanted, processes, advance)

        members = _members(pool)
        met["pool"], documents = search("pool", pool.corpus, _documents(pool.corpus, members), _tokens(pool, members))
        if picked is not None:
            total = int(pool.corpus.lengths[documents].sum())
            met["picks"], _ = search("picks", pool.corpus, _picked_spans(pool, picked, documents), total)
        if proxy is not None:
            held = _members(proxy)
            met["proxy"], _ = search("proxy", proxy.corpus, _documents(proxy.corpus, held), _tokens(proxy, held))
    return {
        "format": FORMAT,
        "ngram": WORDS,
        "shortest": SHORTEST,
        "corpus": _identity(pool.corpus),
        "proxy_corpus": None if proxy is None else _identity(proxy.corpus),
        "pool_documents": len(members),
        "picked_sequences": None if picked is None else int(picked.sum()),
        "notes": notes,
        "tasks": [_row(task, each, met) for task, each in runs.items()],
    }


def write_contamination(run_folder: Path, found: Mapping[str, Any]) -> Path:
    """Write a run's ``contamination.json`` in one go and return its path. Raises DataError if it cannot be written."""
    path = run_folder / CONTAMINATION_FILE
    try:
        write_whole(path, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); mend that, then start again") from error
    return path


def _runs(text: str) -> tuple[np.ndarray, int]:
    """(digests of an item's runs of words, words of each); none of a text that is too short."""
    words = word_digests(text)
    length = min(len(words), WORDS)
    return (runs_of_words(words, length) if length >= SHORTEST else np.empty(0, np.uint64)), length


def _row(task: str, runs: Sequence[tuple[np.ndarray, int]], met: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
    counts = {
        where: None if digests is None else sum(len(among(each, digests)) > 0 for each, _ in runs)
        for where, digests in met.items()
    }
    return {"task": task, "items": len(runs), "too_short": sum(not len(each) for each, _ in runs), **counts}


def _identity(corpus: Corpus) -> dict[str, str]:
    return {"path": str(corpus.path), "fingerprint": corpus.fingerprint}


# -- what the run read ------------------------------------------------------------------------------------------------


def _open(run_folder: Path, notes: list[str]) -> tuple[Sequences, Sequences | None]:
    """Open a run's pool and proxy; the latter None, and a note, where there is none."""
    from megaopus.data.run_data import RunData

    config = _config(run_folder / "config.yaml")
    data = RunData.open(config.data, config.data_needs())
    path = run_folder / "environment.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8")).get("corpus")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it") from error
    if read != data.pool.corpus.fingerprint:
        raise DataError(
            f"{config.data.path}: another corpus than the run read lies there (other fingerprint); put that back"
        )
    try:
        return data.pool, data.proxy
    except DataError as error:
        notes.append(f"no proxy: {error}")
        return data.pool, None


def _config(path: Path) -> RunConfig:
    from megaopus.config.parse import load

    if not path.is_file():
        raise DataError(f"{path}: missing; name the run_dir of a 'python -m megaopus train'")
    return load(path)


def _members(sequences: Sequences) -> np.ndarray:
    """(n,) numbers of the documents of a split that the run may read: kept by the filter, of domains with sequences."""
    corpus = sequences.corpus
    codes = [corpus.domains.index(name) for name in sequences.domains]
    inside = (corpus.split_codes == SPLITS.index(sequences.split)) & np.isin(corpus.domain_codes, codes)
    return np.flatnonzero(inside if sequences.kept is None else inside & sequences.kept.documents)


def _picked(run_folder: Path, pool: Sequences, notes: list[str]) -> np.ndarray | None:
    """(sequences of the pool,) bool: which of them the run trained on; None, and a note, without a record."""
    files = parts(run_folder / FOLDER)
    if not files:
        notes.append(f"no picks: {run_folder / FOLDER} is not there (logging.selection)")
        return None
    cuts = {_cut(path) for path in (run_folder / "launches").glob("*/config.yaml")}
    if cuts - {_cut(run_folder / "config.yaml")}:
        notes.append("no picks: launches of the run cut their sequences from other pools (data.filter)")
        return None
    picked = np.zeros(len(pool), dtype=bool)
    for path in files:
        table = read_part(path, ["sequence", "picked"])
        numbers = table.filter(table["picked"])["sequence"].to_numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(pool):
            raise DataError(f"{path}: names sequences that the pool of {pool.corpus.path} has not; restore the record")
        picked[numbers] = True
    return picked


def _cut(path: Path) -> str:
    """Return the settings that decide what the numbers of a pool's sequences mean."""
    data = _config(path).data
    return repr((data.seq_len, data.filter))


# -- the search -------------------------------------------------------------------------------------------------------


def _tokens(sequences: Sequences, documents: np.ndarray) -> int:
    return int(sequences.corpus.lengths[documents].sum())


def _documents(corpus: Corpus, documents: np.ndarray) -> Iterator[Spans]:
    """Yield whole documents in blocks, without their end-of-document tokens."""
    for part in _in_blocks(corpus, documents):
        yield Spans(part, corpus.offsets[part], corpus.offsets[part] + corpus.lengths[part] - 1)


def _picked_spans(pool: Sequences, picked: np.ndarray, documents: np.ndarray) -> Iterator[Spans]:
    """Yield what of documents lies in sequences that were trained on."""
    for part in _in_blocks(pool.corpus, documents):
        sequences, of, starts, ends = pool.stretches_of(part)
        ends = np.minimum(ends, pool.corpus.offsets[of] + pool.corpus.lengths[of] - 1)
        inside = picked[sequences] & (ends > starts)
        yield Spans(of[inside], starts[inside], ends[inside])


def _in_blocks(corpus: Corpus, documents: np.ndarray) -> Iterator[np.ndarray]:
    if len(documents):
        blocks = np.cumsum(corpus.lengths[documents]) // BLOCK_TOKENS
        yield from np.split(documents, np.flatnonzero(np.diff(blocks)) + 1)


def _search(
    corpus: Corpus, blocks: Iterable[Spans], wanted: Wanted, workers: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """(digests that were met, documents with any of them), ascending each."""
    digests, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    done = _alone(corpus, blocks, wanted) if workers == 1 else _shared(corpus, blocks, wanted, workers)
    for tokens, met, where in done:
        digests = [np.union1d(digests[0], met)]
        documents.append(where)
        advance(tokens)
    return digests[0], np.unique(np.concatenate(documents))


Result = tuple[int, np.ndarray, np.ndarray]
"""(tokens of a block, digests that were met in it, documents with any of them)."""


def _alone(corpus: Corpus, blocks: Iterable[Spans], wanted: Wanted) -> Iterator[Result]:
    return (look(corpus, block, wanted) for block in blocks)


def _shared(corpus: Corpus, blocks: Iterable[Spans], wanted: Wanted, workers: int) -> Iterator[Result]:
    pool, waiting = worker_pool(workers, _start, corpus.path.resolve(), wanted), set[Future[Result]]()
    try:
        for block in blocks:
            waiting.add(pool.submit(_work, block))
            if len(waiting) >= workers * _AHEAD:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (each.result() for each in done)
        yield from (each.result() for each in waiting)
    except BrokenProcessPool as error:
        raise StoppedError(
            "a worker process died while it looked for benchmark items, for want of memory perhaps; start again with "
            "fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def look(corpus: Corpus, block: Spans, wanted: Wanted) -> Result:
    """Decode stretches, each on its own, and look for the wanted runs of whole words."""
    met, where = [np.empty(0, np.uint64)], []
    for document, start, end in zip(*(each.tolist() for each in block), strict=True):
        words = word_digests(_whole_words(corpus, document, start, end))
        runs = [among(runs_of_words(words, length), wanted.known) for length in wanted.lengths]
        if any(map(len, runs)):
            met += runs
            where.append(document)
    return int((block.ends - block.starts).sum()), np.unique(np.concatenate(met)), np.array(where, dtype=np.int64)


def _whole_words(corpus: Corpus, document: int, start: int, end: int) -> str:
    """The text of a stretch of a document, without a part of a word at its ends that goes on beside it."""
    first = int(corpus.offsets[document])
    last = first + int(corpus.lengths[document]) - 1
    text = corpus.decode(start, end).lower()
    head, tail = WORD.search(text), WORD.search(text[::-1])
    if head is None or tail is None:
        return ""
    begin, stop = 0, len(text)
    if start > first and not text[: head.start()].strip(_CUT):
        before = corpus.decode(start - 1, end).lower()
        if not before.endswith(text) or _in_word(before[: len(before) - len(text)][-1:]):
            begin = head.end()
    if end < last and not text[len(text) - tail.start() :].strip(_CUT):
        after = corpus.decode(start, end + 1).lower()
        if not after.startswith(text) or _in_word(after[len(text) :][:1]):
            stop = len(text) - tail.end()
    return text[begin:stop]


def _in_word(letter: str) -> bool:
    """Tell whether a word may go on with a letter; one that does not show, a part of a character, may be any."""
    return not letter or letter == _CUT or WORD.match(letter) is not None


# -- in the workers ----------------------------------------------------------------------------------------------------

_held: tuple[Corpus, Wanted] | None = None


def _start(corpus: Path, wanted: Wanted) -> None:
    global _held
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _held = Corpus.open(corpus), wanted


def _work(block: Spans) -> Result:
    assert _held is not None
    return look(_held[0], block, _held[1])
