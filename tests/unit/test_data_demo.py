"""The demo corpus: real text of this installation, the same each time, without wanted text among the rest."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaopus.corpus_tools import demo_text
from megaopus.corpus_tools.demo_corpus import DEMO_LIMITS, build_demo_corpus, build_demo_sources
from megaopus.data.corpus import Corpus
from megaopus.errors import DataError

TINY = {"docs": 120_000, "code": 120_000, "readmes": 60_000, "noise": 120_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    build_demo_sources(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return {
        domain: [json.loads(line) for line in (folder / f"{domain}.jsonl").read_text().splitlines()] for domain in TINY
    }


@pytest.mark.slow
def test_building_twice_gives_one_fingerprint(tmp_path):
    first, second = (
        Corpus.open(build_demo_corpus(tmp_path / name, vocab_size=512, limits=TINY), verify=name == "one")
        for name in ("one", "two")
    )
    assert first.fingerprint == second.fingerprint
    assert first.domains == sorted(TINY)
    assert first.manifest["counts"]["docs"]["proxy"]["tokens"] > 0
    provenance = first.manifest["provenance"]
    assert {"torch", "numpy", "megatron-core"} <= set(provenance["distributions"])
    assert provenance["limits"] == TINY


def test_what_other_packages_brought_along_is_left_out(monkeypatch):
    required = {name: [] for name in demo_text.ROOTS}
    required["torch"] = [
        "Sub_Package>=1",
        "backport; python_version < '3'",
        "needed; python_version >= '3'",
        "more; extra == 'all'",
    ]
    required |= {"sub-package": ["numpy", "missing"], "backport": [], "needed": [], "more": []}

    def distribution(name):
        if name not in required:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(requires=required[name] or None)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert list(demo_text.distributions()) == sorted({*demo_text.ROOTS, "sub-package", "needed"})


@pytest.mark.slow
def test_each_domain_fills_its_limit(rows):
    for domain, limit in TINY.items():
        size = sum(len(row["text"]) for row in rows[domain])
        assert limit - demo_text.LONGEST - 100 < size <= limit


def test_ids_are_names_and_no_paths_of_this_machine_appear(rows):
    everything = [row for domain in rows.values() for row in domain]
    ids = [row["id"] for row in everything]
    assert len(set(ids)) == len(ids)
    assert len({row["text"] for row in everything}) == len(everything)
    here = [str(Path(demo_text.__file__).parents[2]), str(Path.home()), str(demo_text._stdlib())]
    assert not [row["id"] for row in everything for place in here if place in row["text"] or place in row["id"]]
    prefixes = {domain: {row["id"].partition(":")[0] for row in found} for domain, found in rows.items()}
    assert prefixes == {
        "docs": {"py", "topic"},
        "code": {"code"},
        "readmes": {"readme", "licence"},
        "noise": {"noise"},
    }


def test_a_small_corpus_is_part_of_a_large_one(tmp_path, rows):
    build_demo_sources(tmp_path, {name: limit // 4 for name, limit in TINY.items()})
    for domain in ("docs", "code", "readmes"):
        small = (tmp_path / f"{domain}.jsonl").read_text().splitlines()
        assert {json.loads(line)["id"] for line in small} < {row["id"] for row in rows[domain]}


def test_code_has_no_docstrings_and_still_parses():
    source = (
        'r"""Module."""\nimport os\n\n\nclass A:\n    """Only text."""\n\n\ndef f(): "one line"\n\n\n'
        'async def g(x):\n    """Ünïcode\n    text."""\n    return x  # kept\n\n\ndef h():\n    "a"; return 1\n'
    )
    stripped = demo_text._without_docstrings(source, ast.parse(source))
    tree = ast.parse(stripped)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert "return x  # kept" in stripped
    assert "def f(): ...\n" in stripped
    assert "    ...; return 1\n" in stripped


def test_documents_of_the_code_domain_are_free_of_wanted_text(rows):
    code = "".join(row["text"] for row in rows["code"])
    leaked = [row["id"] for row in rows["docs"] if row["text"].strip() in code]
    assert not leaked


def test_noise_has_the_words_and_not_their_order():
    texts = [f"alpha{i} beta{i}\n gamma{i} " for i in range(1000)]
    made = list(demo_text.noise(texts))
    words = "".join(text for _, text in made).split()
    assert Counter(words) == Counter("".join(texts).split()[: len(words)])
    assert len(words) > 2500
    follows = sum(b == a.replace("alpha", "beta") for a, b in itertools.pairwise(words) if "alpha" in a)
    assert follows < 30
    assert made == list(demo_text.noise(texts))
    assert made != list(demo_text.noise(texts, seed=1))


def test_long_texts_are_cut_at_lines_and_short_ones_dropped():
    text = "".join(f"line {i}\n" for i in range(3000))
    pieces = list(demo_text._cut("name", text))
    assert [name for name, _ in pieces[:2]] == ["name", "name#1"]
    assert "".join(piece for _, piece in pieces) == text
    assert all(demo_text.SHORTEST <= len(piece) <= demo_text.LONGEST for _, piece in pieces)
    assert list(demo_text._cut("name", "x" * (demo_text.SHORTEST - 1))) == []


def test_limits_for_every_domain_are_needed(tmp_path):
    with pytest.raises(DataError, match="lack code, noise, readmes"):
        build_demo_sources(tmp_path, {"docs": 1000})
    assert set(DEMO_LIMITS) == set(TINY)
