"""Gives test files a corpus and a pool of ranks; orders the cases and sends them to workers."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import pydoc_data.topics
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaopus.corpus_tools.benchmark_proxy import Limits, build
from megaopus.corpus_tools.nearest_documents import Item
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.training.signals import StopSignal
from tests.pool import Pool

FIRST = ("cluster", "exact", "contract")
"""Folders whose cases take longest, and are begun first."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that use ``pool`` with ``ranks``; keep cases that share a fixture on one worker of xdist."""
    for item in items:
        if "pool" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker("ranks")
        if (group := shared(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(item.path.parent.name) if item.path.parent.name in FIRST else len(FIRST))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what the imports made out of garbage collections, which would look at millions of objects each time."""
    if getattr(session.config.option, "loadgroup", False):
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
        lost = [item.nodeid for item in grouped if "@" not in item.nodeid]
        assert not lost, f"this xdist does not group cases under this pytest: {lost[0]}"
    gc.collect()
    gc.freeze()


def shared(item: pytest.Item) -> str | None:
    """The file or folder whose module- or session-wide fixtures the case uses; None without any."""
    definitions = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    if not any(each[-1].scope != "function" and "/" in each[-1].baseid for each in definitions.values()):
        return None
    folder = item.path.parent
    return str(folder if folder.name != "tests" and (folder / "conftest.py").exists() else item.path)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Runs functions on gloo ranks."""
    with Pool() as pool:
        yield pool


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Values of a parameter (tuples of several) among the cases of this file that will run, for a fixture to begin."""

    def values(*names: str) -> list[Any]:
        mine = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
        found = [item.callspec.params for item in mine]
        chosen = [tuple(each[name] for name in names) for each in found if set(names) <= each.keys()]
        return list(dict.fromkeys(each if len(names) > 1 else each[0] for each in chosen))

    return values


@pytest.fixture(scope="session", autouse=True)
def signals_are_the_test_runner_s() -> Iterator[None]:
    """Runs in this process install no handlers; those that are to get a signal have a process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignal, "__enter__", lambda self: self)
        yield


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


@pytest.fixture(scope="session")
def target_corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another proxy, the documents nearest to some of its sentences, and a third of that held out."""
    corpus = Corpus.open(tiny_corpus)
    texts = corpus.texts(np.flatnonzero(corpus.split_codes == SPLITS.index("validation")))
    items = [Item(str(n), text[at : at + 200]) for n, text in enumerate(texts) for at in (0, 400)]
    folder = tmp_path_factory.mktemp("target_corpus") / "corpus"
    return build(corpus, items, folder, tokens=4000, limits=Limits(), held_out=0.33, workers=1).path


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    """pytest keeps debug records, and torch's checkpoint code writes pages of them into every failure."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
