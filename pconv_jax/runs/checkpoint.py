"""Checkpoints of a training run that survive kills, bit rot and a change of machine.

Orbax writes them asynchronously, each step to a folder that appears when complete. This
module adds a checksum of every leaf, a fallback to the next older step where the newest
cannot be read, and an error where Orbax would drop a checkpoint in silence.

A checkpoint holds named items (``params``, ``batch_stats``, ``opt_state``,
``average``), each a pytree of arrays that can be read without the others, and ``meta``,
a dict that JSON can hold. Leaves are stored as NumPy arrays in nested dicts, so a
checkpoint can be read on any number of devices and without the optimizer's classes.
"""

import contextlib
import errno
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from pconv_jax import _files
from pconv_jax._errors import RunError, UserError
from pconv_jax._files import FileContentError
from pconv_jax.runs import parallel

PyTree = Any

# What Orbax, TensorStore and JSON raise for missing, cut and changed files; and for
# what says nothing about the checkpoint, which `_is_damage` tells apart.
_READ_ERRORS = (AttributeError, EOFError, LookupError, OSError, TypeError, ValueError)

_MISSING_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_MISSING = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
_TRANSIENT = re.compile(
    "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED"
)

# Types of the fields of a file in which Orbax keeps notes about a step. It stops at a
# field of another type, even if the step is not asked for.
_NOTES_FILE = "_CHECKPOINT_METADATA"
_NOTES = {
    "item_handlers": (dict, str, type(None)),
    "metrics": (dict, type(None)),
    "performance_metrics": (dict, type(None)),
    "init_timestamp_nsecs": (int, type(None)),
    "commit_timestamp_nsecs": (int, type(None)),
    "custom_metadata": (dict, type(None)),
}

_logger = logging.getLogger(__name__)


class Checkpoints:
    """Checkpoints in one directory; a context manager.

    Leaving the context waits until everything saved is on disk. With several hosts,
    every process makes the same calls on the same directory of a shared file system;
    process 0 writes.

    Example::

        with Checkpoints("runs/pconv/checkpoints", best_metric="psnr") as checkpoints:
            restored = checkpoints.restore({"params": params})
            ...
            checkpoints.save(1000, {"params": params}, metrics={"psnr": 28.3})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        best_metric: str | None = None,
    ):
        """Open a directory. It need not exist: the first `save` makes it.

        Args:
          directory: A local path. Each step is a folder in it, named by its number.
          keep: How many of the newest checkpoints to keep.
          best_metric: Name of a metric to maximize. The checkpoint with the best value
            is kept besides the newest. None keeps the newest only.

        Raises:
          UserError: If ``keep`` is less than 1.
          RunError: If a damaged checkpoint cannot be put aside.
        """
        if keep < 1:
            raise UserError(f"keep must be at least 1, got {keep}.")
        logging.getLogger("absl").addFilter(_is_logged)
        logging.getLogger("asyncio").addFilter(_is_about_more_than_writing)
        self._directory = pathlib.Path(os.path.abspath(directory))
        self._keep = keep
        self._best_metric = best_metric
        self._damaged: set[int] = set()
        self._put_aside_damaged_notes()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                create=False, preservation_policy=_Preserve(self._steps_to_keep)
            ),
        )
        # The step that was last saved or restored.
        self._current: int | None = None
        self._scores: dict[int, float] = {}
        for step in self.steps() if best_metric else ():
            # `restore` reports broken steps.
            with contextlib.suppress(FileContentError, RunError):
                self._note_score(step, self._read_record(step)["metrics"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything saved is on disk.

        Raises:
          RunError: If it cannot be written.
        """
        with self._write_errors():
            self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Return the newest step, or None if there is no checkpoint."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Return the step with the largest ``best_metric``, or None."""
        scored = [step for step in self.steps() if step in self._scores]
        return max(scored, key=self._scores.__getitem__, default=None)

    def metrics(self, step: int) -> dict[str, float]:
        """Read the metrics of an intact checkpoint; empty if it has none."""
        self._manager.wait_until_finished()
        return self._read_record(step)["metrics"]

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        *,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Start to write a checkpoint and return while it is being written.

        The items may be changed in place or donated once this returns.

        If a run was resumed from an older step, the next `save` deletes the newer ones
        and logs a warning. Those that are damaged are renamed, to ``2.unreadable``.

        Args:
          step: Not smaller than the step of the last `save` or `restore`.
          items: Pytrees of arrays by name; on several hosts, replicated ones.
          meta: A dict to store with them, which JSON can hold. The default is empty.
          metrics: Numbers by name. If ``best_metric`` is missing or NaN, the checkpoint
            is never the best one.

        Returns:
          True, or False if ``step`` was just saved or restored. Then ``metrics`` are
          added to its checkpoint, and nothing else is written.

        Raises:
          ValueError: If ``step`` is smaller than that of the last `save` or `restore`;
            if the directory holds checkpoints of ``step`` or later and none was
            restored, since another run would be overwritten; if JSON cannot hold
            ``meta``, or an item has a reserved name.
          RunError: If this checkpoint, or the one before it, cannot be written.
        """
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if step == self._current:
            if metrics:
                self._add_metrics(step, metrics)
            return False
        if reserved := {"meta", "metrics"} & set(items):
            raise ValueError(f"items must not be named {sorted(reserved)}: reserved.")
        record = {"meta": dict(meta or {}), "metrics": metrics}
        with self._write_errors():
            self._manager.wait_until_finished()
        self._prepare_to_save(step)

        flat = {name: _flatten(jax.device_get(tree)) for name, tree in items.items()}
        flat = {name: jax.tree.map(np.asarray, leaves) for name, leaves in flat.items()}
        record["leaves"] = {
            name: {path: _describe(leaf) for path, leaf in leaves.items()}
            for name, leaves in flat.items()
        }
        trees = {
            name: ocp.args.StandardSave(_nest(leaves))
            for name, leaves in flat.items()
            if leaves  # Orbax refuses empty trees; the record remembers them.
        }
        self._note_score(step, metrics)
        with self._write_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(meta=ocp.args.JsonSave(_seal(record)), **trees),
                force=True,  # Whether to save is the caller's decision, not Orbax's.
            )
        self._current = step
        return True

    def restore(
        self,
        targets: Mapping[str, PyTree] | Iterable[str],
        *,
        step: int | None = None,
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """Read the newest intact checkpoint.

        A checkpoint is damaged if its files are missing or of another form, or their
        checksums are wrong. It is skipped with a logged warning, and the next older one
        is tried.

        Args:
          targets: The items to read. Either pytrees by name, of arrays or
            `jax.ShapeDtypeStruct`s, that define structure, shapes and dtypes of the
            result; or only names, to get nested dicts as stored.
          step: The step to read. None reads the newest.

        Returns:
          The step, the items with NumPy leaves, and ``meta``; or None if there is no
          checkpoint at all and ``step`` is None.

        Raises:
          UserError: If there is no checkpoint of ``step``; if none can be read; or if
            the items of one differ from ``targets`` in structure or shapes: then the
            directory belongs to another configuration.
          RunError: If a checkpoint cannot be read for another reason than damage.
        """
        if not isinstance(targets, Mapping):
            targets = dict.fromkeys(targets)
        self._manager.wait_until_finished()
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(
                f"There is no checkpoint of step {step} in {self._directory}, "
                f"only of {steps}."
            )
        failures = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                record = self._read_record(candidate)
                stored = self._read_items(candidate, targets, record["leaves"])
            except FileContentError as error:
                self._damaged.add(candidate)
                reason = " ".join(str(error).split())[:200]
                failures.append(f"step {candidate}: {reason}")
                _logger.warning("Skipped an unreadable checkpoint, %s", failures[-1])
                continue
            self._require_match(candidate, stored, targets)
            self._current = candidate
            items = {name: _fit(stored[name], targets[name]) for name in targets}
            return candidate, items, record["meta"]
        if failures:
            raise UserError(
                f"None of the checkpoints tried in {self._directory} can be read: "
                + "; ".join(failures)
            )
        return None

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Name the directory where the disk is full, or the like."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                reason = _files.describe_error(error)
            elif code := _os_error(error):
                reason = os.strerror(code)
            else:
                raise
            raise RunError(f"cannot write to {self._directory}: {reason}.") from error

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Turn what Orbax raises into two kinds; the body should only call Orbax.

        Raises:
          FileContentError: If the checkpoint is damaged.
          RunError: If it cannot be read for another reason.
        """
        try:
            yield
        except _READ_ERRORS as error:
            if _is_damage(error):
                kind = type(error).__name__
                raise FileContentError(f"{kind}: {error or 'no message'}") from error
            raise RunError(
                f"cannot read the checkpoint of step {step} in {self._directory}: "
                f"{error}"
            ) from error

    def _put_aside_damaged_notes(self) -> None:
        """Rename the steps at whose notes Orbax would stop, on the first process."""
        if parallel.process_index() == 0:
            for notes in sorted(self._directory.glob(f"[0-9]*/{_NOTES_FILE}")):
                step = notes.parent.name  # Or what was put aside before.
                if step.isdecimal() and (problem := _notes_problem(notes)):
                    self._put_aside(int(step), f"{notes}: {problem}")
        # The others wait, whatever they see of it.
        parallel.gather(np.zeros(1))

    def _put_aside_damaged_steps(self) -> None:
        """Rename the newer steps that could not be read, on the first process."""
        if parallel.process_index() == 0:
            for step in sorted(s for s in self._damaged if s > (self._current or 0)):
                self._put_aside(step, "it could not be read")
        if parallel.gather(np.array([len(self._damaged)])).any():
            self._damaged.clear()
            self._manager.reload()

    def _put_aside(self, step: int, reason: str) -> None:
        """Rename the folder of a damaged step."""
        folder = self._directory / str(step)
        place = folder.with_name(f"{step}.unreadable")
        for number in itertools.count(1):
            if not place.exists():
                break
            place = folder.with_name(f"{step}.unreadable-{number}")
        try:
            folder.rename(place)
        except OSError as error:
            raise RunError(
                f"cannot put aside {folder}, which is damaged ({reason}): {error}."
            ) from error
        _logger.warning(
            "The damaged checkpoint of step %d is now %s (%s).", step, place, reason
        )

    def _prepare_to_save(self, step: int) -> None:
        """Make way for a step: put damaged ones aside, and delete newer ones."""
        if self._current is None:
            later = [other for other in self.steps() if other >= step]
            if later:
                raise ValueError(
                    f"Saving step {step} would overwrite the run in {self._directory}, "
                    f"which has checkpoints of steps {later}. Restore from it first, "
                    "or use another directory."
                )
            self._directory.mkdir(parents=True, exist_ok=True)
        elif step < self._current:
            raise ValueError(
                f"step must not be smaller than {self._current}, the last one saved or "
                f"restored, got {step}."
            )
        else:
            self._put_aside_damaged_steps()
            for other in [other for other in self.steps() if other > self._current]:
                _logger.warning(
                    "Deleting the checkpoint of step %d: the run was resumed "
                    "from step %d.",
                    other,
                    self._current,
                )
                self._manager.delete(other)
                self._scores.pop(other, None)
        if parallel.process_index() == 0:
            for path in self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path)

    def _add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._manager.wait_until_finished()
        record = self._read_record(step)
        record["metrics"] |= metrics
        if parallel.process_index() == 0:  # Orbax never writes to a step twice.
            path = self._directory / str(step) / "meta" / "metadata"
            _files.write_bytes(path, json.dumps(_seal(record)).encode())
        self._note_score(step, metrics)

    def _read_record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        with self._read_errors(step):
            record = self._manager.restore(step, args=args)["meta"]
        if not isinstance(record, dict):
            raise FileContentError("meta is not an object")
        if record.pop("crc32", None) != _seal(record)["crc32"]:
            raise FileContentError("wrong checksum of meta")
        return record

    def _read_items(
        self, step: int, names: Iterable[str], leaves: Mapping[str, Mapping]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Read the arrays, by path, of those named items that are stored."""
        flat = {name: {} for name in names if name in leaves}
        trees = {
            name: ocp.args.StandardRestore(_nest(_blank(leaves[name])))
            for name in flat
            if leaves[name]
        }
        if trees:
            with self._read_errors(step):
                read = self._manager.restore(step, args=ocp.args.Composite(**trees))
                flat |= {name: _flatten(read[name]) for name in trees}
        for name in flat:
            if flat[name].keys() != leaves[name].keys():
                raise FileContentError(f"{name} has other arrays than meta says")
            for path, leaf in flat[name].items():
                if _describe(leaf) != leaves[name][path]:
                    raise FileContentError(f"wrong checksum of {name}/{path}")
        return flat

    def _require_match(
        self,
        step: int,
        stored: Mapping[str, Mapping[str, np.ndarray]],
        targets: Mapping[str, PyTree | None],
    ) -> None:
        problem = None
        for name, target in targets.items():
            if name not in stored:
                problem = f"it has no item {name!r}"
            elif target is not None:
                problem = _first_difference(name, stored[name], _flatten(target))
            if problem:
                raise UserError(
                    f"The checkpoint of step {step} in {self._directory} belongs to "
                    f"another configuration: {problem}. Use the configuration it was "
                    "made with, or another directory."
                )

    def _note_score(self, step: int, metrics: Mapping[str, float]) -> None:
        score = float(metrics.get(self._best_metric or "", math.nan))
        if not math.isnan(score):
            self._scores[step] = score

    def _steps_to_keep(self, steps: Sequence[int]) -> set[int | None]:
        return {*sorted(steps)[-self._keep :], self.best_step()}


def restore_network(
    directory: str | os.PathLike[str],
    *,
    targets: Mapping[str, PyTree] | None = None,
    step: int | None = None,
) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
    """Read the network of a training run: its average, if the run has one.

    Args:
      directory: Directory of the checkpoints.
      targets: ``params`` and ``batch_stats``, as for `Checkpoints.restore`. By default
        they are read as stored.
      step: The step to read. None reads the newest intact one.

    Returns:
      The step, ``params`` and ``batch_stats``, and ``meta``; None if there is no
      checkpoint and ``step`` is None.

    Raises:
      UserError: As `Checkpoints.restore`.
    """
    targets = dict(targets or dict.fromkeys(("params", "batch_stats")))
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(targets | {"average": None}, step=step)
    if restored is None:
        return None
    step, items, meta = restored
    average = items.pop("average")
    return step, average or items, meta


class _Preserve:
    """Orbax's protocol for what to keep, around a function of the steps."""

    def __init__(self, steps_to_keep: Callable[[Sequence[int]], set[int | None]]):
        self._steps_to_keep = steps_to_keep

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self._steps_to_keep(steps)
        return [step in kept for step in steps]


def _is_damage(error: Exception) -> bool:
    """Return whether what reading raised is due to the content of the files."""
    if isinstance(error, OSError):
        return isinstance(error, _MISSING_ERRORS)
    if code := _os_error(error):
        return code in _MISSING
    return not _TRANSIENT.match(str(error))


def _os_error(error: Exception) -> int | None:
    """Get the number of the system's error in a message of TensorStore."""
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None


def _notes_problem(path: pathlib.Path) -> str | None:
    try:
        notes = json.loads(path.read_bytes())
    except FileNotFoundError:  # Another program has just renamed it.
        return None
    except ValueError:
        return None  # Orbax takes such a file for none.
    except RecursionError:
        return "it is nested too deeply"
    if not isinstance(notes, dict):
        return "it is no object"
    for name, types in _NOTES.items():
        value = notes.get(name)
        wrong = isinstance(value, int) and not 0 <= value < 2**63  # No time.
        if wrong or not isinstance(value, types):
            return f"its {name} is {value!r}"
    return None


def _is_logged(record: logging.LogRecord) -> bool:
    """Keep Orbax's progress reports, dozens a save, out of absl's log.

    Exceptions that it reports are raised as well.
    """
    is_news = record.levelno >= logging.ERROR and not record.exc_info
    return is_news or "orbax" not in record.pathname


def _is_about_more_than_writing(record: logging.LogRecord) -> bool:
    """Keep out that arrays could not be written; the first of them is an error."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, ValueError) and _os_error(error))


def _flatten(tree: PyTree) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): leaf for path, leaf in paths}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(flat, sep="/")


def _describe(leaf: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return {
        "shape": list(leaf.shape),
        "dtype": leaf.dtype.name,
        "crc32": zlib.crc32(data),
    }


def _blank(described: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Make arrays that tell Orbax to restore NumPy. Their memory is never touched."""
    return {
        path: np.empty(leaf["shape"], leaf["dtype"]) for path, leaf in described.items()
    }


def _seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record to what JSON reads back, and add its checksum."""
    try:
        text = json.dumps(record)
    except TypeError as error:
        raise ValueError(f"meta must be JSON-able, but: {error}.") from error
    plain: dict[str, Any] = json.loads(text)
    text = json.dumps(plain, sort_keys=True)
    return plain | {"crc32": zlib.crc32(text.encode())}


def _first_difference(
    name: str, stored: Mapping[str, np.ndarray], wanted: Mapping[str, Any]
) -> str | None:
    for path in {**wanted, **stored}:
        shapes = [np.shape(t[path]) if path in t else None for t in (stored, wanted)]
        if shapes[0] != shapes[1]:
            has, wants = ("nothing" if s is None else f"shape {s}" for s in shapes)
            return f"at {name}/{path} it has {has}, but wanted is {wants}"
    return None


def _fit(stored: Mapping[str, np.ndarray], target: PyTree | None) -> PyTree:
    if target is None:
        return _nest(stored)
    leaves = [
        stored[path].astype(getattr(wanted, "dtype", stored[path].dtype), copy=False)
        for path, wanted in _flatten(target).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)
