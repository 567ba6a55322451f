"""Benchmarks through lm-eval: its own Hugging Face model gives the same numbers, at every layout and on every task."""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopus.cli.main import main
from megaopus.config.compose import layout as arranged
from megaopus.distributed.mesh import Mesh
from megaopus.evaluation.local_data import LocalData
from megaopus.evaluation.model import engine_of, find, opened
from megaopus.evaluation.run import harness_model
from megaopus.evaluation.task_list import SUITES
from megaopus.evaluation.tasks import LM_EVAL, Wanted, load_parts
from tests.evaluation_items import COUNT, write_items
from tests.exact.test_huggingface import make
from tests.pool import Jobs, Pool

FAMILIES = ("gpt2", "llama", "qwen3")
LAYOUTS: Mapping[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "zero3": (2, ["engine=deepspeed", "engine.zero_stage=3"]),
}
ASKED = ["arc_easy", "winogrande", "mmlu", "lambada_openai"]
"""Answers of several tokens, prompts of several forms, answers of one letter, single words."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items"))


@pytest.fixture(scope="module")
def folders(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a folder of a random model that reads up to 64 tokens, fewer than some prompts have."""
    found = {}
    for family in FAMILIES:
        folder = found[family] = tmp_path_factory.mktemp(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(family, folder)
        config = json.loads((folder / "config.json").read_text())
        if "max_position_embeddings" in config:
            (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
        shutil.copyfile(tiny_corpus / "tokenizer.json", folder / "tokenizer.json")
        ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", **ends}))
    return found


def requests(data: Path, names: list[str]) -> list[Any]:
    """Everything that the tasks ask of a model."""
    parts, _ = load_parts(names, Wanted(data=LocalData(data)))
    for part in parts:
        part.task.build_all_requests()
    return [instance for part in parts for instance in part.task.instances]


def answers(layout: str, folders: Mapping[str, Path], data: Path) -> dict[str, list[tuple[float, bool]]]:
    """Family -> (log-likelihood, whether greedy) of each request."""
    size, overrides = LAYOUTS[layout]
    models = {family: find(folder) for family, folder in folders.items()}
    parallel, engine = arranged(["engine.device=cpu", *overrides], models["gpt2"].model, size)
    mesh, asked, found = Mesh(parallel, "cpu"), requests(data, ASKED), {}
    try:
        for family, model in models.items():
            built = engine_of(model, mesh, parallel, engine)
            found[family] = harness_model(built, mesh, model.words, model.max_length, LM_EVAL).loglikelihood(asked)
    finally:
        mesh.close()
    return found


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path], data: Path, pool: Pool) -> Jobs[str]:
    return pool.jobs({layout: size for layout, (size, _) in LAYOUTS.items()}, answers, folders, data)


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    """Family -> lm-eval's own model of the folder."""
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            family: HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
            for family, folder in folders.items()
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_likelihoods_are_those_of_lm_evals_own_model(
    layout: str, ours: Jobs[str], theirs: dict[str, Any], data: Path
) -> None:
    asked = requests(data, ASKED)
    for family, model in theirs.items():
        expected = model.loglikelihood(asked, disable_tqdm=True)
        for found in ours[layout]:
            for request, (logprob, greedy), (wanted, best) in zip(asked, found[family], expected, strict=True):
                assert logprob == pytest.approx(wanted, abs=1e-4), (family, request.args)
                assert greedy == best


def test_whole_texts_and_greedy_answers_too(theirs: dict[str, Any], folders: dict[str, Path], data: Path) -> None:
    """Texts longer than the model reads are cut alike; generation stops at the same places."""
    from lm_eval.api.instance import Instance

    text = "The river ran along the garden wall. " * 12
    whole = [Instance("loglikelihood_rolling", {}, (text[:size],), 0) for size in (20, len(text))]
    settings = {"until": ["e ", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    more = [Instance("generate_until", {}, (text[:size], settings), 0) for size in (9, 30, 200)]
    for family, folder in folders.items():
        model = find(folder)
        with opened(model, ["engine.device=cpu"], 1) as (engine, mesh):
            own = harness_model(engine, mesh, model.words, model.max_length, LM_EVAL)
            found = own.loglikelihood_rolling(whole)
            assert found == pytest.approx(theirs[family].loglikelihood_rolling(whole, disable_tqdm=True), abs=1e-3)
            if model.max_length > 12:
                assert own.generate_until(more) == theirs[family].generate_until(more, disable_tqdm=True)


def no_connection(*args: object, **more: object) -> None:
    raise AssertionError("a socket was tried")


def test_every_benchmark_of_the_paper_runs_from_files_alone(
    folders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no_connection)
    out = tmp_path / "eval.json"
    command = ["eval", str(folders["llama"]), "--suite", "paper10,outside6", "--data", str(data), "--out", str(out)]
    assert main([*command, "engine.device=cpu"]) == 0
    rows = json.loads(out.read_text())["rows"]
    told = {row["task"]: row for row in rows if row["headline"] and row["part_of"] is None}
    assert list(told) == [*SUITES["paper10"], *SUITES["outside6"]]
    for name, row in told.items():
        assert row["n"] == COUNT, name
        assert 0 <= row["value"] <= 1
        assert row["protocol"] == "lm-eval"
    bits = {row["task"] for row in rows if row["metric"] == "bits_per_byte" and row["part_of"] is None}
    assert bits == told.keys() - {"bbh_zeroshot"}
    assert torch.isfinite(torch.tensor([row["value"] for row in rows])).all()
