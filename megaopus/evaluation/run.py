"""Evaluates a model on tasks: opens it at this launch's layout, asks task after task, keeps what comes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megaopus import __version__
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh
from megaopus.engine.base import Engine
from megaopus.evaluation.harness_model import HarnessModel
from megaopus.evaluation.likelihood import Advance, Likelihood
from megaopus.evaluation.local_data import LocalData
from megaopus.evaluation.model import Found, Words, opened
from megaopus.evaluation.perplexity import Perplexity, Text, length_of, measure, open_texts
from megaopus.evaluation.results import Results
from megaopus.evaluation.scored import Scored, headline, score
from megaopus.evaluation.task_list import OPUS, task_names
from megaopus.evaluation.tasks import Part, Wanted, load_parts
from megaopus.record.console import progress

VERSIONS = ("lm_eval", "datasets", "torch", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Says what a model is asked, and where the answers are kept."""

    suite: str
    protocol: str
    data: Path | None
    limit: int | None
    num_fewshot: int | None
    chat: bool
    seed: int
    out: Path
    texts: tuple[Path, ...] = ()
    """Corpora and files on which the loss is measured."""
    length: int | None = None
    """Tokens of their sequences; None: see ``perplexity.length_of``."""
    overwrite: bool = False

    def settings(self) -> dict[str, Any]:
        """Return what a file of results says of them."""
        return {
            "suite": task_names(self.suite),
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "seed": self.seed,
            "chat_template": self.chat,
            "data": None if self.data is None else str(self.data),
        }

    def parts(self, words: Words) -> tuple[list[Part], list[str]]:
        """Make the tasks, and notes on what was left out of them. Raises DataError."""
        if not self.suite:
            return [], []
        wanted = Wanted(
            protocol=self.protocol,
            data=None if self.data is None else LocalData(self.data),
            num_fewshot=self.num_fewshot,
            seed=self.seed,
            count_tokens=lambda text: len(words.tokenizer.encode(text, add_special_tokens=False).ids),
        )
        return load_parts(task_names(self.suite), wanted)


def evaluate_model(
    found: Found,
    overrides: list[str],
    world_size: int,
    request: Request,
    *,
    speaks: bool,
    tell: Callable[[Iterable[str]], None],
) -> dict[str, Any]:
    """Ask the model every task of ``request``; returns the table, on rank 0. Collective.

    ``speaks``: this rank shows how far it is. Raises DataError, ConfigError, CheckpointError or ModelError before
    anything is written.
    """
    parts, notes = request.parts(found.words)
    length = length_of(found, request.length)
    texts = [text for place in request.texts for text in open_texts(place, found, length, request.limit)]
    tell(notes)
    with opened(found, overrides, world_size) as (engine, mesh):
        about = {
            "model": str(found.path),
            "weights": found.fingerprint(),
            "step": found.step,
            "protocol": request.protocol,
            "settings": request.settings(),
            "layout": {name: getattr(mesh.shape, name) for name in ("dp", "tp", "pp", "cp")},
            "versions": {"megaopus": __version__} | {name: version(name) for name in VERSIONS},
        }
        rank_0 = _OnRank0(mesh, request, about)
        tell([_line(found, engine, mesh, parts)])
        for part in parts:
            kept = rank_0.keep(part)
            if not kept:
                with _asking(engine, mesh, found, request, part.name if speaks else None) as model:
                    scored = score(part, model, limit=request.limit, chat=request.chat, seed=request.seed)
                rank_0.add(scored)
            tell(rank_0.told(part, kept))
        measured = []
        if texts:
            bar = progress("sequences", sum(map(_count, texts)), sys.stderr) if speaks else nullcontext(_nothing)
            with bar as advance:
                measured = [each for text in texts for each in measure(text, engine, found, advance)]
        return rank_0.finish(measured)


def _count(text: Text) -> int:
    return sum(map(len, text.buffers.values()))


def _nothing(number: int) -> None:
    """Show no progress."""


class _OnRank0:
    """Keeps the results, which rank 0 alone has."""

    def __init__(self, mesh: Mesh, request: Request, about: dict[str, Any]):
        """Raises DataError, on every rank, if the file is of another evaluation."""
        self._mesh, self._request = mesh, request
        self._results: Results | None = None
        self._last: Scored | None = None
        on_rank_0(mesh, lambda: self._open(about))

    def _open(self, about: dict[str, Any]) -> None:
        self._results = Results(self._request.out, about, overwrite=self._request.overwrite)

    def keep(self, part: Part) -> bool:
        """Take over what the file has of a task; tells on every rank whether it had it. Collective."""
        return on_rank_0(self._mesh, lambda: self._kept(part))

    def _kept(self, part: Part) -> bool:
        assert self._results is not None
        key = self._key(part)
        self._last = self._results.kept(part, key)
        if self._last is not None:
            self._results.add(self._last, key)
        return self._last is not None

    def add(self, scored: Scored) -> None:
        """Take in what was found, and write it."""
        if self._results is not None:
            self._last = scored
            self._results.add_new(scored, self._key(scored.part))

    def finish(self, measured: list[Perplexity]) -> dict[str, Any]:
        """Write it all, with losses on texts; returns the table on rank 0, nothing elsewhere."""
        if self._results is None:
            return {}
        return self._results.write(perplexity=[asdict(each) for each in measured])

    def _key(self, part: Part) -> str:
        """A hash of how a task is asked, besides what the whole file says: its settings, and its file."""
        stamp = None if part.file is None else [part.file.name, part.file.stat().st_size, part.file.stat().st_mtime_ns]
        config = {key: str(value) for key, value in part.task.dump_config().items() if key != "custom_dataset"}
        text = json.dumps([config, stamp, str(part.task.VERSION)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def told(self, part: Part, kept: bool) -> list[str]:
        """A line on a task that is done."""
        if self._last is None:
            return []
        best = headline(self._last.scores)
        found = next(each for each in self._last.scores if each.metric == best)
        error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
        where = " (from the file: done before)" if kept else ""
        return [f"{part.name}: {best} {found.value:.4f}{error} of {found.n:,} items{where}"]


@contextmanager
def _asking(engine: Engine, mesh: Mesh, found: Found, request: Request, shown: str | None) -> Iterator[HarnessModel]:
    """Show the model to lm-eval; ``shown``: the name under which this rank tells how many requests are answered."""
    bar = nullcontext(None) if shown is None else progress(f"{shown}: requests", stream=sys.stderr)
    with bar as advance:
        yield harness_model(engine, mesh, found.words, found.max_length, request.protocol, advance)


def harness_model(
    engine: Engine, mesh: Mesh, words: Words, max_length: int, protocol: str, advance: Advance | None = None
) -> HarnessModel:
    """Show an engine to lm-eval: prompts and answers are encoded as ``protocol`` has it."""
    stages = mesh.shape.pp if mesh.shape.pp == 1 else 2 * mesh.shape.pp  # micro-batches, so that stages seldom wait
    likelihood = Likelihood(engine, max_length, mesh.shape.dp * stages, mesh.device.type, advance)
    return HarnessModel(likelihood, words, apart=protocol == OPUS)


def _line(found: Found, engine: Engine, mesh: Mesh, parts: list[Part]) -> str:
    shape = " ".join(f"{name}={getattr(mesh.shape, name)}" for name in ("dp", "tp", "pp", "cp"))
    kind, items = "bf16" if engine.bf16 else "fp32", sum(len(part.task.eval_docs) for part in parts)
    return (
        f"{found.path}: {shape} on {mesh.device.type}, {kind}, at most {found.max_length:,} positions;"
        f" {len(parts)} tasks with {items:,} items"
    )
