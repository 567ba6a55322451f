"""Makes picks again from the record of a run (``report --replay``), and finds the text behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaopus.errors import DataError
from megaopus.events import Event, read_event
from megaopus.plugins import notes_on_missing
from megaopus.record.parquet import FOLDER, SCHEMA, Table, candidates_of, first_step, parts, read_part, steps_of
from megaopus.record.sinks import read_rows

if TYPE_CHECKING:
    from megaopus.config.run_config import RunConfig
    from megaopus.data.candidates import CandidateBuffer
    from megaopus.data.run_data import RunData
    from megaopus.selection import Selection

IDENTICAL, DIFFERENT, NOT_ON_RECORD = "identical", "DIFFERENT", "not on record"
TOLERANCE = 1e-6
"""Relative, of probabilities, which are kept in 32 bits."""


def run(run_dirs: Sequence[str], steps: str) -> int:
    """``report RUN --replay STEP,STEP...`` (or all).

    Returns 0 if every step's picks follow from the record, 1 if any differ, 3 if none differs but some could not be
    made again. Raises DataError for what is no run folder and for a step that the run did not record.
    """
    if len(run_dirs) != 1:
        raise DataError(f"--replay is about one run folder, {len(run_dirs)} are named")
    record = Record(Path(run_dirs[0]))
    wanted = _steps(steps, record)
    named = [name for step in wanted for name in record.config(step).plugins]
    for note in notes_on_missing(named, record.path):
        print(f"note: {note}")
    counts = dict.fromkeys((IDENTICAL, DIFFERENT, NOT_ON_RECORD), 0)
    for step in wanted:
        outcome, text = record.replay(step)
        counts[outcome] += 1
        if steps != "all" or outcome != IDENTICAL:
            print(f"step {step}: {outcome}: {text}", flush=True)
    if record.gone:
        print(f"without the corpus ({record.gone}): candidates are as in the log, the alarm on token pairs as recorded")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts[DIFFERENT] else 3 if counts[NOT_ON_RECORD] else 0


def _steps(text: str, record: Record) -> list[int]:
    if text == "all":
        return list(record.facts)
    found = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise DataError(f"--replay {text}: {part!r} is not a step; write 120, or 120,480, or all")
        found.append(int(part))
    if missing := [step for step in found if step not in record.facts]:
        has = f"steps {min(record.facts)} to {max(record.facts)}" if record.facts else "none"
        raise DataError(f"{record.path}: step {missing[0]} is not recorded in selection.jsonl, which has {has}")
    return found


class Record:
    """Says what a run folder says of its choices."""

    def __init__(self, path: Path):
        """Raises DataError where there is no record."""
        self.path = path
        rows = path / "selection.jsonl"
        if not rows.is_file():
            raise DataError(f"{rows}: missing; name the run_dir of a 'python -m megaopus train' with logging.selection")
        self.facts: dict[int, dict[str, Any]] = {row["step"]: row for _, _, row in read_rows(rows)}
        """Step -> its row."""
        self.gone = ""
        """Why the corpus cannot be asked, if it was wanted and cannot."""
        self._data: dict[Path, RunData | None] = {}
        self._part: tuple[Path, Table, dict[int, slice]] | None = None

    def replay(self, step: int) -> tuple[str, str]:
        """(outcome, in words) of the picks of ``step`` made again."""
        from megaopus.selection.replay import NotOnRecord

        try:
            return self._replay(step)
        except NotOnRecord as missing:
            return NOT_ON_RECORD, f"the picks depend on {missing}"

    def _replay(self, step: int) -> tuple[str, str]:
        import torch

        from megaopus.selection.replay import NamedCandidates, NotOnRecord, concerned, replay

        config = self.config(step)
        selection = config.selection
        made = step - step % selection.score_every
        if made != step and (made not in self.facts or self._launch(made) != self._launch(step)):
            return NOT_ON_RECORD, f"the buffer was scored in step {made}, before this launch"
        for each in dict.fromkeys((made, step)):
            if lack := self._lack(each):
                return NOT_ON_RECORD, f"step {each}: {lack}" if each != step else lack
        rows, events = self.rows(step), self._events(made)
        stream, proxy = self._streams(step)
        table = candidates_of(self.rows(made), list(self.facts[made]["pool_share"]))
        ids = torch.from_numpy(rows["id"].to_numpy().copy())
        candidates: Any = NamedCandidates(ids)
        if stream is not None:
            candidates = stream(step)
            if wrong := _other_candidates(rows, candidates):
                return DIFFERENT, wrong
        else:
            if any(event.kind == "selection.alarm.token_pairs" for event in events):
                raise NotOnRecord("tokens, which are in the corpus alone: there was an alarm on token pairs")
            selection = replace(selection, guards=replace(selection.guards, min_distinct=0.0))
        found = replay(
            selection,
            table,
            events,
            candidates,
            step,
            num_selected=config.train.global_batch_size,
            seed=config.seed,
            proxy=proxy if selection.needs_proxy else None,
        )
        if wrong := _differences(rows, self.facts[step], found, scored=made == step):
            environment = _json(self._launch(made) / "environment.json")
            if older := concerned(environment.get("picking", 1), selection, [*events, *found.events]):
                raise NotOnRecord(f"rules of an older version ({_version(environment)}), which can make them: {older}")
            return DIFFERENT, wrong
        return IDENTICAL, f"{found.method}, {len(found.indices)} of {len(ids)} candidates"

    # -- the run folder -----------------------------------------------------------------------------------------------

    @cached_property
    def launches(self) -> list[tuple[int, Path]]:
        """(its first step, its folder) of each launch in order. Raises DataError for a folder that does not say."""
        found = []
        for folder in sorted((self.path / "launches").glob("[0-9]*"), key=lambda each: int(each.name)):
            facts = _json(folder / "environment.json")
            if "first_step" not in facts:
                raise DataError(f"{folder}/environment.json: no first_step; was the run made by an older version?")
            found.append((int(facts["first_step"]), folder))
        if not found:
            raise DataError(f"{self.path}/launches: empty, so the settings of the run are not known; restore it")
        return found

    def _launch(self, step: int) -> Path:
        """The launch that took ``step``: the last of those that began no later."""
        began = [folder for first, folder in self.launches if first <= step]
        if not began:
            raise DataError(f"{self.path}/launches: none began before step {step}")
        return began[-1]

    def config(self, step: int) -> RunConfig:
        """The settings that ``step`` was taken with. Raises DataError if they cannot be read."""
        return _config(self._launch(step) / "config.yaml")

    def rows(self, step: int) -> Table:
        """The candidates of ``step`` in the log; no row where there are none."""
        if self._part is None or step not in self._part[2]:
            found = [path for path in parts(self.path / FOLDER) if first_step(path) <= step]
            if not found:
                return SCHEMA.empty_table()
            table = read_part(found[-1])
            self._part = found[-1], table, dict(steps_of(table))
        _, table, where = self._part
        rows = where.get(step, slice(0, 0))
        return table.slice(rows.start, rows.stop - rows.start)

    def _lack(self, step: int) -> str:
        """Return what of a step's candidates is not in the log, in words."""
        kept, had = len(self.rows(step)), self.facts[step]["candidates"]
        if kept == 0:
            return f"{FOLDER}/ has no row of it: the run was killed before they were written, or they were deleted"
        if kept == self.facts[step]["picked"] < had:
            return f"its {had} candidates were sampled away, only picks were kept (logging.selection_every)"
        return ""

    def _events(self, step: int) -> list[Event]:
        """Return what went another way in a step. Raises DataError for a row that is no event."""
        try:
            return [read_event(row) for row in self.facts[step]["events"]]
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{self.path}/selection.jsonl, step {step}: {error}; restore it") from error

    # -- the corpus ---------------------------------------------------------------------------------------------------

    def data(self, step: int) -> RunData | None:
        """Return what the run read at ``step``; None, and ``gone`` says why, where that is not what it was."""
        from megaopus.data.run_data import RunData

        launch = self._launch(step)
        if launch not in self._data:
            self._data[launch] = None
            config = self.config(step)
            try:
                opened = RunData.open(config.data, config.data_needs())
                if opened.pool.corpus.fingerprint == _json(launch / "environment.json").get("corpus"):
                    self._data[launch] = opened
                else:
                    self.gone = f"{config.data.path}: another corpus lies there now"
            except DataError as error:
                self.gone = str(error)
        return self._data[launch]

    def _streams(self, step: int) -> tuple[Callable[[int], CandidateBuffer] | None, Any]:
        """(candidates by step, proxy by step), None each without the corpus."""
        if (data := self.data(step)) is None:
            return None, None
        proxy = data.proxy_batches()
        return data.candidates().at, None if proxy is None else proxy.at


def texts_of(run_dir: Path, sequences: Sequence[int]) -> list[tuple[str, str]]:
    """(ids of the documents that it is of, its text) of each of a run's ``sequences``.

    Raises DataError or ConfigError, which say why, where the corpus is not what the run read.
    """
    record = Record(run_dir)
    data = record.data(max(record.facts, default=0))
    if data is None:
        raise DataError(record.gone)
    tokenizer, pool = data.pool.corpus.tokenizer(), data.pool
    texts = [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in pool.tokens(sequences)[:, :-1].tolist()]
    return [(", ".join(pool.documents_of(n)), text) for n, text in zip(sequences, texts, strict=True)]


def _other_candidates(rows: Table, buffer: CandidateBuffer) -> str:
    """Return how the candidates in the log are not those of the stream, in words."""
    names = np.array(buffer.domain_names)[buffer.domains]
    for what, here, there in (
        ("id", rows["id"].to_numpy(), buffer.ids.numpy()),
        ("sequence", rows["sequence"].to_numpy(), buffer.sequence_ids),
        ("domain", np.array(rows["domain"].to_pylist()), names),
    ):
        if len(here) != len(there):
            return f"{len(here)} candidates recorded, {len(there)} by the arithmetic of the stream"
        if (at := np.flatnonzero(here != there)).size:
            first = int(at[0])
            return (
                f"the {what} of {at.size} candidates is not that of the stream; the first, row {first}: "
                f"recorded {here[first]}, by arithmetic {there[first]}"
            )
    return ""


def _differences(rows: Table, facts: dict[str, Any], found: Selection, *, scored: bool) -> str:
    """Return how the picks made again are not those recorded, in words; ``scored``: the step scored its own buffer."""
    ids = rows["id"].to_numpy()
    here, there = (set(ids[at].tolist()) for at in (rows["picked"].to_numpy(), found.indices.numpy()))
    said = []
    if facts["method"] != found.method:
        said.append(f"method recorded {facts['method']}, made again {found.method}")
    if here != there:
        said.append(f"picked in the record only: {sorted(here - there)}; when made again only: {sorted(there - here)}")
    if scored:
        known = rows["utility"].is_valid().to_numpy()
        wanted = np.zeros(len(ids), dtype=bool) if found.scored is None else found.scored.numpy()
        if (known != wanted).any():
            more, less = ids[known & ~wanted].tolist(), ids[wanted & ~known].tolist()
            said.append(f"other candidates were scored: in the record only {more}, when made again only {less}")
    p = found.probabilities.numpy()
    if (wrong := ~np.isclose(rows["probability"].to_numpy(), p, rtol=TOLERANCE, atol=1e-12)).any():
        first = int(np.flatnonzero(wrong)[0])
        said.append(
            f"{int(wrong.sum())} probabilities, the first of id {ids[first]}: recorded "
            f"{rows['probability'][first].as_py():.6g}, made again {p[first]:.6g}"
        )
    for key, value in (("candidates", len(ids)), ("picked", len(there)), ("ess", found.ess)):
        if not np.isclose(float(facts[key]), value, rtol=TOLERANCE):
            said.append(f"{key} recorded {facts[key]}, made again {value}")
    return "; ".join(said)


def _version(environment: dict[str, Any]) -> str:
    """Name what a launch ran: the package's version and, where known, the commit."""
    version, commit = environment.get("packages", {}).get("megaopus", "unknown"), environment.get("git")
    return f"megaopus {version}" + (f", commit {commit[:12]}" if commit else "")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected keys and values; restore it")
    return value


@cache
def _config(path: Path) -> RunConfig:
    from megaopus.config.parse import load

    return load(path)
