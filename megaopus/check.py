"""What a run would be: sizes, costs, memory and layout worked out without training, GPU or process group."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megaopus.config import RunConfig, differences, validate
from megaopus.errors import ConfigError
from megaopus.models.flops import (
    VOCAB_MULTIPLE,
    Weight,
    count_parameters,
    count_rank_parameters,
    padded_vocab,
    stage_weights,
    training_flops_per_token,
)
from megaopus.selection.config import BY_LOSS, BY_TEXT_FEATURES, SKETCHES, SelectionConfig, most_per_pass

SCORING_COST = {
    "directional": (2 / 3, "two forwards: 4 of the 6 FLOPs per parameter and token that training takes"),
    "adjoint": (1.0, "forward, input gradients, and a product of each layer's with the update on the proxy"),
    "countsketch": (
        1.0,
        "forward, input gradients, and a product of each layer's with the carried-back proxy sketch",
    ),
    "kronecker": (2 / 3, "forward and input gradients; the sketches of activations not counted"),
    "exact": (1.0, "forward and backward per candidate, in float64"),
    **dict.fromkeys(BY_LOSS, (1 / 3, "one forward")),
    **dict.fromkeys(BY_TEXT_FEATURES, (0.0, "traits alone, worked out beforehand")),
    "domain_oracle": (0.0, "labels alone"),
}
"""FLOPs per scored token over FLOPs per trained token, and why."""
GHOST_PASS = 2 / 3  # forward and input gradients
GRAM_COST = {
    "countsketch": (1.0, "forward, input gradients and each layer's gradient per sequence; sketching not counted"),
    "kronecker": SCORING_COST["kronecker"],
}
"""The same of sketching every candidate for a Gram matrix."""
LARGEST_TABLE = 16


CHOICE_BYTES = 17
"""Of a row of choices/ with utilities or standing, compressed: 16.3 measured (24 with both, 6 with neither)."""


@dataclass(frozen=True, slots=True)
class Data:
    """What the corpora hold for this run."""

    vocab_size: int
    """The model's vocabulary before padding."""
    sequences: dict[str, int]
    """Split -> sequences of seq_len."""
    domains: list[str]
    epochs: dict[str, float] | None = None
    """Where domains are drawn by weight: times that the run goes through each."""
    kept: dict[str, str] | None = None
    """What the filter keeps, in words."""


def run(
    config: RunConfig,
    world_size: int | None = None,
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print everything that follows from ``config`` on ``world_size`` ranks (None: tp x cp x pp, the fewest possible).

    ``overrides`` and ``config_dir`` are repeated in the launch command. Raises ConfigError if the settings do not fit
    the ranks, DataError if a corpus cannot be read.
    """
    console = console or Console()
    world_size = world_size if world_size is not None else config.parallel.model_ranks
    if problems := validate(config, world_size):
        raise ConfigError(problems)
    data = open_data(config)
    console.print(_two_columns("Derived", derived(config, world_size, data)))
    if data.kept is not None:
        console.print(_two_columns("Documents of the pool that the filter keeps", data.kept))
    changed = {key: f"{value!r}  (default {default!r})" for key, (value, default) in differences(config).items()}
    console.print(_two_columns("Settings that differ from the default", changed or {"none": ""}))
    console.print(_mesh_table(config, world_size))
    console.print(_two_columns("Parameters", _parameter_rows(config, data)))
    console.print(_two_columns("Cost", cost(config, data.vocab_size)))
    for precision in precisions(config):
        console.print(_memory_table(config, data.vocab_size, world_size, precision))
    console.print("Start it with:")
    command = launch_command(world_size, overrides, config_dir)
    console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def open_data(config: RunConfig) -> Data:
    """Open the corpora of ``config`` and count their sequences; raises DataError."""
    from megaopus.data.candidates import CandidateStream
    from megaopus.data.corpus import Corpus
    from megaopus.data.mixture import parse_stages
    from megaopus.data.score_filter import kept_documents
    from megaopus.data.sequences import Sequences

    data = config.data
    pool = Corpus.open(data.path)
    proxy = Corpus.open(data.proxy_path) if data.proxy_path else pool
    validation = Corpus.open(data.validation_path) if data.validation_path else pool
    wanted = data.wanted or None
    kept = kept_documents(pool, data.filter)
    drawn_from = Sequences(pool, "pool", data.seq_len, kept=kept)
    epochs = None
    if data.weights:
        stages, every = parse_stages(data.weights), config.selection.score_every
        stream = CandidateStream(drawn_from, config.buffer_size(), config.seed, serves=every, stages=stages)
        epochs = stream.epochs(config.train.steps)
    sequences = {
        "pool": len(drawn_from),
        "validation": len(Sequences(validation, "validation", data.seq_len, wanted)),
    }
    if config.selection.needs_proxy:
        sequences["proxy"] = len(Sequences(proxy, "proxy", data.seq_len, wanted))
    told = None if kept is None else kept.told(pool)
    return Data(config.model.vocab_size or pool.vocab_size, sequences, list(pool.domains), epochs, told)


def derived(config: RunConfig, world_size: int, data: Data) -> dict[str, str]:
    """Name -> value of what the settings imply."""
    train, model, selection = config.train, config.model, config.selection
    parallel = config.parallel
    dp = world_size // parallel.model_ranks
    tokens = train.global_batch_size * config.data.seq_len
    rows = {
        "data-parallel ranks (dp)": f"{dp} = {world_size} ranks"
        f" / (tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp})",
        "micro-batches per step": f"{train.global_batch_size // (dp * train.micro_batch_size)} on each rank",
        "vocabulary": f"{data.vocab_size:,}, padded to {padded_vocab(data.vocab_size):,}"
        f" (a multiple of {VOCAB_MULTIPLE})",
        "MLP width (ffn)": f"{model.derived_ffn():,}",
        "head size": f"{model.derived_head_dim()}",
        "candidates per step (N)": f"{config.num_candidates()}, of which {train.global_batch_size} are picked",
        "update tokens": f"{tokens:,} per step, {tokens * train.steps:,} in all",
        "corpus": f"{len(data.domains)} domains ({', '.join(data.domains)})",
        "sequences": ", ".join(f"{split} {count:,}" for split, count in data.sequences.items()),
        "epochs of candidates": _epochs(config, data),
    }
    if config.logging.selection:
        rows["record of choices"] = _record(config)
    if selection.prescreen.mode != "off" or selection.score_every > 1:
        served = f" for {selection.score_every} steps" if selection.score_every > 1 else ""
        rows["buffer"] = f"{config.buffer_size()} sequences{served}, {config.num_scored()} of them scored exactly"
    if selection.needs_proxy:
        share = selection.proxy_batch_size / train.global_batch_size
        rows["proxy"] = f"{selection.proxy_batch_size} sequences per step, {share:.1%} of the update tokens"
    if selection.method in BY_LOSS or (selection.needs_proxy and selection.estimator != "exact"):
        how = "" if selection.score_micro_batch_size else " at most, found from free memory at the first scored step"
        rows["scoring micro-batch"] = f"{scoring_micro_batch(config, world_size)} on each rank{how}"
    return rows


def _record(config: RunConfig) -> str:
    """About how large choices/ becomes."""
    every, kept = config.logging.selection_every, config.train.global_batch_size
    whole = len(range(0, config.train.steps, every))
    rows = whole * config.buffer_size() + (config.train.steps - whole) * kept
    size = rows * CHOICE_BYTES
    overlaps = 8 * config.buffer_size() * config.train.global_batch_size * config.selection.score_every
    if config.selection.redundancy > 0 and overlaps <= config.logging.overlaps_mb * 1e6:
        size += overlaps * len(range(0, config.train.steps, math.lcm(every, config.selection.score_every)))
    of = "every step" if every == 1 else f"every {every}th step, picks of the others"
    return f"about {_bytes(size)}: {rows:,} rows, all candidates of {of} (logging.selection_every)"


def _epochs(config: RunConfig, data: Data) -> str:
    steps, in_use = config.train.steps, config.selection.score_every
    if data.epochs is not None:
        return ", ".join(f"{name} {epochs:.2f}" for name, epochs in data.epochs.items()) + f" in {steps:,} steps"
    per_epoch = data.sequences["pool"] * in_use / config.buffer_size()
    return f"{steps / per_epoch:.2f} in {steps:,} steps, one in {per_epoch:,.1f}"


def scoring_micro_batch(config: RunConfig, world_size: int) -> int:
    """Candidates of a scoring pass on each rank: as set, or the most that may be found."""
    share = config.num_scored() // (world_size // config.parallel.model_ranks)
    length = config.selection.score_length or config.data.seq_len
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    return config.selection.score_micro_batch_size or most_per_pass(share, length, device)


def scoring_overhead(config: RunConfig) -> float:
    """FLOPs of selection over FLOPs of training, per step after the warm-up.

    (N/K)(L_score/L_train) x cost of the estimator, plus a forward and backward of the proxy batch at full length (of
    the pool's too for a contrast). Time differs: scoring has no optimizer step, and forwards alone keep no activations.
    """
    selection, train = config.selection, config.train
    if selection.method == "uniform":
        return 0.0
    ratio = _scoring_cost(selection)[0]
    length = (selection.score_length or config.data.seq_len) / config.data.seq_len
    every = selection.score_every * (selection.prescreen.every if selection.prescreen.mode == "predict" else 1)
    proxy = selection.proxy_batch_size / math.lcm(every, selection.proxy_every) if selection.needs_proxy else 0
    return (config.num_scored() / every * ratio * length + proxy * (1 + selection.contrast)) / train.global_batch_size


def _scoring_cost(selection: SelectionConfig) -> tuple[float, str]:
    """FLOPs per scored token over FLOPs per trained token, and why; of the Gram matrix's sketches too."""
    ratio, why = SCORING_COST[selection.estimator if selection.needs_proxy else selection.method]
    if not selection.redundancy or selection.estimator == "exact":
        return ratio, why
    sketch, how = GRAM_COST[selection.derived_sketch()]
    if selection.estimator in SKETCHES:
        return sketch, how
    if selection.estimator == "adjoint":  # from one pass
        return ratio + sketch - GHOST_PASS, f"{why}; the same pass sketches the Gram matrix"
    return ratio + sketch, f"{why}; then for the Gram matrix {how}"


def cost(config: RunConfig, vocab_size: int) -> dict[str, str]:
    """Name -> FLOPs of training and of selection, in words."""
    flops = training_flops_per_token(config.model, vocab_size, config.data.seq_len)
    tokens = config.train.global_batch_size * config.data.seq_len * config.train.steps
    selecting = max(0, config.train.steps - config.selection.warmup_steps) / config.train.steps
    total = flops * tokens * (1 + scoring_overhead(config) * selecting)
    rows = {"training": f"{flops:.3e} FLOPs per token (forward and backward, attention included)"}
    if config.selection.method == "uniform":
        rows["selection"] = "none (uniform)"
    else:
        ratio, why = _scoring_cost(config.selection)
        rows["scoring"] = f"{ratio:.2f} of a training token per scored token: {why}"
        rows["expected overhead"] = f"{scoring_overhead(config):.1%} of the training FLOPs of a step, proxy included"
        rows["steps that score"] = f"{selecting:.0%} (not in the warm-up of {config.selection.warmup_steps} steps)"
    return rows | {"whole run": f"{total:.3e} FLOPs"}


def _parameter_rows(config: RunConfig, data: Data) -> dict[str, str]:
    model, seq_len, tp, pp = config.model, config.data.seq_len, config.parallel.tp, config.parallel.pp
    rows = {"whole model": f"{count_parameters(model, data.vocab_size, seq_len):,}"}
    for stage in range(pp):
        count = count_rank_parameters(model, data.vocab_size, seq_len, tp=tp, pp=pp, stage=stage)
        rows[f"each rank of stage {stage}"] = f"{count:,}  (tp = {tp})"
    return rows if tp * pp > 1 else {"whole model, on every rank": rows["whole model"]}


def precisions(config: RunConfig) -> list[str]:
    """The precision of the run; both where it depends on the machine (engine auto)."""
    if config.engine.precision != "auto":
        return [config.engine.precision]
    return {"cpu": ["fp32"], "cuda": ["bf16"], "auto": ["fp32", "bf16"]}[config.engine.device]


def memory(
    config: RunConfig, vocab_size: int, world_size: int, precision: str, stage: int
) -> dict[str, tuple[int, str]]:
    """What -> (bytes on one rank of pipeline stage ``stage``, the assumption behind it)."""
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    weights = stage_weights(model, vocab_size, config.data.seq_len, pp=pp, stage=stage)
    count = count_rank_parameters(model, vocab_size, config.data.seq_len, tp=tp, pp=pp, stage=stage)
    size, what = _optimizer_state(config, count, weights)
    # What only the update reads may be shared: the optimizer's state and, under bf16, the main weights.
    engine = config.engine.spec()
    shards = world_size // (tp * pp) if engine.shards_optimizer(config.parallel) else 1
    sharded = f", over {shards} ranks" if shards > 1 else ""
    rows = {
        "weights": (4 * count, "fp32"),
        "gradients": (4 * count, "fp32 buffer, also under bf16"),
        "optimizer state": (size // shards, what + sharded),
        "activations": _activations(config, world_size, precision, stage),
    }
    if precision == "bf16":
        rows["weights"] = (2 * count + 4 * count // shards, f"bf16 and fp32 main weights{sharded}")
    rows |= engine.memory(config.engine, count, precision, shards, config.selection.needs_proxy)
    if stage == pp - 1:
        positions = config.train.micro_batch_size * config.data.seq_len // config.parallel.cp
        logits = positions * padded_vocab(vocab_size) // tp
        rows["logits"] = (8 * logits, "fp32 logits of a micro-batch and their gradient")
    return rows | _selection_memory(config, world_size, weights)


def _activations(config: RunConfig, world_size: int, precision: str, stage: int) -> tuple[int, str]:
    """Kept by each layer for the backward pass: norm inputs and outputs, q, k, v, attention output, MLP inputs."""
    model, parallel, train = config.model, config.parallel, config.train
    query, key_value = model.num_heads * model.derived_head_dim(), model.derived_kv_heads() * model.derived_head_dim()
    # GELU keeps its input and output; SwiGLU gate, up, silu(gate) and their product.
    mlp = model.derived_ffn() * (4 if model.activation == "swiglu" else 2)
    whole = 4 * model.hidden_size // (parallel.tp if parallel.sequence_parallel else 1)
    # Keys and values are kept for every position: gathered over cp.
    per_token = whole + (2 * query + 2 * key_value * parallel.cp + mlp) // parallel.tp
    in_flight = _in_flight(config, world_size, stage)
    layers = model.num_layers // (parallel.pp * parallel.vpp)
    kept = layers * in_flight * per_token
    if config.engine.recompute:
        kept = layers * in_flight * model.hidden_size + per_token
    positions = train.micro_batch_size * config.data.seq_len // parallel.cp
    how = "layer inputs and one layer in full" if config.engine.recompute else "layer by layer"
    what = "micro-batch(es)" if parallel.vpp == 1 else "passes of a model chunk"
    how = f"estimate, {how}; {in_flight} {what} in flight, no attention matrix, no dropout masks"
    return positions * kept * (4 if precision == "fp32" else 2), how


def _in_flight(config: RunConfig, world_size: int, stage: int) -> int:
    """Forward passes of a model chunk whose backward pass is still to come, at most."""
    parallel, train = config.parallel, config.train
    micro_batches = train.global_batch_size // (world_size // parallel.model_ranks * train.micro_batch_size)
    ahead = parallel.pp - stage - 1
    if parallel.vpp == 1:
        return min(ahead + 1, micro_batches)
    return min(2 * ahead + (parallel.vpp - 1) * parallel.pp + 1, micro_batches * parallel.vpp)


def _optimizer_state(config: RunConfig, count: int, weights: list[Weight]) -> tuple[int, str]:
    """(bytes, what they are) of the state for a rank's ``count`` numbers, unsharded over data-parallel ranks.

    ``weights``: those numbers as tensors, before tensor parallelism splits them.
    """
    spec, names, tp = config.optim.spec(), ", ".join, config.parallel.tp
    shaped = spec.state_under(config.optim.own_settings())
    matrices = [weight for weight in weights if (weight.matrix if spec.matrices else weight.columns)]
    inside = sum(weight.numel // tp if weight.sharded else weight.numel for weight in matrices)
    extra = spec.extra_state or (lambda rows, columns: 0)
    more = sum(extra(weight.numel // weight.columns, weight.columns) for weight in matrices)
    if spec.matrices:
        what = f"fp32 {names(shaped)} of block matrices, AdamW moments of the rest"
        return 4 * (len(shaped) * inside + more) + 8 * (count - inside), what
    if spec.factored:
        return 4 * (len(shaped) * (count - inside) + more), f"fp32 {names(shaped)} of vectors, statistics of matrices"
    return 4 * (len(shaped) * count + more), f"fp32 {names(shaped)}" if shaped else "none"


def _selection_memory(config: RunConfig, world_size: int, weights: list[Weight]) -> dict[str, tuple[int, str]]:
    """What scoring adds on a rank that holds ``weights``."""
    selection, count = config.selection, sum(weight.numel for weight in weights)
    if not selection.needs_proxy:
        return {}
    average = selection.proxy_ema > 0
    rows = {"proxy gradient": (4 * count * (1 + average), "fp32, with its running average" if average else "fp32")}
    if selection.estimator == "directional":
        rows["direction"] = (8 * count, "fp32 direction and a copy of the weights to restore")
    elif selection.estimator == "adjoint":
        rows["update on the proxy"] = (4 * count, "fp32, P g_proxy of each matrix")
    elif selection.estimator == "exact":
        rows["exact gradients"] = (16 * count, "float64 weights and one candidate's gradient")
    sketched = [weight for weight in weights if _is_sketched(weight, config)]
    if selection.estimator in SKETCHES or (selection.redundancy and selection.estimator != "exact"):
        if selection.derived_sketch() == "countsketch":
            rows["hashes"] = (9 * sum(weight.numel for weight in sketched), "bucket and sign of each sketched weight")
        # The alignment needs one micro-batch of one layer at a time, the Gram matrix all of this rank's candidates.
        share = config.num_scored() // (world_size // config.parallel.model_ranks)
        kept = share if selection.redundancy else min(share, scoring_micro_batch(config, world_size))
        layers = len(sketched) if selection.redundancy else 1
        size = 4 * kept * layers * selection.sketch_dim
        rows["sketches"] = (size, f"fp32, {kept} candidates x {layers} matrices x {selection.sketch_dim}")
    return rows


def _is_sketched(weight: Weight, config: RunConfig) -> bool:
    """Linear matrices (a tied embedding is one); with selection.layers=all the embeddings too."""
    if weight.name == "word_embeddings":
        return config.model.tied or config.selection.layers == "all"
    if weight.name == "position_embeddings":
        return config.selection.layers == "all"
    return weight.matrix or weight.name == "output_layer"


def launch_command(world_size: int, overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """The shell command that starts the run on one node."""
    start = ["python"] if world_size == 1 else ["torchrun", "--nproc-per-node", str(world_size)]
    folder = ["--config-dir", str(config_dir)] if config_dir is not None else []
    return shlex.join([*start, "-m", "megaopus", "train", *folder, *overrides])


def groups(world_size: int, tp: int, pp: int, cp: int = 1) -> dict[str, list[list[int]]]:
    """Kind of parallelism -> the groups of ranks that work together in it."""
    from megaopus.distributed.mesh import MeshShape

    shape = MeshShape(world_size, tp, pp, cp)
    places = {rank: shape.coordinates(rank)._asdict() for rank in range(world_size)}
    result: dict[str, list[list[int]]] = {}
    for name in places[0]:
        members: dict[tuple[int, ...], list[int]] = {}
        for rank, place in places.items():
            members.setdefault(tuple(place[other] for other in place if other != name), []).append(rank)
        result[name] = list(members.values())
    return result


def _mesh_table(config: RunConfig, world_size: int) -> Table:
    parallel = config.parallel
    tp, pp, cp = parallel.tp, parallel.pp, parallel.cp
    table = Table(title=f"Mesh of {world_size} ranks", title_justify="left")
    for heading in ("axis", "degree", "groups of ranks"):
        table.add_column(heading, overflow="fold")
    degrees = {"tp": tp, "cp": cp, "pp": pp, "dp": world_size // parallel.model_ranks}
    listed = groups(world_size, tp, pp, cp) if world_size <= LARGEST_TABLE else None
    for axis, degree in degrees.items():
        text = " ".join(str(group) for group in listed[axis]) if listed else f"{world_size // degree} of {degree}"
        table.add_row(axis, str(degree), text, end_section=axis == "dp")
    return table


def _two_columns(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory_table(config: RunConfig, vocab_size: int, world_size: int, precision: str) -> Table:
    """Memory of the stage that needs most."""
    stages = [memory(config, vocab_size, world_size, precision, stage) for stage in range(config.parallel.pp)]
    totals = [sum(size for size, _ in rows.values()) for rows in stages]
    stage = totals.index(max(totals))
    where = f", stage {stage} (the largest)" if config.parallel.pp > 1 else ""
    table = Table(title=f"Memory per rank in {precision}{where}", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("assumption", overflow="fold")
    for name, (size, assumption) in stages[stage].items():
        table.add_row(name, _bytes(size), assumption)
    table.add_section()
    table.add_row("sum", _bytes(totals[stage]), "without the framework's own memory and temporary buffers")
    return table


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
