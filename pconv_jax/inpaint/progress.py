"""Reports of how much of a task is done."""

from collections.abc import Callable

import numpy as np

Progress = Callable[[float], object]
"""Called with the fraction of a task that is done, in [0, 1]."""


def ignore(fraction: float) -> None:
    """Report nothing."""
    del fraction


def share(
    progress: Progress,
    start: float | np.integer,
    stop: float | np.integer,
    *,
    total: float | np.integer = 1,
) -> Progress:
    """Report a task that is the part from ``start`` to ``stop`` of another one.

    Args:
      progress: Reports the other task.
      start: What was done of it before.
      stop: What will be done of it.
      total: All of it. The default is 1.
    """
    return lambda fraction: progress(float((start + (stop - start) * fraction) / total))
