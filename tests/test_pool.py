"""The pool of ranks and programs forked with their imports done: what they give, what they leave, how they fail."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import forks
from tests.pool import Pool, free_ports

RANKS = 4


def sum_of_ranks(factor: int) -> tuple[int, float]:
    dist.init_process_group("gloo")
    value = torch.tensor(float(dist.get_rank() * factor))
    dist.all_reduce(value)
    dist.destroy_process_group()
    return int(os.environ["LOCAL_RANK"]), value.item()


@pytest.mark.parametrize("world_size", [1, 2, RANKS])
def test_results_come_by_rank(world_size: int, pool: Pool) -> None:
    total = float(sum(10 * rank for rank in range(world_size)))
    assert pool.run(world_size, sum_of_ranks, 10) == [(rank, total) for rank in range(world_size)]


def test_more_jobs_than_places_all_end(pool: Pool) -> None:
    jobs = [pool.submit(2, sum_of_ranks, factor) for factor in range(6)]
    assert [job.result()[0] for job in jobs] == [(0, float(factor)) for factor in range(6)]


def state() -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    return {
        "environment": {name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
        "folder": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist()[:64],
        "warnings": [str(each) for each in warnings.filters],
        "groups": dist.is_initialized() or parallel_state.is_initialized(),
        "trackers": sorted(megatron_random._CUDA_RNG_STATE_TRACKER.states_),
        "deepspeed": "deepspeed" in sys.modules,
        "signal": signal.getsignal(signal.SIGTERM),
        "function": sys.modules["tests.harness"].tiny_engine.__name__,
    }


def leave_everything_changed() -> None:
    import deepspeed  # noqa: F401  whose stage 3 replaces functions of torch
    from megatron.core.tensor_parallel import random as megatron_random

    from megaopus.distributed.config import ParallelConfig
    from megaopus.distributed.mesh import Mesh

    Mesh(ParallelConfig(), "cpu")  # not closed
    os.environ["LEFT"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.manual_seed(random.randrange(1 << 30))
    warnings.simplefilter("error")
    megatron_random._CUDA_RNG_STATE_TRACKER.add("left", 5)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.modules["tests.harness"].tiny_engine = leave_everything_changed  # type: ignore[attr-defined]


def test_nothing_of_a_job_is_left_for_the_next(pool: Pool) -> None:
    before = pool.run(1, state)
    pool.run(1, leave_everything_changed)
    assert pool.run(1, state) == before
    assert before[0]["folder"] == str(forks.ROOT)
    assert not before[0]["groups"]


def imported() -> tuple[list[str], str]:
    return sorted(sys.modules), torch.compile.__name__


def test_imports_are_done_before_a_job_begins(pool: Pool) -> None:
    """Without what megatron-core would import on CPU for nothing, and with torch.compile as it was."""
    ((found, compiler),) = pool.run(1, imported)
    assert {"megaopus.build", "megatron.core.models.gpt", "megatron.core.optimizer", "tests.harness"} <= set(found)
    assert "wandb" not in found
    assert compiler == "compile"


def fail_on_rank_1(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "raises":
            raise ZeroDivisionError("of rank 1")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.init_process_group("gloo")  # waits for the other


@pytest.mark.parametrize(
    ("how", "message"),
    [("raises", r"rank 1 failed:\n(.|\n)*ZeroDivisionError: of rank 1"), ("dies", "rank 1 died")],
    ids=["raises", "dies"],
)
def test_the_rank_that_fails_is_named_and_the_others_do_not_keep_the_pool(how: str, message: str, pool: Pool) -> None:
    with pytest.raises(AssertionError, match=message):
        pool.run(RANKS, fail_on_rank_1, how)
    assert len(pool.run(RANKS, sum_of_ranks, 1)) == RANKS


def hang_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(3600)


def test_a_rank_that_hangs_is_given_up_and_replaced(pool: Pool) -> None:
    with pytest.raises(AssertionError, match=r"no answer in time: rank .*1"):
        pool.run(2, hang_on_rank_1, timeout_s=2.0)
    assert len(pool.run(RANKS, sum_of_ranks, 1)) == RANKS


def test_ports_are_other_ones_each_time() -> None:
    ports = [*free_ports(3), *free_ports(3)]
    assert len(set(ports)) == 6


def say(word: str) -> int:
    print(word)
    print("to stderr", file=sys.stderr)
    return 3


@pytest.mark.slow
def test_a_program_s_words_and_exit_status_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    done = forks.call(say, "a word")
    assert (done.returncode, done.stdout, done.stderr) == (3, "a word\n", "to stderr\n")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_module_is_run_as_the_main_program(tmp_path: Path) -> None:
    done = forks.program("megaopus", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("megaopus ")
    missing = forks.program("megaopus", "train", f"data.path={tmp_path}/nothing")
    assert missing.returncode == 2
    assert "nothing" in missing.stderr


@pytest.mark.slow
def test_a_program_that_does_not_end_is_killed() -> None:
    program = forks.Program(time.sleep, 3600)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="no end in 1 s"):
        program.result(timeout_s=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(program.pid, 0)
