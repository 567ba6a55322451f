"""What several test files need: a corpus to train on."""

from __future__ import annotations

import inspect
import json
import logging
import pydoc_data.topics
import random
import statistics
from pathlib import Path

import pytest

from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of three domains, about 20,000 tokens each: docs (wanted), code, and shuffled words."""
    docs = [text[:2000] for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 500][:40]
    functions = [value for _, value in sorted(vars(statistics).items()) if inspect.isfunction(value)]
    code = [inspect.getsource(function) for function in functions if function.__module__ == "statistics"]
    noise = []
    for number, text in enumerate(docs + code):
        words = text.split()
        random.Random(number).shuffle(words)
        noise.append(" ".join(words)[:1000])
    folder = tmp_path_factory.mktemp("tiny_corpus")
    sources = []
    for domain, texts in (("docs", docs), ("code", code), ("noise", noise)):
        path = folder / f"{domain}.jsonl"
        rows = [{"id": f"{domain}{number}", "text": text} for number, text in enumerate(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources.append(Source(path, domain))
    rule = SplitRule(proxy_fraction=0.2, validation_fraction=0.2, wanted=("docs",))
    return prepare(sources, folder / "corpus", vocab_size=320, rule=rule)


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    """pytest keeps debug records, and torch's checkpoint code writes pages of them into every failure."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
