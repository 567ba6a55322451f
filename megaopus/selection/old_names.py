"""Takes what users wrote for version 0.1 by its old names, and warns once of each that there is a new one."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")
Class = TypeVar("Class", bound=type)
RENAMED = {
    "coarse": "computes_in_16_bits",
    "combine": "sum_over_ranks",
    "sum_ranks": "sum_over_ranks",
    "sum_shards": "sum_over_model(values, 'matrix')",
    "sum_parts": "sum_over_model(values, 'gradient')",
    "sum_stages": "sum_over_model(values, 'stages')",
}
"""Members of a scoring backend: old name -> new one."""


def warn(old: str, new: str) -> None:
    """Say to whoever called that ``old`` is now ``new``."""
    warnings.warn(f"{old} is now {new}; the old name goes in the next release", DeprecationWarning, stacklevel=3)


def renamed_argument(old: str, old_value: Value | None, new: str, new_value: Value | None) -> Value | None:
    """The value of an argument that was given by its old or its new name. Raises TypeError if by both."""
    if old_value is None:
        return new_value
    if new_value is not None:
        raise TypeError(f"{old}= is the old name of {new}=: give one of them")
    warnings.warn(f"{old}= is now {new}=; the old name goes in the next release", DeprecationWarning, stacklevel=4)
    return old_value


def renamed_field(old: str, new: str) -> Callable[[Class], Class]:
    """Decorate a dataclass whose field ``old`` is now ``new``: the old keyword and attribute go on."""

    def decorate(cls: Class) -> Class:
        made = cls.__init__  # type: ignore[misc]

        @functools.wraps(made)
        def init(self: Any, *given: Any, **named: Any) -> None:
            if old in named:
                warn(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}")
                named[new] = named.pop(old)
            made(self, *given, **named)

        def get(self: Any) -> Any:
            warn(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}")
            return getattr(self, new)

        cls.__init__ = init  # type: ignore[misc]
        setattr(cls, old, property(get, doc=f"The old name of ``{new}``."))
        return cls

    return decorate


class OldBackendNames:
    """Members of ``ModuleBackend`` by the names that they had, for code that calls or overrides them."""

    @property
    def coarse(self: Any) -> bool:
        """See ``computes_in_16_bits``."""
        warn("coarse", RENAMED["coarse"])
        return self.computes_in_16_bits

    def combine(self: Any, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        """See ``sum_over_ranks``."""
        warn("combine", RENAMED["combine"])
        return self.sum_over_ranks(parts, tally)

    def sum_ranks(self: Any, values: Tensor) -> None:
        """Sum over all ranks, in place; see ``sum_over_ranks``."""
        warn("sum_ranks", RENAMED["sum_ranks"])
        self._sum_everywhere(values)

    def sum_shards(self: Any, values: Tensor) -> Tensor:
        """See ``sum_over_model``."""
        warn("sum_shards", RENAMED["sum_shards"])
        return self.sum_over_model({"": values}, "matrix")[""]

    def sum_parts(self: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``sum_over_model``."""
        warn("sum_parts", RENAMED["sum_parts"])
        return self.sum_over_model(values, "gradient")

    def sum_stages(self: Any, values: Tensor) -> Tensor:
        """See ``sum_over_model``."""
        warn("sum_stages", RENAMED["sum_stages"])
        return self.sum_over_model({"": values}, "stages")[""]


def with_new_names(backend: Any) -> Any:
    """The backend itself, or one around it with the new names where its author wrote some of the old ones."""
    written = {name for name in RENAMED if _is_written(backend, name)}
    if not written:
        return backend
    for name in sorted(written):
        warnings.warn(
            f"{type(backend).__name__}.{name} is now {RENAMED[name]} (docs/library.md); the old name goes in the next"
            " release",
            DeprecationWarning,
            stacklevel=3,
        )
    return _Renamed(backend, written)


def _is_written(backend: Any, name: str) -> bool:
    """Return whether the backend has a member of that name other than those of ``OldBackendNames``."""
    found = inspect.getattr_static(backend, name, None)
    return found is not None and found is not vars(OldBackendNames)[name]


class _Renamed:
    """A backend of version 0.1 as the estimators know it now."""

    def __init__(self, backend: Any, written: set[str]):
        self._backend = backend
        self._written = written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @property
    def computes_in_16_bits(self) -> bool:
        return self._backend.coarse if "coarse" in self._written else self._backend.computes_in_16_bits

    def sum_over_ranks(self, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        if "combine" in self._written:
            return self._backend.combine(parts, tally)
        if "sum_ranks" not in self._written:
            return self._backend.sum_over_ranks(parts, tally)
        import torch

        count, first = len(parts), self._backend.rank * len(parts)
        vector = torch.cat([parts.new_zeros(self._backend.world_size * count), tally.to(parts)])
        vector[first : first + count] = parts
        self._backend.sum_ranks(vector)
        return vector[: len(vector) - len(tally)], vector[len(vector) - len(tally) :]

    def sum_over_model(self, values: dict[str, Tensor], axis: str) -> dict[str, Tensor]:
        old = {"matrix": "sum_shards", "gradient": "sum_parts", "stages": "sum_stages"}[axis]
        if old not in self._written:
            return self._backend.sum_over_model(values, axis)
        if axis == "gradient":
            return self._backend.sum_parts(values)
        if not values:
            return values
        import torch

        whole = getattr(self._backend, old)(torch.stack(list(values.values())))
        return dict(zip(values, whole, strict=True))
