"""Score a model on benchmarks and texts; under torchrun on many ranks."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopus.cli._notes import tell
from megaopus.cli._paths import local_path
from megaopus.distributed.launcher import place
from megaopus.errors import DataError
from megaopus.evaluation.config import REMEDY

if TYPE_CHECKING:
    from megaopus.evaluation.model import Found

DESCRIPTION = (
    "Score a run, a checkpoint or a Hugging Face folder on benchmarks, through lm-eval, at any layout: one table as\n"
    "JSON, and a line for every item. The same command goes on after a kill; a task that is done is not done again."
)
EXAMPLES = (
    "  python -m megaopus eval runs/first --suite arc_easy,piqa --data benchmarks\n"
    "  torchrun --nproc-per-node 8 -m megaopus eval Qwen3-8B --suite paper10 --out qwen.json parallel.tp=4"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, what it is asked, and how."""
    add = parser.add_argument
    add("model", type=local_path, metavar="MODEL", help="a run folder, a checkpoint, or a Hugging Face model folder")
    add("overrides", nargs="*", metavar="OVERRIDE", help="settings of parallel and engine, as train has them")
    add("--suite", default="", metavar="NAMES", help="paper10, outside6, names of lm-eval's tasks; with commas")
    texts = "loss by domain on a corpus (its validation split) or a file or folder of text; repeatable"
    add("--perplexity", action="append", type=local_path, default=[], metavar="PATH", help=texts)
    add("--length", type=_positive, metavar="N", help="tokens of a sequence of these (default: as the run has them)")
    add("--protocol", choices=("lm-eval", "opus"), default="lm-eval", help="whose prompts (default %(default)s)")
    add("--data", type=local_path, metavar="FOLDER", help="files TASK_SPLIT.jsonl with the items; else from the hub")
    add("--limit", type=_positive, metavar="N", help="items of a task, at most, from its first (default: all)")
    add("--num-fewshot", type=int, metavar="K", help="examples before each item (default: as each task has it)")
    add("--chat-template", action="store_true", help="write prompts as conversations, by the model's own template")
    add("--seed", type=int, default=1234, metavar="N", help="of the choice of examples (default %(default)s)")
    add("--out", type=local_path, metavar="FILE.json", help="table to write (default: eval.json in the run's folder)")
    against = "table of another model on the same items: what the two differ by, item by item"
    add("--against", type=local_path, metavar="FILE.json", help=against)
    add("--contamination", action="store_true", help="look for the items in the run's pool, proxy and picks")
    add("--overwrite", action="store_true", help="replace a table of another evaluation")


def run(args: argparse.Namespace) -> int:
    """Score, and show the table. Raises before anything is written for what cannot be done."""
    if not (args.suite or args.perplexity):
        raise argparse.ArgumentError(None, "nothing to ask: give --suite, --perplexity or both")
    if find_spec("lm_eval") is None:
        raise DataError(f"needs lm-eval, which is not installed: {REMEDY}")
    from megaopus.evaluation.items import read_evaluation
    from megaopus.evaluation.model import find
    from megaopus.evaluation.run import Request, evaluate_model

    found = find(args.model)
    run_folder = None if found.run is None else found.path.parent.parent
    if args.contamination and run_folder is None:
        raise DataError(f"--contamination: {args.model} is no run of ours, whose data is known; leave it out")
    if args.against is not None:
        read_evaluation(args.against)
    args.out = args.out or _usual_file(found, args.model)
    request = Request(
        suite=args.suite,
        protocol=args.protocol,
        data=args.data,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        chat=args.chat_template,
        seed=args.seed,
        texts=tuple(args.perplexity),
        length=args.length,
        out=args.out,
        overwrite=args.overwrite,
    )
    table = evaluate_model(found, args.overrides, place().world_size, request, speaks=place().rank == 0, tell=tell)
    if place().rank == 0:
        _show(table)
        if args.against is not None:
            _show_differences(args.against, args.out)
        if args.contamination and run_folder is not None:
            _look_for_items(run_folder, args.out)
    return 0


def _show_differences(first: Path, second: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from megaopus.evaluation.differences import RunScores, compare_scores
    from megaopus.evaluation.items import read_evaluation

    base, other = (RunScores(str(file), read_evaluation(file), ()) for file in (first, second))
    found, refused = compare_scores([base], [other])
    shown = Table(title=f"{second} less {first}", title_justify="left")
    for name in ("task", "metric", "difference", "± stderr", "95 % of resamples", ""):
        shown.add_column(name, justify="left" if name in ("task", "metric", "") else "right")
    for each in found:
        error = "" if each.items_stderr is None else f"{each.items_stderr:.4f}"
        interval = "" if each.interval is None else "{:+.4f} to {:+.4f}".format(*each.interval)
        verdict = each.verdict(len(found)).value
        shown.add_row(each.task, each.metric, f"{each.value:+.4f}", error, interval, verdict)
    Console().print(shown)
    for reason in refused:
        print(f"not compared: {reason}")


def _look_for_items(run_folder: Path, table: Path) -> None:
    from rich.console import Console

    from megaopus.evaluation.contamination import find_contamination, write_contamination
    from megaopus.evaluation.items import item_texts
    from megaopus.evaluation.results import item_folder

    found = find_contamination(run_folder, item_texts(item_folder(table)), console=Console(stderr=True))
    write_contamination(run_folder, found)
    for row in found["tasks"]:
        print(f"contamination of {row['task']}: " + ", ".join(f"{key} {row[key]}" for key in row if key != "task"))


def closing(args: argparse.Namespace) -> str:
    """Say where the table lies, and what it can be compared with."""
    if args.out == args.model / "eval.json":
        return f"table in {args.out}, items beside it | next: python -m megaopus report {args.model}"
    return f"table in {args.out}, items beside it | next: eval another model with --against {args.out}"


def _usual_file(found: Found, model: Path) -> Path:
    if found.step is None:
        return Path(f"eval_{model.resolve().name}.json")
    run = found.path.parent.parent
    own = model.resolve() == found.path.resolve()
    return run / (f"eval_{found.path.name}.json" if own else "eval.json")


def _show(table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{table['model']}, protocol {table['protocol']}", title_justify="left")
    for name in ("task", "metric", "value", "± stderr", "items", "bits per byte", "shots"):
        shown.add_column(name, justify="left" if name in ("task", "metric") else "right")
    bits = {row["task"]: row for row in table["rows"] if row["metric"] == "bits_per_byte"}
    for row in table["rows"]:
        if row["headline"] and row["part_of"] is None:
            own = bits.get(row["task"])
            error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
            numbers = (f"{row['value']:.4f}", error, f"{row['n']:,}", f"{own['value']:.3f}" if own else "")
            shown.add_row(row["task"], row["metric"], *numbers, str(row["num_fewshot"]))
    if table["rows"]:
        Console().print(shown)
    _show_texts(table["perplexity"])


def _show_texts(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        own = [row for row in rows if row["corpus"] == corpus]
        shown = Table(title=f"loss on {corpus}", title_justify="left")
        for name in ("domain", "nats per token", "± stderr", "bits per byte", "sequences"):
            shown.add_column(name, justify="left" if name == "domain" else "right")
        for row in own:
            error, bits = ("" if row[key] is None else f"{row[key]:.4f}" for key in ("stderr", "bits_per_byte"))
            shown.add_row(row["domain"], f"{row['nats_per_token']:.4f}", error, bits, f"{row['sequences']:,}")
        if len(own) > 1:
            mean = sum(row["nats_per_token"] for row in own) / len(own)
            shown.add_row("mean over domains", f"{mean:.4f}", "", "", "")
        Console().print(shown)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number
