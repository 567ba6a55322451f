"""Hugging Face models give transformers' numbers here, at every layout, from the same files."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megaopus.checkpoint.checkpointer import Checkpointer
from megaopus.config.run_config import RunConfig
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.token_logprobs import Asked
from megaopus.export import export
from megaopus.huggingface.families import model_config
from megaopus.huggingface.folder import ModelFolder, read_config
from megaopus.huggingface.side_files import FOLDER, copy_side_files
from megaopus.huggingface.start import FolderWeights
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig
from tests.harness import TokenCandidates
from tests.pool import Jobs, Pool

VOCAB, LENGTH, SEQUENCES = 320, 32, 4
"""The vocabulary of the small corpus, whose tokenizer the models have: 64 rows of ours are padding."""
_LLAMA: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_QWEN3_MOE = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 40, "eos_token_id": 0},
    ),
    "llama": ("LlamaConfig", _LLAMA),
    "llama-3.2": ("LlamaConfig", {**_LLAMA, "head_dim": 16, "rope_parameters": _LLAMA_31, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 10}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_LLAMA, **_QWEN3_MOE}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
}
"""Name -> (transformers' class of settings, settings)."""
CPU = EngineConfig(device="cpu", precision="fp32")
ZERO_3 = EngineConfig(device="cpu", precision="fp32", name="deepspeed", zero_stage=3)
LAYOUTS: Mapping[str, tuple[int, ParallelConfig, EngineConfig]] = {
    "one": (1, ParallelConfig(), CPU),
    "tp2": (2, ParallelConfig(tp=2, sequence_parallel=True), CPU),
    "pp2": (2, ParallelConfig(pp=2), CPU),
    "tp2-pp2": (4, ParallelConfig(tp=2, pp=2), CPU),
    "pp2-vpp2": (2, ParallelConfig(pp=2, vpp=2), CPU),
    "cp2": (2, ParallelConfig(cp=2), CPU),
    "zero3-dp2": (2, ParallelConfig(), ZERO_3),
    "ep2": (2, ParallelConfig(ep=2), CPU),
}
EXPERTS = ("qwen3-moe", "mixtral")
NO_EXPERTS = ("tp2-pp2", "zero3-dp2")
"""Layouts that do not serve them."""

STORED = ("one", "pp2-vpp2", "tp2-pp2", "zero3-dp2", "ep2")
"""Layouts whose checkpoints are exported."""
TRAINED = "qwen2"


def make(family: str, folder: Path) -> Any:
    """Save a random model of a family; every vector random too, for a norm of ones would hide that it is missing."""
    import transformers

    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings)
    config._experts_implementation = "eager"  # the others have no float64
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model.eval()


def served(layout: str) -> list[str]:
    """Families that a layout serves."""
    if LAYOUTS[layout][1].ep > 1:
        return list(EXPERTS)
    return [family for family in FAMILIES if family not in EXPERTS or layout not in NO_EXPERTS]


def texts() -> TokenCandidates:
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return TokenCandidates(tokens, torch.arange(SEQUENCES))


def losses(layout: str, folders: Mapping[str, Path], runs: Path) -> dict[str, torch.Tensor]:
    """Family -> mean token loss of each sequence; where a checkpoint is asked for, "trained" too: after five updates.

    "asked FAMILY": what an engine with weights alone tells of single tokens. The checkpoints are in ``runs`` / layout /
    family, of step 0 and, of one family, 5.
    """
    _, parallel, engine = LAYOUTS[layout]
    mesh, found = Mesh(parallel, "cpu"), {}
    try:
        for family in served(layout):
            folder = folders[family]
            built = started(folder, mesh, parallel, engine)
            found[family] = built.evaluate(texts())
            alone = started(folder, mesh, parallel, engine, optim=None)
            found[f"asked {family}"] = alone.token_logprobs(asked(), micro_batch_size=2)
            if layout in STORED:
                save(built, folder, runs / layout / family, parallel, engine)
            if layout in STORED and family == TRAINED:
                for _ in range(5):
                    built.train_step(texts())
                found["trained"] = built.evaluate(texts())
                save(built, folder, runs / layout / family, parallel, engine)
        return found
    finally:
        mesh.close()


def save(built: Any, folder: Path, run: Path, parallel: ParallelConfig, engine: EngineConfig) -> None:
    """Write a checkpoint as a run does that began at ``folder``."""
    config = RunConfig(run_dir=str(run), engine=engine, parallel=parallel)
    config.model, config.data.path, config.data.seq_len = started_model(folder), "gone", LENGTH
    state = {"time_s": 0.0, "selector": {}, "guard": {}, "identity": {"precision": "fp32"}, "config": asdict(config)}
    if built.mesh.rank == 0:
        copy_side_files(folder, run / FOLDER)
    Checkpointer(config.checkpoint, run, built.mesh).save(built.step, built, {}, state)


def started_model(folder: Path) -> ModelConfig:
    return model_config(ModelFolder.open(folder).config)


def asked() -> Asked:
    """Tokens 8 to 20 of each sequence, and others that could stand in place of the last: two in each half."""
    tokens = texts().tokens.clone()
    tokens[:, :9], tokens[:, 22:] = ~tokens[:, :9], ~tokens[:, 22:]
    return Asked(tokens, torch.tensor([[0, 300, 10, 200]]).expand(len(tokens), -1))


def started(
    folder: Path,
    mesh: Mesh,
    parallel: ParallelConfig,
    engine: EngineConfig,
    optim: OptimConfig | None = OptimConfig(),  # noqa: B008
) -> Any:
    """An engine that begins at the weights of a folder."""
    model = started_model(folder)
    return engine.spec().load_class()(
        mesh,
        model=model,
        optim=optim,
        engine=engine,
        parallel=parallel,
        vocab_size=model.vocab_size,
        seq_len=LENGTH,
        micro_batch_size=2,
        total_steps=10,
        seed=0,
        start=FolderWeights(folder, model, mesh),
    )


@pytest.fixture(scope="module")
def models(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Family -> (its folder, transformers' model)."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[family] = (folder, make(family, folder))
        shutil.copyfile(tiny_corpus / "tokenizer.json", folder / "tokenizer.json")
    return found


def by_transformers(model: Any) -> torch.Tensor:
    """(n,) mean token loss of each sequence, float64."""
    tokens = texts().tokens
    with torch.no_grad():
        logits = model.double()(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


@pytest.fixture(scope="module")
def theirs(models: dict[str, tuple[Path, Any]]) -> dict[str, torch.Tensor]:
    return {family: by_transformers(model) for family, (_, model) in models.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ours(models: dict[str, tuple[Path, Any]], runs: Path, pool: Pool) -> Jobs[str]:
    folders = {family: folder for family, (folder, _) in models.items()}
    sizes = {layout: size for layout, (size, *_) in LAYOUTS.items()}
    return pool.jobs(sizes, losses, folders, runs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_transformers(layout: str, ours: Jobs[str], theirs: dict[str, torch.Tensor]) -> None:
    for found in ours[layout]:
        errors = {family: float((found[family] - theirs[family]).abs().max()) for family in served(layout)}
        assert max(errors.values()) < 1e-5, errors


def test_logits_are_those_of_transformers(models: dict[str, tuple[Path, Any]]) -> None:
    tokens = texts().tokens[:, :-1]
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        for family, (folder, model) in models.items():
            engine = started(folder, mesh, ParallelConfig(), CPU)
            with torch.no_grad(), mesh.megatron():
                found = engine.module.eval()(tokens, torch.arange(LENGTH).expand_as(tokens), None)
                expected = copy.deepcopy(model).double()(tokens).logits
            error = (found[..., :VOCAB] - expected).norm() / expected.norm()
            assert error < 2e-6, (family, error)
    finally:
        mesh.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_tokens_are_as_probable_as_transformers_has_them(
    layout: str, ours: Jobs[str], models: dict[str, tuple[Path, Any]], theirs: dict[str, torch.Tensor]
) -> None:
    """Labels asked for, the best tokens, and alternatives to the last; of weights without an optimizer."""
    assert theirs  # from here on the models compute in float64
    tokens, (marked, others) = texts().tokens, asked()
    wanted = marked[:, 1:] >= 0
    for family in served(layout):
        model = models[family][1]
        with torch.no_grad():
            scores = model(tokens[:, :-1]).logits.log_softmax(-1)
        logprobs = scores.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
        for found in ours[layout]:
            told = found[f"asked {family}"]
            torch.testing.assert_close(told.logprobs, torch.where(wanted, logprobs, 0), rtol=0, atol=2e-5)
            torch.testing.assert_close(told.alternatives, scores[:, 20].gather(1, others), rtol=0, atol=2e-5)
            assert torch.equal(told.best[wanted], scores.argmax(-1)[wanted]), family
            assert not told.best[~wanted].any()


def test_bf16_rounds_as_much_as_transformers_does(
    models: dict[str, tuple[Path, Any]], theirs: dict[str, torch.Tensor]
) -> None:
    """Against float64, by the root mean square over the sequences of all families."""
    tokens, errors = texts().tokens, []
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        for family, (folder, model) in models.items():
            engine = started(folder, mesh, ParallelConfig(), replace(CPU, precision="bf16"))
            with torch.no_grad():
                logits = copy.deepcopy(model).bfloat16()(tokens[:, :-1]).logits.double()
            rounded = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
            errors.append([found - theirs[family] for found in (engine.evaluate(texts()), rounded)])
    finally:
        mesh.close()
    ours, other = (torch.cat(each).square().mean().sqrt() for each in zip(*errors, strict=True))
    assert 0 < ours < 1.5 * other, (ours, other)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("layout", STORED)
def test_what_was_imported_is_exported_bit_for_bit(
    layout: str, ours: Jobs[str], runs: Path, models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    assert ours[layout]
    for family in served(layout):
        folder, out = models[family][0], tmp_path / family
        export(runs / layout / family / "checkpoints" / "step_00000000", out, most_bytes=60_000)
        expected, found = contents(folder), contents(out)
        assert found.keys() == expected.keys(), family
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        assert model_config(read_config(out)) == model_config(read_config(folder))
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("layout", [layout for layout in STORED if TRAINED in served(layout)])
def test_a_trained_model_is_exported_as_it_is(layout: str, ours: Jobs[str], runs: Path, tmp_path: Path) -> None:
    import transformers

    trained = ours[layout][0]["trained"]
    out = tmp_path / "trained"
    export(runs / layout / TRAINED, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(by_transformers(model), trained, rtol=0, atol=1e-5)
    assert (trained - ours[layout][0][TRAINED]).abs().max() > 1e-3  # it did learn
