"""Turn text into a corpus that runs can read."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megaopus.cli._notes import tell
from megaopus.cli._paths import local_name, local_path
from megaopus.cli._tasks import add_executor, executor_of
from megaopus.errors import DataError
from megaopus.plugins import require_plugins

if TYPE_CHECKING:
    from megaopus.corpus_tools.chat import ChatTemplate
    from megaopus.corpus_tools.split_rule import SplitRule

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
    _add_sources(parser)
    parser.add_argument("--out", required=True, type=local_path, metavar="FOLDER", help="corpus folder to make")
    _add_tokenizer(parser)
    _add_splits(parser)
    add = parser.add_argument
    add("--workers", type=int, metavar="N", help="processes that tokenise (default: one a core, for little text none)")
    _add_tasks(parser)
    add("--overwrite", action="store_true", help="replace a corpus that is already in FOLDER")
    add("--plugin", action="append", default=[], metavar="MODULE", help="module that registers sources of your own")
    add("--config-dir", type=local_path, metavar="FOLDER", help="more choices for --data, beside the shipped")


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add who does the work, where it is more than one process's, and which copies are left out."""
    from megaopus.corpus_tools.copies import COPIES

    add = parser.add_argument
    add(
        "--dedup",
        choices=COPIES,
        help="leave out documents whose text an earlier one has: exactly, or with --executor nearly (minhash)",
    )
    add(
        "--file-tokens",
        type=int,
        metavar="N",
        help="tokens of a token file, at most; a corpus of more has several (default: 2^33)",
    )
    add_executor(parser, "read and tokenise by tasks over pieces of the files")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """Add what is read, and how."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--source",
        action="append",
        metavar="[DOMAIN=]PATH",
        help="a table: .jsonl (fields: text, optional id and domain), .csv or .tsv; a .txt or .md file (one document); "
        "each also .gz or .zst (which takes its window in memory, at most 2 GiB); a .parquet file; a folder of such "
        "files, or hf:NAME[:CONFIG[:SPLIT]], a data set of the hub. A file or folder may be s3://BUCKET/PATH, with "
        "'*.parquet' at its end say (extra s3). DOMAIN= names the domain of all its documents; "
        ",text=FIELD ,id=FIELD ,domain=FIELD after PATH name its fields, doc.text one within another; repeat for more "
        "sources",
    )
    what.add_argument(
        "--adopt",
        action="append",
        nargs="+",
        metavar="[DOMAIN=]PATH",
        help="no text: tokens that lie ready, which are read where they lie: PREFIX of Megatron-LM's PREFIX.bin and"
        " .idx, datatrove's NAME.ds, or a .bin of bare uint16 tokens; or copied: a tokenised data set that 'datasets'"
        " saved, or its .parquet or .arrow files; with --tokenizer; several, with a number before each for a blend as"
        " Megatron-LM's: 0.3 PREFIX 0.7 PREFIX",
    )
    what.add_argument(
        "--demo", action="store_true", help="no source: real text found in this Python installation, no download"
    )
    _add_fields(parser)


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """Add which files of a folder are read, and what their fields are."""
    add = parser.add_argument
    add("--data", metavar="NAME", help="fields, and sources if none is given, of configs/data/NAME.yaml (data.prepare)")
    add(
        "--exclude",
        action="append",
        metavar="GLOB",
        help="leave aside what matches it in a folder: the path below the folder, or the name of a file or folder; "
        "repeatable",
    )
    add(
        "--folder-domains",
        action="store_true",
        default=None,
        help="the sub-folders of a source folder name the domains of what lies in them",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        help="at a row or file that cannot be read: stop (default), or skip it and count it by reason",
    )
    add("--text-field", metavar="NAME", help="field that holds the document (default text)")
    add("--id-field", metavar="NAME", help="field of its id (default id)")
    add("--domain-field", metavar="NAME", help="field of its domain (default domain)")
    add(
        "--loss-spans",
        metavar="NAME",
        help="field with the ranges of the text's characters that count in the loss, [[first, last], ...]; all else is "
        "context, which models read and do not learn (default: all counts)",
    )
    add(
        "--messages",
        metavar="NAME",
        help="field with a conversation, [{role, content}, ...], written as a text by --chat-template; what the "
        "--loss-roles say counts in the loss",
    )
    add("--chat-template", type=local_path, metavar="PATH", help="a model folder, or a file with a Jinja template")
    add("--loss-roles", nargs="+", metavar="ROLE", help="whose messages count in the loss (default assistant)")
    add("--keep", action="append", metavar="NAME", help="field to keep in the document table, a score say; repeatable")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add which tokenizer is used, or how one is trained."""
    from megaopus.data.tokenizer import EOD

    add = parser.add_argument
    add(
        "--tokenizer",
        type=local_name,
        metavar="FILE",
        help="Hugging Face tokenizer.json; a folder with one, or with GPT-2's encoder.json and vocab.bpe; or a name on "
        "the hub; default: train byte-level BPE on the pool",
    )
    add(
        "--max-lost",
        type=float,
        metavar="SHARE",
        help="largest share of a domain's text that --tokenizer may lose: characters of a sample, unknown tokens, "
        "documents that become empty (default 0.01)",
    )
    add("--vocab-size", type=int, help="tokens of a trained tokenizer (default 16384; 2048 with --demo)")
    add("--column", metavar="NAME", help="column of an adopted data set that has the tokens (default input_ids)")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--append-eod", action="store_true", help="its rows are documents, which lack the token that ends"
    )
    rows.add_argument("--packed", action="store_true", help="its rows are cut out of a stream of documents")
    add("--eod", type=int, metavar="ID", help="the token that ends --adopt's documents (default: that of --eod-token)")
    add("--eod-token", default=EOD, metavar="TOKEN", help="end-of-document token of --tokenizer (default %(default)s)")


def _add_splits(parser: argparse.ArgumentParser) -> None:
    """Add how the documents are split."""
    from megaopus.corpus_tools.split_rule import SplitRule

    add, rule = parser.add_argument, SplitRule()
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
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens of a sequence of the runs to come: held-out splits of little text get at least one, and long "
        "documents are cut where that needs it; copies among such sequences are told apart beforehand "
        f"(default {rule.seq_len}, or data.seq_len of --data)",
    )


def run(args: argparse.Namespace) -> int:
    """Prepare what the command line asks for, showing progress and a table."""
    console = Console()
    require_plugins(args.plugin)
    if not args.adopt and (args.column or args.append_eod or args.packed):
        raise DataError("--column, --append-eod and --packed are about --adopt: leave them out, or adopt tokens")
    make = _adopt if args.adopt else _prepare_demo if args.demo else _prepare
    out = make(args, console)
    show_corpus(out, console)
    return 0


def _prepare_demo(args: argparse.Namespace, console: Console) -> Path:
    """Prepare text of this Python installation."""
    from megaopus.corpus_tools.demo_corpus import DEMO_RULE, DEMO_VOCAB_SIZE, build_demo_corpus

    if args.executor or args.dedup:
        raise DataError("--demo is prepared in this process, and has no copies; leave --executor and --dedup out")
    if args.tokenizer:
        raise DataError("--demo trains its own tokenizer; leave --tokenizer out")
    rule, vocab_size = split_rule(args, DEMO_RULE), args.vocab_size or DEMO_VOCAB_SIZE
    return build_demo_corpus(
        Path(args.out), vocab_size=vocab_size, rule=rule, overwrite=args.overwrite, console=console
    )


def _adopt(args: argparse.Namespace, console: Console) -> Path:
    """Make a corpus of tokens that lie ready. Raises DataError for what is said of texts."""
    from megaopus.corpus_tools.adopt import adopt
    from megaopus.corpus_tools.split_rule import SplitRule
    from megaopus.corpus_tools.token_rows import APPEND, COLUMN, DOCUMENTS, PACKED
    from megaopus.data.tokenizer import eod_id, load_tokenizer

    if not args.tokenizer:
        raise DataError("--adopt: name the tokenizer that made the tokens, --tokenizer FILE")
    fields = ("text_field", "id_field", "domain_field", "loss_spans", "messages", "keep")
    of_texts = ("data", *fields, "vocab_size", "dedup", "executor")
    if given := [name for name in of_texts if getattr(args, name)]:
        raise DataError(f"--{given[0].replace('_', '-')} is about texts, and --adopt reads tokens: leave it out")
    kind = APPEND if args.append_eod else PACKED if args.packed else DOCUMENTS
    eod = args.eod
    if eod is None:
        eod = eod_id(load_tokenizer(args.tokenizer), args.eod_token, str(args.tokenizer))
    rule = split_rule(args, SplitRule())
    return adopt(
        [place for places in args.adopt for place in places],
        args.out,
        tokenizer=args.tokenizer,
        eod=eod,
        column=args.column or COLUMN,
        kind=kind,
        rule=rule,
        overwrite=args.overwrite,
        console=console,
    )


def _prepare(args: argparse.Namespace, console: Console) -> Path:
    """Prepare the sources; what the command line says comes before what the file of ``--data`` says."""
    from megaopus.config.compose import data_settings
    from megaopus.corpus_tools.prepare import MAX_LOST, prepare
    from megaopus.corpus_tools.sources import Fields, Source
    from megaopus.corpus_tools.split_rule import SplitRule
    from megaopus.corpus_tools.token_writer import FILE_TOKENS
    from megaopus.data.config import DataConfig
    from megaopus.data.store import Store

    data = data_settings(args.data, args.config_dir) if args.data else DataConfig()
    given = data.prepare
    fields = Fields(
        args.text_field or given.text_field,
        args.id_field or given.id_field,
        args.domain_field or given.domain_field,
        tuple(args.keep or given.keep),
        args.loss_spans,
        args.messages,
        _chat_template(args),
    )
    parse = partial(
        Source.parse,
        fields=fields,
        exclude=tuple(args.exclude or given.exclude),
        folder_domains=given.folder_domains if args.folder_domains is None else args.folder_domains,
        skip_faulty=(args.on_error or given.on_error) == "skip",
        store=Store(patience_s=data.store_patience_s),
    )
    return prepare(
        [parse(argument) for argument in args.source or given.sources],
        args.out,
        tokenizer=args.tokenizer or given.tokenizer,
        vocab_size=args.vocab_size or 16384,
        eod_token=args.eod_token,
        rule=split_rule(args, SplitRule(seq_len=data.seq_len)),
        max_lost=MAX_LOST if args.max_lost is None else args.max_lost,
        overwrite=args.overwrite,
        console=console,
        workers=args.workers,
        executor=executor_of(args, args.plugin),
        dedup=args.dedup,
        file_tokens=FILE_TOKENS if args.file_tokens is None else args.file_tokens,
    )


def _chat_template(args: argparse.Namespace) -> ChatTemplate | None:
    """Read the template of --chat-template. Raises DataError where it and --messages are not given together."""
    from megaopus.corpus_tools.chat import ChatTemplate

    if args.messages is None and (args.chat_template or args.loss_roles):
        raise DataError(
            "--chat-template and --loss-roles say how conversations are written: name their field, --messages"
        )
    if args.messages is None:
        return None
    if args.chat_template is None:
        raise DataError("--messages: name the template that writes a conversation as a text, --chat-template PATH")
    if args.loss_spans is not None:
        raise DataError("--loss-spans are of a text, and --messages make one: give one of them")
    return ChatTemplate.load(args.chat_template, args.loss_roles or ("assistant",))


def closing(args: argparse.Namespace) -> str:
    """Say where the corpus lies, and how it is looked at."""
    return f"corpus in {args.out} | next: python -m megaopus check data.path={shlex.quote(str(args.out))}"


def split_rule(args: argparse.Namespace, default: SplitRule) -> SplitRule:
    """Make the split rule of the command line, with ``default`` where it says nothing."""
    from megaopus.corpus_tools.split_rule import SplitRule

    return SplitRule(
        proxy_fraction=default.proxy_fraction if args.proxy_fraction is None else args.proxy_fraction,
        validation_fraction=default.validation_fraction
        if args.validation_fraction is None
        else args.validation_fraction,
        wanted=tuple(args.target_domains) if args.target_domains else default.wanted,
        seed=args.split_seed,
        seq_len=args.seq_len or default.seq_len,
    )


def show_corpus(path: Path, console: Console) -> None:
    """Print what the corpus at ``path`` holds: documents and tokens by domain and split, and its fingerprint."""
    from megaopus.data.corpus import MANIFEST

    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    console.print(_table(manifest))
    for line in _lines(manifest):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    line = f"{path}: {manifest['tokens']:,} tokens, fingerprint {manifest['fingerprint'][:16]}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Say what was taken of each source and what was not, what the tokenizer lost, and what is odd about the splits."""
    from megaopus.corpus_tools.text_loss import TextLoss

    for source in manifest["sources"]:
        files, skipped, left_out = (source.get(key) for key in ("files", "skipped", "left_out"))
        parts = [f"{files:,} file{'s' if files > 1 else ''} read"] if files else []
        if skipped:
            counts = ", ".join(f"{count:,} {why}" for why, count in sorted(skipped.items()))
            parts.append(f"{sum(skipped.values()):,} skipped ({counts})")
        parts.append(f"{source['documents']:,} document{'s' if source['documents'] != 1 else ''}")
        if source.get("copies"):
            parts.append(f"{source['copies']:,} {'copies' if source['copies'] > 1 else 'copy'}")
        if source["empty"]:
            parts.append(f"{source['empty']:,} empty")
        if left_out:
            counts = ", ".join(f"{each['count']:,} {why}" for why, each in sorted(left_out.items()))
            parts.append(f"{sum(each['count'] for each in left_out.values()):,} left out ({counts})")
        yield f"{source['name']}: {', '.join(parts)}"
        yield from (f"  first {why}: {each['first']}" for why, each in sorted((left_out or {}).items()))
    yield from _copies(manifest.get("duplicates"))
    totals = [entry for splits in manifest["counts"].values() for entry in splits.values()]
    if all("loss_tokens" in entry for entry in totals):
        counted = sum(entry["loss_tokens"] for entry in totals)
        yield f"loss mask: {counted:,} of {manifest['tokens']:,} tokens count in the loss, the others are context"
    if "tokenization" in manifest:
        yield f"tokenizer: {TextLoss(**manifest['tokenization']['all']).told()}"
    yield from (f"note: {note}" for note in manifest.get("notes", ()))


def _copies(duplicates: Mapping[str, Any] | None) -> Iterator[str]:
    """Say what was left out as copies, by domain, with examples; nothing where copies were not looked for."""
    if duplicates is None:
        return
    counts = ", ".join(f"{count:,} in {domain}" for domain, count in duplicates["domains"].items())
    told = f"copies ({duplicates['method']}): {duplicates['documents']:,} left out"
    yield f"{told}: {counts}" if counts else told
    for each in duplicates["examples"]:
        first = each["copy_of"]
        yield f"  {each['at']}: id {each['id']!r} is a copy of {first['id']!r} at {first['at']}"


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
