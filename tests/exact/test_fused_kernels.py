"""Fused kernels, and gradients summed over ranks bucket by bucket, train and score as torch's own one after another.

What torch.compile is given runs as it is here, but for one test: to compile it takes longer than all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.errors import EngineError
from megaopus.models import fused
from tests.exact.scoring_runs import relative_error, select
from tests.exact.test_engine_layouts import Case, assert_close, build, train
from tests.harness import random_batch, tiny_engine
from tests.pool import Jobs, Pool

FUSED = EngineConfig(device="cpu", precision="fp32", kernels="fused")
EAGER = EngineConfig(device="cpu", precision="fp32")
LLAMA, GPT2, DEEP = ("llama", "adamw"), ("gpt2", "adamw"), ("gpt2-4-layers", "adamw")
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, ParallelConfig, list[Case]]] = {
    "1": (1, ParallelConfig(), [LLAMA, GPT2]),
    "dp2": (2, ParallelConfig(**OVERLAP), [LLAMA, GPT2]),
    "tp2-sequence-parallel": (2, ParallelConfig(tp=2, sequence_parallel=True), [LLAMA, GPT2]),
    "dp2-tp2": (4, ParallelConfig(tp=2, **OVERLAP), [LLAMA]),
    "dp2-cp2-distributed-optimizer": (4, ParallelConfig(cp=2, distributed_optimizer=True, **OVERLAP), [GPT2]),
    "dp2-pp2-vpp2-distributed-optimizer": (
        4,
        ParallelConfig(pp=2, vpp=2, distributed_optimizer=True, **OVERLAP),
        [DEEP],
    ),
}
BOUNDS = {"directional": 1e-3, "adjoint": 1e-5}
"""Of relative errors: one by losses at weights that are moved by a step so small that rounding is seen in them, one by
backward passes that leave training's gradients alone."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let fused functions run as they are inside, and a bucket hold no more than a matrix or two."""
    changes = {
        "megaopus.models.fused.compiled": lambda function: function,
        "megaopus.engine.base.missing_compiler": lambda on_cpu: None,
        "megaopus.engine.megatron.passes._BUCKET": 4000,
    }
    patches = [mock.patch(name, change) for name, change in changes.items()]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def trained(layout: str, kind: EngineConfig) -> dict[Case, dict[str, dict[str, Tensor]]]:
    """Return what training gives, and utilities of candidates after it."""
    _, parallel, cases = LAYOUTS[layout]
    mesh = Mesh(parallel, "cpu")
    try:
        with uncompiled():
            return {case: train_and_score(build(mesh, case, parallel, kind)) for case in cases}
    finally:
        mesh.close()


def train_and_score(engine: Any) -> dict[str, dict[str, Tensor]]:
    found = train(engine)
    found["utilities"] = {each: select(engine, estimator=each) for each in BOUNDS}
    return found


@pytest.fixture(scope="module")
def eager(pool: Pool) -> dict[Case, dict[str, dict[str, Tensor]]]:
    """Return what one process finds by torch's own kernels."""
    found = {}
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        for case in (LLAMA, GPT2, DEEP):
            found[case] = train_and_score(build(mesh, case, ParallelConfig(), EAGER))
    finally:
        mesh.close()
    return found


@pytest.fixture(scope="module")
def ranks(pool: Pool, selected: Callable[[str], list[str]]) -> Jobs[str]:
    sizes = {layout: size for layout, (size, _, _) in LAYOUTS.items()}
    return pool.jobs(sizes, trained, FUSED).begin(selected("layout"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_training_and_scoring_equal_eager_ones_of_one_process(
    layout: str, ranks: Jobs[str], eager: dict[Case, dict[str, dict[str, Tensor]]]
) -> None:
    for found in ranks[layout]:
        for case in LAYOUTS[layout][2]:
            expected = {kind: values for kind, values in eager[case].items() if kind != "utilities"}
            assert_close(found[case], expected, (layout, case))
            for name, bound in BOUNDS.items():
                error = relative_error(found[case]["utilities"][name], eager[case]["utilities"][name])
                assert error < bound, f"{layout} {case} {name}: relative error {error:.1e}"


def test_gradients_are_summed_while_others_are_computed(pool: Pool) -> None:
    for found in pool.run(2, sums_begun):
        assert found["buckets"] > 2
        assert found["begun in the backward pass"] == found["buckets"]
        assert found["begun while candidates are scored by ghosts"] == 0


def sums_begun() -> dict[str, int]:
    """Buckets, and how many of them were begun to be summed before the last gradient was there."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    parallel = ParallelConfig(**OVERLAP)
    mesh = Mesh(parallel, "cpu")
    begun = 0
    begin = Group.start_grad_sync

    def noted(group: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal begun
        begun += 1
        begin(group, *args, **kwargs)

    try:
        with uncompiled(), mock.patch.object(Group, "start_grad_sync", noted):
            engine = build(mesh, GPT2, parallel, FUSED)
            engine.train_step(random_batch(8, 0))  # in which megatron learns how often each gradient comes
            before = begun
            finalize, at_end = engine._reduce_gradients, []

            def reduce(*args: Any, **kwargs: Any) -> None:
                at_end.append(begun - before)
                finalize(*args, **kwargs)

            engine._reduce_gradients = reduce
            engine.train_step(random_batch(8, 1))
            before = begun
            backend = engine.scoring_backend()
            backend.ghost_pass(random_batch(4, 8), backend.ghost_layers(), lambda *factors: None)
            return {
                "buckets": sum(len(ddp.bucket_groups) for ddp in engine.ddp),
                "begun in the backward pass": at_end[0],
                "begun while candidates are scored by ghosts": begun - before,
            }
    finally:
        mesh.close()


def test_weights_are_gathered_until_they_are_used(pool: Pool) -> None:
    for found in pool.run(2, gathered_late):
        waiting = found["waiting"]
        assert waiting["update"] == found["buckets"] > 4
        assert waiting["update"] > waiting["embedding"] > waiting["layer 0"] > waiting["layer 1"] >= waiting["end"] == 0
        assert found["read"] == 0
        assert found["differences"] == 0


def gathered_late() -> dict[str, Any]:
    """Count buckets that are still gathered, place by place, and weights unlike those of an update that waits."""
    waiting: dict[str, int] = {}
    parallel = ParallelConfig(distributed_optimizer=True, **OVERLAP)
    mesh = Mesh(parallel, "cpu")
    try:
        with uncompiled():
            engine = build(mesh, GPT2, parallel, FUSED)
            at_once = build(mesh, GPT2, replace(parallel, overlap_param_gather=False), FUSED)
            late = engine.optimizer.chained.chained_optimizers[0]._late

            def count(name: str) -> Any:
                def noted(*args: Any) -> None:
                    waiting.setdefault(name, len(late._waiting))

                return noted

            for each in (engine, at_once):
                each.train_step(random_batch(8, 0))
            waiting["update"] = len(late._waiting)
            (model,) = engine.chunks
            model.embedding.register_forward_hook(count("embedding"))
            for number, layer in enumerate(model.decoder.layers):
                layer.register_forward_hook(count(f"layer {number}"))
            engine.evaluate(random_batch(4, 1))
            waiting["end"] = len(late._waiting)
            for each in (engine, at_once):
                each.train_step(random_batch(8, 2))
            pairs = zip(engine.named_parameters(), at_once.named_parameters(), strict=True)
            differences = sum(not torch.equal(mine, other) for (_, mine), (_, other) in pairs)
            return {
                "buckets": len(late._buckets),
                "waiting": waiting,
                "read": len(late._waiting),
                "differences": differences,
            }
    finally:
        mesh.close()


def logits_and_labels(dtype: torch.dtype, columns: int = 40, padded: int = 48) -> tuple[Tensor, Tensor]:
    """(S, B, V) logits, of which the last are padding, and (B, S) labels."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(7, 3, padded, generator=generator)
    logits[..., columns:] = -torch.inf
    return logits.to(dtype), torch.randint(columns, (3, 7), generator=generator)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-7), (torch.bfloat16, 2**-9)])
def test_losses_and_their_gradient_are_those_of_float64(dtype: torch.dtype, rounding: float) -> None:
    logits, labels = logits_and_labels(dtype)
    exact, mine = (each.clone().requires_grad_() for each in (logits.double(), logits))
    rows = exact.view(-1, exact.shape[-1])
    expected = F.cross_entropy(rows, labels.t().reshape(-1), reduction="none").view(7, 3).t()
    weights = torch.linspace(-1, 2, 21).view(3, 7)
    (expected * weights).sum().backward()
    with uncompiled():
        found = fused.token_losses(mine, labels)
        (found * weights).sum().backward()
    assert found.dtype == torch.float32
    assert mine.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert mine.grad.dtype == dtype
    assert (mine.grad.double() - exact.grad).abs().max() <= rounding * exact.grad.abs().max()


@pytest.mark.parametrize("kept", [0, 4])
def test_a_rotation_is_that_of_complex_numbers_in_float64(kept: int) -> None:
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(5, 2, 3, 8 + kept, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(5, 1, 1, 4, generator=generator, dtype=torch.float64)
    with uncompiled():
        found = fused.rotate(values, torch.cat((angles, angles), -1))
    turned = torch.complex(values[..., :4], values[..., 4:8]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag, values[..., 8:]), -1))
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.cat((turned.real, turned.imag, values[..., 8:]), -1), values, weights)
    with uncompiled():
        (gradient,) = torch.autograd.grad(found, values, weights)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(ValueError, match="by halves"):
        fused.rotate(values, angles, interleaved=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_is_added_in_the_precision_of_the_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    inputs, grads = (torch.randn(6, size, generator=generator).to(dtype) for size in (4, 3))
    total = torch.ones(3, 4)
    fused.add_weight_gradient(inputs, grads, total)
    exact = 1 + grads.double().t() @ inputs.double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_torch_can_capture_each_function_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiling it needs; on a GPU kernels are made of what is captured."""
    asked: list[dict[str, Any]] = []

    def capture(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
        asked.append(given)
        return captured(function, **{**given, "options": None}, backend="eager")

    captured = torch.compile
    monkeypatch.setattr(torch, "compile", capture)
    logits, labels = logits_and_labels(torch.bfloat16)
    with torch.no_grad():
        uncaptured = logits.requires_grad_()
    found = fused.token_losses(uncaptured, labels)
    (gradient,) = torch.autograd.grad(found.sum(), uncaptured)
    values = torch.randn(5, 2, 3, 8, requires_grad=True)
    torch.autograd.grad(fused.rotate(values, torch.rand(5, 1, 1, 8)).sum(), values)
    assert gradient.shape == logits.shape
    assert len(asked) == 3
    assert all(each["fullgraph"] and not each["dynamic"] for each in asked)


def test_fused_kernels_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        with pytest.raises(EngineError, match=r"kernels=fused: torch.compile finds no compiler.*set it to eager"):
            tiny_engine(mesh, engine=FUSED)
        monkeypatch.setattr(EngineConfig, "is_fused", lambda self, on_cpu: self.kernels != "eager")  # as on a GPU
        with pytest.warns(UserWarning, match=r"kernels=auto: torch.compile finds no compiler.*kernels are eager"):
            assert not tiny_engine(mesh, engine=replace(FUSED, kernels="auto")).fused
    finally:
        mesh.close()
