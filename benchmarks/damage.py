"""Damages text in ways that web corpora really hold, so that a scorer has something to see."""

from __future__ import annotations

import random
import textwrap
from collections import defaultdict
from collections.abc import Iterable

COLUMN = 46
"""Characters of a line of a column."""
MISREAD = 0.3
"""Share of words that are misread."""
CONFUSED = (
    ("rn", "m"),
    ("m", "rn"),
    ("cl", "d"),
    ("d", "cl"),
    ("w", "vv"),
    ("h", "b"),
    ("e", "c"),
    ("l", "1"),
    ("I", "l"),
    ("o", "0"),
    ("u", "ii"),
    ("t", "f"),
    ("a", "o"),
    ("n", "ri"),
    ("S", "5"),
    (".", ","),
)
"""Letters as print shows them -> as they are misread."""


def two_columns(left: str, right: str) -> str:
    """Read two columns of a page across, line by line, as the extraction of text from a PDF does."""
    sides = [textwrap.wrap(" ".join(text.split()), COLUMN) for text in (left, right)]
    return "\n".join(f"{one} {other}" for one, other in zip(*sides, strict=False))


def misread(words: list[str], draw: random.Random) -> list[str]:
    """Let ``MISREAD`` of the words have a letter that was taken for another."""
    found = []
    for word in words:
        fitting = [pair for pair in CONFUSED if pair[0] in word]
        if fitting and draw.random() < MISREAD:
            old, new = draw.choice(fitting)
            places = [place for place in range(len(word)) if word.startswith(old, place)]
            place = draw.choice(places)
            word = word[:place] + new + word[place + len(old) :]
        found.append(word)
    return found


class Trigrams:
    """Makes text in which each word follows the two before it as somewhere in the text that it was made from."""

    def __init__(self, texts: Iterable[list[str]]):
        """``texts``: the words of each."""
        self._next: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._starts: list[tuple[str, str]] = []
        for words in texts:
            for one, two, three in zip(words, words[1:], words[2:], strict=False):
                self._next[one, two].append(three)
            if len(words) > 2:
                self._starts.append((words[0], words[1]))

    def text(self, count: int, draw: random.Random) -> list[str]:
        """Draw ``count`` words, beginning again where no word follows."""
        found: list[str] = []
        while len(found) < count:
            pair = draw.choice(self._starts)
            found += pair
            while len(found) < count and (after := self._next.get(pair)):
                pair = (pair[1], draw.choice(after))
                found.append(pair[1])
        return found[:count]
