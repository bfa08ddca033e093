"""The compilation cache of the commands.

JAX keeps what it compiles in a folder, so that only the first run of a command takes
that time. Only commands set it: programs that import the package choose for themselves.
"""

import argparse
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from pconv_jax import _files
from pconv_jax._errors import UserError

_MAX_BYTES = 2**28  # A thousand programs of 0.1 to 0.5 MB.
_MIN_SECONDS = 0.1  # What compiles faster is not kept.


def add_cache(command: argparse.ArgumentParser) -> None:
    """Add the option ``--no-cache``."""
    command.add_argument(
        "--no-cache",
        action="store_true",
        help="compile anew, and keep nothing for the next run (default: compiled "
        "programs are kept in the user's cache folder, or in "
        "JAX_COMPILATION_CACHE_DIR)",
    )


def use_cache(arguments: argparse.Namespace) -> None:
    """Let JAX keep what it compiles, unless the user decided otherwise.

    A folder that cannot be used makes a command slower, and nothing else.

    Args:
      arguments: Those of a command with `add_cache`.
    """
    import jax

    if arguments.no_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = _find_folder()
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache", UserWarning
    )


def _find_folder() -> Path | None:
    """Find the folder, and make it; None if it cannot be used."""
    try:
        folder = _files.cache_folder() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        # Programs of another user, such as one who called sudo, are not run.
        foreign = hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()
        full = shutil.disk_usage(folder).free < 2 * _MAX_BYTES
    except (OSError, UserError):
        return None
    return None if foreign or full else folder
