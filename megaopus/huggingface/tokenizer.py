"""Holds a corpus to the tokenizer of a model: its token ids must mean the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megaopus.data.corpus import Corpus
from megaopus.data.tokenizer import load_tokenizer
from megaopus.errors import DataError, ModelError


def check_tokenizer(folder: Path, corpus: Corpus) -> None:
    """Raise ModelError unless the corpus was made with the tokenizer in a model folder, token for token.

    Both are read and written out by the same library first, so that spaces in a file make no difference.
    """
    try:
        theirs = load_tokenizer(folder)
    except DataError as error:
        raise ModelError(f"{error}; copy the model's tokenizer.json there") from error
    digests = [hashlib.sha256(each.to_str().encode()).hexdigest()[:16] for each in (theirs, corpus.tokenizer())]
    if digests[0] != digests[1]:
        raise ModelError(
            f"{corpus.path} was tokenised otherwise ({digests[1]}) than {folder} has it ({digests[0]}):"
            f" 'python -m megaopus prepare --tokenizer {folder} ...' makes a corpus of this model's tokens"
        )
