"""Answers what an evaluation asks of a model, at any layout: how probable a text is after another, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from megaopus.engine.token_logprobs import Asked, TokenLogprobs
from megaopus.selection.config import PASS_TOKENS

Advance = Callable[[int], None]


class Reads(Protocol):
    """Is what of an engine is used here (``engine.base.Engine``)."""

    @property
    def length_unit(self) -> int:
        """Positions of a sequence must be a multiple of this."""

    def token_logprobs(self, asked: Asked, micro_batch_size: int) -> TokenLogprobs:
        """Tell how probable the tokens asked for are."""


class Answer(NamedTuple):
    """Says how probable a continuation is."""

    logprob: float
    """Natural logarithm of its probability, the sum over its tokens."""
    greedy: bool
    """Whether each of its tokens is the most probable one."""


@dataclass(slots=True)
class _Row:
    """A sequence to run: ``tokens``, of which the last ``asked`` are labels; several requests may share one."""

    tokens: list[int]
    asked: int
    last: list[int] = field(default_factory=list)
    """What stands at its last place in each of the requests."""
    requests: list[int] = field(default_factory=list)


class Likelihood:
    """Puts requests into passes of about as many tokens each, and takes the answers apart again. Collective.

    Requests that differ in their last token alone, as the letters of a multiple choice, are one sequence of a pass.
    """

    def __init__(self, engine: Reads, max_length: int, replicas: int, device: str, advance: Advance | None = None):
        """``max_length``: positions that the model has. ``replicas``: micro-batches that run at a time on all ranks.

        ``advance`` is told of each request that is answered.
        """
        self._engine, self.max_length, self._replicas = engine, max_length, replicas
        self._pass_tokens = PASS_TOKENS["cpu" if device == "cpu" else "cuda"]
        self._advance = advance or (lambda number: None)

    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        """Tell how probable each continuation is after its context: pairs of token ids, neither of them empty.

        Of what is longer than the model reads, the beginning is left out. Raises ValueError if that would leave out
        tokens of a continuation.
        """
        rows = self._rows(pairs)
        found: dict[int, Answer] = {}
        for batch in self._passes(rows):
            told = self._told(batch)
            for place, row in enumerate(batch):
                self._take(row, told, place, found)
            self._advance(sum(len(row.requests) for row in batch))
        return [found[number] for number in range(len(pairs))]

    def passes(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Asked]:
        """Yield what ``continuations`` would ask the engine, pass after pass."""
        for batch in self._passes(self._rows(pairs)):
            yield self._asked(batch)

    def _rows(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Row]:
        rows: dict[tuple[tuple[int, ...], int], _Row] = {}
        for number, (context, continuation) in enumerate(pairs):
            whole = [*context, *continuation][-(self.max_length + 1) :]
            if not context or not 0 < len(continuation) < len(whole):
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens: the model has {self.max_length} positions"
                )
            row = rows.setdefault((tuple(whole[:-1]), len(continuation)), _Row(whole, len(continuation)))
            row.last.append(whole[-1])
            row.requests.append(number)
        return list(rows.values())

    def greedy(
        self, contexts: Sequence[Sequence[int]], most: int, done: Callable[[int, list[int]], bool]
    ) -> list[list[int]]:
        """Continue each context by its most probable token, again and again; returns the tokens added.

        ``most``: tokens added to each; ``done(number, tokens)`` says whether what was added to a context is enough.
        Every token is a pass over all before it: nothing of a pass is kept for the next one.
        """
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"{most} tokens cannot be added within the model's {self.max_length} positions")
        added: list[list[int]] = [[] for _ in contexts]
        rows = [_Row([*context[-room:], 0], 1, [0], [number]) for number, context in enumerate(contexts)]
        for batch in self._passes(rows):
            while batch:
                told = self._told(batch)
                going = []
                for place, row in enumerate(batch):
                    number, end = row.requests[0], len(row.tokens) - 2
                    token = int(told.best[place, end])
                    added[number].append(token)
                    if len(added[number]) < most and not done(number, added[number]):
                        row.tokens[-1:] = [token, 0]
                        going.append(row)
                self._advance(len(batch) - len(going))
                batch = going
        return added

    def _take(self, row: _Row, told: TokenLogprobs, place: int, found: dict[int, Answer]) -> None:
        """Put together the answers to the requests that share a row."""
        end = len(row.tokens) - 2
        before = slice(end - row.asked + 1, end)
        logprob = float(told.logprobs[place, before].sum())
        labels = torch.tensor(row.tokens[1:][before], dtype=torch.int64)
        greedy = torch.equal(told.best[place, before], labels)
        for which, (number, last) in enumerate(zip(row.requests, row.last, strict=True)):
            own = float(told.alternatives[place, which])
            found[number] = Answer(logprob + own, greedy and int(told.best[place, end]) == last)

    def _passes(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Yield rows in batches, the longest first: what does not fit fails at once, and rows of a batch are alike."""
        rows = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens, row.asked))
        while rows:
            count = self._rows_per_pass(len(rows[0].tokens) - 1) * self._replicas
            batch, rows = rows[:count], rows[count:]
            yield batch

    def _rows_per_pass(self, length: int) -> int:
        return max(1, self._pass_tokens // self._padded(length))

    def _padded(self, length: int) -> int:
        unit = self._engine.length_unit
        return -(-length // unit) * unit

    def _told(self, batch: list[_Row]) -> TokenLogprobs:
        asked = self._asked(batch)
        found = self._engine.token_logprobs(asked, self._rows_per_pass(asked.tokens.shape[1] - 1))
        return TokenLogprobs(*(each.cpu() for each in found))

    def _asked(self, batch: list[_Row]) -> Asked:
        """Lay rows out, filled up behind with tokens that nothing of them sees."""
        length = self._padded(max(len(row.tokens) for row in batch) - 1)
        most = max(len(row.last) for row in batch)
        tokens = torch.full((len(batch), length + 1), ~0)
        alternatives = torch.zeros(len(batch), most, dtype=torch.int64)
        for place, row in enumerate(batch):
            own, first = torch.tensor(row.tokens), len(row.tokens) - row.asked
            tokens[place, :first], tokens[place, first : len(own)] = ~own[:first], own[first:]
            alternatives[place, : len(row.last)] = torch.tensor(row.last)
        return Asked(tokens, alternatives)
