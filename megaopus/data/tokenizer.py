"""The tokenizer of a corpus: read from a Hugging Face ``tokenizer.json`` or trained on the corpus itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megaopus.errors import DataError

EOD = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-document token


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; texts are encoded whole, and special tokens written in a text stay plain text.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; give a Hugging Face tokenizer.json, or none to train one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise DataError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from error
    return _plain(tokenizer)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most ``vocab_size`` tokens, ``<|endoftext|>`` (id 0) among them.

    Any text can be encoded: all 256 bytes are in the vocabulary. A small text may yield fewer tokens than asked for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def eod_id(tokenizer: Tokenizer, token: str, where: str) -> int:
    """Id of the end-of-document token.

    Raises:
        DataError: the tokenizer has no such token.
    """
    identity = tokenizer.token_to_id(token)
    if identity is None:
        special = ", ".join(repr(added.content) for added in tokenizer.get_added_tokens_decoder().values()) or "none"
        raise DataError(f"{where}: no token {token!r}; name its end-of-document token (special tokens: {special})")
    return identity


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest token id plus one: the rows an embedding needs, holes in the numbering included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
