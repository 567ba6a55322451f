"""Estimates the memory of a rank from the settings of a run: nothing is built, torch is not imported."""

from __future__ import annotations

from megaopus.config.run_config import RunConfig
from megaopus.models.flops import Weight, count_rank_parameters, padded_vocab, stage_weights
from megaopus.selection.config import most_per_pass
from megaopus.selection.estimators.registry import Sizes, scoring_memory
from megaopus.selection.methods.registry import METHODS


def precisions(config: RunConfig, device: str | None = None) -> list[str]:
    """List the precision of the run; both where it depends on the machine (engine auto).

    ``device``: "cpu" or "cuda", where the run is; None: not known beyond the settings.
    """
    if config.engine.precision != "auto":
        return [config.engine.precision]
    return {"cpu": ["fp32"], "cuda": ["bf16"], "auto": ["fp32", "bf16"]}[device or config.engine.device]


def memory(
    config: RunConfig, vocab_size: int, world_size: int, precision: str, stage: int
) -> dict[str, tuple[int, str]]:
    """Estimate what -> (bytes on one rank of pipeline stage ``stage``, the assumption behind it).

    The framework's own memory, temporary buffers and fragments are not in it.
    """
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
    """Estimate (bytes, what they are) of the state for a rank's ``count`` numbers, unsharded over data-parallel ranks.

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
    """Return what scoring adds on a rank that holds ``weights``."""
    selection, count = config.selection, sum(weight.numel for weight in weights)
    if not selection.needs_proxy:
        return {}
    average = selection.proxy_half_life > 0
    rows = {"proxy gradient": (4 * count * (1 + average), "fp32, with its running average" if average else "fp32")}
    if METHODS.find(selection.method).by_estimator:
        sizes = Sizes(
            weights=count,
            matrices=[weight.numel for weight in weights if _is_sketched(weight, config)],
            candidates=_scored_share(config, world_size),
            micro_batch_size=scoring_micro_batch(config, world_size),
        )
        rows |= scoring_memory(selection, sizes)
    return rows


def _is_sketched(weight: Weight, config: RunConfig) -> bool:
    """Linear matrices (a tied embedding is one); with selection.layers=all the embeddings too."""
    if weight.name == "word_embeddings":
        return config.model.tied or config.selection.layers == "all"
    if weight.name == "position_embeddings":
        return config.selection.layers == "all"
    return weight.matrix or weight.name == "output_layer"


def scoring_micro_batch(config: RunConfig, world_size: int) -> int:
    """Candidates of a scoring pass on each rank: as set, or the most that may be found."""
    share = _scored_share(config, world_size)
    length = config.scored_length()
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    return config.selection.score_micro_batch_size or most_per_pass(share, length, device)


def _scored_share(config: RunConfig, world_size: int) -> int:
    """Candidates that a rank scores at a time, copies that fill its share up included."""
    return -(-config.num_scored() // (world_size // config.parallel.model_ranks))
