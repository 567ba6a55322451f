"""Works out what a run would be: sizes, costs, memory and layout, without training, GPU or process group."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaopus.config.run_config import RunConfig
from megaopus.data.run_data import RunDataSummary
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import MeshShape
from megaopus.models.flops import (
    VOCAB_MULTIPLE,
    count_active_parameters,
    count_parameters,
    count_rank_parameters,
    padded_vocab,
    training_flops_per_token,
)
from megaopus.planning.disk import choice_rows, disk_use
from megaopus.planning.memory import in_micro_batches, precisions, proxy_micro_batch, scoring_micro_batch
from megaopus.planning.scorer_cost import online, scoring_cost, selecting_share
from megaopus.selection.methods.registry import UNIFORM


def start_line(config: RunConfig, shape: MeshShape, device: str, precision: str, data: RunDataSummary) -> str:
    """Tell, in the line that a run prints before step 0, what follows from its settings and the machine."""
    train = config.train
    size = config.model, config.model.derived_vocab_size(data.vocab_size), config.data.seq_len
    parameters = count_parameters(*size)
    engine = config.engine.name
    if engine == "deepspeed":
        engine += f" (ZeRO stage {config.engine.zero_stage})"
    if config.engine.is_fused(device == "cpu"):
        engine += ", fused kernels"
    layout = f"dp={shape.dp} tp={shape.tp} cp={shape.cp} pp={shape.pp}" + (f" ep={shape.ep}" if shape.ep > 1 else "")
    used = ""
    if config.model.num_experts is not None:
        used = f" ({count_active_parameters(*size):,} used by a token)"
    parts = [
        f"{shape.world_size} rank(s) on {device}: {layout}",
        f"{parameters:,} parameters{used}, {precision}, {config.optim.name}, {engine}",
        f"{train.steps} steps of {train.global_batch_size} x {config.data.seq_len} tokens",
        _picks(config),
        f"pool of {data.sequences['pool']:,} sequences ({data.fingerprint[:12]})",
    ]
    if data.kept is not None:
        parts.append(f"filtered {next(iter(data.kept))}: {data.kept['all']}")
    parts += [*_sequence_rules(config, data), f"target: {data.target.told}"]
    if data.weighted:
        drawn = ", ".join(f"{name} {epochs:.2f}" for name, epochs in data.epochs.items())
        parts.append(f"domains by weight; epochs of each by the last step: {drawn}")
    return " | ".join(parts)


def _sequence_rules(config: RunConfig, data: RunDataSummary) -> list[str]:
    """Tell what tokens of a sequence do not see, and what of them does not count in the loss."""
    told = ["documents of a sequence do not see each other"] if config.data.document_mask else []
    if data.loss_share is not None:
        told.append(f"{data.loss_share:.1%} of its tokens count in the loss")
    if not config.data.first_token_loss:
        told.append("the first token of a document does not count")
    return told


def _picks(config: RunConfig) -> str:
    """Tell how many are picked of the buffer that a step's line counts, and how many of it a model scores."""
    count, size, selection = config.train.global_batch_size, config.buffer_size(), config.selection
    text = f"{selection.method} picks {count} of {size} candidates"
    if selection.score_every > 1:
        text += f" in each of the {selection.score_every} steps that share them"
    if (scored := config.num_scored()) < size and selection.method != UNIFORM:
        every, predicts = selection.prescreen.every, selection.prescreen.mode == "predict"
        often = f" every {every} steps" if predicts and every > 1 else ""
        text += f" ({scored} scored by the model{', or none' if selection.cadence == 'auto' else often})"
    return text


def derived(config: RunConfig, world_size: int, data: RunDataSummary) -> dict[str, str]:
    """Name -> value of what the settings imply."""
    train, model, selection = config.train, config.model, config.selection
    parallel = config.parallel
    dp = world_size // parallel.model_ranks
    tokens = train.global_batch_size * config.data.seq_len
    vocab_size = config.model.derived_vocab_size(data.vocab_size)
    rows = {
        "data-parallel ranks (dp)": f"{dp} = {world_size} ranks"
        f" / (tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp})",
        "micro-batches per step": f"{train.global_batch_size // (dp * train.micro_batch_size)} on each rank",
        "vocabulary": f"{vocab_size:,}, padded to {padded_vocab(vocab_size):,} (a multiple of {VOCAB_MULTIPLE})",
        "MLP width (ffn)": f"{model.derived_ffn():,}",
        **_experts(config),
        "head size": f"{model.derived_head_dim()}",
        "candidates per step (N)": f"{config.num_candidates()}, of which {train.global_batch_size} are picked",
        "update tokens": f"{tokens:,} per step, {tokens * train.steps:,} in all",
        "corpus": f"{len(data.domains)} domains ({', '.join(data.domains)})",
        "sequences": ", ".join(f"{split} {count:,}" for split, count in data.sequences.items()),
        "each validation": _validation(data),
        "target (the headline loss)": data.target.told,
        "epochs of candidates": _epochs(config, data),
    }
    if rules := _sequence_rules(config, data):
        rows["within a sequence"] = "; ".join(rules)
    if config.logging.selection:
        rows["record of choices"] = _record(config)
    rows["checkpoints"] = _checkpoints(config, vocab_size)
    if selection.prescreen.mode != "off" or selection.score_every > 1:
        served = f" for {selection.score_every} steps" if selection.score_every > 1 else ""
        rows["buffer"] = f"{config.buffer_size()} sequences{served}, {config.num_scored()} of them scored exactly"
    if selection.needs_proxy:
        period, weight = selection.proxy_period, selection.proxy_decay
        share = selection.proxy_batch_size / period / train.global_batch_size
        when = "per step" if period == 1 else f"every {period} steps"
        averaged = f"; its gradient's weight halves in {selection.proxy_half_life:.4g} steps" if weight else ""
        rows["proxy"] = f"{selection.proxy_batch_size} sequences {when}, {share:.1%} of the update tokens{averaged}"
        found = selection.proxy_micro_batch_size is None and config.engine.device != "cpu"
        how = ", on a GPU more where the free memory has room at the first scored step" if found else ""
        rows["proxy micro-batch"] = f"{proxy_micro_batch(config, world_size)} on each rank{how}"
    if selection.method != UNIFORM and (asked := selection.score_length) is not None:
        whole = f", whole sequences (score_length = {asked})" if asked > config.data.seq_len else ""
        rows["scored tokens"] = f"{config.scored_length()} of {config.data.seq_len} of each candidate{whole}"
    if in_micro_batches(selection):
        how = "" if selection.score_micro_batch_size else " at most, found from free memory at the first scored step"
        rows["scoring micro-batch"] = f"{scoring_micro_batch(config, world_size)} on each rank{how}"
    return rows


def _record(config: RunConfig) -> str:
    """About how large choices/ becomes."""
    every, (rows, size) = config.logging.selection_every, choice_rows(config)
    of = "every step" if every == 1 else f"every {every}th step, picks of the others"
    return f"about {format_bytes(size)}: {rows:,} rows, all candidates of {of} (logging.selection_every)"


def _checkpoints(config: RunConfig, vocab_size: int) -> str:
    """Say how large checkpoints are, and how many lie there at a time."""
    use = disk_use(config, vocab_size, precisions(config)[-1])
    size = format_bytes(use.checkpoint)
    return f"about {size} each, at most {use.most} at a time: {format_bytes(use.most * use.checkpoint)}"


def _validation(data: RunDataSummary) -> str:
    """Tell which sequences a validation runs through."""
    each = ", ".join(f"{domain} {count:,}" for domain, count in data.validation.items())
    told = f"{sum(data.validation.values()):,} sequences ({each})"
    if data.held_out:
        parts = ", ".join(f"{part} {count:,}" for part, count in data.held_out.items())
        told += f", and {sum(data.held_out.values()):,} of the held-out target ({parts})"
    return told


def _epochs(config: RunConfig, data: RunDataSummary) -> str:
    steps, in_use = config.train.steps, config.selection.score_every
    if data.weighted:
        return ", ".join(f"{name} {epochs:.2f}" for name, epochs in data.epochs.items()) + f" in {steps:,} steps"
    per_epoch = data.sequences["pool"] * in_use / config.buffer_size()
    return f"{steps / per_epoch:.2f} in {steps:,} steps, one in {per_epoch:,.1f}"


def scoring_overhead(config: RunConfig) -> float:
    """FLOPs of selection over FLOPs of training, per step after the warm-up.

    (N/K)(L_score/L_train) x cost of the estimator, plus a forward and backward of the proxy batch at full length (of
    the pool's too for a contrast). With ``utilities`` odds the judges among the proxy are scored, in every step, and no
    gradient is made of them. Time differs: scoring has no optimizer step, and forwards alone keep no activations.
    """
    return online(config).omega


def cost(config: RunConfig, vocab_size: int) -> dict[str, str]:
    """Name -> FLOPs of training and of selection, in words."""
    flops = training_flops_per_token(config.model, vocab_size, config.data.seq_len)
    tokens = config.train.global_batch_size * config.data.seq_len * config.train.steps
    selecting = selecting_share(config)
    total = flops * tokens * (1 + scoring_overhead(config) * selecting)
    rows = {"training": f"{flops:.3e} FLOPs per token (forward and backward, attention included)"}
    if config.selection.method == UNIFORM:
        rows["selection"] = "none (uniform)"
    else:
        ratio, why = scoring_cost(config.selection)
        rows["scoring"] = f"{ratio:.2f} of a training token per scored token: {why}"
        rows["expected overhead"] = f"{scoring_overhead(config):.1%} of the training FLOPs of a step, proxy included"
        rows["steps that score"] = f"{selecting:.0%} (not in the warm-up of {config.selection.warmup_steps} steps)"
    return rows | {"whole run": f"{total:.3e} FLOPs"}


def _experts(config: RunConfig) -> dict[str, str]:
    """Say where the experts are, if there are any."""
    model, parallel = config.model, config.parallel
    if model.num_experts is None:
        return {}
    text = f"{model.experts_per_token} of {model.num_experts} to a token, {model.derived_expert_ffn():,} wide"
    if parallel.ep > 1:
        text += f", {model.num_experts // parallel.ep} on each rank (ep = {parallel.ep})"
    return {"experts": text}


def parameter_rows(config: RunConfig, vocab_size: int) -> dict[str, str]:
    """Count the parameters of the whole model and of each rank: name -> count, in words."""
    model, seq_len, tp, pp = config.model, config.data.seq_len, config.parallel.tp, config.parallel.pp
    ep, expert_tp = config.parallel.ep, config.parallel.derived_expert_tp()
    whole = f"{count_parameters(model, vocab_size, seq_len):,}"
    active = (
        f"{count_active_parameters(model, vocab_size, seq_len):,}, with {model.experts_per_token} experts of a layer"
    )
    used = {"used by a token": active} if model.num_experts is not None else {}
    if tp * pp * ep == 1:
        return {"whole model, on every rank": whole, **used}
    rows, split = {"whole model": whole, **used}, f"tp = {tp}" + (f", ep = {ep}" if ep > 1 else "")
    for stage in range(pp):
        layout = {"tp": tp, "pp": pp, "stage": stage, "ep": ep, "expert_tp": expert_tp}
        rows[f"each rank of stage {stage}"] = (
            f"{count_rank_parameters(model, vocab_size, seq_len, **layout):,}  ({split})"
        )
    return rows


def nodes_of(world_size: int, per_node: int, on_cpu: bool) -> tuple[int, int]:
    """Lay ranks out on equal nodes of up to ``per_node`` GPUs: (nodes, ranks on each). On CPU they are on one node."""
    if on_cpu or world_size <= per_node:
        return 1, world_size
    ranks = next(ranks for ranks in range(per_node, 0, -1) if world_size % ranks == 0)
    return world_size // ranks, ranks


def launch_command(
    world_size: int,
    overrides: Sequence[str],
    config_dir: Path | None = None,
    *,
    per_node: int,
    on_cpu: bool,
) -> tuple[str, str]:
    """(where it is to be given, the shell command that starts the run there)."""
    nodes, ranks = nodes_of(world_size, per_node, on_cpu)
    where, start = "Start it with:", "python" if world_size == 1 else f"torchrun --nproc-per-node {ranks}"
    if nodes > 1:
        where = (
            f"Start it on each of {nodes} nodes, NODE_RANK from 0 to {nodes - 1}, MASTER_ADDR the first one's name"
            " (launch/submit.py does it under Slurm):"
        )
        place = '--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port 29500'
        start = f"torchrun --nnodes {nodes} --nproc-per-node {ranks} {place}"
    folder = ["--config-dir", str(config_dir)] if config_dir is not None else []
    return where, f"{start} {shlex.join(['-m', 'megaopus', 'train', *folder, *overrides])}"


def groups(parallel: ParallelConfig, world_size: int) -> dict[str, list[list[int]]]:
    """Kind of parallelism -> the groups of ranks that work together in it; of experts where they are spread."""
    shape = MeshShape(world_size, parallel.tp, parallel.pp, parallel.cp, parallel.ep, parallel.derived_expert_tp())
    result = _groups([shape.coordinates(rank)._asdict() for rank in range(world_size)])
    if shape.ep > 1:
        of_experts = _groups([shape.expert_coordinates(rank)._asdict() for rank in range(world_size)])
        result |= {name: of_experts[name] for name in ("ep", "expert_dp")}
    return result


def _groups(places: Sequence[Mapping[str, int]]) -> dict[str, list[list[int]]]:
    result: dict[str, list[list[int]]] = {}
    for name in places[0]:
        members: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            members.setdefault(tuple(place[other] for other in place if other != name), []).append(rank)
        result[name] = list(members.values())
    return result


def format_bytes(size: int) -> str:
    """Write a size in MiB or GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
