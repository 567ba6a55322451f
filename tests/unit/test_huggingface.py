"""Model folders that cannot be used are refused by name, before anything is written; shapes are read in both forms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaopus.cli.main import main
from megaopus.config.compose import compose
from megaopus.errors import ConfigError, ModelError
from megaopus.huggingface.families import family_for, model_config
from megaopus.huggingface.folder import ModelFolder
from megaopus.huggingface.start import checked
from megaopus.models.config import ModelConfig, RopeScaling
from megaopus.models.names import whole_shapes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path, tiny_corpus: Path) -> Path:
    """A whole model folder."""
    made = tmp_path / "model"
    made.mkdir()
    shapes = {
        "model.embed_tokens.weight": (320, 8),
        "model.norm.weight": (8,),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
        **{f"model.layers.0.mlp.{name}_proj.weight": (16, 8) for name in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (8, 16),
    }
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, made / "model.safetensors")
    write(made, LLAMA)
    shutil.copyfile(tiny_corpus / "tokenizer.json", made / "tokenizer.json")
    return made


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


Q = "model.layers.0.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "too many": (lambda path: change(path, lambda all: all.update(bias=torch.ones(3))), "not known here: bias"),
    "missing": (lambda path: change(path, lambda all: all.pop(Q)), f"missing: {Q}"),
    "shape": (
        lambda path: change(path, lambda all: all.update({Q: torch.ones(8, 9)})),
        r"shape \(8, 9\), here \(8, 8\)",
    ),
    "type": (
        lambda path: change(path, lambda all: all.update({Q: torch.ones(8, 8, dtype=torch.int8)})),
        f"{Q} is I8; weights must be one of F32, BF16, F16",
    ),
    "another output layer": (
        lambda path: change(path, lambda all: all.update({"lm_head.weight": torch.ones(320, 8)})),
        "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight",
    ),
    "pickled": (only_pickled, r"weights are pickled \(pytorch_model.bin\), and reading a pickle runs what it holds"),
    "no shard": (lose_a_shard, "names files that are not there: model-00002-of-00002.safetensors"),
    "cut off": (cut, "not a whole safetensors file"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: cannot be read"),
    "another family": (
        lambda path: write(path, {**LLAMA, "architectures": ["Gemma2ForCausalLM"]}),
        r"Gemma2ForCausalLM is no model that is known here \(GPT2LMHeadModel, .*Qwen3ForCausalLM, .*\)",
    ),
    "remote code": (lambda path: write(path, {**LLAMA, "auto_map": {}}), "auto_map: the model's code comes with its"),
    "quantised": (lambda path: write(path, {**LLAMA, "quantization_config": {}}), "weights are quantised"),
    "rotary": (
        lambda path: write(path, {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        r"rotary scaling 'yarn' \(only default, linear, llama3\)",
    ),
    "biases": (lambda path: write(path, {**LLAMA, "attention_bias": True}), r"attention_bias=True \(only False\)"),
    "activation": (lambda path: write(path, {**LLAMA, "hidden_act": "relu"}), "activation 'relu'"),
}


def look(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    checked(opened, model_config(opened.config))


def test_a_whole_folder_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said
    assert "11 of 11 used, none missing" in said


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        look(folder)
    assert main(["import", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_corpus_of_other_tokens_is_refused(folder: Path, tiny_corpus: Path, tmp_path: Path, capsys: Any) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    run_dir = tmp_path / "run"
    settings = [f"model.hf={folder}", f"init.path={folder}", f"data.path={tiny_corpus}", f"run_dir={run_dir}"]
    assert main(["train", "model=hf", "data.seq_len=32", *settings]) == 2
    assert "was tokenised otherwise" in capsys.readouterr().err
    assert not run_dir.exists()


def test_what_config_json_says_cannot_be_set_otherwise(folder: Path, tiny_corpus: Path) -> None:
    given = ["model=hf", f"model.hf={folder}", f"data.path={tiny_corpus}", "data.seq_len=32"]
    assert compose(given).model.num_layers == 1
    with pytest.raises(ConfigError, match=r"model.num_layers = 7: .*config.json has 1"):
        compose([*given, "model.num_layers=7"])
    with pytest.raises(ConfigError, match=r"model.hf = '': names no folder"):
        compose([*given, "model.hf="])


def test_rotary_settings_are_read_in_both_forms() -> None:
    old = model_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}})
    new = model_config({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}})
    assert old == new
    assert old.rope_base == 500_000
    assert old.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )


def test_a_model_of_no_family_is_named() -> None:
    with pytest.raises(ModelError, match=r"no Hugging Face model is known that has .*position='none'"):
        family_for(ModelConfig(position="none", vocab_size=320, norm="rmsnorm", activation="swiglu", bias=False))


def test_names_and_shapes_are_those_of_the_model_that_is_built() -> None:
    from megaopus.distributed.config import ParallelConfig
    from megaopus.distributed.mesh import Mesh
    from tests.harness import LLAMA as OURS
    from tests.harness import TINY, tiny_engine

    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        for model in (TINY, OURS):
            built = tiny_engine(mesh, model=model, vocab_size=130)
            found = {name: tuple(p.shape) for name, p in built.module.named_parameters()}
            assert whole_shapes(model, 130, 16) == found
    finally:
        mesh.close()


def test_a_tensor_is_read_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, whole = ModelFolder.open(folder), load_file(folder / "model.safetensors")
    monkeypatch.setattr("megaopus.huggingface.folder.PIECE_BYTES", 100)
    for name, tensor in whole.items():
        everything = tuple(slice(0, size) for size in tensor.shape)
        assert torch.equal(opened.read(name, everything), tensor)
        if tensor.dim() == 2:
            assert torch.equal(opened.read(name, (slice(3, 15), slice(2, 7))), tensor[3:15, 2:7])
