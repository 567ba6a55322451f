"""Asks how far any weighing of importance, utility and loss could go on the pool of the study on a real model.

Buffers are drawn from the sequences that real_gate.py has scored, in the pool's proportions, and picked from as
``selection=opus`` picks: importance narrows them, then one log-odds chooses. What picks are worth is what twelve
updates on each kind of text alone took off the loss (rows of real_gate.py), so that a share of the way from importance
to the oracle comes out without training. Weights: those without evidence (megaopus/selection/odds.py), and those of a
logistic regression that is told which candidates are wanted, which no judge can beat by much. Losses are the
pre-trained model's; utilities with contrast, of a proxy of 64 sequences, 64 tokens scored. Half a minute on one core.

    python benchmarks/real_reach.py --model smollm2 --data FOLDER --work runs/gate --rows FILE

``--work``, ``--rows``: those of real_gate.py, after ``--only visibility worth proxies``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.pools import WANTED
from benchmarks.real_gate import EACH, FEWER, LENGTH, SEED, SHORT, read
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.data.text_features import SequenceTextFeatures, ensure_text_features
from megaopus.logistic import fit_logistic
from megaopus.selection.odds import EXPECTED, Signals, design

BUFFER, PICKS, BUFFERS = 64, 8, 400
NARROWED = (12, 16, 24, 32, BUFFER)


@dataclass(frozen=True)
class Scored:
    """Holds what is known of ``FEWER`` sequences of each kind, (kinds, FEWER) float64 each."""

    kinds: list[str]
    """The wanted one first."""
    share: np.ndarray
    """(kinds,) of the pool."""
    worth: np.ndarray
    """(kinds,) nats."""
    importance: Tensor
    utility: Tensor
    losses: Mapping[int, Tensor]
    """By the tokens scored."""


def gathered(model: Path, data: Path, work: Path, rows: Path, console: Console) -> Scored:
    """Read what real_gate.py has kept. Raises SystemExit where it has not asked yet."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    worth = {row["kind"]: row["fall"] for row in found if row["what"] == "worth"}
    needed = [work / "losses_pre-trained.pt", work / "contrast_by_64.pt"]
    if not worth or not all(path.exists() for path in needed):
        raise SystemExit(f"{work}: run real_gate.py --only visibility worth proxies first")
    kinds = list(read(model, data, work).kinds)
    corpus = Corpus.open(work / "real_hard")
    pool, proxy = Sequences(corpus, "pool", LENGTH), Sequences(corpus, "proxy", LENGTH, [WANTED])
    features = SequenceTextFeatures(pool, ensure_text_features(pool, proxy, str(work / "features"), console))
    domains, order = pool.domain_of(np.arange(len(pool))), np.random.default_rng(SEED).permutation(len(pool))
    of_kind = {kind: domains[order] == pool.domains.index(kind) for kind in kinds}
    scored = torch.from_numpy(np.stack([order[mask][:FEWER] for mask in of_kind.values()]))
    tokens = torch.load(needed[0], weights_only=True).view(len(kinds), EACH, LENGTH)[:, :FEWER]
    return Scored(
        kinds,
        np.array([mask.mean() for mask in of_kind.values()]),
        np.array([worth[kind] for kind in kinds]),
        features.importance(scored.flatten()).view(scored.shape),
        torch.load(needed[1], weights_only=True).view(len(kinds), FEWER, SHORT).mean(2),
        {length: tokens[:, :, :length].mean(2) for length in (SHORT, LENGTH)},
    )


def buffers(scored: Scored, narrowed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kind, number) of the ``narrowed`` most important candidates of each of ``BUFFERS`` buffers, the first best."""
    draw, importance, found = np.random.default_rng(0), scored.importance.numpy(), []
    for _ in range(BUFFERS):
        kinds = np.repeat(np.arange(len(scored.kinds)), draw.multinomial(BUFFER, scored.share))
        numbers = np.concatenate([draw.permutation(FEWER)[: (kinds == kind).sum()] for kind in np.unique(kinds)])
        best = np.lexsort((draw.random(BUFFER), -importance[kinds, numbers]))[:narrowed]
        found.append((kinds[best], numbers[best]))
    return found


def picked(scored: Scored, narrowed: int, length: int, weights: Tensor | None) -> tuple[float, float]:
    """(mean worth, share of wanted text) of picks by the log-odds; ``weights`` (4,); None: fitted to what is wanted."""
    drawn = buffers(scored, narrowed)
    rows = [
        design(Signals(scored.importance[where], scored.utility[where], scored.losses[length][where]))
        for where in drawn
    ]
    if weights is None:
        wanted = torch.from_numpy(np.concatenate([kinds == 0 for kinds, _ in drawn])).double()
        x = torch.cat([torch.cat(rows), torch.ones(len(wanted), 1, dtype=torch.float64)], 1)
        weights = fit_logistic(x, wanted, torch.ones_like(wanted))[:-1]
    best = [(row @ weights).argsort(descending=True, stable=True)[:PICKS].numpy() for row in rows]
    taken = np.concatenate([kinds[numbers] for (kinds, _), numbers in zip(drawn, best, strict=True)])
    return float(scored.worth[taken].mean()), float((taken == 0).mean())


def best_worth(scored: Scored, narrowed: int) -> float:
    """Mean worth of the picks of an oracle among the ``narrowed`` most important."""
    found = [np.sort(scored.worth[kinds])[::-1][:PICKS].mean() for kinds, _ in buffers(scored, narrowed)]
    return float(np.mean(found))


def table(scored: Scored) -> Table:
    """Shares of the way from importance to the oracle, by how many candidates are scored and how much of each."""
    expected = torch.tensor(EXPECTED, dtype=torch.float64)
    by_importance = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    start, end = picked(scored, BUFFER, SHORT, by_importance)[0], best_worth(scored, BUFFER)

    def told(worth: float, share: float | None = None) -> str:
        way = f"{(worth - start) / (end - start):.2f}"
        return way if share is None else f"{way} ({share:.0%})"

    made = Table(title="Of the way from importance to the oracle, by worth (wanted text among picks)")
    for heading in ("scored", "tokens", "weights without evidence", "best weights", "oracle among them"):
        made.add_column(heading)
    for narrowed in NARROWED:
        for length in scored.losses:
            cells = [told(*picked(scored, narrowed, length, weights)) for weights in (expected, None)]
            made.add_row(f"{narrowed} of {BUFFER}", str(length), *cells, told(best_worth(scored, narrowed)))
    return made


def main() -> None:
    """Draw, pick, print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    made.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="text, as pools.py takes it")
    made.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    made.add_argument("--rows", type=Path, required=True, metavar="FILE")
    args, console = made.parse_args(), Console()
    console.print(table(gathered(args.model, args.data, args.work, args.rows, console)))


if __name__ == "__main__":
    main()
