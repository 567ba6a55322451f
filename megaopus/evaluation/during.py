"""Scores a model on benchmarks while it is being trained; nothing of the training is another for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaopus.config.run_config import RunConfig
from megaopus.data.corpus import Corpus
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh
from megaopus.engine.base import Engine
from megaopus.evaluation.items import ITEMS_FOLDER
from megaopus.evaluation.model import positions_of, words_of
from megaopus.evaluation.results import rows_of, write_items
from megaopus.evaluation.run import Request, harness_model
from megaopus.evaluation.scored import Scored, score
from megaopus.huggingface.side_files import FOLDER, side_folder


class DuringTraining:
    """Holds the tasks of a run, and scores its engine on them."""

    def __init__(self, config: RunConfig, engine: Engine, mesh: Mesh, corpus: Corpus):
        """Raises DataError for tasks or items that cannot be had."""
        tasks = config.tasks
        self.every = tasks.every
        self._engine, self._mesh, self._run_dir = engine, mesh, Path(config.run_dir)
        self._words = words_of(corpus.path, corpus.eod_id)
        began = [] if config.init.path is None else [side_folder(Path(config.init.path))]
        self._positions = positions_of(config, self._run_dir / FOLDER, *began)
        self._request = Request(
            suite=",".join(tasks.suite),
            protocol=tasks.protocol,
            data=None if tasks.data is None else Path(tasks.data),
            limit=tasks.limit,
            num_fewshot=tasks.num_fewshot,
            chat=False,
            seed=config.seed,
            out=self._run_dir / "eval.jsonl",
        )
        self._parts = {part.name: part for part in self._request.parts(self._words)[0]}

    @property
    def names(self) -> list[str]:
        """Tasks and parts of tasks, each of which is scored by itself."""
        return list(self._parts)

    def score(self, name: str, advance: Callable[[int], None]) -> Scored:
        """Score one; ``advance`` is told how many requests are answered. Collective."""
        request = self._request
        model = harness_model(self._engine, self._mesh, self._words, self._positions, request.protocol, advance)
        return score(self._parts[name], model, limit=request.limit, chat=False, seed=request.seed)

    def keep(self, step: int, scored: list[Scored]) -> list[dict[str, Any]]:
        """Write the items of all, and return the rows of a table. Collective."""
        folder = self._run_dir / ITEMS_FOLDER / f"step_{step:08d}"
        on_rank_0(self._mesh, lambda: write_items(folder, *scored))
        return rows_of(scored, self._request.protocol, self._request.seed)
