"""Where the numbers and pictures of a run go: JSON lines, TensorBoard, the terminal.

Images of the network are float `[..., H, W, 3]` in [-1, 1], pictures to be written are
uint8 `[H, W, 3]`; masks are 1 where valid and 0 in the hole.
"""

import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import tensorboardX
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from pconv_jax import files

_GAP = 2  # Pixels between the pictures of a grid.
_CAPTION_HEIGHT = 18
_LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class MetricWriter:
    """Writes a run's metrics and pictures below `workdir`; a context manager.

    * `metrics.jsonl`: one object a line with `step`, `time` (seconds since the epoch)
      and the scalars. A scalar that is not finite is written as `null`, as JSON knows
      neither NaN nor infinity.
    * `pictures/{name}_{step:07d}.png`
    * `tensorboard/`: both, less the scalars that are not finite, within ten seconds.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        first_step: int | None = None,
        enabled: bool = True,
    ):
        """Opens the files of a new run, or goes on with those of an older one.

        Args:
          workdir: the run's directory.
          first_step: the first step that this run is going to write. What a killed run
            has left of this step and later ones is dropped, so that no step is there
            twice. None keeps everything.
          enabled: if False (on all hosts but the first), nothing is ever written.
        """
        self._tensorboard = None
        workdir = pathlib.Path(workdir)
        self._pictures = workdir / "pictures"
        if not enabled:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            lines = _lines_before(path.read_bytes(), first_step)
            files.write(path, b"".join(lines))
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=first_step,
            flush_secs=10,
            # Names differ by the second only: a quick restart would overwrite.
            filename_suffix=f".{time.time_ns()}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        if self._tensorboard:
            self._file.close()
            self._tensorboard.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line.

        Args:
          step: the step that the scalars belong to.
          scalars: numbers by name, such as `'train/loss'` or `'validation/psnr'`.
        """
        if not self._tensorboard:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        finite = {name: x for name, x in scalars.items() if math.isfinite(x)}
        line = {"step": int(step), "time": time.time()}
        line |= {name: finite.get(name) for name in scalars}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, complete or not at all.

        Args:
          step: the step that it belongs to.
          name: what it shows; a `/` makes a folder.
          image: uint8 `[H, W, 3]`.

        Raises:
          ValueError: if `image` is of another shape or dtype.
        """
        if not self._tensorboard:
            return
        write_png(self.picture_path(step, name), image)
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def picture_path(self, step: int, name: str) -> pathlib.Path:
        """Returns the file that `write_picture` writes."""
        return self._pictures / f"{name}_{step:07d}.png"


def _lines_before(text: bytes, first_step: int | None) -> Iterator[bytes]:
    for line in text.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # Torn by a kill.
        if line.endswith(b"\n") and (first_step is None or step < first_step):
            yield line


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, complete or not at all."""
    files.write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes a picture, complete or not at all.

    Args:
      path: of the file.
      image: uint8 `[H, W, 3]`.

    Raises:
      ValueError: if `image` is of another shape or dtype.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            "image must be uint8 of shape [H, W, 3], "
            f"got {image.dtype} of shape {list(image.shape)}."
        )
    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    files.write(path, png.getvalue())


def picture_grid(
    columns: Mapping[str, ArrayLike], *, max_rows: int | None = 8
) -> np.ndarray:
    """Lays examples out in rows and what was made of them in captioned columns.

    Args:
      columns: images float `[N, H, W, 3]` in [-1, 1], all of one shape, by caption,
        from left to right. Values outside are clipped; NaN becomes black.
      max_rows: how many of the N examples to show at most; None shows all.

    Returns:
      uint8 `[H', W', 3]`: white, with a strip of captions on top.

    Raises:
      ValueError: if there is no column, or if shapes differ or are not `[N, H, W, 3]`.
    """
    pictures = {name: np.asarray(x, np.float32) for name, x in columns.items()}
    shapes = {name: x.shape for name, x in pictures.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"columns must be images of one shape, got {shapes}.")
    shape = next(iter(shapes.values()))
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"columns must be images [N, H, W, 3], got {list(shape)}.")
    height, width = shape[1:3]
    stack = np.stack([_to_uint8(x[:max_rows]) for x in pictures.values()], axis=1)
    rows, count = stack.shape[:2]
    grid = np.full(
        (
            _CAPTION_HEIGHT + rows * (height + _GAP) - _GAP,
            count * (width + _GAP) - _GAP,
            3,
        ),
        255,
        np.uint8,
    )
    for column, name in enumerate(pictures):
        left = column * (width + _GAP)
        grid[:_CAPTION_HEIGHT, left : left + width] = _caption(name, width)
        for row in range(rows):
            top = _CAPTION_HEIGHT + row * (height + _GAP)
            grid[top : top + height, left : left + width] = stack[row, column]
    return grid


def _to_uint8(x: np.ndarray) -> np.ndarray:
    x = np.nan_to_num(x, nan=-1.0, posinf=1.0, neginf=-1.0)
    return np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def _caption(text: str, width: int) -> np.ndarray:
    """Returns black text on a white strip, as large as fits into `width`."""
    strip = Image.new("RGB", (width, _CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(strip)
    sizes = range(13, 6, -1)
    fonts = [ImageFont.load_default(size) for size in sizes]
    fitting = [font for font in fonts if font.getlength(text) <= width]
    middle = (width / 2, _CAPTION_HEIGHT / 2)
    draw.text(middle, text, "black", (fitting or fonts[-1:])[0], anchor="mm")
    return np.asarray(strip)


def format_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    decimals: int = 4,
    markdown: bool = False,
) -> str:
    """Formats rows as an aligned table, numbers to the right and words to the left.

    Args:
      rows: cells by column; what a row lacks, or None, stays empty.
      columns: the columns and their order; by default as they first appear in `rows`.
      decimals: how many of them a float has; integers have none.
      markdown: whether to write a Markdown table instead of plain text.

    Returns:
      Lines without a newline at the end.
    """
    if columns is None:
        columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        if isinstance(value, float | np.floating):
            return f"{value:.{decimals}f}"
        return "" if value is None else str(value)

    formatted = []
    for name in columns:
        values = [row.get(name) for row in rows]
        texts = [name, *map(cell, values)]
        width = max(3, *map(len, texts))
        numeric = all(isinstance(v, int | float | np.number | None) for v in values)
        align = str.rjust if numeric else str.ljust
        texts = [align(text, width) for text in texts]
        if markdown:
            rule = "-" * (width - 1) + ":" if numeric else "-" * width
        else:
            rule = "-" * width
        formatted.append([texts[0], rule, *texts[1:]])
    lines = zip(*formatted, strict=True)
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


class Progress:
    """How far a loop has come: a bar on a terminal, in a log file lines.

    Bar, lines and messages go to the standard error. In a log file there is a line for
    each `set_postfix` and none for `update`.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        *,
        description: str = "train",
        enabled: bool = True,
    ):
        """Starts to measure the time.

        Args:
          total: the steps of the whole run.
          initial: those done before, by the run that this one resumes.
          description: one word in front.
          enabled: if False (on all hosts but the first), nothing is ever written.
        """
        self._lines = enabled and not sys.stderr.isatty()
        self._enabled = enabled
        self._initial = initial
        self._done = initial
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit=" steps",
            dynamic_ncols=True,
            disable=self._lines or not enabled,
        )
        self._total = total
        self._description = description

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def update(self, n: int = 1) -> None:
        """Counts `n` more steps."""
        self._done += n
        self._bar.update(n)

    def set_postfix(self, values: Mapping[str, float]) -> None:
        """Shows numbers by name, such as the loss and the images per second."""
        postfix = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        self._bar.set_postfix_str(postfix)
        if self._lines:
            line = tqdm.format_meter(
                self._done,
                self._total,
                time.monotonic() - self._start,
                initial=self._initial,
                prefix=self._description,
                postfix=postfix,
                bar_format=_LINE_FORMAT,
            )
            self.write(line)

    def write(self, message: str) -> None:
        """Writes a line above the bar."""
        if self._enabled:
            tqdm.write(message, file=sys.stderr)
