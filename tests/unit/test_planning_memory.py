"""The estimate of a rank's memory: by hand, and beside real tensors."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import memory as benchmark
from benchmarks import memory_cpu
from benchmarks.fake_cuda.meter import DeviceMeter
from megaopus.config.run_config import RunConfig
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.models.flops import count_parameters, padded_vocab
from megaopus.optim.registry import OPTIMIZERS
from megaopus.planning.memory import PHASES, PROCESS_ROW, Row, memory, peak, rows_at_peak
from megaopus.selection.estimators.countsketch import AT_ONCE
from tests.harness import LLAMA, TINY, random_batch, tiny_engine

VOCAB = 500


def small(**selection: Any) -> RunConfig:
    config = RunConfig()
    config.train.global_batch_size = 16
    for key, value in selection.items():
        setattr(config.selection, key, value)
    return config


def sizes(config: RunConfig, world_size: int = 1, precision: str = "fp32", stage: int = 0) -> dict[str, int]:
    return {what: row.size for what, row in memory(config, VOCAB, world_size, precision, stage).items()}


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_state() -> None:
    config = small()
    count = count_parameters(config.model, VOCAB, config.data.seq_len)
    matrices = 4 * 12 * 128 * 128
    fp32, bf16 = sizes(config), sizes(config, precision="bf16")
    assert (fp32["weights"], bf16["weights"]) == (4 * count, 6 * count)
    assert fp32["gradients"] == bf16["gradients"] == 4 * count
    assert fp32["optimizer state"] == 8 * count
    config.optim.name = "muon"
    assert sizes(config)["optimizer state"] == 8 * count - 4 * matrices
    config.engine.name, config.selection.method = "deepspeed", "opus"
    rows = sizes(config, 2)
    assert rows["optimizer state"] == 4 * count - 2 * matrices
    assert rows["average of proxy gradients"] == rows["proxy gradient"] == rows["direction"] == 2 * count
    config = small()
    config.parallel.distributed_optimizer = True
    rows = sizes(config, 4, "bf16")
    assert (rows["optimizer state"], rows["weights"]) == (8 * count // 4, 2 * count + 4 * count // 4)


def test_what_a_gpt2_layer_keeps() -> None:
    config = small()
    # bf16 on CUDA, bytes per position and layer: sums and norms 2 x 2 x 2h + 16, q k v 2 x 3h, attention 2h + 4 heads,
    # MLP 2 x 8h; at the ends the embedding's and the final norm's output
    layer = 2 * 4 * 128 + 16 + 6 * 128 + 2 * 128 + 4 * 4 + 16 * 128
    assert sizes(config, precision="bf16")["activations"] == 8 * 256 * (4 * layer + 2 * 2 * 128)
    logits = 8 * 256 * padded_vocab(VOCAB)
    assert sizes(config, precision="bf16")["backward pass"] == logits * 4  # themselves and their gradient
    config.engine.kernels = "eager"  # fp32 log-softmax and two gradients
    assert sizes(config, precision="bf16")["backward pass"] == logits * 12
    config.parallel.tp = 2  # q k v, attention and MLP are split
    layer -= (6 * 128 + 2 * 128 + 4 * 4 + 16 * 128) // 2
    assert sizes(config, 2, "bf16")["activations"] == 8 * 256 * (4 * layer + 2 * 2 * 128)
    config.train.micro_batch_size, config.parallel = 2, ParallelConfig(pp=2)
    plain = [memory(config, VOCAB, 2, "bf16", stage)["activations"].size for stage in (0, 1)]
    entry = 2 * 256 * 2 * 128
    assert plain[0] - 2 * entry == 2 * (plain[1] - 2 * entry)
    config.parallel.vpp = 2  # chunks of half the layers; 5 passes in flight on the first stage, 3 on the last
    chunks = [memory(config, VOCAB, 2, "bf16", stage)["activations"].size for stage in (0, 1)]
    assert 2 * (chunks[0] - 5 * entry) == 5 * (plain[1] - 2 * entry)
    assert 2 * (chunks[1] - 6 * entry) == 3 * (plain[1] - 2 * entry)


def test_what_scoring_holds() -> None:
    config = small(method="opus")
    count = count_parameters(config.model, VOCAB, config.data.seq_len)
    rows = sizes(config, precision="bf16")
    assert rows["average of proxy gradients"] == rows["direction"] == 4 * count
    assert "proxy gradient" not in rows  # it lies where training's does
    assert "weights to restore" not in rows  # they are the main ones, rounded
    assert sizes(config)["weights to restore"] == 4 * count
    config.selection.proxy_half_life = 0.0
    assert "average of proxy gradients" not in sizes(config)
    config.selection.contrast = True
    assert sizes(config) == sizes(replace(config, selection=replace(config.selection, contrast=False)))
    config = small(method="opus", estimator="countsketch", redundancy=1.0, sketch_dim=100)
    matrices = (padded_vocab(VOCAB) + 4 * 12 * 128) * 128
    assert sizes(config, 2)["sketches"] == 4 * (32 // 2) * 100  # their sum over layers
    config.selection.gram_sketch = "per_layer"
    assert sizes(config, 2)["sketches"] == 4 * (32 // 2) * (4 * 4 + 1) * 100
    assert sizes(config)["update map"] == 4 * count > 4 * matrices
    config.optim.name = "sgd"
    assert "update map" not in sizes(config)


def test_what_scoring_holds_where_optimizers_share_the_work() -> None:
    config = small(method="opus")
    config.parallel.distributed_optimizer = True
    count = count_parameters(config.model, VOCAB, config.data.seq_len)
    rows = sizes(config, 4, "bf16")
    assert rows["average of proxy gradients"] == rows["direction"] == 4 * count // 4
    config.selection.estimator = "adjoint"
    rows, matrices = sizes(config, 4, "bf16"), (padded_vocab(VOCAB) + 4 * 12 * 128) * 128
    assert rows["update on the proxy"] == 4 * matrices // 4
    assert rows["proxy gradient"] == 4 * count // 4  # apart from where matrices are put together
    config.parallel.distributed_optimizer, config.engine.name = False, "deepspeed"
    assert sizes(config, 4, "bf16")["matrix put together"] == 4 * padded_vocab(VOCAB) * 128


def test_what_is_there_before_the_pass_counts_beyond_it() -> None:
    config = small(method="opus", estimator="countsketch")
    making = "update in the making"
    assert making not in sizes(config, precision="bf16")  # 52 bytes of a weight of the embedding are less than a pass
    config.selection.score_micro_batch_size, config.data.seq_len = 1, 16
    rows = {what: row.size for what, row in memory(config, 50257, 1, "bf16", 0).items()}
    largest = padded_vocab(50257) * 128
    hashed = 48 * min(AT_ONCE, largest) + 4 * largest
    update = rows["update on the proxy's sketch"]
    assert rows[making] == hashed - rows["sketches"] - update - rows["scoring pass"]
    config = small(method="opus")
    config.optim.name, config.engine.device, config.train.micro_batch_size = "lion", "cuda", 1
    config.data.seq_len = 16
    count = count_parameters(config.model, VOCAB, config.data.seq_len)
    rows = sizes(config, precision="bf16")
    assert rows["update"] == 4 * count - rows["activations"] - rows["backward pass"] > 0
    config.engine.device = "cpu"
    assert "update" not in sizes(config)


def test_the_peak_is_that_of_one_phase() -> None:
    rows = {
        "always": Row(3, 1, ""),
        "training": Row(10, 0, "", (PHASES[0],)),
        "scoring": Row(5, 6, "", (PHASES[2],)),
    }
    assert peak(rows) == (PHASES[2], 15)
    assert rows_at_peak(rows) == {"always": (4, ""), "scoring": (11, "")}


@pytest.mark.parametrize("estimator", ["directional", "adjoint", "countsketch", "kronecker"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_split_rows_add_up_to_the_whole_and_others_are_marked(optimizer: str, estimator: str) -> None:
    config = small(method="opus", estimator=estimator, score_micro_batch_size=1, proxy_batch_size=16)
    config.optim.name, config.model.tied, config.model.num_kv_heads = optimizer, False, 2
    config.train.micro_batch_size = 16  # one micro-batch: no stage keeps those of several
    for tp, pp in ((2, 1), (1, 2), (2, 2), (4, 4)):
        config.parallel = ParallelConfig(tp=tp, pp=pp)
        config.model.num_kv_heads = 4 if tp == 4 else 2
        whole = memory(replace(config, parallel=ParallelConfig()), VOCAB, 1, "bf16", 0)
        stages = [memory(config, VOCAB, tp * pp, "bf16", stage) for stage in range(pp)]
        for what in set(whole).union(*stages) - {"scoring pass"}:  # of which a pipeline has several in flight
            parts = [rows[what] for rows in stages if what in rows]
            split = whole[what].split if what in whole else 0  # what is beyond other rows may be nothing
            assert sum(tp * row.split for row in parts) == split, f"{what} at tp={tp} pp={pp}"
            if split == 0:
                assert all(row.split == 0 for row in parts), f"{what} is marked as split at tp={tp} pp={pp} only"


def test_experts_of_a_rank() -> None:
    """Two expert-parallel ranks have half of the experts each, whole; the rest lies on both."""
    config = small()
    config.model = MOE
    count, experts = count_parameters(MOE, VOCAB, 256), 8 * 3 * 96 * 64 * MOE.num_layers
    config.parallel = ParallelConfig(ep=2)
    assert sizes(config, 2)["weights"] == 4 * (count - experts // 2)
    config.parallel = ParallelConfig(tp=2, ep=2, sequence_parallel=True)
    alone = sizes(config, 2)["weights"]
    config.parallel.expert_tp = 2
    assert alone - sizes(config, 4)["weights"] == 4 * experts // 4
    config.parallel = ParallelConfig(ep=2, distributed_optimizer=True)  # four ranks share the rest, two an expert
    own = (count - experts) // 4 + experts // 2 // 2
    about = pytest.approx  # parts that ranks split, and those that each has, are rounded each
    assert sizes(config, 4)["optimizer state"] == about(8 * own, abs=2)
    assert sizes(config, 4, "bf16")["weights"] == about(2 * (count - experts // 2) + 4 * own, abs=2)
    assert memory(config, VOCAB, 4, "bf16", 0)["weights"].how.endswith("over 4 ranks (experts over 2)")
    config.parallel = ParallelConfig()
    dense = replace(MOE, first_dense_layers=1)
    first, second = sizes(config), sizes(replace(config, model=dense))
    layer = MOE.hidden_size * (3 * MOE.derived_ffn() - 8 * 3 * 96 - 3 * 32 - 8)
    assert second["weights"] - first["weights"] == 4 * layer


# -- beside what was measured ------------------------------------------------------------------------------------------


def test_estimates_lie_within_bounds_of_what_was_measured() -> None:
    """Every fifth cell of benchmarks/results/memory.jsonl: a formula that changes must still fit."""
    measured, shapes = benchmark.read(benchmark.RESULTS), benchmark.every_shape()
    nothing = {"stages": {}}
    absent = {
        (name, layout): left
        for name, layout in benchmark.cells(shapes)
        if (left := benchmark.missing(shapes[name], layout, measured.get((name, layout), nothing)))
    }
    assert not absent
    found = list(itertools.islice(benchmark.ratios(measured), 0, None, 5))
    outside = [each for each in found if not _fits(each)]
    assert not outside


def _fits(cell: tuple[str, str, str, int, int, int]) -> bool:
    return benchmark.LOW <= cell[5] / cell[4] <= benchmark.HIGH


def test_fake_tensors_take_what_real_ones_do() -> None:
    """By benchmarks/results/memory_cpu.jsonl."""
    rows = [json.loads(line) for line in memory_cpu.RESULTS.read_text().splitlines()]
    assert [row["selection"] for row in rows] == list(memory_cpu.SELECTIONS)
    for row in rows:
        found = memory(memory_cpu.config_of(row["selection"]), memory_cpu.SHAPE.vocab_size, 1, "fp32", 0, "cpu")
        del found[PROCESS_ROW]
        assert abs(row["fake"] / row["real"] - 1) < 1e-4
        assert benchmark.LOW <= peak(found)[1] / row["real"] <= benchmark.HIGH


# -- beside tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "moe"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_an_optimizer(name: str, kind: str) -> None:
    config = small()
    config.model, config.data.seq_len, config.optim.name = {"gpt2": TINY, "moe": MOE}[kind], 16, name
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        engine = tiny_engine(mesh, model=config.model, optim=config.optim)
        engine.train_step(random_batch(8, 0))
        state = [value for each in engine.optimizer.states() for key, value in each.state.items() if key != "step"]
    finally:
        mesh.close()
    found = sum(value.numel() * value.element_size() for value in state)
    handful = 4 * sum(value.numel() == 1 for value in state)
    assert found - handful == memory(config, 128, 1, "fp32", 0)["optimizer state"].size


MOE = replace(LLAMA, hidden_size=64, num_experts=8, expert_ffn_hidden_size=96, shared_expert_ffn_hidden_size=32)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "moe"])
def test_real_tensors_of_a_training_step_on_cpu(kind: str) -> None:
    config = small()
    config.model = replace({"gpt2": TINY, "llama": LLAMA, "moe": MOE}[kind], num_layers=4)
    config.engine.device, config.data.seq_len, config.train.micro_batch_size = "cpu", 64, 4
    config.train.global_batch_size = 8
    mesh = Mesh(ParallelConfig(), "cpu")
    meter = DeviceMeter("cpu")
    try:
        with meter:
            engine = tiny_engine(mesh, model=config.model, seq_len=64, micro_batch_size=4)
            for step in range(2):
                meter.reset_peak()
                engine.train_step(random_batch(8, step, seq_len=64))
    finally:
        mesh.close()
    rows = memory(config, 128, 1, "fp32", 0)
    del rows[PROCESS_ROW]
    assert benchmark.LOW <= peak(rows)[1] / meter.peak <= benchmark.HIGH
