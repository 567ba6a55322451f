"""Picks by what an update on a candidate would do to the loss of the proxy."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection.backend import Gradient, UpdateOperator
from megaopus.selection.candidates import as_candidates
from megaopus.selection.estimators.layers import ghost_layers, require_enough, require_some
from megaopus.selection.estimators.registry import (
    ESTIMATORS,
    EVERY_LAYER,
    Estimator,
    Refining,
    Request,
    SeesLosses,
    Unread,
)
from megaopus.selection.estimators.step_size import DROWNED
from megaopus.selection.methods.registry import register_method
from megaopus.selection.pieces import direction, finite, pieces_of, shapes_of, whole_gradient, whole_operator
from megaopus.selection.scoring import Scores, ScoringStep

_NEEDS = {"proxy": "scores candidates against a proxy"}


@register_method("opus", flops=None, needs=_NEEDS)
def opus(step: ScoringStep) -> Scores:
    """Score by how much the optimizer's step on a candidate lowers the proxy's loss (arXiv 2602.05400)."""
    return _alignment(step, step.config.muon_operator)


@register_method(
    "greats",
    flops=None,
    needs=_NEEDS,
    example={
        "estimator": "adjoint",
        "utilities": "raw",
        "redundancy": 1.0,
        "gram_sketch": "per_layer",
        "proxy_half_life": 0.0,
    },
)
def greats(step: ScoringStep) -> Scores:
    """Score as ``opus`` does for a plain step along the gradient (GREATS, NeurIPS 2024)."""
    entry, config = ESTIMATORS.find(step.config.estimator), step.config
    if "fine_steps" in entry.needs and config.epsilon is None and step.backend.computes_in_16_bits:
        raise ValueError(
            "method greats scores along lr * gradient, a step too small for weights rounded to 16 bits, so that"
            f" {entry.needs['fine_steps']}: use estimator=adjoint (or set epsilon)"
        )
    return _alignment(step, "raw")


def _alignment(step: ScoringStep, operator_name: str) -> Scores:
    """Utilities <P g_z, g_proxy> with P the operator of that name."""
    config, backend, estimator = step.config, step.backend, step.estimator
    assert estimator is not None  # the entry says that the method scores by one
    operator = backend.operator(operator_name)
    if operator is None:
        text = f"the optimizer has no state yet, so its step is not known: {config.instead}"
        return Scores(utilities=None, events=(Event("selection.fallback.no_optimizer_state", text),))
    average, bad = _average(step)
    layers = config.derived_layers()
    step.once("some layer is scored", lambda: require_some(backend, len(estimator.uses(backend, average)), layers))
    told: list[Event] = []
    if config.captures:
        which = config.ghost_layers()
        enough = functools.partial(
            require_enough, backend, shapes_of(backend, average), ghost_layers(backend, which), which
        )
        step.once("enough weights are captured", lambda: told.extend(enough()))
    if config.bounded:
        operator = operator.bounded(average)
    with _as_taken(step, operator, average) as (taken, gradient):

        def request(passes: Mapping[str, Any]) -> Request:
            return Request(
                backend=backend,
                candidates=step.share,
                operator=taken,
                proxy_gradient=gradient,
                keep_updates=config.redundancy > 0,
                total=len(step.buffer),
                **passes,
            )

        parts, rows = step.measured(lambda passes: estimator.estimate(request(passes)))
        if isinstance(estimator, Refining):
            parts = step.measured(lambda passes: estimator.refine(request(passes), parts, step.step))
    seen = estimator.losses() if config.utilities == "odds" and isinstance(estimator, SeesLosses) else None
    # A stage or shard may be the only one to see a bad gradient: the word travels with the utilities.
    each = parts if seen is None else torch.cat([parts, seen.to(parts)])
    utilities, count = backend.sum_over_ranks(each, bad.double().view(1))
    gram = None if rows is None else _gram(step, rows)
    utilities, count = _read(estimator, utilities, count)
    if bool(count > 0):
        text = f"the proxy gradient is not finite: {config.instead}, and the gradient was left out of its average"
        return Scores(utilities=None, events=(*told, Event("selection.fallback.proxy_not_finite", text)))
    step.average.keep()
    losses = None
    if seen is not None:  # of every rank its utilities, then its losses
        utilities, losses = utilities.view(backend.world_size, 2, -1).unbind(1)
        utilities, losses = utilities.flatten(), losses.flatten()[: len(step.buffer)]
    utilities = utilities[: len(step.buffer)]
    precision = estimator.signal_to_error(utilities) if isinstance(estimator, Refining) else None
    events = (*told, *(_why_equal(step, utilities, operator, average) or _drowned(precision)))
    return Scores(utilities=utilities, losses=losses, gram=gram, signal_to_error=precision, events=events)


def _read(estimator: Estimator, utilities: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both to the CPU, and what the estimator has on the device: one wait for all."""
    unread = estimator.unread().to(utilities) if isinstance(estimator, Unread) else utilities[:0]
    found, bad, numbers = torch.cat([utilities, count, unread]).cpu().split([len(utilities), len(count), len(unread)])
    if isinstance(estimator, Unread):
        estimator.read(numbers)
    return found, bad


@contextmanager
def _as_taken(
    step: ScoringStep, operator: UpdateOperator, gradient: Mapping[str, Tensor]
) -> Iterator[tuple[UpdateOperator, Mapping[str, Tensor]]]:
    """Give both, inside, as the estimator takes them: as they are, or whole."""
    if ESTIMATORS.find(step.config.estimator).pieces:
        yield operator, gradient
        return
    whole = whole_gradient(step.backend, gradient)
    with whole_operator(operator) as of_whole:
        yield of_whole, whole


def _why_equal(
    step: ScoringStep, utilities: Tensor, operator: UpdateOperator, gradient: Mapping[str, Tensor]
) -> tuple[Event, ...]:
    """Say why utilities (n,) tell no candidate from another, where they do not; collective then."""
    finite = utilities[utilities.isfinite()]
    if len(finite) and bool(finite.min() < finite.max()):
        return ()
    backend, instead = step.backend, step.config.instead
    rates = [float(group["lr"]) for each in getattr(backend, "optimizers", ()) for group in each.param_groups]
    losses = step.sum_parts(step.measured(lambda passes: backend.losses(step.share, **passes)))
    if events := step.lost_labels(losses):
        return events
    # A pipeline stage may hold weights that have no gradient: what counts is that nowhere is any.
    found = torch.stack([_any(gradient), _any(direction(operator, gradient, gradient))]).double()
    has_gradient, has_step = (backend.sum_over_ranks(found[:0], found)[1] > 0).tolist()
    if rates and not any(rates):
        text = f"the learning rate is 0, so that no update changes anything: {instead}"
        return (Event("selection.fallback.learning_rate_zero", text),)
    if not has_gradient:
        text = f"the proxy gradient is 0 everywhere (are its labels masked?): {instead}"
        return (Event("selection.fallback.proxy_gradient_zero", text),)
    if not has_step:
        text = "the optimizer's state makes a step of 0 of the proxy gradient (has it taken one with a gradient yet?):"
        return (Event("selection.fallback.step_zero", f"{text} {instead}"),)
    return ()


def _any(gradient: Mapping[str, Tensor]) -> Tensor:
    """() bool: whether a number of it is not 0."""
    return torch.stack([value.any() for value in gradient.values()]).any()


def _drowned(precision: float | None) -> tuple[Event, ...]:
    if precision is None or precision >= DROWNED:
        return ()
    text = f"utilities spread by only {precision:.2g} times the error of each, which is of rounding, or of losses that"
    text += (
        " bend over the step: leave selection.epsilon to be found, or use estimator=adjoint, which takes no differences"
    )
    return (Event("selection.imprecise", text, signal_to_error=precision, level=DROWNED),)


def _average(step: ScoringStep) -> tuple[Mapping[str, Tensor], Tensor]:
    """(the average to score by, whether this step's gradient is not finite)."""
    config, backend = step.config, step.backend
    if step.step % config.proxy_every and (average := step.average.last()) is not None:
        return average, torch.zeros((), dtype=torch.bool, device=backend.device)
    gradient = _gradient(step)
    bad = ~finite(gradient, backend.device)
    lent = getattr(backend, "lends_gradient", None)
    entry = ESTIMATORS.find(config.estimator)
    if lent and pieces_of(backend) and (not entry.pieces or "hooks" in entry.needs or config.redundancy > 0):
        gradient, lent = {name: value.clone() for name, value in gradient.items()}, False  # wholes are gathered there
    return step.average.offer(gradient, in_place=lent is not None, lent=bool(lent)), bad


def _gradient(step: ScoringStep) -> Gradient:
    """The proxy batch's mean gradient; with contrast less the pool's."""
    assert step.proxy is not None  # checked when the selector was made
    proxy = as_candidates(step.proxy(step.step), step.step)
    if not step.config.contrast:
        return step.proxy_gradient(proxy, None)
    assert step.pool is not None
    return step.proxy_gradient(proxy, as_candidates(step.pool(step.step), step.step))


def _gram(step: ScoringStep, rows: dict[str, Tensor]) -> Tensor:
    """(n, n) float64 on the CPU: inner products of the candidates' updates, over every layer of every stage."""
    backend, size = step.backend, len(step.buffer)
    total = torch.zeros(size, size, dtype=torch.float64, device=backend.device)
    summed = EVERY_LAYER in rows
    rows = backend.sum_over_model(rows, "gradient")
    if summed:  # of stages the rows add up, else their products do
        rows = backend.sum_over_model(rows, "stages")
    for value in rows.values():
        whole = backend.gather_candidates(value)[:size].double()
        total += whole @ whole.t()
    if not summed:
        total = backend.sum_over_model({"": total}, "stages")[""]
    return backend.from_rank_0(total).cpu()  # the products above are each rank's own, and may be rounded otherwise
