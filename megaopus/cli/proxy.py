"""Make the documents nearest to benchmark items a corpus's proxy."""

from __future__ import annotations

import argparse
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megaopus.cli._paths import local_name, local_path
from megaopus.cli._tasks import add_executor, executor_of
from megaopus.errors import DataError
from megaopus.plugins import require_plugins

if TYPE_CHECKING:
    from megaopus.corpus_tools.benchmark_proxy import ProxyCorpus
    from megaopus.data.corpus import Corpus

DESCRIPTION = (
    "Write a corpus anew with another proxy: the documents nearest to benchmark items, which leave its pool. A share\n"
    "of items and documents is held out, and the loss on it is the first number that runs on the corpus tell."
)
EXAMPLES = "  python -m megaopus proxy --corpus corpus --items arc_easy.jsonl --tokens 300000 --out corpus_arc"
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the corpus, the benchmark items, and how documents are found and taken."""
    from megaopus.corpus_tools.benchmark_proxy import USUAL
    from megaopus.corpus_tools.held_out import USUAL_SHARE
    from megaopus.corpus_tools.nearest_documents import HASHED, OVERLAP_WORDS

    add = parser.add_argument
    add("--corpus", required=True, type=local_path, metavar="FOLDER", help="prepared corpus to take documents from")
    add(
        "--items",
        required=True,
        action="append",
        metavar="PATH",
        help="benchmark items, as --source of prepare; repeatable",
    )
    add(
        "--item-fields", default="query,choices", metavar="NAMES", help="fields of an item's text (default %(default)s)"
    )
    add("--tokens", required=True, type=int, metavar="N", help="tokens of the proxy, at most")
    limits = (
        ("min-tokens", "pass over documents with fewer tokens"),
        ("per-item", "documents whose nearest item is the same, at most"),
        ("per-near-duplicate", "documents that share most of their words, at most; the others leave the pool too"),
    )
    for name, what in limits:
        usual = getattr(USUAL, name.replace("-", "_"))
        add(f"--{name}", type=int, default=usual, metavar="N", help=f"{what} (default {usual}; 0: no limit)")
    add(
        "--encoder",
        type=local_name,
        default=HASHED,
        metavar="NAME",
        help="hashed, or a sentence-transformers model (default %(default)s)",
    )
    add(
        "--drop-overlap",
        action="store_true",
        help=f"leave out documents sharing {OVERLAP_WORDS} words in a row with an item",
    )
    add(
        "--held-out",
        type=float,
        default=USUAL_SHARE,
        metavar="SHARE",
        help="share of the items, and of the documents near to the others, to measure by: in neither pool nor proxy"
        " (default %(default)s; 0: none)",
    )
    add("--workers", type=int, metavar="N", help="processes that search (default: one a core; with a model, this one)")
    add_executor(parser, "search by tasks over chunks of the documents")
    add(
        "--out",
        required=True,
        type=local_path,
        metavar="FOLDER",
        help="corpus folder to make; it shares the token file where it can",
    )
    add("--overwrite", action="store_true", help="replace a corpus that is already in FOLDER")
    add("--plugin", action="append", default=[], metavar="MODULE", help="module that registers sources of your own")


def run(args: argparse.Namespace) -> int:
    """Write the corpus with its new proxy, and show what that is made of."""
    from megaopus.corpus_tools.benchmark_proxy import Limits, build, read_items
    from megaopus.corpus_tools.sources import Source
    from megaopus.corpus_tools.tasks.hands import task_hands
    from megaopus.data.corpus import Corpus

    require_plugins(args.plugin)
    fields = [name.strip() for name in args.item_fields.split(",") if name.strip()]
    items = read_items([Source.parse(argument) for argument in args.items], fields)
    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers {args.workers}: must be at least 1; leave it out for one a core")
    if args.tokens < 1:
        raise DataError(f"--tokens {args.tokens}: must be at least 1")
    limits = {name: getattr(args, name) for name in ("min_tokens", "per_item", "per_near_duplicate")}
    for name, limit in limits.items():
        if limit < 0:
            raise DataError(f"--{name.replace('_', '-')} {limit}: must not be negative; 0 is no limit")
    if executor := executor_of(args, args.plugin):
        executor.check(args.out)
    corpus, console = Corpus.open(args.corpus), Console()
    with task_hands(executor) if executor else nullcontext() as hands:
        made = build(
            corpus,
            items,
            Path(args.out),
            tokens=args.tokens,
            limits=Limits(**limits),
            encoder=args.encoder,
            drop_overlap=args.drop_overlap,
            held_out=args.held_out,
            overwrite=args.overwrite,
            workers=args.workers,
            console=console,
            hands=hands,
        )
    show(corpus, made, console)
    return 0


def closing(args: argparse.Namespace) -> str:
    """Say where the corpus with the new proxy lies, and what uses it."""
    folder = shlex.quote(str(args.out))
    return f"corpus in {args.out} | next: python -m megaopus train data.path={folder} selection=opus"


def show(corpus: Corpus, made: ProxyCorpus, console: Console) -> None:
    """Print what was taken and passed over, shares of the domains, the nearest documents with their items, overlaps."""
    from megaopus.corpus_tools.nearest_documents import OVERLAP_WORDS

    found, chosen, summary = made.found, made.chosen, made.summary
    taken = Table(title="the proxy", show_header=False)
    for name, what in _taken(corpus, made).items():
        taken.add_row(name, what)
    console.print(taken)
    table = Table(title="shares of tokens")
    for name in ("domain", "proxy", "pool left"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain in corpus.domains:
        shares = (summary["proxy_share"][domain], summary["pool_share"][domain])
        table.add_row(escape(domain), *(f"{share:.1%}" for share in shares))
    console.print(table)
    nearest = Table(title=f"the {min(_SHOWN, len(chosen))} nearest documents", show_lines=True)
    for name in ("similarity", "domain", "document", "item"):
        nearest.add_column(name)
    for place in chosen[:_SHOWN]:
        document = found.documents[place]
        text = corpus.texts([document], 80)[0]
        cells = (
            corpus.domains[corpus.domain_codes[document]],
            _short(text),
            _short(made.items[found.item[place]].text),
        )
        nearest.add_row(f"{found.similarity[place]:.3f}", *map(escape, cells))
    console.print(nearest)
    overlaps = ", ".join(f"{name} {count:,}" for name, count in summary["overlapping_documents"].items())
    console.print(
        f"documents that share {OVERLAP_WORDS} words in a row with an item: {overlaps};"
        f" items met: {summary['overlapping_items']:,} of {summary['items']:,}",
        highlight=False,
    )


def _taken(corpus: Corpus, made: ProxyCorpus) -> dict[str, str]:
    """Name -> in words: how much was taken, for which items, and what limits kept out."""
    found, chosen, summary = made.found, made.chosen, made.summary
    limits, passed_over = summary["limits"], summary["passed_over"]
    tokens = int(corpus.lengths[found.documents[chosen]].sum())
    rows = {
        "documents": f"{summary['documents']:,}",
        "tokens": f"{tokens:,} of {summary['tokens']:,}",
        "similarity to an item": f"{found.similarity[chosen[0]]:.3f} to {found.similarity[chosen[-1]]:.3f}",
        "items that are nearest to one": f"{summary['items_with_documents']:,} of {len(made.items):,},"
        f" {summary['most_documents_of_an_item']:,} documents at most",
        "held out to measure by": _held_out(made.summary),
    }
    why = {
        "min_tokens": f"under {limits['min_tokens']} tokens (--min-tokens)",
        "per_item": f"beyond {limits['per_item']} of an item (--per-item)",
        "per_near_duplicate": "near-duplicates (--per-near-duplicate)",
    }
    rows |= {f"passed over: {why[name]}": f"{count:,}" for name, count in passed_over.items() if limits[name]}
    return rows


def _held_out(summary: dict[str, Any]) -> str:
    """Tell how much was held out, and what to do where it is nothing though something was asked for."""
    items, documents = summary["items_held_out"], summary["documents_held_out"]
    told = f"{items:,} of {summary['items']:,} items, {documents:,} documents"
    lacking = [name for name, count in (("item", items), ("document", documents)) if not count]
    if lacking and summary["held_out"]:
        told += f" (no {' and no '.join(lacking)} fell into it; a larger --held-out takes some)"
    return told


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
