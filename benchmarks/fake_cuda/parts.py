"""Says of which part of a training step an operation is, forward and backward: by the module that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from megaopus.selection.candidates import tensors_of

PARTS = {
    "Norm": "norms",
    "CausalAttention": "attention",
    "Linear": "biases",
    "MLP": "activation",
    "SelfAttention": "heads and rotary",
    "Transformer": "residuals",
    "Embedding": "embedding",
    "GPT": "losses",
}
"""What a module's class is called, in part -> what is said of its own operations that are no products."""
SUMS, UPDATE, LOSSES = "sums of gradients", "update", "losses"
_KEY = "megaopus part"


def part_of(module: nn.Module) -> str:
    """Name the part that a module's own operations are of."""
    name = type(module).__name__
    return next((part for key, part in PARTS.items() if key in name), LOSSES)


class Parts:
    """Knows which part of a step runs now, while ``watched``; a backward pass by what made its node of the graph."""

    def __init__(self) -> None:
        self._inside: list[str] = []

    def now(self) -> str:
        """Name the part."""
        node: Any = torch._C._current_autograd_node()
        if node is not None:
            return node.metadata.get(_KEY, SUMS if "AccumulateGrad" in node.name() else LOSSES)
        return self._inside[-1] if self._inside else UPDATE

    @contextmanager
    def watched(self, engine: Any) -> Iterator[None]:
        """Follow forward passes inside; all that is outside the passes of ``engine``'s schedule is the update's."""
        schedule = engine._schedule

        def run(**given: Any) -> Any:
            self._inside.append(LOSSES)
            try:
                return schedule(**given)
            finally:
                self._inside.pop()

        def enter(module: nn.Module, args: Any) -> None:
            _mark(args, self._inside[-1])  # what led here is of who calls
            self._inside.append(part_of(module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            _mark(output, self._inside.pop())

        with ExitStack() as stack:
            for handle in (register_module_forward_pre_hook(enter), register_module_forward_hook(leave)):
                stack.callback(handle.remove)
            engine._schedule = run
            stack.callback(setattr, engine, "_schedule", schedule)
            yield


def _mark(values: Any, part: str) -> None:
    """Write ``part`` to the nodes of the graph behind ``values`` that nothing is written to."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors_of(values)]
    while nodes:
        node = nodes.pop()
        if node is None or "AccumulateGrad" in node.name() or _KEY in node.metadata:
            continue
        node.metadata[_KEY] = part
        nodes += [each for each, _ in node.next_functions]
