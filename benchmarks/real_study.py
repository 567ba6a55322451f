"""Do utilities decide anything on a real pre-trained model, and what is that worth?

Trains on from a Hugging Face folder (SmolLM2-135M, as ``real_model.py make`` writes it) with the product's own trainer,
one process of one thread after another: sequences of 128 tokens, 8 an update, AdamW, 60 updates at a constant rate and
10 in which it falls. Every arm picks from the same buffers of 64. A row per run is appended to --results as it
finishes; a study that is killed goes on within the run that it was at.

    python benchmarks/real_study.py --model smollm2 --data FOLDER --work runs/real --worth gate.jsonl --stage 1
    python benchmarks/real_study.py --results FILE --table [--json FILE]
    python benchmarks/real_study.py --quick [--work FOLDER]

Stages: 1 all arms on real_hard (loss and utility: opus by one of both alone), seeds 1 to 3; 2 the arms of the claim,
seeds 4 and 5 (a second look: --stage 2 --seeds 6 7 8); 3 real_clean and real_mixed; 4 lambada, judged by the last
words of its other half; 5 budget curve: a trunk at a constant rate, and from its checkpoints branches in which the rate
falls; 6 GREATS and the paper to the letter.
--worth: the fall of the loss by each kind of text, as rows of real_gate.py or as {"kind": number}; arm oracle needs it.
--quick: a tiny random model on the demo's text, every arm, a few updates: shows that all of it runs, and no more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console

from benchmarks import study
from benchmarks.common import commit
from benchmarks.pools import ensure_real_pool
from benchmarks.real_arms import FROZEN, WORTH
from benchmarks.real_rows import facts_of, judged
from benchmarks.real_table import show
from benchmarks.study import Results, Task, task
from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.cli.demo import WANTED as DEMO_WANTED
from megaopus.config.compose import compose
from megaopus.config.run_config import RunConfig
from megaopus.corpus_tools.demo_corpus import DEMO_LIMITS, build_demo_corpus
from megaopus.data.corpus import MANIFEST, Corpus
from megaopus.data.folder import new_folder
from megaopus.data.scores import HIGHEST, column_folder, column_names, load_column, write_column

LENGTH, BATCH, BUFFER, RATE = 128, 8, 64, 1e-4
COMMON = (
    *("plugins=[benchmarks.real_arms]", "model=hf", "engine=cpu", "checkpoint.keep=1", f"data.seq_len={LENGTH}"),
    *(f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "optim=adamw", f"optim.lr={RATE}"),
)
WIDE = (f"selection.rho={BATCH / BUFFER}",)
OPERATING = (
    *("selection.score_length=64", "selection.proxy_batch_size=16", "selection.proxy_every=8"),
    *("selection.proxy_half_life=16", "selection.contrast=true"),
    "selection.score_micro_batch_size=16",  # to find one takes the time of six scorings
)
"""How every arm scores that scores."""
SCORED = ("selection=opus_exact", "selection.warmup_steps=0", *OPERATING)
COLUMN = ("--proxy-sequences", "64", "--windows", "first", "--contrast")
"""How the column of a frozen model is made, of a document's first sequence, after ``WARM`` uniform updates."""
WARM = 12
OPUS = ("selection=opus", *OPERATING)
ARMS: dict[str, tuple[str, ...]] = {
    "uniform": ("selection=uniform", *WIDE),
    "importance": ("selection=importance", *WIDE),
    "oracle": ("selection.method=study_oracle", *WIDE),
    "opus": OPUS,
    "opus_no_ngrams": (*SCORED, *WIDE),
    "sum": (*SCORED, *WIDE, "selection.method=study_sum"),
    "frozen": ("selection.method=study_frozen", *WIDE),
    "frozen_sum": ("selection.method=study_frozen_sum", *WIDE),
    "placebo": (*OPUS, "selection.method=study_placebo"),
    "loss": (*OPUS, "selection.method=study_loss"),
    "utility": (*OPUS, "selection.method=study_utility"),
    "whole": (*OPUS, "selection.score_length=null"),
    "greats": ("selection=greats", "selection.score_micro_batch_size=8"),
    "opus_paper": ("selection=opus_paper", "selection.score_micro_batch_size=8"),
}
"""Arm -> its settings, picks from ``BUFFER`` candidates but for the last two, which are as published."""
TO_THE_LETTER = ("greats", "opus_paper")
ALL = tuple(arm for arm in ARMS if arm not in TO_THE_LETTER)
THREE = ("uniform", "importance", "opus")
CLAIM = ("uniform", "importance", "oracle", "opus")
TRAIN_S, FORWARD_S = 15.0, 5.0
"""Seconds of one core for an update on ``BATCH`` sequences, and for a forward of as many: estimates until rows say."""


@dataclass(frozen=True)
class Stage:
    """Says which runs a stage has."""

    pools: Mapping[str, tuple[int, ...]]
    """Pool -> seeds."""
    arms: tuple[str, ...]
    updates: int = 60
    """At a constant rate."""
    curve: tuple[int, ...] = ()
    """Updates of a trunk after which branches leave it; none: no trunk."""


STAGES = {
    1: Stage({"real_hard": (1, 2, 3)}, ALL),
    2: Stage({"real_hard": (4, 5)}, CLAIM),
    3: Stage({"real_clean": (1, 2, 3), "real_mixed": (1,)}, THREE),
    4: Stage({"lambada": (1, 2, 3)}, THREE),
    5: Stage({"real_hard": (1, 2)}, THREE, curve=(30, 60, 90, 120)),
    6: Stage({"real_hard": (1,)}, TO_THE_LETTER, updates=20),
}
QUICK = {1: Stage({"demo": (1,)}, tuple(ARMS), updates=3), 5: Stage({"demo": (1,)}, ("uniform",), curve=(2, 4))}


@dataclass(frozen=True)
class Plan:
    """Says how long the ends are, and how often is looked."""

    stages: Mapping[int, Stage] = field(default_factory=lambda: STAGES)
    decay: int = 10
    every: int = 20
    """Updates from one validation, and one checkpoint, to the next."""
    sequences: int = 96
    """Of the wanted text, at each validation."""
    passages: int = 1000
    """Of lambada, judged at the end."""
    more: tuple[str, ...] = ()
    """Settings of every run."""


@dataclass(frozen=True)
class Job:
    """One row."""

    stage: int
    pool: str
    arm: str
    seed: int
    updates: int
    """At a constant rate; those in which it falls come on top."""
    branch: bool = False
    """It begins at a checkpoint of a trunk."""

    @property
    def title(self) -> str:
        """Name it for a person."""
        return f"{self.pool} {self.arm}, seed {self.seed}" + f", branch at {self.updates}" * self.branch


def jobs_of(plan: Plan, stage: int, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Job]:
    """Seed after seed, so that an early stop leaves whole comparisons, and what is compared with first."""
    found, each = [], plan.stages[stage]
    for pool, usual in each.pools.items():
        for seed in seeds or usual:
            for arm in (arm for arm in each.arms if not arms or arm in arms):
                if each.curve:
                    found += [Job(stage, pool, arm, seed, updates, True) for updates in each.curve]
                else:
                    found.append(Job(stage, pool, arm, seed, each.updates))
    return found


@dataclass(frozen=True)
class Study:
    """Trains what is asked for and keeps its rows."""

    plan: Plan
    model: Path
    place: Callable[[str], list[str]]
    """Pool -> the settings that train on it; its corpora are made if they are not there."""
    worth: Mapping[str, float]
    results: Results
    work: Path
    console: Console
    verb: study.Verb = study.verb

    # settings

    def overrides(self, job: Job) -> list[str]:
        """Everything that a run's outcome depends on."""
        plan, steps = self.plan, job.updates + self.plan.decay
        length = [f"train.steps={steps}", "optim.schedule=wsd", f"optim.decay_steps={plan.decay}"]
        return [*self._shared(job), *length, f"checkpoint.every={plan.every}"]

    def _shared(self, job: Job) -> list[str]:
        looks = [f"train.eval_every={self.plan.every}", f"train.eval_sequences={self.plan.sequences}"]
        start = [f"model.hf={self.model}", f"init.path={self.model}", f"seed={job.seed}"]
        return [*COMMON, *start, *looks, *self.plan.more, *self.place(job.pool), *ARMS[job.arm]]

    def task(self, job: Job) -> Task:
        """The run as study.py takes it; a row is found by the model's weights too."""
        path = f"{_digest(self.model)}/{job.pool}/{job.arm}/{job.seed}/{job.updates}" + "/branch" * job.branch
        fields = {"stage": job.stage, "pool": job.pool, "arm": job.arm, "seed": job.seed, "branch": job.branch}
        return task(
            job.title, path, self.overrides(job), {**fields, "model": self.model.name, "decay": self.plan.decay}
        )

    # running

    def run(self, jobs: Sequence[Job]) -> None:
        """Make the rows that are not there yet, one run after another; says before and after each how long it takes."""
        torch.set_num_threads(1)
        left = [job for job in jobs if self.task(job).key not in self.results.rows]
        study.refuse_other_corpora(map(self.task, jobs), self.results)
        expected = [self.seconds(job) for job in left]
        done_before = f"{len(jobs)} rows, {len(jobs) - len(left)} of them done before"
        self._say(f"{done_before}; about {sum(expected) / 60:.0f} core-minutes left by estimate")
        began, done = time.monotonic(), 0.0
        for number, job in enumerate(left):
            self._say(f"[{number + 1}/{len(left)}] {job.title}: what training says is in {self._run_dir(job)}.log")
            row = self._row(job)
            done += expected[number]
            spent = time.monotonic() - began
            eta = spent / done * (sum(expected) - done) / 60
            line = f"[{number + 1}/{len(left)}] {job.title}: {row['final_loss']:.4f} after {row['updates']} updates, "
            self._say(f"{line}{row['update_s']:.1f} s each; {spent / 60:.0f} min so far, eta {eta:.0f} min")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _row(self, job: Job) -> dict[str, Any]:
        each = self.task(job)
        self._columns(job)
        run_dir = self._run_dir(job)
        overrides = list(each.overrides)
        if job.branch:
            allowed = "resume_allow=[train.steps,optim.schedule,optim.decay_steps]"
            overrides += [allowed, f"resume={self._trunk(job) / 'checkpoints' / f'step_{job.updates:08d}'}"]
        run = study.trained(overrides, run_dir, 1, self.verb)
        config = compose(list(each.overrides))
        row = {**each.fields, **facts_of(config, run, self._uniform(job))}
        if job.pool == "lambada":
            place = Path(config.data.validation_path or "")
            row["judged"] = judged(run_dir, place, self.plan.passages, lambda said: self._verb("eval", said, run_dir))
        if name := _column_of(job.arm):
            row["column"] = load_column(Corpus.open(config.data.path), name).digest[:8]
        row |= {"corpora": each.corpora, "commit": run.environment.get("git")}
        self.results.add(each.key, row)
        shutil.rmtree(run_dir)
        if job.branch and job.updates == self._curve(job)[-1]:
            shutil.rmtree(self._trunk_dir(job))
        return row

    def _run_dir(self, job: Job) -> Path:
        return self.work / "runs" / self.task(job).key.replace("/", "_")

    def _verb(self, name: str, said: Sequence[str], beside: Path) -> None:
        self.verb(name, said, beside.with_name(f"{beside.name}.{name}.log"), 1)

    def _uniform(self, job: Job) -> dict[str, Any] | None:
        """The row of the uniform run of as many updates; None: there is none yet, or no whole curve of either."""
        if job.arm == "uniform" or job.branch:
            return None
        same = Job(job.stage, job.pool, "uniform", job.seed, job.updates, job.branch)
        return self.results.rows.get(self.task(same).key)

    # trunks

    def _curve(self, job: Job) -> tuple[int, ...]:
        return self.plan.stages[job.stage].curve

    def _trunk_dir(self, job: Job) -> Path:
        return self.work / "runs" / f"trunk_{_digest(self.model)}_{job.pool}_{job.arm}_{job.seed}"

    def _trunk(self, job: Job) -> Path:
        """The run folder of the trunk that ``job`` branches from, trained as far as its last branch."""
        run_dir, last = self._trunk_dir(job), self._curve(job)[-1]
        done = complete_checkpoints(run_dir)
        if not done or done[-1].name != f"step_{last:08d}":
            gaps = int(np.gcd.reduce(self._curve(job)))
            length = [f"train.steps={last}", "optim.schedule=constant", f"checkpoint.keep_every={gaps}"]
            study.trained([*self._shared(job), *length, f"checkpoint.every={self.plan.every}"], run_dir, 1, self.verb)
        return run_dir

    # columns

    def _columns(self, job: Job) -> None:
        """Make the score columns that an arm picks by."""
        corpus = Corpus.open(compose(self.overrides(job)).data.path)
        name = _column_of(job.arm)
        if name == WORTH:
            ensure_worth(corpus, self.worth)
        elif name == FROZEN and FROZEN not in column_names(corpus):
            began, run_dir = time.monotonic(), self.work / "runs" / f"warm_{job.pool}"
            uniform = Job(job.stage, job.pool, "uniform", 0, WARM)
            length = [f"train.steps={WARM}", "optim.schedule=constant", "train.eval_sequences=1"]
            study.trained([*self._shared(uniform), *length], run_dir, 1, self.verb)
            said = ["--corpus", str(corpus.path), "--method", "utility", "--checkpoint", str(run_dir), "--name", FROZEN]
            self._verb("score", [*said, *COLUMN, "--device", "cpu", "--plugin", "benchmarks.real_arms"], run_dir)
            facts = {"what": "column", "pool": job.pool, "seconds": time.monotonic() - began, "commit": commit()}
            self.results.add(f"column/{_digest(self.model)}/{job.pool}", facts)
            shutil.rmtree(run_dir)

    # estimates

    def seconds(self, job: Job) -> float:
        """Estimate what a row takes, validations included; what its arm took in other rows is believed first."""
        updates, config = job.updates + self.plan.decay, compose(self.overrides(job))
        looks, forward = updates // self.plan.every + 2, FORWARD_S / BATCH
        if job.branch:  # its part of the trunk, and its end
            earlier = max((each for each in self._curve(job) if each < job.updates), default=0)
            updates = job.updates - earlier + self.plan.decay
            looks = updates // self.plan.every + 3
        known = [row["update_s"] for row in self._rows(job.arm)]
        update = sum(known) / len(known) if known else update_seconds(config)
        passages = self.plan.passages * forward if job.pool == "lambada" else 0
        return updates * update + looks * self.plan.sequences * forward + passages

    def _rows(self, arm: str) -> Iterator[dict[str, Any]]:
        for key, row in self.results.rows.items():
            if key.startswith(_digest(self.model)) and row.get("arm") == arm:
                yield row


def _column_of(arm: str) -> str | None:
    """Name the score column that an arm picks by; None: by none."""
    return {"oracle": WORTH, "frozen": FROZEN, "frozen_sum": FROZEN}.get(arm)


def update_seconds(config: RunConfig) -> float:
    """Estimate an update: training, two forwards of each scored candidate, a backward of each proxy sequence."""
    selection, seconds = config.selection, TRAIN_S
    if "proxy" in selection.needs():
        length = min(selection.score_length or LENGTH, LENGTH) / LENGTH
        forwards = 2 if selection.estimator == "directional" else 3
        seconds += BATCH / selection.rho / BATCH * FORWARD_S * length * forwards
        batches = 2 if selection.contrast else 1
        seconds += batches * selection.proxy_batch_size / BATCH * TRAIN_S / selection.proxy_period
    return seconds


def ensure_worth(corpus: Corpus, worth: Mapping[str, float]) -> None:
    """Write the column of what each document's kind is worth, if it is not there.

    Raises SystemExit for a kind of which nothing is known, and for a column of other numbers.
    """
    if missing := [kind for kind in corpus.domains if kind not in worth]:
        raise SystemExit(f"--worth: says nothing of {', '.join(missing)}, which {corpus.path} has; arm oracle needs it")
    values = np.array([worth[kind] for kind in corpus.domains], dtype="<f4")[corpus.domain_codes]
    folder = column_folder(corpus.path, WORTH)
    if WORTH not in column_names(corpus):
        with new_folder(folder, Console(quiet=True)) as place:
            write_column(place, corpus, values, HIGHEST, {"method": "worth of a kind", "worth": dict(worth)})
    elif not np.array_equal(load_column(corpus, WORTH).values, values):
        raise SystemExit(f"{folder}: of other numbers than --worth says; delete it if no row is to be compared with")


def read_worth(path: Path) -> dict[str, float]:
    """Kind -> fall of the loss, of a JSON object or of the rows of real_gate.py. Raises SystemExit if it is neither."""
    text = path.read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = {row["kind"]: float(row["fall"]) for row in rows if row.get("what") == "worth"}
    except (ValueError, AttributeError, KeyError):
        found = {}
    try:
        found = found or {kind: float(value) for kind, value in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError):
        raise SystemExit(f'{path}: neither rows of real_gate.py that say worth, nor {{"kind": number}}') from None
    return found


def _digest(model: Path) -> str:
    """Eight digits that stand for the weights."""
    files = sorted(model.glob("*.safetensors"))
    if model not in _DIGESTS:
        found = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        _DIGESTS[model] = found.hexdigest()[:8]
    return _DIGESTS[model]


_DIGESTS: dict[Path, str] = {}


# -- quick -----------------------------------------------------------------------------------------------------------


def tiny_model(folder: Path, corpus: Path) -> Path:
    """A Llama of random numbers that reads the corpus's tokens, written if it is not there."""
    from safetensors.torch import save_file

    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    size, width, inner = Corpus.open(corpus).vocab_size, 32, 64
    shapes = {"model.embed_tokens.weight": (size, width), "model.norm.weight": (width,)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, inner)}
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else 0.05 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(corpus / "tokenizer.json", folder / "tokenizer.json")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": width}
    config |= {"intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"max_position_embeddings": LENGTH}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def quick_study(work: Path, corpus: Path, results: Path, console: Console) -> Study:
    """Everything at a size at which nothing is learnt, in this process; makes a small demo corpus if there is none."""
    if not (corpus / MANIFEST).is_file():
        build_demo_corpus(corpus, vocab_size=512, limits=dict.fromkeys(DEMO_LIMITS, 150_000), console=console)
    plan = Plan(stages=QUICK, decay=1, every=2, sequences=8, more=("data.seq_len=32",))
    worth = {kind: float(kind == DEMO_WANTED) for kind in Corpus.open(corpus).domains}
    place = [f"data.path={corpus}", f"data.target_domains=[{DEMO_WANTED}]"]
    model = tiny_model(work / "model", corpus)
    return Study(plan, model, lambda pool: place, worth, Results(results), work, console, study.verb_here)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--model", type=Path, metavar="FOLDER", help="Hugging Face folder of the model")
    command.add_argument("--data", type=Path, metavar="FOLDER", help="text, as pools.py takes it")
    command.add_argument("--work", type=Path, metavar="FOLDER", help="corpora and run folders (runs/real_study)")
    command.add_argument("--results", type=Path, metavar="FILE", help="(benchmarks/results/real_study.jsonl)")
    command.add_argument("--worth", type=Path, metavar="FILE", help="what each kind of text is worth")
    command.add_argument("--stage", nargs="+", type=int, choices=STAGES, default=[1], help="(%(default)s)")
    command.add_argument("--arms", nargs="+", choices=ARMS, help="of the stage's, these alone")
    command.add_argument("--seeds", nargs="+", type=int, help="instead of the stage's")
    command.add_argument("--quick", action="store_true", help="every arm at a toy's size, under 90 seconds")
    command.add_argument("--corpus", type=Path, metavar="FOLDER", help="--quick: prepared (WORK/corpus)")
    command.add_argument("--table", action="store_true", help="train nothing; say what the rows of --results show")
    command.add_argument("--json", type=Path, metavar="FILE", help="write what the table says")
    args, console = command.parse_args(arguments), Console()
    if args.quick:
        work = args.work or Path("runs/real_study_quick")
        corpus = args.corpus or work / "corpus"
        one, stages = quick_study(work, corpus, args.results or work / "results.jsonl", console), list(QUICK)
    elif args.table:
        show(Results(args.results or Path("benchmarks/results/real_study.jsonl")), console, args.json)
        return 0
    else:
        if args.model is None or args.data is None:
            command.error("--model and --data are needed, or --table, or --quick")
        one, stages = _study(args, console), args.stage
    jobs = [job for stage in stages for job in jobs_of(one.plan, stage, args.arms, args.seeds)]
    if any(job.arm == "oracle" for job in jobs) and not one.worth:
        command.error("--worth is needed for arm oracle")
    one.run(jobs)
    show(one.results, console, args.json)
    return 0


def _study(args: argparse.Namespace, console: Console) -> Study:
    work = args.work or Path("runs/real_study")
    places: dict[str, list[str]] = {}

    def place(pool: str) -> list[str]:
        if pool not in places:
            places[pool] = ensure_real_pool(pool, args.data, work, args.model, console)
        return places[pool]

    results = Results(args.results or Path("benchmarks/results/real_study.jsonl"))
    return Study(Plan(), args.model, place, read_worth(args.worth) if args.worth else {}, results, work, console)


if __name__ == "__main__":
    raise SystemExit(main())
