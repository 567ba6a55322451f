"""Make the documents nearest to benchmark items a corpus's proxy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megaopus.cli._paths import local_path
from megaopus.errors import DataError
from megaopus.plugins import require_plugins

if TYPE_CHECKING:
    from megaopus.corpus_tools.benchmark_proxy import ProxyCorpus
    from megaopus.corpus_tools.nearest_documents import Item
    from megaopus.data.corpus import Corpus

DESCRIPTION = "Write a corpus anew with another proxy: the documents nearest to benchmark items, which leave its pool."
EXAMPLES = "  python -m megaopus proxy --corpus corpus --items arc_easy.jsonl --tokens 300000 --out corpus_arc"
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the corpus, the benchmark items, and how documents are found and taken."""
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
    add(
        "--encoder",
        default=HASHED,
        metavar="NAME",
        help="hashed, or a sentence-transformers model (default %(default)s)",
    )
    add(
        "--drop-overlap",
        action="store_true",
        help=f"leave out documents sharing {OVERLAP_WORDS} words in a row with an item",
    )
    add("--workers", type=int, metavar="N", help="processes that search (default: one a core; with a model, this one)")
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
    from megaopus.corpus_tools.benchmark_proxy import build, read_items
    from megaopus.corpus_tools.sources import Source
    from megaopus.data.corpus import Corpus

    require_plugins(args.plugin)
    fields = [name.strip() for name in args.item_fields.split(",") if name.strip()]
    items = read_items([Source.parse(argument) for argument in args.items], fields)
    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers {args.workers}: must be at least 1; leave it out for one a core")
    if args.tokens < 1:
        raise DataError(f"--tokens {args.tokens}: must be at least 1")
    corpus, console = Corpus.open(args.corpus), Console()
    made = build(
        corpus,
        items,
        Path(args.out),
        tokens=args.tokens,
        encoder=args.encoder,
        drop_overlap=args.drop_overlap,
        overwrite=args.overwrite,
        workers=args.workers,
        console=console,
    )
    show(corpus, items, made, console)
    return 0


def show(corpus: Corpus, items: Sequence[Item], made: ProxyCorpus, console: Console) -> None:
    """Print shares of the domains, the nearest documents with their items, overlaps."""
    from megaopus.corpus_tools.nearest_documents import OVERLAP_WORDS

    found, chosen, summary = made.found, made.chosen, made.summary
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
        cells = (corpus.domains[corpus.domain_codes[document]], _short(text), _short(items[found.item[place]].text))
        nearest.add_row(f"{found.similarity[place]:.3f}", *map(escape, cells))
    console.print(nearest)
    overlaps = ", ".join(f"{name} {count:,}" for name, count in summary["overlapping_documents"].items())
    console.print(
        f"documents that share {OVERLAP_WORDS} words in a row with an item: {overlaps};"
        f" items met: {summary['overlapping_items']:,} of {len(items):,}",
        highlight=False,
    )


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
