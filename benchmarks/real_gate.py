"""Asks, before any selection is claimed for, what a real pre-trained model can see in a pool, and what that is worth.

One process, plain torch, SmolLM2-135M as ``benchmarks/real_model.py make`` writes it; the pool is ``real_hard``
(pools.py). Sequences of 128 tokens, 8 an update, AdamW. Every finding is kept under --work as soon as it is made, and a
row of it goes into --results; what is there is not made again, so that the study may take many sittings.

    python benchmarks/real_gate.py --model smollm2 --data FOLDER --work runs/gate --results FILE
    python benchmarks/real_gate.py ... --only visibility worth

visibility: loss of each kind of text, less that of clean text.
rates: loss on held-out clean text after uniform updates at three learning rates.
worth: fall of that loss by 12 updates on one kind alone.
utilities: ROC-AUC of clean text over each kind, of the one-step utility by length scored, by size of the proxy and of
    one with junk in it, and of a horizon of 16 steps (loss after steps on the pool less that after steps on the proxy);
    both fresh, and 16 and 64 updates after they were made.
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

from benchmarks.pools import WANTED, prepare_texts, real_hard
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.selection import ModuleBackend, TensorCandidates
from megaopus.selection.estimators.step_size import step_size
from megaopus.selection.pieces import direction

LENGTH, BATCH, RATE = 128, 8, 1e-4
LENGTHS = (32, 64, 128)
EACH = 150
"""Sequences of a kind that are scored."""
HELD_OUT = 96
WARM = 12
"""Uniform updates before anything is asked, so that the optimizer has a state."""
AGES = (16, 64)
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

    @property
    def scored(self) -> Tensor:
        return torch.cat([*self.kinds.values()])

    def of_kind(self, kind: str) -> slice:
        """Where in ``scored`` a kind lies."""
        names = list(self.kinds)
        start = sum(len(self.kinds[name]) for name in names[: names.index(kind)])
        return slice(start, start + len(self.kinds[kind]))


def read(model: Path, data: Path, work: Path) -> Text:
    """Make the corpus if it is not there, and draw what is scored."""
    corpus = work / "real_hard"
    rule = SplitRule(0.2, 0.12, (WANTED,))
    prepare_texts(corpus, lambda: real_hard(data), rule, tokenizer=model, console=Console())
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
    """(n, LENGTH) loss of each token."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


@torch.no_grad()
def losses(model: nn.Module, tokens: Tensor, told: Callable[[int], None] | None = None) -> Tensor:
    """(n, LENGTH) float64, eight at a time."""
    found = []
    for part in tokens.split(BATCH):
        found.append(token_losses(model, part).double())
        if told is not None:
            told(len(part))
    return torch.cat(found)


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
        """Write a row, unless it is there."""
        line = json.dumps({"stage": 0, "pool": "real_hard", "what": what, **facts})
        rows = self.results.read_text().splitlines() if self.results.exists() else []
        if line not in rows:
            with self.results.open("a") as file:
                file.write(line + "\n")
            self.console.print(line)

    # the run whose ages are asked about

    def at(self, age: int) -> Run:
        """Give the run ``WARM`` + ``age`` uniform updates from the pre-trained weights; it is to be left as it is."""
        if self._run is None:
            self._run = Run(self.folder)
        if self._age != age:
            path = self.work / f"state_{age}.pt"
            if not path.exists():
                earlier = max((each for each in (0, *AGES) if each < age), default=None)
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
        run = Run(self.folder)
        for state in ("pre-trained", "warm"):
            run = run if state == "pre-trained" else self.at(0)
            found = self.kept(f"losses_{state}", lambda run=run: losses(run.model, self.text.scored))  # type: ignore[misc]
            clean = found[self.text.of_kind(WANTED)].mean(1)
            for kind in self.text.kinds:
                own = found[self.text.of_kind(kind)].mean(1)
                error = (own.var() / len(own) + clean.var() / len(clean)).sqrt()
                facts = {"loss": _round(own.mean()), "less_clean": _round(own.mean() - clean.mean())}
                self.row("visibility", state=state, kind=kind, **facts, stderr=_round(error))
            self._aucs("loss", -found, age=0, state=state)

    def rates(self) -> None:
        for rate in (5e-5, 1e-4, 2e-4):

            def make(rate: float = rate) -> Tensor:
                run, found = Run(self.folder, rate), []
                for step in range(70):
                    for group in run.optimizer.param_groups:
                        group["lr"] = rate * min(1.0, (70 - step) / 10)
                    if step % 20 == 0:
                        found.append(self.held_out(run))
                    run.update(self.uniform(step))
                return torch.tensor([*found, self.held_out(run)])

            found = self.kept(f"rate_{rate:g}", make)
            self.row("rate", lr=rate, updates=70, losses=[_round(each) for each in found])

    def worth(self) -> None:
        before = float(self.kept("held_out_warm", lambda: torch.tensor(self.held_out(self.at(0)))))
        for kind in self.text.kinds:

            def make(kind: str = kind) -> Tensor:
                run, order = self.at(0), torch.randperm(EACH, generator=torch.Generator().manual_seed(SEED))
                with run.aside():
                    for step in range(12):
                        run.update(self.text.kinds[kind][order[step * BATCH : (step + 1) * BATCH]])
                    return torch.tensor(self.held_out(run))

            self.row("worth", kind=kind, fall=_round(before - float(self.kept(f"worth_{kind}", make))))

    def utilities(self) -> None:
        proxies = {
            "16": self.text.proxy[:16],
            "64": self.text.proxy[:64],
            "250": self.text.proxy[:250],
            "250 with junk": self._with_junk(250),
        }
        for age in (0, *AGES):
            for name, proxy in proxies.items() if age == 0 else [("64", proxies["64"])]:
                fresh = self._utility(f"one_step_{name}_at_{age}", lambda p=proxy: self._one_step(p), age)  # type: ignore[misc]
                self._aucs("one step", fresh, age=0, proxy=name, updates=age)
            ends = self._utility(f"horizon_at_{age}", self._horizon, age)
            self._aucs("horizon", ends, age=0, updates=age)
            for made in [each for each in (0, *AGES) if each < age]:
                self._stale("one step", "one_step_64", made, age)
                self._stale("horizon", "horizon", made, age)
                ends = self.kept(f"horizon_at_{made}", _absent)  # at end points that are kept losses stay as they are
                self._aged("horizon, end points kept", ends, "horizon", made, age)

    def _stale(self, signal: str, name: str, made: int, age: int) -> None:
        path = self.work / f"{name}_{made}.directions"
        stale = self._utility(f"{name}_of_{made}_at_{age}", lambda: torch.load(path, weights_only=True), age)
        self._aged(signal, stale, name, made, age)

    def _aged(self, signal: str, stale: Tensor, name: str, made: int, age: int) -> None:
        fresh = self.kept(f"{name}_at_{age}", _absent)
        agree = spearmanr(stale.mean(1), fresh.mean(1)).statistic
        self._aucs(signal, stale, age=age - made, updates=age, spearman_with_fresh=_round(agree))

    def _with_junk(self, count: int) -> Tensor:
        """A proxy of which a share is text of the pool that is not wanted."""
        chosen = self.text.junk[: int(JUNK * count)]
        return torch.cat([self.text.proxy[: count - len(chosen)], chosen])

    def _utility(self, name: str, along: Callable[[], Directions], age: int) -> Tensor:
        """(n, LENGTH) float64: loss of each token where the second leads, less that where the first does."""

        def make() -> Tensor:
            run, directions = self.at(age), along()
            if "_of_" not in name:  # fresh ones are kept for later ages
                torch.save(directions, self.work / f"{name.replace('_at_', '_')}.directions")
            weights, found = run.weights(), []
            for way in directions:
                run.put({key: value + way[key] for key, value in weights.items()})
                found.append(losses(run.model, self.text.scored))
            run.put(weights)
            return found[1] - found[0]

        return self.kept(name, make)

    def _one_step(self, proxy: Tensor) -> Directions:
        """The optimizer's step on the proxy's gradient, as far as the library goes along it, and its contrary."""
        assert self._run is not None
        backend: Any = self._run.backend()
        operator, gradient = backend.operator(), backend.gradient(TensorCandidates(proxy))
        step = direction(operator.bounded(gradient), gradient, gradient)
        size = float(step_size(backend, step, gradient))
        ahead = {name: -size * value for name, value in step.items()}
        return ahead, {name: -value for name, value in ahead.items()}

    def _horizon(self) -> Directions:
        """Where ``HORIZON`` steps on the proxy lead, and where steps on the pool do."""
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

    def _aucs(self, signal: str, values: Tensor, **facts: Any) -> None:
        """Write rows of ROC-AUCs of clean text over each other kind, by the first tokens scored."""
        for length in LENGTHS:
            scores = values[:, :length].mean(1)
            clean = scores[self.text.of_kind(WANTED)]
            found = {
                kind: _round(auc(clean, scores[self.text.of_kind(kind)])) for kind in self.text.kinds if kind != WANTED
            }
            mean = _round(sum(found.values()) / len(found))
            self.row("auc", signal=signal, length=length, **facts, mean=mean, **found)


def _absent() -> Tensor:
    raise RuntimeError("what was asked for is made before")


def auc(above: Tensor, below: Tensor) -> float:
    """ROC-AUC: the chance that one of ``above`` has more than one of ``below``, ties by half."""
    ranks = rankdata(torch.cat([above, below]).numpy())
    count = len(above)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(below)))


def _round(value: Tensor | float) -> float:
    return round(float(value), 4)


ASKED: Sequence[str] = ("visibility", "worth", "utilities", "rates")


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
