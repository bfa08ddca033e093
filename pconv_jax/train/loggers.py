"""Logs of a training run: JSON lines, TensorBoard and a progress bar."""

import functools
import json
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, Self, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from pconv_jax import _files
from pconv_jax.runs.pictures import write_png

P = ParamSpec("P")
R = TypeVar("R")

_LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class MetricWriter:
    """Writes the metrics and images of a run; a context manager.

    The files in the run's directory are:

    * ``metrics.jsonl``: one object a line, with ``step``, ``time`` (seconds since the
      epoch) and the scalars. A scalar that is not finite is ``null``, because JSON has
      neither NaN nor infinity.
    * ``pictures/{name}_{step:07d}.png``.
    * ``tensorboard/``: both, without the scalars that are not finite.

    Attributes:
      enabled: Whether anything is written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        first_step: int | None = None,
        enabled: bool = True,
    ):
        """Open the files of a new run, or append to those of an older one.

        Args:
          workdir: The run's directory.
          first_step: The first step that will be written. Lines that a killed run left
            of this step and of later ones are dropped, so that no step appears twice.
            None keeps all lines.
          enabled: Whether anything is written. In a run of several processes only the
            first one writes.
        """
        self.enabled = enabled
        self._tensorboard: _EventFile | None = None
        workdir = pathlib.Path(workdir)
        self._pictures = workdir / "pictures"
        if not enabled:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = path = workdir / "metrics.jsonl"
        # Steps and names of the lines that are there.
        self._written: set[tuple[int, frozenset[str]]] = set()
        with _files.write_errors(self._path):
            if path.exists():
                lines = list(_lines_before(path.read_bytes(), first_step))
                _files.write_bytes(path, b"".join(lines))
                self._written = {_identify(json.loads(line)) for line in lines}
            self._file = path.open("a", encoding="utf-8")
            self._tensorboard = _EventFile(workdir / "tensorboard", first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write pending events and close the files."""
        if self._tensorboard:
            with _files.write_errors(self._path):
                self._file.close()
                self._tensorboard.close()

    def flush(self) -> None:
        """Bring everything written so far to the disk.

        Raises:
          RunError: If it cannot be written.
        """
        if self._tensorboard:
            with _files.write_errors(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._tensorboard.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line.

        Args:
          step: The step of the scalars.
          scalars: Numbers by name, such as ``'train/loss'`` or ``'validation/psnr'``.
            If a killed run has left a line of this step and these names, it stays.

        Raises:
          RunError: If the line cannot be written.
        """
        if not self._tensorboard:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        finite = {name: x for name, x in scalars.items() if math.isfinite(x)}
        line = {"step": int(step), "time": time.time()}
        line |= {name: finite.get(name) for name in scalars}
        if _identify(line) not in self._written:
            self._written.add(_identify(line))
            with _files.write_errors(self._path):
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                self._file.flush()
        with _files.write_errors(self._path):
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image, complete or not at all.

        Args:
          step: The step of the image.
          name: Name of the image; a ``/`` makes a folder.
          image: uint8 ``[H, W, 3]``.

        Raises:
          ValueError: If the image has another shape or dtype.
        """
        if not self._tensorboard:
            return
        write_png(self.image_path(step, name), image)
        with _files.write_errors(self._path):
            self._tensorboard.add_image(name, image, step)
            self._tensorboard.flush()

    def image_path(self, step: int, name: str) -> pathlib.Path:
        """Get the path of the file that `write_image` writes."""
        return self._pictures / f"{name}_{step:07d}.png"


class _EventFile:
    """A file of TensorBoard, written at once.

    The writer that tensorboardX offers has a thread, which loses what is pending if the
    process is killed, and waits forever on a full disk.
    """

    def __init__(self, directory: pathlib.Path, first_step: int | None):
        directory.mkdir(parents=True, exist_ok=True)
        tensorboardx = _import_tensorboardx()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        # Its classes are made when it is imported, and pyright does not see them.
        self._protos: Any = event_pb2
        self._summary = tensorboardx.summary
        # Names differ by the second only: a quick restart would overwrite.
        name = str(directory / "events")
        self._writer = EventsWriter(name, filename_suffix=f".{time.time_ns()}")
        if first_step is not None:
            # TensorBoard forgets what older files have of this step and later ones.
            session_log = self._protos.SessionLog
            start = session_log(status=session_log.START)
            self._add(first_step, session_log=start)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step, summary=self._summary.scalar(name, value))

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        self._add(step, summary=self._summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        event = self._protos.Event(step=int(step), wall_time=time.time(), **content)
        self._writer.write_event(event)


def _import_tensorboardx() -> types.ModuleType:
    """Import tensorboardX without PyTorch, which it imports where that is installed.

    PyTorch would take seconds and half a gigabyte of memory, for nothing.
    """
    if "torch" in sys.modules:
        import tensorboardX

        return tensorboardX
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        import tensorboardX
    finally:
        del sys.modules["torch"]
    return tensorboardX


def _identify(line: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    return line["step"], frozenset(line)


def _lines_before(text: bytes, first_step: int | None) -> Iterator[bytes]:
    for line in text.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # Torn by a kill.
        if line.endswith(b"\n") and (first_step is None or step < first_step):
            yield line


class Progress:
    """Progress of a loop: a bar on a terminal, lines in a log file.

    Bar, lines and messages go to the standard error. A log file gets a line for each
    `set_postfix` and none for `update`.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        *,
        enabled: bool = True,
    ):
        """Start to measure the time.

        Args:
          total: Steps of the whole run.
          initial: Steps that were done before, by the run that this one resumes.
          enabled: Whether anything is written. In a run of several processes only the
            first one writes.
        """
        self._lines = enabled and not sys.stderr.isatty()
        self._enabled = enabled
        self._initial = initial
        self._done = initial
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc="train",
            unit=" steps",
            dynamic_ncols=True,
            disable=self._lines or not enabled,
        )
        self._total = total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop updating the bar and leave it visible."""
        self._bar.close()

    def update(self, n: int = 1) -> None:
        """Count more steps."""
        self._done += n
        self._bar.update(n)

    def set_postfix(self, values: Mapping[str, float]) -> None:
        """Show numbers by name, such as the loss and the images per second."""
        postfix = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        self._bar.set_postfix_str(postfix)
        if self._lines:
            line = tqdm.format_meter(
                self._done,
                self._total,
                time.monotonic() - self._start,
                initial=self._initial,
                prefix="train",
                postfix=postfix,
                bar_format=_LINE_FORMAT,
            )
            self.write(line)

    def write(self, message: str) -> None:
        """Write a line above the bar."""
        if self._enabled:
            tqdm.write(message, file=sys.stderr)


def announce_compilation(
    function: Callable[P, R], name: str, *, enabled: bool = True
) -> Callable[P, R]:
    """Say on the standard error that a function compiles, and how long it took.

    Args:
      function: A function that JAX compiles when it is called first.
      name: What it does, in front of the lines.
      enabled: Whether anything is written. The default is True.

    Returns:
      The same function.
    """
    compiled = not enabled

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        if compiled:
            return function(*args, **kwargs)
        start = time.monotonic()
        tqdm.write(f"{name}: compiling", file=sys.stderr)
        results = jax.block_until_ready(function(*args, **kwargs))
        seconds = time.monotonic() - start
        tqdm.write(f"{name}: compiled and called in {seconds:.1f} s", file=sys.stderr)
        compiled = True
        return results

    return call
