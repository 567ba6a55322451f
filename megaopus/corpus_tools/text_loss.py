"""Measures how much of the text a tokenizer cannot write, and refuses one that loses too much."""

from __future__ import annotations

import heapq
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megaopus.errors import DataError

_SAMPLED = 64
"""Documents of a domain that are decoded again."""
SAMPLED_DOMAINS = 64
_SAMPLED_CHARACTERS = 1000
"""Of the beginning of each."""


@dataclass(slots=True)
class Sample:
    """Keeps the beginnings of some documents of each domain: those of the lowest hash, so any order gives the same."""

    domains: int | None = SAMPLED_DOMAINS
    """At most so many, those that come first; None: all."""
    _kept: dict[str, list[tuple[float, int, str]]] = field(default_factory=dict)
    _offered: int = 0

    def offer(self, domain: str, draw: float, text: str) -> None:
        """Keep the text if its hash, ``draw`` in [0, 1), is among the lowest of its domain."""
        if (kept := self._kept.get(domain)) is None:
            if len(self._kept) == self.domains:
                return
            kept = self._kept.setdefault(domain, [])
        if len(kept) == _SAMPLED and -draw <= kept[0][0]:
            return
        self._offered += 1
        item = (-draw, -self._offered, text[:_SAMPLED_CHARACTERS])
        if len(kept) < _SAMPLED:
            heapq.heappush(kept, item)
        else:
            heapq.heapreplace(kept, item)

    def offered(self) -> Iterator[tuple[str, float, str]]:
        """(domain, hash, text) of what is kept: offered to another sample in this order, it stands for all of it."""
        for domain, kept in self._kept.items():
            for draw, _, text in sorted(kept, key=lambda item: -item[1]):
                yield domain, -draw, text

    def texts(self) -> dict[str, list[str]]:
        """Domain -> texts."""
        return {domain: [text for *_, text in sorted(kept, reverse=True)] for domain, kept in self._kept.items()}


@dataclass(slots=True)
class TextLoss:
    """Counts what became of text, that of a domain or all."""

    documents: int = 0
    empty: int = 0
    """Documents that have no token but the one that ends them."""
    tokens: int = 0
    """Without those that end documents."""
    unknown: int = 0
    """Tokens that stand for what the tokenizer does not know."""
    sampled_characters: int = 0
    lost_characters: int = 0
    """Of those: they are not in the decoded text."""

    def shares(self) -> dict[str, float]:
        """Return what is lost -> its share of all."""
        return {
            "of the characters of a sample lost": self.lost_characters / max(1, self.sampled_characters),
            "of the tokens unknown": self.unknown / max(1, self.tokens),
            "of the documents empty": self.empty / max(1, self.documents),
        }

    def told(self) -> str:
        """Say the shares in a line."""
        return ", ".join(f"{_percent(share)} {what}" for what, share in self.shares().items())


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The token that stands for what the tokenizer does not know; None: it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)


def sampled_loss(tokenizer: Tokenizer, sample: Mapping[str, list[str]]) -> dict[str, TextLoss]:
    """Encode and decode the texts of each domain and compare. Raises DataError if they cannot be encoded.

    Characters are compared without their order, case, accents and white space, which tokenizers may change: lost are
    those that the decoded text has fewer of.
    """
    unknown, found = unknown_id(tokenizer), {}
    for domain, texts in sample.items():
        try:
            encoded = [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises bare Exception
            raise cannot_encode(error) from error
        loss = found[domain] = TextLoss(documents=len(texts))
        for text, ids in zip(texts, encoded, strict=True):
            known = [identity for identity in ids if identity != unknown]
            loss.empty += not ids
            loss.tokens += len(ids)
            loss.unknown += len(ids) - len(known)
            before, after = _letters(text), _letters(tokenizer.decode(known, skip_special_tokens=False))
            loss.sampled_characters += before.total()
            loss.lost_characters += (before - after).total()
    return found


def cannot_encode(error: Exception) -> DataError:
    """The error of a tokenizer that gives up."""
    return DataError(f"the tokenizer cannot write this text ({error}); use another, or none to train one")


def counted_loss(
    domains: list[str], codes: np.ndarray, lengths: np.ndarray, unknown: np.ndarray, sampled: Mapping[str, TextLoss]
) -> dict[str, TextLoss]:
    """Count by domain what was encoded, with what a sample showed.

    ``codes``, ``lengths``, ``unknown``: (D,) domain, tokens with the one at the end, and unknown tokens of each
    document.
    """
    documents, empty, tokens, without = (
        np.bincount(codes, weights, minlength=len(domains)).astype(np.int64).tolist()
        for weights in (None, lengths == 1, lengths - 1, unknown)
    )
    return {
        name: TextLoss(
            documents[code],
            empty[code],
            tokens[code],
            without[code],
            *((seen.sampled_characters, seen.lost_characters) if (seen := sampled.get(name)) else ()),
        )
        for code, name in enumerate(domains)
    }


def total(losses: Mapping[str, TextLoss]) -> TextLoss:
    """Add up the domains."""
    counts: Counter[str] = Counter()
    for each in losses.values():
        counts.update(asdict(each))
    return TextLoss(**counts)


def refuse(losses: Mapping[str, TextLoss], most: float) -> None:
    """Raise DataError if a domain, or all of them together, loses more than a share ``most``."""
    for name, loss in {**losses, "": total(losses)}.items():
        if max(loss.shares().values()) > most:
            where = f" of domain {name!r}" if name else ""
            raise DataError(
                f"the tokenizer cannot write the text{where}: {loss.told()} (at most {_percent(most)}: --max-lost); use"
                " a tokenizer that knows this text, or none to train one; --max-lost 1 takes the loss"
            )


def described(losses: Mapping[str, TextLoss]) -> dict[str, Any]:
    """Describe the loss for the manifest: all together, and the domains that lose anything."""
    lossy = {name: asdict(loss) for name, loss in losses.items() if any(loss.shares().values())}
    return {"all": asdict(total(losses)), "domains": lossy}


def _letters(text: str) -> Counter[str]:
    """Count each character, without case, accents, white space and what cannot be seen."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return Counter(letter for letter in plain if unicodedata.category(letter)[0] not in "MZC")


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %") if share >= 0.001 or not share else "< 0.1 %"
