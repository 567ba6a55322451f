"""launch/submit.py with stand-ins for Slurm's commands: what it writes and refuses; no shell reads a setting."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "launch" / "submit.py"
BASIC = ["--gpus-per-node", "8", "--time", "24:00:00"]
TRUE = shutil.which("true")
"""A python that has every module and refuses no setting."""
NASTY = [
    "data.path=$(touch pwned)`touch pwned`",
    "logging.wandb_project='a b'\"; touch pwned; \"",
    "data.target_domains=[a,b c]",
]


@pytest.fixture
def slurm(tmp_path):
    """A folder for PATH with sbatch and squeue that answer as the files beside them say, and keep their arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, answer in (("sbatch", "4711;cluster"), ("squeue", "")):
        (folder / f"{name}.out").write_text(answer)
        script = f'#!/bin/sh\ncd {shlex.quote(str(folder))}\necho "$@" >> {name}.args\n. ./{name}.do\ncat {name}.out\n'
        (folder / f"{name}.do").write_text("")
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def stub(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def bare_python(folder):
    """The python of these tests without what is installed for it."""
    return stub(folder / "bare", f'exec {shlex.quote(sys.executable)} -I -S "$@"')


def submit(*arguments, slurm=None, cwd=None, script=SUBMIT, **environment):
    path = os.environ["PATH"] if slurm is None else f"{slurm}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-S", "-E", script, *arguments],  # -S: not even site-packages
        env={"PATH": path, "PYTHON": TRUE, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path):
    options = [
        "--nodes",
        "2",
        "--partition",
        "gpu",
        "--account",
        "lab",
        "--option",
        "constraint=h100&ib",
        "--option=exclusive",
    ]
    done = submit(*BASIC, *options, "--dry-run", "--", "run_dir=runs/first", "optim.lr=1e-3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    header = [line.removeprefix("#SBATCH --") for line in done.stdout.splitlines() if line.startswith("#SBATCH")]
    assert header == [
        "job-name=first",
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=24:00:00",
        "partition=gpu",
        "account=lab",
        f"output={tmp_path}/runs/first/submissions/000/output.txt",
        "open-mode=append",
        "signal=B:USR1@300",
        "requeue",
        "constraint=h100&ib",
        "exclusive",
    ]
    launcher = f"launcher='sbatch {tmp_path}/runs/first/submissions/000/job.sbatch'"
    assert f"\n{launcher}\nsetup=''\n" in done.stdout
    assert f"\nsrun_options=()\npython=({TRUE})\narguments=(run_dir=runs/first optim.lr=1e-3)\n" in done.stdout
    assert "#@" not in done.stdout.split("\nset ", 1)[1]


def test_the_script_is_clean_shell(tmp_path):
    script = tmp_path / "job.sbatch"
    more = ["--setup", "module load 'a b'", "--container-image", "/a.sqsh", "--container-mounts", "/a:/b:ro,/c:/d"]
    settings = ["run_dir=runs/first", "data.target_domains=[a,b c]"]
    script.write_text(submit(*BASIC, *more, "--dry-run", "--", *settings).stdout)
    checker = Path(sysconfig.get_path("scripts")) / "shellcheck"
    for path in (script, ROOT / "launch" / "torchrun.sh", ROOT / "docker" / "install.sh"):
        done = subprocess.run([checker, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def job(tmp_path, script, **environment):
    """Run a batch script with stand-ins: srun runs its command as the only task."""
    folder = tmp_path / "fakes"
    folder.mkdir(parents=True)
    fakes = {
        "scontrol": '[ "$2" != hostnames ] || echo "$3"',
        "srun": f'while [ "${{1#--}}" != "$1" ]; do echo "$1" >> {folder}/srun.args; shift; done\nexec "$@"',
        "apptainer": f'echo $* > {folder}/apptainer.args\nuntil [ "$1" = image.sif ]; do shift; done\nexec "${{@:2}}"',
    }
    for name, text in fakes.items():
        stub(folder / name, text)
    variables = {"JOB_ID": "7", "JOB_NODELIST": "127.0.0.1", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in (variables | {"NTASKS_PER_NODE": "1"}).items()}
    return subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **slurm, **environment},
        capture_output=True,
        text=True,
    )


def test_settings_reach_the_trainer_as_they_were_given(tmp_path):
    work = tmp_path / "a folder; $(touch pwned)"
    work.mkdir()
    text = 'printf "<%s>\\n" "$@"; echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT"; pwd'
    echo = stub(tmp_path / "echo", text)
    run_dir = f"run_dir={tmp_path}/runs/first"
    done = submit(*BASIC, "--python", echo, "--dry-run", "--", run_dir, *NASTY, cwd=work)
    ran = job(tmp_path, done.stdout)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[1:-3] == [f"<{text}>" for text in ("-m", "megaopus", "train", run_dir, *NASTY)]
    assert lines[-3:-1] == ["0 0 1 127.0.0.1 12007", str(work)]
    assert not list(tmp_path.rglob("pwned"))


def test_setup_comes_before_python_and_its_failure_ends_the_job(tmp_path):
    """A sourced file sees no argument, the python is the one that setup puts on the PATH."""
    stub(tmp_path / "module", f'export SEEN="<$*>" PATH={tmp_path}/loaded:$PATH')
    (tmp_path / "loaded").mkdir()
    stub(tmp_path / "loaded" / "python", 'echo "$SEEN $GREETING" "${@:2}"')
    lines = ["export GREETING='a  b'", f". {tmp_path}/module"]
    setup = [f"--setup={line}" for line in lines]
    settings = ["--dry-run", "--", f"run_dir={tmp_path}/run"]
    done = submit(*BASIC, *setup, "--python", "python", *settings)
    ran = job(tmp_path / "good", done.stdout)
    assert ran.returncode == 0, ran.stderr
    assert f"\n<> a  b megaopus train run_dir={tmp_path}/run\n" in ran.stdout
    ran = job(tmp_path / "bad", submit(*BASIC, *setup, "--setup", "no_such_module load x", *settings).stdout)
    assert ran.returncode == 2
    assert "no_such_module: command not found" in ran.stderr
    assert ": --setup 'no_such_module load x' failed\n" in ran.stderr


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_tasks_run_in_the_container(runtime, tmp_path):
    echo = stub(tmp_path / "python", 'echo "$RANK" "${@:2}"')
    mounts = ["--container-mounts=/data:/data:ro", "--container-mounts=/a:/b,/c:/d"]
    options = ["--container-image", "image.sif", "--container-runtime", runtime, *mounts, "--python", echo]
    run_dir = f"run_dir={tmp_path}/run"
    ran = job(tmp_path, submit(*BASIC, *options, "--dry-run", "--", run_dir, cwd=tmp_path).stdout)
    assert ran.returncode == 0, ran.stderr
    assert f"\n0 megaopus train {run_dir}\n" in ran.stdout
    folders = f"{tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data:/data:ro,/a:/b,/c:/d"
    told = (tmp_path / "fakes" / "srun.args").read_text().splitlines()[2:]
    pyxis = ["image=image.sif", f"mounts={folders}", f"workdir={tmp_path}"]
    assert told == ([f"--container-{each}" for each in pyxis] if runtime == "pyxis" else [])
    if runtime == "apptainer":
        *_, started = (tmp_path / "fakes" / "apptainer.args").read_text().splitlines()
        where = f"exec --nv --bind {folders} --pwd {tmp_path} image.sif"
        assert started == f"{where} {echo} -m megaopus train {run_dir}"


def test_a_python_without_megaopus_is_told_on_the_node(tmp_path):
    settings = ["--dry-run", "--", f"run_dir={tmp_path}/run"]
    bare = bare_python(tmp_path)
    ran = job(tmp_path, submit(*BASIC, "--python", bare, "--unchecked", *settings).stdout)
    assert ran.returncode == 2
    assert f": {bare} cannot run megaopus: megaopus, torch, hydra; submit again with the --python of one" in ran.stderr


def test_a_rendezvous_host_that_does_not_resolve_ends_the_job_at_once(tmp_path):
    script = submit(*BASIC, "--python", "true", "--dry-run", "--", f"run_dir={tmp_path}/run").stdout
    ran = job(tmp_path, script, SLURM_JOB_NODELIST="no-such-host.invalid")
    assert ran.returncode == 2
    assert "the rendezvous host no-such-host.invalid does not resolve here" in ran.stderr


def test_a_submission_is_kept_and_a_second_refused_while_the_job_lives(tmp_path, slurm):
    settings = ["--", f"run_dir={tmp_path}/run"]
    done = submit(*BASIC, *settings, slurm=slurm)
    folder = tmp_path / "run" / "submissions" / "000"
    assert done.stdout == f"job 4711 submitted: {folder}/job.sbatch, output in {folder}/output.txt\n", done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["job.sbatch", "job_id"]
    assert (folder / "job.sbatch").read_text() == submit(*BASIC, "--dry-run", *settings).stdout.replace("001", "000")
    assert (slurm / "sbatch.args").read_text() == f"--parsable {folder}/job.sbatch\n"
    (slurm / "squeue.out").write_text("PENDING\n")
    second = submit(*BASIC, *settings, slurm=slurm)
    assert second.returncode == 2
    assert f"job 4711 of {folder} is PENDING: wait for it, or end it with scancel 4711" in second.stderr
    assert (slurm / "squeue.args").read_text() == "-h -o %T -j 4711\n"
    (slurm / "squeue.out").write_text("")
    (slurm / "squeue.do").write_text("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    assert "cannot ask Slurm about job 4711" in submit(*BASIC, *settings, slurm=slurm).stderr
    (slurm / "squeue.do").write_text("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    assert "submissions/001/job.sbatch" in submit(*BASIC, *settings, slurm=slurm).stdout
    (folder / "job_id").unlink()
    assert f"{folder}: another submission is under way" in submit(*BASIC, *settings, slurm=slurm).stderr
    assert len(list(folder.parent.iterdir())) == 2


def test_what_sbatch_refuses_leaves_nothing(tmp_path, slurm):
    (slurm / "sbatch.do").write_text("echo 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    done = submit(*BASIC, "--", f"run_dir={tmp_path}/run", slurm=slurm)
    assert done.returncode == 2
    assert "sbatch refused the job: sbatch: error: invalid partition specified: x" in done.stderr
    assert list((tmp_path / "run" / "submissions").iterdir()) == []


RUN = "run_dir=runs/first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BASIC], "run_dir=FOLDER is missing"),
        ([*BASIC, RUN, "uniform"], "'uniform' is not a setting: write KEY=VALUE"),
        ([*BASIC, RUN, "data.path=a\nb"], "in one line"),
        ([*BASIC, "run_dir=runs/a b"], "use letters, digits and"),
        ([*BASIC, "run_dir=runs/%j"], "use letters, digits and"),
        ([*BASIC, "run_dir=s3://bucket/run"], "run_dir=s3://bucket/run: is an address"),
        ([*BASIC, "run_dir=${oc.env:HOME}"], "use letters, digits and"),
        ([*BASIC, f"run_dir={SUBMIT}"], "is a file"),
        (["--time", "1:00:00", RUN], "--tasks-per-node 0: must be at least 1; or set --gpus-per-node"),
        ([*BASIC, "--nodes", "0", RUN], "--nodes 0: must be at least 1"),
        (["--gpus-per-node", "8", "--time", "tomorrow", RUN], "--time 'tomorrow' is not a time"),
        (["--gpus-per-node", "8", "--time", "5", RUN], "--stop-before 300: must be less than the time limit (300 s)"),
        ([*BASIC, "--partition", "a b", RUN], "--partition 'a b': use letters"),
        ([*BASIC, "--name", "a\n#SBATCH --uid=0", RUN], "--name"),
        ([*BASIC, "--option", "comment=a b", RUN], "--option 'comment=a b': write KEY or KEY=VALUE"),
        ([*BASIC, "--option", "output=x", RUN], "--option 'output=x': is set by this script"),
        ([*BASIC, "--python", "/no/python", RUN], "--python /no/python: no such program"),
        ([*BASIC, "--setup", "a\nb", RUN], "--setup 'a\\nb': write a shell command in one line"),
        ([*BASIC, "--container-mounts", "/a:/b", RUN], "--container-mounts /a:/b: needs --container-image"),
        ([*BASIC, "--container-image", "--x", RUN], "expected one argument"),
        ([*BASIC, "--container-image=-x", RUN], "--container-image '-x': is no name"),
        ([*BASIC, "--container-image=i", "--container-mounts=/a", RUN], "--container-mounts '/a': write SRC:/DST"),
        ([*BASIC, "--container-image=i", "run_dir=a:b"], "a:b: no container can mount it; use a path without"),
        ([*BASIC, "--option", "container-image=i", RUN], "--option 'container-image=i': is set by this script"),
        ([*BASIC, "--check", "--unchecked", RUN], "not allowed with argument --check"),
        ([*BASIC, RUN], "sbatch is not on the PATH"),
    ],
)
def test_refusals(arguments, message, tmp_path):
    done = submit(*arguments, cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_no_settings(tmp_path):
    given = {"HF_TOKEN": "hf_abcdefghijkl", "WANDB_API_KEY": "0123456789abcdef"}
    done = submit(*BASIC, "--dry-run", "--", RUN, "data.path=/data", cwd=tmp_path, **given)
    assert done.returncode == 0
    assert not [secret for secret in given.values() if secret in done.stdout + done.stderr]
    done = submit(*BASIC, "--dry-run", "--", RUN, "data.path=https://u:hf_abcdefghijkl@host", cwd=tmp_path, **given)
    assert done.returncode == 2
    assert "a setting holds the value of $HF_TOKEN" in done.stderr
    assert "hf_abc" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("text", "limit"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-3", 183600), ("1-0:30", 88200), ("1-00:00:01", 86401)],
)
def test_times_are_slurms(text, limit, tmp_path):
    done = submit("--gpus-per-node", "1", "--time", text, "--stop-before", "99999", RUN)
    assert f"the time limit ({limit} s)" in done.stderr


@pytest.mark.slow
def test_a_mistyped_setting_is_refused_before_anything_is_written(tmp_path, slurm):
    place = tmp_path / "here"
    place.mkdir()
    real = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = submit(*BASIC, "--", RUN, "optim.lrr=1e-3", "data.path=corpus", cwd=place, slurm=slurm, **real)
    assert done.returncode == 2
    assert "1. optim.lrr = 0.001: no such setting\n    -> did you mean optim.lr?" in done.stderr
    assert ". data.path = 'corpus': no such folder" in done.stderr
    assert done.stderr.endswith("submit.py: megaopus check refuses these settings; nothing was written\n")
    assert done.stdout == ""
    assert list(place.iterdir()) == []
    assert not (slurm / "sbatch.args").exists()


IMAGE = ["--container-image", "image"]


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ([], "--settings-only"),
        (["--check"], ""),
        (["--config-dir", "mine"], "--settings-only --config-dir mine"),
        (IMAGE, "--settings-only --no-corpora"),  # whose paths are those inside it
        ([*IMAGE, "--check"], ""),
        (["--unchecked"], None),
    ],
)
def test_settings_are_checked_for_the_ranks_of_the_job(options, how, dry, tmp_path, slurm):
    python = stub(tmp_path / "python", f'[[ $1 != -m ]] || {{ echo "${{@:2}}" >> {tmp_path}/told; exit 2; }}')
    done = submit(*BASIC, *options, *dry, "--nodes=2", "--", RUN, "a=b", cwd=tmp_path, slurm=slurm, PYTHON=python)
    told = [] if how is None else [f"megaopus check --world-size 16 {how} {RUN} a=b".replace("  ", " ")]
    assert ((tmp_path / "told").read_text().splitlines() if told else []) == told
    assert done.returncode == (2 if told else 0)
    assert ("megaopus check refuses these settings; nothing was written" in done.stderr) == bool(told)
    assert ((tmp_path / "runs").exists(), (slurm / "sbatch.args").exists()) == (not told and not dry,) * 2


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ([], "name one that has it (pip install .) with --python, or check nothing here with --unchecked"),
        (IMAGE, "(pip install .) for this check as $PYTHON, or check nothing here with --unchecked"),
    ],
)
def test_no_python_that_can_check_is_told(options, remedy, tmp_path):
    bare = bare_python(tmp_path)
    stub(tmp_path / "python3", f'exec {bare} "$@"')
    script = shutil.copytree(SUBMIT.parent, tmp_path / "launch") / SUBMIT.name  # without a .venv beside it
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = submit(*BASIC, *options, "--dry-run", "--", RUN, script=script, cwd=tmp_path, PYTHON=bare, PATH=path)
    assert done.returncode == 2
    tried = f"{'python3' if options else bare} lacks megaopus, torch, hydra"
    assert f"no python that can run megaopus: {tried}" in done.stderr
    assert remedy in done.stderr
    assert done.stdout == ""
