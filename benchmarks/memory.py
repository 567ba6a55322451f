"""Hold the estimate of a rank's memory to what the real engine's tensors take, without a GPU.

Each shape runs at each layout on fake CUDA tensors (benchmarks/fake_cuda): two training steps, then two scored buffers
by every estimator. What was measured is kept in a file of results, and not measured again.

    python benchmarks/memory.py                     # print the table of benchmarks/results/memory.jsonl
    python benchmarks/memory.py --measure           # measure what is missing there first
    python benchmarks/memory.py --measure --only gpt2_small
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megaopus.config.run_config import RunConfig
from megaopus.models.config import ModelConfig
from megaopus.models.flops import stage_weights
from megaopus.planning.memory import memory, peak
from megaopus.selection.config import SelectionConfig

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "memory.jsonl"
LOW, HIGH = 0.90, 1.15
"""An estimate over what is true may lie between these."""
LAYOUTS: Mapping[str, dict[str, Any]] = {
    "1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "zero": {"distributed_optimizer": True},
    "tp8": {"tp": 8},
}
RANKS = {"1": 1, "tp2": 2, "pp2": 2, "zero": 4, "tp8": 8}
_OPUS: dict[str, Any] = {"method": "opus"}
SELECTIONS: Mapping[str, dict[str, Any]] = {
    "uniform": {},
    "directional": {**_OPUS, "estimator": "directional"},
    "contrast": {**_OPUS, "estimator": "directional", "contrast": True},
    "adjoint": {**_OPUS, "estimator": "adjoint"},
    "countsketch": {**_OPUS, "estimator": "countsketch"},
    "kronecker": {**_OPUS, "estimator": "kronecker"},
    "greats": {
        "method": "greats",
        "estimator": "adjoint",
        "redundancy": 1.0,
        "utilities": "raw",
        "proxy_half_life": 0.0,
    },
    "exact": {**_OPUS, "estimator": "exact"},
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, and the batches that it is trained on."""

    model: dict[str, Any]
    seq_len: int
    micro: int
    vocab_size: int = 50257
    optim: str = "adamw"
    engine: dict[str, Any] = field(default_factory=dict)
    layouts: tuple[str, ...] = ("1", "tp2", "pp2", "zero")
    selections: tuple[str, ...] = tuple(SELECTIONS)


LLAMA: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
QWEN: dict[str, Any] = {**LLAMA, "qk_norm": True, "head_dim": 128, "num_kv_heads": 8}
QWEN_06B = {**QWEN, "num_layers": 28, "hidden_size": 1024, "num_heads": 16, "ffn_hidden_size": 3072}
QWEN_8B = {**QWEN, "num_layers": 36, "hidden_size": 4096, "num_heads": 32, "ffn_hidden_size": 12288, "tied": False}
LLAMA_70B = {
    **LLAMA,
    "num_layers": 80,
    "hidden_size": 8192,
    "num_heads": 64,
    "num_kv_heads": 8,
    "ffn_hidden_size": 28672,
    "tied": False,
}


def _gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_heads": heads}


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(model=_gpt2(4, 128, 4), seq_len=128, micro=8, vocab_size=2048),
    "gpt2_small": Shape(model=_gpt2(12, 768, 12), seq_len=1024, micro=4),
    "gpt2_medium_4_layers_muon": Shape(model=_gpt2(4, 1024, 16), seq_len=1024, micro=2, optim="muon"),
    "gpt2_xl_4_layers": Shape(model=_gpt2(4, 1600, 25), seq_len=1024, micro=1),
    "llama_small": Shape(
        model={**LLAMA, **_gpt2(12, 768, 12), "num_kv_heads": 4, "tied": False}, seq_len=1024, micro=8
    ),
    "qwen3_0p6b_4_layers": Shape(model={**QWEN_06B, "num_layers": 4}, seq_len=4096, micro=4, vocab_size=151936),
    "llama_1b_4_layers_lion": Shape(
        model={**LLAMA, **_gpt2(4, 2048, 32), "num_kv_heads": 8, "ffn_hidden_size": 8192},
        seq_len=2048,
        micro=1,
        vocab_size=128256,
        optim="lion",
    ),
    "qwen3_8b_4_layers": Shape(model={**QWEN_8B, "num_layers": 4}, seq_len=2048, micro=1, vocab_size=151936),
    "wide": Shape(model=_gpt2(4, 4096, 32), seq_len=2048, micro=2, vocab_size=32000),
    "dropout": Shape(model={**_gpt2(8, 256, 8), "dropout": 0.1, "tied": False}, seq_len=512, micro=8, vocab_size=8192),
    "recomputed": Shape(
        model={**LLAMA, **_gpt2(4, 2048, 16), "num_kv_heads": 8},
        seq_len=2048,
        micro=4,
        vocab_size=32000,
        engine={"recompute": True},
    ),
    "biased_swiglu_sgd": Shape(
        model={**_gpt2(4, 1024, 16), "activation": "swiglu", "position": "none", "num_kv_heads": 4, "qk_norm": True},
        seq_len=1024,
        micro=4,
        vocab_size=32000,
        optim="sgd",
    ),
}
"""Those by which the formulas were made; models of many layers with fewer of them, which are alike."""
_FEW = ("uniform", "directional", "adjoint")
EXAMPLES: Mapping[str, Shape] = {
    "qwen3_0p6b": Shape(model=QWEN_06B, seq_len=4096, micro=4, vocab_size=151936, layouts=("1",), selections=_FEW),
    "qwen3_8b_tp8": Shape(model=QWEN_8B, seq_len=2048, micro=1, vocab_size=151936, layouts=("tp8",), selections=_FEW),
    "llama_70b_tp8": Shape(
        model=LLAMA_70B, seq_len=2048, micro=1, vocab_size=128256, layouts=("tp8",), selections=_FEW
    ),
}
"""Models as they are, by a few estimators."""
FUSED: Mapping[str, Shape] = {
    f"{name}_fused": replace(SHAPES[name], engine={"kernels": "fused"})
    for name in ("tiny", "gpt2_small", "llama_small", "qwen3_0p6b_4_layers")
}
"""Some of them by fused kernels, as CUDA has them; all others are eager, as all were when the formulas were made."""
DRAWN_SEED, DRAWN = 19, 6


def drawn() -> dict[str, Shape]:
    """The shapes that were drawn by chance once the formulas stood."""
    chance = random.Random(DRAWN_SEED)
    found = {}
    for number in range(DRAWN):
        heads = chance.choice([4, 8, 12, 16])
        model = {
            "num_layers": chance.choice([2, 4, 6, 8]),
            "hidden_size": heads * chance.choice([32, 64, 96, 128]),
            "num_heads": heads,
            "num_kv_heads": heads // chance.choice([1, 2, 4]),
            "head_dim": chance.choice([None, 64, 128]),
            "ffn_hidden_size": chance.choice([None, 1024, 2560, 6144]),
            "position": chance.choice(["learned", "rope", "none"]),
            "norm": chance.choice(["layernorm", "rmsnorm"]),
            "qk_norm": chance.random() < 0.3,
            "activation": chance.choice(["gelu", "swiglu"]),
            "bias": chance.random() < 0.5,
            "tied": chance.random() < 0.5,
            "dropout": chance.choice([0.0, 0.0, 0.1]),
        }
        found[f"drawn_{number + 1}"] = Shape(
            model=model,
            seq_len=chance.choice([256, 512, 1024, 2048]),
            micro=chance.choice([1, 2, 4, 8]),
            vocab_size=chance.choice([4096, 32000, 50257, 128256]),
            optim=chance.choice(["adamw", "adamw", "muon", "lion", "adafactor"]),
            engine={"recompute": chance.random() < 0.2},
        )
    return found


def every_shape() -> dict[str, Shape]:
    """Name -> shape: those of the formulas, those drawn after them, and the examples."""
    return {**SHAPES, **drawn(), **EXAMPLES, **FUSED}


def run_config(shape: Shape, layout: str, selection: str = "uniform") -> RunConfig:
    """The settings of a run of one micro-batch a step on each data-parallel rank for each of its stages."""
    config = RunConfig()
    config.model = ModelConfig(**shape.model)
    config.optim.name = shape.optim
    for key, value in LAYOUTS[layout].items():
        setattr(config.parallel, key, value)
    for key, value in {"device": "cuda", "kernels": "eager", **shape.engine}.items():
        setattr(config.engine, key, value)
    dp = RANKS[layout] // config.parallel.model_ranks
    config.data.seq_len = shape.seq_len
    config.train.micro_batch_size = shape.micro
    config.train.global_batch_size = dp * shape.micro * config.parallel.pp
    config.selection = SelectionConfig(**SELECTIONS[selection])
    config.selection.proxy_batch_size = config.train.global_batch_size
    config.selection.score_micro_batch_size = config.selection.proxy_micro_batch_size = shape.micro
    return config


def impossible(shape: Shape, layout: str, selection: str) -> str | None:
    """Say why the engine refuses a cell, or why it is not measured; None: it can be."""
    config = run_config(shape, layout, selection)
    model, parallel = config.model, config.parallel
    if parallel.tp > 1 and (model.num_heads % parallel.tp or model.derived_kv_heads() % parallel.tp):
        heads = f"{model.num_heads} heads in {model.derived_kv_heads()} groups"
        return f"{heads} do not divide over tp={parallel.tp}"
    for refusal in config.engine.refusals(parallel, config.optim, config.selection):
        return refusal.reason
    if selection == "exact":
        if parallel.model_ranks > 1:
            return "exact needs a whole model"
        if model.hidden_size > 1024 or model.num_layers > 12:
            return "exact is for small models"
    return None


def cells(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, str]]:
    """(shape, layout) of everything that is to be measured."""
    for name, shape in shapes.items():
        for layout in shape.layouts:
            yield name, layout


def measured(shape: Shape, layout: str, names: Sequence[str]) -> dict[str, Any]:
    """Stage -> {held, training, scoring: {selection: peak}}: bytes of one of its ranks, scoring by ``names``."""
    from benchmarks.fake_cuda.measure import fake_job, measure

    found: dict[str, Any] = {}
    for stage in range(LAYOUTS[layout].get("pp", 1)):
        base = run_config(shape, layout)
        selections = {name: run_config(shape, layout, name).selection for name in names}
        ranks = RANKS[layout]
        with fake_job(base, stage * ranks // base.parallel.pp, ranks) as (mesh, meter):
            each = measure(base, shape.vocab_size, mesh, meter, selections)
        found[str(stage)] = {"held": each.held, "training": each.training, "scoring": each.scoring}
    return found


def estimated(shape: Shape, layout: str, selection: str, stage: int) -> int:
    """Bytes of tensors at the peak of a rank of ``stage``, by ``planning.memory``."""
    config = run_config(shape, layout, selection)
    rows = memory(config, shape.vocab_size, RANKS[layout], "bf16", stage, "cuda")
    del rows["process"]  # not tensors
    return peak(rows)[1]


def missing(shape: Shape, layout: str, row: Mapping[str, Any]) -> list[str]:
    """List the selections that are to be measured and are not in ``row``."""
    there = set.intersection(*(set(found["scoring"]) for found in row["stages"].values())) if row["stages"] else set()
    return [name for name in shape.selections if name not in there and impossible(shape, layout, name) is None]


def write(path: Path, results: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Write a row for each (shape, layout)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")  # so that a kill loses no row
    partial.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in results.values()))
    partial.replace(path)


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(shape, layout) -> what was measured."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["shape"], row["layout"]): row for row in rows}


def ratios(results: Mapping[tuple[str, str], dict[str, Any]]) -> Iterator[tuple[str, str, str, int, int, int]]:
    """(shape, layout, selection, stage, true bytes, estimated bytes) of every cell that was measured."""
    shapes = every_shape()
    for (name, layout), row in results.items():
        for stage, found in row["stages"].items():
            for selection, true in found["scoring"].items():
                yield name, layout, selection, int(stage), true, estimated(shapes[name], layout, selection, int(stage))


def table(results: Mapping[tuple[str, str], dict[str, Any]]) -> Table:
    """Lay out estimate over truth, a row per shape and layout."""
    made = Table(title="GiB measured (estimate / measured) of the fullest stage", title_justify="left")
    for heading in ("shape", "layout", *SELECTIONS):
        made.add_column(heading, no_wrap=True)
    by_cell: dict[tuple[str, str, str], tuple[int, int]] = {}
    for name, layout, selection, _, true, guess in ratios(results):
        by_cell[name, layout, selection] = max(by_cell.get((name, layout, selection), (0, 0)), (true, guess))
    for name, layout in results:
        found = []
        for selection in SELECTIONS:
            true, guess = by_cell.get((name, layout, selection), (0, 0))
            found.append(f"{true / 2**30:.2f} ({guess / true:.2f})" if true else "-")
        made.add_row(name, layout, *found)
    return made


def summary(results: Mapping[tuple[str, str], dict[str, Any]]) -> Table:
    """Lay out a row per shape: cells (a stage and a selection of a layout each), and how their ratios spread."""
    made = Table(title="estimate / measured, every stage", title_justify="left")
    for heading in ("shape", "cells", "GiB measured", "least", "median", "most"):
        made.add_column(heading, no_wrap=True)
    found = list(ratios(results))
    for name in dict.fromkeys(cell[0] for cell in found):
        own = [(true / 2**30, guess / true) for shape, _, _, _, true, guess in found if shape == name]
        size, ratio = sorted(true for true, _ in own), sorted(each for _, each in own)
        middle = ratio[len(ratio) // 2]
        cells = (f"{size[0]:.2f}-{size[-1]:.2f}", f"{ratio[0]:.3f}", f"{middle:.3f}", f"{ratio[-1]:.3f}")
        made.add_row(name, str(len(own)), *cells)
    return made


def weights_of(shape: Shape, layout: str, stage: int) -> int:
    """Count the weights on a rank of ``stage``."""
    config = run_config(shape, layout)
    seq_len, parallel = config.data.seq_len, config.parallel
    found = stage_weights(config.model, shape.vocab_size, seq_len, pp=parallel.pp, stage=stage)
    return sum(weight.numel // (parallel.tp if weight.sharded else 1) for weight in found)


def beyond(results: Mapping[tuple[str, str], dict[str, Any]]) -> Table:
    """Lay out what scoring takes at its peak beyond a training step, in bytes for each weight of the rank."""
    made = Table(title="bytes a weight beyond a training step, of the stage with the most", title_justify="left")
    scored = [name for name in SELECTIONS if name != "uniform"]
    for heading in ("shape", "layout", *scored):
        made.add_column(heading, no_wrap=True)
    shapes = every_shape()
    for (name, layout), row in results.items():
        most: dict[str, float] = {}
        for stage, found in row["stages"].items():
            weights = weights_of(shapes[name], layout, int(stage))
            for selection, true in found["scoring"].items():
                most[selection] = max(most.get(selection, 0.0), (true - found["training"]) / weights)
        made.add_row(name, layout, *(f"{most[each]:.1f}" if each in most else "-" for each in scored))
    return made


def main() -> None:
    """Measure what is missing, and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="%(default)s")
    made.add_argument("--measure", action="store_true", help="measure what is not in the file")
    made.add_argument("--only", nargs="+", metavar="SHAPE", help="these shapes alone")
    args = made.parse_args()
    shapes = {name: shape for name, shape in every_shape().items() if not args.only or name in args.only}
    results = read(args.results)
    if args.measure:
        import torch

        warnings.simplefilter("ignore")
        for name, layout in cells(shapes):
            row: dict[str, Any] = results.get(
                (name, layout),
                {"shape": name, "layout": layout, "torch": torch.__version__.split("+")[0], "stages": {}},
            )
            if wanted := missing(shapes[name], layout, row):
                for stage, found in measured(shapes[name], layout, wanted).items():
                    before = row["stages"].get(stage, {"scoring": {}})["scoring"]
                    row["stages"][stage] = {**found, "scoring": {**before, **found["scoring"]}}
                results[name, layout] = row
                write(args.results, results)
    chosen = {key: row for key, row in results.items() if key[0] in shapes}
    console = Console(width=200)
    console.print(table(chosen))
    console.print(beyond(chosen))
    console.print(summary(chosen))
    found = ratios(chosen)
    worst = sorted((guess / true, name, layout, which, stage) for name, layout, which, stage, true, guess in found)
    outside = [each for each in worst if not LOW <= each[0] <= HIGH]
    if worst:
        console.print(f"{len(worst)} cells, from {worst[0][0]:.3f} to {worst[-1][0]:.3f}; outside: {len(outside)}")
    for each in outside:
        console.print(each)
    for name, layout in cells(shapes):
        for selection in shapes[name].selections:
            if why := impossible(shapes[name], layout, selection):
                console.print(f"not measured: {name} {layout} {selection}: {why}")


if __name__ == "__main__":
    main()
