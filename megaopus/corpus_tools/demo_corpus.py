"""The demo corpus: four domains of real text from this Python installation, nothing downloaded."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.console import Console

from megaopus.corpus_tools.demo_text import Item, distributions, documentation, noise, readmes, source_code
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.errors import DataError

DEMO_LIMITS: Mapping[str, int] = {"docs": 3_200_000, "code": 3_300_000, "readmes": 1_200_000, "noise": 3_300_000}
"""Characters of each domain, at most: about a quarter of the pool is wanted text once the held-out splits are gone."""
DEMO_RULE = SplitRule(proxy_fraction=0.1, validation_fraction=0.08, wanted=("docs",))
DEMO_VOCAB_SIZE = 2048


def build_demo_sources(folder: Path, limits: Mapping[str, int] = DEMO_LIMITS) -> list[Source]:
    """Write ``docs``, ``code``, ``readmes`` and ``noise`` as JSON lines into ``folder``.

    Args:
        folder: an existing folder.
        limits: characters of each domain, at most. Less text is read for smaller limits, and the documents kept
            for a small limit are a subset of those kept for a large one (noise apart).

    Raises:
        DataError: a limit is missing, or the installation lacks its sources.
    """
    missing = sorted(set(DEMO_LIMITS) - set(limits))
    if missing:
        raise DataError(f"limits of the demo corpus lack {', '.join(missing)}; give characters for each domain")
    seen: set[bytes] = set()
    kept = {
        "docs": _kept(documentation(), limits["docs"], seen),
        "code": _kept(source_code(), limits["code"], seen),
        "readmes": _kept(readmes(), limits["readmes"], seen),
    }
    kept["noise"] = _kept(noise(_alternating(kept["docs"], kept["code"])), limits["noise"], seen)
    sources = []
    for domain, items in kept.items():
        path = folder / f"{domain}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for name, text in sorted(items):
                stream.write(json.dumps({"id": name, "domain": domain, "text": text}, ensure_ascii=False) + "\n")
        sources.append(Source(path, domain))
    return sources


def build_demo_corpus(
    out: Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = DEMO_VOCAB_SIZE,
    limits: Mapping[str, int] = DEMO_LIMITS,
    rule: SplitRule = DEMO_RULE,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Prepare the demo corpus in ``out``; equal Python and package versions give an equal fingerprint.

    Args:
        out: corpus folder to make.
        tokenizer: that of a model, as ``prepare`` takes it; None: one is trained on the pool.
        vocab_size: tokens of the byte-level BPE trained on the pool, at most.
        limits: characters of each domain, at most.
        rule: how documents are split.
        overwrite: replace a corpus that is already there.
        console: where progress and the table go; None: nowhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        sources = build_demo_sources(Path(folder), limits)
        return prepare(
            sources,
            out,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            rule=rule,
            overwrite=overwrite,
            provenance=_provenance(limits),
            console=console,
        )


def _kept(items: Iterable[Item], limit: int, seen: set[bytes]) -> list[Item]:
    """Items until ``limit`` characters are reached, texts met before left out; a second use of a name is numbered."""
    kept: list[Item] = []
    uses: dict[str, int] = {}
    characters = 0
    for name, text in items:
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        if characters + len(text) > limit:
            break
        seen.add(digest)
        characters += len(text)
        uses[name] = uses.get(name, 0) + 1  # a function may be defined twice, in two branches
        kept.append((name if uses[name] == 1 else f"{name}~{uses[name]}", text))
    return kept


def _alternating(docs: list[Item], code: list[Item]) -> list[str]:
    """Texts of both, so that at each point about as many characters came from either, until one is used up."""
    texts: list[str] = []
    totals = [0, 0]
    streams: list[Iterator[Item]] = [iter(docs), iter(code)]
    while True:
        side = int(totals[1] < totals[0])
        item = next(streams[side], None)
        if item is None:
            return texts
        texts.append(item[1])
        totals[side] += len(item[1])


def _provenance(limits: Mapping[str, int]) -> dict:
    return {
        "made_by": "demo corpus",
        "limits": dict(limits),
        "python": platform.python_version(),
        "distributions": {name: distribution.version for name, distribution in distributions().items()},
    }
