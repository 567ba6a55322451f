"""Tests where a run begins: a model folder, another run, a Megatron-LM checkpoint; then it is as any other run."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.data.corpus import Corpus
from megaopus.export import export
from tests.exact.resume_runs import OPTIMIZERS, SELECTIONS, assert_same, everything, rows, settings, tensors, train
from tests.faults import Interrupted, at_step, interrupt
from tests.pool import Pool

OVERRIDES = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"], "data.document_mask=true", "data.first_token_loss=false"]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STILL = ["selection=uniform", "selection.check_every=0", "selection.warmup_steps=0", "optim.warmup_steps=0"]
STILL += ["optim=sgd", "optim.lr=1e-12", "train.steps=1", "train.eval_every=1"]
"""Settings of a run that changes no weight to speak of."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A random Llama with the corpus's tokenizer, its vectors random too."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is an optional extra (megaopus[transformers])"
    )
    made = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=Corpus.open(tiny_corpus).vocab_size, num_key_value_heads=2, **SHAPE)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(made)
    shutil.copyfile(tiny_corpus / "tokenizer.json", made / "tokenizer.json")
    return made


def overrides(corpus: Path, run_dir: Path, folder: Path, *more: str) -> list[str]:
    own = [text for text in settings(corpus, run_dir) if not text.startswith("model.")]
    return [*own, "model=hf", f"model.hf={folder}", f"init.path={folder}", *OVERRIDES, *more]


def losses(run_dir: Path, kind: str) -> list[float]:
    return [row["loss"] for row in rows(run_dir / "metrics.jsonl") if row["kind"] == kind]


@pytest.fixture(scope="module")
def straight(folder: Path, tiny_corpus: Path) -> Path:
    run_dir = folder.parent / "straight"
    assert train(overrides(tiny_corpus, run_dir, folder)) == 0
    return run_dir


def test_killed_and_resumed_equals_straight(straight: Path, folder: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """The folder's weights are gone by then: a run that goes on needs what it has saved alone."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    command = overrides(tiny_corpus, tmp_path / "run", model)
    with at_step(6, interrupt), suppress(Interrupted):
        train(command)
    (model / "model.safetensors").unlink()
    assert train(command) == 0
    assert_same(everything(tmp_path / "run"), everything(straight))


def begin_at_another_layout(corpus: Path, run_dir: Path, folder: Path) -> None:
    with at_step(6, interrupt), suppress(Interrupted):
        train(overrides(corpus, run_dir, folder, "parallel.tp=2", "parallel.sequence_parallel=true"))


def test_begun_at_one_layout_and_resumed_at_another(
    straight: Path, folder: Path, tiny_corpus: Path, tmp_path: Path, pool: Pool
) -> None:
    pool.run(2, begin_at_another_layout, tiny_corpus, tmp_path / "run", folder)
    assert len(losses(tmp_path / "run", "step")) == 6
    assert train(overrides(tiny_corpus, tmp_path / "run", folder)) == 0
    for kind in ("step", "validation"):
        assert losses(tmp_path / "run", kind) == pytest.approx(losses(straight, kind), rel=1e-5)


def test_a_run_is_the_start_of_another(straight: Path, folder: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Weights alone: other optimizer, sequences of another length, from step 0; as the other run left them."""
    last = losses(straight, "validation")[-1]
    for name, path in {"run": straight, "checkpoint": complete_checkpoints(straight)[-1]}.items():
        run_dir = tmp_path / name
        command = overrides(tiny_corpus, run_dir, folder, *STILL, f"init.path={path}")
        assert train(command) == 0
        assert losses(run_dir, "validation")[0] == pytest.approx(last, rel=1e-6)
        assert rows(run_dir / "metrics.jsonl")[0]["step"] == 0
    export(tmp_path / "run", tmp_path / "exported")  # side files have travelled from run to run
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_megatron_checkpoint_is_a_start(straight: Path, folder: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """In Megatron-LM's folders, beside what only it needs; the layers' names are megatron-core's in both."""
    theirs = tmp_path / "megatron" / "iter_0000010"
    shutil.copytree(complete_checkpoints(straight)[-1] / "weights", theirs)
    (theirs.parent / "latest_checkpointed_iteration.txt").write_text("10\n")
    command = overrides(tiny_corpus, tmp_path / "run", folder, *STILL, f"init.path={theirs.parent}")
    assert train(command) == 0
    assert losses(tmp_path / "run", "validation")[0] == pytest.approx(losses(straight, "validation")[-1], rel=1e-6)


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_a_run_in_bf16_begins_at_fp32_weights_and_is_exported(
    dtype: str | None, folder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Main weights are the folder's to the last bit; what is written is them, or their 16-bit copies."""
    still = [*STILL, "engine.precision=bf16", "optim.lr=1e-30"]
    assert train(overrides(tiny_corpus, tmp_path / "run", folder, *still)) == 0
    export(tmp_path / "run", tmp_path / "exported", dtype=dtype)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "exported", folder))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value if dtype else value.bfloat16()), name
    told = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert "float32" in json.dumps(told) if dtype else "bfloat16" in json.dumps(told)


def test_weights_of_another_model_are_refused(
    straight: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megaopus.__main__ import main

    wide: list[Any] = ["train", *settings(tiny_corpus, tmp_path / "run"), f"init.path={straight}"]
    assert main(wide) == 2
    assert "is of another model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert tensors(complete_checkpoints(straight)[-1] / "weights")
