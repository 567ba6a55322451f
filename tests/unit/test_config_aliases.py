"""Settings by their old names: in saved files, in checkpoints, on the command line, in YAML and in resume_allow."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from megaopus.__main__ import main
from megaopus.config.aliases import RENAMED, current, current_override, former, notes, renamed, with_old_names
from megaopus.config.compose import compose
from megaopus.config.parse import load, restored, to_yaml
from megaopus.config.resume_policy import Began, changes, continued, continued_half_life, refuse_unallowed
from megaopus.config.run_config import SETTINGS, RunConfig, default_settings
from megaopus.config.validation import validate
from megaopus.errors import CheckpointError, ConfigError
from tests.unit.config_corpus import write_manifest

OLD = [
    *("data.wanted=[docs]", "data.traits_path=here", "selection.prescreen.traits=[domain,shape]"),
    "selection.proxy_ema=0.8",
]


EIGHTY = 16 * math.log(0.5) / math.log(0.8)
"""Steps after which four fifths, taken every 16 steps, are a half."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "corpus")


def as_before(config: RunConfig) -> dict:
    """The settings as version 0.1 saved them."""
    tree = asdict(config)
    tree["data"]["wanted"] = tree["data"].pop("target_domains")
    tree["data"]["traits_path"] = tree["data"].pop("text_features_path")
    tree["selection"]["prescreen"]["traits"] = tree["selection"]["prescreen"].pop("text_features")
    tree["selection"]["proxy_ema"] = config.selection.proxy_decay
    del tree["selection"]["proxy_half_life"]
    return tree


def chosen() -> RunConfig:
    config = RunConfig()
    config.data.target_domains, config.data.text_features_path = ["docs"], "here"
    config.selection.prescreen.text_features = ["domain", "shape"]
    config.selection.prescreen.mode, config.selection.prescreen.every = "predict", 16
    config.selection.proxy_half_life = EIGHTY
    return config


def test_the_table() -> None:
    for old, new in RENAMED.items():
        assert new in SETTINGS
        assert old not in SETTINGS
        assert (current(old), current(new), former(new), former(old)) == (new, new, old, old)
    assert current("optim.lr") == former("optim.lr") == "optim.lr"


def test_a_saved_config_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_before(chosen())))
    assert load(path) == chosen()
    assert "wanted" not in to_yaml(load(path))
    assert restored(as_before(chosen()), "state.json") == chosen()


def test_a_checkpoint_saved_under_old_names_has_not_changed() -> None:
    now = chosen()
    saved = as_before(now)
    assert changes(saved, asdict(now), default_settings(now)) == []
    assert "wanted" in saved["data"]  # what was saved is left alone
    now.data.target_domains = ["code"]
    found = changes(saved, asdict(now), default_settings(now))
    assert found == [("data.target_domains", ["docs"], ["code"])]
    with pytest.raises(CheckpointError, match=r"data\.target_domains: saved \['docs'\], now \['code'\]"):
        refuse_unallowed(found, [], "step_00000001")
    refuse_unallowed(found, ["data.wanted"], "step_00000001")
    refuse_unallowed(found, ["data.target_domains"], "step_00000001")


def test_the_command_line(corpus: Path) -> None:
    config = compose([f"data.path={corpus}", *OLD, "resume_allow=[data.wanted]"])
    assert (config.data.target_domains, config.data.text_features_path) == (["docs"], "here")
    assert config.selection.prescreen.text_features == ["domain", "shape"]
    assert config.selection.proxy_decay == 0.8
    assert compose([f"data.path={corpus}", "+data.wanted=[docs]"]).data.target_domains == ["docs"]
    for problem in ("data.wanted=docs", "data.wanted=[dosc]", "~data.wanted"):
        with pytest.raises(ConfigError) as caught:
            compose([f"data.path={corpus}", problem])
        assert [each.key for each in caught.value.problems] == ["data.target_domains"]
    assert current_override("++data.wanted=[a=b]") == "++data.target_domains=[a=b]"
    assert current_override("data.wantedd=[a]") == "data.wantedd=[a]"


def test_the_command_line_tells_the_new_name_once(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = ["resume_allow=[data.wanted,selection.prescreen.traits]"]
    assert main(["check", f"data.path={corpus}", "data.wanted=[docs]", "optim.lr=-1", *allowed]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "note: data.wanted is now data.target_domains"
    later = {"selection.proxy_ema": ", in training steps"}
    assert notes(OLD, []) == [f"{old} is now {new}{later.get(old, '')}" for old, new in RENAMED.items()]
    assert notes(["data.target_domains=[docs]"], ["data.wanted"]) == ["data.wanted is now data.target_domains"]
    assert notes(["+data.wanted=[docs]"], ["data.wanted"]) == ["data.wanted is now data.target_domains"]


def test_yaml_of_a_user(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndata:\n  wanted: [docs]\nrun_dir: runs/${data.wanted}\n"
    (folder / "mine.yaml").write_text(
        text.replace("${data.wanted}", "${data.wanted.0}x") + "resume_allow: [data.wanted]\n"
    )
    config = compose([f"data.path={corpus}", "experiment=mine"], folder.parent)
    assert (config.data.target_domains, config.run_dir) == (["docs"], "runs/docsx")
    assert config.resume_allow == ["data.wanted"]
    assert validate(config, 1) == []
    for name in ("data.target_domains", "data.wanted"):  # the command line wins over a file, whatever the names
        config = compose([f"data.path={corpus}", "experiment=mine", f"{name}=[code]"], folder.parent)
        assert (config.data.target_domains, config.run_dir) == (["code"], "runs/codex")


def test_resume_allow_is_held_to_the_class_of_the_new_name(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="needs no permission to change"):
        compose([f"data.path={corpus}", "resume_allow=[data.traits_path]"])


def test_a_decay_a_gradient_becomes_a_half_life_in_steps(corpus: Path, tmp_path: Path) -> None:
    def half_life(*overrides: str, folder: Path | None = None) -> float:
        return compose([f"data.path={corpus}", *overrides], folder).selection.proxy_half_life

    old, every = "selection.proxy_ema=0.8", "selection.prescreen.every=16"
    predicting = ["selection=screened", every]
    assert half_life(*predicting, old) == half_life(*predicting, f"+{old}") == pytest.approx(EIGHTY)
    assert half_life(*predicting, "selection.score_every=3", old) == pytest.approx(3 * EIGHTY)
    assert half_life(*predicting, "selection.proxy_every=24", old) == pytest.approx(3 * EIGHTY)
    assert half_life("selection=opus_exact", every, old) == pytest.approx(EIGHTY / 16)  # every step is scored
    assert half_life(*predicting, "selection.proxy_ema=0") == 0
    assert half_life(*predicting, old, "selection.proxy_half_life=7") == 7
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    text = "# @package _global_\ndefaults: [{override /selection: screened}]\nrun_dir: runs/${selection.proxy_ema}\n"
    (mine / "mine.yaml").write_text(text + "selection: {proxy_ema: 0.8, prescreen: {every: 16}}\n")
    assert half_life("experiment=mine", folder=mine.parent) == pytest.approx(EIGHTY)
    assert half_life("experiment=mine", "selection.proxy_half_life=7", folder=mine.parent) == 7
    assert compose([f"data.path={corpus}", "experiment=mine"], mine.parent).run_dir == "runs/0.8"
    for wrong in ("3.5", "-1", "fast", "true", "1"):
        with pytest.raises(ConfigError, match="in training steps") as caught:
            half_life(*predicting, f"selection.proxy_ema={wrong}")
        assert [each.key for each in caught.value.problems] == ["selection.proxy_ema"]


def test_a_run_that_began_with_the_former_default_recipe_goes_on_with_it(corpus: Path) -> None:
    own = [f"data.path={corpus}", "data.target_domains=[docs]", "selection.rho=0.25", "selection.prescreen.slice=16"]
    was, now = (compose([*own, f"selection={name}"]) for name in ("screened", "opus"))
    saved = asdict(was)
    del saved["selection"]["cadence"]  # there was no such setting
    began = continued(saved, now)
    assert now.selection == was.selection
    assert any("screened now" in line for line in began.told)
    again = asdict(now)
    began.put(again)  # what the next checkpoint says: it is asked once more then
    assert again["selection"] == saved["selection"]
    # a run of today is what it says, and so is one that is allowed to change
    today = compose([*own, "selection=opus"])
    assert continued(asdict(was), today).told == ()
    assert today.selection.utilities == "odds"
    changed = compose([*own, "selection=opus", "resume_allow=[selection.utilities]"])
    continued(saved, changed)
    assert changed.selection.utilities == "odds"


def test_a_section_takes_the_old_decay() -> None:
    config = chosen().selection
    with pytest.warns(DeprecationWarning, match=r"SelectionConfig\.proxy_ema is now SelectionConfig\.proxy_half_life"):
        same = replace(config, proxy_half_life=3.0, proxy_ema=0.8)
    assert same.proxy_half_life == pytest.approx(EIGHTY)
    with pytest.warns(DeprecationWarning, match="proxy_ema"):
        assert same.proxy_ema == 0.8
    with pytest.warns(DeprecationWarning, match="proxy_ema"):
        same.proxy_ema = 0.64
    assert same.proxy_half_life == pytest.approx(EIGHTY / 2)
    with pytest.raises(ValueError, match=r"proxy_ema=1 must lie in \[0, 1\)"):
        replace(config, proxy_ema=1)


def test_a_run_that_began_with_a_decay_goes_on_with_it() -> None:
    """Recipes are in steps today: of another prescreen.every the same command means another decay."""
    now, saved = chosen(), as_before(chosen())
    now.selection.proxy_half_life = 99.4
    again, told = continued_half_life(saved, now)
    assert (again, now.selection.proxy_half_life) == (0.8, pytest.approx(EIGHTY))
    assert "stays 49.7005, as this run began with proxy_ema=0.8 (the command says 99.4 now: resume_allow=" in told
    next_one = asdict(now)
    next_one["selection"]["proxy_ema"] = again  # as the next checkpoint has it
    now.selection.proxy_half_life = 99.4
    assert continued_half_life(next_one, now)[0] == 0.8
    assert now.selection.proxy_half_life == pytest.approx(EIGHTY)
    assert continued_half_life(next_one, now) == (0.8, "")
    now.selection.proxy_half_life, now.resume_allow = 99.4, ["selection.proxy_ema"]
    assert continued_half_life(next_one, now) == (None, "")
    assert continued_half_life(asdict(chosen()), chosen()) == (None, "")
    assert now.selection.proxy_half_life == 99.4


def diverse() -> RunConfig:
    config = RunConfig()
    config.selection.method, config.selection.redundancy = "opus", 0.5
    return config


def test_a_run_with_a_sketch_of_each_layer_goes_on_with_them(tmp_path: Path) -> None:
    """As every run did before there was gram_sketch; by the same command, launch after launch."""
    saved = asdict(diverse())
    del saved["selection"]["gram_sketch"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert restored(saved, "state.json").selection.gram_sketch == "per_layer"
    assert load(tmp_path / "config.yaml").selection.gram_sketch == "per_layer"
    for _ in range(2):
        now = diverse()
        found = changes(saved, asdict(now), default_settings(now))
        assert found == [("selection.gram_sketch", "per_layer", "summed")]
        began = continued(saved, now)
        (told,) = began.told
        assert told.startswith("selection.gram_sketch stays per_layer, as this run began")
        assert now.selection.gram_sketch == "per_layer"
        assert changes(saved, asdict(now), default_settings(now)) == []
        saved = asdict(now)
        began.put(saved)  # as the next checkpoint has it
    now = diverse()
    now.selection.gram_sketch = "per_layer"
    assert continued(saved, now).told == ()
    now = diverse()
    now.resume_allow = ["selection.gram_sketch"]
    began = continued(saved, now)
    assert (began, now.selection.gram_sketch) == (Began(), "summed")
    found = changes(saved, asdict(now), default_settings(now))
    refuse_unallowed(found, now.resume_allow, "step_00000001")
    with pytest.raises(CheckpointError, match=r"selection\.gram_sketch: saved 'per_layer', now 'summed'"):
        refuse_unallowed(found, [], "step_00000001")


def test_a_run_without_redundancy_or_that_says_its_sketches_is_taken_at_its_word() -> None:
    plain, said = RunConfig(), diverse()
    saved = asdict(plain)
    del saved["selection"]["gram_sketch"]
    assert continued(saved, plain) == continued(asdict(said), diverse()) == continued({}, diverse()) == Began()
    assert plain.selection.gram_sketch == "summed"
    assert changes(saved, asdict(plain), default_settings(plain)) == []
    said.selection.gram_sketch = "per_layer"
    now = diverse()
    assert continued(asdict(said), now) == Began()
    with pytest.raises(CheckpointError, match="gram_sketch"):
        refuse_unallowed(changes(asdict(said), asdict(now), default_settings(now)), [], "step_00000001")


def test_of_both_names_the_new_one_counts() -> None:
    tree = {"data": {"wanted": ["a"], "target_domains": ["b"]}, "model": 3, "selection": None}
    assert renamed(tree) == {"data": {"target_domains": ["b"]}, "model": 3, "selection": None}
    assert renamed({}) == with_old_names({}) == {}
    assert renamed({"data": 3}) == {"data": 3}


def test_prepare_takes_the_old_flag_with_a_note(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = [f'{{"text": "Page {i} of it.", "domain": "{("a", "b")[i % 2]}"}}\n' for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    command = ["prepare", "--source", str(tmp_path / "rows.jsonl"), "--vocab-size", "300", "--proxy-fraction", "0.2"]
    manifests = []
    for place, flags in {"old": ["--wanted", "a"], "new": ["--target-domains", "a"]}.items():
        assert main([*command, *flags, "--out", str(tmp_path / place)]) == 0
        manifests.append((tmp_path / place / "manifest.json").read_text())
        assert ("note: --wanted is now --target-domains" in capsys.readouterr().err) == (place == "old")
    assert manifests[0] == manifests[1]
    counts = yaml.safe_load(manifests[0])["counts"]
    assert counts["a"]["proxy"]["documents"] > counts["b"]["proxy"]["documents"] == 0
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    told = capsys.readouterr().out
    assert "--target-domains" in told
    assert "--wanted" not in told
