"""engine.deterministic: what is set for the process, put back and refused; labels drawn without sums of floats."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.backends import cudnn

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.determinism import deterministic_torch, set_variables
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.gpt_forward import SampledLabels
from megaopus.errors import ConfigError, EngineError
from tests.harness import tiny_engine
from tests.pool import Pool

SET = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}


def flags() -> tuple[Any, ...]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    return torch.get_deterministic_debug_mode(), filled, cudnn.deterministic, cudnn.benchmark


def test_what_libraries_read_is_set_where_it_is_missing() -> None:
    environment = {"HOME": "here"}
    set_variables(False, environment)
    assert environment == {"HOME": "here", **SET}
    set_variables(True, environment)  # again: they were there when CUDA began
    assert environment == {"HOME": "here", **SET}
    given = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    set_variables(False, given)
    assert given == SET | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


@pytest.mark.parametrize(
    ("begun", "given", "told"),
    [
        (False, {"CUBLAS_WORKSPACE_CONFIG": ":8:8"}, "CUBLAS_WORKSPACE_CONFIG = ':8:8': .*needs :4096:8 or :16:8"),
        (True, {"NCCL_NVLS_ENABLE": "0"}, "CUBLAS_WORKSPACE_CONFIG = None: .*used CUDA before"),
        (False, {"NCCL_NVLS_ENABLE": "2"}, "NCCL_NVLS_ENABLE = '2': .*needs 0"),
    ],
)
def test_what_would_make_cuda_differ_is_one_error_that_changes_nothing(
    begun: bool, given: dict[str, str], told: str
) -> None:
    before = dict(given)
    with pytest.raises(ConfigError, match=told) as raised:
        set_variables(begun, given)
    assert given == before
    (problem,) = raised.value.problems
    name = problem.key.removeprefix("environment ")
    assert f"start the program with {name}={SET[name]}, or engine.deterministic=false" in problem.remedy


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_torch_is_put_back_as_it_was(mode: int) -> None:
    torch.set_deterministic_debug_mode(mode)
    before = flags()
    try:
        with deterministic_torch():
            assert flags() == (2, False, True, False)
        assert flags() == before == (mode, True, False, False)
    finally:
        torch.set_deterministic_debug_mode(0)


def _through_a_mesh() -> tuple[list[tuple[Any, ...]], str]:
    found, told = [flags()], ""
    kind = EngineConfig(device="cpu", precision="fp32", deterministic=True)
    for deterministic in (True, False):
        mesh = Mesh(ParallelConfig(), "cpu", deterministic=deterministic)
        found.append(flags())
        try:
            assert not tiny_engine(mesh, engine=kind).module.config.deterministic_mode  # megatron's, on CUDA alone
        except EngineError as error:
            told = str(error)
        finally:
            mesh.close()
        found.append(flags())
    assert not SET.keys() & os.environ.keys()  # which are CUDA's libraries'
    return found, told


def test_a_mesh_sets_them_until_it_is_closed(pool: Pool) -> None:
    found, told = pool.run(1, _through_a_mesh)[0]
    outside, inside = (0, True, False, False), (2, False, True, False)
    assert found == [outside, inside, outside, outside, outside]
    assert told == "engine.deterministic=true: make the Mesh with deterministic=True"


def test_labels_are_drawn_from_whole_numbers_as_from_floats() -> None:
    alone: Any = SimpleNamespace(tp_group=None, tp_rank=0, shape=SimpleNamespace(tp=1))
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(8, 64, 1000, generator=generator)
    logits[..., 900:] = -torch.inf  # padding
    uniforms = torch.rand(8, 64, generator=generator, dtype=torch.float64)
    uniforms[0, :2] = torch.tensor([1e-12, 1 - 1e-12])
    drawn = []
    for whole in (False, True):
        with mock.patch("megaopus.engine.gpt_forward._sums_vary", return_value=whole) as asked:
            drawn.append(SampledLabels(alone, 0, 0)._draw(logits, uniforms))
        assert asked.called
    assert torch.equal(*drawn)
    assert int(drawn[0].max()) < 900
