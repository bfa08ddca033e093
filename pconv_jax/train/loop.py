"""Training, from an experiment to its last checkpoint.

A workdir holds all of a run: ``config.json``, ``checkpoints/``, ``metrics.jsonl``,
``tensorboard/``, ``pictures/`` and ``summary.json``. Started again in the same workdir,
a run goes on where it stopped, and ends with the same weights as one that was never
stopped: what a step sees depends on nothing but its number. On CPUs they are the same
bit for bit; on GPUs as far as XLA computes the same twice, for which it has to be told
``--xla_gpu_deterministic_ops=true`` in ``XLA_FLAGS``.
"""

import contextlib
import functools
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import traverse_util
from ml_collections import ConfigDict

from pconv_jax import losses, masks, unet, vgg
from pconv_jax.data import pipeline
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.evaluate import results, runner
from pconv_jax.runs import opening, parallel, settings
from pconv_jax.runs.checkpoint import Checkpoints, restore_network
from pconv_jax.runs.inference import Metrics
from pconv_jax.runs.output import format_table, write_json
from pconv_jax.train import optim
from pconv_jax.train.loggers import MetricWriter, Progress
from pconv_jax.train.step import TrainState, create_state, train_step
from pconv_jax.unet import PConvUNet
from pconv_jax.weights import pretrained
from pconv_jax.weights.formats.arrays import checksum
from pconv_jax.weights.vgg import load_vgg_params

_ITEMS = ("params", "batch_stats", "opt_state", "average")
_BORDERS = {"any": None, "always": True, "never": False}


class TrainingDivergedError(RuntimeError):
    """A loss or a gradient is not finite."""


class Phase(NamedTuple):
    """A stretch of training with an optimizer of its own, from step to step."""

    name: str
    start: int
    stop: int
    learning_rate: float
    freeze_encoder_norm: bool


def get_phases(config: ConfigDict) -> tuple[Phase, Phase]:
    """Returns the two phases of the paper, either of which may be empty."""
    first, second = config.phase1, config.phase2
    stop = first.steps + second.steps
    return (
        Phase("phase1", 0, first.steps, first.learning_rate, False),
        Phase("phase2", first.steps, stop, second.learning_rate, True),
    )


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    model: PConvUNet | None = None,
) -> dict[str, Any]:
    """Trains a network, or goes on training it, and validates it.

    Args:
      config: the experiment, see `settings.default_config`.
      workdir: of the run; made if it is not there.
      model: the network, if it is another one than the experiment's.

    Returns:
      What is written to ``summary.json`` too: ``step``; ``finished``, False if the run
      was asked to stop before its last step; if finished, ``validation``, the mean
      metrics at the last step, and ``table``, those of each hole bin; ``warnings``.

    Raises:
      ValueError: if the experiment makes no sense, or is not the one that the workdir
        belongs to; if its pictures or weights are not to be had; or if another process
        trains in the workdir.
      TrainingDiverged: if a loss is not finite, naming the term and the step. The
        newest checkpoint is from before.
    """
    settings.check(config)
    parallel.check_batch_size(config.batch_size, parts=config.accumulate)
    workdir = pathlib.Path(workdir)
    _check_workdir(workdir, config)
    model = model or opening.get_model(config)
    with (
        _Run(config, workdir, model) as run,
        parallel.stop_requests() as stop_requested,
    ):
        run.write_json("config.json", config.to_dict())
        run.catch_up()
        for phase in get_phases(config):
            run.train(phase, stop_requested)
        return run.summarize()


def default_workdir(config_filename: str) -> str:
    """Returns ``runs/pconv-quickstart`` for ``configs/pconv.py:quickstart``."""
    path, _, variant = config_filename.partition(":")
    name = pathlib.Path(path).stem
    return f"runs/{name}-{variant}" if variant else f"runs/{name}"


def format_summary(summary: Mapping[str, Any], workdir: str | pathlib.Path) -> str:
    """Returns what `train_and_evaluate` returned, for people."""
    if summary["finished"]:
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in summary["validation"].items())
        lines = [format_table(summary["table"], decimals=3), ""]
        lines += [f"Finished at step {summary['step']}. Validation: {numbers}."]
    else:
        lines = [f"Stopped at step {summary['step']}, to go on by the same command."]
    lines += [f"Checkpoints, metrics and pictures are in {workdir}."]
    return "\n".join(lines + [f"WARNING: {w}" for w in summary["warnings"]])


class _Run:
    """A run under way: its state, and what it reads from and writes to."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, model: PConvUNet):
        self.config = config
        self.workdir = workdir
        self.primary = parallel.process_index() == 0
        self.warnings: list[str] = []
        self.unreadable: set[str] = set()
        self.model = model
        self.train_source = opening.get_source(config, "train")
        self.validation_source = opening.get_source(config, "validation")
        feature_params, features = self._load_feature_params()
        self.identity = {
            "network": type(self.model).__name__,
            "model": unet.model_config(self.model),
            "features": features,
        }
        self._check_processes()
        self.features = feature_params and functools.partial(
            vgg.feature_fn_for(feature_params), dtype=self.model.dtype
        )
        self.feature_params = parallel.replicate(feature_params)
        self.phase_ends = [phase.stop for phase in get_phases(config)]
        self.last_step = self.phase_ends[-1]
        self.stopped = False
        self.evaluation: results.Evaluation | None = None
        self.scalars: list[Metrics] = []  # Since the last line of the log.
        with contextlib.ExitStack() as stack:
            if self.primary:  # It is there for all processes of the run.
                stack.enter_context(_lock(workdir))
            self.checkpoints = stack.enter_context(
                Checkpoints(
                    workdir / "checkpoints",
                    keep=config.keep_checkpoints,
                    best_metric="psnr",
                )
            )
            self.state = parallel.replicate(self._restore_or_create())
            self.step = int(self.state.step)
            self.writer = stack.enter_context(
                MetricWriter(workdir, first_step=self.step + 1, enabled=self.primary)
            )
            self.progress = stack.enter_context(
                Progress(self.last_step, self.step, enabled=self.primary)
            )
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def catch_up(self) -> None:
        """Draws and validates what the run that was stopped at this step did not."""
        if not self.step:
            return
        drawn = self.writer.picture_path(self.step, "validation").exists()
        if self._due("picture") and not drawn:
            self._draw_pictures()
        if self._due("validate") and not self.checkpoints.metrics(self.step):
            self._validate()

    def train(self, phase: Phase, stop_requested: Callable[[int], bool]) -> None:
        """Trains until the phase ends or the run is asked to stop."""
        if self.stopped or self.step >= phase.stop:
            return
        self.progress.write(f"{phase.name}: to step {phase.stop}")
        if self.step == phase.start > 0:
            # As if the phase was a run of its own, started from the other's weights.
            opt_state = self._optimizer(phase).init(self.state.params)
            self.state = parallel.replicate(self.state.replace(opt_state=opt_state))
        train_step = self._compile(phase)
        compiled = False
        with contextlib.closing(self._open_batches()) as batches:
            while self.step < phase.stop and not self.stopped:
                batch = next(batches)
                self.state, scalars = train_step(self.state, batch, self.feature_params)
                self.step += 1
                self.scalars.append(scalars)
                if not compiled:
                    jax.block_until_ready(scalars)
                    self._start_clock()
                    compiled = True
                self.stopped = stop_requested(self.step)
                self._after_step(phase)
            self.unreadable |= set(batches.unreadable)

    def summarize(self) -> dict[str, Any]:
        """Ends the run: validates if that was not done yet, and sums up."""
        # A run that was stopped at its last step is still to be validated.
        finished = self.step >= self.last_step and not self.stopped
        if finished and not self.evaluation:
            self._validate(write=False)  # The run that came here first has done it.
        if self.unreadable:
            names = ", ".join(sorted(self.unreadable))
            self._warn(f"{len(self.unreadable)} unreadable picture(s): {names}")
        summary = {
            "step": self.step,
            "finished": finished,
            "validation": self.evaluation.mean() if finished else {},
            "table": self.evaluation.table() if finished else [],
            "warnings": self.warnings,
        }
        self.write_json("summary.json", summary)
        return summary

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file into the workdir."""
        if self.primary:
            write_json(self.workdir / name, value)

    def _compile(self, phase: Phase) -> Callable[..., Any]:
        config = self.config
        draw_mask = functools.partial(
            masks.random_mask,
            shape=(config.image_size,) * 2,
            hole_ratio=tuple(config.masks.hole_ratio),
            kind=config.masks.kind,
            border=_BORDERS[config.masks.border],
        )
        return parallel.compile_train_step(
            functools.partial(
                train_step,
                model=self.model,
                optimizer=self._optimizer(phase),
                apply_features=self.features,
                loss_weights=losses.LossWeights(**config.loss),
                draw_mask=draw_mask,
                freeze_encoder_norm=phase.freeze_encoder_norm,
                accumulate=config.accumulate,
                average_decay=config.average_decay,
            )
        )

    def _optimizer(self, phase: Phase) -> optax.GradientTransformation:
        frozen = self.model.encoder_norms if phase.freeze_encoder_norm else ()
        return optim.make_optimizer(phase.learning_rate, frozen=frozen)

    def _open_batches(self) -> pipeline.TrainBatches:
        config, mask_folder = self.config, None
        if config.masks.folder:
            mask_folder = MaskFolder(
                config.masks.folder,
                hole=config.masks.hole,
                hole_ratio=tuple(config.masks.hole_ratio),
            )
        return pipeline.train_batches(
            self.train_source,
            batch_size=config.batch_size,
            image_size=config.image_size,
            seed=config.seed,
            start_step=self.step,
            process_index=parallel.process_index(),
            process_count=parallel.process_count(),
            workers=config.data.workers,
            scale=tuple(config.data.scale),
            mask_folder=mask_folder,
        )

    def _after_step(self, phase: Phase) -> None:
        """Logs, draws, validates and saves, whatever is due."""
        self.progress.update()
        if self._due("log") or self.stopped:
            self._log(phase)
        if self.stopped:  # Whoever asked may not wait for long: see `catch_up`.
            self._save()
            return
        due = {
            name for name in ("picture", "validate", "checkpoint") if self._due(name)
        }
        if not due:
            return
        self._wait_for_scalars()
        paused = time.monotonic()
        if due & {"validate", "checkpoint"}:
            self._save()  # First, so that nothing is lost by a kill during the rest.
        if "picture" in due:
            self._draw_pictures()
        if "validate" in due:
            self._validate()
        self.started += time.monotonic() - paused

    def _due(self, event: str) -> bool:
        """Returns whether something is done at this step: where a phase ends, all."""
        every = self.config[f"{event}_every"]
        return self.step % every == 0 or self.step in self.phase_ends

    def _start_clock(self) -> None:
        """Starts to measure the pace of training alone, from this step on."""
        self.started, self.started_step = time.monotonic(), self.step

    def _wait_for_scalars(self) -> None:
        """Brings the numbers of the last steps to the host, and looks at them."""
        self.scalars = jax.device_get(self.scalars)
        first = self.step - len(self.scalars) + 1
        for step, scalars in enumerate(self.scalars, first):
            for name, value in scalars.items():
                if not np.isfinite(value):
                    raise TrainingDivergedError(
                        f"{name} is {value} at step {step}. The newest checkpoint is "
                        f"of step {self.checkpoints.latest_step()}; a smaller learning "
                        "rate, or another seed, may get the run past this point."
                    )

    def _log(self, phase: Phase) -> None:
        self._wait_for_scalars()
        scalars = {
            name: float(np.mean([s[name] for s in self.scalars], dtype=np.float64))
            for name in self.scalars[0]
        }
        scalars["learning_rate"] = phase.learning_rate
        if images := (self.step - self.started_step) * self.config.batch_size:
            seconds = time.monotonic() - self.started
            scalars["images_per_second"] = images / seconds
        self.progress.set_postfix(scalars)
        self.writer.write_scalars(
            self.step, {f"train/{name}": value for name, value in scalars.items()}
        )
        self.scalars = []
        self._start_clock()

    def _save(self, metrics: Mapping[str, float] | None = None) -> None:
        self._wait_for_scalars()
        items = {name: getattr(self.state, name) for name in _ITEMS}
        meta = {"config": self.config.to_dict(), "warnings": self.warnings}
        meta |= self.identity
        self.checkpoints.save(self.step, items, meta=meta, metrics=metrics)

    def _draw_pictures(self) -> None:
        if self.primary:
            picture = runner.draw_pictures(
                self.model,
                self.state.variables,
                self.validation_source,
                image_size=self.config.image_size,
            )
            self.writer.write_picture(self.step, "validation", picture)

    def _validate(self, *, write: bool = True) -> None:
        """Validates, and unless it is for the summary alone, saves what came out."""
        self.evaluation = runner.evaluate(
            self.model,
            self.state.variables,
            self.validation_source,
            image_size=self.config.image_size,
            examples=self.config.validation_examples,
            progress=self.primary,
        )
        mean = self.evaluation.mean()
        if write:
            self.writer.write_scalars(
                self.step, {f"validation/{name}": x for name, x in mean.items()}
            )
            self._save(mean)
        numbers = "  ".join(f"{name} {x:.4g}" for name, x in mean.items())
        self.progress.write(f"validation at step {self.step}: {numbers}")

    def _restore_or_create(self) -> TrainState:
        """Returns the state of the newest checkpoint, or else the first one."""
        create = functools.partial(
            create_state,
            jax.random.key(self.config.seed),
            model=self.model,
            optimizer=self._optimizer(get_phases(self.config)[0]),
            image_size=self.config.image_size,
            average=self.config.average_decay > 0,
        )
        shapes = jax.eval_shape(create)
        targets = {name: getattr(shapes, name) for name in _ITEMS}
        restored = self.checkpoints.restore(targets)
        step = restored[0] if restored else -1
        if any(parallel.gather(np.array([step])) != step):
            raise ValueError(
                "the processes of this run cannot read the same checkpoint in "
                f"{self.workdir / 'checkpoints'}; is it on a common file system?"
            )
        if restored:
            step, items, meta = restored
            self._check_network(meta, f"workdir {self.workdir}")
            self._check_features(meta)
            logging.info("Going on from step %d.", step)
            return TrainState(step=jnp.asarray(step, jnp.int32), **items)
        state = create()
        if not self.config.init_from:
            return state
        variables = self._read_network(pathlib.Path(self.config.init_from), targets)
        return state.replace(
            **variables, average=dict(variables) if state.average else {}
        )

    def _check_processes(self) -> None:
        """Checks that all processes are about to train the same, by the same loss."""
        pictures = len(self.train_source), len(self.validation_source)
        config = self.config.to_dict()
        del config["data"]  # It may lie elsewhere.
        about = json.dumps([config, self.identity, pictures])
        digest = np.array([zlib.crc32(about.encode())], np.uint32)
        if any(parallel.gather(digest) != digest):
            raise ValueError(
                "the processes of this run differ in the configuration, in the VGG "
                f"features (here: {self.identity['features']}), or in the number of "
                f"pictures (here: {pictures[0]} to train on, {pictures[1]} to "
                "validate): start all of them with the same."
            )

    def _check_network(self, meta: Mapping[str, Any], what: str) -> None:
        ours = self.identity["network"]
        if (theirs := meta.get("network", ours)) != ours:
            raise ValueError(f"{what} is of a {theirs}, not a {ours}.")
        if differences := unet.model_differences(meta.get("model"), self.model):
            raise ValueError(
                f"{what} is of a network of other {', '.join(differences)}. Give that "
                "network as model, or name another run."
            )

    def _check_features(self, meta: Mapping[str, Any]) -> None:
        ours = self.identity["features"]
        if (theirs := meta.get("features", ours)) != ours:
            raise ValueError(
                f"workdir {self.workdir} was trained with other VGG features: "
                f"{theirs}, now {ours}. What vgg = {self.config.vgg!r} finds may have "
                "changed; name the file, or use another workdir."
            )

    def _read_network(self, source: pathlib.Path, targets: Any) -> dict[str, Any]:
        if source.suffix == ".safetensors" or source.is_file():
            return self._read_release()
        directory = source / "checkpoints"
        targets = {name: targets[name] for name in ("params", "batch_stats")}
        restored = restore_network(directory, targets=targets)
        if not restored:
            raise ValueError(f"init_from: there is no checkpoint in {directory}.")
        _, variables, meta = restored
        self._check_network(meta, f"init_from: {source}")
        return variables

    def _read_release(self) -> dict[str, Any]:
        release = pretrained.from_pretrained(self.config.init_from)
        config = unet.model_config(release.model)
        if differences := unet.model_differences(config, self.model):
            raise ValueError(
                f"init_from: the network of {self.config.init_from} has other "
                f"{', '.join(differences)} than the experiment's, which config.model "
                "sets; it has "
                f"{len(release.model.encoder)} encoder stages of "
                f"{[stage.features for stage in release.model.encoder]} features and "
                f"the normalization {release.model.normalization}."
            )
        return release.variables

    def _load_feature_params(self) -> tuple[vgg.Params | None, str | None]:
        """Returns the parameters, and what tells them from others."""
        source = self.config.vgg
        if source == "none":
            return None, None
        try:
            params = load_vgg_params("imagenet" if source == "auto" else source)
        except ValueError as error:
            if source != "auto":
                raise
            self._warn(
                "The perceptual and style terms are those of a RANDOM VGG16, which is "
                f"no substitute for a trained one. {error}"
            )
            # Not of their bits, of which the last ones are the machine's.
            return jax.jit(vgg.random_params)(jax.random.key(0)), "random"
        return params, checksum(traverse_util.flatten_dict(params, sep="/"))

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        logging.warning(warning)


def _lock(workdir: pathlib.Path) -> contextlib.AbstractContextManager[object]:
    """Keeps other runs out: each would take up the other's checkpoints as its own.

    Such as the same command, given again before the run that was asked to stop has
    stopped. However a process ends, its lock ends with it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(workdir / ".lock").acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"workdir {workdir} is in use by a process that trains there: wait until "
            "it has ended, or use another workdir."
        ) from error


def _check_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Checks that a workdir is new, or this experiment's."""
    path = workdir / "config.json"
    if not path.exists() or not any((workdir / "checkpoints").glob("*")):
        return  # It has come to nothing yet: what was said may have been a mistake.
    changed = settings.differences(json.loads(path.read_text()), config.to_dict())
    if changed:
        changes = "; ".join(f"{k}: {a!r}, now {b!r}" for k, (a, b) in changed.items())
        raise ValueError(
            f"workdir {workdir} belongs to another configuration ({changes}). Use "
            "another workdir, or start from this one's weights with init_from."
        )
