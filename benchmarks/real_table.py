"""Says what the rows of the study on a real model show (real_study.py): tables, and the same numbers as JSON.

Final losses are paired by seed. Against importance: Student's t-test of the pairs; for ``opus`` at 5 and at 8 seeds
alone, each at p < .006; Holm's correction over the other arms. way: share of the way from importance to the oracle, a
ratio of means, with an interval of 95 % by a bootstrap over seeds. documents: in how many seeds an interval of 95 %
of the gain over importance, by a bootstrap over the documents that are validated on, is above zero.
tokens: share of uniform's update tokens at which an arm is at uniform's final loss; since the arm's rate has not
fallen there and uniform's has, it is more than it would take. at one rate: the same before either's has fallen. time:
tokens times the arm's mean seconds of an update over uniform's. changed: share of the picks that are others than by
importance alone; in, out: share of wanted text among those that came in and those that had to go; clean: among all.
by chance: share of the updates whose picks were uniform, as after an alarm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.real_rows import ratios
from benchmarks.study import Results, spread
from megaopus.report.compare import paired_t_test

Row = dict[str, Any]
Arms = Mapping[str, Mapping[int, Row]]
"""Arm -> seed -> row, of one pool and length."""
LOOKS, LEVEL = (5, 8), 0.006
"""Seeds after which ``opus`` is judged, and by what p-value."""
RESAMPLES = 10_000
BASE, BEST, CLAIM = "importance", "oracle", "opus"


def show(results: Results, console: Console, out: Path | None) -> None:
    """Print all tables; ``out``: write them too. Raises SystemExit where there is nothing, or rows of two models."""
    rows = latest(results)
    if not rows:
        raise SystemExit(f"{results.path}: no rows to show")
    if len(models := sorted({row["model"] for row in rows})) > 1:
        raise SystemExit(f"{results.path}: rows of {' and '.join(models)}, which are not compared")
    found = tables(rows)
    for table in found:
        _print(table, console)
    for curve in (curves := decayed(rows)):
        told = ", ".join(f"{arm} {spread(each['mean'], None, 2)}" for arm, each in curve["arms"].items())
        title = f"{curve['pool']}: share of {curve['updates']} updates after which an arm, its rate fallen, is where"
        console.print(f"{title} uniform ends: {told}", highlight=False)
    if columns := [row for row in results.rows.values() if row.get("what") == "column"]:
        for row in columns:
            console.print(f"column of a frozen model, {row['pool']}: made in {row['seconds'] / 60:.0f} minutes")
    if out:
        from benchmarks.common import commit, write_results

        out.parent.mkdir(parents=True, exist_ok=True)
        about = {"rows": len(rows), "results": str(results.path), "commit": commit()}
        write_results(out, {"tables": found, "curves": curves}, about)
        console.print(f"tables: {out}", highlight=False)


def latest(results: Results) -> list[Row]:
    """Rows of runs; of several of one run, under other settings, the last."""
    found = {}
    for row in results.rows.values():
        if "final_loss" in row:
            found[row["pool"], row["branch"], row["updates"], row["arm"], row["seed"]] = row
    return list(found.values())


def tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a table for each pool and length: {pool, branch, updates, arms: [...]}."""
    groups: dict[tuple[str, bool, int], dict[str, dict[int, Row]]] = {}
    for row in rows:
        key = row["pool"], row["branch"], row["updates"]
        groups.setdefault(key, {}).setdefault(row["arm"], {})[row["seed"]] = row
    return [
        {"pool": pool, "branch": branch, "updates": updates, "arms": arms_of(found), "targets": targets(found)}
        for (pool, branch, updates), found in sorted(groups.items())
    ]


def arms_of(arms: Arms) -> list[dict[str, Any]]:
    """Say of each arm what is to be known, in the order of their final losses."""
    found = [_arm(name, arms) for name in arms]
    others = [each for each in found if each["arm"] not in (BASE, CLAIM) and each["p"] is not None]
    for each, p in zip(others, holm([each["p"] for each in others]), strict=True):
        each["p_holm"] = p
    return sorted(found, key=lambda each: -each["final_loss"])


def _arm(name: str, arms: Arms) -> dict[str, Any]:
    own, base, uniform = arms[name], arms.get(BASE, {}), arms.get("uniform", {})
    seeds = sorted(own)
    losses = [own[seed]["final_loss"] for seed in seeds]
    pairs = [seed for seed in seeds if seed in base] if name != BASE else []
    gains = [base[seed]["final_loss"] - own[seed]["final_loss"] for seed in pairs]
    p = None
    if len(pairs) > 1:
        p = paired_t_test([base[s]["final_loss"] for s in pairs], [own[s]["final_loss"] for s in pairs])
    by_documents = [document_interval(base[seed], own[seed]) for seed in pairs]
    return {
        "arm": name,
        "seeds": seeds,
        "final_loss": statistics.fmean(losses),
        "final_loss_std": _std(losses),
        "gain": statistics.fmean(gains) if gains else None,
        "gain_std": _std(gains),
        "lower_in": sum(gain > 0 for gain in gains) if gains else None,
        "p": p,
        "p_holm": None,
        "decided": p < LEVEL if p is not None and name == CLAIM and len(pairs) in LOOKS else None,
        "way": way(arms, name),
        "document_intervals": by_documents,
        **_against_uniform(own, uniform),
        "update_s": statistics.fmean(row["update_s"] for row in own.values()),
        **_picks(list(own.values())),
        **_judged(own, base if name != BASE else {}),
    }


def targets(arms: Arms) -> list[dict[str, Any]]:
    """Say which targets ``opus`` meets: {target, value, met}, None where it is not known yet.

    None are said of a pool on which the oracle has not run.
    """
    if not {CLAIM, BASE, BEST} <= arms.keys():
        return []
    found, gain = _arm(CLAIM, arms), _less(arms, BASE, CLAIM)
    placebo, share = _less(arms, BASE, "placebo"), found["way"] and found["way"]["share"]
    others = [each for each in (_less(arms, name, CLAIM) for name in ("frozen", "frozen_sum")) if each is not None]
    pairs = len(found["seeds"]) if found["lower_in"] is None else sum(seed in arms[BASE] for seed in found["seeds"])
    clean = None if None in (found["clean_in"], found["clean_out"]) else found["clean_in"] - found["clean_out"]
    chance = None if placebo is None or not gain else placebo / gain
    said: list[tuple[str, Any, Callable[[Any], bool]]] = [
        ("seeds in which its final loss is below importance's: all", found["lower_in"], lambda value: value == pairs),
        (f"p of that: below {LEVEL} at {' or '.join(map(str, LOOKS))} seeds", found["p"], lambda _: found["decided"]),
        ("share of the way from importance to the oracle: at least .7", share, lambda value: value >= 0.7),
        ("nats below the plain sum: at least 0", _less(arms, "sum", CLAIM), lambda value: value >= 0),
        ("nats below the better frozen column: at least 0", min(others, default=None), lambda value: value >= 0),
        ("wanted text among picks that came in, less among those that went: above 0", clean, lambda value: value > 0),
        (
            "gain of the placebo over its own: below a third",
            chance,
            lambda value: gain is not None and gain > 0 and value < 1 / 3,
        ),
        ("share of uniform's tokens: at most .5", found["tokens_ratio"], lambda value: value <= 0.5),
        ("share of uniform's time: below 1", found["time_ratio"], lambda value: value < 1),
    ]
    return [{"target": name, "value": value, "met": None if value is None else met(value)} for name, value, met in said]


def _less(arms: Arms, above: str, below: str) -> float | None:
    """Nats by which ``below`` ends under ``above``, over the seeds that have both; None: none has."""
    seeds = arms.get(above, {}).keys() & arms.get(below, {}).keys()
    return _mean([arms[above][seed]["final_loss"] - arms[below][seed]["final_loss"] for seed in seeds])


def decayed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return for each pool with branches the updates at which each arm is where uniform's last branch ends.

    As a share of that branch's updates, linear between branches; {pool, updates, arms: {arm: {mean, seeds}}}, the mean
    None unless every seed gets there.
    """
    found = []
    for pool in sorted({row["pool"] for row in rows if row["branch"]}):
        ends: dict[str, dict[int, dict[int, float]]] = {}
        for row in (row for row in rows if row["branch"] and row["pool"] == pool):
            ends.setdefault(row["arm"], {}).setdefault(row["seed"], {})[row["updates"]] = row["final_loss"]
        last = max(max(each) for each in ends.get("uniform", {0: {0: 0.0}}).values())
        arms = {}
        for arm, seeds in ends.items():
            goals = {seed: ends.get("uniform", {}).get(seed, {}).get(last) for seed in seeds}
            shares = [_reach(seeds[seed], goal, last) for seed, goal in goals.items() if goal is not None]
            arms[arm] = {"mean": _mean(shares), "seeds": len(shares)}
        found.append({"pool": pool, "updates": last, "arms": arms})
    return found


def _reach(curve: Mapping[int, float], goal: float, last: int) -> float | None:
    """The share of ``last`` updates at which ``curve`` (updates -> loss) first is at ``goal``; None: never.

    Where its first point is there already, that one's.
    """
    before: tuple[int, float] | None = None
    for updates, loss in sorted(curve.items()):
        if loss <= goal:
            if before is None:
                return updates / last
            return (before[0] + (updates - before[0]) * (before[1] - goal) / (before[1] - loss)) / last
        before = updates, loss
    return None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many they are (Holm 1979)."""
    order, largest = sorted(range(len(p_values)), key=lambda at: p_values[at]), 0.0
    found = [0.0] * len(p_values)
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        found[at] = largest
    return found


def way(arms: Arms, name: str) -> dict[str, Any] | None:
    """{share, low, high, seeds}: of the way from importance to the oracle, over the seeds that have all three.

    Low and high are None for one seed. None: no such seeds, or the oracle is not better.
    """
    if name in (BASE, BEST) or BASE not in arms or BEST not in arms:
        return None
    seeds = sorted(arms[BASE].keys() & arms[BEST].keys() & arms[name].keys())
    losses = {each: np.array([arms[each][seed]["final_loss"] for seed in seeds]) for each in (BASE, BEST, name)}
    gained, possible = losses[BASE] - losses[name], losses[BASE] - losses[BEST]
    if not seeds or possible.mean() <= 0:
        return None
    found: dict[str, Any] = {"share": float(gained.mean() / possible.mean()), "seeds": len(seeds)}
    if len(seeds) == 1:
        return {**found, "low": None, "high": None}
    drawn = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    low, high = _interval(gained[drawn].mean(1) / possible[drawn].mean(1))
    return {**found, "low": low, "high": high}


def document_interval(base: Row, own: Row) -> tuple[float, float]:
    """Bounds of the gain over ``base`` in the mean loss of sequences, by a bootstrap over their documents.

    Raises SystemExit for rows of other sequences.
    """
    if base["sequences"]["documents"] != own["sequences"]["documents"]:
        raise SystemExit(f"{own['key']} and {base['key']}: validated on other sequences, which cannot be paired")
    gains = np.subtract(base["sequences"]["losses"], own["sequences"]["losses"])
    _, places = np.unique(own["sequences"]["documents"], return_inverse=True)
    sums, counts = np.bincount(places, weights=gains), np.bincount(places)
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES // 5, len(sums)))
    return _interval(sums[drawn].sum(1) / counts[drawn].sum(1))


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Bounds between which 95 % of the finite values lie."""
    low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
    return float(low), float(high)


def _against_uniform(own: Mapping[int, Row], uniform: Mapping[int, Row]) -> dict[str, Any]:
    """Means over seeds; None unless every seed got there. Of branches, which have no whole curve, see ``decayed``."""
    seeds = sorted(seed for seed in own.keys() & uniform.keys() if not own[seed]["branch"])
    whole = [ratios(uniform[seed], own[seed]) for seed in seeds]
    flat = [ratios(uniform[seed], own[seed], own[seed]["updates"] - own[seed]["decay"])[0] for seed in seeds]
    return {
        "tokens_ratio": _mean([tokens for tokens, _ in whole]),
        "time_ratio": _mean([seconds for _, seconds in whole]),
        "tokens_ratio_at_one_rate": _mean(flat),
        "reached": sum(tokens is not None for tokens, _ in whole),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _picks(rows: Sequence[Row]) -> dict[str, Any]:
    """Say what was picked, and whether what the model changed was for the better."""
    shares = [row["share"] for row in rows]
    wanted = [kind for kind in rows[0]["wanted"] if kind in shares[0]]  # of a benchmark's text the pool has none

    def clean(way: str) -> float | None:
        counts = [row["swapped"][way] for row in rows]
        total = sum(sum(each.values()) for each in counts)
        return sum(each.get(kind, 0) for each in counts for kind in wanted) / total if total and wanted else None

    return {
        "changed_share": _mean([row["changed_share"] for row in rows]),
        "clean_in": clean("came"),
        "clean_out": clean("went"),
        "clean": statistics.fmean(sum(each[kind] for kind in wanted) for each in shares) if wanted else None,
        "share": {kind: statistics.fmean(each[kind] for each in shares) for kind in shares[0]},
        "uniform_steps": statistics.fmean(row["uniform_steps"] / row["updates"] for row in rows),
    }


def _judged(own: Mapping[int, Row], base: Mapping[int, Row]) -> dict[str, Any]:
    """Of a benchmark: nats of the last word and accuracy, and by how much they differ from importance's, by item.

    The differences are of each item's mean over the seeds that both have; their standard errors are over items.
    """
    if not all("judged" in row for row in own.values()):
        return {}
    found: dict[str, Any] = {"items": next(iter(own.values()))["judged"]["items"]}
    seeds = sorted(own.keys() & base.keys())
    for name in ("nats", "right"):
        found[name] = statistics.fmean(statistics.fmean(row["judged"][name]) for row in own.values())
        if seeds:
            pairs = [np.subtract(own[s]["judged"][name], base[s]["judged"][name], dtype=np.float64) for s in seeds]
            each = np.mean(pairs, axis=0)
            found[f"{name}_less_{BASE}"] = float(each.mean())
            found[f"{name}_stderr"] = float(each.std(ddof=1) / len(each) ** 0.5)
    return found


# -- printing --------------------------------------------------------------------------------------------------------

Cell = Callable[[Mapping[str, Any]], str]


def _percent(name: str) -> Cell:
    return lambda row: "-" if row[name] is None else f"{row[name]:.1%}"


def _way(row: Mapping[str, Any]) -> str:
    if row["way"] is None:
        return "-"
    share, low, high = (row["way"][name] for name in ("share", "low", "high"))
    return f"{share:.0%}" + ("" if low is None else f" [{low:.0%}, {high:.0%}]")


def _p(row: Mapping[str, Any]) -> str:
    if row["arm"] == CLAIM and row["p"] is not None:
        return f"{row['p']:.4f}" + {None: " (no look)", True: " yes", False: " no"}[row["decided"]]
    return spread(row["p_holm"], None, 4) + (" Holm" if row["p_holm"] is not None else "")


def _documents(row: Mapping[str, Any]) -> str:
    found = row["document_intervals"]
    return f"{sum(low > 0 for low, _ in found)} of {len(found)}" if found else "-"


LOSSES: dict[str, Cell] = {
    "seeds": lambda row: str(len(row["seeds"])),
    "final loss": lambda row: spread(row["final_loss"], row["final_loss_std"], 4),
    "gain": lambda row: spread(row["gain"], row["gain_std"], 4),
    "p": _p,
    "documents": _documents,
    "way": _way,
}
COSTS: dict[str, Cell] = {
    "tokens": lambda row: spread(row["tokens_ratio"], None, 2),
    "at one rate": lambda row: spread(row["tokens_ratio_at_one_rate"], None, 2),
    "time": lambda row: spread(row["time_ratio"], None, 2),
    "s": lambda row: f"{row['update_s']:.1f}",
    "changed": _percent("changed_share"),
    "in": _percent("clean_in"),
    "out": _percent("clean_out"),
    "clean": _percent("clean"),
    "by chance": _percent("uniform_steps"),
}
ABOUT = {"against importance": LOSSES, "against uniform, and picks": COSTS}
"""Title of a table -> its columns; - for what is not known, or not reached in every seed."""


def _print(found: Mapping[str, Any], console: Console) -> None:
    title = f"{found['pool']}, {found['updates']} updates" + ", from a trunk" * found["branch"]
    for about, cells in ABOUT.items():
        table = Table(title=f"{title}; {about}", box=SIMPLE, padding=0)
        for name in ("arm", *cells):
            table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
        for row in found["arms"]:
            table.add_row(row["arm"], *(cell(row) for cell in cells.values()))
        console.print(table)
    for each in found["targets"]:
        met = {None: "not known", True: "met", False: "MISSED"}[each["met"]]
        console.print(f"{met}: {each['target']} ({spread(each['value'], None, 4)})", highlight=False)
    for row in found["arms"]:
        if "nats" not in row:
            continue
        line = f"{row['arm']}: {row['nats']:.4f} nats of the last word, {row['right']:.1%} right, {row['items']} items"
        if f"nats_less_{BASE}" in row:
            nats, right = (spread(row[f"{name}_less_{BASE}"], row[f"{name}_stderr"], 4) for name in ("nats", "right"))
            line += f"; less {BASE}'s by item: {nats} nats, {right} right"
        console.print(line, highlight=False)
