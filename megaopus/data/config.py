"""Where the tokens of a run come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megaopus.data.mixture import parse_stages

ORDERS = ("auto", "highest", "lowest")


@dataclass(slots=True, kw_only=True)
class PrepareConfig:
    """What ``prepare --data NAME`` reads of configs/data/NAME.yaml; training does not."""

    sources: list[str] = field(default_factory=list)
    """Each as ``--source`` takes it: [DOMAIN=]PATH, or hf:NAME[:CONFIG[:SPLIT]] on the Hugging Face hub."""
    text_field: str = "text"
    id_field: str = "id"
    domain_field: str = "domain"
    keep: list[str] = field(default_factory=list)
    """Fields to keep in the document table."""
    tokenizer: str | None = None
    """As ``--tokenizer``; null: one is trained."""


@dataclass(slots=True, kw_only=True)
class FilterConfig:
    """Which documents of the pool are trained on, by a score of each (docs/data.md)."""

    column: str | None = None
    """A score column: the NAME of ``score --name``, or a field that ``prepare --keep`` kept; null: every document."""
    keep: float | None = None
    """The best documents whose tokens are at most this fraction of the pool's; null: all within the bounds."""
    at_least: float | None = None
    """The lowest score to keep."""
    at_most: float | None = None
    """The highest score to keep."""
    order: str = "auto"
    """Which scores are best: highest; lowest; auto: as the column says (perplexity's lowest, all others' highest)."""
    temperature: float | None = None
    """Draw documents for ``keep`` without replacement, chances as exp(score / temperature); null: take the best."""
    per_domain: bool = False
    """Take the fraction ``keep`` of every domain's tokens by itself."""
    seed: int = 0
    """Of the draw."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        given = [name for name in ("keep", "at_least", "at_most", "temperature") if getattr(self, name) is not None]
        if self.column is None:
            if given or self.per_domain:
                yield "column", "no column named for the filter", "data.filter.column=NAME (see 'score --help')"
            return
        if not set(given) & {"keep", "at_least", "at_most"}:
            yield "column", "nothing says which scores to keep", "data.filter.keep=0.3, or data.filter.at_least=2.5"
        if self.keep is not None and not 0 < self.keep <= 1:
            yield "keep", "must lie in (0, 1]", "0.3 keeps the best 30 % of the tokens"
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            yield "at_least", f"above data.filter.at_most = {self.at_most}", "exchange them"
        if self.order not in ORDERS:
            yield "order", "unknown choice", f"use one of: {', '.join(ORDERS)}"
        if self.temperature is not None and not self.temperature > 0:
            yield "temperature", "must be positive", "1 draws as DSIR does; null takes the best"
        for key in ("temperature", "per_domain"):
            if getattr(self, key) and self.keep is None:
                yield key, "says how data.filter.keep is taken, which is not set", "data.filter.keep=0.3"


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """A prepared corpus (``python -m megaopus prepare``) and how it is cut into sequences."""

    path: str = ""
    """Folder of the prepared corpus: manifest.json, tokens.bin/.idx, documents.jsonl, tokenizer.json."""
    seq_len: int = 256
    """Tokens per training sequence."""
    wanted: list[str] = field(default_factory=list)
    """Domains of the target: proxy and headline validation loss come from them; empty: every domain."""
    weights: list[Any] = field(default_factory=list)
    """Stages [[0, {DOMAIN: WEIGHT, ...}], [STEP, {...}], ...] of how often candidates are of each domain; one not
    named: never. Empty: every sequence alike."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    proxy_path: str | None = None
    """Another prepared corpus to draw the proxy from; null: the split 'proxy' of ``path``."""
    traits_path: str | None = None
    """Where traits of the sequences are kept (a prescreen needs them); null: beside ``path``, in NAME.traits."""
    validation_path: str | None = None
    """Another prepared corpus to validate on; null: the split 'validation' of ``path``."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if not self.path:
            yield "path", "no corpus named", "data.path=FOLDER made by 'python -m megaopus prepare'"
        try:
            parse_stages(self.weights)
        except ValueError as error:
            yield "weights", str(error), "write 'data.weights=[[0,{books:2,code:1}],[1000,{books:1}]]'"
        for key, reason, remedy in self.filter.problems():
            yield f"filter.{key}", reason, remedy
        if self.seq_len < 2:
            yield "seq_len", "must be at least 2", "256 suits a laptop, 1024 to 8192 a cluster"
