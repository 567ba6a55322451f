"""Says what must hold between the settings of different sections.

Where settings do not fit the ranks, the remedy is another layout: none that trains on other data or another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from megaopus.config.aliases import current
from megaopus.config.corpus_rules import ANY_LAYOUT, CORPUS_RULES, one_look
from megaopus.config.resume_policy import class_of
from megaopus.config.rulebook import RuleBook
from megaopus.config.run_config import RunConfig, settings_of
from megaopus.errors import Problem
from megaopus.selection.config import NO_EXPERTS
from megaopus.settings import FIXED, TRAINING, did_you_mean, problems

RESUME_WORDS = ("auto", "never", "required")
ROUNDING = 0.05
"""How far global_batch_size / rho may be from an integer: rho = 0.333 is meant as a third."""

RULES = RuleBook()


def validate(
    config: RunConfig, world_size: int | None, tainted: frozenset[str] = frozenset(), *, corpora: bool = True
) -> list[Problem]:
    """Problems of each section and of the sections together; reads the corpora's manifests, writes nothing.

    ``world_size`` None: the number of ranks is not known yet, what depends on it is not checked. ``tainted`` names
    settings refused before: nothing is said about them, nor about what depends on them. Without ``corpora`` no manifest
    is read.
    """
    found = [problem for problem in problems(config) if problem.key not in tainted]
    refused = tainted | {problem.key for problem in found}
    with one_look():
        for book in (RULES, CORPUS_RULES) if corpora else (RULES,):
            found += book.problems(config, world_size, refused)
    return found


def layout_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Problems that a layout of settings which are right otherwise may have; takes a tenth of ``validate``'s time."""
    found = problems(config.parallel, "parallel.")
    return [*found, *RULES.problems(config, world_size, {problem.key for problem in found})]


# -- run folder ------------------------------------------------------------------------------------------------------


@RULES.reading("run_dir")
def _run_dir(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    path = Path(config.run_dir)
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        yield Problem("run_dir", config.run_dir, f"{existing} is a file, not a folder", "name a new or a run's folder")


@RULES.reading("resume")
def _resume(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if config.resume not in RESUME_WORDS and not Path(config.resume).is_dir():
        hint = did_you_mean(config.resume, RESUME_WORDS)
        reason = "neither auto, never, required nor an existing checkpoint folder"
        yield Problem("resume", config.resume, reason, f"{hint}auto goes on from the newest checkpoint if there is one")


@RULES.reading("resume_allow", "optim.name")
def _resume_allow(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    known = settings_of(config.optim.name)
    for key in map(current, config.resume_allow):
        if key not in known:
            near = did_you_mean(key, known).strip()
            yield Problem("resume_allow", key, "no such setting", near or "'python -m megaopus settings' lists them")
        elif class_of(key) != TRAINING:
            fixed = class_of(key) == FIXED
            reason = "can never differ from the checkpoint's" if fixed else "needs no permission to change"
            yield Problem("resume_allow", key, reason, "another run_dir starts a new run" if fixed else "leave it out")


# -- layout ----------------------------------------------------------------------------------------------------------


@RULES.reading("parallel.tp", "model.num_heads", "model.num_kv_heads", "model.ffn_hidden_size", "model.hidden_size")
def _tensor_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    tp, model = config.parallel.tp, config.model
    sizes = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.derived_kv_heads(),
        "ffn_hidden_size": model.derived_ffn(),
    }
    for key, size in sizes.items():
        if size % tp and not (key == "num_kv_heads" and model.num_kv_heads is None):
            reason = f"cannot be split over parallel.tp = {tp} ranks"
            yield Problem(f"model.{key}", size, reason, f"use a parallel.tp that divides {size}")


def _length_problem(config: RunConfig, key: str, length: int) -> Iterator[Problem]:
    """Context parallelism splits each sequence, sequence parallelism each of its parts."""
    parallel = config.parallel
    degrees = [f"parallel.cp = {parallel.cp}"] if parallel.cp > 1 else []
    parts, remedies = parallel.cp, [f"a parallel.cp that divides {length}"] if length % parallel.cp else []
    if parallel.sequence_parallel:
        degrees.append(f"parallel.tp = {parallel.tp} (sequence parallelism)")
        parts, remedies = parts * parallel.tp, [*remedies, "parallel.sequence_parallel=false"]
    if length % parts:
        reason = f"cannot be split over {' x '.join(degrees)} ranks"
        yield Problem(key, length, reason, f"use {' and '.join(remedies)}")


@RULES.reading("parallel", "data.seq_len")
def _sequence_split(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    yield from _length_problem(config, "data.seq_len", config.data.seq_len)


@RULES.reading("parallel", "selection.score_length", "selection.method", "data.seq_len")
def _scored_split(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    length = config.scored_length()
    if config.selection.method != "uniform" and length < config.data.seq_len:
        yield from _length_problem(config, "selection.score_length", length)


@RULES.reading("model.num_experts", "model.expert_ffn_hidden_size", "model.hf", "parallel")
def _expert_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    if model.num_experts is None:
        for key, degree, off in (("ep", parallel.ep, 1), ("expert_tp", parallel.expert_tp, None)):
            if degree != off:
                yield Problem(f"parallel.{key}", degree, "the model has no experts", f"set model.num_experts, or {off}")
        return
    if model.num_experts % parallel.ep:
        remedy = f"use a parallel.ep that divides {model.num_experts}"
        yield Problem("parallel.ep", parallel.ep, f"does not divide model.num_experts = {model.num_experts}", remedy)
        return
    of_expert, split = model.derived_expert_ffn(), parallel.derived_expert_tp()
    if of_expert % split:
        reason = f"{of_expert} cannot be split over {split} ranks"
        yield Problem("model.expert_ffn_hidden_size", model.expert_ffn_hidden_size, reason, "set parallel.expert_tp=1")
    if (shared := model.shared_expert_ffn_hidden_size) is not None and shared % parallel.tp:
        reason = f"cannot be split over parallel.tp = {parallel.tp} ranks"
        yield Problem("model.shared_expert_ffn_hidden_size", shared, reason, f"a parallel.tp that divides {shared}")
    if parallel.tp > 1 and not parallel.sequence_parallel:
        reason = "with experts tensor-parallel ranks must share the tokens too"
        yield Problem("parallel.sequence_parallel", False, reason, "set it to true")
    stage = None if world_size is None else world_size // parallel.pp
    if stage is not None and stage % (parallel.ep * split):
        reason = f"{stage} ranks of a stage are not a multiple of ep x expert_tp = {parallel.ep * split}"
        yield Problem("parallel.ep", parallel.ep, reason, "launch more processes, or use a smaller parallel.ep")


@RULES.reading("selection", "model.num_experts")
def _scoring_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    captured = config.selection.captured_for()
    if config.model.num_experts is not None and captured is not None:
        key, value = captured
        instead = {
            "method": "method=opus",
            "estimator": "estimator=directional",
            "gram": "redundancy=0",
            "layers": "layers=all",
        }[key]
        yield Problem(f"selection.{key}", value, NO_EXPERTS, f"set selection.{instead}")


@RULES.reading("parallel.pp", "parallel.vpp", "model.num_layers")
def _pipeline_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    layers, pp, vpp = config.model.num_layers, config.parallel.pp, config.parallel.vpp
    if layers % (pp * vpp):
        where = f"parallel.pp = {pp} stages" + (f" x parallel.vpp = {vpp} chunks" if vpp > 1 else "")
        product = "parallel.pp x parallel.vpp" if vpp > 1 else "parallel.pp"
        remedy = f"use a {product} that divides {layers}"
        yield Problem("model.num_layers", layers, f"cannot be split over {where}", remedy)


@RULES.reading("parallel")
def _world_size(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    ranks = config.parallel.model_ranks
    if world_size is not None and world_size % ranks:
        reason = f"{world_size} ranks are not a multiple of tp x cp x pp = {ranks}"
        remedy = f"launch a multiple of {ranks} processes, or change parallel.tp, parallel.cp and parallel.pp"
        key = next(key for key in ("tp", "cp", "pp") if getattr(config.parallel, key) > 1)
        yield Problem(f"parallel.{key}", getattr(config.parallel, key), reason, remedy)


@RULES.reading("engine.name", "model.num_experts", "model.hf")
def _engine_of_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if config.model.num_experts is not None and not config.engine.spec().serves_experts:
        remedy = "engine.name=megatron, or a model without experts"
        yield Problem("engine.name", config.engine.name, "this engine has no experts", remedy)


@RULES.reading("engine.name", "engine.zero_stage", "parallel", "optim", "selection.estimator", "selection.method")
def _engine(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    for refusal in config.engine.refusals(config.parallel, config.optim, config.selection):
        yield Problem(*refusal)


def _dp(config: RunConfig, world_size: int | None) -> int:
    """Data-parallel ranks; 1 while the world size is unknown or does not fit (another rule says so)."""
    ranks = config.parallel.model_ranks
    return world_size // ranks if world_size is not None and world_size % ranks == 0 else 1


# -- batches ---------------------------------------------------------------------------------------------------------


@RULES.reading("train.global_batch_size", "train.micro_batch_size", "parallel")
def _global_batch(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    total, micro, dp = config.train.global_batch_size, config.train.micro_batch_size, _dp(config, world_size)
    share, pp, ranks = total // dp, config.parallel.pp, config.parallel.model_ranks
    if total % dp:
        degrees = [degree for degree in range(1, total + 1) if total % degree == 0]
        near = [max(each for each in degrees if each < dp), *(each for each in degrees if each > dp)][:2]
        counts = " or ".join(str(each * ranks) for each in near)
        remedy = f"launch {counts} processes, or change tp, cp or pp, so that dp divides {total}"
        yield Problem("train.global_batch_size", total, f"cannot be shared evenly by dp = {dp} ranks", remedy)
    elif share % micro:
        reason = f"not a multiple of dp x micro_batch_size = {dp} x {micro}"
        yield Problem("train.global_batch_size", total, reason, f"use a train.micro_batch_size that divides {share}")
    elif config.parallel.vpp > 1 and share // micro % pp:
        reason = f"makes {share // micro} micro-batches, with parallel.vpp a multiple of parallel.pp = {pp} is needed"
        fits = [size for size in range(1, micro) if share % (size * pp) == 0]
        remedy = f"use train.micro_batch_size={max(fits)}, or parallel.vpp=1" if fits else "use parallel.vpp=1"
        yield Problem("train.global_batch_size", total, reason, remedy)


@RULES.reading("train.global_batch_size", "selection.rho")
def _candidates(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    batch, rho = config.train.global_batch_size, config.selection.rho
    exact, num = batch / rho, config.num_candidates()
    if abs(exact - num) > ROUNDING:
        low, high = int(exact), int(exact) + 1
        reason = f"the buffer would hold global_batch_size / rho = {batch} / {rho:g} = {exact:.2f} candidates"
        remedy = f"use {batch / high:.6g} ({high} candidates)"
        remedy += f" or {batch / low:.6g} ({low} candidates)"
        yield Problem("selection.rho", rho, reason, remedy)


@RULES.reading("train.global_batch_size", "selection.groups", "selection.rho", "selection.prescreen")
def _groups(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    groups, sizes = config.selection.groups, (config.train.global_batch_size, config.buffer_size())
    if any(size % groups for size in sizes):
        common = math.gcd(*sizes)
        fits = [str(size) for size in range(2, common + 1) if common % size == 0][:6]
        reason = f"{sizes[0]} picks of {sizes[1]} candidates cannot be shared evenly"
        yield Problem("selection.groups", groups, reason, f"use {', '.join(['1', *fits])}")


# -- lengths ---------------------------------------------------------------------------------------------------------


@RULES.reading("optim.warmup_steps", "optim.decay_steps", "optim.schedule", "train.steps")
def _schedule(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    steps, warmup, decay = config.train.steps, config.optim.warmup_steps, config.optim.decay_steps
    remedy = f"use at most {steps}, or more train.steps"
    if warmup > steps:
        yield Problem("optim.warmup_steps", warmup, f"longer than train.steps = {steps}", remedy)
    elif config.optim.schedule == "wsd" and warmup + decay > steps:
        reason = f"warmup_steps + decay_steps = {warmup + decay} is longer than train.steps = {steps}"
        yield Problem("optim.decay_steps", decay, reason, f"use at most {steps - warmup}, or more train.steps")


@RULES.reading(
    "selection.warmup_steps", "selection.method", "selection.prescreen", "selection.score_every", "train.steps"
)
def _first_scores(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    steps, selection = config.train.steps, config.selection
    warmup, predicts = selection.warmup_steps, selection.prescreen.mode == "predict"
    every = selection.score_every * (selection.prescreen.every if predicts else 1)
    first = -(-warmup // every) * every
    if selection.method != "uniform" and not selection.has_prior and first >= steps:
        reason = f"the first scores are those of step {first}, train.steps = {steps}: nothing would ever be selected"
        yield Problem("selection.warmup_steps", warmup, reason, "use fewer, more train.steps, or selection=uniform")


@RULES.reading("selection.method", "selection.prescreen", "selection.score_every", "optim", "train.steps")
def _scores_with_state(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Scores of the first step alone are taken before the optimizer has any state."""
    steps, selection, optim = config.train.steps, config.selection, config.optim
    stateless = not optim.spec().state_under(optim.own_settings())
    if selection.method != "opus" or selection.has_prior or selection.warmup_steps > 0 or stateless:
        return
    predicts = selection.prescreen.mode == "predict"
    if selection.score_every * (selection.prescreen.every if predicts else 1) >= steps:
        key, value = "score_every", selection.score_every
        if value < steps:
            key, value = "prescreen.every", selection.prescreen.every
        reason = f"with train.steps = {steps} scores are taken in step 0 alone, when {optim.name} has no state yet:"
        reason += " nothing would ever be selected"
        yield Problem(f"selection.{key}", value, reason, "use fewer, more train.steps, or selection=uniform")


@RULES.reading("model.max_positions", "model.position", "data.seq_len")
def _max_positions(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    table, seq_len = config.model.max_positions, config.data.seq_len
    if config.model.position == "learned" and table is not None and table < seq_len:
        remedy = f"use at least {seq_len}, null, or model.position=rope"
        yield Problem("model.max_positions", table, f"shorter than data.seq_len = {seq_len}", remedy)


# -- selection -------------------------------------------------------------------------------------------------------


@RULES.reading("selection.estimator", "selection.method", "data.target_domains")
def _target_domains(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Method and estimator are told the target domains where they need them."""
    needs = config.selection.needs()
    if "wanted" in needs and not config.data.target_domains:
        key, value, why = needs["wanted"]
        yield Problem(f"selection.{key}", value, why, "name them: data.target_domains=[NAME]")


@RULES.reading("selection.estimator", "selection.method", "parallel")
def _scoring_layout(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Method and estimator are given whole models and whole sequences where they need them."""
    needs, parallel = config.selection.needs(), config.parallel
    for need, degrees in (("whole_model", ("tp", "cp", "pp", "ep")), ("whole_sequence", ("cp",))):
        split = [f"parallel.{name}=1" for name in degrees if getattr(parallel, name) > 1]
        if need in needs and split:
            key, value, why = needs[need]
            others = "selection.estimator=adjoint or directional" if key == "estimator" else ANY_LAYOUT[key]
            yield Problem(f"selection.{key}", value, why, f"set {' '.join(split)} (at every layout: {others})")
