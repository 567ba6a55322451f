"""Give every document of a corpus a score to filter by."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megaopus.cli._paths import local_name, local_path
from megaopus.cli._tasks import add_executor, executor_of
from megaopus.distributed.launcher import place
from megaopus.errors import DataError
from megaopus.plugins import require_plugins

if TYPE_CHECKING:
    from megaopus.data.corpus import Corpus
    from megaopus.score.base import Method

DESCRIPTION = (
    "Write one score for each document of a corpus into a column beside it; data.filter keeps documents by it."
)
EXAMPLES = (
    "  python -m megaopus score --corpus corpus --method dsir\n"
    "  python -m megaopus score --corpus corpus --method utility --checkpoint runs/first --name useful\n"
    "  torchrun --nproc-per-node 8 -m megaopus score --corpus c --method utility --checkpoint Qwen3-8B parallel.tp=4\n"
    "  python -m megaopus score --corpus corpus --method classifier --model HuggingFaceFW/fineweb-edu-classifier"
)
METHODS = ("dsir", "perplexity", "fasttext", "classifier", "utility")
WINDOWS = ("first", "mean")
_OPTIONS = {
    "target": ("dsir",),
    "checkpoint": ("perplexity", "utility"),
    "model": ("perplexity", "fasttext", "classifier"),
    "label": ("fasttext", "classifier"),
    "logit": ("classifier",),
    "positive": ("fasttext",),
    "negative": ("fasttext",),
    "windows": ("perplexity", "classifier", "utility"),
    "max_tokens": ("perplexity", "classifier", "utility"),
    "proxy_sequences": ("utility",),
    "warm_steps": ("utility",),
    "estimator": ("utility",),
    "contrast": ("utility",),
    "device": ("perplexity", "classifier", "utility"),
    "overrides": ("perplexity", "utility"),
}
"""Option -> the methods that it says something to."""
_QUANTILES = (0, 10, 50, 90, 100)
_SHOWN = 3
_SHOWN_TOKENS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the corpus, the method, and the options of each; those of one method say so."""
    add = parser.add_argument
    add(
        "--corpus",
        required=True,
        type=local_path,
        metavar="FOLDER",
        help="prepared corpus whose documents are scored; it stays as it is",
    )
    add("--method", required=True, choices=METHODS, help="see docs/data.md")
    add("--name", metavar="COLUMN", help="of the column (default: the method); it lies in FOLDER.scores/COLUMN")
    add("--overwrite", action="store_true", help="replace a column of that name")
    add(
        "--target",
        metavar="PATH",
        help="dsir (DSIR-like): documents to be like, as --source of prepare (default: the split proxy)",
    )
    add(
        "--checkpoint",
        type=local_path,
        metavar="FOLDER",
        help="perplexity, utility: a run, one of its checkpoints, or a Hugging Face model folder; on as many ranks as"
        " torchrun starts",
    )
    add(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="with --checkpoint: settings of parallel and engine, as train has them; for the utility under a Hugging"
        " Face folder of optim too",
    )
    add(
        "--model",
        type=local_name,
        metavar="NAME",
        help="perplexity: a causal language model; classifier: a sequence classifier, both of the Hugging Face hub or a"
        " folder; fasttext: a .bin file (default: one is trained)",
    )
    add("--label", help="fasttext, classifier: whose probability is the score, where there are several")
    add("--logit", action="store_true", default=None, help="classifier: the label's raw number, not its probability")
    add("--positive", action="append", metavar="PATH", help="fasttext: documents to be like (default: the split proxy)")
    add("--negative", action="append", metavar="PATH", help="fasttext: documents to be unlike (default: of the pool)")
    _add_model_arguments(parser)
    add_executor(parser, "score by tasks over chunks of the documents, without --checkpoint")
    add("--workers", type=int, metavar="N", help="tasks of --executor that run at a time (default: one a core)")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a model reads, and how its optimizer's step is known."""
    add = parser.add_argument
    add(
        "--windows",
        choices=WINDOWS,
        help="documents longer than the model takes: the mean over all windows, by tokens, or the first alone (default:"
        " mean; classifier: first)",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of a window of --model (default: as many as it takes), or of a Hugging Face folder as --checkpoint"
        " (default: 1024, or as many as it takes)",
    )
    add("--proxy-sequences", type=int, metavar="N", help="utility: of the split proxy (default 64)")
    add(
        "--warm-steps",
        type=int,
        metavar="N",
        help="utility of a Hugging Face folder, which has no optimizer's state: gradients of the pool that make one"
        " (default 16)",
    )
    add("--estimator", choices=("directional", "exact"), help="utility: exact is in float64, for small models")
    add("--contrast", action="store_true", default=None, help="utility: of the proxy's gradient less the pool's")
    add("--plugin", action="append", default=[], metavar="MODULE", help="module that registers what --checkpoint needs")
    add("--device", choices=("auto", "cpu", "cuda"), help="where a model runs (default auto)")


def method_of(corpus: Corpus, args: argparse.Namespace) -> Method:
    """Make the method that the command line asks for; raises DataError for options that do not go together."""
    from megaopus.corpus_tools.sources import Source

    given = {name for name in _OPTIONS if getattr(args, name) not in (None, [])}
    for name in sorted(given):
        if args.method not in _OPTIONS[name]:
            option = args.overrides[0] if name == "overrides" else f"--{name.replace('_', '-')}"
            methods = " and ".join(_OPTIONS[name])
            raise DataError(f"{option}: says nothing to --method {args.method}; it is for {methods}")
    run: dict[str, Any] = {name: getattr(args, name) for name in ("windows", "device") if name in given}
    if args.checkpoint is not None:
        return _under_checkpoint(corpus, args, given, run)
    if place().world_size > 1:
        raise DataError(f"--method {args.method}: without --checkpoint it is one process's work: leave torchrun out")
    if args.overrides:
        raise DataError(f"{args.overrides[0]}: says nothing without --checkpoint; leave it out")
    if args.method == "dsir":
        from megaopus.score.ngrams import Dsir

        return Dsir(corpus, Source.parse(args.target) if args.target else None)
    if args.method == "fasttext":
        from megaopus.score.quality import FastText

        sides = [tuple(Source.parse(path) for path in paths or ()) for paths in (args.positive, args.negative)]
        if args.model and any(sides):
            raise DataError(
                "--model: is a trained classifier; leave --positive and --negative out, or train one without it"
            )
        return FastText(corpus, Path(args.model) if args.model else None, args.label, *sides)
    if args.method == "classifier":
        from megaopus.score.hub import Classifier

        if not args.model:
            raise DataError("--method classifier: needs --model, for example HuggingFaceFW/fineweb-edu-classifier")
        return Classifier(
            corpus, args.model, max_tokens=args.max_tokens, label=args.label, logit=bool(args.logit), **run
        )
    if args.method == "utility":
        raise DataError(
            "--method utility: needs --checkpoint, a run whose model and optimizer say what a document is worth, or a"
            " Hugging Face model folder"
        )
    if not args.model:
        raise DataError(
            "--method perplexity: needs --checkpoint (a run of ours, a Hugging Face folder) or --model (of the hub)"
        )
    from megaopus.score.hub import HubPerplexity

    return HubPerplexity(corpus, args.model, max_tokens=args.max_tokens, **run)


def _under_checkpoint(corpus: Corpus, args: argparse.Namespace, given: set[str], run: dict[str, Any]) -> Method:
    """Make a method that needs a model of ours or of a folder; ``run``: options of the others too."""
    from megaopus.score.checkpoint import CheckpointPerplexity, Utility

    run |= {"max_tokens": args.max_tokens, "overrides": args.overrides}
    if args.method == "perplexity":
        if args.model:
            raise DataError("--method perplexity: takes --checkpoint or --model; leave one out")
        return CheckpointPerplexity(corpus, args.checkpoint, **run)
    names = ("proxy_sequences", "estimator", "contrast", "warm_steps")
    more = {name: getattr(args, name) for name in names if name in given}
    if more.get("proxy_sequences", 1) < 1:
        raise DataError(f"--proxy-sequences {args.proxy_sequences}: must be at least 1")
    return Utility(corpus, args.checkpoint, **run, **more)


def run(args: argparse.Namespace) -> int:
    """Score the documents, and show quantiles and extremes."""
    from megaopus.corpus_tools.tasks.hands import task_hands
    from megaopus.data.corpus import Corpus
    from megaopus.data.scores import column_folder
    from megaopus.score.base import make_column

    require_plugins(args.plugin)
    corpus, name = Corpus.open(args.corpus), args.name or args.method
    console = Console(quiet=place().rank > 0)
    executor = executor_of(args, args.plugin)
    if executor is not None and args.checkpoint is not None:
        raise DataError("--executor: a model under --checkpoint is laid out on ranks: start it by torchrun instead")
    if executor is None and args.workers is not None:
        raise DataError("--workers are of an executor: add --executor local, slurm or ray")
    method = method_of(corpus, args)
    plain = {key: value for key, value in method.about.items() if not isinstance(value, dict)}
    settings = ", ".join(f"{key} {value}" for key, value in plain.items())
    console.print(f"{len(corpus):,} documents: {settings}; {method.best} is best", highlight=False, markup=False)
    if executor is not None:
        executor.check(column_folder(corpus.path, name))
    with nullcontext() if executor is None else task_hands(executor) as hands:
        out = make_column(
            corpus,
            name,
            method,
            overwrite=args.overwrite,
            console=console,
            hands=hands,
            again=partial(method_of, args=args),
        )
    if place().rank == 0:
        show(corpus, name, console)
        console.print(str(out), highlight=False, markup=False, soft_wrap=True)
    return 0


def closing(args: argparse.Namespace) -> str:
    """Say which column was made, and what trains on the best of it."""
    name = args.name or args.method
    keep = f"data.path={args.corpus} data.filter.column={name} data.filter.keep=0.3"
    return f"column {name} beside {args.corpus} | next, on the best of them: python -m megaopus train {keep}"


def show(corpus: Corpus, name: str, console: Console) -> None:
    """Print quantiles of a column, overall and by domain, and its best and worst documents of all splits."""
    import numpy as np

    from megaopus.data.scores import LOWEST, load_column

    column = load_column(corpus, name)
    table = Table(title=f"quantiles of {escape(name)}", box=SIMPLE)
    for heading in ("domain", "documents", *(f"{q} %" for q in _QUANTILES), "no score"):
        table.add_column(heading, justify="left" if heading == "domain" else "right", no_wrap=heading != "domain")
    groups = {domain: corpus.domain_codes == code for code, domain in enumerate(corpus.domains)}
    for domain, here in {"all": np.ones(len(corpus), dtype=bool), **groups}.items():
        values = column.values[here].astype(np.float64)
        known = values[np.isfinite(values)]
        cells = (
            [f"{value:.3g}" for value in np.percentile(known, _QUANTILES)] if len(known) else ["-"] * len(_QUANTILES)
        )
        table.add_row(escape(domain), f"{len(values):,}", *cells, str(len(values) - len(known)))
    console.print(table)
    known = np.flatnonzero(np.isfinite(column.values))
    order = known[np.argsort(column.values[known], kind="stable")]
    order = order if column.best == LOWEST else order[::-1]
    extremes = Table(title=f"best and worst documents by {escape(name)}", box=SIMPLE)
    for heading in ("", "score", "domain", "document", "begins"):
        extremes.add_column(heading, overflow="fold", no_wrap=heading in ("", "score"))
    for title, chosen in (("best", order[:_SHOWN]), ("worst", order[_SHOWN:][-_SHOWN:][::-1])):
        for document, text in zip(chosen, corpus.texts(chosen, _SHOWN_TOKENS), strict=True):
            line = " ".join(text.split())[:100]
            said = (corpus.domains[corpus.domain_codes[document]], corpus.ids[document], line)
            extremes.add_row(title, f"{column.values[document]:.3g}", *map(escape, said))
        extremes.add_section()
    console.print(extremes)
