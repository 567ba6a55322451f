"""docs/config.md: its commands work, its error is what comes out, its table lists what is there."""

import re
import shlex
from pathlib import Path

from megaopus.__main__ import main
from megaopus.config.compose import compose, default_config_dir
from tests.unit.config_corpus import write_manifest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "config.md").read_text()


def test_the_error_on_the_page_is_the_real_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_manifest(Path("corpus"))
    command, expected = re.search(r"\$ python -m megaopus (.+?)\n(.+?)```", PAGE, re.DOTALL).groups()
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err == expected


def test_the_first_command_composes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest(Path("corpus"))
    command = re.search(r"python -m megaopus check (.+)", PAGE)[1]
    assert compose(shlex.split(command)).optim.lr == 6e-4


def test_the_example_file_is_an_experiment(tmp_path):
    corpus = write_manifest(tmp_path / "corpus")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(re.search(r"```yaml\n(.+?)```", PAGE, re.DOTALL)[1])
    config = compose([f"data.path={corpus}", "experiment=mine"], tmp_path)
    assert (config.data.seq_len, config.model.norm, config.selection.method) == (512, "rmsnorm", "opus")


def test_the_table_lists_every_choice():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE, re.MULTILINE))
    listed = {group: set(re.findall(r"`(\w+)`", choices)) for group, choices in rows.items()}
    configs = default_config_dir()
    groups = [path for path in configs.iterdir() if path.is_dir()]
    assert listed == {group.name: {file.stem for file in group.glob("*.yaml")} for group in groups}
