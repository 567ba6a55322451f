"""Holds evaluation to lm-eval's own Hugging Face model on real benchmarks, and its speed to the trainer's validation.

Needs a model folder (``real_model.py make``) and a folder of items, see docs/evaluation.md.

    python benchmarks/evaluation.py outside --model smollm2 --data benchmarks_data --limit 500 --results rows.jsonl
    python benchmarks/evaluation.py speed --model smollm2 --data benchmarks_data
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from megaopus.engine.gpt_forward import plain_tokens
from megaopus.engine.token_logprobs import Asked
from megaopus.evaluation.harness_model import HarnessModel
from megaopus.evaluation.likelihood import Likelihood
from megaopus.evaluation.local_data import LocalData
from megaopus.evaluation.model import find, opened
from megaopus.evaluation.perplexity import Rows
from megaopus.evaluation.run import harness_model
from megaopus.evaluation.scored import BITS, Scored, headline, score
from megaopus.evaluation.task_list import LM_EVAL, task_names
from megaopus.evaluation.tasks import Part, Wanted, load_parts

SUITE = "arc_easy,arc_challenge,piqa,hellaswag,openbookqa,commonsense_qa,lambada"
PUBLISHED = {"hellaswag": ("acc_norm", 0.430), "piqa": ("acc_norm", 0.669), "arc_easy": ("acc", 0.541)}
PUBLISHED |= {"arc_challenge": ("acc_norm", 0.277)}
"""Task -> metric and figure that a third party's model card tells for a close relative of the model, by lm-eval and
without examples; the weights here are read back from four bits."""
REPEATS, PASSES = 7, 8


def parts_of(args: argparse.Namespace) -> list[Part]:
    return load_parts(task_names(args.suite), Wanted(data=LocalData(args.data)))[0]


def outside(args: argparse.Namespace, console: Console) -> None:
    """Score each task by our model and by lm-eval's, on the same items; a row a task, written as it comes."""
    from lm_eval.models.huggingface import HFLM

    theirs: Any = HFLM(pretrained=str(args.model), device="cpu", dtype="float32", batch_size=8)
    found = find(args.model)
    with opened(found, [], 1) as (engine, mesh):
        for part in parts_of(args):
            ours = harness_model(engine, mesh, found.words, found.max_length, LM_EVAL)
            scored, seconds = {}, {}
            for name, model in {"ours": ours, "lm_eval": theirs}.items():
                began = time.perf_counter()
                scored[name] = score(part, model, limit=args.limit, chat=False, seed=1234)
                seconds[name] = time.perf_counter() - began
            row = compared(part, scored["ours"], scored["lm_eval"]) | {"limit": args.limit, "seconds": seconds}
            console.print_json(data=row)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def compared(part: Part, ours: Scored, theirs: Scored) -> dict[str, Any]:
    """Values of every metric by both, and by how much the right answers' log-likelihoods differ."""
    values = {each.metric: {"ours": each.value, "stderr": each.stderr, "n": each.n} for each in ours.scores}
    for each in theirs.scores:
        values[each.metric]["lm_eval"] = each.value
    pairs = list(zip(ours.items, theirs.items, strict=True))
    apart = [abs(a[BITS] - b[BITS]) * len(a["text"].encode()) * math.log(2) for a, b in pairs]
    best = headline(ours.scores)
    told = PUBLISHED.get(part.name)
    return {
        "task": part.name,
        "file": part.file.name if part.file else None,
        "items": len(part.task.eval_docs),
        "headline": best,
        "metrics": values,
        "same_choices": sum(a[best] == b[best] for a, b in pairs) / len(pairs),
        "largest_difference_nats_at_most": max(apart),
        "published": None if told is None else {"metric": told[0], "value": told[1]},
    }


def speed(args: argparse.Namespace, console: Console) -> None:
    """Time passes of an evaluation and the trainer's own validation, on the same padded shapes, in turns."""
    found = find(args.model)
    with opened(found, [], 1) as (engine, mesh):
        model = harness_model(engine, mesh, found.words, found.max_length, LM_EVAL)
        passes = some_passes(args, model, Likelihood(engine, found.max_length, 1, "cpu"))
        times: dict[str, list[float]] = {"evaluation": [], "validation": []}
        for repeat in range(args.repeats + 1):
            spent = dict.fromkeys(times, 0.0)
            for asked in passes:
                rows, length = asked.tokens.shape[0], asked.tokens.shape[1] - 1
                began = time.perf_counter()
                engine.token_logprobs(asked, rows)
                spent["evaluation"] += time.perf_counter() - began
                engine.seq_len, engine.micro_batch_size = length, rows
                began = time.perf_counter()
                engine.evaluate(Rows(plain_tokens(asked.tokens)))
                spent["validation"] += time.perf_counter() - began
            for name, seconds in spent.items():
                times[name] += [seconds] if repeat else []  # the first is not warm
    tokens = sum(int((asked.tokens != ~0).sum()) - len(asked.tokens) for asked in passes)
    ratios = [b / a for a, b in zip(times["evaluation"], times["validation"], strict=True)]
    row = {
        "passes": [list(asked.tokens.shape) for asked in passes],
        "tokens": tokens,
        "tokens_per_second": {name: tokens / statistics.median(each) for name, each in times.items()},
        "of_validation": statistics.median(ratios),
        "ratios": ratios,
    }
    console.print_json(data=row)
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def some_passes(args: argparse.Namespace, model: HarnessModel, likelihood: Likelihood) -> list[Asked]:
    """Passes that the tasks' requests come in, long and short ones."""
    pairs = []
    for part in parts_of(args):
        part.task.build_all_requests(limit=args.limit)
        pairs += [model._encode_pair(*instance.args) for instance in part.task.instances]
    passes = list(likelihood.passes(pairs))
    return passes[:: -(-len(passes) // PASSES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, action, suite in (("outside", outside, SUITE), ("speed", speed, "arc_easy,hellaswag")):
        verb = verbs.add_parser(name, description=action.__doc__)
        verb.add_argument("--model", type=Path, required=True, metavar="FOLDER")
        verb.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="items, as eval --data has them")
        verb.add_argument("--suite", default=suite, metavar="NAMES", help="%(default)s")
        verb.add_argument("--limit", type=int, default=500, help="items of a task (%(default)s)")
        verb.add_argument("--repeats", type=int, default=REPEATS, help="of a timing (%(default)s)")
        verb.add_argument("--results", type=Path, metavar="FILE", help="add the rows to this file")
        verb.set_defaults(action=action)
    args = parser.parse_args()
    args.action(args, Console())


if __name__ == "__main__":
    main()
