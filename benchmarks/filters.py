"""Compares how well static scores tell clean text from contaminated text.

Passages of books (of the demo's documentation without --data) are held out; a part of them is contaminated: their words
in any order; blocks of 12 words in any order; a passage of 50 words over and over; and beside them passages of foreign
text (French novels; the demo: code) and of boilerplate (command-line help pages; the demo: read-mes and licences). A
small GPT is trained on other books. Then the verb score's methods score the passages: perplexity and utility under that
checkpoint, dsir and fasttext with the proxy (other clean passages) against the pool, in which a sixth is clean.

Rows {method, contamination, auc, auc_std, seeds, aucs}. auc: the chance that a clean passage is scored better than a
contaminated one, better as data.filter takes it (perplexity: lower); 0.5 is a coin, below it the score prefers the
contamination. Mean and standard deviation over seeds (aucs: each), with their own passages, weights and order.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, parser, start, write_results
from benchmarks.pools import PASSAGE_WORDS, prepare_texts, read_texts, shuffled_blocks, shuffled_words, words_of
from megaopus import build
from megaopus.config.compose import compose
from megaopus.corpus_tools.demo_corpus import DEMO_LIMITS, build_demo_sources
from megaopus.corpus_tools.sources import SourceReader
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import SPLITS, TOKENIZER, Corpus
from megaopus.data.scores import LOWEST, load_column
from megaopus.score.base import Method, make_column
from megaopus.score.checkpoint import CheckpointPerplexity, Utility
from megaopus.score.ngrams import Dsir
from megaopus.score.quality import FastText

CLEAN = "clean"
CONTAMINATIONS = ("words", "blocks", "repeated", "foreign", "boilerplate")
METHODS = ("utility", "utility_contrast", "perplexity", "dsir", "fasttext")
PASSAGE_CHARACTERS = 1500
PROXY_SHARE = 0.5  # of the clean passages
TRAIN = (
    "model=tiny",
    "engine=cpu",
    "data.seq_len=256",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.eval_every=0",
    "optim=adamw",
    "optim.lr=2e-3",
    "optim.schedule=cosine",
    "optim.warmup_steps=20",
    "selection=uniform",
    "logging.every=100",
)


@dataclass(frozen=True)
class Plan:
    """Says how much of everything."""

    steps: int
    train_characters: int
    passages: int
    """Of each contamination, and clean ones in the pool."""
    seeds: tuple[int, ...]


FULL = Plan(300, 2_500_000, 150, (1, 2, 3))
QUICK = Plan(60, 600_000, 40, (1,))


# -- text --------------------------------------------------------------------------------------------------------------


def texts_of(data: Path | None) -> dict[str, list[str]]:
    """Documents that are clean, foreign and boilerplate."""
    if data is not None:
        names = {CLEAN: "books", "foreign": "french_novels", "boilerplate": "tldr_pages"}
        return {kind: [text for _, text in read_texts(data / f"{name}.jsonl.gz")] for kind, name in names.items()}
    names = {"docs": CLEAN, "code": "foreign", "readmes": "boilerplate"}
    found: dict[str, list[str]] = {kind: [] for kind in names.values()}
    with tempfile.TemporaryDirectory() as folder:
        for source in build_demo_sources(Path(folder), DEMO_LIMITS):
            for document in SourceReader(source):
                if document.domain in names:
                    found[names[document.domain]].append(document.text)
    return found


def passages(texts: Sequence[str]) -> Iterator[str]:
    """Stretches of whole words of about PASSAGE_CHARACTERS, as they follow each other; none is shorter."""
    kept: list[str] = []
    size = 0
    for text in texts:
        for word in words_of(text):
            kept.append(word)
            size += len(word)
            if size >= PASSAGE_CHARACTERS:
                yield "".join(kept)
                kept, size = [], 0
        if kept:
            kept.append("\n")


def shuffled(texts: Iterator[str], draw: random.Random) -> list[str]:
    """In any order."""
    found = list(texts)
    draw.shuffle(found)
    return found


def contaminated(kind: str, passage: str, draw: random.Random) -> str:
    """A clean passage changed."""
    words = words_of(passage)
    if kind == "words":
        return "".join(shuffled_words(words, draw))
    if kind == "blocks":
        return "".join(shuffled_blocks(words, draw))
    first = draw.randrange(max(1, len(words) - PASSAGE_WORDS))
    return ("".join(words[first : first + PASSAGE_WORDS]) * len(words))[: len(passage)]


def evaluated(
    texts: Mapping[str, Sequence[str]], held_out: Sequence[str], count: int, draw: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """Domain -> ``count`` passages of it; of clean ones as many more as become the proxy."""
    books = iter(shuffled(passages(held_out), draw))  # clean or not must not say which book
    domains = {CLEAN: [next(books) for _ in range(round(count / (1 - PROXY_SHARE)))]}
    for kind in CONTAMINATIONS:
        if kind in texts:
            domains[kind] = shuffled(passages(texts[kind]), draw)[:count]
        else:
            domains[kind] = [contaminated(kind, next(books), draw) for _ in range(count)]
    return {name: [(f"{name}{n}", text) for n, text in enumerate(found)] for name, found in domains.items()}


# -- one seed ----------------------------------------------------------------------------------------------------------


def measure(
    plan: Plan, seed: int, texts: Mapping[str, Sequence[str]], place: Path, console: Console
) -> dict[tuple[str, str], float]:
    """(method, contamination) -> area under the curve."""
    draw = random.Random(seed)
    books = draw.sample(list(texts[CLEAN]), len(texts[CLEAN]))
    taken, characters = 0, 0
    while characters < plan.train_characters:
        characters += len(books[taken])
        taken += 1
    trained_on = {"books": [(f"book{n}", text) for n, text in enumerate(books[:taken])]}
    prepare_texts(place / "train", lambda: trained_on, SplitRule(0, 0.1), vocab_size=2048)
    rule = SplitRule(PROXY_SHARE, 0, (CLEAN,), seed)
    domains = evaluated(texts, books[taken:], plan.passages, draw)
    prepare_texts(place / "eval", lambda: domains, rule, tokenizer=place / "train" / TOKENIZER)
    run_dir = place / "run"
    build.train(
        compose(
            [*TRAIN, f"data.path={place / 'train'}", f"train.steps={plan.steps}", f"seed={seed}", f"run_dir={run_dir}"]
        )
    )
    corpus = Corpus.open(place / "eval")
    found: dict[tuple[str, str], float] = {}
    for name in METHODS:
        made = make_column(corpus, name, method(name, corpus, run_dir), overwrite=True, console=console)
        column = load_column(corpus, made.name)
        values = -column.values if column.best == LOWEST else column.values
        pool = corpus.split_codes == SPLITS.index("pool")
        groups = {kind: values[pool & (corpus.domain_codes == code)] for code, kind in enumerate(corpus.domains)}
        found |= {(name, kind): area(groups[CLEAN], groups[kind]) for kind in CONTAMINATIONS}
    return found


def method(name: str, corpus: Corpus, run_dir: Path) -> Method:
    """As the verb score would make it, without options."""
    if name.startswith("utility"):
        return Utility(corpus, run_dir, device="cpu", contrast=name == "utility_contrast")
    if name == "perplexity":
        return CheckpointPerplexity(corpus, run_dir, device="cpu")
    return Dsir(corpus, None) if name == "dsir" else FastText(corpus)


def area(better: np.ndarray, worse: np.ndarray) -> float:
    """Chance that one of ``better`` is above one of ``worse``, half of the ties counted."""
    above = (better[:, None] > worse[None]).mean()
    return float(above + (better[:, None] == worse[None]).mean() / 2)


# -- command line ------------------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Methods by contaminations."""
    table = Table(title="ROC-AUC, clean against contaminated (0.5: a coin)", box=SIMPLE, padding=0)
    table.add_column("method")
    for kind in CONTAMINATIONS:
        table.add_column(kind, justify="right", no_wrap=True)
    for name in METHODS:
        mine = {row["contamination"]: row for row in rows if row["method"] == name}
        table.add_row(name, *(f"{mine[kind]['auc']:.3f} ± {mine[kind]['auc_std']:.3f}" for kind in CONTAMINATIONS))
    console.print(table)


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--data", type=Path, metavar="FOLDER", help="with books.jsonl.gz and the rest (default: demo)")
    command.add_argument("--folder", type=Path, help="corpora and run folders (default: a temporary one)")
    args = command.parse_args(arguments)
    console = Console()
    start(args, console)
    plan = plan or (QUICK if args.quick else FULL)
    texts = texts_of(args.data)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in plan.seeds:
            place = (args.folder or Path(temporary)) / f"{seed}"
            found.append(measure(plan, seed, texts, place, console))
    rows = []
    for name in METHODS:
        for kind in CONTAMINATIONS:
            values = [each[name, kind] for each in found]
            std = statistics.stdev(values) if len(values) > 1 else 0.0
            row = {"method": name, "contamination": kind, "auc": statistics.fmean(values), "auc_std": std}
            rows.append({**row, "seeds": len(values), "aucs": values})
    print_rows(rows, console)
    if args.json:
        write_results(args.json, rows, {**machine(args), "plan": asdict(plan), "data": args.data is not None})
        console.print(f"rows: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
