"""The score columns that the quality study filters by: proxy against pool, or under a model of the proxy's text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pools import prepare_texts
from benchmarks.study import COMMON
from megaopus import build
from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.config.compose import compose
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import SPLITS, TOKENIZER, Corpus
from megaopus.data.scores import column_names
from megaopus.score.base import Method, make_column
from megaopus.score.checkpoint import CheckpointPerplexity, Utility
from megaopus.score.hub import FIRST
from megaopus.score.ngrams import Dsir
from megaopus.score.quality import FastText

REFERENCE = (*COMMON, "engine=cpu", "train.steps=300", "train.eval_every=0", "optim=adamw", "optim.lr=2e-3")
"""The model that perplexity and utility are of."""


def ensure_column(corpus: Corpus, name: str, console: Any = None, *, reference: Sequence[str] = REFERENCE) -> None:
    """The score column ``name`` (dsir, fasttext, perplexity or utility), if it is not there.

    perplexity, utility (``contrast``): of a document's first window, under a model trained with the settings
    ``reference`` on the proxy's documents, which then lies beside the corpus.
    """
    if name not in column_names(corpus):
        make_column(corpus, name, _method(corpus, name, reference, console), console=console)


def _method(corpus: Corpus, name: str, reference: Sequence[str], console: Any) -> Method:
    if name == "dsir":
        return Dsir(corpus, None)
    if name == "fasttext":
        return FastText(corpus)
    trained = _trained(corpus, reference, console)
    if name == "perplexity":
        return CheckpointPerplexity(corpus, trained, windows=FIRST, device="cpu")
    return Utility(corpus, trained, windows=FIRST, device="cpu", contrast=True)


def _trained(corpus: Corpus, reference: Sequence[str], console: Any) -> Path:
    """The run folder of a model of the proxy's documents."""
    place = corpus.path.with_name(f"{corpus.path.name}.reference")

    def texts() -> dict[str, list[tuple[str, str]]]:
        proxy = np.flatnonzero(corpus.split_codes == SPLITS.index("proxy"))
        return {"proxy": [(str(at), text) for at, text in zip(proxy, corpus.texts(proxy), strict=True)]}

    prepare_texts(place / "corpus", texts, SplitRule(0, 0), tokenizer=corpus.path / TOKENIZER, console=console)
    run_dir = place / "run"
    if not complete_checkpoints(run_dir):
        settings = [f"data.path={place / 'corpus'}", f"data.validation_path={corpus.path}", f"run_dir={run_dir}"]
        build.train(compose([*reference, *settings, "selection=uniform"]))
    return run_dir
