"""The phases of training, each with its own optimizer and loss."""

from typing import Any, NamedTuple

import numpy as np

from pconv_jax.runs.settings import PhaseSettings, Settings
from pconv_jax.train import optim
from pconv_jax.train.step import Scales


class Phase(NamedTuple):
    """A stretch of training with its own optimizer.

    Attributes:
      name: Name for people.
      start: Number of updates before the phase.
      stop: Number of updates after it.
      learning_rate: Largest learning rate of Adam.
      schedule: Learning rate over the phase, see `optim.schedule_factor`. The default
        is ``'constant'``.
      warmup_steps: Updates over which the learning rate rises. The default is 0.
      use_features: Whether the loss has the perceptual and style terms, where there is
        a VGG. The default is True.
      ramp_steps: Updates over which their weights rise. The default is 0.
      freeze_encoder_norm: Whether the encoder's batch normalization is frozen. The
        default is False.
    """

    name: str
    start: int
    stop: int
    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 0
    use_features: bool = True
    ramp_steps: int = 0
    freeze_encoder_norm: bool = False

    def scales(self, step: int) -> Scales:
        """Compute the factors of the update after ``step`` updates of the run."""
        done = step - self.start
        factor = optim.schedule_factor(
            done,
            steps=self.stop - self.start,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
        )
        # The same rise as the learning rate's.
        features = optim.schedule_factor(
            done, steps=self.stop - self.start, warmup_steps=self.ramp_steps
        )
        return Scales(np.asarray(factor, np.float32), np.asarray(features, np.float32))


def get_phases(settings: Settings) -> tuple[Phase, ...]:
    """Make the phases of training, any of which may be empty."""
    pixels, first, second = settings.pixels, settings.phase1, settings.phase2
    middle = pixels.steps + first.steps
    return (
        _phase("pixels", 0, pixels, use_features=False),
        _phase("phase1", pixels.steps, first, ramp_steps=first.ramp_steps),
        _phase("phase2", middle, second, freeze_encoder_norm=True),
    )


def _phase(name: str, start: int, settings: PhaseSettings, **fields: Any) -> Phase:
    return Phase(
        name=name,
        start=start,
        stop=start + settings.steps,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        **fields,
    )
