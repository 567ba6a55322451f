"""Asks, before any selection is claimed for, what a real pre-trained model can see in a pool, and what that is worth.

One process, plain torch, SmolLM2-135M as ``benchmarks/real_model.py make`` writes it; the pool is ``real_hard``
(pools.py). Sequences of 128 tokens, 8 an update, AdamW. Every finding is kept under --work as soon as it is made, and a
row of it goes into --results; what has its rows is not made again, so that the study may take many sittings.

    python benchmarks/real_gate.py --model smollm2 --data FOLDER --work runs/gate --results FILE
    python benchmarks/real_gate.py ... --only visibility worth

visibility: loss of each kind of text, less that of clean text.
worth: fall of the loss on held-out clean text by 12 updates on one kind alone.
signals: ROC-AUC of clean text over each kind, of the one-step utility by the length scored.
ages: the same of the one-step utility, alone and with contrast (along the proxy's gradient less the pool's), and of a
    horizon of 16 steps (loss after steps on the pool less that after steps on the proxy); the latter two fresh, and 16
    and 64 updates after they were made.
proxies: the same, with contrast, by size of the proxy, and of one with junk in it.
rates: loss on held-out clean text after uniform updates at three learning rates.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pools import WANTED, prepare_texts, real_hard, real_rule
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.selection import ModuleBackend, TensorCandidates
from megaopus.selection.estimators.step_size import step_size
from megaopus.selection.pieces import direction

LENGTH, BATCH, RATE = 128, 8, 1e-4
LENGTHS = (32, 64, 128)
EACH = 150
"""Sequences of a kind that are scored."""
FEWER, SHORT = 75, 64
"""Sequences of a kind, and tokens of each, where two signals are compared with one another."""
HELD_OUT = 96
WARM = 12
"""Uniform updates before anything is asked, so that the optimizer has a state."""
STATES = (0, 16, 32, 56, 64)
"""Updates after the warm-up at which the weights are kept."""
AGED = {0: (0,), 16: (16, 0), 64: (64, 0, 32, 56)}
"""Updates at which losses are taken -> those at which the directions were made; a horizon's only after 0, 16 and 64,
one without contrast only at once."""
HORIZON, HORIZON_BATCH = 16, 4
JUNK = 0.2
SEED = 1
Weights = dict[str, Tensor]
Directions = tuple[Weights, Weights]
"""Where to go from the weights: two ways, whose losses are compared."""


@dataclass(frozen=True, slots=True)
class Text:
    """Holds the sequences of the study, each (n, LENGTH + 1) int64."""

    kinds: Mapping[str, Tensor]
    """Those that are scored, by kind."""
    junk: Tensor
    """Others of the kinds that are not wanted."""
    pool: Sequences
    order: np.ndarray
    """Those of the pool that are not scored, in the order in which uniform updates take them."""
    proxy: Tensor
    held_out: Tensor

    def scored(self, each: int = EACH, length: int = LENGTH) -> Tensor:
        """(kinds x each, length + 1) those that are scored, kind after kind."""
        return torch.cat([tokens[:each, : length + 1] for tokens in self.kinds.values()])

    def by_kind(self, values: Tensor) -> dict[str, Tensor]:
        """(each, ...) of every kind: what is known of ``scored``."""
        return dict(zip(self.kinds, values.view(len(self.kinds), -1, *values.shape[1:]), strict=True))


def read(model: Path, data: Path, work: Path) -> Text:
    """Make the corpus if it is not there, and draw what is scored."""
    corpus = work / "real_hard"
    prepare_texts(corpus, lambda: real_hard(data), real_rule(), tokenizer=model, console=Console())
    opened = Corpus.open(corpus)

    pool, rng = Sequences(opened, "pool", LENGTH), np.random.default_rng(SEED)
    domains = pool.domain_of(np.arange(len(pool)))
    order = rng.permutation(len(pool))
    names = [WANTED, *(domain for domain in pool.domains if domain != WANTED)]
    numbers = {kind: order[domains[order] == pool.domains.index(kind)] for kind in names}
    scored = {kind: each[:EACH] for kind, each in numbers.items()}
    junk = np.concatenate([each[EACH : EACH + 5] for kind, each in numbers.items() if kind != WANTED])
    free = order[~np.isin(order, np.concatenate([junk, *scored.values()]))]

    def wanted(split: str) -> Tensor:
        found = Sequences(opened, split, LENGTH, [WANTED])
        return found.tokens(rng.permutation(len(found)))

    proxy, held_out = wanted("proxy"), wanted("validation")[:HELD_OUT]
    kinds = {kind: pool.tokens(each) for kind, each in scored.items()}
    return Text(kinds, pool.tokens(junk), pool, free, proxy, held_out)


# -- the model ---------------------------------------------------------------------------------------------------------


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """(n, T - 1) loss of each token but the first."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


@torch.no_grad()
def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """(n, T - 1) float64 loss of each token but the first, eight sequences at a time."""
    return torch.cat([token_losses(model, part).double() for part in tokens.split(BATCH)])


class Run:
    """Trains the model by AdamW, and puts it back where it was."""

    def __init__(self, folder: Path, rate: float = RATE):
        from transformers import AutoModelForCausalLM

        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)

    def update(self, tokens: Tensor) -> float:
        """Make one update by the mean loss of a batch, whose gradient is clipped to norm 1."""
        self.optimizer.zero_grad()
        total = 0.0
        for part in tokens.split(4):
            loss = token_losses(self.model, part).mean() * (len(part) / len(tokens))
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total

    def weights(self) -> Weights:
        """Copy the weights."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set the weights."""
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Weights and the optimizer's state are afterwards what they were before."""
        weights = self.weights()
        state = {p: {key: value.clone() for key, value in kept.items()} for p, kept in self.optimizer.state.items()}
        try:
            yield
        finally:
            self.put(weights)
            self.optimizer.state.clear()
            self.optimizer.state.update(state)

    def backend(self) -> ModuleBackend:
        """The model as the library's estimators see it."""
        return ModuleBackend(
            self.model, self.optimizer, lambda model, tokens: token_losses(model, tokens).mean(1), micro_batch_size=4
        )

    def save(self, path: Path) -> None:
        """Keep weights and state in a file that appears when it is whole."""
        partial = path.with_suffix(".partial")
        torch.save({"model": self.weights(), "optimizer": self.optimizer.state_dict()}, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from ``save``."""
        state = torch.load(path, weights_only=True)
        self.put(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


# -- the study ---------------------------------------------------------------------------------------------------------


class Gate:
    """Makes each finding once, keeps it, and says it in a row."""

    def __init__(self, model: Path, text: Text, work: Path, results: Path):
        self.folder, self.text, self.work, self.results = model, text, work, results
        self.console = Console()
        self._run: Run | None = None
        self._age: int | None = None

    # what is kept

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Give what ``make`` made, now or in an earlier sitting."""
        path = self.work / f"{name}.pt"
        if not path.exists():
            begun = time.perf_counter()
            found = make()
            partial = path.with_suffix(".partial")
            torch.save(found, partial)
            partial.replace(path)
            self.console.print(f"{name}: {time.perf_counter() - begun:.0f} s")
        return torch.load(path, weights_only=True)

    def row(self, what: str, **facts: Any) -> None:
        """Write a row."""
        line = json.dumps({"stage": 0, "pool": "real_hard", "what": what, **facts})
        with self.results.open("a") as file:
            file.write(line + "\n")
        self.console.print(line)

    def said(self, what: str, **facts: Any) -> bool:
        """Return whether a row says this."""
        rows = map(json.loads, self.results.read_text().splitlines() if self.results.exists() else [])
        return any({"what": what, **facts}.items() <= row.items() for row in rows)

    # the run whose ages are asked about

    def at(self, age: int) -> Run:
        """Give the run ``WARM`` + ``age`` uniform updates from the pre-trained weights; it is to be left as it is."""
        if self._run is None:
            self._run = Run(self.folder)
        if self._age != age:
            path = self.work / f"state_{age}.pt"
            if not path.exists():
                earlier = max((each for each in STATES if each < age), default=None)
                if earlier is not None:
                    self.at(earlier)
                begin = 0 if earlier is None else WARM + earlier
                for step in range(begin, WARM + age):
                    self._run.update(self.uniform(step))
                self._run.save(path)
            self._run.load(path)
            self._age = age
        return self._run

    def uniform(self, step: int) -> Tensor:
        """(BATCH, LENGTH + 1) drawn from the pool; no sequence comes twice in a run."""
        return self.text.pool.tokens(self.text.order[step * BATCH : (step + 1) * BATCH])

    def held_out(self, run: Run) -> float:
        """Mean loss on held-out clean text."""
        return float(losses(run.model, self.text.held_out).mean())

    # what is asked

    def visibility(self) -> None:
        for state in ("pre-trained", "warm"):
            if self.said("auc", signal="loss", state=state):
                continue
            run = Run(self.folder) if state == "pre-trained" else self.at(0)
            found = self.kept(f"losses_{state}", lambda run=run: losses(run.model, self.text.scored()))  # type: ignore[misc]
            own = {kind: each.mean(1) for kind, each in self.text.by_kind(found).items()}
            clean = own[WANTED]
            for kind, each in own.items():
                error = (each.var() / len(each) + clean.var() / len(clean)).sqrt()
                facts = {"loss": _round(each.mean()), "less_clean": _round(each.mean() - clean.mean())}
                self.row("visibility", state=state, kind=kind, **facts, stderr=_round(error))
            self._aucs(found, signal="loss", state=state)

    def rates(self) -> None:
        for rate in (5e-5, 1e-4, 2e-4):
            if self.said("rate", lr=rate):
                continue
            run, found = Run(self.folder, rate), []
            for step in range(70):
                for group in run.optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (70 - step) / 10)
                if step % 20 == 0:
                    found.append(self.held_out(run))
                run.update(self.uniform(step))
            found.append(self.held_out(run))
            self.row("rate", lr=rate, updates=70, losses=[_round(each) for each in found])

    def worth(self) -> None:
        for kind in self.text.kinds:
            if self.said("worth", kind=kind):
                continue
            before = float(self.kept("held_out_warm", lambda: torch.tensor(self.held_out(self.at(0)))))
            run, order = self.at(0), torch.randperm(EACH, generator=torch.Generator().manual_seed(SEED))
            with run.aside():
                for step in range(12):
                    run.update(self.text.kinds[kind][order[step * BATCH : (step + 1) * BATCH]])
                after = self.held_out(run)
            self.row("worth", kind=kind, fall=_round(before - after))

    def signals(self) -> None:
        """Ask what a fresh one-step utility sees, by the length that is scored."""
        if not self.said("auc", signal="one step", each=EACH):
            self._aucs(self._utility("one_step", 0, 0, EACH, LENGTH), signal="one step", updates=0, age=0)

    def ages(self) -> None:
        """Ask how the one-step utility and the horizon compare, fresh and old."""
        for updates, made in ((updates, made) for updates, each in AGED.items() for made in each):
            signals = {"one_step": updates == 0, "contrast": True, "horizon": made in AGED}
            for signal in (name for name, asked in signals.items() if asked):
                facts: dict[str, Any] = {"signal": signal.replace("_", " "), "updates": updates, "age": updates - made}
                if self.said("auc", each=FEWER, **facts):
                    continue
                values = self._utility(signal, made, updates)
                if made < updates:
                    fresh = self._utility(signal, updates, updates).mean(1)
                    facts["spearman_with_fresh"] = _round(spearmanr(values.mean(1), fresh).statistic)
                    # at end points that are kept, losses stay what they were
                    if signal == "horizon":
                        kept = self._utility(signal, made, made).mean(1)
                        facts["spearman_of_end_points"] = _round(spearmanr(kept, fresh).statistic)
                self._aucs(values, **facts)

    def proxies(self) -> None:
        """Ask what the size of the proxy does, and junk in it."""
        junk = self.text.junk[: int(JUNK * 250)]
        asked = {"16": self.text.proxy[:16], "64": self.text.proxy[:64], "250": self.text.proxy[:250]}
        asked["250 with junk"] = torch.cat([self.text.proxy[: 250 - len(junk)], junk])
        for name, proxy in asked.items():
            if not self.said("auc", signal="contrast", proxy=name):
                along = self._losses(f"contrast_by_{name}", 0, lambda proxy=proxy: self._one_step(proxy, True))  # type: ignore[misc]
                self._aucs(along, signal="contrast", proxy=name, updates=0, age=0)

    def _utility(self, signal: str, made: int, updates: int, each: int = FEWER, length: int = SHORT) -> Tensor:
        """(n, length) float64 by directions made after ``made`` updates, of the losses after ``updates``."""

        def directions() -> Directions:
            path = self.work / f"{signal}_{made}.directions"
            if not path.exists():
                self.at(made)
                proxy = self.text.proxy[:64]
                made_here = self._horizon() if signal == "horizon" else self._one_step(proxy, signal == "contrast")
                torch.save(made_here, path)
            return torch.load(path, weights_only=True)

        return self._losses(f"{signal}_of_{made}_at_{updates}_{each}x{length}", updates, directions, each, length)

    def _losses(
        self, name: str, updates: int, along: Callable[[], Directions], each: int = FEWER, length: int = SHORT
    ) -> Tensor:
        """(n, length) float64: loss of each token where the second of ``along`` leads, less where the first does."""

        def make() -> Tensor:
            self.at(updates)
            directions = along()
            run = self.at(updates)  # they may have been made at another age
            weights, found = run.weights(), []
            for way in directions:
                run.put({key: value + way[key] for key, value in weights.items()})
                found.append(losses(run.model, self.text.scored(each, length)))
            run.put(weights)
            return found[1] - found[0]

        return self.kept(name, make)

    def _one_step(self, proxy: Tensor, contrast: bool = False) -> Directions:
        """The optimizer's step on the proxy's gradient, as far as the library goes along it, and its contrary.

        ``contrast``: the gradient is less that of as many sequences of the pool.
        """
        assert self._run is not None
        backend: Any = self._run.backend()
        operator, gradient = backend.operator(), backend.gradient(TensorCandidates(proxy))
        if contrast:
            others = backend.gradient(TensorCandidates(self.text.pool.tokens(self.text.order[-len(proxy) :])))
            gradient = {name: value - others[name] for name, value in gradient.items()}
        step = direction(operator.bounded(gradient), gradient, gradient)
        size = float(step_size(backend, step, gradient))
        ahead = {name: -size * value for name, value in step.items()}
        return ahead, {name: -value for name, value in ahead.items()}

    def _horizon(self) -> Directions:
        """Say where ``HORIZON`` steps on the proxy lead, and where steps on the pool do."""
        run = self._run
        assert run is not None
        before, ways = run.weights(), []
        count = HORIZON * HORIZON_BATCH
        # of the pool such as the run itself comes to last
        for text in (self.text.proxy[-count:], self.text.pool.tokens(self.text.order[-count:])):
            with run.aside():
                for batch in text.split(HORIZON_BATCH):
                    run.update(batch)
                ways.append({name: value - before[name] for name, value in run.weights().items()})
        return ways[0], ways[1]

    def _aucs(self, values: Tensor, **facts: Any) -> None:
        """Write rows of ROC-AUCs of clean text over each other kind, by the first tokens scored."""
        sign = -1 if facts["signal"] == "loss" else 1
        for length in (each for each in LENGTHS if each <= values.shape[1]):
            scores = self.text.by_kind(sign * values[:, :length].mean(1))
            clean = scores.pop(WANTED)
            found = {kind: _round(auc(clean, others)) for kind, others in scores.items()}
            mean = _round(sum(found.values()) / len(found))
            self.row("auc", **facts, each=len(clean), length=length, mean=mean, **found)


def auc(above: Tensor, below: Tensor) -> float:
    """ROC-AUC: the chance that one of ``above`` has more than one of ``below``, ties by half."""
    ranks = rankdata(torch.cat([above, below]).numpy())
    count = len(above)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(below)))


def _round(value: Tensor | float) -> float:
    return round(float(value), 4)


ASKED: Sequence[str] = ("visibility", "worth", "signals", "ages", "proxies", "rates")


def main() -> None:
    """Ask what is to be asked."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of the model")
    made.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="text, as pools.py takes it")
    made.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="what is made is kept here")
    made.add_argument("--results", type=Path, required=True, metavar="FILE", help="rows are added to it")
    made.add_argument("--only", nargs="+", choices=ASKED, default=ASKED, help="in this order (%(default)s)")
    args = made.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    gate = Gate(args.model, read(args.model, args.data, args.work), args.work, args.results)
    for asked in args.only:
        getattr(gate, asked)()


if __name__ == "__main__":
    main()
