"""The engine's CUDA branch, run on fake CUDA tensors without a GPU: what it asks of the device is pinned.

The numbers are in tests/fixtures/fake_cuda.json. Where a change is meant to move them, write them anew with
``python -m tests.exact.fake_cuda_runs`` and look at the difference: it is what the change does on a GPU.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.fake_cuda.device import fake_ranks, fake_tensors, missing
from benchmarks.fake_cuda.estimate import estimate, row
from benchmarks.fake_cuda.measure import fake_job, measure
from benchmarks.gpu_shapes import Case
from megaopus import build
from megaopus.config.run_config import RunConfig
from megaopus.distributed.determinism import deterministic_torch
from megaopus.errors import ConfigError
from megaopus.optim.registry import OPTIMIZERS
from tests.exact.fake_cuda_runs import (
    EXPERTS,
    FIXTURE,
    RENEW,
    RUNS,
    SHARED,
    VOCAB,
    Run,
    estimated,
    experts,
    launches,
    layout,
    optimizer,
    plain,
    saved,
)
from tests.pool import Pool

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no fake CUDA device: {missing()}")
VERSION = torch.__version__.split("+")[0]
PINNED = json.loads(FIXTURE.read_text())
LATEST = max(PINNED, key=lambda version: [int(part) for part in version.split(".")])
BY_VERSION = ("launches", "pass_launches", "flops")
"""What torch's own composition of operations decides as well."""
WITHIN = 0.15
"""How far ``check`` may be off."""


def hold(found: dict[str, Any], kind: str, name: str) -> None:
    """Compare one case's counts with those that are pinned."""
    pinned = PINNED.get(VERSION, PINNED[LATEST])[kind][name]
    hint = f"if the change is meant: {RENEW}, and look at the difference"
    for step, expected in pinned["work"].items():
        for what, value in expected.items():
            if VERSION in PINNED or what not in BY_VERSION:
                assert found["work"][step][what] == value, f"{what} of {step} at {name}; {hint}"
    if VERSION in PINNED:
        assert found["peaks"] == pinned["peaks"], f"peak bytes at {name}; {hint}"


def hold_estimate(found: dict[str, Any], run: Run) -> None:
    """Compare ``check``'s estimates with the peaks of a rank."""
    guesses = estimated(run)
    off = {step: guesses[step] / true for step, true in found["peaks"].items() if step in guesses}
    assert all(abs(ratio - 1) <= WITHIN for ratio in off.values()), f"check's estimate over what is true: {off}"


@pytest.mark.parametrize("name", RUNS)
def test_a_layout_asks_of_the_device_what_is_pinned(pool: Pool, name: str) -> None:
    (found,) = pool.run(1, layout, name)
    hold(found, "layouts", name)
    hold_estimate(found, RUNS[name])


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_ask_of_the_device_what_is_pinned(pool: Pool, name: str) -> None:
    """Tokens go to the ranks of their experts and back: of each layer and micro-batch, both with their gradients."""
    (found,) = pool.run(1, experts, name)
    hold(found, "experts", name)
    hold_estimate(found, EXPERTS[name])
    run, work = EXPERTS[name], found["work"]["train"]
    passes = run.model.num_layers * run.micro_batches
    sent = [count for key, (count, _) in work["messages"].items() if "all-to-all" in key]
    # tokens, their weights, and what experts made of them; forth and back
    assert sent == ([2 * 3 * passes] if run.ranks > 1 else [])
    # beside the wait of every update: for how many tokens each expert gets
    assert (sum(work["reads"].values()), sum(work["waits"].values())) == (1, passes)


@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_once_a_step(name: str) -> None:
    """Of what is pinned: where all that is to be known is read, once it is summed over all ranks."""
    for step, work in PINNED[LATEST]["layouts"][name]["work"].items():
        world = {key: count for key, (count, _) in work["messages"].items() if " world/" in key and "reduce" in key}
        assert work["waits"] == {}
        if step != "exact":  # in float64, for tests
            assert work["copies_in"] == {}
        # a Gram matrix is brought to all ranks besides; and how far to go along a step is known before it is gone
        assert sum(work["reads"].values()) == (2 if step == "gram" else 1), step
        assert sum(world.values()) <= (2 if step == "directional" else 1), step


def test_a_scoring_launches_little_but_its_passes(pool: Pool) -> None:
    """Of passes: forward and backward ones of proxy and pool, forward ones of the candidates moved forth and back."""
    kernels, of_passes = pool.run(1, launches)[0]
    assert kernels <= 1.2 * of_passes
    assert kernels - of_passes <= 75  # however many parameters there are, up to the numbers that a kernel takes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_asks_of_the_device_what_is_pinned(pool: Pool, name: str) -> None:
    (found,) = pool.run(1, optimizer, name)
    hold(found, "optimizers", name)


def test_every_layout_puts_the_same_tensors_into_a_checkpoint(pool: Pool) -> None:
    whole, stage, *parts = pool.run(1, _saved, [RUNS["1"], RUNS["pp4"], *SHARED])[0]
    state = [{key for key in part if key.startswith(("optimizer.", "average."))} for part in parts]
    assert all(state)
    assert not state[0] & state[1], "each saves its own"
    assert parts[0] | parts[1] == whole
    assert "optimizer.state.exp_avg_sq.decoder.layers.mlp.linear_fc1.weight" in whole
    assert whole["average.embedding.word_embeddings.weight"] == [[2048, 128], "torch.float32"]
    # its model is deeper: layers lie along the first axis
    deeper = {key: [[4, *shape[1:]], kind] for key, (shape, kind) in whole.items() if "decoder.layers." in key}
    assert stage.items() <= {**whole, **deeper}.items()
    split, alone = pool.run(1, _saved, [RUNS["tp8 sp"], RUNS["cp2"]])[0]
    assert split == alone


def _saved(runs: list[Run]) -> list[dict[str, Any]]:
    return [saved(run) for run in runs]


def _row() -> dict[str, Any]:
    case = Case(model={"num_layers": 2, "hidden_size": 128, "num_heads": 8}, vocab_size=VOCAB, seq_len=64, **_BATCHES)
    return row("tiny", case, [estimate(case, 0)])


_BATCHES: dict[str, Any] = {"micro": 1, "micro_batches": 2, "ranks": 4, "parallel": {"distributed_optimizer": True}}
FIELDS = ("shape", "layout", "estimator", "optimizer", "train_peak_gib", "score_peak_gib", "launches", "host_reads")


def test_the_gpu_benchmark_makes_a_row_of_estimates(pool: Pool) -> None:
    (found,) = pool.run(1, _row)
    assert tuple(found)[:9] == (*FIELDS, "mfu_ceiling")
    assert (found["layout"], found["estimator"], found["estimate"]) == ("dp4 zero", "directional", True)
    assert found["launches"] == found["train_launches"] + found["score_launches"] > 0
    assert 0 < found["mfu_ceiling"] < 1
    assert json.loads(json.dumps(found)) == found


def _repeating(
    name: str, optimizer: str, selections: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Return what training and each scoring ask of the device with engine.deterministic, and training's kernels."""
    warnings.simplefilter("ignore")
    run = RUNS[name]
    config = replace(run, engine={"deterministic": True}).config(optimizer)
    with fake_job(config, run.rank, run.ranks) as (mesh, meter):
        assert mesh.deterministic
        found = measure(config, VOCAB, mesh, meter, {each: run.selection(each) for each in selections})
    works = {"train": found.train_work, **found.score_work}
    return {step: plain(work) for step, work in works.items()}, found.train_work.launches


@pytest.mark.parametrize(
    ("name", "optimizer", "selections"),
    [("1", "adamw", ("countsketch", "gram")), ("tp8 sp", "sophia_g", ("directional",))],
)
def test_every_operation_has_a_form_that_repeats_itself(
    pool: Pool, name: str, optimizer: str, selections: tuple[str, ...]
) -> None:
    """The meter raises, as torch does, where there is none; tables of embeddings are megatron's indexed ones."""
    works, kernels = pool.run(1, _repeating, name, optimizer, selections)[0]
    pinned = PINNED[LATEST]["layouts"][name]["work"]
    assert works.keys() == {"train", *selections}
    for step, found in works.items():
        assert (found["reads"], found["waits"]) == (pinned[step]["reads"], {})
    assert kernels["index_put"] > 0


def _unsteady() -> list[str]:
    refused = []
    with fake_tensors("cuda"), deterministic_torch():
        numbers, places = torch.rand(8, device="cuda"), torch.arange(8, device="cuda")
        places.cumsum(0), numbers.index_add_(0, places, numbers), numbers.sum()
        calls = {
            "cumsum": lambda: numbers.cumsum(0),
            "put_": lambda: numbers.put_(places, numbers),
        }
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f"{name} on CUDA does not have a deterministic"):
                call()
            refused.append(name)
    return refused


def test_the_meter_refuses_what_does_not_repeat_itself(pool: Pool) -> None:
    assert pool.run(1, _unsteady)[0] == ["cumsum", "put_"]


def _flash_peaks() -> list[int]:
    """Bytes that attention's backward pass takes at its peak, for 2 sequences of 4 heads, and for 200 of them."""
    found = []
    for deterministic in (nullcontext, deterministic_torch):
        for batch in (2, 200):
            with fake_tensors("cuda") as meter, deterministic():
                shape = (batch, 4, 256, 64)
                q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in "qkv")
                loss = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum()
                meter.reset_peak()
                loss.backward()
                found.append(meter.peak // q.numel())
    return found


def test_attention_that_repeats_itself_keeps_a_sum_for_every_block(pool: Pool) -> None:
    few, many, few_repeating, many_repeating = pool.run(1, _flash_peaks)[0]
    assert (few, many_repeating) == (many, many)
    assert few_repeating == 4 * 2 + 17 * 4  # q, k, v and their context in 16 bits; 132 multiprocessors over 2 x 4 heads


def _begun_with(name: str, value: str, run_dir: Path) -> tuple[str, bool]:
    config = RunConfig(run_dir=str(run_dir))
    config.engine.deterministic, config.engine.device = True, "cuda"
    with fake_ranks(0, 1), fake_tensors("cuda"), mock.patch.dict(os.environ, {name: value}):
        with pytest.raises(ConfigError) as raised:
            build.train(config, take_signals=False)
        return str(raised.value), dist.is_initialized()


def test_a_variable_that_lets_cuda_differ_is_told_before_anything_is_written(pool: Pool, tmp_path: Path) -> None:
    said, alive = pool.run(1, _begun_with, "CUBLAS_WORKSPACE_CONFIG", ":0:0", tmp_path / "run")[0]
    assert "CUBLAS_WORKSPACE_CONFIG = ':0:0': engine.deterministic=true needs :4096:8 or :16:8" in said
    assert "unset it" in said
    assert not alive
    assert not (tmp_path / "run").exists()


MIXED: dict[str, Callable[[], Any]] = {
    "add": lambda: torch.ones(2, device="cuda") + torch.ones(2),
    "mm": lambda: torch.ones(2, 2, device="cuda") @ torch.ones(2, 2),
    "cat": lambda: torch.cat([torch.ones(2, device="cuda"), torch.ones(2)]),
    "where": lambda: torch.where(torch.ones(2, device="cuda") > 0, 1.0, torch.ones(2)),
    "_foreach_add_": lambda: torch._foreach_add_([torch.ones(2, device="cuda")], [torch.ones(2)]),
    "all_reduce": lambda: dist.all_reduce(torch.ones(2)),
}


def _refused(name: str) -> str | None:
    with fake_ranks(0, 2), fake_tensors("cuda"):
        dist.init_process_group("nccl")
        try:
            torch.ones(2, device="cuda") + torch.tensor(1.0)  # a number may come from the host
            MIXED[name]()
        except RuntimeError as error:
            return str(error)
        finally:
            dist.destroy_process_group()
    return None


def test_an_operation_that_mixes_device_and_host_raises(pool: Pool) -> None:
    assert [name for name in MIXED if pool.run(1, _refused, name)[0] is None] == []


def _reads() -> dict[str, int]:
    with fake_tensors("cuda") as meter:
        value = torch.arange(6, device="cuda") * 2
        assert (value.tolist(), int(value[4]), value.nonzero().shape) == ([0, 2, 4, 6, 8, 10], 8, (5, 1))
        values = torch.rand(100, device="cuda")
        float(values.sum()), values.cpu(), values[values > 0.5], values.to("cpu", non_blocking=True)
        reads = sum(meter.work.reads.values())
        torch.tensor([1.0], device="cuda"), torch.ones(3).to("cuda", non_blocking=True), values[torch.arange(3)]
        torch.cuda.synchronize(), torch.cuda.Event().synchronize(), torch.cuda.Stream().synchronize()
        launches = meter.work.kernels()
        parameters = [torch.empty(1000, device="cuda") for _ in range(65)]
        torch._foreach_add_(parameters, parameters)
        parameters[0].view(10, 100)[3].t()
        return {
            "reads": reads,
            "copies_in": sum(meter.work.copies_in.values()),
            "waits": sum(meter.work.waits.values()),
            "foreach": meter.work.kernels() - launches,
        }


def test_the_meter_counts_what_makes_the_host_wait(pool: Pool) -> None:
    (found,) = pool.run(1, _reads)
    # tolist, int, nonzero; float, cpu, a mask; a list of numbers and a host's index that go to the device
    assert found == {"reads": 6, "copies_in": 2, "waits": 3, "foreach": 2}


def _messages() -> tuple[dict[str, list[int]], int, float]:
    with fake_ranks(5, 16), fake_tensors("cuda") as meter:
        dist.init_process_group("nccl")
        group = dist.new_group(list(range(4, 8)), group_desc="SOME_GROUP")
        whole, part = torch.zeros(1024, device="cuda"), torch.zeros(256, device="cuda")
        dist.all_reduce(whole)
        dist.all_reduce(whole, group=group)
        dist.all_gather_into_tensor(whole, part, group=group)
        dist.reduce_scatter_tensor(part, whole, group=group)
        dist.all_gather(list(whole.split(256)), part, group=group)
        dist.broadcast(part, src=4, group=group)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, part, 6), dist.P2POp(dist.irecv, part, 4)]):
            work.wait()
        dist.destroy_process_group()
        work = meter.work
        products = torch.ones(64, 32, dtype=torch.bfloat16, device="cuda") @ torch.ones(
            32, 16, dtype=torch.bfloat16, device="cuda"
        )
        assert products.shape == (64, 16)
        found = {str(key): [count, work.sizes[key], work.sent[key]] for key, count in work.messages.items()}
        return found, work.world_reductions(), work.flops["products", torch.bfloat16]


def test_the_meter_counts_messages_by_their_group_and_what_a_ring_sends(pool: Pool) -> None:
    found, world, flops = pool.run(1, _messages)[0]
    assert found == {
        "all-reduce world/16": [1, 4096, 7680],
        "all-reduce some/4": [1, 4096, 6144],
        "all-gather some/4": [2, 8192, 6144],
        "reduce-scatter some/4": [1, 4096, 3072],
        "broadcast some/4": [1, 1024, 1024],
        "send world/16": [1, 1024, 1024],
        "receive world/16": [1, 1024, 0],
    }
    assert world == 1
    assert flops == 2 * 64 * 32 * 16
