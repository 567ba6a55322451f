"""Turns what was counted on a fake device into a row of estimates for one model at one layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.fake_cuda import roofline
from benchmarks.fake_cuda.measure import fake_job, measure
from benchmarks.fake_cuda.work import Work
from benchmarks.gpu_shapes import PRESET, Case
from megaopus.models.flops import training_flops_per_token

GIB = 2**30


def estimate(case: Case, stage: int) -> dict[str, Any]:
    """Run one rank of pipeline stage ``stage`` on fake tensors: what it takes and asks of its device."""
    config = case.config()
    with fake_job(config, stage * case.ranks // config.parallel.pp, case.ranks) as (mesh, meter):
        found = measure(config, case.vocab_size, mesh, meter, {PRESET: config.selection})
    train, score = found.train_work, found.score_work[PRESET]
    result = {
        "parameters": found.parameters,
        "held_bytes": found.held,
        "train_peak_bytes": found.training,
        "score_peak_bytes": found.scoring[PRESET],
        "kept_by_scoring_bytes": found.kept[PRESET],
    }
    for name, work in (("train", train), ("score", score)):
        result |= {f"{name}_{key}": value for key, value in counts(work).items()}
    return result


def counts(work: Work) -> dict[str, Any]:
    """Plain values of what was counted."""
    kinds: Counter[str] = Counter()
    for (kind, dtype), flops in work.flops.items():
        kinds[f"{kind} {str(dtype).removeprefix('torch.')}"] += flops
    return {
        "launches": work.kernels(),
        "pass_launches": work.pass_launches,
        "host_reads": sum(work.reads.values()),
        "reads": dict(work.reads),
        "waits": dict(work.waits),
        "copies_in": dict(work.copies_in),
        "world_reductions": work.world_reductions(),
        "messages": {str(key): count for key, count in work.messages.items()},
        "message_bytes": {str(key): size for key, size in work.sizes.items()},
        "message_sent_bytes": {str(key): sent for key, sent in work.sent.items()},
        "sent_bytes": sum(work.sent.values()),
        "flops": dict(kinds),
        "moved_bytes": sum(work.moved.values()),
        "seconds": dict(work.seconds),
        "parts": dict(work.parts),
    }


def row(name: str, case: Case, stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put together the row of a case out of its stages: the most that one of them takes."""
    config = case.config()
    parallel, dp = config.parallel, case.ranks // config.parallel.model_ranks
    fullest = max(stages, key=lambda each: sum(each["train_seconds"].values()))
    bubble = roofline.bubble(parallel.pp, case.micro_batches, parallel.vpp)
    parts = fullest["train_parts"] | {
        kind: seconds for kind, seconds in fullest["train_seconds"].items() if kind in ("messages", "from the host")
    }
    seconds = (1 + bubble) * sum(fullest["train_seconds"].values())
    tokens = config.train.global_batch_size * case.seq_len
    flops = tokens * training_flops_per_token(config.model, case.vocab_size, case.seq_len) / case.ranks

    def most(key: str) -> Any:
        return max(each[key] for each in stages)

    return {
        "shape": name,
        "layout": case.layout,
        "estimator": config.selection.estimator,
        "optimizer": case.optimizer,
        "train_peak_gib": most("train_peak_bytes") / GIB,
        "score_peak_gib": most("score_peak_bytes") / GIB,
        "launches": most("train_launches") + most("score_launches"),
        "host_reads": most("train_host_reads") + most("score_host_reads"),
        "mfu_ceiling": flops / seconds / roofline.BF16_FLOPS,
        "estimate": True,
        "how": "fake CUDA tensors; times: an H100 80GB SXM's data sheet, messages that nobody waits for"
        " hidden behind work, and a pipeline's bubble. launches, host_reads: of one training step and one scoring",
        "torch": torch.__version__,
        "selection": PRESET,
        "ranks": case.ranks,
        "dp": dp,
        "seq_len": case.seq_len,
        "micro_batch_size": case.micro,
        "micro_batches": case.micro_batches,
        "score_micro_batch_size": config.selection.score_micro_batch_size,
        "proxy_micro_batch_size": config.selection.proxy_micro_batch_size,
        "scored": config.num_scored(),
        "proxy_batch_size": config.selection.proxy_batch_size,
        "bubble": bubble,
        "train_s": seconds,
        "train_parts": parts,
        "score_s": max(sum(each["score_seconds"].values()) for each in stages),
        **{f"{which}_{key}": most(f"{which}_{key}") for which in ("train", "score") for key in _LARGEST},
        **{f"{which}_sent_gib": most(f"{which}_sent_bytes") / GIB for which in ("train", "score")},
        "parameters": most("parameters"),
        "stages": list(stages),
    }


_LARGEST = ("launches", "pass_launches", "host_reads", "world_reductions", "sent_bytes")
