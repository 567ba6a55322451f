"""Works out when a scorer pays: what it costs beside training, online and ahead of time, by FLOPs alone."""

from __future__ import annotations

from dataclasses import dataclass

from megaopus.config.run_config import RunConfig
from megaopus.data.feature_work import JUDGES
from megaopus.data.run_data import RunDataSummary
from megaopus.models.flops import count_active_parameters
from megaopus.selection.config import SelectionConfig
from megaopus.selection.estimators.registry import scoring_flops
from megaopus.selection.methods.registry import METHODS, UNIFORM
from megaopus.selection.registry import Flops

FORWARDS, PROXY_SEQUENCES = 2, 64
"""Of the verb ``score --method utility``, as it is without options."""
ASSUMPTIONS = (
    "FLOPs alone, of which a forward pass takes a third of what training on a token takes; those of another model go by"
    " its parameters; a column is of every document of the corpus, whole, and serves this run alone (u = 1; two runs:"
    " half). time_ratio = tokens_ratio (1 + omega), both over a run whose choice costs nothing (uniform, n-grams)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerCost:
    """Holds what omega is made of: omega = r l (c/3) s / u + upkeep, in units of training."""

    ratio: float
    """r: sequences scored for each that is trained on."""
    length: float = 1.0
    """l: scored share of a sequence."""
    forwards: float
    """c: passes over a scored token, in forwards; 3 are training's."""
    size: float = 1.0
    """s: FLOPs of the scorer's token over those of the model's."""
    uses: float = 1.0
    """u: times that a score is used."""
    upkeep: float = 0.0
    """What keeps the scorer going (proxy gradients), over training."""
    share: float = 1.0
    """Of the run's steps, those that this is about."""

    @property
    def omega(self) -> float:
        """Time that scoring adds to training, over training's."""
        return self.ratio * self.length * (self.forwards / 3) * self.size / self.uses + self.upkeep

    @property
    def of_run(self) -> float:
        """The same over the whole run."""
        return self.share * self.omega

    def told(self) -> str:
        """Say what it comes to, what of, and which share of the tokens must do for the run to win time."""
        made_of = f"r {self.ratio:.3g} x l {self.length:.3g} x c/3 {self.forwards / 3:.3g} x s {self.size:.3g}"
        made_of += f" / u {self.uses:.3g} + upkeep {self.upkeep:.3g}"
        steps = "" if self.share == 1 else f", in {self.share:.0%} of the steps"
        pays = f"pays if it needs less than {1 / (1 + self.of_run):.4g} of the tokens"
        return f"omega {self.omega:.3g} = {made_of}{steps}; time_ratio = tokens_ratio x {1 + self.of_run:.4g}: {pays}"


def online(config: RunConfig) -> ScorerCost:
    """Work out what the run's own selection costs, with the model that it trains as the scorer."""
    selection, train = config.selection, config.train
    if selection.method == UNIFORM:
        return ScorerCost(ratio=0.0, forwards=0.0)
    predicts = selection.prescreen.mode == "predict"
    judged = selection.proxy_batch_size / JUDGES if selection.utilities == "odds" else 0
    proxy = (1 + selection.contrast) * selection.proxy_batch_size - judged if selection.needs_proxy else 0
    return ScorerCost(
        ratio=(config.num_scored() + judged) / train.global_batch_size,
        length=config.scored_length() / config.data.seq_len,
        forwards=3 * scoring_cost(selection).ratio,
        uses=selection.score_every * (selection.prescreen.every if predicts else 1),
        upkeep=proxy / selection.proxy_period / train.global_batch_size if proxy else 0,
        share=selecting_share(config),
    )


def ahead_of_time(config: RunConfig, data: RunDataSummary, parameters: float | None = None) -> ScorerCost:
    """Work out what a column of utilities costs this run, by a model of ``parameters``; None: as many as its own."""
    train = config.train
    own = count_active_parameters(config.model, config.model.derived_vocab_size(data.vocab_size), config.data.seq_len)
    trained = train.steps * train.global_batch_size
    size = 1.0 if parameters is None else parameters / own
    return ScorerCost(
        ratio=data.tokens / (trained * config.data.seq_len),
        forwards=FORWARDS,
        size=size,
        upkeep=size * PROXY_SEQUENCES / trained,
    )


def pays(config: RunConfig, data: RunDataSummary, parameters: float | None = None) -> dict[str, str]:
    """Name -> omega of scoring online and ahead of time, in words; ``parameters``: of another model that may score."""
    method = config.selection.method
    nothing = "omega 0: nothing is scored"
    rows = {f"online ({method})": nothing if method == UNIFORM else online(config).told()}
    rows["ahead of time, by such a model"] = ahead_of_time(config, data).told()
    if parameters is not None:
        rows[f"ahead of time, by {parameters:,.0f} parameters"] = ahead_of_time(config, data, parameters).told()
    return rows | {"assumed": ASSUMPTIONS}


def scoring_cost(selection: SelectionConfig) -> Flops:
    """Find FLOPs per scored token over FLOPs per trained token, and why; of the Gram matrix's sketches too."""
    flops = METHODS.find(selection.method).flops
    return flops or scoring_flops(selection.estimator, selection.gram, selection.redundancy > 0)


def selecting_share(config: RunConfig) -> float:
    """Share of the steps that score: all but the warm-up."""
    return max(0, config.train.steps - config.selection.warmup_steps) / config.train.steps
