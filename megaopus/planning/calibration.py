"""Fits what is assumed of a machine to measured steps, and keeps what was found in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.errors import DataError
from megaopus.fs import write_whole
from megaopus.planning.machine import COEFFICIENTS, Machine
from megaopus.planning.step_time import StepWork

FILE = Path("runs/plan_calibration.json")
_VERSION = 1
_NOISE, _FREEDOM = 0.05, 2.0
"""Standard deviations of the logarithms: of a measured time, and of a coefficient about what is assumed of it."""
_ROUNDS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Holds what the steps of one layout took."""

    layout: str
    training_s: float
    """The fastest of its steps, without selection."""
    selection_s: float
    """Of the same step; 0: nothing was selected."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.training_s + self.selection_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Holds what measured steps say of a machine, and where they were made."""

    machine: Machine
    device: str
    """Name of the device."""
    ranks: int
    parameters: int
    precision: str
    error: float
    """Largest relative error of the measured steps' seconds after the fit."""
    measured: list[dict[str, Any]]
    """Rows of what was measured, and predicted after the fit."""


def fitted(assumed: Machine, rows: Sequence[tuple[StepWork, Measured]]) -> Machine:
    """Fit the seconds of each kind of work to measured steps; what these do not tell stays near what is assumed.

    Least squares of logarithms, by Gauss and Newton's steps, each coefficient drawn to what is assumed.
    """
    start = replace(assumed, scoring=1.0)
    names = [name for name in COEFFICIENTS if name != "between_s" or any(_crosses(work) for work, _ in rows)]

    def machine(logs: np.ndarray) -> Machine:
        return start.scaled({name: math.exp(value) for name, value in zip(names, logs, strict=True)})

    def misses(logs: np.ndarray) -> np.ndarray:
        at = machine(logs)
        times = [math.log(work.training(at) / measured.training_s) / _NOISE for work, measured in rows]
        return np.array([*times, *(logs / _FREEDOM)])

    logs = np.zeros(len(names))
    for _ in range(_ROUNDS):
        here, small = misses(logs), 1e-4
        slopes = np.stack([(misses(logs + small * axis) - here) / small for axis in np.eye(len(names))], axis=1)
        step = np.linalg.lstsq(slopes, -here, rcond=None)[0]
        step *= min(1.0, 1.0 / max(1e-12, float(np.abs(step).max())))
        while np.square(misses(logs + step)).sum() > np.square(here).sum() and np.abs(step).max() > 1e-6:
            step = step / 2
        logs = logs + step
        if np.abs(step).max() < 1e-5:
            break
    return _with_scoring(machine(logs), rows)


def _with_scoring(machine: Machine, rows: Sequence[tuple[StepWork, Measured]]) -> Machine:
    """Set how much longer selection takes than its FLOPs say: the median over what was measured."""
    found = [measured.selection_s / work.selection(machine) for work, measured in rows if work.omega > 0]
    return replace(machine, scoring=float(np.median(found)) if found else 1.0)


def _crosses(work: StepWork) -> bool:
    return any(each.between > 0 for each in (*work.stages, *work.reduced, *work.update))


def predicted(work: StepWork, machine: Machine, measured: Measured) -> float:
    """Seconds that a measured step would have been predicted to take."""
    return work.seconds(machine, scores=float(measured.selection_s > 0))


def calibrate(
    assumed: Machine,
    rows: Sequence[tuple[StepWork, Measured]],
    *,
    device: str,
    ranks: int,
    parameters: int,
    precision: str,
) -> Calibration:
    """Fit a machine to what was measured on it."""
    machine = replace(fitted(assumed, rows), told=f"measured on {device}, {ranks} rank(s)")
    told = [{**asdict(measured), "predicted_s": predicted(work, machine, measured)} for work, measured in rows]
    errors = [abs(predicted(work, machine, measured) / measured.step_s - 1) for work, measured in rows]
    return Calibration(
        machine=machine,
        device=device,
        ranks=ranks,
        parameters=parameters,
        precision=precision,
        error=max(errors),
        measured=told,
    )


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration. Raises DataError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"version": _VERSION, **asdict(calibration)}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{path}: the calibration cannot be written: {error.strerror}; name another file") from error


def load(path: Path) -> Calibration | None:
    """Read a calibration; None: there is no such file. Raises DataError if it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("version") != _VERSION:
            raise ValueError("another version")
        machine = Machine(**values.pop("machine"))
        if not all(getattr(machine, name) > 0 for name in (*COEFFICIENTS, "scoring")):
            raise ValueError("seconds that are not above 0")
        return Calibration(machine=machine, **values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{path}: not a calibration that 'plan --measure' wrote ({error})"
        raise DataError(f"{reason}; remove it, or name another with --calibration") from error
