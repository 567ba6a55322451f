"""Ghost factors: the gradient of a matrix is sum_t b_t a_t^T, with a its inputs and b the gradient of its outputs.

One forward and one backward pass through the activations give a and b of every sequence; hooks hand them out layer by
layer during the backward pass, so only one layer's per-sample gradient exists at a time.

Shape suffixes: N sequences, T positions, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megaopus.selection.backend import GhostConsumer, GhostLayer

_GRADIENT_ELEMENTS = 1 << 25  # largest per-sample gradient held at once, in numbers (128 MB in fp32)


class GhostCapture:
    """Context manager: calls ``consume`` for each use of each layer during backward passes inside it.

    ``rows`` says which candidates the coming forward pass is of; where passes overlap (pipeline stages), ``watch`` says
    it again when the backward pass begins. Only forward passes under grad mode count, so a pass repeated by activation
    recomputation is captured once. Layers may return a tuple whose first element is the activation.
    """

    def __init__(self, layers: Iterable[GhostLayer], consume: GhostConsumer):
        self.rows = slice(0, 0)
        self._layers = list(layers)
        self._consume = consume
        self._called: set[int] = set()
        self._reached: set[int] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> GhostCapture:
        for index, layer in enumerate(self._layers):
            hook = self._forward_hook(index, layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watch(self, output: Tensor) -> None:
        """A forward pass ended in ``output``: when its backward pass begins, ``rows`` are set to those of this pass."""
        rows = self.rows

        def begin(gradient: Tensor) -> None:
            self.rows = rows

        if output.requires_grad:
            output.register_hook(begin)

    def check(self) -> None:
        """Raise RuntimeError naming every layer that a pass since the last check did not go through."""
        never = [layer for index, layer in enumerate(self._layers) if index not in self._called]
        cut = [layer for i, layer in enumerate(self._layers) if i in self._called and i not in self._reached]
        for layers, reason in (
            (never, "was not called through its forward (hooks do not fire inside compiled or fused code)"),
            (cut, "got no gradient: its output does not reach the loss"),
        ):
            if layers:
                names = ", ".join(f"{layer.parameter} ({layer.kind})" for layer in layers)
                raise RuntimeError(
                    f"candidates cannot be scored by ghost factors: {names} {reason}; its share of every utility would"
                    " be zero. Use estimator=directional, which needs no hooks"
                )
        self._called.clear()
        self._reached.clear()

    def _forward_hook(self, index: int, layer: GhostLayer) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            self._called.add(index)
            rows = self.rows
            act_a = (args or tuple(kwargs.values()))[0].detach()
            version = act_a._version
            output_act = act = output[0] if isinstance(output, tuple) else output
            if _is_shared(layer, act_a, rows.stop - rows.start):
                act_a, act = (_for_each(part, act_a.ndim, rows.stop - rows.start) for part in (act_a, act))
            if not act.requires_grad:
                # first layer of a frozen model; a clone, since a leaf may not be changed in place
                act = act.detach().requires_grad_().clone()
            replaced = None
            if act is not output_act:
                replaced = (act, *output[1:]) if isinstance(output, tuple) else act
            held = [act_a]

            def backward_hook(grad_b: Tensor) -> None:
                self._reached.add(index)
                act_a = held.pop()  # the hook lives as long as the loss, through the next forward pass
                if act_a._version != version:
                    raise RuntimeError(
                        f"the input of {layer.parameter} was changed in place after its use, so its per-sample gradient"
                        " is lost: write x = x + y instead of x += y, or use estimator=directional"
                    )
                self._hand_out(layer, rows, act_a, grad_b.detach())

            act.register_hook(backward_hook)
            return replaced

        return hook

    def _hand_out(self, layer: GhostLayer, rows: slice, act_a: Tensor, grad_b: Tensor) -> None:
        if layer.collect is not None:
            act_a, grad_b = layer.collect(act_a, grad_b)
        if layer.counted:
            count = rows.stop - rows.start
            act_a, grad_b = (rows_by_sequence(layer, act, count) for act in (act_a, grad_b))
            if layer.transposed:
                act_a, grad_b = grad_b, act_a
            self._consume(layer, rows, act_a, grad_b)


def _is_shared(layer: GhostLayer, ids: Tensor, count: int) -> bool:
    """Return whether an embedding is of ids for all ``count`` sequences: positions, (1, T) or (T,).

    Of (T,) with T = ``count`` those that count up from 0 are positions, any others one id for each sequence.
    """
    if layer.kind != "embedding" or layer.collect is not None:
        return False
    if ids.ndim == 1:
        return len(ids) != count or (count > 1 and bool((ids == torch.arange(count, device=ids.device)).all()))
    return ids.shape[0] == 1 < count


def _for_each(part: Tensor, axes: int, count: int) -> Tensor:
    """Copy what is for all sequences, with ``axes`` axes of ids, to each of them: (count, T, ...)."""
    part = part.unsqueeze(0) if axes == 1 else part
    return part.expand(count, *part.shape[1:]).clone()


def rows_by_sequence(layer: GhostLayer, act: Tensor, count: int) -> Tensor:
    """(count, T, ...) of an activation, whatever the layer's layout.

    Raises RuntimeError where the activation has no axis of ``count`` sequences (positions shared by the batch).
    """
    act = act.transpose(0, 1) if layer.sequence_first else act
    if act.ndim == 0 or act.shape[0] != count:
        raise RuntimeError(
            f"{layer.parameter} ({layer.kind}) saw a tensor of shape {tuple(act.shape)} for {count} sequences: without"
            " an axis of sequences it has no per-sample gradient. Expand its input over the batch, or use layers=linear"
        )
    return act


def local_rows(layer: GhostLayer, num_rows: int, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
    """(row of an embedding for each token id, clamped; whether it is a row of this rank that gets a gradient)."""
    rows_NT = ids_NT - layer.first_row
    mine_NT = (rows_NT >= 0) & (rows_NT < num_rows)
    padding = getattr(layer.module, "padding_idx", None)
    if padding is not None:
        mine_NT &= ids_NT != padding
    return rows_NT.clamp(0, num_rows - 1), mine_NT


def held_at_once(size: int) -> int:
    """Return how many sequences have their gradients of a matrix of ``size`` weights held at once."""
    return max(1, _GRADIENT_ELEMENTS // size)


def spans(count: int, size: int) -> Iterator[slice]:
    """Cut ``count`` sequences into as many as have their gradients of a matrix of ``size`` weights held at once."""
    step = held_at_once(size)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def per_sample_gradient(layer: GhostLayer, shape: torch.Size, act_a: Tensor, grad_b: Tensor) -> Tensor:
    """(N, O, I) = sum_t b_t a_t^T of each sequence; for an embedding (N, vocabulary, width), rows scattered by id.

    ``act_a``: (N, ..., I), or (N, ...) token ids; ``grad_b``: (N, ..., O). Dtype of ``grad_b``. ``shape``: of the
    embedding matrix; a linear layer's follows from a and b.
    """
    count = len(grad_b)
    grad_NTO = grad_b.reshape(count, -1, grad_b.shape[-1])
    if layer.kind == "linear":
        act_NTI = act_a.reshape(count, -1, act_a.shape[-1]).to(grad_b.dtype)
        return torch.bmm(grad_NTO.transpose(1, 2), act_NTI)
    rows_NT, mine_NT = local_rows(layer, shape[0], act_a.reshape(count, -1))
    grad_NTO = grad_NTO * mine_NT.unsqueeze(-1)
    rows_NT = rows_NT + shape[0] * torch.arange(count, device=rows_NT.device).unsqueeze(1)
    width = grad_NTO.shape[-1]
    flat = grad_b.new_zeros(count * shape[0], width)
    return flat.index_add_(0, rows_NT.flatten(), grad_NTO.flatten(0, 1)).view(count, shape[0], width)
