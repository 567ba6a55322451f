"""Optimizers wrapped for megatron: clipping across tp and pp, fp32 main weights under bf16, sharded checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import is_expert, is_split, mark_expert
from megaopus.optim.base import CurvatureOptimizer, LayoutOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import spec_of
from megaopus.optim.spec import Groups, Spec


class ParameterState(NamedTuple):
    """Says what an optimizer knows of one local parameter."""

    name: str
    """As in ``module.named_parameters()``."""
    optimizer: Optimizer
    group: dict[str, Any]
    """The settings that the parameter is updated with."""
    state: dict[str, Any]
    """torch's names -> values; tensors are shaped as the local parameter, or of this rank's run of it, (numel,). Empty
    before the first update."""


class WeightPiece(NamedTuple):
    """Holds what a rank's optimizer updates of a local parameter: all of it, or a run of its flattened elements."""

    start: int
    main: Tensor
    """The fp32 weights."""
    model: Tensor
    """Where they lie, rounded, in the model; ``main`` itself in fp32."""


class MixedPrecisionOptimizer:
    """megatron's ChainedOptimizer over one or two torch optimizers, with a learning rate set by the caller.

    ``param_groups`` carry ``peak_lr``; ``step(factor)`` applies peak_lr * factor. ``sharded``: the wrapped model chunks
    over whose gradient buffers AdamW's state is sharded; None keeps it whole on each rank.
    """

    def __init__(
        self,
        config: OptimConfig,
        module: nn.Module,
        mesh: Mesh,
        *,
        bf16: bool,
        sharded: Sequence[Any] | None = None,
        late: bool = False,
    ):
        """``late``: weights that are sharded are gathered while other things are done; see ``settle``."""
        from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig

        self._clip = config.clip_grad
        self._mesh = mesh
        self._module = module
        self._sharded = sharded is not None
        self._bf16 = bf16
        self._updates: int | None = None
        self.curvature_every = config.own_settings()["curvature_every"] if config.spec().curvature else 0
        """Updates from one ``take_curvature`` to the next; 0: it is not asked for."""
        megatron_config = OptimizerConfig(
            optimizer="adam",  # says nothing: the optimizers are made here
            lr=config.lr,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=self._sharded,
        )
        optimizers = torch_optimizers(config, module, mesh)
        if sharded is None:
            wrapped = [_wrap(optimizer, megatron_config, mesh, bf16) for optimizer in optimizers]
        else:
            from megaopus.optim.late_gather import LateGather
            from megaopus.optim.sharded import ShardedAdamW

            gather = LateGather(sharded) if late else None
            wrapped = [
                ShardedAdamW(optimizer, megatron_config, sharded, mesh, _init_state, gather) for optimizer in optimizers
            ]
        self.chained = ChainedOptimizer(wrapped)
        for parameter in module.parameters():  # megatron makes main weights, and leaves its own marks on them alone
            if is_expert(parameter) and not self._sharded and bf16:
                mark_expert(parameter.main_param)  # type: ignore[attr-defined]

    @property
    def torch_optimizers(self) -> list[Optimizer]:
        """The optimizers underneath; their parameters are the fp32 main weights, or this rank's pieces of them."""
        return [wrapped.optimizer for wrapped in self.chained.chained_optimizers]

    @property
    def is_sharded(self) -> bool:
        """Return whether each of the ranks that share parameters updates runs of them."""
        return self._sharded

    def states(self) -> list[ParameterState]:
        """Each local parameter's group and state, in the order of ``module.named_parameters()``.

        References to the optimizers' own tensors; ``step`` is on the CPU. Where AdamW is sharded, ``state`` holds
        ``step`` and this rank's run of ``exp_avg_sq`` only.
        """
        updates = self._count()
        step = {"step": torch.tensor(float(updates))}
        if self._sharded:
            wrapped = self.chained.chained_optimizers[0]
            return [
                ParameterState(
                    name,
                    wrapped.optimizer,
                    wrapped.group_of(p),
                    step | {"exp_avg_sq": wrapped.piece(p, "exp_avg_sq")} if updates else {},
                )
                for name, p in self._module.named_parameters()
            ]
        held = {id(p): (o, group) for o in self.torch_optimizers for group in o.param_groups for p in group["params"]}
        found = []
        for name, parameter in self._module.named_parameters():
            main = getattr(parameter, "main_param", parameter)
            optimizer, group = held[id(main)]
            state = dict(optimizer.state.get(main, {}))
            found.append(ParameterState(name, optimizer, group, state | step if "step" in state else state))
        return found

    def _count(self) -> int:
        """Updates that the state has seen: read off it once, and counted on the host from then on."""
        if self._updates is None:
            states = [dict(next(iter(optimizer.state.values()), {})) for optimizer in self.torch_optimizers]
            found = max((float(state["step"]) for state in states if "step" in state), default=0.0)
            self._updates = self.chained.chained_optimizers[0].updates if self._sharded else int(found)
        return self._updates

    def pieces(self) -> dict[str, WeightPiece]:
        """Give what this rank's optimizer updates of each local parameter: all of it where nothing is shared."""
        self.settle()
        found = {}
        for name, parameter in self._module.named_parameters():
            if not self._sharded:
                main = getattr(parameter, "main_param", parameter)
                found[name] = WeightPiece(0, main.detach(), parameter.detach())
                continue
            wrapped = self.chained.chained_optimizers[0]
            run = wrapped.own_piece(parameter) or slice(0, 0)
            found[name] = WeightPiece(run.start, wrapped.piece(parameter, "param"), parameter.detach().view(-1)[run])
        return found

    def gather_weights(self) -> None:
        """Bring the model's weights up to date with what each rank has put where ``pieces`` say. Collective."""
        if self._sharded:
            self.chained.chained_optimizers[0].gather_weights()

    def settle(self) -> None:
        """Wait until all weights of the last update are there; forward passes wait by themselves."""
        if self._sharded:
            self.chained.chained_optimizers[0].settle()

    def gather_into_gradients(self, read: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """As ``ShardedAdamW.gather_into_gradients``, by local name."""
        parameters = dict(self._module.named_parameters())
        names = {parameters[name]: name for name in read}
        found = self.chained.chained_optimizers[0].gather_into_gradients({p: read[name] for p, name in names.items()})
        return {names[parameter]: value for parameter, value in found.items()}

    def main_weights(self) -> dict[str, Tensor]:
        """The fp32 weights by local name: the parameters themselves, or under bf16 their main copies.

        Copies, gathered over dp and cp in a collective call, where AdamW is sharded under bf16.
        """
        self.settle()
        if not self._bf16:
            return dict(self._module.named_parameters())
        if self._sharded:
            whole = self.chained.chained_optimizers[0].whole("param")
            return {name: whole[p] for name, p in self._module.named_parameters()}
        return {name: p.main_param for name, p in self._module.named_parameters()}  # type: ignore[attr-defined]

    @torch.no_grad()
    def set_main_weights(self, names: Mapping[str, str], start: Callable[[str, nn.Parameter], Tensor]) -> None:
        """Set the fp32 weights under bf16 to what ``start`` has, before it was rounded.

        ``names``: local name -> the parameter's name in the whole model, by which ``start`` is asked.
        """
        for local, parameter in self._module.named_parameters():
            part = start(names[local], parameter)
            if self._sharded:
                self.chained.chained_optimizers[0].set_main_weight(parameter, part)
            else:
                parameter.main_param.copy_(part)  # type: ignore[attr-defined]

    def set_step(self, step: int, factor: float) -> float:
        """As the function ``set_step``."""
        return set_step(self.torch_optimizers, step, factor)

    def take_curvature(self, tokens: int) -> bool:
        """Take the gradients there are, of the mean loss on labels sampled for ``tokens`` tokens, into the curvature.

        False, and nothing is changed, if one of them anywhere is not finite.
        """
        if not math.isfinite(self._mesh.total(self.prepare().view(1))[0]):
            return False
        for optimizer in self.torch_optimizers:
            if isinstance(optimizer, CurvatureOptimizer):
                optimizer.estimate(tokens)
        return True

    @torch.no_grad()
    def prepare(self) -> Tensor:
        """() float64: this rank's part of the square of the whole model's gradient norm, every weight counted once.

        The parts of all ranks add up to it. Makes the gradients ready for ``step``. megatron's own norm takes one call
        per tensor where neither Apex nor Transformer Engine is installed.
        """
        bad = self.chained.prepare_grads()
        of_all, of_experts = self._own_gradients()
        if self._sharded:  # each rank has the gradients of its pieces
            square = self._square(of_all + of_experts)
        else:  # all that share a parameter have the same
            shape = self._mesh.shape
            square = self._square(of_all) / (shape.dp * shape.cp)
            if of_experts:
                square = square + self._square(of_experts) / shape.expert_dp
        return square * math.nan if bad else square

    def _own_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give this rank's gradients, a whole weight's on one of its tensor-parallel ranks; those of experts apart."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for parameter, gradient in self._gradients():
            copied = getattr(parameter, "shared", False)  # a tied matrix on the last stage
            first = dist.get_rank(self._mesh.tensor_group(parameter)) == 0
            if not copied and (is_split(parameter) or first):
                found[is_expert(parameter)].append(gradient)
        return found

    def _gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield what the update takes: (parameter or its main weights, gradient, of this rank's run if sharded)."""
        for wrapped in self.chained.chained_optimizers:
            if self._sharded:
                yield from wrapped.gradients()
            else:
                yield from ((p, p.grad) for p in wrapped.get_parameters() if p.grad is not None)

    def _square(self, gradients: list[Tensor]) -> Tensor:
        """() float64: the sum of their squares."""
        norms = torch._foreach_norm(gradients) if gradients else [torch.zeros((), device=self._mesh.device)]
        return torch.stack(norms).square().sum().double()

    def step(self, norm: float, limit: float = math.inf) -> bool:
        """Update the weights by the gradients of ``prepare``, whose norm is ``norm``; returns whether that was done.

        A norm that is not finite, or above ``limit``, leaves every weight as it is.
        """
        if not math.isfinite(norm) or norm > limit:
            return False
        if 0 < self._clip < norm:
            torch._foreach_mul_([gradient for _, gradient in self._gradients()], self._clip / norm)
        before = self._count()
        self.chained.step_with_ready_grads()
        self._updates = before + 1
        return True

    def own_piece(self, parameter: nn.Parameter) -> slice | None:
        """Say which elements of a parameter's reduced gradient this rank counts, of those that share it; None: none."""
        if self._sharded:
            return self.chained.chained_optimizers[0].own_piece(parameter)
        if is_expert(parameter):
            return slice(None) if self._mesh.expert_dp_rank == 0 else None
        return slice(None) if self._mesh.dp_rank == self._mesh.cp_rank == 0 else None

    def saves(self, parameter: nn.Parameter) -> bool:
        """Return whether this rank has a whole parameter's tensors to be saved: all ranks do where none are shared."""
        return not self._sharded or self.chained.chained_optimizers[0].saves(parameter)

    def loads(self, parameter: nn.Parameter) -> bool:
        """Return whether this rank needs anything of what was saved of a parameter beside its weights."""
        return not self._sharded or self.own_piece(parameter) is not None

    def sharded_like(self, parameter: nn.Parameter, tensor: Any, is_loading: bool) -> Any:
        """Give megatron's sharded ``tensor`` of a parameter as that of others of its shape that this rank has."""
        if not self._sharded:
            return tensor
        return self.chained.chained_optimizers[0].sharded_like(parameter, tensor, is_loading)

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """State for megatron's dist_checkpointing; ``model_state`` is the model's own sharded state.

        Without what ``sharded_whole`` has: megatron saves state of the parameters' shapes.
        """
        kept = []
        for optimizer in self.torch_optimizers:
            if not isinstance(optimizer, LayoutOptimizer) or not optimizer.whole:
                continue
            if is_loading:
                _init_state(optimizer)
            for state in optimizer.state.values():
                kept.append((state, {key: state.pop(key) for key in optimizer.whole if key in state}))
        try:
            return self.chained.sharded_state_dict(model_state, is_loading)
        finally:
            for state, values in kept:
                state.update(values)

    def sharded_whole(self, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Local name -> state that is not of the parameter's shape, and the same on every rank that has the parameter.

        ``names``: local name -> the parameter's name in the whole model.
        """
        from megatron.core.dist_checkpointing import ShardedTensor

        mesh, parameters = self._mesh, dict(self._module.named_parameters())
        found: dict[str, dict[str, Any]] = {}
        for each in () if self._sharded else self.states():
            if not isinstance(each.optimizer, LayoutOptimizer):
                continue
            name = names[each.name]
            copy = int(name != each.name and each.name.endswith("output_layer.weight"))  # a tied one on the last stage
            replica = (copy, mesh.tp_rank, mesh.dp_rank * mesh.shape.cp + mesh.cp_rank)
            if is_expert(parameters[each.name]):
                replica = (copy, dist.get_rank(mesh.expert_tp_group), mesh.expert_dp_rank)
            for key in each.optimizer.whole:
                if key in each.state:
                    path = f"optimizer.state.{key}.{name}"
                    tensor = ShardedTensor.from_rank_offsets(path, each.state[key], replica_id=replica)
                    found.setdefault(each.name, {})[key] = tensor
        return found

    def load_whole(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what ``sharded_whole`` laid out; after ``load_state_dict``."""
        parameters = dict(self._module.named_parameters())
        for each in self.states() if state else ():
            parameter = parameters[each.name]
            each.optimizer.state[getattr(parameter, "main_param", parameter)].update(state.get(each.name, {}))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; learning rates, decays and betas stay those this optimizer was made with."""
        made_with = [[dict(group) for group in optimizer.param_groups] for optimizer in self.torch_optimizers]
        if not self._sharded:
            self._complete(state)
        self.chained.load_state_dict(state)
        for optimizer, groups in zip(self.torch_optimizers, made_with, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: value for key, value in settings.items() if key != "params"})
            for parameter in [parameter for parameter, kept in optimizer.state.items() if not kept]:
                del optimizer.state[parameter]
        self._updates = None

    def _complete(self, state: dict[str, Any]) -> None:
        """Give ``state`` an entry for every parameter, which megatron then gives its count of updates.

        Reading drops the entries that held no state of the parameter's shape.
        """
        for each in [state] if len(self.chained.chained_optimizers) == 1 else state.values():
            inner = each["optimizer"] if self._bf16 else each
            for number in chain.from_iterable(group["params"] for group in inner["param_groups"]):
                inner["state"].setdefault(number, {})


def set_step(optimizers: Sequence[Optimizer], step: int, factor: float) -> float:
    """Prepare for update ``step`` (from 0): each learning rate its peak times ``factor``, momentum as far as it is
    warmed up. Returns the learning rate of the last optimizer, AdamW's where it is beside another.
    """
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * factor
        if steps := group.get("momentum_warmup_steps"):
            start, end = group["momentum_range"]
            group["momentum"] = start + (end - start) * min(1.0, step / steps)
    return optimizers[-1].param_groups[0]["lr"]


def torch_optimizers(
    config: OptimConfig, module: nn.Module, mesh: Mesh, make: Callable[..., Optimizer] | None = None
) -> list[Optimizer]:
    """Make the torch optimizers of this stage: one for all, or one for the blocks' matrices and AdamW for the rest.

    ``make``: what makes the first of them instead of its ``Spec``.
    """
    spec, settings = config.spec(), config.own_settings()
    named = list(module.named_parameters())
    mine = [p for name, p in named if not spec.matrices or _is_block_matrix(name, p)]
    lr, weight_decay = (
        (config.matrix_lr, config.matrix_weight_decay) if spec.matrices else (config.lr, config.weight_decay)
    )
    optimizer = (make or spec.make)(_groups(mine, weight_decay, lr), config, settings, mesh.tp_group)
    if isinstance(optimizer, LayoutOptimizer):
        optimizer.same_group = mesh.dp_cp_group
        optimizer.expert_groups = (mesh.expert_tp_group, mesh.expert_dp_group)
    made = [(optimizer, spec)]
    if spec.matrices:
        ids, adamw = {id(p) for p in mine}, spec_of("adamw")
        rest = _groups([p for _, p in named if id(p) not in ids], config.weight_decay, config.lr)
        made.append((adamw.make(rest, config, {}, mesh.tp_group), adamw))
    _SPECS.update(made)
    return [optimizer for optimizer, _ in made]


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Say whether an optimizer of the blocks' matrices takes a parameter.

    A router is none of them: what all experts' scores have in common changes no softmax, so that its gradient has a
    singular value of nothing but rounding, which an orthogonal update makes as long as the others.
    """
    return "decoder.layers." in name and parameter.dim() == 2 and not name.endswith(".mlp.router.weight")


_SPECS: WeakKeyDictionary[Optimizer, Spec] = WeakKeyDictionary()
"""What each optimizer was made by."""


def _groups(parameters: list[nn.Parameter], weight_decay: float, lr: float) -> Groups:
    """Groups with and without weight decay; the mult keys are what megatron tells groups of a checkpoint apart by."""
    decayed = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    common = {"peak_lr": lr, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "wd_mult": 1.0, **common},
        {"params": plain, "weight_decay": 0.0, "wd_mult": 0.0, **common},
    ]
    return [group for group in groups if group["params"]]


def _wrap(optimizer: Optimizer, config: Any, mesh: Mesh, bf16: bool) -> Any:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    if bf16:
        wrapped = Float16OptimizerWithFloat16Params(optimizer, config, None, _init_state)
    else:
        wrapped = FP32Optimizer(optimizer, config, _init_state)
    wrapped.grad_stats_parallel_group = mesh.model_parallel_group
    wrapped.tp_group = mesh.tp_group
    return wrapped


def state_names(optimizer: Optimizer) -> tuple[str, ...]:
    """Name the optimizer's state of the shape of its parameters; the last is what its update operator needs."""
    if isinstance(optimizer, LayoutOptimizer):
        return optimizer.shaped
    return _SPECS[optimizer].state_under(optimizer.param_groups[0])


def counts_steps(optimizer: Optimizer) -> bool:
    """Say whether the optimizer keeps ``step`` in each parameter's state."""
    return optimizer.counts if isinstance(optimizer, LayoutOptimizer) else _SPECS[optimizer].counts


def _init_state(optimizer: Optimizer, config: Any = None) -> None:
    """Zero state of the shapes a checkpoint restores (called before loading)."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(optimizer, LayoutOptimizer):
            optimizer.state_of(parameter)
            continue
        state = optimizer.state[parameter]
        for name in state_names(optimizer):
            state[name] = torch.zeros_like(parameter)
        if counts_steps(optimizer):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
