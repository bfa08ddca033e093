"""The two errors that commands report as one sentence, without a traceback.

The core (the modules at the top level) and ``metrics`` raise plain `ValueError`, as JAX
and Flax do: there, a wrong shape is a mistake in a program, and its traceback is what
helps.
"""


class UserError(ValueError):
    """A user's mistake: in an argument, a setting or a file.

    The message names the argument, what was expected and what was given.
    """


class RunError(RuntimeError):
    """A failure of a run: a full disk, a dead worker, a loss that is NaN."""
