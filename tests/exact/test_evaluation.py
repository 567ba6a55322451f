"""Benchmarks through lm-eval: its own Hugging Face model gives the same numbers, at every layout and on every task."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import warnings
from collections.abc import Mapping
from contextlib import suppress
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
from megaopus.evaluation.task_list import LM_EVAL, SUITES
from megaopus.evaluation.tasks import Wanted, load_parts
from tests.evaluation_items import COUNT, write_items
from tests.exact.resume_runs import OPTIMIZERS, SELECTIONS, assert_same, everything, rows, settings, train
from tests.exact.test_huggingface import make
from tests.faults import Interrupted, at_step, interrupt
from tests.pool import Jobs, Pool

FAMILIES = ("gpt2", "llama", "qwen3")
LAYOUTS: Mapping[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "zero3": (2, ["engine=deepspeed", "engine.zero_stage=3"]),
}
TEMPLATE = (
    "{% for each in messages %}<{{ each.role }}>{{ each.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Where is it?"}]
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
        (folder / "chat_template.jinja").write_text(TEMPLATE)
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
            assert own.apply_chat_template(CHAT) == theirs[family].apply_chat_template(CHAT)
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
    found = json.loads(out.read_text())["rows"]
    told = {row["task"]: row for row in found if row["headline"] and row["part_of"] is None}
    assert list(told) == [*SUITES["paper10"], *SUITES["outside6"]]
    for name, row in told.items():
        assert row["n"] == COUNT, name
        assert 0 <= row["value"] <= 1
        assert row["protocol"] == "lm-eval"
    bits = {row["task"] for row in found if row["metric"] == "bits_per_byte" and row["part_of"] is None}
    assert bits == told.keys() - {"bbh_zeroshot"}
    assert torch.isfinite(torch.tensor([row["value"] for row in found])).all()


def ask(*arguments: object) -> int:
    return main(["eval", *map(str, arguments), "engine.device=cpu"])


def test_a_second_call_asks_only_what_is_missing(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill after the first task: its items are kept, the second is asked, and all is as if nothing had been."""
    whole, parts = tmp_path / "whole" / "eval.json", tmp_path / "parts" / "eval.json"
    usual = [folders["llama"], "--data", data]
    assert ask(*usual, "--suite", "piqa,arc_easy", "--out", whole) == 0
    assert ask(*usual, "--suite", "piqa", "--out", parts) == 0
    capsys.readouterr()
    assert ask(*usual, "--suite", "piqa,arc_easy", "--out", parts) == 0
    told = capsys.readouterr().err
    assert "piqa: acc_norm" in told
    assert "(from the file: done before)" in told
    assert told.count("requests:") == 1
    first, second = (json.loads(file.read_text()) for file in (whole, parts))
    assert first == second
    for name in ("piqa", "arc_easy"):
        items = [file.with_name("eval_items") / f"{name}.jsonl" for file in (whole, parts)]
        assert items[0].read_text() == items[1].read_text()
    row = next(row for row in first["rows"] if row["task"] == "piqa" and row["headline"])
    assert row.keys() >= {"task", "metric", "n", "value", "stderr", "num_fewshot", "seed", "prompts", "protocol"}


def test_a_table_of_another_evaluation_is_not_written_over(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.json"
    usual = [folders["llama"], "--suite", "piqa", "--data", data, "--out", out]
    assert ask(*usual) == 0
    before = out.read_text()
    assert ask(*usual, "--limit", "2") == 2
    assert "holds another evaluation: settings" in capsys.readouterr().err
    assert out.read_text() == before
    assert ask(*usual, "--limit", "2", "--overwrite") == 0
    assert json.loads(out.read_text())["rows"][0]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "piqa", "--data", "nowhere"], "nowhere: no such folder"),
        (["--suite", "piqa", "train.steps=3"], "train.steps = 'train.steps=3': is not of parallel or engine"),
        (["--suite", "piqa", "parallel.tp=3"], "num_heads = 4: cannot be split over parallel.tp = 3"),
        (["--perplexity", "nowhere.txt"], "nowhere.txt"),
        (["--perplexity", ".", "--length", "100"], "--length 100: .* reads 1 to 64 tokens"),
    ],
)
def test_what_cannot_be_asked_is_told_and_nothing_written(
    arguments: list[str],
    message: str,
    folders: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = [] if "--data" in arguments else ["--data", data]
    assert ask(folders["llama"], *arguments, *usual, "--out", tmp_path / "eval.json") == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def losses_of(run_dir: Path, corpus: Path, out: Path) -> int:
    return main(
        ["eval", str(run_dir), "--perplexity", str(corpus), "--limit", "4", "--out", str(out), "engine.device=cpu"]
    )


def losses_at_tp2(run_dir: Path, corpus: Path, out: Path) -> int:
    return main(
        [*("eval", str(run_dir), "--perplexity", str(corpus), "--limit", "4", "--out", str(out)), "parallel.tp=2"]
    )


def test_losses_by_domain_are_those_of_the_runs_own_validation(tiny_corpus: Path, tmp_path: Path, pool: Pool) -> None:
    """With what the run has of rules; at another layout too."""
    run_dir = tmp_path / "run"
    more = ["train.eval_sequences=4", "data.document_mask=true", "data.first_token_loss=false", "train.steps=2"]
    assert train([*settings(tiny_corpus, run_dir), *more]) == 0
    expected = [row for row in rows(run_dir / "metrics.jsonl") if row["kind"] == "validation"][-1]["domains"]
    pool.run(2, losses_at_tp2, run_dir, tiny_corpus, tmp_path / "tp2.json")
    assert losses_of(run_dir, tiny_corpus, tmp_path / "one.json") == 0
    for file in ("one.json", "tp2.json"):
        told = json.loads((tmp_path / file).read_text())["perplexity"]
        assert {row["domain"]: row["nats_per_token"] for row in told} == pytest.approx(expected, abs=1e-6)
        assert all(row["sequences"] <= 4 and row["bits_per_byte"] > 0 for row in told)


def test_losses_on_files_are_those_of_transformers(
    folders: dict[str, Path], theirs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text := "A river ran by the garden wall, and the stones were old. " * 6)
    out = tmp_path / "eval.json"
    assert ask(folders["llama"], "--perplexity", tmp_path / "text.txt", "--length", 32, "--out", out) == 0
    (row,) = json.loads(out.read_text())["perplexity"]
    model, tokenizer = theirs["llama"].model, find(folders["llama"]).words.tokenizer
    ids = torch.tensor([*tokenizer.encode(text).ids, 0])
    count = (len(ids) - 1) // 32
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(ids[None, place * 32 : place * 32 + 32]).logits[0], ids[place * 32 + 1 : place * 32 + 33]
            )
            for place in range(count)
        ]
    assert row["sequences"] == count
    assert row["nats_per_token"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    per_byte = len(ids) / len(text.encode())
    assert row["bits_per_byte"] == pytest.approx(row["nats_per_token"] / math.log(2) * per_byte)


def test_a_run_is_scored_while_it_trains_and_is_no_other_for_it(
    data: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed and resumed too; what it says of its last step is what the verb says of its last checkpoint."""
    scored = ["tasks.every=4", "tasks.suite=[arc_easy,lambada]", f"tasks.data={data}", "tasks.limit=3"]
    more = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"]]
    assert train([*settings(tiny_corpus, tmp_path / "plain"), *more]) == 0
    capsys.readouterr()
    assert train([*settings(tiny_corpus, tmp_path / "scored"), *more, *scored]) == 0
    assert "benchmarks after 4 steps | arc_easy acc_norm" in capsys.readouterr().out
    with at_step(6, interrupt), suppress(Interrupted):
        train([*settings(tiny_corpus, tmp_path / "killed"), *more, *scored])
    assert train([*settings(tiny_corpus, tmp_path / "killed"), *more, *scored]) == 0
    plain, *others = (everything(tmp_path / name) for name in ("plain", "scored", "killed"))
    for other in others:
        assert_same(other, plain)
    told = {name: rows(tmp_path / name / "eval.jsonl") for name in ("scored", "killed")}
    assert [{**row, "time_s": 0} for row in told["killed"]] == [{**row, "time_s": 0} for row in told["scored"]]
    steps = sorted({row["step"] for row in told["scored"]})
    assert steps == [0, 4, 8, 10]
    items = tmp_path / "scored" / "eval_items" / "step_00000010" / "arc_easy.jsonl"
    assert len(items.read_text().splitlines()) == 3
    out = tmp_path / "eval.json"
    usual = [tmp_path / "scored", "--suite", "arc_easy,lambada", "--data", data, "--limit", 3, "--out", out]
    assert ask(*usual) == 0
    last = [row for row in told["scored"] if row["step"] == 10]
    for row, wanted in zip(json.loads(out.read_text())["rows"], last, strict=True):
        assert row["value"] == pytest.approx(wanted["value"], abs=1e-6)
        assert {**row, "value": 0, "stderr": 0, "seed": 0}.items() <= {
            **wanted,
            "value": 0,
            "stderr": 0,
            "seed": 0,
        }.items()
