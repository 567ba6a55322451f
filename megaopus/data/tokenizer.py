"""The tokenizer of a corpus: a Hugging Face one, GPT-2's files, or trained on the corpus itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megaopus.errors import DataError

EOD = "<|endoftext|>"
BPE_FILES = (
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
    ("gpt2-vocab.json", "gpt2-merges.txt"),
)
"""Names of GPT-2's vocabulary and merges, as OpenAI, Hugging Face and Megatron-LM give them."""
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-document token


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Read a tokenizer; texts are encoded whole, and special tokens written in a text stay plain text.

    ``source``: a ``tokenizer.json``; a folder with one, or with a byte-level BPE's vocabulary and merges as GPT-2 names
    them (``encoder.json`` and ``vocab.bpe``, or ``vocab.json`` and ``merges.txt``) or Megatron-LM does
    (``gpt2-vocab.json`` and ``gpt2-merges.txt``); else a name on the hub.

    Raises:
        DataError: there is no such file or name, or it is not a tokenizer.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    try:
        if path.is_file():
            return _plain(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise DataError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from error
    if path.suffix == ".json" or len(path.parts) > 2:
        raise DataError(f"{path}: no such tokenizer file; give a Hugging Face tokenizer.json, or none to train one")
    try:
        return _plain(Tokenizer.from_pretrained(str(source)))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{source}: no such tokenizer file or folder, and not to be had from the hub by this name ({said}); give"
            " a tokenizer.json, or none to train one"
        ) from error


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    for vocabulary, merges in BPE_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            try:
                tokenizer = Tokenizer(models.BPE.from_file(str(folder / vocabulary), str(folder / merges)))
            except Exception as error:
                raise DataError(f"{folder}: {vocabulary} and {merges} are not a BPE ({error})") from error
            _byte_level(tokenizer)
            if tokenizer.token_to_id(EOD) is not None:
                tokenizer.add_special_tokens([EOD])
            return _plain(tokenizer)
    pairs = ", or ".join(f"{vocabulary} and {merges}" for vocabulary, merges in BPE_FILES)
    raise DataError(f"{folder}: no tokenizer in it; it needs a tokenizer.json, or {pairs}")


def _byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most ``vocab_size`` tokens, ``<|endoftext|>`` (id 0) among them.

    Any text can be encoded: all 256 bytes are in the vocabulary. A small text may yield fewer tokens than asked for.
    """
    tokenizer = Tokenizer(models.BPE())
    _byte_level(tokenizer)
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
