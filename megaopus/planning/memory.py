"""Estimates the memory of a rank from the settings of a run: nothing is built, torch is not imported.

The estimates are held to what the real engine's tensors take (benchmarks/memory.py, docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from megaopus.config.run_config import RunConfig
from megaopus.models.flops import Weight
from megaopus.planning import activations
from megaopus.planning.activations import WIDTH, Share
from megaopus.planning.rank import Rank
from megaopus.selection.config import SelectionConfig, largest_divisor, most_per_pass
from megaopus.selection.estimators.registry import ESTIMATORS, Sizes, Taken, scoring_memory
from megaopus.selection.methods.registry import METHODS, UNIFORM

TRAINING, PROXY, SCORING = "a training step", "the proxy's gradient", "scoring"
PHASES = (TRAINING, PROXY, SCORING)
"""Phases of a rank, in turn; its peak is that of the phase that takes most."""
PROCESS_ROW = "process"
PROCESS = {"cpu": 400 << 20, "cuda": 600 << 20}
"""Bytes that a process holds before any model. CPU: Python, torch and megatron-core, measured. CUDA: its context and
kernels on the GPU, which torch does not count: of the order that is known of H100s, not measured here."""
_MOST_MICRO_BATCHES = 4
"""Of a pipeline's scoring passes, micro-batches per stage at least (``engine.megatron.scoring``)."""


class Row(NamedTuple):
    """Tells what one kind of tensors takes on a rank."""

    split: int
    """Bytes of which the other tensor-parallel ranks and pipeline stages hold other parts."""
    whole: int
    """Bytes that other ranks of the same model hold as well, or that are the rank's own."""
    how: str
    """The assumption behind it."""
    phases: tuple[str, ...] = PHASES
    """Names the phases in which it is there."""

    @property
    def size(self) -> int:
        """Bytes on the rank."""
        return self.split + self.whole


def peak(rows: Mapping[str, Row]) -> tuple[str, int]:
    """Return the phase in which ``rows`` take most, and how many bytes."""
    totals = {phase: sum(row.size for row in rows.values() if phase in row.phases) for phase in PHASES}
    phase = max(totals, key=totals.__getitem__)
    return phase, totals[phase]


def rows_at_peak(rows: Mapping[str, Row]) -> dict[str, tuple[int, str]]:
    """Return what -> (bytes, the assumption behind it) of the rows that are there at the peak."""
    phase, _ = peak(rows)
    return {what: (row.size, row.how) for what, row in rows.items() if phase in row.phases}


def precisions(config: RunConfig, device: str | None = None) -> list[str]:
    """List the precision of the run; both where it depends on the machine (engine auto).

    ``device``: "cpu" or "cuda", where the run is; None: not known beyond the settings.
    """
    if config.engine.precision != "auto":
        return [config.engine.precision]
    return {"cpu": ["fp32"], "cuda": ["bf16"], "auto": ["fp32", "bf16"]}[device or config.engine.device]


def memory(
    config: RunConfig, vocab_size: int, world_size: int, precision: str, stage: int, device: str | None = None
) -> dict[str, Row]:
    """Estimate what takes memory on one rank of pipeline stage ``stage``: name -> ``Row``.

    ``device``: "cpu" or "cuda"; None: as set, and where it is found at the start, that which has this precision.
    Fragments of the allocator are not in it.
    """
    if device is None:
        device = config.engine.device if config.engine.device != "auto" else ("cpu" if precision == "fp32" else "cuda")
    rank = Rank(config, vocab_size, world_size, precision, stage, device)
    where = "Python, torch and megatron-core" if device == "cpu" else "CUDA's context and kernels: a guess"
    rows = {PROCESS_ROW: Row(0, PROCESS[device], where), **_held(rank), **_training(rank)}
    return rows | _selection(rank)


# -- what is there all the time ----------------------------------------------------------------------------------------


def _held(rank: Rank) -> dict[str, Row]:
    """Count weights, gradients and optimizer state."""
    engine, precision, shards = rank.config.engine.spec(), rank.precision, rank.shards
    sharded = rank.shared_over()

    def rows(count: int) -> dict[str, tuple[int, str]]:
        found = {"weights": (4 * count, "fp32"), "gradients": (4 * count, "fp32 buffer, also under bf16")}
        if precision == "bf16":
            found["weights"] = (2 * count + int(4 * count / shards), f"bf16 and fp32 main weights{sharded}")
        scores = rank.config.selection.needs_proxy
        return found | engine.memory(rank.config.engine, count, precision, int(shards), scores)

    numbers = rank.numbers()
    split, whole = rows(int(numbers.split) // rank.tp), rows(int(numbers.whole))
    found = {name: Row(split[name][0], whole[name][0], how) for name, (_, how) in split.items()}
    state, copies, what = _optimizer_state(rank)
    found["optimizer state"] = Row(int(state / shards), int(copies / shards), what + sharded)
    return found


def _optimizer_state(rank: Rank) -> tuple[int, int, str]:
    """Estimate (bytes of split state, bytes of state that tensor-parallel ranks all have, what they are), unsharded."""
    spec, names = rank.config.optim.spec(), ", ".join
    shaped = spec.state_under(rank.config.optim.own_settings())
    extra = spec.extra_state or (lambda rows, columns: 0)
    split = whole = 0
    for weight in rank.weights():
        taken = weight.matrix and weight.name != "router" if spec.matrices else bool(weight.columns)
        kept = len(shaped)
        if spec.matrices and not taken:
            kept = 2  # AdamW's moments
        elif spec.factored and taken:
            kept = 0
        whole += 4 * extra(weight.numel // weight.columns, weight.columns) if taken else 0
        size = 4 * kept * rank.own(weight)
        split, whole = (split + size, whole) if rank.splits(weight) else (split, whole + size)
    what = f"fp32 {names(shaped)}" if shaped else "none"
    if spec.matrices:
        what = f"fp32 {names(shaped)} of block matrices, AdamW moments of the rest"
    elif spec.factored:
        what = f"fp32 {names(shaped)} of vectors, statistics of matrices"
    return split, whole, what


# -- a training step ---------------------------------------------------------------------------------------------------


def _training(rank: Rank) -> dict[str, Row]:
    """Count activations of the forward passes in flight, and what a backward pass makes beside them."""
    config, train = rank.config, rank.config.train
    micro_batches = train.global_batch_size // (rank.dp * train.micro_batch_size)
    positions = train.micro_batch_size * config.data.seq_len // config.parallel.cp
    kept, how = _activations(rank, positions, micro_batches)
    rows = {"activations": _row(rank, kept, how, TRAINING)}
    work, whose = _work(rank, positions, kept.over(rank.tp), _in_flight(rank, micro_batches))
    if config.optim.spec().curvature and rank.last:
        drawn = 22 if rank.precision == "bf16" else 20
        logits, each = rank.logits(positions, backward=False)
        work, whose = max((work, whose), (logits // each * drawn, "logits and their sums while labels are sampled"))
    rows["backward pass"] = Row(0, work, whose, (TRAINING,))
    made = 4 * config.optim.spec().update_numbers * sum(map(rank.own, rank.weights())) if rank.device == "cuda" else 0
    made -= sum(row.size for row in rows.values())  # these have gone by then
    if made > 0:
        rows["update"] = Row(0, made, "fp32, the step of all weights, beyond the two before", (TRAINING,))
    return rows


def _row(rank: Rank, kept: Share, how: str, *phases: str) -> Row:
    return Row(int(kept.split / rank.tp), int(kept.whole), how, phases)


def _activations(rank: Rank, positions: int, micro_batches: int, *, scoring: bool = False) -> tuple[Share, str]:
    """Count what is kept of ``positions`` of each micro-batch in flight; ``scoring``: by a pass that scores."""
    config, parallel = rank.config, rank.config.parallel
    hidden = WIDTH[rank.precision] * config.model.hidden_size
    # the stage's input beside its layers, and at its end the final norm's output
    entry = Share(hidden * (1 + rank.last)) if parallel.sequence_parallel else Share(0, hidden * (1 + rank.last))
    in_flight = _in_flight(rank, micro_batches)
    layers = config.model.num_layers // (parallel.pp * parallel.vpp)
    kept = entry
    for experts, count in rank.layers().items():  # of a model chunk, on average over them
        layer = activations.kept_by_layer(config, rank.precision, rank.device, experts)
        kept = kept.plus(layer.times(count / parallel.vpp))
    kept = kept.times(in_flight)
    how = "layer by layer"
    if config.engine.recompute and not scoring:
        stored = Share(hidden) if parallel.sequence_parallel else Share(0, hidden)
        kept = stored.times(layers).plus(entry).times(in_flight)
        how = "layer inputs"
    what = "micro-batch(es)" if parallel.vpp == 1 else "passes of a model chunk"
    return kept.times(positions), f"{how}; {in_flight} {what} of {positions:,} positions in flight"


def _in_flight(rank: Rank, micro_batches: int) -> int:
    """Forward passes of a model chunk whose backward pass is still to come, at most."""
    parallel = rank.config.parallel
    ahead = parallel.pp - rank.stage - 1
    if parallel.vpp == 1:
        return min(ahead + 1, micro_batches)
    return min(2 * ahead + (parallel.vpp - 1) * parallel.pp + 1, micro_batches * parallel.vpp)


def _work(rank: Rank, positions: int, kept: float, in_flight: int) -> tuple[int, str]:
    """Find the bytes that a backward pass takes at once beside ``kept`` bytes of activations, and for what.

    ``in_flight``: passes that these are of.
    """
    config, width = rank.config, WIDTH[rank.precision]

    of_layers = [activations.backward_of_layer(config, rank.precision, rank.device, kind) for kind in rank.layers()]
    layer = max(each.over(rank.tp) for each in of_layers) * positions
    matrices = [rank.own(weight) for weight in rank.weights() if weight.matrix]
    found = [(int(layer) + width * max(matrices, default=0), "gradients inside a layer")]
    if rank.last:
        logits, each = rank.logits(positions, backward=True)
        found.append((logits, f"{each} bytes for each logit, or the gradients of logits and output layer"))
    if rank.stage == 0:  # the activations of its micro-batch have gone by then
        table = width * max(rank.own(weight) for weight in rank.weights() if weight.name == "word_embeddings")
        found.append((int(table - kept / max(1, in_flight)), "gradient of the embedding"))
    return max(found)


# -- selection ---------------------------------------------------------------------------------------------------------


def _selection(rank: Rank) -> dict[str, Row]:
    """Count what choosing takes beside training."""
    selection = rank.config.selection
    if selection.method == UNIFORM:
        return {}
    entry = METHODS.find(selection.method)
    rows: dict[str, Row] = _proxy(rank) if selection.needs_proxy else {}
    found: dict[str, Taken] = {}
    passes = entry.micro_batches
    if entry.by_estimator:
        estimator = ESTIMATORS.find(selection.estimator)
        found = scoring_memory(selection, _sizes(rank, scaled=_is_scaled(rank)))
        rows |= {what: _taken(taken) for what, taken in found.items()}
        passes = estimator.micro_batches
        if "small_model" in estimator.needs:
            rows["scoring pass"] = _float64_pass(rank)
    if passes:
        graph = "hooks" in selection.needs() or selection.redundancy > 0
        beside = rows["gradients of candidates"].size if "gradients of candidates" in rows else 0
        wide = bool(beside) or (entry.by_estimator and estimator.wide_factors)
        rows["scoring pass"] = _pass(rank, graph, beside, wide)
    for what, taken in found.items():
        if taken.before is not None:  # beyond what takes its place
            later = sum(rows[name].size for name in (*taken.before, "scoring pass") if name in rows)
            rows[what] = rows[what]._replace(split=0, whole=taken.size - later)
    if entry.by_estimator and selection.method != "greats" and rank.config.optim.spec().factored:
        later = sum(rows[name].size for name in ("scoring pass", "sketches") if name in rows)
        making = Row(0, _factored_direction(rank) - later, "fp32, of the largest matrix, whole", (SCORING,))
        rows["direction in the making"] = making
    return {what: row for what, row in rows.items() if row.size > 0}  # what is said beyond other rows may be nothing


def _factored_direction(rank: Rank) -> int:
    """Find the bytes that Adafactor's direction of the largest matrix takes before it is there.

    The whole gradient, its factor and their product; of the average, where there is one, its own part twice.
    """
    everything = rank.config.selection.derived_layers() == "all"
    moved = [weight for weight in rank.weights() if everything or _is_sketched(weight, rank.config)]
    largest = max(moved, key=lambda weight: weight.numel)
    own, gathered = rank.own(largest), rank.splits(largest) and rank.tp > 1
    averaged = 2 * own if rank.config.selection.proxy_decay > 0 else 0
    return 4 * (averaged + (2 + gathered) * largest.numel - own)


def _numbers_row(rank: Rank, width: float, how: str, *phases: str) -> Row:
    """Make a row of ``width`` bytes for every number of the rank's parameters."""
    numbers = rank.numbers()
    return Row(int(width * numbers.split) // rank.tp, int(width * numbers.whole), how, phases or PHASES)


def _proxy(rank: Rank) -> dict[str, Row]:
    """Count the gradient of the proxy batch, its average over steps, and what P_t is made of."""
    selection, config = rank.config.selection, rank.config
    share = selection.proxy_batch_size // rank.dp
    micro = proxy_micro_batch(config, rank.world_size)
    positions = micro * config.data.seq_len // config.parallel.cp
    micro_batches = max(1, share // micro) * (2 if selection.contrast else 1)
    kept, how = _activations(rank, positions, micro_batches)
    work, _ = _work(rank, positions, kept.over(rank.tp), _in_flight(rank, micro_batches))
    rows = {
        "activations of the proxy": _row(rank, kept, how, PROXY),
        "backward pass of the proxy": Row(0, work, "as in training", (PROXY,)),
    }
    sharded, each = _shares_gradients(rank), float(4 / rank.shards)
    if selection.proxy_decay > 0 or selection.proxy_period > 1:
        rows["average of proxy gradients"] = _numbers_row(rank, each, "fp32, kept from step to step")
    if config.engine.name == "deepspeed":
        rows["proxy gradient"] = _numbers_row(rank, each, "fp32", PROXY, SCORING)
    elif sharded and _gathers(selection):
        rows["proxy gradient"] = _numbers_row(rank, each, "fp32, apart from training's gradients", SCORING)
    if sharded and "whole_weights" in selection.needs():
        rows["whole gradient and weights"] = _numbers_row(rank, 8, "fp32, gathered", SCORING)
    return rows | _operator(rank)


def _shares_gradients(rank: Rank) -> bool:
    return rank.config.engine.spec().shards_optimizer(rank.config.parallel)


def _gathers(selection: SelectionConfig) -> bool:
    """Say whether pieces of gradients are put together while scoring."""
    return bool(selection.needs().keys() & {"hooks", "whole_weights"}) or selection.redundancy > 0


def _is_scaled(rank: Rank) -> bool:
    """Say whether the update map multiplies each weight's gradient by a number of its own."""
    spec = rank.config.optim.spec()
    return rank.config.selection.method != "greats" and (spec.map_size is None or spec.matrices)


def _operator(rank: Rank) -> dict[str, Row]:
    """Count what is kept of the optimizer's linear map P_t, where it is asked for many times."""
    selection, optim = rank.config.selection, rank.config.optim
    sketches = selection.estimator == "countsketch" or selection.gram == "countsketch"
    asked = (selection.redundancy > 0 and sketches) or "whole_weights" in selection.needs()
    if selection.method == "greats" or not asked or _shares_gradients(rank):
        return {}
    spec, rows = optim.spec(), {}
    split = whole = 0
    for weight in rank.weights():
        if spec.map_size is not None and (weight.matrix or not spec.matrices):
            columns = weight.columns or 1
            whole += 4 * spec.map_size(weight.numel // columns, columns)
        elif rank.splits(weight):
            split += 4 * rank.own(weight)
        else:
            whole += 4 * weight.numel
    if split + whole:
        how = "fp32, the factor that bounds the direction" if selection.bounded else "fp32, the update's factor"
        rows["update map"] = Row(split, whole, how, (SCORING,))
    return rows


def _sizes(rank: Rank, scaled: bool) -> Sizes:
    config = rank.config
    matrices = [weight for weight in rank.weights() if _is_sketched(weight, config)]
    matrices.sort(key=lambda weight: not weight.name.endswith("embeddings"))
    return Sizes(
        weights=sum(map(rank.own, rank.weights())),
        replicated=int(rank.numbers().whole),
        matrices=[rank.own(weight) for weight in matrices],
        shapes=[(weight.numel // weight.columns, weight.columns) for weight in matrices],
        candidates=_scored_share(config, rank.world_size),
        micro_batch_size=scoring_micro_batch(config, rank.world_size),
        model_width=WIDTH[rank.precision],
        largest=max(map(rank.own, rank.weights())),
        scaled=scaled,
        shards=rank.shards,
        gathers=config.engine.name == "deepspeed" or _gathers_beside(rank),
    )


def _gathers_beside(rank: Rank) -> bool:
    """Say whether factors are put together one at a time, since updates lie where gradients of all would have room."""
    selection = rank.config.selection
    both = selection.estimator == "adjoint" and selection.redundancy > 0
    return rank.shards > 1 and both and selection.method != "greats"


def _taken(taken: Taken) -> Row:
    phases = PHASES if taken.kept else (SCORING,)
    return Row(taken.size - taken.whole, taken.whole, taken.how, phases)


def _pass(rank: Rank, graph: bool, beside: int, wide: bool) -> Row:
    """Count a pass over a micro-batch of candidates; ``graph``: with a backward pass through the activations.

    Once the softmax has gone their gradient is left of the logits, if ``wide`` in fp32 too, and there is what an
    estimator makes of it and of the output layer's inputs. ``beside``: bytes of that which are counted already.
    """
    config, parallel = rank.config, rank.config.parallel
    micro = scoring_micro_batch(config, rank.world_size)
    positions = micro * config.scored_length() // parallel.cp
    last = rank.last
    if not graph:
        of_layers = [activations.without_graph(config, rank.precision, rank.device, kind) for kind in rank.layers()]
        layer = max(each.over(rank.tp) for each in of_layers) * positions
        head = rank.logits(positions, backward=False)[0] if last else 0
        return Row(0, max(int(layer), head), f"{positions:,} positions at a time, without a graph", (SCORING,))
    micro_batches = max(1, _scored_share(config, rank.world_size) // micro)
    kept, how = _activations(rank, positions, micro_batches, scoring=True)
    vocab_bytes = 0
    if last:
        vocab_bytes, each = rank.logits(positions, backward=True)
        left = WIDTH[rank.precision] + 4 * (wide and rank.precision != "fp32")
        made = 0 if beside else 4 * positions * config.model.hidden_size
        vocab_bytes = max(vocab_bytes - beside, vocab_bytes // each * left + made)
        how += f", {each} bytes for each logit"
    work = int(activations.worked_on(config, rank.precision).over(rank.tp) * positions)  # experts are not captured
    return _row(rank, kept, how, SCORING)._replace(whole=int(kept.whole) + max(vocab_bytes, work))


def _float64_pass(rank: Rank) -> Row:
    """Count one candidate's passes in float64, for which CUDA has no attention but by whole matrices."""
    rank = replace(rank, precision="fp64")
    model, length = rank.config.model, rank.config.scored_length()
    kept, _ = _activations(rank, length, 1, scoring=True)
    probabilities = 8 * model.num_heads * length**2 if rank.device == "cuda" else 0
    logits, _ = rank.logits(length, backward=True)
    work = probabilities * model.num_layers + max(logits, 2 * probabilities)
    return Row(0, int(kept.over(1)) + work, "one sequence in float64", (SCORING,))


def _is_sketched(weight: Weight, config: RunConfig) -> bool:
    """Linear matrices (a tied embedding is one); with selection.layers=all the embeddings too."""
    if weight.name == "word_embeddings":
        return config.model.tied or config.selection.layers == "all"
    if weight.name == "position_embeddings":
        return config.selection.layers == "all"
    return weight.matrix or weight.name == "output_layer"


def scoring_micro_batch(config: RunConfig, world_size: int) -> int:
    """Candidates of a scoring pass on each rank: as set, or the most that may be found."""
    pp = config.parallel.pp
    share = _scored_share(config, world_size)
    length = config.scored_length()
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    wanted = config.selection.score_micro_batch_size or most_per_pass(share, length, device)
    return wanted if pp == 1 else max(1, min(wanted, share // (_MOST_MICRO_BATCHES * pp)))


def proxy_micro_batch(config: RunConfig, world_size: int) -> int:
    """Proxy sequences of a pass on each rank: as set, or training's; a run that finds more takes what is free."""
    parallel = config.parallel
    share = config.selection.proxy_batch_size // (world_size // parallel.model_ranks)
    unit = max(1, share // (parallel.pp if parallel.vpp > 1 else 1))
    if (most := config.selection.proxy_micro_batch_size) is None:
        return math.gcd(unit, config.train.micro_batch_size)
    return largest_divisor(unit, min(most, share // parallel.pp))


def _scored_share(config: RunConfig, world_size: int) -> int:
    """Candidates that a rank scores at a time, copies that fill its share up included."""
    return -(-config.num_scored() // (world_size // config.parallel.model_ranks))


def in_micro_batches(selection: SelectionConfig) -> bool:
    """Tell whether scoring passes take ``score_micro_batch_size`` candidates at a time."""
    method = METHODS.get(selection.method)
    if method is not None and method.by_estimator:
        return ESTIMATORS.find(selection.estimator).micro_batches
    return method is not None and method.micro_batches
