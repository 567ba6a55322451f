"""What must hold between the settings of different sections, and between them and the files they name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopus.config.resume_policy import FIXED, TRAINING, class_of, flat
from megaopus.errors import Problem
from megaopus.models.arithmetic import count_parameters, padded_vocab

if TYPE_CHECKING:
    from megaopus.config.compose import RunConfig

RESUME_WORDS = ("auto", "never", "required")
EXACT_LIMIT = 5_000_000
"""Most parameters the exact estimator is allowed: it makes one float64 gradient per candidate."""
ROUNDING = 0.05
"""How far global_batch_size / rho may be from an integer: rho = 0.333 is meant as a third."""

Rule = Callable[["RunConfig", int | None], Iterator[Problem]]
_RULES: list[tuple[frozenset[str], Rule]] = []


def _rule(*keys: str) -> Callable[[Rule], Rule]:
    """Register a rule; it is left out when one of the ``keys`` (settings or sections) it reads has been refused."""

    def register(rule: Rule) -> Rule:
        _RULES.append((frozenset(keys), rule))
        return rule

    return register


def validate(config: RunConfig, world_size: int | None, tainted: frozenset[str] = frozenset()) -> list[Problem]:
    """Problems of each section and of the sections together; reads the corpora's manifests, writes nothing.

    ``world_size`` None: the number of ranks is not known yet, what depends on it is not checked. ``tainted`` names
    settings refused before: nothing is said about them, nor about what depends on them.
    """
    problems: list[Problem] = []
    refused = set(tainted)
    for section in fields(config):
        settings: Any = getattr(config, section.name)
        for key, reason, remedy in settings.problems() if hasattr(settings, "problems") else ():
            dotted = f"{section.name}.{key}"
            if dotted not in tainted:
                problems.append(Problem(dotted, _value_at(settings, key), reason, remedy))
                refused.add(dotted)
    for keys, rule in _RULES:
        if not any(bad in keys or bad.split(".", 1)[0] in keys for bad in refused):
            problems += rule(config, world_size)
    return problems


def _value_at(settings: Any, key: str) -> object:
    for name in key.split("."):
        settings = settings[name] if isinstance(settings, dict) else getattr(settings, name)
    return settings


# -- run folder ------------------------------------------------------------------------------------------------------


@_rule("run_dir")
def _run_dir(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if not config.run_dir:
        yield Problem("run_dir", config.run_dir, "is empty", "name a folder, for example run_dir=runs/first")
        return
    path = Path(config.run_dir)
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        yield Problem("run_dir", config.run_dir, f"{existing} is a file, not a folder", "name a new or a run's folder")


@_rule("resume")
def _resume(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if config.resume not in RESUME_WORDS and not Path(config.resume).is_dir():
        near = difflib.get_close_matches(config.resume, RESUME_WORDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        reason = "neither auto, never, required nor an existing checkpoint folder"
        yield Problem("resume", config.resume, reason, f"{hint}auto goes on from the newest checkpoint if there is one")


@_rule("resume_allow", "optim.name")
def _resume_allow(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    known = [*flat(asdict(config)), *(f"optim.settings.{name}" for name in config.optim.spec().settings)]
    for key in config.resume_allow:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            yield Problem("resume_allow", key, "no such setting", f"did you mean {near[0]}?" if near else "see --help")
        elif class_of(key) != TRAINING:
            fixed = class_of(key) == FIXED
            reason = "can never differ from the checkpoint's" if fixed else "needs no permission to change"
            yield Problem("resume_allow", key, reason, "another run_dir starts a new run" if fixed else "leave it out")


# -- layout ----------------------------------------------------------------------------------------------------------


@_rule("parallel.tp", "model.num_heads", "model.num_kv_heads", "model.ffn_hidden_size", "model.hidden_size")
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
            yield Problem(f"model.{key}", size, reason, f"use a multiple of {tp}, or a parallel.tp that divides {size}")


def _length_problem(config: RunConfig, key: str, length: int) -> Iterator[Problem]:
    """Context parallelism splits each sequence, sequence parallelism each of its parts."""
    parallel = config.parallel
    degrees = [f"parallel.cp = {parallel.cp}"] if parallel.cp > 1 else []
    parts, off = parallel.cp, "parallel.cp=1"
    if parallel.sequence_parallel:
        degrees.append(f"parallel.tp = {parallel.tp} (sequence parallelism)")
        parts, off = parts * parallel.tp, "parallel.sequence_parallel=false"
    if length % parts:
        remedy = f"use a multiple of {parts}, or {off}"
        yield Problem(key, length, f"cannot be split over {' x '.join(degrees)} ranks", remedy)


@_rule("parallel", "data.seq_len")
def _sequence_split(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    yield from _length_problem(config, "data.seq_len", config.data.seq_len)


@_rule("parallel", "selection.score_length", "selection.method")
def _scored_split(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    length = config.selection.score_length
    if config.selection.method != "uniform" and length is not None:
        yield from _length_problem(config, "selection.score_length", length)


@_rule("parallel.pp", "parallel.vpp", "model.num_layers")
def _pipeline_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    layers, pp, vpp = config.model.num_layers, config.parallel.pp, config.parallel.vpp
    if layers % (pp * vpp):
        where = f"parallel.pp = {pp} stages" + (f" x parallel.vpp = {vpp} chunks" if vpp > 1 else "")
        product = "parallel.pp x parallel.vpp" if vpp > 1 else "parallel.pp"
        remedy = f"use a multiple of {pp * vpp}, or a {product} that divides {layers}"
        yield Problem("model.num_layers", layers, f"cannot be split over {where}", remedy)


@_rule("parallel")
def _world_size(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    ranks = config.parallel.model_ranks
    if world_size is not None and world_size % ranks:
        reason = f"{world_size} ranks are not a multiple of tp x cp x pp = {ranks}"
        remedy = f"launch a multiple of {ranks} processes, or change parallel.tp, parallel.cp and parallel.pp"
        key = next(key for key in ("tp", "cp", "pp") if getattr(config.parallel, key) > 1)
        yield Problem(f"parallel.{key}", getattr(config.parallel, key), reason, remedy)


@_rule("parallel.distributed_optimizer", "optim.name")
def _distributed_optimizer(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if config.parallel.distributed_optimizer and config.optim.name != "adamw":
        reason = f"shards the state of AdamW only, not of optim.name = {config.optim.name}"
        yield Problem("parallel.distributed_optimizer", True, reason, "set it to false, or optim.name=adamw")


@_rule("engine.name", "engine.zero_stage", "parallel", "optim", "selection.estimator", "selection.method")
def _engine(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    engine, selection = config.engine, config.selection
    for key, value, reason, remedy in engine.refusals(config.parallel, config.optim):
        yield Problem(key, value, reason, remedy)
    exact = selection.needs_proxy and selection.estimator == "exact"
    if engine.name == "deepspeed" and engine.zero_stage == 3 and exact:
        reason = "needs whole weights on every rank, and engine.zero_stage = 3 partitions them"
        yield Problem("selection.estimator", "exact", reason, "selection.estimator=directional, or engine.zero_stage=2")


def _dp(config: RunConfig, world_size: int | None) -> int:
    """Data-parallel ranks; 1 while the world size is unknown or does not fit (another rule says so)."""
    ranks = config.parallel.model_ranks
    return world_size // ranks if world_size is not None and world_size % ranks == 0 else 1


# -- batches ---------------------------------------------------------------------------------------------------------


@_rule("train.global_batch_size", "train.micro_batch_size", "parallel")
def _global_batch(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    total, micro, dp = config.train.global_batch_size, config.train.micro_batch_size, _dp(config, world_size)
    if total % (dp * micro):
        reason = f"not a multiple of dp x micro_batch_size = {dp} x {micro}"
        remedy = f"use a multiple of {dp * micro}, for example {-(-total // (dp * micro)) * dp * micro}"
        if total % dp == 0:
            remedy += f", or a train.micro_batch_size that divides {total // dp}"
        yield Problem("train.global_batch_size", total, reason, remedy)
    elif config.parallel.vpp > 1 and total // (dp * micro) % config.parallel.pp:
        pp = config.parallel.pp
        reason = f"makes {total // (dp * micro)} micro-batches, with parallel.vpp a multiple of parallel.pp = {pp}"
        reason += " is needed"
        unit = dp * micro * pp
        remedy = f"use a multiple of dp x micro_batch_size x pp = {unit}, for example {-(-total // unit) * unit}"
        yield Problem("train.global_batch_size", total, reason, f"{remedy}, or a smaller train.micro_batch_size")


@_rule("train.global_batch_size", "selection.rho", "selection.method", "parallel")
def _candidates(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    batch, rho, dp = config.train.global_batch_size, config.selection.rho, _dp(config, world_size)
    exact, num = batch / rho, config.num_candidates()
    if abs(exact - num) > ROUNDING:
        low, high = int(exact), int(exact) + 1
        reason = f"the buffer would hold global_batch_size / rho = {batch} / {rho:g} = {exact:.2f} candidates"
        remedy = f"use {batch / high:.6g} ({high} candidates)"
        remedy += f" or {batch / low:.6g} ({low} candidates)"
        yield Problem("selection.rho", rho, reason, remedy)
        return
    if config.selection.method == "uniform":
        return
    if config.selection.prescreen.mode != "off":
        return  # what does not divide is scored with a few more from the larger buffer
    what = f"{'score_every x ' if config.selection.score_every > 1 else ''}global_batch_size / rho"
    num = config.num_scored()
    pp = config.parallel.pp if config.parallel.vpp > 1 else 1
    if num % dp:
        reason = f"{num} candidates ({what}) cannot be shared evenly by dp = {dp} ranks"
        yield Problem("selection.rho", rho, reason, f"make {what} a multiple of {dp}")
    elif num // dp % pp:
        reason = f"{num // dp} candidates per dp rank are not a multiple of parallel.pp = {pp}, as parallel.vpp needs"
        yield Problem("selection.rho", rho, reason, f"make {what} a multiple of {dp * pp}")


@_rule("selection.proxy_batch_size", "selection.method", "parallel")
def _proxy_batch(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    proxy, dp, parallel = config.selection.proxy_batch_size, _dp(config, world_size), config.parallel
    unit = dp * parallel.pp if parallel.vpp > 1 else dp
    if config.selection.needs_proxy and proxy % unit:
        remedy = f"use a multiple of {unit}, for example {-(-proxy // unit) * unit}"
        reason = f"cannot be shared evenly by dp = {dp} ranks"
        if parallel.vpp > 1:
            reason += f" in micro-batches whose number is a multiple of parallel.pp = {parallel.pp} (parallel.vpp)"
        yield Problem("selection.proxy_batch_size", proxy, reason, remedy)


# -- lengths ---------------------------------------------------------------------------------------------------------


@_rule("optim.warmup_steps", "optim.decay_steps", "optim.schedule", "train.steps")
def _schedule(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    steps, warmup, decay = config.train.steps, config.optim.warmup_steps, config.optim.decay_steps
    remedy = f"use at most {steps}, or more train.steps"
    if warmup > steps:
        yield Problem("optim.warmup_steps", warmup, f"longer than train.steps = {steps}", remedy)
    elif config.optim.schedule == "wsd" and warmup + decay > steps:
        reason = f"warmup_steps + decay_steps = {warmup + decay} is longer than train.steps = {steps}"
        yield Problem("optim.decay_steps", decay, reason, f"use at most {steps - warmup}, or more train.steps")


@_rule("selection.warmup_steps", "selection.method", "selection.prescreen", "train.steps")
def _selection_warmup(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    steps, warmup = config.train.steps, config.selection.warmup_steps
    if config.selection.method != "uniform" and not config.selection.has_prior and warmup > steps:
        reason = f"longer than train.steps = {steps}: nothing would ever be selected"
        yield Problem("selection.warmup_steps", warmup, reason, "use fewer, more train.steps, or selection=uniform")


@_rule("selection.score_length", "data.seq_len")
def _score_length(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    length, seq_len = config.selection.score_length, config.data.seq_len
    if length is not None and length > seq_len:
        remedy = f"use at most {seq_len}, or null to score whole sequences"
        yield Problem("selection.score_length", length, f"longer than data.seq_len = {seq_len}", remedy)


@_rule("model.max_positions", "model.position", "data.seq_len")
def _max_positions(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    table, seq_len = config.model.max_positions, config.data.seq_len
    if config.model.position == "learned" and table is not None and table < seq_len:
        remedy = f"use at least {seq_len}, null, or model.position=rope"
        yield Problem("model.max_positions", table, f"shorter than data.seq_len = {seq_len}", remedy)


# -- selection -------------------------------------------------------------------------------------------------------


@_rule("selection.method", "data.wanted")
def _domain_oracle(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if config.selection.method == "domain_oracle" and not config.data.wanted:
        yield Problem("selection.method", "domain_oracle", "takes the wanted domains", "name them: data.wanted=[NAME]")


@_rule("selection.estimator", "selection.method", "model", "data.path", "data.seq_len", "parallel")
def _exact_estimator(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if not config.selection.needs_proxy or config.selection.estimator != "exact":
        return
    if config.parallel.model_ranks > 1:
        reason = "one float64 gradient per candidate is taken of a whole model: it needs tp = pp = cp = 1"
        remedy = "selection.estimator=adjoint or directional work at every layout"
        yield Problem("selection.estimator", "exact", reason, remedy)
    vocab_size = config.model.vocab_size or read_manifest(Path(config.data.path)).get("vocab_size")
    if not isinstance(vocab_size, int):
        return  # no readable corpus: another rule says so
    total = count_parameters(config.model, vocab_size, config.data.seq_len)
    if total > EXACT_LIMIT:
        reason = f"makes one float64 gradient per candidate: {total:,} parameters are over the limit of {EXACT_LIMIT:,}"
        remedy = "selection.estimator=directional (the same alignment from two forwards), or a smaller model"
        yield Problem("selection.estimator", "exact", reason, remedy)


# -- corpus ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """``manifest.json`` of a prepared corpus; empty when it cannot be read (``_corpus_problem`` says why)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _corpus_problem(key: str, path: str) -> Problem | None:
    folder = Path(path)
    prepare = "name a folder made by 'python -m megaopus prepare'"
    if not folder.is_dir():
        return Problem(key, path, "is a file" if folder.exists() else "no such folder", prepare)
    if not (folder / "manifest.json").is_file():
        return Problem(key, path, "holds no manifest.json, so it is not a prepared corpus", prepare)
    manifest = read_manifest(folder)
    if not isinstance(manifest.get("vocab_size"), int) or not isinstance(manifest.get("counts"), dict):
        return Problem(key, path, "its manifest.json is broken (no vocab_size and counts)", "prepare the corpus again")
    return None


def _check_path(name: str) -> None:
    """One rule per setting that names a corpus, so that a problem with one leaves the others checked."""

    @_rule(f"data.{name}")
    def _path(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
        path = getattr(config.data, name)
        if path and (problem := _corpus_problem(f"data.{name}", path)):
            yield problem


for _name in ("path", "proxy_path", "validation_path"):
    _check_path(_name)


def _corpora(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Split -> (the setting that names its corpus, path); the proxy only where it is used."""
    data = config.data
    proxy = ("data.proxy_path", data.proxy_path) if data.proxy_path else ("data.path", data.path)
    validation = ("data.validation_path", data.validation_path) if data.validation_path else ("data.path", data.path)
    corpora = {"pool": ("data.path", data.path), "validation": validation}
    used = config.selection.needs_proxy or config.selection.needs_traits
    return corpora | ({"proxy": proxy} if used else {})


@_rule("data", "selection.method")
def _splits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The wanted domains exist where the proxy and the validation come from, and no split is empty."""
    said: set[tuple[str, str]] = set()
    for split, (key, path) in _corpora(config).items():
        if _corpus_problem(key, path):
            continue  # said by the rule of that setting
        counts = read_manifest(Path(path))["counts"]
        wanted = config.data.wanted if split != "pool" else []
        for name in wanted:
            if name not in counts and (path, name) not in said:
                said.add((path, name))
                near = difflib.get_close_matches(name, counts, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                remedy = f"{hint}domains: {', '.join(counts)}"
                yield Problem("data.wanted", name, f"no domain of that name in {path}", remedy)
        tokens = {name: counts[name].get(split, {}).get("tokens", 0) for name in wanted or counts if name in counts}
        if tokens:
            yield from _split_problem(split, key, path, tokens, config.data.seq_len, named=bool(wanted))


@_rule("data.weights", "data.path", "data.seq_len")
def _weights(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Every domain with a weight has sequences in the pool."""
    path = config.data.path
    if not config.data.weights or _corpus_problem("data.path", path):
        return
    counts = read_manifest(Path(path))["counts"]
    enough = [name for name, splits in counts.items() if splits.get("pool", {}).get("tokens", 0) > config.data.seq_len]
    for name in sorted({name for _, stage in config.data.weights for name, weight in stage.items() if weight}):
        if name not in enough:
            near = difflib.get_close_matches(name, enough, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            reason = f"no sequence of domain {name} in the pool of {path}"
            yield Problem("data.weights", config.data.weights, reason, f"{hint}domains: {', '.join(enough)}")


def _split_problem(
    split: str, key: str, path: str, tokens: dict[str, int], seq_len: int, *, named: bool
) -> Iterator[Problem]:
    """Each named domain must fill a sequence of seq_len tokens and the one after; of all domains, at least one."""
    short = [name for name, count in tokens.items() if count <= seq_len]
    if not short or (not named and len(short) < len(tokens)):
        return
    remedy = f"prepare it with a larger --{split}-fraction, or name another corpus with data.{split}_path"
    if split == "pool":
        remedy = "prepare it with more text, or with smaller proxy and validation fractions"
    longest = max(tokens[name] for name in short)
    if longest == 0:
        yield Problem(key, path, f"its split '{split}' is empty for {', '.join(short)}", remedy)
    else:
        reason = f"its split '{split}' fills no sequence of data.seq_len = {seq_len} for {', '.join(short)}"
        yield Problem(key, path, reason, f"use a data.seq_len below {longest} (its longest), or {remedy}")


@_rule("data.path", "data.proxy_path", "data.validation_path", "selection.method")
def _tokenizers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    digests: dict[str, object] = {}
    for key, path in dict(_corpora(config).values()).items():
        digests[key] = read_manifest(Path(path)).get("files", {}).get("tokenizer.json", {}).get("sha256")
    for key, digest in digests.items():
        if digest and digests.get("data.path") and digest != digests["data.path"]:
            path = dict(_corpora(config).values())[key]
            remedy = f"prepare it again with --tokenizer {Path(config.data.path) / 'tokenizer.json'}"
            yield Problem(key, path, f"its tokenizer is not that of data.path = {config.data.path}", remedy)


@_rule("data.path", "model.vocab_size")
def _vocabulary(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    needed = read_manifest(Path(config.data.path)).get("vocab_size")
    given = config.model.vocab_size
    if isinstance(needed, int) and given is not None and given < needed:
        reason = f"the corpus has token ids up to {needed - 1}"
        yield Problem("model.vocab_size", given, reason, f"use at least {needed}, or null")


@_rule("data.path", "model.vocab_size", "parallel.tp")
def _vocabulary_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    vocab_size = config.model.vocab_size or read_manifest(Path(config.data.path)).get("vocab_size")
    tp = config.parallel.tp
    if isinstance(vocab_size, int) and padded_vocab(vocab_size) % tp:
        reason = f"the embedding's {padded_vocab(vocab_size)} rows cannot be split over it"
        yield Problem("parallel.tp", tp, reason, "use a power of two")
