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
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from pconv_jax import _files
from pconv_jax.evaluate.results import Evaluation
from pconv_jax.runs import parallel
from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.runs.config import read_settings
from pconv_jax.runs.output import format_table, write_json
from pconv_jax.runs.settings import Settings
from pconv_jax.train import hooks
from pconv_jax.train.experiment import Experiment, Phase, open_experiment
from pconv_jax.train.export import Export
from pconv_jax.train.loggers import MetricWriter, Progress, announce_compilation
from pconv_jax.train.plan import plan_phases
from pconv_jax.train.restore import check_workdir, lock_workdir, restore_or_create
from pconv_jax.train.step import TrainState
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
    settings = config if isinstance(config, Settings) else read_settings(config)
    workdir = _files.as_path(workdir)
    check_workdir(workdir, settings)
    experiment = open_experiment(settings, model=model)
    warnings = experiment.warnings
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
        step, compiled = int(state.step), {}

        def compile_step(phase: Phase) -> Callable[..., Any]:
            if phase.name not in compiled:  # By the measurement of its pace.
                compiled[phase.name] = announce_compilation(
                    experiment.compile_step(phase),
                    f"{phase.name}: training step",
                    enabled=primary,
                )
            return compiled[phase.name]

        writer = stack.enter_context(
            MetricWriter(workdir, first_step=step + 1, enabled=primary)
        )
        phases = plan_phases(experiment, state, compile_step, workdir)
        last_step = phases[-1].stop
        progress = stack.enter_context(Progress(last_step, step, enabled=primary))
        stop_requested = stack.enter_context(parallel.stop_requests())
        if primary:
            write_json(workdir / "config.json", settings.to_dict())

        log = hooks.Log(
            writer,
            progress,
            checkpoints,
            batch_size=settings.batch_size,
            step=step,
            pending=pending,
        )
        meta = {"config": settings.to_dict(), "warnings": warnings}
        save = hooks.Save(checkpoints, writer, meta=meta | experiment.identity)
        draw = hooks.Draw(
            writer,
            model=experiment.model,
            source=experiment.validation_source,
            image_size=settings.image_size,
        )
        validate = hooks.Validate(
            writer,
            progress,
            save,
            model=experiment.model,
            source=experiment.validation_source,
            image_size=settings.image_size,
            examples=settings.validation_examples,
        )
        export = Export(
            workdir,
            settings.export,
            model=experiment.model,
            info=meta | {"experiment": settings.to_dict()},
            enabled=primary,
        )
        phase_ends = {phase.stop for phase in phases}

        def is_due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step in phase_ends)

        # A run that was stopped at this step left these for later.
        evaluation: Evaluation | None = None
        if step and is_due(settings.picture_every) and not draw.is_done(step):
            draw(state)
        if step and is_due(settings.validate_every) and not checkpoints.metrics(step):
            evaluation = validate(state)

        stopped, unreadable = False, set()
        for phase in phases:
            if stopped or step >= phase.stop:
                continue
            progress.write(f"{phase.name}: to step {phase.stop}")
            if step == phase.start > 0:
                state = _reset_optimizer(experiment, phase, state)
            train_step = compile_step(phase)
            log.start_phase()
            with contextlib.closing(experiment.open_batches(step)) as batches:
                while step < phase.stop and not stopped:
                    call = [next(batches) for _ in range(settings.steps_per_call)]
                    scales = [phase.scales(step + i) for i in range(len(call))]
                    state, scalars = train_step(state, call, scales)
                    step += len(call)
                    log.add(*scalars)
                    # Processes agree on a call, not on a step within it.
                    stopped = stop_requested(step // len(call))
                    if stopped or is_due(settings.log_every):
                        rate = float(scales[-1].learning_rate) * phase.learning_rate
                        log.write(learning_rate=rate)
                    ended = phase.name if step == phase.stop else None
                    if stopped or ended or export.is_due():
                        with log.paused():
                            export(state, phase=ended)
                    if stopped:  # A validation may take longer than a scheduler waits.
                        save(state, pending=log.pending)
                        break
                    draw_now = is_due(settings.picture_every)
                    validate_now = is_due(settings.validate_every)
                    save_now = validate_now or is_due(settings.checkpoint_every)
                    if draw_now or save_now:
                        with log.paused():
                            if save_now:  # First, so that a kill costs no step.
                                save(state, pending=log.pending)
                            if draw_now:
                                draw(state)
                            if validate_now:
                                evaluation = validate(state)
                unreadable |= set(batches.unreadable)

        # A run that was stopped at its last step is validated when it is resumed.
        finished = step >= last_step and not stopped
        if finished and evaluation is None and settings.validate_every:
            evaluation = validate(state, write=False)
        if unreadable:
            names = ", ".join(sorted(unreadable))
            warnings.append(f"{len(unreadable)} unreadable image(s): {names}")
        summary = _summarize(step, finished, evaluation, warnings)
        if primary:
            write_json(workdir / "summary.json", summary)
    return summary


def _reset_optimizer(
    experiment: Experiment, phase: Phase, state: TrainState
) -> TrainState:
    """Start a phase as if it was a run of its own, from the weights of a state."""
    opt_state = experiment.optimizer(phase).init(state.params)
    return parallel.replicate(dataclasses.replace(state, opt_state=opt_state))


def _summarize(
    step: int, finished: bool, evaluation: Evaluation | None, warnings: list[str]
) -> dict[str, Any]:
    """Make the content of ``summary.json``, with metrics of a finished run alone."""
    shown = evaluation if finished else None
    return {
        "step": step,
        "finished": finished,
        "validation": shown.mean() if shown else {},
        "table": shown.table() if shown else [],
        "warnings": warnings,
    }


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
