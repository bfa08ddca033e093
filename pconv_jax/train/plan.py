"""The phases of a run that has minutes instead of numbers of steps.

The pace of every phase is measured before the first step, on throwaway states. The
phases are then fixed and written into the workdir, since the learning rates depend on
them: a run that is resumed reads them.
"""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.runs import parallel
from pconv_jax.train.experiment import CompiledCall, Experiment
from pconv_jax.train.phases import Phase
from pconv_jax.train.step import Metrics, TrainState

FILE = "phases.json"

_SECONDS = 3.0  # Of measuring each phase, after it is compiled.
_FIRST, _MOST = 2, 50  # Calls that are measured.


class NoTimeError(UserError):
    """The minutes of a run are over before its first step."""


def plan_phases(
    experiment: Experiment,
    state: TrainState,
    compile_step: Callable[[Phase], CompiledCall],
    workdir: pathlib.Path,
) -> tuple[Phase, ...]:
    """Fix the phases of a run: those of its settings, or as many steps as fit.

    Args:
      experiment: The experiment.
      state: The state that the run starts from, which stays as it is.
      compile_step: Compiles the call of a phase; see `Experiment.compile_step`.
      workdir: Directory of the run, which keeps the phases of a run with minutes.

    Raises:
      UserError: If the run has taken steps, but its phases are not in the workdir.
      NoTimeError: If the minutes are over before the first step.
    """
    minutes, path = experiment.settings.minutes, workdir / FILE
    if not minutes:
        return experiment.phases
    if int(state.step):
        if path.exists():
            return tuple(Phase(**fields) for fields in json.loads(path.read_text()))
        raise UserError(
            f"workdir: {path}, which the run wrote before its first step, is missing. "
            "Put it back, or start another run from this one's weights with init_from."
        )
    started = time.monotonic()
    paces = measure_paces(experiment, state, compile_step)
    seconds = 60 * minutes - (time.monotonic() - started)
    # The slowest process sets the pace, and all agree on the same numbers.
    slowest = [parallel.gather(np.array([x])) for x in paces.values()]
    paces = dict(zip(paces, (float(x.max()) for x in slowest)))
    seconds = float(parallel.gather(np.array([seconds])).min())
    phases = fit_phases(
        experiment.phases,
        paces,
        seconds=seconds,
        multiple=experiment.settings.steps_per_call,
    )
    if parallel.process_index() == 0:
        _files.write_json(path, [phase._asdict() for phase in phases])
    return phases


def measure_paces(
    experiment: Experiment,
    state: TrainState,
    compile_step: Callable[[Phase], CompiledCall],
) -> dict[str, float]:
    """Measure the seconds of a step of every phase that is not empty, by name."""
    paces, count = {}, experiment.settings.steps_per_call
    for phase in experiment.phases:
        if phase.start == phase.stop:
            continue
        with open_calls(experiment, phase, state, compile_step(phase)) as call:
            paces[phase.name] = _measure_call(call) / count
    return paces


def _measure_call(call: Callable[[], list[Metrics]]) -> float:
    """Measure the seconds of a call after the first one, which compiles.

    A call waits for the calls of the other processes, whose clocks differ. So the
    slowest process sets the number of calls of all.
    """
    _time_calls(call, 1)
    seconds = _time_calls(call, _FIRST)
    slowest = float(parallel.gather(np.array([seconds])).max()) / _FIRST
    wanted = min(_MOST, math.ceil(_SECONDS / max(slowest, 1e-9)))
    more = max(0, wanted - _FIRST)
    return (seconds + _time_calls(call, more)) / (_FIRST + more)


def _time_calls(call: Callable[[], list[Metrics]], count: int) -> float:
    started = time.monotonic()
    for _ in range(count):
        jax.block_until_ready(call())
    return time.monotonic() - started


@contextlib.contextmanager
def open_calls(
    experiment: Experiment, phase: Phase, state: TrainState, step: CompiledCall
) -> Iterator[Callable[[], list[Metrics]]]:
    """Open the batches of a phase, to measure its step on a copy of a state.

    Args:
      experiment: The experiment.
      phase: The phase.
      state: The state; it does not change.
      step: The phase's compiled step.

    Yields:
      A function that calls the step on the next batches, and returns its scalars.
    """
    count, copy = experiment.settings.steps_per_call, parallel.replicate(state)
    scales = [phase.scales(phase.start)] * count
    with contextlib.closing(experiment.open_batches(0)) as batches:

        def call() -> list[Metrics]:
            nonlocal copy
            batch = [next(batches) for _ in range(count)]
            copy, scalars = step(copy, batch, scales)
            return scalars

        yield call


def fit_phases(
    phases: Sequence[Phase],
    paces: Mapping[str, float],
    *,
    seconds: float,
    multiple: int = 1,
) -> tuple[Phase, ...]:
    """Scale the steps of all phases, so that they take a given time.

    Args:
      phases: The phases.
      paces: Seconds of a step of each phase that is not empty, by name.
      seconds: The time.
      multiple: Number that the steps of a phase are a multiple of. The default is 1.

    Raises:
      UserError: If no phase has steps.
      NoTimeError: If there is no time for ``multiple`` steps of each phase that has.
    """
    wanted = {p.name: p.stop - p.start for p in phases if p.name in paces}
    if not sum(wanted.values()):
        raise UserError("minutes: no phase has steps.")
    least = sum(multiple * pace for pace in paces.values())
    if seconds < least:
        raise NoTimeError(
            f"minutes: {max(0.0, seconds):.0f} s are left after compiling and "
            f"measuring, and the shortest run takes {least:.1f} s: use more minutes."
        )
    factor, start, fitted = _fit_factor(wanted, paces, seconds, multiple), 0, []
    for phase in phases:
        steps = 0
        if phase.name in wanted:
            steps = int(factor * wanted[phase.name]) // multiple * multiple
            steps = max(multiple, steps)
        fitted.append(
            phase._replace(
                start=start,
                stop=start + steps,
                warmup_steps=round(factor * phase.warmup_steps),
                ramp_steps=round(factor * phase.ramp_steps),
            )
        )
        start += steps
    return tuple(fitted)


def _fit_factor(
    wanted: Mapping[str, int], paces: Mapping[str, float], seconds: float, multiple: int
) -> float:
    """Find the factor of the steps of phases that are longer than ``multiple``.

    Those that it would make shorter take ``multiple`` steps; the others share the rest
    of the time.
    """
    factor, names = 0.0, sorted(wanted, key=lambda name: wanted[name])
    for number, name in enumerate(names):
        factor = seconds / sum(paces[n] * wanted[n] for n in names[number:])
        if factor * wanted[name] >= multiple:
            break
        seconds -= multiple * paces[name]
    return factor
