"""Does a run survive what happens to runs? Faults drawn at random, restarts, and a comparison with the undisturbed run.

An episode is a short run with selection, at a layout and with an optimizer drawn at random, that meets faults one after
another: a rank or all of them killed while scoring, training, validating or saving; signals to stop; a rank that
hangs; a disk that is full; checkpoint files damaged, cut, deleted or made malicious; a second job in its folder. Its
losses and gradients meet NaN and spikes at fixed updates, in the undisturbed run too. After each fault it is started
again, until it is done. Then every tensor of its last checkpoint, and every batch that any of its starts trained on,
must be that of the undisturbed run to the last bit.

Ranks are forked from this process, which has imported everything, so that a start costs a second instead of ten. Rows
of finished episodes go to --results at once; started again, the benchmark goes on from there. The summary, --json:
{injected, recovered, undetected_corruptions, wrong_ids, max_lost_steps, save_interval, goodput, naive_goodput,
by_kind}.

recovered: faults after which the run went on and in the end was the undisturbed one. max_lost_steps: updates done
again after kills, signals and hangs, where saves are waited for; max_lost_steps_background: where they are not, and
count once they are whole. goodput: the episode's updates over wall time, relative to the undisturbed run's;
naive_goodput: of a loop that meets the same faults at the same updates and has no checkpoint to go on from.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.common import machine, parser, progress, start, write_results
from benchmarks.faulty_run import (
    DAMAGES,
    EVAL_EVERY,
    PHASES,
    SAVE_EVERY,
    STEPS,
    Fault,
    Ran,
    damage,
    launch,
    settings,
    undo,
)
from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.checkpoint.manifest import read_manifest
from megaopus.corpus_tools.demo_corpus import DEMO_LIMITS, build_demo_corpus

LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2-distributed-optimizer": (2, ["parallel.distributed_optimizer=true"]),
}
OPTIMIZERS = {"adamw": ["optim=adamw"], "muon": ["optim=muon"]}
KINDS = {
    # kind of fault: how often it is drawn
    "SIGKILL of one rank": 5,
    "SIGKILL of all ranks": 5,
    "SIGTERM": 2,
    "SIGUSR1": 2,
    "SIGTERM twice": 1,
    "SIGSTOP": 1,
    "disk full": 2,
    "second job": 1,
    **dict.fromkeys(DAMAGES, 1),
}
FAULTS_PER_EPISODE = 8
SAID = {
    "disk full": "cannot write",
    "second job": "another job works in this folder",
    "SIGSTOP": "no progress for",
}
"""What the output must say of it."""


class Episode:
    """One run and what happens to it."""

    def __init__(self, number: int, args: argparse.Namespace, folder: Path):
        self.draw = random.Random(f"{args.seed}:{number}")
        self.number = number
        self.layout = self.draw.choice([name for name, (ranks, _) in LAYOUTS.items() if ranks <= args.ranks])
        self.optimizer = self.draw.choice(list(OPTIMIZERS))
        self.background = self.draw.random() < 0.5
        self.ranks, more = LAYOUTS[self.layout]
        if self.layout.endswith("distributed-optimizer"):
            self.optimizer = "adamw"
        self.chosen = [*more, *OPTIMIZERS[self.optimizer], f"checkpoint.background={str(self.background).lower()}"]
        self.corpus, self.folder = args.corpus, folder
        self.run_dir = folder / f"episode{number}"
        self.rows: list[dict[str, Any]] = []

    def start(self, run_dir: Path, fault: Fault | None = None) -> Ran:
        return launch(settings(self.corpus, run_dir, self.chosen), self.ranks, fault, run_dir)

    def play(self) -> list[dict[str, Any]]:
        """Meet the faults, go on to the end, compare; one row a fault."""
        straight = self.folder / f"straight-{self.layout}-{self.optimizer}"
        if not straight.exists():
            ran = self.start(straight)
            if not ran.done:
                raise RuntimeError(f"the undisturbed run failed, see {ran.log}")
            (straight / "seconds").write_text(str(ran.seconds))
        began = time.monotonic()
        starts: list[Ran] = []
        for _ in range(FAULTS_PER_EPISODE):
            starts.append(self.meet(self.draw_fault()))
            if starts[-1].done:
                break
        starts.append(self.start(self.run_dir))
        wall = time.monotonic() - began
        verdict = self.compare(straight, starts[-1])
        alone = float((straight / "seconds").read_text())
        again = sum(max(0, ran.first) for ran in starts) * alone / STEPS  # updates that a checkpoint saved from redoing
        worth = {"goodput": alone / wall, "naive_goodput": alone / (wall + again)}
        about = {"episode": self.number, "layout": self.layout, "optimizer": self.optimizer}
        return [{**about, "background": self.background, **row, **verdict, **worth} for row in self.rows]

    def draw_fault(self) -> Fault:
        saved = [int(path.name.removeprefix("step_")) for path in complete_checkpoints(self.run_dir)]
        step = min(STEPS - 1, max(saved, default=0) + self.draw.randrange(SAVE_EVERY + 2))
        kinds = {kind: often for kind, often in KINDS.items() if kind not in DAMAGES or len(saved) > 1}
        if self.ranks == 1:
            kinds.pop("SIGSTOP")
        phase = self.draw.choice(PHASES)
        (kind,) = self.draw.choices(list(kinds), list(kinds.values()))
        if kind == "disk full":
            phase = "save"
        if every := {"save": SAVE_EVERY, "evaluate": EVAL_EVERY}.get(phase):
            step = min(STEPS, (step // every + 1) * every)
        delay = 0.0 if kind in ("disk full", "second job") else self.draw.choice([0.0, self.draw.uniform(0.0, 0.05)])
        rank = self.draw.randrange(self.ranks)
        if kind == "disk full":
            rank = 0  # others need not write a file
        return Fault(kind, phase, step, rank, delay)

    def meet(self, fault: Fault) -> Ran:
        """Let it happen and record what came of it."""
        if fault.kind in DAMAGES:
            return self.meet_damage(fault)
        ran = self.start(self.run_dir, fault)
        if ran.fired:
            stopped = fault.kind.startswith(("SIGTERM", "SIGUSR1"))
            fine = ran.ended and SAID.get(fault.kind, "") in ran.output and (not stopped or set(ran.codes) == {143})
            if fault.kind == "second job":
                fine = fine and ran.done and (self.run_dir / "refused").read_text() == "2"
            self.rows.append(self.row(fault, fine, lost=max(0, ran.last + 1 - self.resumes_at())))
        return ran

    def meet_damage(self, fault: Fault) -> Ran:
        """A file of the newest checkpoint; the start after it ends by a kill a few updates later."""
        newest = complete_checkpoints(self.run_dir)[-1]
        name, kept = damage(newest, fault.kind, self.draw, self.folder / "owned")
        later = min(STEPS - 1, self.resumes_at() + self.draw.randrange(3))
        ran = self.start(self.run_dir, Fault("SIGKILL of all ranks", "train", later, 0, 0.0))
        if fault.kind == "malicious index":  # its digests fit: it is refused, not passed over
            fine = 0 not in ran.codes and f"{name}: not read" in ran.output and not (self.folder / "owned").exists()
            undo(newest, kept)
        else:
            fine = f"WARNING checkpoint passed over for an older one: {newest}" in ran.output and name in ran.output
        self.rows.append(self.row(fault, fine, lost=None))
        return ran

    def resumes_at(self) -> int:
        saved = complete_checkpoints(self.run_dir)
        return int(saved[-1].name.removeprefix("step_")) if saved else 0

    def row(self, fault: Fault, fine: bool, lost: int | None) -> dict[str, Any]:
        place = {"phase": fault.phase, "step": fault.step, "rank": fault.rank, "delay": round(fault.delay, 4)}
        return {"kind": fault.kind, **place, "handled": fine, "lost_steps": lost}

    def compare(self, straight: Path, final: Ran) -> dict[str, Any]:
        """Against the undisturbed run: tensors of the last checkpoint, and the batch of every update of every start."""
        expected = batches(straight)
        wrong = sum(expected[step] != batch for step, batch in all_batches(self.run_dir))
        missing = set(expected) - {step for step, _ in all_batches(self.run_dir)}
        same = final.done and digests(straight) == digests(self.run_dir)
        return {"finished": final.done, "same": same, "wrong_ids": wrong + len(missing)}


def digests(run_dir: Path) -> dict[str, str]:
    """sha256 of the files with tensors of the last checkpoint; the index holds paths."""
    files = read_manifest(complete_checkpoints(run_dir)[-1])
    return {name: entry[1] for name, entry in files.items() if name.endswith((".distcp", "common.pt"))}


def all_batches(run_dir: Path) -> list[tuple[int, dict[str, Any]]]:
    """(update, what it was trained on) in the order of happening, updates that were done again too."""
    rows = [json.loads(line) for line in (run_dir / "batches").read_text().splitlines()]
    return [(row["step"], row) for row in rows]


def batches(run_dir: Path) -> dict[int, dict[str, Any]]:
    return dict(all_batches(run_dir))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the rows come to; NaN and spikes count once an episode."""
    episodes = {row["episode"]: row for row in rows}
    weather = 3 * len(episodes)
    good = [row for row in rows if row["handled"] and row["finished"] and row["same"] and not row["wrong_ids"]]
    whole = [row for row in episodes.values() if row["finished"] and row["same"]]
    lost = {each: [row["lost_steps"] or 0 for row in rows if row["background"] == each] for each in (False, True)}
    kinds = Counter(row["kind"] for row in rows)
    return {
        "injected": len(rows) + weather,
        "recovered": len(good) + 3 * len(whole),
        "undetected_corruptions": sum(row["finished"] and not row["same"] for row in episodes.values()),
        "wrong_ids": sum(row["wrong_ids"] for row in episodes.values()),
        "max_lost_steps": max(lost[False], default=0),
        "max_lost_steps_background": max(lost[True], default=0),
        "save_interval": SAVE_EVERY,
        "goodput": mean([row["goodput"] for row in episodes.values()]),
        "naive_goodput": mean([row["naive_goodput"] for row in episodes.values()]),
        "episodes": len(episodes),
        "by_kind": {**dict(sorted(kinds.items())), "NaN in a gradient": len(episodes), "infinite loss": len(episodes)}
        | {"gradient spike": len(episodes)},
    }


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 3) if values else 0.0


def main() -> None:
    args = arguments()
    console = Console()
    start(args, console)
    if not (args.corpus / "manifest.json").is_file():
        args.corpus.parent.mkdir(parents=True, exist_ok=True)
        build_demo_corpus(args.corpus, limits={name: size // 20 for name, size in DEMO_LIMITS.items()}, console=console)
    rows: list[dict[str, Any]] = []
    if args.results and args.results.exists():
        rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    number = 1 + max((row["episode"] for row in rows), default=-1)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, progress(console) as bar:
        task = bar.add_task("faults", total=args.faults, completed=min(summary(rows)["injected"], args.faults))
        while summary(rows)["injected"] < args.faults:
            episode = Episode(number, args, Path(folder))
            found = episode.play()
            rows += found
            if args.results:
                with args.results.open("a") as stream:
                    stream.writelines(json.dumps(row) + "\n" for row in found)
            for row in found:
                if not (row["handled"] and row["same"]) or row["wrong_ids"]:
                    console.print(f"NOT RECOVERED {row}", style="bold red", highlight=False)
                    shutil.copytree(episode.run_dir, f"{args.results or 'faults'}.episode{number}", dirs_exist_ok=True)
            shutil.rmtree(episode.run_dir)
            bar.update(task, completed=min(summary(rows)["injected"], args.faults))
            number += 1
    found_all = summary(rows)
    console.print_json(json.dumps(found_all))
    if args.json:
        write_results(args.json, found_all, machine(args))


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.set_defaults(corpus=Path("runs/bench/faults_corpus"), threads=1)
    made.add_argument("--faults", type=int, default=200, metavar="N", help="in all, NaN and spikes too (%(default)s)")
    made.add_argument("--seed", type=int, default=1, metavar="N", help="of the draws (%(default)s)")
    made.add_argument("--ranks", type=int, default=2, metavar="N", help="largest layout (%(default)s)")
    made.add_argument("--results", type=Path, metavar="FILE", help="rows as they finish; found again by a later start")
    made.add_argument("--folder", type=Path, metavar="FOLDER", help="where the runs are made (a temporary folder)")
    args = made.parse_args()
    if args.quick:
        args.faults = min(args.faults, 30)
    return args


if __name__ == "__main__":
    main()
