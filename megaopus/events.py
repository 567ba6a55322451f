"""Tells what went another way than asked, as facts that programs read and a sentence that people read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SELECTION_KINDS = {
    "selection.alarm.repeats": "too few of the picks were new in the window: picked uniformly",
    "selection.alarm.sample_size": "the effective sample size was too small: picked uniformly",
    "selection.alarm.token_pairs": "the picks had too few different token pairs: picked uniformly",
    "selection.cap_lifted": "too few candidates were within the exposure cap: it was lifted as far as it must be",
    "selection.fallback.equal_utilities": "all utilities were equal: picked uniformly",
    "selection.fallback.learning_rate_zero": "the learning rate was 0: picked uniformly",
    "selection.fallback.losses_not_finite": "no candidate's loss was finite, though it had labels: picked uniformly",
    "selection.fallback.no_optimizer_state": "the optimizer had no state yet: picked uniformly",
    "selection.fallback.no_scored_label": "no label counted in what was scored of any candidate: picked uniformly",
    "selection.fallback.optimizer_never_steps": "the optimizer had no state for the second time: picked uniformly",
    "selection.fallback.proxy_gradient_zero": "the proxy gradient was 0: picked uniformly",
    "selection.fallback.proxy_not_finite": "the proxy gradient was not finite: picked uniformly",
    "selection.fallback.step_zero": "the optimizer's step on the proxy was 0: picked uniformly",
    "selection.fallback.too_few_finite": "too few utilities were finite: picked uniformly",
    "selection.partly_captured": "activations of some matrices are not captured: utilities left them out",
    "selection.practically_uniform": "raw utilities decided less than a tenth of the picks: draws were uniform",
    "selection.prescreen_distrusted": "utilities contradicted what the prescreen learnt: not used in this step",
    "selection.imprecise": "utilities, as differences of losses, hardly stood out from their errors",
    "selection.utility_not_finite": "utilities of some candidates were not finite: these were not picked",
    "selection.utility_outlying": "utilities of some candidates were far from all others: they moved no other pick",
}
"""Kind -> what happened, of the selector's events."""
_SENTENCES = {
    r"alarm: \d+% of the picks are new in the window": "selection.alarm.repeats",
    r"alarm: effective sample size": "selection.alarm.sample_size",
    r"alarm: \d+ different token pairs": "selection.alarm.token_pairs",
    r"fewer than \d+ candidates would be trained on": "selection.cap_lifted",
    r"all utilities are equal": "selection.fallback.equal_utilities",
    r"the optimizer has no state yet": "selection.fallback.no_optimizer_state",
    r"the proxy gradient is not finite": "selection.fallback.proxy_not_finite",
    r"only \d+ candidates have a finite utility": "selection.fallback.too_few_finite",
    r"raw utilities spread": "selection.practically_uniform",
    r"alarm: the predictor's correlation": "selection.prescreen_distrusted",
    r"utility not finite": "selection.utility_not_finite",
}
"""How a sentence of version 0.1, which kept nothing else, begins -> its kind."""


class Event:
    """Says what kind of thing happened, in words, and with which facts.

    Nothing reads the words: consoles and reports count by ``kind``, replays read ``facts``. Kinds are dotted, and
    ``SELECTION_KINDS`` (and docs/report.md) list those of the selector.
    """

    __slots__ = ("facts", "kind", "text")

    def __init__(self, kind: str, text: str, **facts: Any):
        """``facts``: plain values, by names other than kind and text."""
        self.kind, self.text, self.facts = kind, text, facts

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Event({self.kind!r}, {self.text!r}, {self.facts!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self.as_row() == other.as_row()

    __hash__ = None  # type: ignore[assignment]

    def as_row(self) -> dict[str, Any]:
        """Give the plain values that ``read_event`` makes an equal event of."""
        return {"kind": self.kind, "text": self.text, **self.facts}


def read_event(row: Event | str | Mapping[str, Any]) -> Event:
    """Make the event of a row of a run's record; of a sentence, as in version 0.1, one that counts with its like.

    An event is returned as it is. Raises ValueError for a row without kind and text.
    """
    if isinstance(row, Event):
        return row
    if isinstance(row, str):
        return Event(kind_of_sentence(row), row)
    if not isinstance(row, Mapping) or not all(isinstance(row.get(key), str) for key in ("kind", "text")):
        raise ValueError(f"an event needs kind and text: {row!r}")
    return Event(**row)


def kind_of_sentence(text: str) -> str:
    """Name the kind that a sentence of version 0.1 speaks of; of any other, itself with its numbers blanked."""
    for pattern, kind in _SENTENCES.items():
        if re.match(pattern, text):
            return kind
    return re.sub(r"(?:(?<!\w)-)?\d+(\.\d+)?(e[-+]?\d+)?(\s*,\s*\d+)*", "#", text)
