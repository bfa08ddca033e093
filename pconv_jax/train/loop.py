"""The training loop, from settings to the last checkpoint.

A workdir contains everything that a run writes: ``config.json``, ``checkpoints/``,
``metrics.jsonl``, ``tensorboard/``, ``pictures/`` and ``summary.json``. A run that is
started again in the same workdir resumes where it stopped and ends with the same
weights as a run that never stopped, because the data of a step depend only on its
number. On CPUs the weights are equal bit for bit. On GPUs they are if XLA is
deterministic, with ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from pconv_jax import _files, _processes
from pconv_jax.evaluate.results import Evaluation
from pconv_jax.runs import parallel
from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.runs.config import read_settings
from pconv_jax.runs.settings import Settings
from pconv_jax.runs.tables import format_table
from pconv_jax.train.experiment import CompiledCall, Experiment, open_experiment
from pconv_jax.train.export import Export
from pconv_jax.train.hooks import Draw, Log, Save, Validate
from pconv_jax.train.loggers import MetricWriter, Progress, announce_compilation
from pconv_jax.train.phases import Phase
from pconv_jax.train.plan import plan_phases
from pconv_jax.train.restore import restore_or_create
from pconv_jax.train.step import TrainState
from pconv_jax.train.workdir import check_workdir, lock_workdir
from pconv_jax.unet import PConvUNet


def train_and_evaluate(
    config: ConfigDict | Settings,
    workdir: str | pathlib.Path,
    *,
    model: PConvUNet | None = None,
    allow_other_images: bool = False,
) -> dict[str, Any]:
    """Train a network, or resume its training, and validate it.

    Args:
      config: The settings, or a config that holds them; see `default_config`.
      workdir: Directory of the run, which is made if it does not exist.
      model: The network, if it is not the one that the settings describe.
      allow_other_images: Whether a run may be resumed on other images than before. The
        default is False.

    Returns:
      The content of ``summary.json``: ``step``; ``finished``, False if the run was
      asked to stop before its last step; if finished, ``validation``, the mean metrics
      at the last step, and ``table``, those of each hole bin, both empty without
      validations; and ``warnings``.

    Raises:
      UserError: If a setting is wrong, images or weights cannot be found, the workdir
        belongs to another experiment, or another process trains in it.
      TrainingDivergedError: If a loss is not finite, naming the term and the step. The
        newest checkpoint is from before.
    """
    settings = read_settings(config)
    workdir = _files.as_path(workdir)
    check_workdir(workdir, settings)
    experiment = open_experiment(settings, model=model)
    primary = parallel.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_workdir(workdir))
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints",
                keep=settings.keep_checkpoints,
                best_metric="psnr",
            )
        )
        state, pending = restore_or_create(
            experiment, checkpoints, workdir, allow_other_images=allow_other_images
        )
        state = parallel.replicate(state)
        step = int(state.step)
        writer = stack.enter_context(
            MetricWriter(workdir, first_step=step + 1, enabled=primary)
        )
        compile_step = _compile_once(experiment, announce=primary)
        phases = plan_phases(experiment, state, compile_step, workdir)
        progress = stack.enter_context(Progress(phases[-1].stop, step, enabled=primary))
        stop_requested = stack.enter_context(parallel.stop_requests())
        if primary:
            _files.write_json(workdir / "config.json", settings.to_dict())
        log = Log(
            writer,
            progress,
            checkpoints,
            batch_size=settings.batch_size,
            step=step,
            pending=pending,
        )
        hooks = _make_hooks(experiment, workdir, log, writer, progress, checkpoints)
        run = _Run(experiment, phases, state, hooks, stop_requested)
        del state  # Its memory is free once the run has another one.
        run.catch_up()
        for phase in phases:
            if run.step < phase.stop and not run.stopped:
                progress.write(f"{phase.name}: to step {phase.stop}")
                run.train(phase, compile_step(phase))
        summary = run.finish()
        if primary:
            _files.write_json(workdir / "summary.json", summary)
    return summary


def _compile_once(
    experiment: Experiment, *, announce: bool
) -> Callable[[Phase], CompiledCall]:
    """Return `Experiment.compile_step` with a cache, and announce each compilation.

    The pace of a phase is measured with the program that then trains it.
    """
    compiled: dict[str, CompiledCall] = {}

    def compile_step(phase: Phase) -> CompiledCall:
        if phase.name not in compiled:
            name = f"{phase.name}: training step"
            call = experiment.compile_step(phase)
            call = announce_compilation(call, name, enabled=announce)
            compiled[phase.name] = _trim_after_first(call)
        return compiled[phase.name]

    return compile_step


def _trim_after_first(call: CompiledCall) -> CompiledCall:
    """Give back what a compilation has freed, which may be more than a step needs."""
    trimmed = False

    @functools.wraps(call)
    def trimming_call(*args: Any) -> Any:
        nonlocal trimmed
        results = call(*args)
        if not trimmed:
            _processes.trim_memory()
            trimmed = True
        return results

    return trimming_call


class _Hooks(NamedTuple):
    """What happens between the steps of a run."""

    log: Log
    save: Save
    draw: Draw
    validate: Validate
    export: Export


def _make_hooks(
    experiment: Experiment,
    workdir: pathlib.Path,
    log: Log,
    writer: MetricWriter,
    progress: Progress,
    checkpoints: Checkpoints,
) -> _Hooks:
    settings = experiment.settings
    validation: dict[str, Any] = {
        "model": experiment.model,
        "source": experiment.validation_source,
        "image_size": settings.image_size,
    }
    # Warnings that come later are in later checkpoints, too.
    meta = {"config": settings.to_dict(), "warnings": experiment.warnings}
    save = Save(checkpoints, writer, meta=meta | experiment.identity)
    examples = settings.validation_examples
    return _Hooks(
        log,
        save,
        Draw(writer, **validation),
        Validate(writer, progress, save, examples=examples, **validation),
        Export(
            workdir,
            settings.export,
            model=experiment.model,
            info=meta | {"experiment": settings.to_dict()},
            enabled=parallel.process_index() == 0,
        ),
    )


class _Run:
    """A run from the step that it starts from, and what is due between its steps.

    Attributes:
      step: Number of updates so far.
      stopped: Whether the run was asked to stop.
    """

    def __init__(
        self,
        experiment: Experiment,
        phases: Sequence[Phase],
        state: TrainState,
        hooks: _Hooks,
        stop_requested: Callable[[int], bool],
    ):
        self.step = int(state.step)
        self.stopped = False
        self._experiment = experiment
        self._settings = experiment.settings
        self._state = state
        self._hooks = hooks
        self._stop_requested = stop_requested
        self._phase_ends = [phase.stop for phase in phases]
        self._evaluation: Evaluation | None = None
        self._unreadable: set[str] = set()

    def catch_up(self) -> None:
        """Draw and validate, if a run that was stopped at this step left it undone."""
        if not self.step:
            return
        draw, validate = self._hooks.draw, self._hooks.validate
        if self._is_due(self._settings.picture_every) and not draw.is_done(self.step):
            draw(self._state)
        if self._is_due(self._settings.validate_every):
            if not validate.is_done(self.step):
                self._evaluation = validate(self._state)

    def train(self, phase: Phase, call: CompiledCall) -> None:
        """Take the steps of a phase that are left, until asked to stop."""
        if self.step == phase.start > 0:
            self._state = _reset_optimizer(self._experiment, phase, self._state)
        log, count = self._hooks.log, self._settings.steps_per_call
        log.start_phase()
        with contextlib.closing(self._experiment.open_batches(self.step)) as batches:
            while self.step < phase.stop and not self.stopped:
                inputs = [next(batches) for _ in range(count)]
                scales = [phase.scales(self.step + i) for i in range(count)]
                self._state, scalars = call(self._state, inputs, scales)
                self.step += count
                log.add(*scalars)
                self._warn_of(batches.unreadable)
                self.stopped = self._is_stop_requested()
                rate = float(scales[-1].learning_rate) * phase.learning_rate
                self._after_call(phase, learning_rate=rate)
                if not self.stopped and self.step < self._phase_ends[-1]:
                    # What was due may have taken as long as many steps.
                    self.stopped = self._is_stop_requested()
                    if self.stopped:
                        self._save_last()

    def _is_stop_requested(self) -> bool:
        # Processes agree on a call, not on a step within it.
        return self._stop_requested(self.step // self._settings.steps_per_call)

    def _warn_of(self, unreadable: Sequence[str]) -> None:
        """Name images that could not be read in one warning, for checkpoints too."""
        if self._unreadable.issuperset(unreadable):
            return
        warnings = self._experiment.warnings
        if (before := _format_unreadable(self._unreadable)) in warnings:
            warnings.remove(before)
        self._unreadable.update(unreadable)
        if (now := _format_unreadable(self._unreadable)) not in warnings:
            warnings.append(now)

    def _after_call(self, phase: Phase, *, learning_rate: float) -> None:
        """Do what is due after a call."""
        settings = self._settings
        log, save, draw, validate, export = self._hooks
        if self.stopped or self._is_due(settings.log_every):
            log.write(learning_rate=learning_rate)
        ended = phase.name if self.step == phase.stop else None
        if self.stopped:
            self._save_last(ended)
            return
        if ended or export.is_due():
            with log.paused():
                export(self._state, phase=ended)
        draw_now = self._is_due(settings.picture_every)
        validate_now = self._is_due(settings.validate_every)
        save_now = validate_now or self._is_due(settings.checkpoint_every)
        if not draw_now and not save_now:
            return
        with log.paused():
            if save_now:  # First, so that a kill costs no step.
                save(self._state, pending=log.pending)
            if draw_now:
                draw(self._state)
            if validate_now:
                self._evaluation = validate(self._state)

    def _save_last(self, ended: str | None = None) -> None:
        """Save the state of a stopped run, and then write its weights."""
        log, save, _, _, export = self._hooks
        # First of all, since a scheduler may soon kill the process.
        save(self._state, pending=log.pending)
        export(self._state, phase=ended)

    def _is_due(self, every: int) -> bool:
        at_end = self.step in self._phase_ends
        return every > 0 and (self.step % every == 0 or at_end)

    def finish(self) -> dict[str, Any]:
        """Make the content of ``summary.json``, with metrics of a finished run alone.

        A finished run that is started again has been validated and logged; it is
        validated once more, for the summary alone.
        """
        finished = self.step >= self._phase_ends[-1] and not self.stopped
        if finished and self._evaluation is None and self._settings.validate_every:
            self._evaluation = self._hooks.validate(self._state, write=False)
        shown = self._evaluation if finished else None
        return {
            "step": self.step,
            "finished": finished,
            "validation": shown.mean() if shown else {},
            "table": shown.table() if shown else [],
            "warnings": self._experiment.warnings,
        }


def _format_unreadable(names: Collection[str]) -> str:
    return f"{len(names)} unreadable image(s): {', '.join(sorted(names))}"


def _reset_optimizer(
    experiment: Experiment, phase: Phase, state: TrainState
) -> TrainState:
    """Start a phase as if it was a run of its own, from the weights of a state."""
    opt_state = experiment.optimizer(phase).init(state.params)
    return parallel.replicate(dataclasses.replace(state, opt_state=opt_state))


def format_summary(summary: Mapping[str, Any], workdir: str | pathlib.Path) -> str:
    """Format what `train_and_evaluate` returned, for people."""
    if summary["finished"] and not summary["validation"]:
        lines = [f"Finished at step {summary['step']}."]
    elif summary["finished"]:
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in summary["validation"].items())
        lines = [format_table(summary["table"], decimals=3), ""]
        lines += [f"Finished at step {summary['step']}. Validation: {numbers}."]
    else:
        lines = [f"Stopped at step {summary['step']}. The same command resumes it."]
    lines += [f"Checkpoints, metrics and images are in {workdir}."]
    return "\n".join(lines + [f"WARNING: {w}" for w in summary["warnings"]])
