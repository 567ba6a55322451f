"""Says which share of the documents goes to which split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from megaopus.data.config import DataConfig
from megaopus.data.corpus import SPLITS
from megaopus.errors import DataError

POOL, PROXY, VALIDATION = range(len(SPLITS))


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Says which share of the documents goes where; a document's place depends on its text and the seed alone."""

    proxy_fraction: float = 0.01
    """Share of the wanted domains' documents that become the proxy."""
    validation_fraction: float = 0.01
    """Share of every domain's documents held out for validation."""
    wanted: tuple[str, ...] = ()
    """Domains that give proxy documents; none named: all of them."""
    seed: int = 0
    seq_len: int = DataConfig().seq_len
    """Tokens of a sequence; a held-out split of a small corpus gets the text for one, where there is as much."""

    def __post_init__(self) -> None:
        for name in ("proxy_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"{name} = {getattr(self, name)}: must lie in [0, 1); 0.01 is usual")
        if self.proxy_fraction + self.validation_fraction >= 1:
            raise DataError("proxy_fraction + validation_fraction must stay below 1; the rest is the training pool")
        if self.seq_len < 2:
            raise DataError(f"seq_len = {self.seq_len}: must be at least 2, as data.seq_len of a run")

    def draw(self, text: bytes) -> tuple[float, bytes]:
        """A number in [0, 1) that the text decides, and a short digest of the text."""
        digest = hashlib.sha256(b"%d:" % self.seed + text).digest()
        return int.from_bytes(digest[:8], "big") / 2**64, digest[8:24]
