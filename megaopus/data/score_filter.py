"""Says which documents of the pool a filter by scores keeps (``DataConfig.filter``)."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from megaopus.data.config import FilterConfig
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.index import BLOCK
from megaopus.data.layout import mapped_mask
from megaopus.data.permutation import mix
from megaopus.data.scores import LOWEST, Column, load_column
from megaopus.errors import DataError

POOL = SPLITS.index("pool")


class Kept:
    """Says what a filter keeps of a corpus's pool: a document without a score never, of the others those in bounds.

    With ``keep`` these are put in order, the best first (equal ones by their place in the corpus), or with a
    temperature as drawn without replacement, chances as exp(+-score / temperature): Gumbel top-k, as DSIR resamples
    (arXiv 2302.03169). The first of them are kept, as many as have together at most ``keep`` times the tokens of the
    pool, or of each domain of it.
    """

    def __init__(self, corpus: Corpus, config: FilterConfig, column: Column):
        """``column``: the scores of ``config.column``. Nothing is worked out yet."""
        self._corpus, self._config, self._column = corpus, config, column
        self._best = column.best if config.order == "auto" else config.order
        self.identity: dict[str, Any] = {**asdict(config), "order": self._best, "scores": column.digest}
        """Settings and the digest of the scores: equal for filters that mean the same."""

    @cached_property
    def documents(self) -> np.ndarray:
        """(D,) bool, False outside the pool; worked out when first asked for, or mapped where a layout has them.

        Raises DataError if nothing is kept.
        """
        known = mapped_mask(self._corpus, "pool", self)
        return self._work_out() if known is None else known

    def _work_out(self) -> np.ndarray:
        corpus, config = self._corpus, self._config
        scores, pool = self._column.values.astype(np.float64), corpus.split_codes == POOL
        kept = pool & np.isfinite(scores)
        if config.at_least is not None:
            kept &= scores >= config.at_least
        if config.at_most is not None:
            kept &= scores <= config.at_most
        if config.keep is not None:
            merit = -scores if self._best == LOWEST else scores
            if config.temperature is not None:
                merit = merit / config.temperature + gumbel(len(corpus), config.seed)
            groups = [corpus.domain_codes == code for code in range(len(corpus.domains))]
            inside = [pool & group for group in groups] if config.per_domain else [pool]
            lengths = corpus.lengths_of(slice(None))
            chosen = [_first(merit, lengths, group, kept, config.keep) for group in inside]
            kept = np.zeros(len(corpus), dtype=bool)
            kept[np.concatenate(chosen)] = True
        if not kept.any():
            spread = scores[pool & np.isfinite(scores)]
            there = f"from {spread.min():.4g} to {spread.max():.4g}" if len(spread) else "none"
            raise DataError(
                f"{corpus.path}: data.filter keeps none of the pool's {int(pool.sum()):,} documents (scores of"
                f" {config.column!r} there: {there}); change its bounds or data.filter.keep"
            )
        return kept

    def summary(self, corpus: Corpus) -> dict[str, tuple[int, int, int, int]]:
        """Domain -> (documents kept, in the pool, tokens kept, in the pool); domains that are in the pool."""
        sizes = np.zeros((4, len(corpus.domains)), dtype=np.int64)
        for first in range(0, len(corpus), BLOCK):
            part = slice(first, first + BLOCK)
            pool = corpus.split_codes[part] == POOL
            domains, lengths = corpus.domain_codes[part], corpus.lengths_of(part)
            for row, taken in enumerate((pool & self.documents[part], pool)):
                np.add.at(sizes[row], domains[taken], 1)
                np.add.at(sizes[2 + row], domains[taken], lengths[taken])
        return {
            name: (found[0], found[1], found[2], found[3])
            for name, found in zip(corpus.domains, sizes.T.tolist(), strict=True)
            if found[1]
        }

    def told(self, corpus: Corpus) -> dict[str, str]:
        """The summary in words: by what, then all domains together, then each."""
        by = self.identity
        bounds = [f"{key} {by[key]:g}" for key in ("at_least", "at_most") if by[key] is not None]
        if by["keep"] is not None:
            how = "best" if by["temperature"] is None else f"drawn at temperature {by['temperature']:g}"
            bounds.append(f"{by['keep']:.4g} {how} ({by['order']}{', of each domain' if by['per_domain'] else ''})")
        rows = self.summary(corpus)
        total = tuple(map(sum, zip(*rows.values(), strict=True)))
        told = {f"by {by['column']}": ", ".join(bounds)}
        for name, (documents, of, tokens, of_tokens) in {"all": total, **rows}.items():
            shares = f"{documents / of:.1%}", f"{tokens / of_tokens:.1%}"
            told[name] = f"{documents:,} of {of:,} documents ({shares[0]}), {tokens:,} tokens ({shares[1]})"
        return told


def kept_documents(corpus: Corpus, config: FilterConfig) -> Kept | None:
    """Apply the filter; None: there is none. Raises DataError (see ``scores.load_column``), also if nothing is kept."""
    if config.column is None:
        return None
    found = Kept(corpus, config, load_column(corpus, config.column))
    _ = found.documents
    return found


def _first(
    merit: np.ndarray, lengths: np.ndarray, group: np.ndarray, eligible: np.ndarray, fraction: float
) -> np.ndarray:
    """Those of ``group`` that are ``eligible``, by merit, up to ``fraction`` of the group's tokens; (D,) each."""
    members = np.flatnonzero(group & eligible)
    order = members[np.argsort(-merit[members], kind="stable")]
    return order[np.cumsum(lengths[order]) <= fraction * lengths[group].sum()]


def gumbel(count: int, seed: int) -> np.ndarray:
    """(count,) standard Gumbel noise, a function of (seed, place)."""
    key = np.uint64(int.from_bytes(hashlib.sha256(f"filter/{seed}".encode()).digest()[:8], "little"))
    bits = mix(mix(np.arange(count, dtype=np.uint64) + np.uint64(1)) + key)
    return -np.log(-np.log(((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53))
