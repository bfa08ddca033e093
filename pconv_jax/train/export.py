"""Weights files that a run writes as it goes, also in parts."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from pconv_jax._errors import UserError
from pconv_jax._files import as_path, write_bytes
from pconv_jax.runs.settings import ExportSettings
from pconv_jax.train.step import TrainState
from pconv_jax.unet import PConvUNet
from pconv_jax.weights.pretrained import save_pretrained

NAME = "weights.safetensors"


class Export:
    """Writes the weights, or their average, every few minutes, and where a phase ends.

    The file is in the workdir, and replaces the one before it. If another folder or
    parts are asked for, these are written besides. `join` joins parts, as ``cat`` does.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        settings: ExportSettings,
        *,
        model: PConvUNet,
        info: Mapping[str, Any],
        enabled: bool,
    ):
        """Prepare to write.

        Args:
          workdir: Directory of the run.
          settings: How often, where and in what parts.
          model: The network.
          info: Facts about it, for the weights file.
          enabled: Whether this process writes.
        """
        self._workdir = workdir
        self._folder = as_path(settings.folder or workdir)
        self._settings = settings
        self._model = model
        self._info = info
        self._enabled = enabled and settings.minutes > 0
        self._written = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the minutes have passed."""
        passed = time.monotonic() - self._written
        return self._enabled and passed >= 60 * self._settings.minutes

    def __call__(self, state: TrainState, *, phase: str | None = None) -> None:
        """Write the weights of a state.

        Args:
          state: The state.
          phase: The phase that ended with it, if one did, whose weights are kept in the
            workdir as ``weights-PHASE.safetensors``.
        """
        if not self._enabled:
            return
        variables = jax.device_get(state.variables)
        info = {**self._info, "step": int(state.step)}
        path = self._workdir / NAME
        save_pretrained(path, self._model, variables, info=info, kernels="float16")
        if phase:
            write_bytes(path.with_stem(f"{path.stem}-{phase}"), path.read_bytes())
        if size := int(self._settings.part_mib * 2**20):
            split(path, self._folder, size)
        elif self._folder != self._workdir:
            write_bytes(self._folder / NAME, path.read_bytes())
        self._written = time.monotonic()


def split(path: pathlib.Path, folder: pathlib.Path, size: int) -> None:
    """Write parts of a file of a size in bytes, ``NAME.1``, ``NAME.2``, ...

    If the file before had more of them, the rest is removed.
    """
    data, number = path.read_bytes(), 0
    for number, start in enumerate(range(0, len(data), size), 1):
        write_bytes(folder / f"{path.name}.{number}", data[start : start + size])
    while (rest := folder / f"{path.name}.{number + 1}").exists():
        rest.unlink()
        number += 1


def join(path: pathlib.Path) -> None:
    """Make a file of its parts, which stay.

    If some are of an older file than others, `from_pretrained` says that it is damaged.

    Raises:
      UserError: If there are no parts.
    """
    parts = []
    while (part := path.with_name(f"{path.name}.{len(parts) + 1}")).exists():
        parts.append(part.read_bytes())
    if not parts:
        raise UserError(f"{path}: there is no part {path.name}.1 beside it.")
    write_bytes(path, b"".join(parts))
