"""megatron's linear layers with the bias inside the matrix product where one rank holds the whole matrix.

megatron adds the bias afterwards (or hands it on to be added), which reads and writes every activation once more.
Import only after ``distributed.cpu.prepare_megatron``.
"""

from __future__ import annotations

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional as F


class ColumnLinear(ColumnParallelLinear):
    """(output, None) on one tensor-parallel rank; megatron's own forward, with its collectives, on more."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1 or weight is not None:
            return super().forward(input_, weight, runtime_gather_output)
        return F.linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """(output, None) on one tensor-parallel rank; megatron's own forward, with its collectives, on more."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return F.linear(input_, self.weight, self.bias), None
