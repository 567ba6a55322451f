"""Where the tokens of a run come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megaopus.data.mixture import parse_stages


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
        if self.seq_len < 2:
            yield "seq_len", "must be at least 2", "256 suits a laptop, 1024 to 8192 a cluster"
