"""Says what the settings of a run make of one of its ranks: its weights, and who shares them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from megaopus.config.run_config import RunConfig
from megaopus.models.flops import Weight, layers_of, stage_weights
from megaopus.planning import activations
from megaopus.planning.activations import Share


@dataclass(frozen=True, slots=True)
class Rank:
    """Says what follows from the settings for a rank of one pipeline stage."""

    config: RunConfig
    vocab_size: int
    world_size: int
    precision: str
    stage: int
    device: str

    @property
    def tp(self) -> int:
        return self.config.parallel.tp

    @property
    def dp(self) -> int:
        return self.world_size // self.config.parallel.model_ranks

    @property
    def last(self) -> bool:
        return self.stage == self.config.parallel.pp - 1

    def sharing(self, expert: bool) -> int:
        """Count the ranks that share what only the update reads of a weight: an expert's, or another."""
        parallel = self.config.parallel
        if not self.config.engine.spec().shards_optimizer(parallel):
            return 1
        apart = parallel.ep * parallel.derived_expert_tp() if expert else self.tp
        return self.world_size // (apart * parallel.pp)

    @property
    def shards(self) -> Fraction:
        """Say among how many ranks the optimizer's state and the fp32 main weights are shared: the mean of weights."""
        own = Counter[bool]()
        for weight in self.weights():
            own[weight.expert] += self.own(weight)
        return own.total() / sum((Fraction(count, self.sharing(expert)) for expert, count in own.items()), Fraction())

    def shared_over(self) -> str:
        """Say in words over which ranks they are shared; nothing where they are not."""
        every, experts = self.sharing(False), self.sharing(True)
        said = f", over {every} ranks" if every > 1 else ""
        return f"{said} (experts over {experts})" if self.config.model.num_experts and experts != every else said

    def weights(self) -> list[Weight]:
        """Parameters of the stage before tensor parallelism splits them; of the experts those of one rank."""
        config, parallel = self.config, self.config.parallel
        layout = {"pp": parallel.pp, "stage": self.stage, "vpp": parallel.vpp, "ep": parallel.ep}
        return stage_weights(config.model, self.vocab_size, config.data.seq_len, **layout)

    def layers(self) -> Counter[bool]:
        """Count the stage's layers without experts and with them."""
        parallel, model = self.config.parallel, self.config.model
        return Counter(map(model.has_experts, layers_of(model, parallel.pp, self.stage, parallel.vpp)))

    def splits(self, weight: Weight) -> bool:
        """Say whether tensor-parallel ranks hold parts of a parameter."""
        return weight.sharded and not (weight.expert and self.config.parallel.derived_expert_tp() < self.tp)

    def own(self, weight: Weight) -> int:
        """Numbers of a parameter that this rank holds."""
        return weight.numel // self.tp if self.splits(weight) else weight.numel

    def logits(self, positions: int, *, backward: bool) -> tuple[int, int]:
        """As ``activations.logits``."""
        size = self.vocab_size, self.precision, self.device
        return activations.logits(self.config, *size, positions, backward=backward)

    def numbers(self) -> Share:
        """Parameters that tensor-parallel ranks split, all together, and those that each has."""
        weights = self.weights()
        return Share(*(sum(w.numel for w in weights if self.splits(w) is kind) for kind in (True, False)))
