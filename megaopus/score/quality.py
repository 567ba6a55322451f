"""fastText quality classifiers, as DCLM filters with (arXiv 2406.11794): a given model, or one trained here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.corpus_tools.readers.stored import needed
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.permutation import permute
from megaopus.data.scores import HIGHEST
from megaopus.errors import DataError
from megaopus.score.base import Begin, file_stamps

MODEL = "model.bin"
POSITIVE, NEGATIVE = "__label__positive", "__label__negative"
SETTINGS = {"lr": 0.1, "wordNgrams": 2, "dim": 64, "bucket": 1 << 18, "seed": 0, "thread": 12}
"""Of training. The library's 12 threads, on however many cores: each of fastText 0.9.2's threads sets a tenth of the
vectors to their first values, and with fewer than 11 some stay what the memory held before."""
PIECE_WORDS = 200
"""Documents are cut into pieces of so many words to train on, so that a few long ones are enough."""
MOST_PIECES = 100_000
"""Of either side."""
_SEEN, _FEWEST, _MOST = 100_000, 5, 50
"""Epochs are as many as show about _SEEN pieces, within these bounds."""


class FastText:
    """Probability of one label. Documents are read as words on one line, cased, whole."""

    best = HIGHEST
    batch_tokens = 1 << 18
    chunk_tokens = 1 << 22

    def __init__(
        self,
        corpus: Corpus,
        model: Path | None = None,
        label: str | None = None,
        positive: tuple[Source, ...] = (),
        negative: tuple[Source, ...] = (),
    ):
        """``model``: a .bin file, whose ``label`` is scored; None: one is trained to tell ``positive`` documents (none
        given: the split proxy) from ``negative`` ones (none: a sample of the pool).

        Raises:
            DataError: the package is missing, the model cannot be read or has no such label.
        """
        self._fasttext = needed("fasttext", "--method fasttext", "fasttext")
        self._corpus, self._path, self._sources = corpus, model, (positive, negative)
        self._model: Any = None
        self.about: dict[str, Any] = {"method": "fasttext"}
        self.stamps: list[Any]
        if model is None:
            sides = ("proxy", "pool")
            names = [[str(s.path) for s in given] or side for given, side in zip(self._sources, sides, strict=True)]
            self.label = POSITIVE
            self.about |= {"positive": names[0], "negative": names[1], "piece_words": PIECE_WORDS, **SETTINGS}
            self.stamps = [file_stamps(source) for given in self._sources for source in given]
        else:
            self._model = self._load(model)
            self.label = self._checked(label)
            self.about |= {"model": str(model), "label": self.label}
            self.stamps = [model.stat().st_size, model.stat().st_mtime_ns]

    def ready(self, work: Path, begin: Begin) -> None:
        """Train the model, unless it was given or an earlier run trained it."""
        if self._model is not None:
            return
        if not (work / MODEL).is_file():
            self._train(work, begin)
        self._model = self._load(work / MODEL)

    def scores(self, documents: np.ndarray) -> np.ndarray:
        """(n,) float32 in [0, 1]."""
        lines = [_line(text) for text in self._corpus.texts(documents)]
        labels, chances = self._model.predict(lines, k=-1)
        found = [row[names.index(self.label)] for names, row in zip(labels, chances, strict=True)]
        return np.array(found, dtype=np.float32).clip(0, 1)  # the library adds 1e-5 to each

    def finish(self, folder: Path, work: Path) -> None:
        """Keep a model that was trained here."""
        if self._path is None:
            shutil.copyfile(work / MODEL, folder / MODEL)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _load(self, path: Path) -> Any:
        if not path.is_file():
            raise DataError(f"{path}: no such fastText model; name a .bin file, or none to train one")
        self._fasttext.FastText.eprint = lambda *text: None  # it prints a warning about an interface of 2019
        try:
            return self._fasttext.load_model(str(path))
        except (ValueError, MemoryError) as error:
            raise DataError(
                f"{path}: not a fastText model ({error}); name a .bin file of the fasttext library"
            ) from error

    def _checked(self, label: str | None) -> str:
        known = sorted(self._model.get_labels())
        wanted = label if label is None or label.startswith("__label__") else f"__label__{label}"
        if wanted is None or wanted not in known:
            what = "no label named" if label is None else f"no label {label!r}"
            raise DataError(f"{self._path}: {what}; give the one that is scored with --label: {', '.join(known[:20])}")
        return wanted

    def _train(self, work: Path, begin: Begin) -> None:
        lines, counts, words = work / "training.txt.partial", [], 0
        with lines.open("w", encoding="utf-8") as stream:
            for label, sources, split in ((POSITIVE, self._sources[0], "proxy"), (NEGATIVE, self._sources[1], "pool")):
                texts = _of_files(sources) if sources else self._of_split(split)
                counts.append(0)
                for piece in _pieces(texts):
                    stream.write(f"{label} {piece}\n")
                    counts[-1] += 1
                    words += piece.count(" ") + 1
                    if counts[-1] == MOST_PIECES:
                        break
        if not all(counts):
            side = "positive" if not counts[0] else "negative"
            raise DataError(f"{self._corpus.path}: no {side} documents to train on; name files with --{side}")
        epochs = min(_MOST, max(_FEWEST, -(-_SEEN // sum(counts))))
        self.about["pieces"], self.about["epochs"] = counts, epochs
        advance = begin(f"training on {counts[0]:,} + {counts[1]:,} pieces, {epochs} epochs", words * epochs)
        model = self._fasttext.train_supervised(str(lines), epoch=epochs, verbose=0, **SETTINGS)
        partial = work / f"{MODEL}.partial"
        model.save_model(str(partial))
        os.replace(partial, work / MODEL)
        lines.unlink()
        advance(words * epochs)

    def _of_split(self, split: str) -> Iterator[str]:
        """Its documents in a shuffled order."""
        corpus = self._corpus
        members = np.flatnonzero(corpus.split_codes == SPLITS.index(split))
        if not len(members):
            return
        order = members[permute(np.arange(len(members)), len(members), f"fasttext/{split}")]
        for start in range(0, len(order), 256):
            yield from corpus.texts(order[start : start + 256])


def _of_files(sources: tuple[Source, ...]) -> Iterator[str]:
    for source in sources:
        for document in SourceReader(source):
            yield document.text


def _line(text: str) -> str:
    """One line: a line's end is a word to fastText, and ends a document."""
    return " ".join(text.split())


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        words = text.split()
        for start in range(0, len(words), PIECE_WORDS):
            yield " ".join(words[start : start + PIECE_WORDS])
