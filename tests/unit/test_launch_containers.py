"""The PyTorchJob fits its schema, the Dockerfiles their linter, and the images' install steps run."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
JOB = yaml.safe_load((ROOT / "launch" / "pytorchjob.yaml").read_text())
SCHEMA = json.loads(Path(__file__).with_name("pytorchjob.schema.json").read_text())
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def check_job(job: dict) -> None:
    jsonschema.validate(job, SCHEMA)
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "x"},
            "template": replica["template"],
        }
        kubernetes_validate.validate(template, "1.33", strict=True)


def test_the_pytorchjob_fits_its_schema():
    check_job(JOB)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("spec", "nprocPerNode"), 8, "is not of type 'string'"),
        (("spec", "runPolicy", "cleanPodPolicy"), "Some", "is not one of"),
        (("spec", "pytorchReplicaSpecs", "Master", "replicas"), 2, "1 was expected"),
        (("spec", "pytorchReplicaSpecs", "Worker", "restart"), "OnFailure", "restart"),
        (("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "container"), [], "container"),
        (("spec", "pytorchReplicaSpecs", "Worker", "template", "spec", "containers", 0, "args"), [8], "8 is not"),
    ],
)
def test_a_wrong_pytorchjob_is_seen(place, value, message):
    job = copy.deepcopy(JOB)  # Master and Worker are one object in the file
    target = job
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=re.escape(message)):
        check_job(job)


def test_the_pytorchjob_asks_for_as_many_gpus_as_it_starts_ranks():
    for replica in JOB["spec"]["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        ranks = container["args"][0]
        assert ranks == JOB["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        stop = next(int(item["value"]) for item in container["env"] if item["name"] == "STOP_SECONDS")
        assert pod["terminationGracePeriodSeconds"] > stop


def test_the_pod_starts_a_node_of_torchrun_with_its_arguments_untouched(tmp_path):
    (container,) = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    command = [text.replace("/opt/megaopus", str(ROOT)) for text in container["command"]]
    settings = ["data.target_domains=[docs]", "data.path=$(touch x) `touch x`"]
    given = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "megaopus-master-0", "MASTER_PORT": "23456"}
    environment = {"PATH": os.environ["PATH"], "PYTHON": "/bin/echo", "DRY_RUN": "1", **given}
    done = subprocess.run(
        [*command, container["args"][0], *settings], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "--nnodes 2 --node-rank 1 --master-addr megaopus-master-0 --master-port 23456" in done.stdout, done.stderr
    assert "--nproc-per-node 8" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean_pinned_and_not_root(path):
    linter = str(Path(sysconfig.get_path("scripts")) / "hadolint")
    done = subprocess.run([linter, "--no-color", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"[\w./]+:\d[\w.-]*", base), "a tag with a version"
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001"]
    assert re.search(r"docker/install\.sh (cpu|cuda)", text)[1] == path.suffix[1:]


def test_images_take_in_exactly_what_the_dockerfiles_copy():
    first, *taken = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    assert first == "*"
    allowed = {line[1:] for line in taken if line.startswith("!")}
    for path in DOCKERFILES:
        copied = re.findall(r"^COPY (.+) \S+$", path.read_text(), re.MULTILINE)
        assert {name for line in copied for name in line.split()} == allowed
    assert all((ROOT / name).exists() for name in allowed)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return what an image gets, and a python of its own that sees this one's packages: nothing is downloaded again."""
    folder = tmp_path_factory.mktemp("image")
    for name in [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]:
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder / "src" / name)
    venv.create(folder / "venv")
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def install(sources, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    inherited["PIP_NO_BUILD_ISOLATION"] = "1"  # the setuptools that is there will do, and is faster
    return subprocess.run(
        [sources / "src" / "docker" / "install.sh", *arguments],
        env={**inherited, "PYTHON": str(sources / "venv" / "bin" / "python"), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_the_install_steps_of_the_images_run(image, sources, tmp_path):
    pins = tmp_path / "constraint.txt"
    pins.write_text("# the image's\nNumPy==" + __import__("numpy").__version__ + "\ntorch==1.0.0\n")
    done = install(sources, image, IMAGE_CONSTRAINTS=str(pins), PIP_CONSTRAINT=str(pins) if image == "cuda" else "")
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("megaopus ")
    assert f"Requirement already satisfied: torch>=2.6 in {sysconfig.get_path('purelib')}" in done.stdout
    assert "Successfully installed megaopus-" in done.stdout
    python = sources / "venv" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import megaopus, torch; print(megaopus.__file__, torch.__version__)"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert where.stdout.split() == [str(sources / "src" / "megaopus" / "__init__.py"), torch.__version__], where.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "say for which image"), (["cuda"], "nowhere is missing: this is no NGC PyTorch image")],
)
def test_install_refuses(arguments, message, sources):
    done = install(sources, *arguments, IMAGE_CONSTRAINTS="nowhere")
    assert done.returncode == 2
    assert message in done.stderr
