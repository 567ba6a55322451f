"""Says what must hold between the settings and the corpora that they name, of which the manifests alone are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from megaopus.config.rulebook import RuleBook
from megaopus.config.run_config import RunConfig
from megaopus.data.store import Store, is_address, read_object
from megaopus.errors import DataError, Problem
from megaopus.models.flops import count_parameters, padded_vocab
from megaopus.settings import did_you_mean

EXACT_LIMIT = 5_000_000
"""Most parameters that an estimator may have which needs a small model (exact: one float64 gradient a candidate)."""
ANY_LAYOUT = {"estimator": "selection.estimator=directional", "method": "selection.method=opus"}
"""What works with every model at every layout."""

CORPUS_RULES = RuleBook()
_TARGET = "target"
"""The split that the verb proxy holds out, the folder in a corpus that has it, and the key in its manifest."""


_STORE = Store(patience_s=20.0)
"""How long an object store is asked for a manifest before the setting that names it is said to be wrong."""
_SEEN: ContextVar[dict[str, bytes | DataError] | None] = ContextVar("seen", default=None)


@contextmanager
def one_look() -> Iterator[None]:
    """Ask an object store once for each manifest while a block runs: its answer, or that there is none, is for all."""
    if _SEEN.get() is not None:
        yield
        return
    before = _SEEN.set({})
    try:
        yield
    finally:
        _SEEN.reset(before)


def _object(place: str) -> bytes:
    """Read the manifest of a corpus in an object store. Raises DataError."""
    seen, address = _SEEN.get(), f"{place.rstrip('/')}/manifest.json"
    if seen is None:
        return read_object(address, _STORE)
    if address not in seen:
        try:
            seen[address] = read_object(address, _STORE)
        except DataError as error:
            seen[address] = error
    found = seen[address]
    if isinstance(found, DataError):
        raise found
    return found


def read_manifest(place: str) -> dict[str, Any]:
    """``manifest.json`` of a prepared corpus; empty when it cannot be read (``_corpus_problem`` says why)."""
    try:
        if is_address(place):
            manifest = json.loads(_object(place))
        else:
            manifest = json.loads((Path(place) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, DataError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _corpus_problem(key: str, path: str) -> Problem | None:
    folder = Path(path)
    prepare = "name a folder made by 'python -m megaopus prepare'"
    if is_address(path):
        try:
            _object(path)
        except DataError as error:
            return Problem(key, path, str(error), prepare)
    elif not folder.is_dir():
        return Problem(key, path, "is a file" if folder.exists() else "no such folder", prepare)
    elif not (folder / "manifest.json").is_file():
        return Problem(key, path, "holds no manifest.json, so it is not a prepared corpus", prepare)
    manifest = read_manifest(path)
    if not isinstance(manifest.get("vocab_size"), int) or not isinstance(manifest.get("counts"), dict):
        return Problem(key, path, "its manifest.json is broken (no vocab_size and counts)", "prepare the corpus again")
    return None


def _check_path(name: str) -> None:
    """One rule per setting that names a corpus, so that a problem with one leaves the others checked."""

    @CORPUS_RULES.reading(f"data.{name}")
    def _path(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
        path = getattr(config.data, name)
        if path and (problem := _corpus_problem(f"data.{name}", path)):
            yield problem


for _name in ("path", "proxy_path", "validation_path"):
    _check_path(_name)


def _corpora(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Split -> (the setting that names its corpus, path); the proxy only where it is used, the target where it is."""
    data = config.data
    proxy = ("data.proxy_path", data.proxy_path) if data.proxy_path else ("data.path", data.path)
    validation = ("data.validation_path", data.validation_path) if data.validation_path else ("data.path", data.path)
    corpora = {"pool": ("data.path", data.path), "validation": validation}
    used = config.selection.needs_proxy or config.selection.needs_text_features
    if _TARGET in read_manifest(proxy[1]):  # every validation reads it, whatever chooses the batches
        corpora[_TARGET] = proxy
    return corpora | ({"proxy": proxy} if used else {})


@CORPUS_RULES.reading("data", "selection.method")
def _splits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The target domains exist where the proxy and the validation come from, and no split is empty."""
    said: set[tuple[str, str]] = set()
    for split, (key, path) in _corpora(config).items():
        if _corpus_problem(key, path):
            continue  # said by the rule of that setting
        counts = read_manifest(f"{path}/{_TARGET}" if split == _TARGET else path).get("counts", {})
        targets = config.data.target_domains if split in ("proxy", "validation") else []
        for name in targets:
            if name not in counts and (path, name) not in said:
                said.add((path, name))
                remedy = f"{did_you_mean(name, counts)}domains: {', '.join(counts)}"
                yield Problem("data.target_domains", name, f"no domain of that name in {path}", remedy)
        tokens = {name: counts[name].get(split, {}).get("tokens", 0) for name in targets or counts if name in counts}
        if tokens:
            yield from _split_problem(split, key, path, tokens, config.data.seq_len, named=bool(targets))


@CORPUS_RULES.reading("data.weights", "data.path", "data.seq_len")
def _weights(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Every domain with a weight has sequences in the pool."""
    path = config.data.path
    if not config.data.weights or _corpus_problem("data.path", path):
        return
    counts = read_manifest(path)["counts"]
    enough = [name for name, splits in counts.items() if splits.get("pool", {}).get("tokens", 0) > config.data.seq_len]
    for name in sorted({name for _, stage in config.data.weights for name, weight in stage.items() if weight}):
        if name not in enough:
            reason = f"no sequence of domain {name} in the pool of {path}"
            remedy = f"{did_you_mean(name, enough)}domains: {', '.join(enough)}"
            yield Problem("data.weights", config.data.weights, reason, remedy)


def _split_problem(
    split: str, key: str, path: str, tokens: dict[str, int], seq_len: int, *, named: bool
) -> Iterator[Problem]:
    """Each named domain must fill a sequence of seq_len tokens and the one after; of all domains, at least one."""
    short = [name for name, count in tokens.items() if count <= seq_len]
    if not short or (not named and len(short) < len(tokens)):
        return
    remedy = f"prepare it with a larger --{split}-fraction, or name another corpus with data.{split}_path"
    if split == "pool":
        remedy = "prepare it with more text, or with smaller proxy and validation fractions"
    if split == _TARGET:
        remedy = "make it again with a larger 'proxy --held-out', or with 0"
    longest = max(tokens[name] for name in short)
    if longest == 0:
        yield Problem(key, path, f"its split '{split}' is empty for {', '.join(short)}", remedy)
    else:
        reason = f"its split '{split}' fills no sequence of data.seq_len = {seq_len} for {', '.join(short)}"
        yield Problem(key, path, reason, f"use a data.seq_len below {longest} (its longest), or {remedy}")


@CORPUS_RULES.reading("data.path", "data.proxy_path", "data.validation_path", "selection.method")
def _tokenizers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    digests: dict[str, object] = {}
    for key, path in dict(_corpora(config).values()).items():
        digests[key] = read_manifest(path).get("files", {}).get("tokenizer.json", {}).get("sha256")
    for key, digest in digests.items():
        if digest and digests.get("data.path") and digest != digests["data.path"]:
            path = dict(_corpora(config).values())[key]
            remedy = f"prepare it again with --tokenizer {config.data.path}/tokenizer.json"
            yield Problem(key, path, f"its tokenizer is not that of data.path = {config.data.path}", remedy)


@CORPUS_RULES.reading("data", "selection.method")
def _document_ends(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Hold the corpora to one token that ends documents, where documents matter."""
    if not config.data.document_mask and config.data.first_token_loss:
        return
    corpora = dict(_corpora(config).values())
    ends = {key: read_manifest(path).get("eod_token") for key, path in corpora.items()}
    for key, end in ends.items():
        if end != ends["data.path"]:
            reason = f"its documents end with {end!r}, those of data.path with {ends['data.path']!r}"
            yield Problem(key, corpora[key], reason, f"prepare it again with --eod-token {ends['data.path']!r}")


@CORPUS_RULES.reading("data.path", "model.vocab_size")
def _vocabulary(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    needed = read_manifest(config.data.path).get("vocab_size")
    given = config.model.vocab_size
    if isinstance(needed, int) and given is not None and given < needed:
        reason = f"the corpus has token ids up to {needed - 1}"
        yield Problem("model.vocab_size", given, reason, f"use at least {needed}, or null")


@CORPUS_RULES.reading("data.path", "model.vocab_size", "parallel.tp")
def _vocabulary_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    vocab_size = config.model.vocab_size or read_manifest(config.data.path).get("vocab_size")
    tp = config.parallel.tp
    if isinstance(vocab_size, int) and padded_vocab(vocab_size) % tp:
        reason = f"the embedding's {padded_vocab(vocab_size)} rows cannot be split over it"
        yield Problem("parallel.tp", tp, reason, "use a power of two")


@CORPUS_RULES.reading("selection.estimator", "selection.method", "model", "data.path", "data.seq_len")
def _small_model(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if "small_model" not in (needs := config.selection.needs()):
        return
    key, value, why = needs["small_model"]
    vocab_size = config.model.vocab_size or read_manifest(config.data.path).get("vocab_size")
    if not isinstance(vocab_size, int):
        return  # no readable corpus: another rule says so
    total = count_parameters(config.model, vocab_size, config.data.seq_len)
    if total > EXACT_LIMIT:
        reason = f"{why}: {total:,} parameters are over the limit of {EXACT_LIMIT:,}"
        how = " (the same alignment from two forwards)" if key == "estimator" else ""
        yield Problem(f"selection.{key}", value, reason, f"{ANY_LAYOUT[key]}{how}, or a smaller model")
