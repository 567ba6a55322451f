"""Says which positions context-parallel ranks have: all of them once, and as much attention each."""

from __future__ import annotations

import pytest
import torch

from megaopus.models.context_parts import in_order, own_part, runs_of


@pytest.mark.parametrize(("length", "cp"), [(16, 1), (16, 2), (16, 4), (24, 3), (6, 2), (9, 3)])
def test_parts_are_put_together_again(length: int, cp: int) -> None:
    values = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
    parts = [own_part(values, cp, rank, 0) for rank in range(cp)]
    assert {len(part) for part in parts} == {length // cp}
    assert torch.equal(in_order(parts), values)
    assert torch.equal(own_part(values.t(), cp, cp - 1), parts[-1].t())
    for rank in range(cp):
        stop = runs_of(length, cp, rank)[-1].stop
        assert torch.equal(in_order(parts, stop), values[:stop])


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_all_ranks_see_as_many_keys(cp: int) -> None:
    def seen(length: int) -> set[int]:
        return {sum(sum(range(run.start + 1, run.stop + 1)) for run in runs_of(length, cp, r)) for r in range(cp)}

    assert seen(64) == {64 * 65 // 2 // cp}
    assert len(seen(8 * cp + cp)) == cp, "cut into cp pieces, of which later ones see more"
