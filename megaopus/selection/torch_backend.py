"""Implements ``ScoringBackend`` for any nn.Module trained by torch optimizers, alone or data-parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from megaopus.selection.agreement import alike, disagreement, fingerprint
from megaopus.selection.backend import (
    Batch,
    Candidates,
    GhostConsumer,
    GhostLayer,
    Gradient,
    Piece,
    Shard,
    UpdateOperator,
)
from megaopus.selection.candidates import even_share, map_tensors, tensors_of
from megaopus.selection.estimators.ghost import GhostCapture
from megaopus.selection.old_names import OldBackendNames
from megaopus.selection.operators.build import held_by, operator_of
from megaopus.selection.operators.registry import factory_of, unwrapped
from megaopus.selection.pieces import chunks

Loss = Callable[[nn.Module, Batch], Tensor]  # (model, batch of n sequences) -> (n,) mean token loss of each


class ModuleBackend(OldBackendNames):
    """Shows a module, its optimizer(s) and a per-sequence loss to the estimators.

    ``group``: the data-parallel process group (every rank holds the same weights), or None for one process.
    ``micro_batch_size``: sequences per forward-backward pass of the proxy gradient, on each rank; on a GPU the least,
    unless ``selection.proxy_micro_batch_size`` is set.
    ``example``: a batch on which the loss is tried at once, so that one of another shape is refused here.
    DistributedDataParallel is unwrapped, so that no scoring pass touches its gradient reduction, and so are optimizers
    as accelerate or Lightning prepare them. A compiled module
    stays compiled where only losses are needed, and runs eagerly where activations are captured.
    Raises TypeError for an optimizer whose update rule is not known (``register_operator``), ValueError for one that
    holds none of the model's trained parameters and for a loss that gives no number for each sequence of ``example``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss: Loss,
        *,
        group: dist.ProcessGroup | None = None,
        micro_batch_size: int = 16,
        example: Batch | None = None,
    ):
        self.model, self.module = _unwrap(model)
        given = [optimizer] if hasattr(optimizer, "param_groups") else list(optimizer)
        self.optimizers = [unwrapped(each) for each in given]
        for each in self.optimizers:
            factory_of(each)
        self._refuse_foreign()
        self.loss = loss
        self.group = group
        self.micro_batch_size = micro_batch_size
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self._saw_16_bits: bool | None = None
        if example is not None:
            with self.scoring(), torch.no_grad():
                self._losses(self.model, example)

    def _refuse_foreign(self) -> None:
        """Raise ValueError if the optimizers train nothing of the model, as those made for another copy of it."""
        held = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        if held and not self.parameters():
            raise ValueError(
                f"none of the {len(held)} parameters that the optimizer holds is a trained one of this model: make the"
                " optimizer from this model's parameters(), after it was moved, wrapped or copied"
            )

    @property
    def multiple(self) -> int:
        """Every rank scores as many as the others, in any number."""
        return self.world_size

    @property
    def computes_in_16_bits(self) -> bool:
        """Return whether passes see weights rounded to 16 bits: by autocast, or as they are kept.

        Autocast around the loop is seen at once, that inside the model's forward or the loss in the first pass.
        """
        low = (p.is_floating_point() and torch.finfo(p.dtype).bits < 32 for p in self.module.parameters())
        return torch.is_autocast_enabled(self.device.type) or bool(self._saw_16_bits) or any(low)

    @property
    def unobserved(self) -> bool:
        """Return whether no pass was made that shows what the model computes in."""
        return self._saw_16_bits is None

    def counts(self, name: str) -> float:
        """Every rank has a model of its own."""
        return 1.0

    def parameters(self) -> dict[str, Tensor]:
        """The trainable weights that an optimizer holds, in the module's order; a tied weight appears once."""
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.module.named_parameters() if id(p) in held and p.requires_grad}

    def operator(self, muon_operator: str = "paper") -> UpdateOperator | None:
        """P_t now, or None while one of the optimizers has no state."""
        return operator_of(held_by(self.optimizers, self.parameters()), muon_operator, self.shards())

    def shards(self) -> dict[str, Shard]:
        """No parameter is part of a larger matrix."""
        return {}

    def losses(self, candidates: Candidates, *, length: int | None = None, micro_batch_size: int = 16) -> Tensor:
        """(n,) float64 mean token loss of each candidate over its first ``length`` tokens; no graph, dropout off."""
        found = []
        with self.scoring(), torch.no_grad():
            for chunk in torch.arange(len(candidates)).split(micro_batch_size):
                found.append(self._losses(self.model, candidates.take(chunk).batch(length)).double())
        return torch.cat(found)

    def count_labelled(self, candidates: Candidates, *, length: int | None = None) -> int:
        """Count candidates whose loss is a number other than 0 once all weights and inputs are numbers.

        A loss that still is not, under small equal weights, is the mean of no label.
        """
        values = {f"model.{name}": p.new_full((), 0.01).expand(p.shape) for name, p in self.module.named_parameters()}
        wrapped, count = _LossModule(self.module, self.loss), 0
        with self.scoring(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for chunk in torch.arange(len(candidates)).split(self.micro_batch_size):
                batch = map_tensors(self._place(candidates.take(chunk).batch(length)), _known)
                losses = torch.func.functional_call(wrapped, values, (batch,))
                count += int((losses.isfinite() & (losses != 0)).sum())
        return count

    def gradient(
        self,
        proxy: Candidates,
        length: int | None = None,
        *,
        against: Candidates | None = None,
        micro_batch_size: int | None = None,
    ) -> Gradient:
        """Gradient of the mean loss over the whole proxy batch, the same on every rank; no ``p.grad`` is touched.

        ``against``: less that over another batch. Each rank takes a contiguous share; every sequence of a batch has the
        same weight even where a rank has fewer, or none.
        """
        parameters, size = self.parameters(), micro_batch_size or self.micro_batch_size
        tensors = list(parameters.values())
        total = [torch.zeros_like(tensor) for tensor in tensors]
        for batch, sign in ((proxy, 1), (against, -1)):
            if batch is not None:
                self._add_gradient(batch, length, size, tensors, total, sign)
        self.all_reduce(total)
        return dict(zip(parameters, total, strict=True))

    def _add_gradient(
        self, batch: Candidates, length: int | None, size: int, tensors: list[Tensor], total: list[Tensor], sign: int
    ) -> None:
        """Add this rank's part of ``sign`` times the mean gradient of a batch to ``total``, by ``size`` a pass."""
        rows, weights = even_share(len(batch), self.world_size, self.rank)
        share = rows[weights > 0]
        with self.scoring(), torch.enable_grad():
            for chunk in share.split(size) if len(share) else ():
                losses = self._losses(self.model, batch.take(chunk).batch(length))
                found = torch.autograd.grad(losses.sum() / (sign * len(batch)), tensors, allow_unused=True)
                used = [(t, g) for t, g in zip(total, found, strict=True) if g is not None]
                torch._foreach_add_([t for t, _ in used], [g for _, g in used])

    @property
    def lends_gradient(self) -> bool:
        """Return False: what ``gradient`` gives is the caller's."""
        return False

    def pieces(self) -> Mapping[str, Piece]:
        """Every rank's optimizer updates all of its weights."""
        return {}

    @contextmanager
    def perturbed(self, direction: Gradient) -> Iterator[Callable[[float | Tensor], None]]:
        """``move(scale)`` inside moves weights from a copy, which they are restored from (to the last bit) after.

        Raises ValueError for 16-bit weights: a step of the optimizer's size would be rounded away.
        """
        parameters = self.parameters()
        for name in direction:
            if torch.finfo(parameters[name].dtype).bits < 32:
                raise ValueError(
                    f"directional scoring moves weights by one optimizer step, too little for {parameters[name].dtype}"
                    f" (parameter {name}): keep the weights in fp32 and compute under autocast, or use countsketch"
                )
        tensors = [parameters[name].detach() for name in direction]
        saved, steps = [tensor.clone() for tensor in tensors], list(direction.values())

        @torch.no_grad()
        def restore() -> None:
            if tensors:  # a pipeline stage may have nothing to move
                torch._foreach_copy_(tensors, saved)
            torch.clear_autocast_cache()

        @torch.no_grad()
        def move(scale: float | Tensor) -> None:
            restore()
            for weight, step in chunks([tensors, steps]):
                if isinstance(scale, Tensor):
                    torch._foreach_add_(weight, torch._foreach_mul(step, scale.to(step[0].dtype)))
                else:
                    torch._foreach_add_(weight, step, alpha=scale)

        try:
            yield move
        finally:
            restore()

    def ghost_layers(self) -> list[GhostLayer]:
        """Every nn.Linear, nn.Embedding and Conv1D of transformers whose weight is trained; a tied one once per use."""
        names = {id(p): name for name, p in self.parameters().items()}
        found = []
        for module in self.module.modules():
            kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
            known = isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module)
            if known and id(module.weight) in names:
                found.append((names[id(module.weight)], module, kind))
        kinds: dict[str, set[str]] = {}
        for name, _, kind in found:
            kinds.setdefault(name, set()).add(kind)
        return [
            GhostLayer(name, module, kind, transposed=_is_conv1d(module), tied=len(kinds[name]) > 1)
            for name, module, kind in found
        ]

    def ghost_pass(
        self,
        candidates: Candidates,
        layers: Iterable[GhostLayer],
        consume: GhostConsumer,
        *,
        length: int | None = None,
        micro_batch_size: int = 16,
    ) -> None:
        """Hand a and b of every use of ``layers`` to ``consume``; runs eagerly even if compiled.

        With every weight frozen, the hooks that capture activations also make the first layers' outputs require a
        gradient. Raises RuntimeError naming any layer whose activations could not be captured.
        """
        # compiled code calls no hooks, and every score would be zero
        eager = torch.compiler.set_stance("force_eager")
        with GhostCapture(layers, consume) as capture, self.frozen(), self.scoring(), torch.enable_grad(), eager:
            for start in range(0, len(candidates), micro_batch_size):
                capture.rows = slice(start, min(start + micro_batch_size, len(candidates)))
                rows = torch.arange(capture.rows.start, capture.rows.stop)
                losses = self._losses(self.module, candidates.take(rows).batch(length))
                if losses.requires_grad:
                    losses.sum().backward()
                capture.check()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No weight takes a gradient inside."""
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def exact_gradients(self, batch: Batch) -> Iterator[Gradient]:
        """The gradient of each sequence's mean loss, one at a time, with weights, buffers and inputs in float64."""
        names = self.parameters()
        wrapped = _LossModule(self.module, self.loss)
        values = {f"model.{name}": _double(p.detach()) for name, p in self.module.named_parameters()}
        values |= {f"model.{name}": _double(buffer) for name, buffer in self.module.named_buffers()}
        leaves = [values[f"model.{name}"].requires_grad_() for name in names]
        batch = map_tensors(self._place(batch), _double)
        for index in range(len(next(tensors_of(batch)))):
            sequence = map_tensors(batch, itemgetter(slice(index, index + 1)))
            with self.scoring(), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                with torch.autocast(self.device.type, enabled=False):
                    losses = torch.func.functional_call(wrapped, values, (sequence,))
                found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            yield {
                name: torch.zeros_like(leaf) if gradient is None else gradient
                for name, leaf, gradient in zip(names, leaves, found, strict=True)
            }

    def sum_over_ranks(self, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        """Gather (n,) values of this rank's candidates to (N,) of all, and sum ``tally`` (k,); one message.

        Each rank fills its own place in a vector of zeros and the vectors are added: exact, and alike on every rank.
        """
        count = len(parts)
        vector = torch.cat([parts.new_zeros(self.world_size * count), tally.to(parts)])
        vector[self.rank * count : (self.rank + 1) * count] = parts
        self._sum_everywhere(vector)
        return vector[: self.world_size * count], vector[self.world_size * count :]

    def _sum_everywhere(self, values: Tensor) -> None:
        """Sum over all ranks of the job, in place."""
        self.all_reduce([values])

    def from_rank_0(self, values: Tensor) -> Tensor:
        """The first rank's values, on every rank; on the CPU."""
        if self.world_size == 1:
            return values
        found = values.to(self.device)
        dist.broadcast(found, group=self.group, group_src=0)
        return found.cpu()

    def check_alike(self, picked_ids: Tensor) -> None:
        """Compare the picks of all ranks by a hash, in one message; they are gathered if it differs."""
        if self.world_size == 1:
            return
        found = fingerprint(picked_ids).to(self.device)
        dist.all_reduce(found, group=self.group)
        if alike(found.tolist(), self.world_size):
            return
        picks: list[Any] = [None] * self.world_size
        dist.all_gather_object(picks, picked_ids.tolist(), group=self.group)
        raise RuntimeError(disagreement(picks))

    def sum_over_model(self, values: dict[str, Tensor], axis: str) -> dict[str, Tensor]:
        """Give ``values`` back: no matrix is split, and a candidate's gradient is whole on the rank that scores it."""
        return values

    def gather_candidates(self, values: Tensor) -> Tensor:
        """Concatenate equally shaped tensors along axis 0 in rank order."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts)

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the ranks, in place; one message per dtype."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            members = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in members])
            dist.all_reduce(flat, group=self.group)
            for tensor, part in zip(members, flat.split([t.numel() for t in members]), strict=True):
                tensor.copy_(part.view_as(tensor))

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode without reuse of cast weights; each module's own mode is restored.

        Autocast keeps the low-precision copy of a weight until its outermost region ends: a copy made before the
        weights move, or without a graph, must be seen neither by the next pass nor by training.
        """
        training = [module for module in self.module.modules() if module.training]
        device = self.device.type
        with ExitStack() as stack:
            torch.clear_autocast_cache()
            stack.callback(torch.clear_autocast_cache)
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            for module in training:
                module.training = False
            try:
                yield
            finally:
                for module in training:
                    module.training = True

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        batch = self._place(batch)
        count = len(next(tensors_of(batch)))
        if self._saw_16_bits is None and count:
            self._observe(map_tensors(batch, itemgetter(slice(0, 1))))
        losses = self.loss(model, batch)
        if losses.shape != (count,):
            raise ValueError(
                f"the per-sequence loss returned shape {tuple(losses.shape)} for {count} sequences:"
                f" it must return ({count},), the mean token loss of each"
            )
        return losses

    def _observe(self, sequence: Batch) -> None:
        """Find out by a pass of one sequence whether anything is computed in 16 bits."""
        # Code first met inside a dispatch mode is never compiled after, unless compilation is off there.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Results() as results:
            self.loss(self.module, sequence)
        self._saw_16_bits = results.low

    def _place(self, batch: Batch) -> Batch:
        device = self.device
        return map_tensors(batch, lambda x: x.to(device))

    @property
    def device(self) -> torch.device:
        """Return where the model computes."""
        return next(self.module.parameters()).device


class _Results(TorchDispatchMode):
    """Context manager: ``low`` is whether an operation inside made floating-point numbers of 16 bits."""

    low = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.low |= any(each.dtype in (torch.bfloat16, torch.float16) for each in tensors_of(result))
        return result


class _LossModule(nn.Module):
    """The loss as a module, so that functional_call can replace the model's weights."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether it is transformers' linear layer with a weight (inputs, outputs), which GPT-2 is made of."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


def _unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(what computes losses, the eager module underneath), both without DistributedDataParallel."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    eager = getattr(model, "_orig_mod", model)
    if isinstance(eager, DistributedDataParallel):
        return eager.module, eager.module
    return model, eager


def _known(tensor: Tensor) -> Tensor:
    """Put numbers where there are none."""
    return tensor.nan_to_num(0.0, 0.0, 0.0) if tensor.is_floating_point() else tensor


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor
