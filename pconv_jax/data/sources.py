"""Sources of images: folders, tar files, and the photos that come with scikit-image.

`open_source` opens any of them, or a TFDS data set, for training or validation.
"""

import glob
import hashlib
import importlib.resources
import importlib.util
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax._files import FileContentError
from pconv_jax.data.base import ImageSource, Span, read_span

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# What `tarfile` raises for a damaged file: it parses headers without checks.
_TAR_ERRORS = (
    *(OSError, tarfile.TarError, EOFError, LookupError, MemoryError, OverflowError),
    *(RecursionError, TypeError, ValueError),
)

_MAX_GLOBAL = 1000  # Bytes of a header for all members, and number of its fields.

PathLike = str | os.PathLike[str]
PathOrPaths = PathLike | Sequence[PathLike]


class FolderSource(ImageSource):
    """The images of a folder and of all folders below it, in the order of their keys.

    Hidden files and folders (``.name``) are skipped. Links to folders are followed, and
    each folder is read once.

    Args:
      path: The folder.

    Attributes:
      keys: Paths relative to the folder, with ``/``.

    Raises:
      UserError: If there is no such folder or no image in it.
    """

    def __init__(self, path: PathLike):
        self._root = _files.as_path(path)
        if not os.path.isdir(self._root):
            raise UserError(f"path must be a folder of images, got {str(path)!r}.")
        keys = (
            file.relative_to(self._root).as_posix()
            for file in _files.iter_files(self._root)
        )
        self.keys = sorted(filter(_is_image, keys))
        _check_not_empty(self.keys, path)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        """See base class."""
        return _files.read_regular(self._root / self.keys[index])

    def name(self, index: int) -> str:
        """See base class."""
        return str(self._root / self.keys[index])

    def key(self, index: int) -> str:
        """See base class."""
        return self.keys[index]


class TarSource(ImageSource):
    """The images of uncompressed tar files, read in place, in the order of their keys.

    Args:
      paths: One tar file or a sequence of them; wildcards are expanded.

    Attributes:
      keys: Paths inside the tar files.

    Raises:
      UserError: If a file is missing, truncated or no uncompressed tar file, or if none
        of the files contains an image.
    """

    def __init__(self, paths: PathOrPaths):
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

    def key(self, index: int) -> str:
        """See base class."""
        return self.keys[index]


class BundledSource(ImageSource):
    """A few photos that come with scikit-image, to try things out.

    Args:
      split: ``'train'`` (three photos) or ``'validation'`` (two others).

    Raises:
      UserError: If ``split`` is something else, or scikit-image is not installed.
    """

    _FILES = {
        "train": ("astronaut.png", "chelsea.png", "motorcycle_left.png"),
        "validation": ("coffee.png", "rocket.jpg"),
    }

    def __init__(self, split: str):
        self._files = self._FILES[_check_split(split)]
        if importlib.util.find_spec("skimage") is None:
            raise UserError(
                "the bundled photos are those of scikit-image, which is not installed: "
                "pip install 'pconv-jax[train]'."
            )

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
    """Some of the images of a source."""

    def __init__(self, source: ImageSource, indices: Sequence[int]):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._source.read(self._indices[index])

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def key(self, index: int) -> str:
        return self._source.key(self._indices[index])


def open_images(path: PathLike) -> ImageSource:
    """Open all images of a folder or of a tar file.

    Args:
      path: The folder or the tar file.

    Returns:
      The source, never empty.

    Raises:
      UserError: If there is no image; see `FolderSource` and `TarSource`.
    """
    is_folder = _files.as_path(path).is_dir()
    return FolderSource(path) if is_folder else TarSource(path)


def open_source(
    kind: str,
    *,
    split: str,
    path: PathOrPaths | None = None,
    validation_path: PathOrPaths | None = None,
    name: str | None = None,
    data_dir: PathLike | None = None,
    feature: str | None = None,
    train_split: str = "train",
    validation_split: str = "validation",
    validation_fraction: float = 0.05,
) -> ImageSource:
    """Open the training or the validation images of a source.

    Without a ``validation_path``, a folder or tar files are split by a hash of each
    image's key, so an image keeps its side when others are added. If one side would be
    empty, it gets the image whose hash is closest to it.

    Args:
      kind: ``'bundled'``, ``'folder'``, ``'tar'`` or ``'tfds'``.
      split: ``'train'`` or ``'validation'``.
      path: The folder; or one tar file or a sequence of them.
      validation_path: The same for validation. None (the default) holds out a part of
        ``path``.
      name: Name of the TFDS data set.
      data_dir: Folder of the TFDS data sets. None (the default) is
        ``~/tensorflow_datasets``.
      feature: Image feature of the TFDS data set; see `TFDSSource` for the default.
      train_split: Split of the TFDS data set to train on. The default is ``'train'``.
      validation_split: Split of the TFDS data set to validate on. The default is
        ``'validation'``.
      validation_fraction: Fraction of the images held out, in (0, 1). The default is
        0.05.

    Returns:
      The source, never empty.

    Raises:
      UserError: If an argument is missing or wrong; see the sources.
    """
    _check_split(split)
    if kind == "bundled":
        return BundledSource(split)
    if kind == "tfds":
        if not name:
            raise UserError("name is needed for kind 'tfds', such as 'celeb_a_hq/256'.")
        tfds_split = train_split if split == "train" else validation_split
        return _open_tfds(name, tfds_split, data_dir, feature)
    if kind not in ("folder", "tar"):
        raise UserError(
            f"kind must be 'bundled', 'folder', 'tar' or 'tfds', got {kind!r}."
        )
    if not path:
        raise UserError(f"path is needed for kind {kind!r}.")
    if validation_path:
        return _open_keyed(kind, path if split == "train" else validation_path)
    source = _open_keyed(kind, path)
    held_out = _held_out(source.keys, validation_fraction)
    indices = np.flatnonzero(held_out == (split == "validation"))
    if not len(indices):
        raise UserError(
            f"path has only one image, {source.name(0)}, which is trained on; give a "
            "validation_path."
        )
    return _Subset(source, indices.tolist())


def _open_keyed(kind: str, path: PathOrPaths) -> FolderSource | TarSource:
    if kind == "tar":
        return TarSource(path)
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path must be one folder for kind 'folder', got {path!r}.")
    return FolderSource(path)


def _open_tfds(
    name: str, split: str, data_dir: PathLike | None, feature: str | None
) -> ImageSource:
    try:
        from pconv_jax.data.tfds_source import TFDSSource  # Slow to import.
    except ModuleNotFoundError as error:
        if error.name != "tensorflow_datasets":
            raise
        raise UserError(
            "kind 'tfds' needs TensorFlow Datasets: pip install 'pconv-jax[train]'."
        ) from error
    return TFDSSource(name, split, data_dir, feature=feature)


def _check_split(split: str) -> str:
    if split not in ("train", "validation"):
        raise UserError(f"split must be 'train' or 'validation', got {split!r}.")
    return split


def _check_not_empty(images: Sequence[object], path: object) -> None:
    if not images:
        raise UserError(f"no image ({', '.join(_SUFFIXES)}) in path {str(path)!r}.")


def _is_image(key: str) -> bool:
    # Hidden files are no images: macOS adds a "._photo.jpg" for each photo to a tar.
    hidden = any(part.startswith(".") for part in key.split("/"))
    return not hidden and key.lower().endswith(_SUFFIXES)


def _held_out(keys: Sequence[str], fraction: float) -> np.ndarray:
    """Choose the keys for validation: bool ``[len(keys)]``, at least one, not all."""
    if not 0 < fraction < 1:
        raise UserError(f"validation_fraction must be in (0, 1), got {fraction}.")
    digests = (hashlib.blake2b(os.fsencode(key), digest_size=8) for key in keys)
    hashes = np.array([int.from_bytes(d.digest(), "big") / 2**64 for d in digests])
    held_out = hashes < fraction
    if len(keys) > 1 and not held_out.any():
        held_out[hashes.argmin()] = True
    if held_out.all():
        held_out[hashes.argmax()] = False
    return held_out


def _glob(path: PathLike) -> list[str]:
    path = str(_files.as_path(path))
    paths = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not paths:
        raise UserError(f"path: there is no file or folder {path!r}.")
    return paths


class _Member(tarfile.TarInfo):
    """A member of a tar file, which gets a copy of all headers for all members."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See base class."""
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.XGLTYPE and member.size > _MAX_GLOBAL:
            raise tarfile.ReadError("a header for all members is too long")
        return member


def _read_headers(path: str) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield the members of a tar file, and the number of headers for all members."""
    # An error of the loop that takes them is not raised here.
    with (
        _files.content_errors(*_TAR_ERRORS),
        tarfile.open(path, "r:", tarinfo=_Member) as tar,
    ):
        for member in tar:
            yield member, len(tar.pax_headers)


def _members(path: str) -> Iterator[tuple[str, Span]]:
    """Yield the keys and places of the images of a tar file."""
    try:
        _files.check_regular(path)
        size, last = os.path.getsize(path), -1
        for member, headers in _read_headers(path):
            if headers > _MAX_GLOBAL:
                raise FileContentError("its headers for all members are too many")
            if member.offset <= last:
                raise FileContentError("its members go round in circles")
            last = member.offset
            key = posixpath.normpath(member.name)
            if not member.isreg() or not _is_image(key):
                continue
            if member.issparse() or member.offset_data + member.size > size:
                raise FileContentError(f"{key} is sparse, or not all there")
            yield key, Span(path, member.offset_data, member.size)
    except (FileContentError, OSError) as error:
        raise UserError(
            f"path must be an uncompressed, whole tar file, got {path!r}: {error}."
        ) from error
