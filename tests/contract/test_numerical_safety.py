"""A loss or gradient that is not finite, and a gradient far too large: skipped by every rank, told, at last stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.errors import EngineError
from megaopus.optim.config import OptimConfig
from tests.exact.resume_runs import SELECTIONS, assert_same, choices, everything, rows, settings, train
from tests.faults import Interrupted, at_step, interrupt
from tests.harness import random_batch, state_of, tiny_engine
from tests.pool import Pool

CHOSEN = [*SELECTIONS["directional"], "train.spike_factor=5", "train.spike_window=8", "checkpoint.every=2"]


@contextmanager
def in_training(steps: dict[int, Callable[[MegatronEngine, torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Do something to the gradients or losses of training passes of these steps."""
    original = MegatronEngine.run_local

    def faulty(self: MegatronEngine, *args: Any, forward_only: bool) -> torch.Tensor:
        losses = original(self, *args, forward_only=forward_only)
        fault = None if forward_only else steps.get(self.step)
        return losses if fault is None else fault(self, losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MegatronEngine, "run_local", faulty)
        yield


def scaled(factor: float) -> Callable[[MegatronEngine, torch.Tensor], torch.Tensor]:
    def fault(engine: MegatronEngine, losses: torch.Tensor) -> torch.Tensor:
        for _, parameter in engine.named_parameters():
            parameter.main_grad.mul_(factor)
        return losses

    return fault


def nan_gradient(engine: MegatronEngine, losses: torch.Tensor) -> torch.Tensor:
    next(iter(engine.named_parameters()))[1].main_grad.view(-1)[3] = math.nan
    return losses


def infinite_loss(engine: MegatronEngine, losses: torch.Tensor) -> torch.Tensor:
    return losses.index_fill(0, torch.tensor([1]), math.inf)


FAULTS = {3: nan_gradient, 5: infinite_loss, 7: scaled(1e4)}
SAID = {3: "gradient not finite", 5: "loss not finite", 7: "(5 times the median)"}
KINDS = {3: "gradient_not_finite", 5: "loss_not_finite", 7: "spike"}


def skipped_by_kind(run: Path) -> dict[int, str]:
    """Step -> what was wrong, as events.jsonl has it."""
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = {row["step"]: row["event"]["kind"] for row in told if row["event"]["kind"].startswith("update.skipped.")}
    return {step: kind.removeprefix("update.skipped.") for step, kind in kinds.items()}


def test_a_bad_update_is_skipped_and_the_run_goes_on(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_training(FAULTS):
        assert train(settings(tiny_corpus, tmp_path / "straight", *CHOSEN)) == 0
        said = capsys.readouterr().out
        again = settings(tiny_corpus, tmp_path / "killed", *CHOSEN)
        for last in (4, 6, 9):  # after a skipped update, too: the checkpoint knows the norms and the count
            with at_step(last, interrupt), pytest.raises(Interrupted):
                train(again)
        assert train(again) == 0
    assert_same(everything(tmp_path / "killed"), everything(tmp_path / "straight"))
    metrics = {row["step"]: row for row in rows(tmp_path / "straight" / "metrics.jsonl") if row["kind"] == "step"}
    assert [step for step, row in metrics.items() if row["skipped"]] == list(FAULTS)
    assert metrics[7]["grad_norm"] > 1e3
    assert skipped_by_kind(tmp_path / "killed") == skipped_by_kind(tmp_path / "straight") == KINDS
    picked = {
        step: [row["id"] for row in buffer if row["picked"]] for step, buffer in choices(tmp_path / "straight").items()
    }
    for step, reason in SAID.items():
        (line,) = [line for line in said.splitlines() if f"WARNING step {step}: " in line]
        assert reason in line
        assert reason in metrics[step]["skip_reason"]
        assert sorted(json.loads(line.split("update skipped; ids ")[1].split("]")[0] + "]")) == sorted(picked[step])


def test_gradients_that_stay_large_are_trained_on(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [*CHOSEN, "train.max_skipped=4"]
    with in_training(dict.fromkeys(range(5, 99), scaled(1e4))):
        assert train(settings(tiny_corpus, tmp_path / "clipped", *chosen)) == 0
        said = capsys.readouterr().out
        with pytest.raises(EngineError, match="4 updates in a row were skipped, the last of them 9"):
            train(settings(tiny_corpus, tmp_path / "bare", *chosen, "optim.clip_grad=0"))
    metrics = {row["step"]: row for row in rows(tmp_path / "clipped" / "metrics.jsonl") if row["kind"] == "step"}
    assert [step for step, row in metrics.items() if row["skipped"]] == [5, 6, 7]
    assert list(skipped_by_kind(tmp_path / "clipped").values()) == ["spike", "spike", "spikes_in_a_row"]
    assert "WARNING step 7: " in said
    assert "3 in a row: from here on they are trained on" in said


def test_a_run_that_only_skips_stops_and_names_the_last_checkpoint(tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = settings(tiny_corpus, tmp_path, "train.max_skipped=3")
    last = tmp_path / "checkpoints" / "step_00000004"
    with in_training(dict.fromkeys(range(4, 99), nan_gradient)):
        for _ in range(2):  # the count does not begin again with a restart
            with pytest.raises(EngineError, match=r"3 updates in a row were skipped, the last of them 7") as caught:
                train(overrides)
            assert f"last good checkpoint: {last}." in str(caught.value)
    assert train(overrides) == 0  # what went wrong is gone
    assert [json.loads(line)["step"] for line in (tmp_path / "selection.jsonl").read_text().splitlines()] == [
        *range(10)
    ]


def on_two_ranks() -> list[tuple[bool, bool]]:
    """On each rank, for each fault of rank 1 alone: whether the update was applied, whether a weight changed."""
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        engine = tiny_engine(mesh)
        found = []
        for fault in (None, nan_gradient, infinite_loss, scaled(1e6)):
            faults = {} if fault is None or mesh.rank == 0 else {engine.step: fault}
            before = state_of(engine)
            with in_training(faults):
                limit = math.inf if fault in (None, nan_gradient, infinite_loss) else 1e3
                applied = engine.train_step(random_batch(8, 0), limit).applied
            after = state_of(engine)
            same = len(before) == len(after) and all(map(torch.equal, before, after))
            found.append((applied, not same))
        return found
    finally:
        mesh.close()


def test_all_ranks_act_alike(pool: Pool) -> None:
    assert pool.run(2, on_two_ranks) == [[(True, True), (False, False), (False, False), (False, False)]] * 2


def deepspeed_skips() -> list[str]:
    """Return what is wrong, on this rank, with a step above the limit and the one after it, at every stage."""
    wrong: list[str] = []
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "fp32")):  # each takes its norm elsewhere
            config = EngineConfig(name="deepspeed", device="cpu", precision=precision, zero_stage=stage)
            engine = tiny_engine(mesh, engine=config, optim=OptimConfig(lr=1e-3))
            norm = engine.train_step(random_batch(8, 0)).grad_norm
            before = state_of(engine)
            skipped = engine.train_step(random_batch(8, 0), limit=norm / 100)
            held = all(map(torch.equal, before, state_of(engine)))
            again = engine.train_step(random_batch(8, 0), limit=norm * 100)
            moved = not all(map(torch.equal, before, state_of(engine)))
            expected = {
                "skipped": not skipped.applied and math.isfinite(skipped.grad_norm) and held,
                "applied": again.applied and moved,
                "nothing of the skipped gradient is left": again.grad_norm == skipped.grad_norm,
                "timed": min(skipped.own_s, again.own_s) > 0,
            }
            wrong += [f"stage {stage}: not {what}" for what, true in expected.items() if not true]
    finally:
        mesh.close()
    return wrong


def test_deepspeed_skips_too(pool: Pool) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an optional extra (megaopus[deepspeed])")
    assert pool.run(2, deepspeed_skips) == [[], []]
