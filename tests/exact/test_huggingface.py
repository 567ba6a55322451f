"""Hugging Face models give transformers' numbers here, at every layout, from the same files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.huggingface.families import model_config
from megaopus.huggingface.folder import ModelFolder
from megaopus.huggingface.start import FolderWeights
from megaopus.optim.config import OptimConfig
from tests.harness import TokenCandidates
from tests.pool import Jobs, Pool

VOCAB, LENGTH, SEQUENCES = 300, 32, 4
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
}


def make(family: str, folder: Path) -> Any:
    """Save a random model of a family; every vector random too, for a norm of ones would hide that it is missing."""
    import transformers

    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return model.eval()


def texts() -> TokenCandidates:
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return TokenCandidates(tokens, torch.arange(SEQUENCES))


def losses(layout: str, folders: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """Family -> mean token loss of each sequence."""
    _, parallel, engine = LAYOUTS[layout]
    mesh = Mesh(parallel, "cpu")
    try:
        return {family: started(folder, mesh, parallel, engine).evaluate(texts()) for family, folder in folders.items()}
    finally:
        mesh.close()


def started(folder: Path, mesh: Mesh, parallel: ParallelConfig, engine: EngineConfig) -> Any:
    """An engine that begins at the weights of a folder."""
    model = model_config(ModelFolder.open(folder).config)
    return engine.spec().load_class()(
        mesh,
        model=model,
        optim=OptimConfig(),
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
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Family -> (its folder, transformers' model)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
        return {family: (place, make(family, place)) for family, place in places.items()}


@pytest.fixture(scope="module")
def theirs(models: dict[str, tuple[Path, Any]]) -> dict[str, torch.Tensor]:
    """Family -> the losses by transformers, in float64."""
    found, tokens = {}, texts().tokens
    for family, (_, model) in models.items():
        with torch.no_grad():
            logits = model.double()(tokens[:, :-1]).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        found[family] = each.mean(1)
    return found


@pytest.fixture(scope="module")
def ours(models: dict[str, tuple[Path, Any]], pool: Pool) -> Jobs[str]:
    folders = {family: folder for family, (folder, _) in models.items()}
    sizes = {layout: size for layout, (size, *_) in LAYOUTS.items()}
    return pool.jobs(sizes, losses, folders)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_transformers(layout: str, ours: Jobs[str], theirs: dict[str, torch.Tensor]) -> None:
    for found in ours[layout]:
        errors = {family: float((found[family] - expected).abs().max()) for family, expected in theirs.items()}
        assert max(errors.values()) < 1e-5, errors
