"""Turn text into a corpus that runs can read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megaopus.cli._notes import tell
from megaopus.cli._paths import local_path
from megaopus.errors import DataError
from megaopus.plugins import require_plugins

if TYPE_CHECKING:
    from megaopus.corpus_tools.split import SplitRule

DESCRIPTION = "Make a corpus folder: tokenizer, tokens, a table of documents and a manifest."
EXAMPLES = (
    "  python -m megaopus prepare --source docs=docs.jsonl.gz --source code=sources.jsonl --out corpus\n"
    "  python -m megaopus prepare --data tinystories --out corpus\n"
    "  python -m megaopus prepare --demo --out corpus"
)


class _Wanted(argparse.Action):
    """Takes the old name of --target-domains, and tells the new one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        tell(["--wanted is now --target-domains"])
        namespace.target_domains = [*(namespace.target_domains or []), values]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sources, how they are read and split, and where the corpus goes."""
    from megaopus.corpus_tools.split import SplitRule
    from megaopus.data.tokenizer import EOD

    rule = SplitRule()
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--source",
        action="append",
        metavar="[DOMAIN=]PATH",
        help="a .jsonl file (fields: text, optional id and domain), a .txt or .md file (one document), each also .gz "
        "or .zst, a .parquet file, a folder of such files, or hf:NAME[:CONFIG[:SPLIT]], a data set of the hub; "
        "DOMAIN= names the domain of all its documents; repeat for more sources",
    )
    what.add_argument(
        "--demo", action="store_true", help="no source: real text found in this Python installation, no download"
    )
    add("--data", metavar="NAME", help="fields, and sources if none is given, of configs/data/NAME.yaml (data.prepare)")
    add("--text-field", metavar="NAME", help="field that holds the document (default text)")
    add("--id-field", metavar="NAME", help="field of its id (default id)")
    add("--domain-field", metavar="NAME", help="field of its domain (default domain)")
    add("--keep", action="append", metavar="NAME", help="field to keep in the document table, a score say; repeatable")
    add("--out", required=True, type=local_path, metavar="FOLDER", help="corpus folder to make")
    add(
        "--tokenizer",
        metavar="FILE",
        help="Hugging Face tokenizer.json; a folder with one, or with GPT-2's encoder.json and vocab.bpe; or a name on "
        "the hub; default: train byte-level BPE on the pool",
    )
    add("--vocab-size", type=int, help="tokens of a trained tokenizer (default 16384; 2048 with --demo)")
    add("--eod-token", default=EOD, metavar="TOKEN", help="end-of-document token of --tokenizer (default %(default)s)")
    add(
        "--target-domains",
        action="extend",
        nargs="+",
        metavar="DOMAIN",
        help="only these domains give proxy documents (default: all)",
    )
    add("--wanted", action=_Wanted, dest="target_domains", help=argparse.SUPPRESS)
    add("--proxy-fraction", type=float, help=f"share of the target domains' documents (default {rule.proxy_fraction})")
    add("--validation-fraction", type=float, help=f"share of all documents (default {rule.validation_fraction})")
    add("--split-seed", type=int, default=0, help="another seed splits the documents another way (default %(default)s)")
    add("--workers", type=int, metavar="N", help="processes that tokenise (default: one a core, for little text none)")
    add("--overwrite", action="store_true", help="replace a corpus that is already in FOLDER")
    add("--plugin", action="append", default=[], metavar="MODULE", help="module that registers sources of your own")
    add("--config-dir", type=local_path, metavar="FOLDER", help="more choices for --data, beside the shipped")


def run(args: argparse.Namespace) -> int:
    """Prepare what the command line asks for, showing progress and a table."""
    console = Console()
    require_plugins(args.plugin)
    out = _prepare_demo(args, console) if args.demo else _prepare(args, console)
    show_corpus(out, console)
    return 0


def _prepare_demo(args: argparse.Namespace, console: Console) -> Path:
    """Prepare text of this Python installation."""
    from megaopus.corpus_tools.demo_corpus import DEMO_RULE, DEMO_VOCAB_SIZE, build_demo_corpus

    if args.tokenizer:
        raise DataError("--demo trains its own tokenizer; leave --tokenizer out")
    rule, vocab_size = split_rule(args, DEMO_RULE), args.vocab_size or DEMO_VOCAB_SIZE
    return build_demo_corpus(
        Path(args.out), vocab_size=vocab_size, rule=rule, overwrite=args.overwrite, console=console
    )


def _prepare(args: argparse.Namespace, console: Console) -> Path:
    """Prepare the sources; what the command line says comes before what the file of ``--data`` says."""
    from megaopus.config.compose import data_settings
    from megaopus.corpus_tools.prepare import prepare
    from megaopus.corpus_tools.sources import Fields, Source
    from megaopus.corpus_tools.split import SplitRule
    from megaopus.data.config import PrepareConfig

    given = data_settings(args.data, args.config_dir).prepare if args.data else PrepareConfig()
    fields = Fields(
        args.text_field or given.text_field,
        args.id_field or given.id_field,
        args.domain_field or given.domain_field,
        tuple(args.keep or given.keep),
    )
    return prepare(
        [Source.parse(argument, fields) for argument in args.source or given.sources],
        args.out,
        tokenizer=args.tokenizer or given.tokenizer,
        vocab_size=args.vocab_size or 16384,
        eod_token=args.eod_token,
        rule=split_rule(args, SplitRule()),
        overwrite=args.overwrite,
        console=console,
        workers=args.workers,
    )


def split_rule(args: argparse.Namespace, default: SplitRule) -> SplitRule:
    """Make the split rule of the command line, with ``default`` where it says nothing."""
    from megaopus.corpus_tools.split import SplitRule

    return SplitRule(
        proxy_fraction=default.proxy_fraction if args.proxy_fraction is None else args.proxy_fraction,
        validation_fraction=default.validation_fraction
        if args.validation_fraction is None
        else args.validation_fraction,
        wanted=tuple(args.target_domains) if args.target_domains else default.wanted,
        seed=args.split_seed,
    )


def show_corpus(path: Path, console: Console) -> None:
    """Print what the corpus at ``path`` holds: documents and tokens by domain and split, and its fingerprint."""
    from megaopus.data.corpus import MANIFEST

    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    console.print(_table(manifest))
    line = f"{path}: {manifest['tokens']:,} tokens, fingerprint {manifest['fingerprint'][:16]}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(manifest: Mapping[str, Any]) -> Table:
    """Lay out documents and tokens by domain and split."""
    from megaopus.data.corpus import SPLITS

    table = Table(title="documents / tokens")
    table.add_column("domain")
    for heading in (*SPLITS, "all", "of pool"):
        table.add_column(heading, justify="right")
    counts = manifest["counts"]
    pool = sum(splits["pool"]["tokens"] for splits in counts.values())
    for domain, splits in counts.items():
        table.add_row(escape(domain), *_cells(splits), f"{splits['pool']['tokens'] / pool:.1%}")
    table.add_section()
    sums = {name: _sum([splits[name] for splits in counts.values()]) for name in SPLITS}
    table.add_row("all", *_cells(sums), "100.0%")
    return table


def _cells(splits: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{entry['documents']:,} / {_short(entry['tokens'])}" for entry in [*splits.values(), _sum([*splits.values()])]
    ]


def _sum(entries: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens")}


def _short(count: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)
