"""The directory of a run: which process may use it, and for which experiment."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.runs import parallel
from pconv_jax.runs.lock import lock_folder
from pconv_jax.runs.settings import Settings, differences


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keep other runs out of a workdir; each would resume the other's checkpoints.

    This happens if a command is given again before the run that it should resume has
    stopped.

    Raises:
      UserError: If another process holds the lock.
      RunError: If the workdir cannot be written to.
    """
    if parallel.process_index() > 0:  # The first process holds it for all.
        yield
        return
    readers = "'pconv eval --workdir ... --out ...' and 'pconv convert'"
    advice = f"A run is only read by {readers}."
    with lock_folder(workdir, name="workdir", advice=advice):
        _files.remove_partials(workdir, below=True)
        yield


def check_workdir(workdir: pathlib.Path, settings: Settings) -> None:
    """Check that a workdir is new, or belongs to this experiment.

    Raises:
      UserError: If its run has other settings, naming those that differ; or if its
        config.json cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        return  # `restore_or_create` compares those of the checkpoint.
    try:
        with _files.content_errors(OSError, RecursionError, ValueError):
            values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise UserError("it has no settings")
        old = Settings.from_json(values)
    except (_files.FileContentError, UserError) as error:
        raise UserError(
            f"workdir {workdir} has a config.json that cannot be read ({error}). Use "
            "another workdir; or delete it, since checkpoints have the settings, too."
        ) from error
    # As long as no step was saved, the settings may be corrected.
    if any((workdir / "checkpoints").glob("*")):
        refuse_differences(old, settings, workdir)


def refuse_differences(
    old: Settings, settings: Settings, workdir: pathlib.Path
) -> None:
    """Check that the settings of a run differ only in what may change on resume.

    Raises:
      UserError: If they do not, naming those that differ.
    """
    if changed := differences(old, settings):
        changes = "; ".join(f"{k}: {a!r}, now {b!r}" for k, (a, b) in changed.items())
        raise UserError(
            f"workdir {workdir} belongs to another configuration ({changes}). Use "
            "another workdir, or start from this one's weights with init_from."
        )
