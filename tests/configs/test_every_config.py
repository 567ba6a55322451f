"""Every file under configs/ composes, and the published model shapes have their published number of parameters."""

from dataclasses import replace
from pathlib import Path

import pytest

from megaopus.config.compose import compose, default_config_dir
from megaopus.config.parse import load, to_yaml
from megaopus.config.run_config import differences
from megaopus.errors import ConfigError
from megaopus.models.flops import count_active_parameters, count_parameters
from megaopus.planning.memory import memory, peak
from tests.exact.resume_runs import choices, rows, train
from tests.unit.config_corpus import write_manifest

CONFIGS = default_config_dir()
CHOICES = sorted(str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.glob("*/*.yaml"))
MODELS = Path(__file__).parents[1] / "fixtures"
FURTHER = {
    "model/hf": [f"model.hf={MODELS / 'smollm2_135m'}"],
    "experiment/continue": [f"model.hf={MODELS / 'smollm2_135m'}"],
    "experiment/demo_real": [f"model.hf={MODELS / 'smollm2_135m'}"],
    "experiment/paper_qwen3_8b": [f"model.hf={MODELS / 'qwen3_8b'}"],
}
"""What a choice needs beside it."""
RANKS = {"experiment/paper_qwen3_8b": 8, "parallel/tp2": 2, "parallel/pp2": 2, "parallel/tp2_pp2": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("configs") / "corpus")


def test_the_groups_are_those_of_the_settings():
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    sections = {"model", "data", "selection", "optim", "engine", "parallel", "train", "checkpoint", "logging"}
    assert groups == sections | {"experiment"}


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_composes_and_comes_back_from_its_file(choice, corpus, tmp_path):
    group, name = choice.split("/")
    overrides = [f"data.path={corpus}", "data.target_domains=[docs]", f"{group}={name}", *FURTHER.get(choice, ())]
    config = compose(overrides, world_size=RANKS.get(choice, 1))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


def test_each_default_choice_is_a_file_and_the_defaults_run_anywhere(corpus):
    config = compose([f"data.path={corpus}"], world_size=1)
    assert config.parallel.tp == config.parallel.pp == 1
    assert config.engine.device == config.engine.precision == "auto"
    assert config.selection.method == "uniform"


@pytest.mark.parametrize("model", ["llama_small", "qwen3_0p6b", "gpt2_medium"])
def test_models_fit_the_model_parallel_layouts(model, corpus):
    compose([f"data.path={corpus}", f"model={model}", "parallel=tp2_pp2"], world_size=8)


PUBLISHED = {
    # model: (vocabulary, parameters) with the embedding padded to a multiple of 128 rows (50257 -> 50304)
    "gpt2_small": (50257, 124_439_808 + 47 * 768),
    "gpt2_medium": (50257, 354_823_168 + 47 * 1024),
    "gpt2_large": (50257, 774_030_080 + 47 * 1280),
    "gpt2_xl": (50257, 1_557_611_200 + 47 * 1600),
    "qwen3_0p6b": (151936, 596_049_920),
    "qwen3_30b_a3b": (151936, 30_532_122_624),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_shapes_have_their_published_number_of_parameters(model, corpus):
    vocab_size, parameters = PUBLISHED[model]
    config = compose([f"data.path={corpus}", f"model={model}"])
    assert count_parameters(config.model, config.model.vocab_size or vocab_size, 1024) == parameters


def test_active_parameters_of_a_mixture(corpus):
    """Published as 3.3B; the small one has as many inside its blocks as one MLP instead, but for the routers."""
    large, small = (compose([f"data.path={corpus}", f"model={name}"]).model for name in ("qwen3_30b_a3b", "moe_tiny"))
    assert count_active_parameters(large, 151936, 1024) / 1e9 == pytest.approx(3.35, abs=0.01)
    dense = count_parameters(replace(small, num_experts=None), 1024, 256)
    assert count_active_parameters(small, 1024, 256) == dense + 4 * 8 * 128


def test_the_paper_experiment_is_the_paper(corpus):
    config = compose([f"data.path={corpus}", "experiment=paper_gpt2_xl_muon"], world_size=8)
    selection, optim = config.selection, config.optim
    assert config.num_candidates() == 64
    assert (selection.estimator, selection.sketch_dim, selection.sketch_seed) == ("countsketch", 8192, 42)
    assert (selection.sampler, selection.temperature, selection.utilities) == ("boltzmann", 0.9, "raw")
    assert (selection.redundancy, selection.gram_sketch) == (1.0, "per_layer")
    assert (selection.proxy_batch_size, selection.proxy_half_life) == (8, 0.0)
    assert (selection.rho, selection.score_length) == (0.5, 512)
    assert (optim.name, optim.matrix_lr, optim.lr, optim.betas) == ("muon", 0.01, 2e-3, [0.8, 0.95])
    assert optim.settings == {
        "momentum": 0.95,
        "momentum_start": 0.85,
        "momentum_warmup_steps": 300,
        "ns_steps": 5,
    }
    assert optim.weight_decay == 0.0
    tokens = config.train.steps * config.train.global_batch_size * config.data.seq_len
    assert tokens == pytest.approx(30e9, rel=1e-5)


TOY = [
    *("data.seq_len=16", "selection.score_length=8", "engine=cpu", "selection.score_micro_batch_size=8"),
    *("model.num_layers=1", "model.hidden_size=32", "model.num_heads=4"),
    *("train.steps=2", "train.eval_every=0", "data.read_ahead_mb=0"),
]


def run_the_paper_experiment(corpus, folder):
    return train(["experiment=paper_gpt2_xl_muon", f"data.path={corpus}", f"run_dir={folder}", *TOY])


def test_the_paper_experiment_is_the_same_on_any_number_of_ranks(tiny_corpus, tmp_path, pool):
    found = []
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        assert pool.run(ranks, run_the_paper_experiment, tiny_corpus, folder) == [0] * ranks
        picked = {step: [row["id"] for row in rows if row["picked"]] for step, rows in choices(folder).items()}
        losses = [row["loss"] for row in rows(folder / "metrics.jsonl") if "loss" in row]
        found.append((picked, losses))
    assert [len(ids) for ids in found[0][0].values()] == [32, 32]
    for picked, losses in found:
        assert picked == found[0][0]
        assert losses == pytest.approx(found[0][1], rel=1e-5)


def test_the_papers_selection_is_the_line_in_the_docs(corpus):
    text = (CONFIGS.parent / "docs" / "selection.md").read_text()
    line = text.split("The paper as published (`selection=opus_paper`): `")[1].split("`")[0].split()
    paper = compose([f"data.path={corpus}", "selection=opus_paper"])
    assert paper.selection == compose([f"data.path={corpus}", *(f"selection.{setting}" for setting in line)]).selection
    guards = paper.selection.guards
    assert not any((guards.exposure_cap, guards.domain_floor, guards.min_ess, guards.min_distinct, guards.min_unique))
    assert paper.selection.score_length == 512
    assert (paper.data.seq_len, paper.scored_length()) == (256, 256)


def test_the_two_small_experiments_differ_in_the_selection_alone(corpus):
    opus = compose([f"data.path={corpus}", "experiment=small_opus", "run_dir=runs/x"])
    uniform = compose([f"data.path={corpus}", "experiment=small_uniform", "run_dir=runs/x"])
    ours, theirs = differences(opus), differences(uniform)
    assert ours != theirs
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} <= {
        key for key in ours | theirs if key.startswith("selection.")
    }


def test_proxy_gradients_decay_as_in_version_0_1(corpus):
    decays = {
        "screened": 0.8,
        "opus_cascade": 0.8,
        "opus_exact": 0.5,
        "opus_boltzmann": 0.5,
        "opus_paper": 0,
        "greats": 0,
    }
    for name, decay in decays.items():
        assert compose([f"data.path={corpus}", f"selection={name}"]).selection.proxy_decay == decay


def test_boltzmann_is_exact_opus_but_for_the_draw(corpus):
    opus = differences(compose([f"data.path={corpus}", "selection=opus_exact"]))
    boltzmann = differences(compose([f"data.path={corpus}", "selection=opus_boltzmann"]))
    assert boltzmann == opus | {"selection.sampler": ("boltzmann", "top_k")}


def test_the_paper_s_continued_model_fits_eight_gpus_of_80_gb(corpus):
    """Weights, optimizer and scoring of a rank; the allocator's fragments come on top. Begins where the model is."""
    overrides = [f"data.path={corpus}", "experiment=paper_qwen3_8b", *FURTHER["experiment/paper_qwen3_8b"]]
    config = compose([*overrides, "engine.device=cuda"], world_size=8)
    assert config.init.path == config.model.hf
    assert count_parameters(config.model, 151936, config.data.seq_len) == 8_190_735_360
    assert 30 < peak(memory(config, 151936, 8, "bf16", 0, "cuda"))[1] / 2**30 < 64
    with pytest.raises(ConfigError, match="64 picks of 128 candidates cannot be shared evenly"):
        compose([*overrides, "selection.groups=3"], world_size=8)
