"""Tests what compose makes of good settings, and that a written configuration comes back exactly."""

import subprocess
import sys
from dataclasses import fields

import pytest

from megaopus.config.compose import compose
from megaopus.config.parse import load, to_yaml
from megaopus.config.run_config import RunConfig, differences
from megaopus.config.validation import validate
from megaopus.errors import ConfigError
from tests.unit.config_corpus import write_manifest


@pytest.fixture
def corpus(tmp_path):
    return write_manifest(tmp_path / "corpus")


def test_groups_and_settings_apply_in_order(corpus):
    overrides = ["selection=screened", "selection.rho=0.25", "optim=muon", "+optim.lr=1", "optim.betas=[0.5,0.75]"]
    config = compose([f"data.path={corpus}", *overrides, "train.steps=200", "data.target_domains=[docs]"])
    assert (config.selection.method, config.selection.rho, config.selection.proxy_decay) == ("opus", 0.25, 0.8)
    assert (config.optim.name, config.optim.matrix_lr, config.optim.lr) == ("muon", 0.01, 1.0)
    assert isinstance(config.optim.lr, float)
    assert config.optim.betas == [0.5, 0.75]
    assert config.data.target_domains == ["docs"]
    assert config.num_candidates() == 128


def test_settings_are_objects_of_the_packages(corpus):
    config = compose([f"data.path={corpus}"])
    for field in fields(RunConfig):
        assert type(getattr(config, field.name)) is type(getattr(RunConfig(), field.name))
    with pytest.raises(AttributeError):
        config.selection.temprature = 1


def test_interpolation_reads_other_settings_and_the_environment(corpus, monkeypatch):
    monkeypatch.setenv("SCRATCH_HERE", "/big")
    config = compose([f"data.path={corpus}", "seed=7", "run_dir=${oc.env:SCRATCH_HERE}/s${seed}_${model.num_layers}"])
    assert config.run_dir == "/big/s7_4"


def test_an_override_beats_an_experiment(corpus):
    config = compose([f"data.path={corpus}", "experiment=small_opus", "optim=muon", "train.steps=300"])
    assert (config.selection.method, config.optim.name, config.train.steps) == ("opus", "muon", 300)
    assert config.train.eval_every == 50


def test_a_length_in_tokens_or_epochs(corpus):
    """Steps follow before anything is checked: no fewer update tokens than asked for, and not a step more."""
    sizes = [f"data.path={corpus}", "train.global_batch_size=16", "data.seq_len=256", "optim.warmup_steps=150"]
    config = compose([*sizes, "experiment=small_opus", "train.tokens=1e6"])
    assert config.train.steps == 245
    assert 244 * 16 * 256 < 1_000_000 <= 245 * 16 * 256
    assert compose([*sizes, "train.epochs=3.5"]).train.steps == -(-int(3.5 * 200_000) // (16 * 256))
    both = ["train.tokens=1000000", "train.epochs=2", "optim.warmup_steps=0"]
    with pytest.raises(ConfigError, match=r"train\.epochs = 2\.0: the length is given already, as train\.tokens"):
        compose([*sizes, *both])
    kept = ["data.filter.column=dsir", "data.filter.keep=0.5", "train.epochs=2", "optim.warmup_steps=0"]
    with pytest.raises(ConfigError, match=r"train\.epochs = 2\.0: how many tokens data\.filter keeps is not known"):
        compose([*sizes, *kept])


def test_a_third_is_a_third(corpus):
    batch = ["train.global_batch_size=8", "train.micro_batch_size=8"]
    assert compose([f"data.path={corpus}", *batch, "selection.rho=0.3333"]).num_candidates() == 24


def test_a_users_folder_adds_choices_and_with_its_own_run_yaml_replaces_files(corpus, tmp_path):
    folder = tmp_path / "it's mine, really"
    (folder / "experiment").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: wide\n  - override /selection: opus\n"
    )
    (folder / "model" / "wide.yaml").write_text("hidden_size: 256\n")
    config = compose([f"data.path={corpus}", "experiment=mine"], folder)
    assert (config.model.hidden_size, config.selection.method) == (256, "opus")
    (folder / "model" / "tiny.yaml").write_text("num_layers: 1\n")
    with pytest.raises(ConfigError, match=r"files of the same name: model/tiny.yaml"):
        compose([f"data.path={corpus}"], folder)
    (folder / "run.yaml").write_text("defaults:\n  - model: tiny\n  - optim: muon\n  - _self_\nseed: 3\n")
    config = compose([f"data.path={corpus}"], folder)
    assert (config.model.num_layers, config.optim.name, config.seed) == (1, "muon", 3)


def test_written_settings_come_back_exactly(corpus, tmp_path):
    config = compose(
        [
            f"data.path={corpus}",
            "experiment=small_opus",
            "optim.lr=1.2345678901234567e-5",
            "optim.eps=1e-12",
            "selection.score_length=null",
            "data.target_domains=[docs,code]",
            "run_dir='runs/on: 1e-3, #1'",
        ]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(path) == config
    for odd in ("off", "1e-3", "null", "007", "~", "12:30:00"):
        config.run_dir = odd
        path.write_text(to_yaml(config))
        assert load(path) == config, odd


def test_load_refuses_what_it_does_not_know(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        load(path)
    path.write_text("model: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds no settings"):
        load(path)
    path.write_text("model: 3\nsede: 1\noptim:\n  lr: fast\n")
    with pytest.raises(ConfigError, match=r"3 problems(?s:.*)did you mean seed\?") as caught:
        load(path)
    assert sorted(problem.key for problem in caught.value.problems) == ["model", "optim.lr", "sede"]


def test_differences_list_only_what_was_changed(corpus):
    config = compose([f"data.path={corpus}", "optim.lr=0.5", "train.steps=100", "train.global_batch_size=8"])
    assert differences(config) == {"data.path": (str(corpus), ""), "optim.lr": (0.5, 1e-3)}
    assert differences(RunConfig()) == {}


def test_validate_works_on_settings_made_in_python(corpus):
    config = RunConfig()
    config.data.path = str(corpus)
    assert validate(config, 1) == []
    config.optim.lr = -1.0
    config.parallel.tp = 0  # rules about the layout must not divide by it
    config.model.num_heads = 0
    assert {problem.key for problem in validate(config, 2)} == {"optim.lr", "parallel.tp", "model.num_heads"}
    config = RunConfig(resume=str(corpus))
    config.data.path = str(corpus)
    assert validate(config, None) == []  # an existing folder may be a checkpoint


def test_composing_leaves_no_hydra_behind(corpus):
    from hydra.core.global_hydra import GlobalHydra

    compose([f"data.path={corpus}"])
    assert not GlobalHydra.instance().is_initialized()


def test_a_parser_of_settings_needs_no_megatron():
    heavy = "('torch', 'megatron', 'tokenizers', 'wandb')"
    code = f"import sys, megaopus.config.compose; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
