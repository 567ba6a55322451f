"""Says what the headline losses of runs are taken on, and brings runs of different targets to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megaopus.data.target import ALL_DOMAINS, Target, target_of_domains
from megaopus.report.arms import Arm
from megaopus.report.compare import Curve, Run

_INSTEAD = "losses on this page are means over all domains"


@dataclass(frozen=True, slots=True)
class Headline:
    """Holds runs whose losses are all of one target."""

    target: Target
    runs: dict[str, Run]
    warning: str | None = None
    """Why ``target`` is not the runs' own."""

    @property
    def loss(self) -> str:
        """Name the losses."""
        return "target loss" if self.target.named else "loss"

    def sentence(self, arms: Sequence[Arm], curves: Mapping[str, Curve]) -> str:
        """Tell the final losses, arm by arm, and what they are taken on; ``curves``: by run."""
        finals: dict[str, tuple[float, float]] = {}
        for arm in arms:
            own = [curves[run] for run in arm.runs.values() if run in curves]
            if own:
                name = arm.first if len(own) == 1 else f"{arm.name} ({len(own)} seeds)"
                finals[name] = fmean(each.losses[-1] for each in own), fmean(each.mean_loss for each in own)
        losses, means = (", ".join(f"{name} {pair[at]:.4f}" for name, pair in finals.items()) for at in (0, 1))
        parts = [f"Final {self.loss}: {losses}"] if finals else []
        parts += [f"mean over all domains: {means}"] if finals and self.target.named else []
        return "; ".join([*parts, f"target: {self.target.told}"]) + "."


def target_of(run: Run) -> Target:
    """Return the target that a run folder names; of one written before it did, what its settings say."""
    told = run.environment.get("target")
    if isinstance(told, dict):
        return Target(told=str(told["told"]), key=str(told["key"]), named=bool(told["named"]))
    return target_of_domains((run.config.get("data") or {}).get("target_domains") or [])


def headline_of(runs: Mapping[str, Run]) -> Headline:
    """Find the target of ``runs``; where they have no common one, their losses become the mean over all domains."""
    targets = {name: target_of(run) for name, run in runs.items()}
    first = next(iter(targets.values()))
    apart = {name: target for name, target in targets.items() if target.key != first.key}
    mixed = [name for name, run in runs.items() if targets[name].key.startswith("held out") and not _throughout(run)]
    if not apart and not mixed:
        return Headline(first, dict(runs))
    if apart:
        name, other = next(iter(apart.items()))
        why = f"{next(iter(targets))}: {first.told}; {name}: {other.told}"
        why = f"The runs have different targets ({why})"
    else:
        why = f"The target of {mixed[0]} was changed on the way"
    told = Target(told=f"none in common, {ALL_DOMAINS}", key="none", named=False)
    return Headline(told, {name: _on_all_domains(run) for name, run in runs.items()}, f"{why}: {_INSTEAD}.")


def _throughout(run: Run) -> bool:
    """Say whether every validation has the parts of the last."""
    return len({tuple(record.target) for record in run.validations}) <= 1


def _on_all_domains(run: Run) -> Run:
    records = [
        record if record.mean_loss is None else replace(record, loss=record.mean_loss) for record in run.validations
    ]
    return replace(run, validations=records)
