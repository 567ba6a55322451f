"""Asks whether n-grams of more than two tokens tell wanted text from the rest of the pool ``real_hard`` (pools.py).

Importance as the product has it rests on orders 1 and 2 (text_features.py). Here it is fitted to numbers of orders 3 to
5 too, in tables of 2^18 buckets: mean log-likelihoods, shares of n-grams that were seen, or both; all are cross-fitted
as there. Prints ROC-AUCs of wanted text over each kind, and how many wanted sequences are among the most important 8
and 16 of buffers of 64. Two minutes on one core.

    python benchmarks/ngram_orders.py --tokenizer smollm2 --data FOLDER --work runs/orders
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from scipy.stats import rankdata

from benchmarks.pools import WANTED, prepare_texts, real_hard
from megaopus.corpus_tools.split import SplitRule
from megaopus.data import feature_numbers
from megaopus.data.corpus import Corpus
from megaopus.data.feature_work import parts
from megaopus.data.permutation import mix
from megaopus.data.sequences import Sequences
from megaopus.data.text_features import SequenceTextFeatures, ensure_text_features
from megaopus.logistic import fit_logistic

LENGTH, BUFFER, BUFFERS, PICKS = 128, 64, 200, (8, 16)
ORDERS, BUCKETS = (3, 4, 5), 1 << 18
_U64 = np.uint64
MORE = {
    "1-2, as it is": [],
    "1-3, likelihoods": [0, 3],
    "1-5, likelihoods": [0, 1, 2, 3, 4, 5],
    "1-5, seen": [6, 7, 8, 9, 10, 11],
    "1-5, both": [*range(12)],
}
"""What is fitted -> columns of ``numbers`` that are added."""


def hashed(tokens: np.ndarray) -> list[np.ndarray]:
    """Give the buckets of the n-grams of each of ``ORDERS``, (c, T - order + 1)."""
    first = mix(tokens + _U64(1))
    state, found = first, []
    for order in range(2, max(ORDERS) + 1):
        state = mix(state[:, :-1] * _U64(3) + first[:, order - 1 :])
        if order in ORDERS:
            found.append((state % _U64(BUCKETS)).astype(np.int64))
    return found


def counts(sequences: Sequences, rows: np.ndarray) -> np.ndarray:
    """(orders, BUCKETS) occurrences in the sequences ``rows``."""
    each = hashed(sequences.tokens(rows).numpy().astype(_U64))
    return np.stack([np.bincount(buckets.ravel(), minlength=BUCKETS) for buckets in each])


def numbers(sequences: Sequences, sides: list[list[np.ndarray]]) -> np.ndarray:
    """(n, 12): of proxy, then pool, log-likelihoods by order; then of both shares of n-grams that were seen."""
    found = np.zeros((len(sequences), 4 * len(ORDERS)))
    for half, rows in enumerate(parts(sequences, 2)):
        each = hashed(sequences.tokens(rows).numpy().astype(_U64))
        others = [side[1 - half] for side in sides]
        columns = [np.log((c[i] + 1) / (c[i].sum() + BUCKETS))[b].mean(1) for c in others for i, b in enumerate(each)]
        found[rows] = np.stack(columns + [(c[i][b] > 0).mean(1) for c in others for i, b in enumerate(each)], 1)
    return found


def importance(pool: np.ndarray, proxy: np.ndarray) -> np.ndarray:
    """(n,) of the pool, as text_features.py fits it to such numbers of pool and proxy."""
    moments = feature_numbers.moments(pool)
    x, wanted = (feature_numbers.design(each, moments) for each in (pool, proxy))
    y = np.arange(len(x) + len(wanted)) >= len(x)
    weight = np.where(y, 1.0, len(wanted) / len(x))
    both = torch.from_numpy(np.concatenate([x, wanted]))
    weights = fit_logistic(both, torch.from_numpy(y.astype(np.float64)), torch.from_numpy(weight)).numpy()
    return np.minimum(x @ weights, np.median(wanted @ weights))


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """ROC-AUC, ties by half."""
    ranks = rankdata(np.concatenate([above, below]))
    return float((ranks[: len(above)].sum() - len(above) * (len(above) + 1) / 2) / (len(above) * len(below)))


def wanted_of(scores: np.ndarray, is_wanted: np.ndarray, count: int) -> float:
    """Mean number of wanted ones among the ``count`` best of buffers drawn at random."""
    draw, found = np.random.default_rng(0), []
    for _ in range(BUFFERS):
        buffer = draw.choice(len(scores), BUFFER, replace=False)
        order = np.lexsort((draw.random(BUFFER), -scores[buffer]))
        found.append(is_wanted[buffer[order[:count]]].sum())
    return float(np.mean(found))


def main() -> None:
    """Fit, and print a line for each."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="of the model")
    made.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="text, as pools.py takes it")
    made.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="the corpus is kept here")
    args, console = made.parse_args(), Console(width=200)
    folder = args.work / "real_hard"
    rule = SplitRule(0.2, 0.12, (WANTED,))
    prepare_texts(folder, lambda: real_hard(args.data), rule, tokenizer=args.tokenizer, console=console)
    corpus = Corpus.open(folder)
    pool, proxy = Sequences(corpus, "pool", LENGTH), Sequences(corpus, "proxy", LENGTH, [WANTED])
    place = ensure_text_features(pool, proxy, str(args.work / "features"), console, judges=True)
    known = SequenceTextFeatures(pool, place)
    sides = [[counts(each, rows) for rows in parts(each, 2)] for each in (proxy, pool)]
    more = [numbers(each, sides) for each in (pool, proxy)]
    domains = pool.domain_of(np.arange(len(pool)))
    wanted = domains == pool.domains.index(WANTED)
    for name, columns in MORE.items():
        of_both = zip((known._scalars, known._proxy[:, :-1]), more, strict=True)
        scores = importance(*(np.concatenate([two, added[:, columns]], 1) for two, added in of_both))
        aucs = {
            domain: round(auc(scores[wanted], scores[domains == number]), 3)
            for number, domain in enumerate(pool.domains)
            if domain != WANTED
        }
        among = {count: round(wanted_of(scores, wanted, count), 2) for count in PICKS}
        console.print(f"{name}: {aucs}, wanted among the best {among} of {BUFFER}", highlight=False)


if __name__ == "__main__":
    main()
