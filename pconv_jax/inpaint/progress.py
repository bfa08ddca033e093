"""Reports of how much of a task is done."""

from collections.abc import Callable

Progress = Callable[[float], object]
"""Called with the fraction of a task that is done, in [0, 1]."""


def ignore(fraction: float) -> None:
    """Report nothing."""
    del fraction


def share(progress: Progress, start: float, stop: float) -> Progress:
    """Report a task that is the part from ``start`` to ``stop`` of another one."""
    return lambda fraction: progress(float(start + (stop - start) * fraction))
