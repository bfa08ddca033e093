"""What happens between steps of training: log, save, draw and validate."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pconv_jax._errors import RunError
from pconv_jax.data.base import ImageSource
from pconv_jax.evaluate import runner
from pconv_jax.evaluate.examples import draw_examples
from pconv_jax.evaluate.results import Evaluation
from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.train.loggers import MetricWriter, Progress
from pconv_jax.train.restore import ITEMS
from pconv_jax.train.step import Metrics, TrainState
from pconv_jax.unet import PConvUNet


class TrainingDivergedError(RunError):
    """A loss or a gradient is not finite."""


class Log:
    """Averages the scalars of the steps since the last line, and measures the pace.

    Scalars stay on the device until a line, a checkpoint or a validation is due, so
    that steps do not wait for the host.
    """

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        checkpoints: Checkpoints,
        *,
        batch_size: int,
        step: int,
        pending: Sequence[Mapping[str, Any]] = (),
    ):
        """Start a log.

        Args:
          writer: Where lines go.
          progress: The progress bar.
          checkpoints: Checkpoints of the run, for the error of a diverged run.
          batch_size: Images of a step.
          step: Step that the run starts from.
          pending: Scalars of the steps before, if no line has them. By default none.
        """
        self._writer = writer
        self._progress = progress
        self._checkpoints = checkpoints
        self._batch_size = batch_size
        self._step = step
        self._scalars: list[Mapping[str, Any]] = list(pending)
        self._started: float | None = None
        self._started_step = step

    @property
    def pending(self) -> list[dict[str, float]]:
        """The scalars of the steps since the last line, to be saved with a state."""
        self.wait()
        return [{name: float(x) for name, x in s.items()} for s in self._scalars]

    def start_phase(self) -> None:
        """Exclude the next step from the pace, because it compiles."""
        self._started = None

    def add(self, *scalars: Metrics) -> None:
        """Take the scalars of the next steps, which one call made."""
        self._step += len(scalars)
        self._scalars += scalars
        self._progress.update(len(scalars))
        if self._started is None:
            jax.block_until_ready(scalars)
            self._start_clock()

    def wait(self) -> None:
        """Wait for the steps so far, and check their scalars.

        Raises:
          TrainingDivergedError: If one is not finite, naming it and its step.
        """
        self._scalars = jax.device_get(self._scalars)
        first = self._step - len(self._scalars) + 1
        for step, scalars in enumerate(self._scalars, first):
            for name, value in scalars.items():
                if not np.isfinite(value):
                    newest = self._checkpoints.latest_step()
                    saved = (
                        "There is no checkpoint yet"
                        if newest is None
                        else f"The newest checkpoint is of step {newest}"
                    )
                    raise TrainingDivergedError(
                        f"{name} is {value} at step {step}. {saved}; a smaller "
                        "learning rate, or another seed, may get the run past this "
                        "point."
                    )

    def write(self, *, learning_rate: float) -> None:
        """Write a line with the means of the scalars since the last one."""
        self.wait()
        scalars = {
            name: float(np.mean([s[name] for s in self._scalars], dtype=np.float64))
            for name in self._scalars[0]
        }
        scalars["learning_rate"] = learning_rate
        images = (self._step - self._started_step) * self._batch_size
        if images and self._started is not None:
            scalars["images_per_second"] = images / (time.monotonic() - self._started)
        self._progress.set_postfix(scalars)
        self._writer.write_scalars(
            self._step, {f"train/{name}": value for name, value in scalars.items()}
        )
        self._scalars = []
        self._start_clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside from the pace."""
        self.wait()
        paused = time.monotonic()
        yield
        if self._started is not None:
            self._started += time.monotonic() - paused

    def _start_clock(self) -> None:
        self._started, self._started_step = time.monotonic(), self._step


class Save:
    """Saves checkpoints, after the log of the steps before them."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        *,
        meta: Mapping[str, Any],
    ):
        """Prepare to save.

        Args:
          checkpoints: Where to.
          writer: The log.
          meta: What every checkpoint says about its run.
        """
        self._checkpoints = checkpoints
        self._writer = writer
        self._meta = meta

    def __call__(
        self,
        state: TrainState,
        *,
        pending: Sequence[Mapping[str, float]] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save a state; or add metrics to its checkpoint, if it was just saved.

        Args:
          state: The state.
          pending: `Log.pending`, of which a resumed run makes the next line.
          metrics: Metrics of the state. By default none.
        """
        self._writer.flush()
        items = {name: getattr(state, name) for name in ITEMS}
        meta = {**self._meta, "pending": list(pending)}
        self._checkpoints.save(int(state.step), items, meta=meta, metrics=metrics)

    def has_metrics(self, step: int) -> bool:
        """Return whether the checkpoint of a step has metrics."""
        return bool(self._checkpoints.metrics(step))


class Draw:
    """Draws a grid of validation images: input, output, composite and truth."""

    def __init__(
        self,
        writer: MetricWriter,
        *,
        model: PConvUNet,
        source: ImageSource,
        image_size: int,
    ):
        """Prepare to draw.

        Args:
          writer: Where to.
          model: The network.
          source: The validation images.
          image_size: Side of the images, in pixels.
        """
        self._writer = writer
        self._model = model
        self._source = source
        self._image_size = image_size

    def is_done(self, step: int) -> bool:
        """Return whether the grid of a step has been drawn."""
        return self._writer.image_path(step, "validation").exists()

    def __call__(self, state: TrainState) -> None:
        """Draw the grid of a state."""
        if not self._writer.enabled:  # Only the first process draws.
            return
        grid = draw_examples(
            self._model, state.variables, self._source, image_size=self._image_size
        )
        self._writer.write_image(int(state.step), "validation", grid)


class Validate:
    """Evaluates the network on the validation images."""

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        save: Save,
        *,
        model: PConvUNet,
        source: ImageSource,
        image_size: int,
        examples: int,
    ):
        """Prepare to validate.

        Args:
          writer: Where the means of the metrics go.
          progress: The progress bar, which shows them.
          save: Adds them to the checkpoint.
          model: The network.
          source: The validation images.
          image_size: Side of the images, in pixels.
          examples: Examples of each hole bin, with and without holes at the border.
        """
        self._writer = writer
        self._progress = progress
        self._save = save
        self._model = model
        self._source = source
        self._image_size = image_size
        self._examples = examples

    def is_done(self, step: int) -> bool:
        """Return whether a step has been validated."""
        return self._save.has_metrics(step)

    def __call__(self, state: TrainState, *, write: bool = True) -> Evaluation:
        """Validate a state.

        Args:
          state: The state.
          write: Whether to log the result and add it to the checkpoint; False where an
            earlier run has done so.
        """
        evaluation = runner.evaluate_network(
            self._model,
            state.variables,
            self._source,
            image_size=self._image_size,
            examples=self._examples,
            progress=self._writer.enabled,
        )
        step, mean = int(state.step), evaluation.mean()
        if write:
            self._writer.write_scalars(
                step, {f"validation/{name}": x for name, x in mean.items()}
            )
            self._save(state, metrics=mean)
        numbers = "  ".join(f"{name} {x:.4g}" for name, x in mean.items())
        self._progress.write(f"validation at step {step}: {numbers}")
        return evaluation
