"""Finds what the demo on a real model begins with, and says what it will do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megaopus.errors import DataError, ModelError

PLENTY = 2
"""Wanted sequences of the pool for each that a run can pick, at least: repeats are not free."""


def ready_model(folder: Path, corpus: Path, console: Console, *, made: bool) -> None:
    """See that the model in ``folder`` can go on, on a ``corpus`` that is or will be there; ``made``: make the folder
    if it is not there.

    Raises ModelError, before anything is written, if the model cannot be used or made, or has other tokens.
    """
    from megaopus.data.corpus import MANIFEST, Corpus
    from megaopus.data.tokenizer import EOD, eod_id, load_tokenizer
    from megaopus.huggingface import smollm2
    from megaopus.huggingface.families import model_config
    from megaopus.huggingface.folder import CONFIG, ModelFolder
    from megaopus.huggingface.start import checked
    from megaopus.huggingface.tokenizer import check_tokenizer

    if made and not (folder / CONFIG).is_file():
        smollm2.make(folder, console)
    opened = ModelFolder.open(folder)
    checked(opened, model_config(opened.config))
    try:
        eod_id(load_tokenizer(folder), EOD, str(folder))
    except DataError as error:
        raise ModelError(f"{error}; the demo knows {EOD!r} alone, others go on as docs/continue.md says") from error
    if (corpus / MANIFEST).is_file():
        try:
            check_tokenizer(folder, Corpus.open(corpus))
        except ModelError as error:
            raise ModelError(f"{error}; with another --out the demo makes one") from error


def plan(settings: Sequence[str], corpus: Path, wanted: str) -> str:
    """Say what a run with these settings picks from how much.

    Raises DataError if the pool has not ``PLENTY`` times as much wanted text as the run can pick.
    """
    from megaopus.config.compose import compose
    from megaopus.data.corpus import Corpus

    config = compose([*settings])
    length, batch, steps = config.data.seq_len, config.train.global_batch_size, config.train.steps
    pool = (Corpus.open(corpus).manifest["counts"][wanted]["pool"]["tokens"] - 1) // length
    if pool < PLENTY * batch * steps:
        raise DataError(
            f"{corpus}: its pool has {pool:,} sequences of {wanted}, too few for {steps:,} updates of {batch}, which"
            f" should leave half of them: take --steps {pool // (PLENTY * batch)} at most"
        )
    return (
        f"{steps:,} updates: each picks {batch} of {config.buffer_size()} sequences of {length} tokens,"
        f" {steps * batch:,} in all, from a pool with {pool:,} of {wanted}"
    )
