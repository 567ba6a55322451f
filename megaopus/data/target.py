"""Says what a run's headline loss is taken on: what a proxy held out, the domains that are named, or all of them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from megaopus.data.corpus import TARGET
from megaopus.data.sequences import Sequences

ALL_DOMAINS = "the mean over all domains"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Names the target of a run."""

    told: str
    """In words, as ``target: ...`` goes on."""
    key: str
    """The same for two runs whose headline losses may be compared."""
    named: bool
    """Whether there is one; else the headline is the mean over all domains."""


def held_out_target(sequences: Sequences, path: str) -> Target:
    """Describe the held-out slice of the corpus in ``path``; ``sequences``: those that it has at the run's length."""
    counts = sequences.corpus.manifest["counts"]
    parts = {
        name: f"{counts[name][TARGET]['documents']:,} {what}"
        for name, what in (("items", "items"), ("nearest", "documents"))
        if counts[name][TARGET]["documents"]
    }
    used = [told for name, told in parts.items() if name in sequences.domains]
    short = [told for name, told in parts.items() if name not in sequences.domains]
    told = f"held-out slice of {' and '.join(used)} of corpus {path}"
    if short:
        told += f" (its {short[0]} fill no sequence of {sequences.seq_len} tokens)"
    return Target(told=told, key=f"held out {sequences.corpus.fingerprint} {' '.join(sequences.domains)}", named=True)


def target_of_domains(names: Items[str]) -> Target:
    """Describe the target that ``data.target_domains`` names; none named: the mean over all domains."""
    if not names:
        return Target(told=f"none named, {ALL_DOMAINS}", key="none", named=False)
    return Target(told=f"domains {', '.join(names)}", key=f"domains {' '.join(sorted(names))}", named=True)
