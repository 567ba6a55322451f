"""Says which documents of the pool a filter by scores keeps (``DataConfig.filter``)."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megaopus.data.config import FilterConfig
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.permutation import mix
from megaopus.data.scores import LOWEST, load_column
from megaopus.errors import DataError

POOL = SPLITS.index("pool")


@dataclass(frozen=True, slots=True)
class Kept:
    """Says what a filter keeps of a corpus's pool."""

    documents: np.ndarray
    """(D,) bool; False outside the pool."""
    identity: dict[str, Any]
    """Settings and the digest of the scores: equal for filters that mean the same."""

    def summary(self, corpus: Corpus) -> dict[str, tuple[int, int, int, int]]:
        """Domain -> (documents kept, in the pool, tokens kept, in the pool); domains that are in the pool."""
        rows = {}
        pool = corpus.split_codes == POOL
        for code, name in enumerate(corpus.domains):
            here = pool & (corpus.domain_codes == code)
            inside = here & self.documents
            if here.any():
                tokens, of_tokens = (int(corpus.lengths[members].sum()) for members in (inside, here))
                rows[name] = (int(inside.sum()), int(here.sum()), tokens, of_tokens)
        return rows

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
    """Apply the filter; None: there is none.

    A document without a score is never kept. Of the others those within the bounds are. With ``keep`` these are put in
    order, the best first (equal ones by their place in the corpus), or with a temperature as drawn without replacement,
    chances as exp(+-score / temperature): Gumbel top-k, as DSIR resamples (arXiv 2302.03169). The first of them are
    kept, as many as have together at most ``keep`` times the tokens of the pool, or of each domain of it.

    Raises:
        DataError: see ``scores.load_column``; or nothing is kept.
    """
    if config.column is None:
        return None
    column = load_column(corpus, config.column)
    scores, pool = column.values.astype(np.float64), corpus.split_codes == POOL
    kept = pool & np.isfinite(scores)
    if config.at_least is not None:
        kept &= scores >= config.at_least
    if config.at_most is not None:
        kept &= scores <= config.at_most
    best = column.best if config.order == "auto" else config.order
    if config.keep is not None:
        merit = -scores if best == LOWEST else scores
        if config.temperature is not None:
            merit = merit / config.temperature + gumbel(len(corpus), config.seed)
        groups = [corpus.domain_codes == code for code in range(len(corpus.domains))]
        inside = [pool & group for group in groups] if config.per_domain else [pool]
        chosen = [_first(merit, corpus.lengths, group, kept, config.keep) for group in inside]
        kept = np.zeros(len(corpus), dtype=bool)
        kept[np.concatenate(chosen)] = True
    if not kept.any():
        spread = scores[pool & np.isfinite(scores)]
        there = f"from {spread.min():.4g} to {spread.max():.4g}" if len(spread) else "none"
        raise DataError(
            f"{corpus.path}: data.filter keeps none of the pool's {int(pool.sum()):,} documents (scores of"
            f" {config.column!r} there: {there}); change its bounds or data.filter.keep"
        )
    return Kept(kept, {**asdict(config), "order": best, "scores": column.digest})


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
