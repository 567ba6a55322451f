"""The text pools of the quality study, made from a folder of JSON lines; each becomes a prepared corpus.

mixed: books wanted; code, command-line help in many languages, French novels and shuffled words beside them.
hard:  books wanted; beside them the same kind of text, changed so that words and pairs tell little: blocks shuffled,
       passages repeated, 30 % of the words replaced by others as frequent.
clean: nothing but books in the pool; wanted are books by other authors.
real_hard: books wanted; beside them books damaged as web corpora have it (damage.py), and other domains.
real_clean: books of half of the authors wanted; beside them books by the others, and articles. Nothing is damaged.
real_mixed: books wanted; code, command-line help, French novels and articles beside them. Nothing is damaged.
lambada: passages of a benchmark wanted, of which the pool has none: books, code, French novels and articles.
The last four are for a real model, whose tokenizer they are made with (``ensure_real_pool``).
"""

from __future__ import annotations

import gzip
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.damage import Trigrams, misread, two_columns
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import MANIFEST, TOKENIZER

VOCAB_SIZE = 2048
WANTED = "books"
MIXED = {"books": 8_000_000, "code": 7_000_000, "tldr": 3_300_000, "french": 4_000_000, "shuffled": 7_000_000}
"""Characters of each domain, at most."""
HARD = dict.fromkeys(("books", "blocks", "repeated", "replaced"), 5_800_000)
DAMAGED = ("columns", "blocks", "trigrams", "misread", "repeated", "shuffled")
LONGEST = 4_000
REAL_HARD = {"books": 1_500_000} | dict.fromkeys((*DAMAGED, "code", "tldr", "french", "wiki"), 700_000)
"""Characters; of the books a fifth is the proxy and an eighth is held out, which leaves an eighth of the pool."""
REAL_CLEAN = {"books": 1_500_000, "other_books": 8_000_000, "wiki": 2_300_000}
REAL_MIXED = {"books": 1_500_000} | dict.fromkeys(("code", "tldr", "french", "wiki"), 1_400_000)
LAMBADA = dict.fromkeys(("books", "code", "french", "wiki"), 1_400_000)
REAL_PROXY_FRACTION, REAL_VALIDATION_FRACTION = 0.2, 0.12
PASSAGES = "lambada"
MOST = 0.96
"""Of each half of the passages is the proxy, or is judged: a corpus keeps some text of every kind in its pool."""
BLOCK_WORDS = 12
PASSAGE_WORDS = 50
REPLACED = 0.3
NEAR = 0.1
"""A replacement's rank by frequency is within this fraction of the word's own."""
PROXY_FRACTION, VALIDATION_FRACTION = 0.12, 0.06

Text = tuple[str, str]  # id, text


def ensure_pool(name: str, data: Path, folder: Path, console: Any = None) -> list[str]:
    """The settings that train on pool ``name``; its corpora are prepared under ``folder`` if they are not there."""
    corpus = folder / name
    if name == "clean":
        held_out = folder / "clean_held_out"
        # the same fractions keep the same documents out of the pool, so that both can be validated on
        prepare_texts(corpus, lambda: {"books": _by_authors(data)["books"]}, _rule("books"), console=console)
        prepare_texts(
            held_out, lambda: _by_authors(data), _rule("other_books"), tokenizer=corpus / TOKENIZER, console=console
        )
        return [f"data.path={corpus}", "data.target_domains=[other_books]"] + [
            f"data.{split}_path={held_out}" for split in ("proxy", "validation")
        ]
    parts = mixed if name == "mixed" else hard
    prepare_texts(corpus, lambda: parts(data), _rule(WANTED), console=console)
    return [f"data.path={corpus}", f"data.target_domains=[{WANTED}]"]


def ensure_real_pool(name: str, data: Path, folder: Path, model: Path, console: Any = None) -> list[str]:
    """The settings that train a real model on pool ``name``; see ``ensure_pool``. ``model``: folder of the tokenizer.

    What is validated on lies in a corpus of its own, so that nothing else is read for it; the same fractions of the
    same texts hold the same documents out of the pool.
    """
    corpus, beside = folder / name, folder / f"{name}_wanted"
    made: dict[str, Any] = {"tokenizer": model, "console": console}
    if name == "lambada":
        rule = SplitRule(0, REAL_VALIDATION_FRACTION)
        prepare_texts(corpus, lambda: lambada(data), rule, **made)
        halves = {PASSAGES: passages(data)[::2], "judged": passages(data)[1::2]}  # a pool is larger than its proxy
        prepare_texts(folder / f"{name}_proxy", lambda: halves, SplitRule(MOST, 0, (PASSAGES,)), **made)
        prepare_texts(beside, lambda: {PASSAGES: halves["judged"]}, SplitRule(0, MOST), **made)
        wanted = PASSAGES
    else:
        rule, wanted = real_rule(), WANTED
        prepare_texts(corpus, lambda: REAL_POOLS[name](data), rule, **made)
        prepare_texts(beside, lambda: {WANTED: REAL_POOLS[name](data)[WANTED]}, rule, **made)
    found = [f"data.path={corpus}", f"data.validation_path={beside}", f"data.target_domains=[{wanted}]"]
    return [*found, f"data.proxy_path={folder / f'{name}_proxy'}"] if wanted == PASSAGES else found


def real_rule() -> SplitRule:
    """A fifth of the wanted text is the proxy, and an eighth is held out."""
    return SplitRule(REAL_PROXY_FRACTION, REAL_VALIDATION_FRACTION, (WANTED,))


def _rule(wanted: str) -> SplitRule:
    return SplitRule(PROXY_FRACTION, VALIDATION_FRACTION, (wanted,))


def _books(data: Path) -> list[Text]:
    books = list(read_texts(data / "books.jsonl.gz"))
    random.Random(0).shuffle(books)
    return books


def _by_authors(data: Path) -> dict[str, list[Text]]:
    """Books of every other author, and the others."""
    books = _books(data)
    authors = sorted({key.split("/")[0] for key, _ in books})
    others = set(authors[::2])
    return {
        "books": [text for text in books if text[0].split("/")[0] not in others],
        "other_books": [text for text in books if text[0].split("/")[0] in others],
    }


def mixed(data: Path) -> dict[str, list[Text]]:
    """Texts of each domain."""
    rest = iter(_books(data))
    parts = {"books": _take(rest, MIXED["books"])}
    code = iter(list(read_texts(data / "code.jsonl.gz")))
    parts["code"] = _take(code, MIXED["code"])
    parts["tldr"] = _take(read_texts(data / "tldr_pages.jsonl.gz"), MIXED["tldr"])
    parts["french"] = _take(read_texts(data / "french_novels.jsonl.gz"), MIXED["french"])
    half = MIXED["shuffled"] // 2
    parts["shuffled"] = _changed([*_take(rest, half), *_take(code, half)], shuffled_words)
    return parts


def hard(data: Path) -> dict[str, list[Text]]:
    """Texts of each domain."""
    books = _books(data)
    rest = iter(books)
    parts = {domain: _take(rest, limit) for domain, limit in HARD.items()}
    ranked = ranks(text for _, text in books)
    places = {word: place for place, word in enumerate(ranked)}
    parts["blocks"] = _changed(parts["blocks"], shuffled_blocks)
    parts["repeated"] = _changed(parts["repeated"], repeated_passages)
    parts["replaced"] = _changed(parts["replaced"], lambda words, draw: replaced_words(words, draw, ranked, places))
    return parts


def real_hard(data: Path) -> dict[str, list[Text]]:
    """Texts of each domain, none longer than ``LONGEST``, so that there are many."""
    rest = iter(_cut(_books(data)))
    parts = {"books": _take(rest, REAL_HARD["books"])}
    parts["columns"] = [
        (key, two_columns(text, other))
        for (key, text), (_, other) in zip(_take(rest, 350_000), _take(rest, 350_000), strict=False)
    ]
    model = Trigrams(words_of(text) for _, text in _books(data))
    changes: dict[str, Callable[[list[str], random.Random], list[str]]] = {
        "blocks": shuffled_blocks,
        "trigrams": lambda words, draw: model.text(len(words), draw),
        "misread": misread,
        "repeated": repeated_passages,
        "shuffled": shuffled_words,
    }
    for domain, change in changes.items():
        parts[domain] = _changed(_take(rest, REAL_HARD[domain]), change)
    parts["code"] = _take(read_texts(data / "code.jsonl.gz"), REAL_HARD["code"])
    parts["tldr"] = _take(read_texts(data / "tldr_pages.jsonl.gz"), REAL_HARD["tldr"])
    parts["french"] = _take(read_texts(data / "french_novels.jsonl.gz"), REAL_HARD["french"])
    parts["wiki"] = _take(read_texts(data / "wikitext2_test.jsonl.gz"), REAL_HARD["wiki"])
    return parts


def real_clean(data: Path) -> dict[str, list[Text]]:
    """Texts of each domain, cut as those of ``real_hard``: books of half of the authors, of the others, articles."""
    parts = {domain: _cut(texts) for domain, texts in _by_authors(data).items()}
    parts["wiki"] = [*_articles(data, "test"), *_articles(data, "valid")]
    return {domain: _take(iter(parts[domain]), limit) for domain, limit in REAL_CLEAN.items()}


def real_mixed(data: Path) -> dict[str, list[Text]]:
    """Texts of each domain, the books cut as those of ``real_hard``."""
    parts = {"books": _cut(_books(data)), **_others(data)}
    return {domain: _take(iter(parts[domain]), limit) for domain, limit in REAL_MIXED.items()}


def lambada(data: Path) -> dict[str, list[Text]]:
    """Texts of each domain of a pool that has nothing of the benchmark."""
    parts = {"books": _cut(_books(data)), **_others(data)}
    return {domain: _take(iter(parts[domain]), limit) for domain, limit in LAMBADA.items()}


def passages(data: Path) -> list[Text]:
    """Passages of LAMBADA, whose last word is to be foretold."""
    with gzip.open(data / "benchmarks" / "lambada_openai_test.jsonl.gz", "rt", encoding="utf-8") as rows:
        return [(f"{PASSAGES}/{number}", json.loads(row)["text"]) for number, row in enumerate(rows)]


def _others(data: Path) -> dict[str, list[Text]]:
    """Texts of other domains than books."""
    files = {"code": "code", "tldr": "tldr_pages", "french": "french_novels"}
    parts = {domain: list(read_texts(data / f"{file}.jsonl.gz")) for domain, file in files.items()}
    return parts | {"wiki": [*_articles(data, "test"), *_articles(data, "valid")]}


def _articles(data: Path, part: str) -> list[Text]:
    return [(f"{part}/{key}", text) for key, text in read_texts(data / f"wikitext2_{part}.jsonl.gz")]


def _cut(texts: Iterable[Text]) -> list[Text]:
    return [(key, text[:LONGEST]) for key, text in texts]


REAL_POOLS = {"real_hard": real_hard, "real_clean": real_clean, "real_mixed": real_mixed}


# -- changes of a text, given as its words with the white space that follows each -------------------------------------


def shuffled_words(words: list[str], draw: random.Random) -> list[str]:
    """All words, in any order."""
    return draw.sample(words, len(words))


def shuffled_blocks(words: list[str], draw: random.Random) -> list[str]:
    """Blocks of ``BLOCK_WORDS`` words in any order; inside a block the text is as it was."""
    blocks = [words[start : start + BLOCK_WORDS] for start in range(0, len(words), BLOCK_WORDS)]
    draw.shuffle(blocks)
    return [word for block in blocks for word in block]


def repeated_passages(words: list[str], draw: random.Random) -> list[str]:
    """Every other passage of ``PASSAGE_WORDS`` words, two to four times in a row; as long as the text was."""
    found: list[str] = []
    for start in range(0, len(words), PASSAGE_WORDS):
        found += words[start : start + PASSAGE_WORDS] * draw.randint(2, 4)
        if len(found) >= len(words):
            break
    return found[: len(words)]


def replaced_words(words: list[str], draw: random.Random, ranked: list[str], places: dict[str, int]) -> list[str]:
    """``REPLACED`` of the words stand for others about as frequent; ``places``: where each is in ``ranked``."""
    found = []
    for word in words:
        bare = word.rstrip()
        place = places.get(bare)
        if place is not None and draw.random() < REPLACED:
            reach = max(1, int(NEAR * place))
            new = ranked[min(len(ranked) - 1, max(0, place + draw.choice((-1, 1)) * draw.randint(1, reach)))]
            word = new + word[len(bare) :]
        found.append(word)
    return found


def ranks(texts: Iterable[str]) -> list[str]:
    """Words (with their punctuation) from the most frequent on; equal counts by spelling."""
    counts = Counter(word.rstrip() for text in texts for word in words_of(text))
    return sorted(counts, key=lambda word: (-counts[word], word))


def words_of(text: str) -> list[str]:
    """Words with the white space that follows each."""
    return re.findall(r"\S+\s*", text)


def _changed(texts: Sequence[Text], change: Callable[[list[str], random.Random], list[str]]) -> list[Text]:
    return [(key, "".join(change(words_of(text), random.Random(key)))) for key, text in texts]


# -- files -----------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> Iterator[Text]:
    """(id, text) of each row of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as rows:
        for row in rows:
            document = json.loads(row)
            yield document["id"], document["text"]


def _take(texts: Iterator[Text], limit: int) -> list[Text]:
    """Texts until ``limit`` characters are reached."""
    kept, characters = [], 0
    for key, text in texts:
        kept.append((key, text))
        characters += len(text)
        if characters >= limit:
            break
    return kept


def prepare_texts(
    out: Path,
    parts: Callable[[], dict[str, list[Text]]],
    rule: SplitRule,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = VOCAB_SIZE,
    console: Any = None,
) -> None:
    """A corpus of ``parts`` (domain -> texts) under ``out``, if it is not there."""
    if (out / MANIFEST).is_file():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        sources = []
        for domain, texts in parts().items():
            path = Path(place) / f"{domain}.jsonl"
            with path.open("w", encoding="utf-8") as stream:
                for key, text in texts:
                    stream.write(json.dumps({"id": key, "domain": domain, "text": text}, ensure_ascii=False) + "\n")
            sources.append(Source(path, domain))
        prepare(sources, out, vocab_size=vocab_size, tokenizer=tokenizer, rule=rule, console=console)
