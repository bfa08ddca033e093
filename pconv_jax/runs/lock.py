"""A lock that keeps other processes out of a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from pconv_jax import _files
from pconv_jax._errors import RunError, UserError


@contextlib.contextmanager
def lock_folder(folder: Path, *, name: str, advice: str = "") -> Iterator[None]:
    """Lock a folder, by a file ``.lock`` in it.

    The lock of a process ends with the process, however that ends.

    Args:
      folder: The folder, which is made if it does not exist.
      name: What the errors call it, the argument that it comes from.
      advice: A sentence for people whose folder cannot be written to. By default none.

    Raises:
      UserError: If another process holds the lock.
      RunError: If the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"{name} {folder} is in use by another process: wait until it has ended, "
            f"or use another {name}."
        ) from error
    except OSError as error:
        reason = f"cannot write to {name} {folder}: {_files.describe_error(error)}."
        raise RunError(f"{reason} {advice}".rstrip()) from error
    with lock:
        yield
