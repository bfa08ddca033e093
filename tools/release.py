"""Trains a release within minutes of one accelerator, whatever happens.

    python -m tools.release OUT --minutes=14 --config.data.path=PHOTOS \
        --config.vgg=VGG19 --config.init_from=WEIGHTS

It starts from the weights of an earlier run, whole or in parts, or from the bundled
ones, and widens them to config.model.width. It measures up to three candidates (the
batch as it is, a double batch, and float32), trains by the fastest within the minutes
that are left, and stops by itself 20 seconds before they are over. OUT gets the average
of the weights, every minute and in parts of 14 MiB, the log, the newest images, and
release.json, which says what was measured, chosen and tried. Everything else, such as
checkpoints and compiled programs, is in --work. The exit status is 0 if weights were
written.

If an update fails, training goes on from the last weights that were written, with the
phases that are left: with half the learning rate where a loss is not finite, half the
batch where memory is too small, and else in float32, and then without a VGG.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from pconv_jax import _files, vgg
from pconv_jax._errors import RunError, UserError
from pconv_jax.cli import config_options
from pconv_jax.runs import logs, opening, parallel
from pconv_jax.runs.config import read_settings
from pconv_jax.runs.settings import Settings
from pconv_jax.train import export, plan
from pconv_jax.train.experiment import (
    Experiment,
    check_feature_fraction,
    open_experiment,
)
from pconv_jax.train.hooks import TrainingDivergedError
from pconv_jax.train.loop import train_and_evaluate
from pconv_jax.weights.pretrained import from_pretrained, save_pretrained
from tools.widen import widen

FILE = "release.json"

_EARLY = 20.0  # Seconds before the end at which everything stops.
_PATIENCE = 3.0  # Seconds for the last event.
# Part of the time for opening the images and for the last checkpoint, and again for a
# validation.
_RESERVE = 0.05
_PHASES = ("pixels", "phase1", "phase2")


class Report:
    """What happened so far, in ``release.json``."""

    def __init__(self, path: Path):
        self._path, self._started = path, time.monotonic()
        self._content: dict[str, Any] = {"jax": jax.__version__, "events": []}
        self._lock = threading.Lock()  # The end is reported from another thread.

    def note(self, **facts: Any) -> None:
        """Note facts that hold for all events."""
        self._content = facts | self._content

    def add(self, event: str, **facts: Any) -> None:
        """Add an event, with the seconds since the start."""
        seconds = round(time.monotonic() - self._started, 1)
        with self._lock:
            events = self._content["events"]
            events.append({"seconds": seconds, "event": event} | facts)
            _files.write_json(self._path, self._content)
        print(f"{seconds:7.1f} s  {event}  {json.dumps(facts)}", flush=True)


class Weights:
    """The weights in a folder, whole or in parts, and whether they are new."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._before = self._find()

    def are_written(self) -> bool:
        """Return whether there are others than at first."""
        return not self._find() <= self._before

    def _find(self) -> set[tuple[str, int]]:
        paths = (self._folder / export.NAME, self._folder / f"{export.NAME}.1")
        return {(p.name, p.stat().st_mtime_ns) for p in paths if p.exists()}


def release(
    settings: Settings,
    *,
    out: Path,
    work: Path,
    deadline: float,
    measure_seconds: float = 120.0,
    part_mib: float = 14.0,
    report: Report | None = None,
) -> Mapping[str, Any] | None:
    """Choose a candidate and train it until a deadline.

    Args:
      settings: Settings of the training; the steps of phases are proportions.
      out: Folder of the results.
      work: Folder of runs and of what may be used again.
      deadline: Time at which the training should stop, of `time.monotonic`.
      measure_seconds: Seconds after which no other candidate is tried; 0 takes the
        first unmeasured.
      part_mib: Size of the parts of the weights in MiB.
      report: Where events go, ``release.json`` in ``out`` by default.

    Returns:
      The summary of the last run, or None if there was no time for one.

    Raises:
      Exception: The failure of a run, if no remedy is left.
    """
    report = report or Report(out / FILE)
    report.note(devices=[device.device_kind for device in jax.devices()])
    total = deadline - time.monotonic()
    reserve = _RESERVE * total * (2 if settings.validate_every else 1)
    until = time.monotonic() + min(measure_seconds, total / 3)
    settings = dataclasses.replace(
        settings,
        init_from=str(_initial_weights(settings, work)),
        export=dataclasses.replace(
            settings.export,
            folder=str(out),
            minutes=settings.export.minutes or 1.0,
            part_mib=part_mib,
        ),
    )
    if measure_seconds:
        settings = choose(settings, report, until=until)
    failed = False
    for number in itertools.count(1):
        workdir = work / f"run-{number}"
        if workdir.exists():  # Of an earlier call.
            continue
        seconds = deadline - time.monotonic() - reserve
        if seconds <= 0:
            report.add("no time is left")
            return None
        settings = dataclasses.replace(settings, minutes=seconds / 60)
        report.add("training starts", run=number, minutes=round(seconds / 60, 2))
        try:
            with _copying_logs(workdir, out), _stopping_at(deadline):
                summary = train_and_evaluate(settings, workdir)
        except (TrainingDivergedError, jax.errors.JaxRuntimeError) as error:
            settings, remedy = recover(settings, error, workdir)
            report.add("training failed", error=str(error)[:500], remedy=remedy)
            if remedy is None:
                raise
            failed = True
            continue
        except plan.NoTimeError as error:
            if not failed:  # More minutes would help; later, there may be weights.
                raise
            report.add("no time is left", error=str(error))
            return None
        facts = {"step": summary["step"], "finished": summary["finished"]}
        report.add("training ended", **facts, validation=summary["validation"])
        return summary


def _initial_weights(settings: Settings, work: Path) -> Path:
    """Write the weights to start from, as wide as the settings ask for."""
    place = settings.init_from
    if place and not Path(place).exists() and Path(f"{place}.1").exists():
        export.join(Path(place))
    weights = from_pretrained(place)
    model, variables = weights.model, weights.variables
    if model.encoder[0].features < settings.model.width:
        key = jax.random.key(settings.seed)
        width = settings.model.width
        model, variables = widen(model, variables, width=width, key=key)
    path = work / "start.safetensors"
    save_pretrained(path, model, variables)
    return path


def candidates(settings: Settings) -> dict[str, Settings]:
    """Make the settings to choose from, by name, the most promising first."""
    exact = dataclasses.replace(settings.model, dtype="float32")
    found = {
        settings.model.dtype: settings,
        "double batch": dataclasses.replace(
            settings, batch_size=2 * settings.batch_size
        ),
    }
    if exact != settings.model:
        found["float32"] = dataclasses.replace(settings, model=exact)
    return found


def choose(settings: Settings, report: Report, *, until: float) -> Settings:
    """Measure the candidates, and return the settings with the most images a second.

    Args:
      settings: The first candidate, returned if none can be measured.
      report: Where the measurements go.
      until: Time until which another candidate is tried, of `time.monotonic`, if there
        is as much left as the longest took.
    """
    experiment, paces = open_experiment(settings), {}
    report.add("images and weights are read")
    found = candidates(settings)
    longest = 0.0
    for name, candidate in found.items():
        started = time.monotonic()
        if paces and started + longest > until:  # Most of it compiles.
            report.add("no time for another candidate", name=name)
            break
        try:
            seconds = _measure(experiment, candidate)
        except jax.errors.JaxRuntimeError as error:
            report.add("candidate failed", name=name, error=str(error)[:500])
            continue
        longest = max(longest, time.monotonic() - started)
        paces[name] = candidate.batch_size / seconds
        report.add("candidate", name=name, images_per_second=round(paces[name], 2))
    if not paces:
        report.add("no candidate could be measured")
        return settings
    best = max(paces, key=lambda name: paces[name])
    report.add("chosen", name=best)
    return found[best]


def _measure(experiment: Experiment, settings: Settings) -> float:
    """Measure the seconds of a step with the whole loss, or of the first phase."""
    model = opening.get_model(settings.model)
    features = experiment.features
    if features:
        apply = vgg.apply_features_for(features.params, dtype=model.dtype)
        features = features._replace(apply=apply)
    phases = [phase for phase in experiment.phases if phase.start < phase.stop]
    phases = [phase for phase in phases if phase.use_features] or phases
    experiment = dataclasses.replace(
        experiment,
        settings=settings,
        model=model,
        features=features,
        phases=tuple(phases[:1]),
    )
    state = parallel.replicate(experiment.create_state())
    (seconds,) = plan.measure_paces(experiment, state, experiment.compile_step).values()
    return seconds


def recover(
    settings: Settings, error: Exception, workdir: Path
) -> tuple[Settings, str | None]:
    """Change the settings of a run that failed, for another that goes on from it.

    Args:
      settings: Its settings.
      error: Why it failed.
      workdir: Its directory.

    Returns:
      The settings of the next run, and the remedy, or None if there is none.
    """
    settings = _remaining(settings, workdir)
    if not any(getattr(settings, name).steps for name in _PHASES):
        return settings, None
    exact = dataclasses.replace(settings.model, dtype="float32")
    if isinstance(error, TrainingDivergedError):
        halves = {
            name: dataclasses.replace(
                phase := getattr(settings, name), learning_rate=phase.learning_rate / 2
            )
            for name in _PHASES
        }
        return dataclasses.replace(settings, **halves), "half the learning rates"
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
        half = dataclasses.replace(settings, batch_size=settings.batch_size // 2)
        return (half, "half the batch") if _is_divisible(half) else (settings, None)
    if exact != settings.model:
        return dataclasses.replace(settings, model=exact), "float32"
    if settings.vgg:
        return dataclasses.replace(settings, vgg=None), "no VGG"
    return settings, None


def _is_divisible(settings: Settings) -> bool:
    """Return whether the devices can share the batch."""
    try:
        parallel.check_batch_size(settings.batch_size, parts=settings.accumulate)
        if settings.vgg:
            check_feature_fraction(settings)
    except UserError:
        return False
    return True


def _remaining(settings: Settings, workdir: Path) -> Settings:
    """Start from the last weights of a run, and leave out the phases it finished."""
    weights, phases = workdir / export.NAME, workdir / plan.FILE
    if not weights.exists():
        return settings
    step = from_pretrained(weights).info["step"]
    done = {
        phase["name"]
        for phase in json.loads(phases.read_text())
        if phase["stop"] <= step
    }
    left = {
        name: dataclasses.replace(getattr(settings, name), steps=0, warmup_steps=0)
        for name in _PHASES
        if name in done
    }
    return dataclasses.replace(settings, init_from=str(weights), **left)


@contextlib.contextmanager
def _stopping_at(deadline: float) -> Iterator[None]:
    """Ask the run to stop when its time is over, as a scheduler would."""
    timer = threading.Timer(
        max(0.0, deadline - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM)
    )
    # The run listens while it trains; before and after, the signal is ignored.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _copying_logs(workdir: Path, out: Path, *, every: float = 15.0) -> Iterator[None]:
    """Copy the log and the newest images of a run, at times and at the end."""
    ended = threading.Event()

    def copy() -> None:
        newest = sorted(workdir.glob("pictures/*.png"))[-1:]
        for source in (*workdir.glob("metrics.jsonl"), *newest):
            name = "images.png" if source.suffix == ".png" else source.name
            with contextlib.suppress(OSError):  # The next copy may succeed.
                shutil.copyfile(source, out / f"{workdir.name}-{name}")

    def copy_until_the_end() -> None:
        while not ended.wait(every):
            copy()

    thread = threading.Thread(target=copy_until_the_end, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        copy()


def main() -> None:
    """Train the release that the command line describes."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument(
        "--minutes", type=float, required=True, help="minutes of the whole command"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/release-work"),
        help="folder of runs and compiled programs (default: %(default)s)",
    )
    parser.add_argument(
        "--measure-seconds",
        type=float,
        default=120.0,
        help="seconds after which no other candidate is tried; 0 takes the first "
        "unmeasured (default: %(default)s)",
    )
    config_options.add_config_options(parser, required=False)
    parser.set_defaults(config="accelerator")
    arguments = parser.parse_args()
    end = started + 60 * arguments.minutes
    early = min(_EARLY, 0.1 * 60 * arguments.minutes)
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    compiled = str(arguments.work.absolute() / "compiled")
    jax.config.update("jax_compilation_cache_dir", compiled)
    report, weights = Report(arguments.out / FILE), Weights(arguments.out)
    # Validation at the end may take longer than there is; its weights are written.
    seconds = max(0.0, end - early / 2 - time.monotonic())
    last = threading.Timer(seconds, _end, (report, weights))
    last.daemon = True
    last.start()
    logs.log_to_stderr()
    try:
        config = config_options.read_config(arguments)
        release(
            read_settings(config),
            out=arguments.out,
            work=arguments.work,
            deadline=end - early,
            measure_seconds=arguments.measure_seconds,
            report=report,
        )
    except (UserError, RunError) as error:
        parser.error(str(error))
    if not weights.are_written():
        parser.exit(1, "release.py: no weights were written.\n")


def _end(report: Report, weights: Weights) -> None:
    """End the process, with success if it wrote weights."""
    written = weights.are_written()
    # In a thread of its own, since it must not fail or wait for a disk.
    event = functools.partial(report.add, "ended before training did", weights=written)
    thread = threading.Thread(target=event, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    os._exit(0 if written else 1)


if __name__ == "__main__":
    main()
