"""Repair of image files, with the options of the command ``pconv inpaint``."""

import functools
import hashlib
import os
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple, Self

import filelock

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax._files import MAX_PIXELS
from pconv_jax.inpaint import image_io
from pconv_jax.inpaint.formats import find_images
from pconv_jax.inpaint.hole import hole_from_color, hole_from_label
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.inpaint.progress import Progress, ignore


class Repaired(NamedTuple):
    """What became of an image file.

    Attributes:
      filled: Whether there was a hole.
      messages: Warnings, each once.
    """

    filled: bool
    messages: list[str]


def repair_file(
    inpainter: Inpainter,
    image: Path,
    output: Path,
    *,
    mask: Path | None = None,
    mask_color: str | None = None,
    mask_label: int | None = None,
    tolerance: int = 0,
    invert_mask: bool = False,
    resize_mask: bool = False,
    dilate: int = 0,
    seed: int = 0,
    exclude: Path | None = None,
    sharp: bool = False,
    max_pixels: int = MAX_PIXELS,
    force: bool = False,
    write_unfilled: bool = True,
    progress: Progress = ignore,
) -> Repaired:
    """Fill the hole of an image file, and write the result with the file's metadata.

    The hole comes from a mask, a label in it, or a color. Without, it is where the
    image is transparent, or not finite.

    Args:
      inpainter: Repairs the image.
      image: Path of the image.
      output: Path of the file to write.
      mask: Path of a mask, or of a folder with a mask of the image's name, with any
        suffix. By default there is none.
      mask_color: CSS color of the hole. By default there is none.
      mask_label: Value of the hole in a mask of labels. By default white is filled.
      tolerance: See `hole_from_color`. The default is 0.
      invert_mask: See `Inpainter`. The default is False.
      resize_mask: See `Inpainter`. The default is False.
      dilate: See `Inpainter`. The default is 0.
      seed: See `Inpainter`. The default is 0.
      exclude: Path of a mask, or of a folder of masks like ``mask``: white where not to
        copy detail from. By default there is none.
      sharp: See `Inpainter`. The default is False.
      max_pixels: Larger images are refused. The default is 100,000,000.
      force: Whether to replace an existing file. The default is False.
      write_unfilled: Whether to write an image that has no hole. The default is True.
      progress: See `Inpainter`. By default nothing is reported.

    Raises:
      UserError: If the image cannot be read or repaired, or the file exists.
      RunError: If the file cannot be written.
    """
    _files.check_free(output, force=force)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # Other libraries warn programmers.
        warnings.filterwarnings("always", category=UserWarning)
        opened, info = image_io.read(image, max_pixels=max_pixels)
        if mask_color is not None:
            hole = hole_from_color(opened, mask_color, tolerance=tolerance)
        else:
            hole = _find_mask(image, mask)
        if mask_label is not None and isinstance(hole, Path):
            labels = image_io.read(hole, max_pixels=max_pixels).image
            hole = hole_from_label(labels, mask_label)
        repaired, depth = inpainter(
            opened,
            hole,
            invert_mask=invert_mask,
            resize_mask=resize_mask,
            dilate=dilate,
            seed=seed,
            exclude=_find_mask(image, exclude),
            sharp=sharp,
            progress=progress,
            return_depth=True,
        )
        del opened, hole  # Writing a large image takes memory, too.
        filled = bool(depth.any())
        if filled or write_unfilled:
            # Meanwhile, another process may have written it.
            _files.check_free(output, force=force)
            image_io.write(output, image_io.ImageFile(repaired, info))
    messages = list(dict.fromkeys(str(warning.message) for warning in caught))
    return Repaired(filled, messages)


class Journal:
    """The files that a run over a folder has written, for when it is killed.

    It is a hidden file in the folder of the results, which is there while a run lasts.
    If it is there when a run starts, the same run was killed, and continues. A lock
    beside it tells whether the other run was killed, or is still writing. It is held
    until the ``with`` statement ends.

    Attributes:
      done: Number of files that were found to be done.
    """

    def __init__(self, folder: Path, run: str):
        """Open a journal.

        Args:
          folder: Folder of the results.
          run: Text that identifies the run.

        Raises:
          UserError: If another process has it open.
          RunError: If it cannot be read or written.
        """
        digest = hashlib.blake2b(run.encode("utf-8", "replace"), digest_size=8)
        self._path = folder / f".pconv-{digest.hexdigest()}.unfinished"
        self._lock = filelock.FileLock(self._path.with_suffix(".lock"))
        self.done = 0
        with _files.write_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout as error:
                raise UserError(
                    f"another process is writing the same results to {folder}: wait "
                    "until it has ended."
                ) from error
            if self._path.exists():
                _files.remove_partials(folder)
            self._path.touch()
            _files.sync_folder(folder)
            self._started = set(self._path.read_bytes().split())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def is_done(self, output: Path) -> bool:
        """Return whether the run that was killed has written a file."""
        done = _line(output) in self._started and output.exists()
        self.done += done
        return done

    def start(self, output: Path) -> None:
        """Note that a file, which does not exist, is about to be written.

        Files appear complete or not at all. So one that was started and exists is done.
        """
        if not output.exists():
            with _files.write_errors(self._path), self._path.open("ab") as file:
                file.write(_line(output) + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Delete the journal: the run has come to its end."""
        self._path.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)


def _line(path: Path) -> bytes:
    return os.fsencode(path.name).hex().encode()


def _find_mask(image: Path, mask: Path | None) -> Path | None:
    if mask is None or not os.path.isdir(mask):
        return mask
    found = _images_by_stem(mask, mask.stat().st_mtime_ns).get(_stem(image), [])
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"there must be one mask {image.stem}.* in {mask}; found: {names}."
        )
    return found[0]


@functools.lru_cache(maxsize=2)  # Of masks, and of masks of what to exclude.
def _images_by_stem(folder: Path, modified: int) -> dict[str, list[Path]]:
    """Find the images of a folder by their stems; ``modified`` is its time."""
    del modified  # A folder that has changed is read again.
    images: dict[str, list[Path]] = {}
    for path in find_images(folder)[0]:
        images.setdefault(_stem(path), []).append(path)
    return images


def _stem(path: Path) -> str:
    """Get a file's name, of which macOS and others write accents differently."""
    return unicodedata.normalize("NFC", path.stem)
