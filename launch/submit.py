#!/usr/bin/env python3
"""Submit a training run to Slurm. Standard library only: runs on a login node without torch.

  python launch/submit.py --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu -- \\
      experiment=small_opus data.path=/data/corpus run_dir=/runs/first

composes the settings as megaopus train does, writes RUN_DIR/submissions/NNN/job.sbatch (launch/slurm.sbatch with
everything filled in) and submits it. The job saves and requeues itself when preempted and before its time limit. Its
output goes to output.txt beside the script.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "job.sbatch"
TEMPLATE = ROOT / "launch" / "slurm.sbatch"
PATH = re.compile(r"[A-Za-z0-9_./+:@=-]+")
"""A path that Slurm (%), Hydra (commas, brackets, quotes, $) and its #SBATCH lines (spaces, #) take as it is."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
OPTION = re.compile(r"[a-z][a-z-]*(=[A-Za-z0-9_.,:;=@%/+*&|()\[\]!~-]+)?")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")
MOUNT = re.compile(r"[^\s:,]+:/[^\s:,]*(:[a-z+]+)?")
LACKS = """import importlib.util as found, sys
sys.exit(", ".join(name for name in ("megaopus", "torch", "hydra") if found.find_spec(name) is None) or None)"""
"""Program that fails, and names what is missing, where megaopus cannot run; quick, for it imports nothing."""
_RESERVED = """job-name nodes ntasks ntasks-per-node gpus-per-node cpus-per-task time signal requeue no-requeue
open-mode output error chdir export array wrap parsable partition account qos container-image container-mounts"""
RESERVED = frozenset(_RESERVED.split())
MAX_SIGNAL_SECONDS = 65535


class SubmitError(Exception):
    """Says what is wrong, where, and what to do."""


def seconds(text: str) -> int:
    """Slurm's time formats (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in seconds."""
    match = TIME.fullmatch(text)
    if not match:
        raise SubmitError(f"--time {text!r} is not a time: write HH:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    values = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, secs = [*values, 0, 0][:3]
    else:
        hours, minutes, secs = {1: [0, *values, 0], 2: [0, *values], 3: values}[len(values)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def parse(arguments: list[str]) -> argparse.Namespace:
    summary, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="one rank each; 0: a run on CPUs")
    parser.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks per node (default: its GPUs)")
    parser.add_argument("--cpus-per-task", type=int, metavar="N")
    parser.add_argument("--time", required=True, metavar="[D-]HH:MM:SS", help="time limit of each start")
    stop = "save and requeue so many seconds before the time limit (default 300); Slurm may be 60 s early"
    parser.add_argument("--stop-before", type=int, default=300, metavar="SECONDS", help=stop)
    parser.add_argument("--name", help="of the job (default: the run folder's)")
    for option in ("partition", "account", "qos"):
        parser.add_argument(f"--{option}", metavar="NAME")
    more = "any other option of sbatch, such as exclusive or constraint=h100; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="KEY[=VALUE]", help=more)
    python = "interpreter on the nodes (default: $PYTHON, else the checkout's .venv, else the first python3); with"
    python += " --setup the name of one on the PATH that it makes; in a container the image's (default: python3)"
    parser.add_argument("--python", metavar="PATH", help=python)
    setup = "shell command before each task's python, such as 'module load cuda'; outside of apptainer's container,"
    setup += " inside pyxis's; may be repeated"
    parser.add_argument("--setup", action="append", default=[], metavar="COMMAND", help=setup)
    container_arguments(parser.add_argument_group("container"))
    parser.add_argument("--config-dir", metavar="FOLDER", help="as for megaopus train")
    checks = parser.add_mutually_exclusive_group()
    check = "do all that megaopus check does here, the opening of the data too, not compose the settings alone"
    checks.add_argument("--check", action="store_true", help=check)
    unchecked = "do not compose the settings: no python here can"
    checks.add_argument("--unchecked", action="store_true", help=unchecked)
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="settings of the run; run_dir= is needed")
    return parser.parse_args(arguments)


def container_arguments(group: argparse._ArgumentGroup) -> None:
    image = "run each task in it: what pyxis (srun --container-image) or apptainer exec takes"
    group.add_argument("--container-image", metavar="IMAGE", help=image)
    mounts = "more folders of the nodes for it, beside the run folder and this one; may be repeated"
    group.add_argument("--container-mounts", action="append", default=[], metavar="SRC:DST[:FLAGS][,...]", help=mounts)
    group.add_argument("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis", help="default: pyxis")


def check_options(args: argparse.Namespace) -> None:
    """Raise SubmitError for what sbatch would refuse, or worse, take for something else."""
    if args.tasks_per_node is None:
        args.tasks_per_node = args.gpus_per_node
    for option in ("nodes", "tasks_per_node", "cpus_per_task", "stop_before"):
        value = getattr(args, option)
        if value is not None and value < 1:
            hint = "; or set --gpus-per-node" if option == "tasks_per_node" else ""
            raise SubmitError(f"--{option.replace('_', '-')} {value}: must be at least 1{hint}")
    if args.gpus_per_node < 0:
        raise SubmitError(f"--gpus-per-node {args.gpus_per_node}: must be at least 0")
    limit = seconds(args.time)
    if not args.stop_before < min(limit, MAX_SIGNAL_SECONDS + 1):
        raise SubmitError(f"--stop-before {args.stop_before}: must be less than the time limit ({limit} s) and 65536")
    for option in ("name", "partition", "account", "qos"):
        value = getattr(args, option)
        if value is not None and not NAME.fullmatch(value):
            raise SubmitError(f"--{option} {value!r}: use letters, digits, dots, dashes and underscores, at most 64")
    for option in args.option:
        if not OPTION.fullmatch(option):
            raise SubmitError(f"--option {option!r}: write KEY or KEY=VALUE, without spaces, quotes and #")
        if option.split("=", 1)[0] in RESERVED:
            raise SubmitError(f"--option {option!r}: is set by this script; see --help for the option of its own")
    for command in args.setup:
        if not command.strip() or not command.isprintable():
            raise SubmitError(f"--setup {command!r}: write a shell command in one line; the option may be repeated")
    for mount in args.container_mounts:
        if not args.container_image:
            raise SubmitError(f"--container-mounts {mount}: needs --container-image")
        if not all(MOUNT.fullmatch(each) for each in mount.split(",")):
            raise SubmitError(f"--container-mounts {mount!r}: write SRC:/DST or SRC:/DST:FLAGS, commas between")
    if args.container_image is not None and not re.fullmatch(r"[^\s-]\S*", args.container_image):
        raise SubmitError(f"--container-image {args.container_image!r}: is no name, address or path of an image")


def run_folder(overrides: list[str]) -> Path:
    """The absolute run folder that the overrides name; raises SubmitError for any that cannot be one."""
    found = None
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or not text.isprintable():
            raise SubmitError(f"{text!r} is not a setting: write KEY=VALUE in one line")
        if key.lstrip("+") == "run_dir":
            found = value
    if not found:
        raise SubmitError("run_dir=FOLDER is missing: the script, the output and the checkpoints go there")
    if "://" in found:
        raise SubmitError(f"run_dir={found}: is an address, and a run's folder lies in the file system of its nodes")
    folder = Path(os.path.abspath(found))
    if not PATH.fullmatch(found) or not PATH.fullmatch(str(folder)):
        raise SubmitError(f"run_dir={folder}: use letters, digits and . _ / + : @ = - in its path")
    if folder.exists() and not folder.is_dir():
        raise SubmitError(f"run_dir={folder}: is a file")
    return folder


def interpreter(args: argparse.Namespace) -> str:
    """The python of the job's tasks, as an absolute path; by name where --setup or an image has it on its PATH."""
    if args.container_image:
        return args.python or "python3"
    python = args.python or local_pythons()[0]
    if args.setup and "/" not in python:
        return python
    path = shutil.which(python)
    if path is None:
        raise SubmitError(f"--python {python}: no such program here; name one that the nodes have at the same path")
    return os.path.abspath(path)


def local_pythons() -> list[str]:
    """List the pythons of this machine that may have megaopus, the likeliest first."""
    venv = ROOT / ".venv" / "bin" / "python"
    return [*filter(None, [os.environ.get("PYTHON")]), *([str(venv)] if venv.exists() else []), "python3"]


def check_settings(args: argparse.Namespace, python: str) -> None:
    """Compose the settings here as the job will; raises SubmitError if they are refused, or nothing here can do it."""
    remote = bool(args.setup or args.container_image)  # the job's python may need what only the nodes have
    tried = {}
    for here in [python, *local_pythons()] if remote else [python]:
        try:
            probe = subprocess.run([here, "-c", LACKS], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError as error:
            tried[here] = str(error.strerror)
            continue
        if probe.returncode == 0:
            break
        tried[here] = f"lacks {(probe.stderr.strip() or 'something').splitlines()[-1]}"
    else:
        found = "; ".join(f"{name} {why}" for name, why in tried.items())
        remedy = "name one that has it (pip install .) " + ("for this check as $PYTHON" if remote else "with --python")
        raise SubmitError(f"no python that can run megaopus: {found}; {remedy}, or check nothing here with --unchecked")
    how = [] if args.check else ["--settings-only"]
    how += ["--no-corpora"] if args.container_image and not args.check else []  # paths are those of the image
    how += ["--config-dir", args.config_dir] if args.config_dir else []
    ranks = str(args.nodes * args.tasks_per_node)
    command = [here, "-m", "megaopus", "check", "--world-size", ranks, *how, *args.overrides]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        raise SubmitError("megaopus check refuses these settings; nothing was written")


def container(args: argparse.Namespace, run_dir: Path) -> tuple[list[str], list[str]]:
    """(options of srun, command before python) that put the tasks into the image, if there is one."""
    if not args.container_image:
        return [], []
    folders = [os.getcwd(), str(run_dir), *([os.path.abspath(args.config_dir)] if args.config_dir else [])]
    own = [f"{folder}:{folder}" for folder in dict.fromkeys(folders)]
    if wrong := [mount for mount in own if not MOUNT.fullmatch(mount)]:
        raise SubmitError(f"{wrong[0]}: no container can mount it; use a path without spaces, colons and commas")
    mounts = ",".join([*own, *args.container_mounts])
    if args.container_runtime == "apptainer":
        nvidia = ["--nv"] if args.gpus_per_node else []
        return [], ["apptainer", "exec", *nvidia, "--bind", mounts, "--pwd", os.getcwd(), args.container_image]
    options = {"image": args.container_image, "mounts": mounts, "workdir": os.getcwd()}
    return [f"--container-{key}={value}" for key, value in options.items()], []


def resolve(args: argparse.Namespace, python: str, run_dir: Path, folder: Path) -> str:
    """The batch script: the template with its #SBATCH lines and its settings."""
    options = {
        "job-name": args.name or re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name)[:64],
        "nodes": args.nodes,
        "ntasks-per-node": args.tasks_per_node,
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": args.cpus_per_task,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "output": folder / "output.txt",
        "open-mode": "append",
        "signal": f"B:USR1@{args.stop_before}",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines += [f"#SBATCH --{option}" for option in ("requeue", *args.option)]
    config_dir = ["--config-dir", os.path.abspath(args.config_dir)] if args.config_dir else []
    launcher = f"sbatch {shlex.quote(str(folder / SCRIPT))}"
    checked = [f"{line}\n(($? == 0)) || fail {shlex.quote(f'--setup {line!r} failed')}" for line in args.setup]
    settings = {"work_dir": os.getcwd(), "run_dir": str(run_dir), "launcher": launcher, "setup": "\n".join(checked)}
    srun_options, inside = container(args, run_dir)
    commands = {"srun_options": srun_options, "python": [*inside, python], "arguments": [*config_dir, *args.overrides]}
    assigned = [f"{name}={shlex.quote(value)}" for name, value in {**settings, "lacks": LACKS}.items()]
    assigned += [f"{name}=({shlex.join(words)})" for name, words in commands.items()]
    script = TEMPLATE.read_text()
    for mark, text in (("#@sbatch\n", lines), ("#@settings\n", assigned)):
        before, found, after = script.partition(mark)
        assert found, f"{TEMPLATE} has no line {mark}"
        script = before + "\n".join(text) + "\n" + after
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8 and value in script:
            raise SubmitError(f"a setting holds the value of ${name}: jobs get secrets by their environment alone")
    return script


def refuse_second(submissions: list[Path]) -> None:
    """Raise SubmitError if a job of an earlier submission has not ended."""
    for folder in submissions:
        try:
            job = (folder / "job_id").read_text().strip()
        except FileNotFoundError:
            remedy = "wait for it, or, if it was killed, look for its job with squeue and delete the folder"
            raise SubmitError(f"{folder}: another submission is under way; {remedy}") from None
        asked = subprocess.run(["squeue", "-h", "-o", "%T", "-j", job], capture_output=True, text=True)
        if asked.returncode and "Invalid job id" not in asked.stderr:
            raise SubmitError(f"cannot ask Slurm about job {job} of {folder}: {asked.stderr.strip()}")
        if state := asked.stdout.strip():
            raise SubmitError(f"job {job} of {folder} is {state}: wait for it, or end it with scancel {job}")


def submit(script: str, folder: Path) -> str:
    """Write the script, hand it to sbatch and keep the job's id, all in ``folder``; returns the id."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SubmitError(f"{folder}: another submission is under way") from None
    path = folder / SCRIPT
    try:
        path.write_text(script)
        path.chmod(0o755)
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
        job = done.stdout.strip().split(";")[0]
        if done.returncode or not job.isdecimal():
            raise SubmitError(f"sbatch refused the job: {(done.stderr or done.stdout).strip()}")
    except BaseException:
        shutil.rmtree(folder)
        raise
    partial = folder / "job_id.partial"
    partial.write_text(job + "\n")
    partial.replace(folder / "job_id")
    return job


def run(args: argparse.Namespace) -> None:
    check_options(args)
    run_dir = run_folder(args.overrides)
    python = interpreter(args)
    place = run_dir / "submissions"
    earlier = sorted(path for path in place.iterdir() if path.name.isdecimal()) if place.is_dir() else []
    folder = place / f"{int(earlier[-1].name) + 1 if earlier else 0:03d}"
    script = resolve(args, python, run_dir, folder)
    if not args.dry_run:
        if not shutil.which("sbatch"):
            raise SubmitError("sbatch is not on the PATH: run this on a login node, or with --dry-run")
        refuse_second(earlier)
    if not args.unchecked:
        check_settings(args, python)
    if args.dry_run:
        print(script, end="")
        return
    job = submit(script, folder)
    print(f"job {job} submitted: {folder / 'job.sbatch'}, output in {folder / 'output.txt'}")


def main() -> int:
    try:
        run(parse(sys.argv[1:]))
    except (SubmitError, OSError) as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
