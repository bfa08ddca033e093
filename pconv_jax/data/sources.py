"""Photos, and masks from a folder, to batches of NumPy arrays.

A `Source` is a random-access collection of encoded pictures: a folder, tar files, a
TFDS data set, or the few photos that scikit-image carries. `train_batches` and
`eval_batches` turn one into uint8 batches `[B, S, S, 3]`, RGB.

The training pipeline is a pure function of the global record index. Which picture is
record n, and every random number drawn for it, depend on n and the seed alone; not on
the number of threads, worker processes or hosts. To resume, only the step is needed.

Masks are uint8 `[B, S, S, 1]`, 1 = valid, 0 = hole.
"""

import glob
import hashlib
import importlib.resources
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pconv_jax import _files
from pconv_jax.data.base import ImageSource, Span, read_span
from pconv_jax.data.tfrecord import TFDSSource

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class FolderSource(ImageSource):
    """Pictures of a folder and of all folders below it, in the order of their keys.

    Hidden files and folders (`.name`) are left out. Links to folders are followed, and
    each folder is read once.

    Attributes:
      keys: Paths relative to the folder, with '/'.

    Raises:
      ValueError: If there is no such folder, or no picture in it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._root = pathlib.Path(path).expanduser()
        if not self._root.is_dir():
            raise ValueError(f"path must be a folder of pictures, got {str(path)!r}")
        keys = (
            file.relative_to(self._root).as_posix()
            for file in _files.iter_files(self._root)
        )
        self.keys = sorted(filter(_is_picture, keys))
        _check_not_empty(self.keys, path)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        """See base class."""
        return (self._root / self.keys[index]).read_bytes()

    def name(self, index: int) -> str:
        """See base class."""
        return str(self._root / self.keys[index])


class TarSource(ImageSource):
    """Pictures of uncompressed tar files, read in place, in the order of their keys.

    Args:
      paths: A tar file or several; wildcards are expanded.

    Attributes:
      keys: Paths inside the tar files.

    Raises:
      ValueError: If a file is missing, not an uncompressed tar file or cut short, or
        if there is no picture in any of them.
    """

    def __init__(
        self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    ):
        if isinstance(paths, str | os.PathLike):
            paths = [paths]
        index = sorted(
            member for path in paths for tar in _glob(path) for member in _members(tar)
        )
        _check_not_empty(index, paths)
        self.keys = [key for key, _ in index]
        self._spans = [span for _, span in index]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        """See base class."""
        return read_span(self._spans[index])

    def name(self, index: int) -> str:
        """See base class."""
        return f"{self._spans[index].path}:{self.keys[index]}"


class BundledSource(ImageSource):
    """The few photos that scikit-image carries: enough to try things out.

    Args:
      split: 'train' (three photos) or 'validation' (two others).

    Raises:
      ValueError: If `split` is something else.
    """

    _FILES = {
        "train": ("astronaut.png", "chelsea.png", "motorcycle_left.png"),
        "validation": ("coffee.png", "rocket.jpg"),
    }

    def __init__(self, split: str):
        self._files = self._FILES[_check_split(split)]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """See base class."""
        path = importlib.resources.files("skimage") / "data" / self._files[index]
        return path.read_bytes()

    def name(self, index: int) -> str:
        """See base class."""
        return f"skimage/data/{self._files[index]}"


class _Subset(ImageSource):
    """Some of the pictures of a source."""

    def __init__(self, source: ImageSource, indices: Sequence[int]):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._source.read(self._indices[index])

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """Opens all images of a folder or of a tar file.

    Args:
      path: The folder or the tar file.

    Raises:
      ValueError: If there is no image, see `FolderSource` and `TarSource`.
    """
    is_folder = pathlib.Path(path).expanduser().is_dir()
    return FolderSource(path) if is_folder else TarSource(path)


def open_source(
    kind: str,
    *,
    split: str,
    path: str | os.PathLike[str] | Sequence[str] | None = None,
    validation_path: str | os.PathLike[str] | Sequence[str] | None = None,
    name: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    feature: str | None = None,
    train_split: str = "train",
    validation_split: str = "validation",
    validation_fraction: float = 0.05,
) -> ImageSource:
    """Opens the training or the validation pictures of a source.

    A folder or tar files without a `validation_path` are divided by a hash of each
    picture's key, so a picture stays on its side when others are added. If chance gives
    one side nothing, it gets the picture whose hash is nearest to its side.

    Args:
      kind: 'bundled', 'folder', 'tar' or 'tfds'.
      split: 'train' or 'validation'.
      path: The folder, or the tar file(s).
      validation_path: The same for validation; if None, part of `path` is held out.
      name: Name of the TFDS data set.
      data_dir: Where the TFDS data sets are; `~/tensorflow_datasets` if None.
      feature: Which feature of the TFDS data set is the picture, see `TFDSSource`.
      train_split: Split of the TFDS data set to train on.
      validation_split: Split of the TFDS data set to validate on.
      validation_fraction: Fraction of the pictures held out, in (0, 1).

    Returns:
      The source, never empty.

    Raises:
      ValueError: If an argument is missing or wrong, see the sources.
    """
    _check_split(split)
    if kind == "bundled":
        return BundledSource(split)
    if kind == "tfds":
        if not name:
            raise ValueError("name is needed for kind 'tfds', such as 'celeb_a_hq/256'")
        tfds_split = train_split if split == "train" else validation_split
        return TFDSSource(name, tfds_split, data_dir, feature=feature)
    if kind not in ("folder", "tar"):
        raise ValueError(
            f"kind must be 'bundled', 'folder', 'tar' or 'tfds', got {kind!r}"
        )
    if not path:
        raise ValueError(f"path is needed for kind {kind!r}")
    open_ = FolderSource if kind == "folder" else TarSource
    if validation_path:
        return open_(path if split == "train" else validation_path)
    source = open_(path)
    held_out = _held_out(source.keys, validation_fraction)
    indices = np.flatnonzero(held_out == (split == "validation"))
    if not len(indices):
        raise ValueError(
            f"path has only one picture, {source.name(0)}, which is trained on; give "
            "a validation_path"
        )
    return _Subset(source, indices)


def _check_split(split: str) -> str:
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    return split


def _check_not_empty(pictures: Sequence[Any], path: Any) -> None:
    if not pictures:
        raise ValueError(f"no picture ({', '.join(_SUFFIXES)}) in path {str(path)!r}")


def _is_picture(key: str) -> bool:
    # A hidden file is no photo: macOS puts a "._photo.jpg" beside each photo in a tar.
    hidden = any(part.startswith(".") for part in key.split("/"))
    return not hidden and key.lower().endswith(_SUFFIXES)


def _held_out(keys: Sequence[str], fraction: float) -> np.ndarray:
    """Which keys are for validation: bool `[len(keys)]`, at least one and not all."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {fraction}")
    digests = (hashlib.blake2b(os.fsencode(key), digest_size=8) for key in keys)
    hashes = np.array([int.from_bytes(d.digest(), "big") / 2**64 for d in digests])
    held_out = hashes < fraction
    if len(keys) > 1 and not held_out.any():
        held_out[hashes.argmin()] = True
    if held_out.all():
        held_out[hashes.argmax()] = False
    return held_out


def _glob(path: str | os.PathLike[str]) -> list[str]:
    path = os.path.expanduser(path)
    paths = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not paths:
        raise ValueError(f"path must be a tar file or several, there is no {path!r}")
    return paths


def _members(path: str) -> Iterator[tuple[str, Span]]:
    """Keys and places of the pictures of a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = posixpath.normpath(member.name)
                if member.isreg() and _is_picture(key):
                    yield key, Span(path, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"path must be an uncompressed, whole tar file, got {path!r}: {error}"
        ) from error
