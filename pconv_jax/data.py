"""Photos, and masks from a folder, to batches of NumPy arrays.

A `Source` is a random-access collection of encoded pictures: a folder, tar files, a
TFDS data set, or the few photos that scikit-image carries. `train_batches` and
`eval_batches` turn one into uint8 batches `[B, S, S, 3]`, RGB.

The training pipeline is a pure function of the global record index. Which picture is
record n, and every random number drawn for it, depend on n and the seed alone; not on
the number of threads, worker processes or hosts. To resume, only the step is needed.

Masks are uint8 `[B, S, S, 1]`, 1 = valid, 0 = hole.
"""

import abc
import dataclasses
import functools
import glob
import hashlib
import importlib.resources
import os
import pathlib
import posixpath
import struct
import tarfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags, logging

from pconv_jax import files, masks

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_MAX_UNREADABLE = 0.05  # fraction of a source


class UnreadableImageError(ValueError):
    """A picture cannot be read: empty, truncated, not a picture, or no permission."""


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes a picture of any kind to 8-bit RGB, upright.

    Grey, palette and CMYK pictures become RGB, 16 bits become 8, EXIF orientation is
    applied and transparency dropped. Needs OpenCV 4.13: older ones return the readable
    part of a truncated JPEG, or ignore the orientation of a WebP.

    Args:
      data: The file's bytes: JPEG, PNG, WebP, BMP or TIFF.
      name: What to call the picture in an error.

    Returns:
      Uint8 `[H, W, 3]`.

    Raises:
      UnreadableImageError: If the bytes are not one whole picture.
    """
    image = None
    # Asked first because libpng prints to stderr when a file ends early.
    cut = data.startswith(b"\x89PNG") and data.rfind(b"IEND") < 0
    if data and not cut:
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        except cv2.error:  # such as more pixels than OpenCV allows
            pass
    if image is None:
        reason = "truncated or not a picture" if data else "it is empty"
        raise UnreadableImageError(f"cannot read {name}: {reason}")
    return image


class Source(abc.ABC):
    """Random-access collection of pictures, picklable for worker processes.

    `source[i]` is picture i, uint8 `[H, W, 3]` RGB; it raises `UnreadableImageError`,
    which names the picture, if there is no reading it.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of pictures, readable or not."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """Encoded bytes of a picture."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Name of a picture, for people."""

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            data = self.read(index)
        except OSError as error:
            message = f"cannot read {self.name(index)}: {error.strerror or error}"
            raise UnreadableImageError(message) from error
        return decode_image(data, self.name(index))


class FolderSource(Source):
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
            for file in files.visible(self._root)
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


class TarSource(Source):
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
        return _read_span(self._spans[index])

    def name(self, index: int) -> str:
        """See base class."""
        return f"{self._spans[index].path}:{self.keys[index]}"


class TFDSSource(Source):
    """Pictures of a prepared TensorFlow Datasets data set, read without TensorFlow.

    Nothing is ever downloaded; the error for a set that is not there says how to
    prepare it.

    Args:
      name: Such as 'celeb_a_hq/256' or 'imagenet2012:5.1.0'.
      split: Such as 'train' or 'train[:90%]'.
      data_dir: Where the sets are; `~/tensorflow_datasets` if None.
      feature: Which feature is the picture. If None, the one called 'image', else the
        only one that is an image.

    Raises:
      ValueError: If there is no such set, split or feature, or if the set is prepared
        in another format than ArrayRecord and TFRecord.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | os.PathLike[str] | None = None,
        *,
        feature: str | None = None,
    ):
        try:
            builder = tfds.core.read_only_builder.builder_from_files(
                name, data_dir=data_dir and os.path.expanduser(data_dir)
            )
        except tfds.core.DatasetNotFoundError as error:
            place = None if data_dir is None else os.fspath(data_dir)
            raise ValueError(
                f"name: the data set {name!r} is not prepared in "
                f"{place or '~/tensorflow_datasets'}. To prepare it, once:\n"
                "  pip install 'pconv-jax[tfds-prepare]'\n"
                '  python -c "import tensorflow_datasets as tfds; '
                f"tfds.builder({name!r}, data_dir={place!r}, "
                "file_format='array_record').download_and_prepare()\""
            ) from error
        features = builder.info.features
        self._feature = feature or _image_feature(features, name)
        if self._feature not in features:
            raise ValueError(
                f"feature must be one of {sorted(features)} of {name}, got {feature!r}"
            )
        # The other features are not parsed: some need TensorFlow.
        self._features = tfds.features.FeaturesDict(
            {self._feature: features[self._feature]}
        )
        self._name = f"{builder.info.full_name} {split}"
        self._records = _tfds_records(builder, split)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> bytes:
        """See base class."""
        # TFDS's own decoder ignores EXIF, keeps alpha, and fails on a truncated file.
        skip = {self._feature: tfds.decode.SkipDecoding()}
        record = self._records[index]
        return self._features.deserialize_example_np(record, decoders=skip)[
            self._feature
        ]

    def name(self, index: int) -> str:
        """See base class."""
        return f"{self._name} record {index}"


class BundledSource(Source):
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


class _Subset(Source):
    """Some of the pictures of a source."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._source.read(self._indices[index])

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


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
) -> Source:
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


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """Endless training batches; made by `train_batches`.

    Attributes:
      unreadable: Names of the pictures that could not be read so far. Each was logged
        once and another took its place. On several hosts, each knows its own share.
    """

    def __init__(self, source: Source, dataset: grain.IterDataset):
        self.unreadable: list[str] = []
        self._source = source
        self._unreadable: set[int] = set()
        self._enlarged = False
        # Closed and dropped before the interpreter goes, or workers make noise then.
        self._batches = [iter(dataset)]
        self._close = weakref.finalize(self, _close_all, self._batches)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._batches:
            raise ValueError("these batches are closed; call train_batches again")
        try:
            # Copied out of the memory that is shared with the worker, if there is one:
            # on CPU, JAX would hold on to it.
            batch = {k: np.array(v) for k, v in next(self._batches[0]).items()}
        except RuntimeError as error:
            error.add_note(
                "If a worker process ended: was there enough memory, in a container "
                "also in /dev/shm? Is the script under `if __name__ == '__main__'`?"
            )
            raise
        self._report(batch.pop("wanted"), batch.pop("used"), batch.pop("enlarged"))
        return batch

    def close(self) -> None:
        """Stops threads and worker processes. No batch can be had afterwards."""
        self._close()

    def _report(self, wanted: np.ndarray, used: np.ndarray, enlarged: np.ndarray):
        size = len(self._source)
        for first, last in zip(wanted.tolist(), used.tolist(), strict=True):
            for index in range(first, first + (last - first) % size):
                self._skip(index % size)
        if enlarged.any() and not self._enlarged:
            self._enlarged = True
            logging.warning(
                "%s is enlarged: its crop is smaller than image_size. Others may be "
                "too; this is said once.",
                self._source.name(int(used[enlarged.argmax()])),
            )

    def _skip(self, index: int):
        if index in self._unreadable:
            return
        self._unreadable.add(index)
        self.unreadable.append(self._source.name(index))
        logging.warning(
            "%s cannot be read and is skipped (%d of %d pictures so far)",
            self.unreadable[-1],
            len(self.unreadable),
            len(self._source),
        )
        if len(self.unreadable) > _max_unreadable(self._source):
            raise _too_many_unreadable(self._source, self.unreadable)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
    mask_folder: masks.MaskFolder | None = None,
) -> TrainBatches:
    """Endless batches of random crops, reshuffled every epoch.

    A picture that cannot be read is replaced by the next one that can, named once in
    the log, and counted in `TrainBatches.unreadable`.

    Sets OpenCV to one thread, since pictures are already worked on in parallel.

    Args:
      source: The pictures.
      batch_size: Global number of pictures in a batch, over all processes.
      image_size: Side S of the crops, in pixels.
      seed: Of everything random here, in [0, 2**32).
      start_step: Number of batches to leave out, to resume.
      process_index: Which process of a multi-host run this is.
      process_count: Number of processes; each gets its share of every batch.
      workers: Worker processes. With 0, threads of this process read ahead, one a core
        and up to eight, which is faster until Python itself is the limit. Workers take
        seconds to start, and the script needs its `if __name__ == '__main__'`.
      scale: Range of the side of the crop, a square, over the picture's short side.
      flip: Whether to mirror half of the crops, left to right.
      mask_folder: Masks to draw from. If None, there is no 'mask' in the batches.

    Returns:
      Iterator, to be closed, of dicts with 'image', uint8 `[B, S, S, 3]`; 'seed',
      uint32 `[B]`, a random number for each record; and with a `mask_folder` 'mask',
      uint8 `[B, S, S, 1]`, 1 = valid. B is `batch_size // process_count`.

    Raises:
      ValueError: If an argument is out of range; while iterating, if over 5 % of the
        pictures cannot be read.
      RuntimeError: While iterating, if a worker process dies.
    """
    _check_positive(
        batch_size=batch_size, image_size=image_size, process_count=process_count
    )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size is global and must be a multiple of process_count "
            f"(={process_count}), got {batch_size}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in [0, {process_count}), got {process_index}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if start_step < 0 or workers < 0:
        raise ValueError(
            f"start_step and workers must not be negative, got {start_step}, {workers}"
        )
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be 0 < low <= high <= 1, got {scale}")

    _set_up_opencv()
    transform = _TrainTransform(source, image_size, tuple(scale), flip, mask_folder)
    records = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    # Sliced last: the randomness of a record must not depend on who makes it.
    records = records.random_map(transform)
    records = records[start_step * batch_size + process_index :: process_count]
    batches = records.batch(batch_size // process_count)
    if not workers:
        return TrainBatches(source, batches.to_iter_dataset(_READ_OPTIONS))
    if not flags.FLAGS.is_parsed():  # outside of absl.app; grain asks its own flags
        flags.FLAGS.mark_as_parsed()
    dataset = batches.to_iter_dataset(grain.ReadOptions(1, 2)).mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
        worker_init_fn=_set_up_opencv,
    )
    return TrainBatches(source, dataset)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    num_examples: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every picture once, the same on every call.

    Example j is picture `j % len(source)`: its central square the first time round,
    fixed but different squares of it after that. A picture that cannot be read is
    replaced by the next one that can, and named in the log.

    Args:
      source: The pictures.
      batch_size: Number of examples in a batch.
      image_size: Side S of the squares, in pixels.
      num_examples: Number of examples, even more than there are pictures. None = one
        for each picture.

    Returns:
      Iterator of dicts with 'image', uint8 `[B, S, S, 3]`; 'index', int32 `[B]`, the
      number of the example; and 'weight', float32 `[B]`, 1, or 0 for what fills up the
      last batch.

    Raises:
      ValueError: If an argument is out of range; while iterating, if over 5 % of the
        pictures cannot be read.
    """
    num_examples = len(source) if num_examples is None else num_examples
    _check_positive(
        batch_size=batch_size, image_size=image_size, num_examples=num_examples
    )
    _set_up_opencv()
    example = functools.partial(_eval_example, source, image_size, num_examples)
    padded = num_examples + -num_examples % batch_size
    batches = grain.MapDataset.range(padded).map(example).batch(batch_size)
    return iter(batches.to_iter_dataset(_READ_OPTIONS))


# Decoding leaves the GIL, so as many threads as cores are fastest: 1560 crops of 256 px
# a second on two cores, 840 with one thread, 1080 with two worker processes. The buffer
# counts whole batches; grain's default of 500 would fill the memory.
_THREADS = min(os.cpu_count() or 1, 8)
_READ_OPTIONS = grain.ReadOptions(_THREADS, prefetch_buffer_size=_THREADS + 2)


@dataclasses.dataclass(frozen=True)
class _TrainTransform(grain.transforms.RandomMap):
    """From a picture's index to a training record."""

    source: Source
    image_size: int
    scale: tuple[float, float]
    flip: bool
    mask_folder: masks.MaskFolder | None

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        seed = rng.integers(2**32, dtype=np.uint32)
        used, image = _readable(self.source, element)
        square = _random_square(image, rng, self.scale)
        image = _resize(square, self.image_size)
        if rng.random() < 0.5 and self.flip:
            image = image[:, ::-1]
        record = {
            "image": image,
            "seed": seed,
            # For TrainBatches, which takes them out.
            "wanted": element,
            "used": used,
            "enlarged": len(square) < self.image_size,
        }
        if self.mask_folder is not None:
            record["mask"] = self.mask_folder.sample(rng, self.image_size)
        return record


def _readable(source: Source, wanted: int) -> tuple[int, np.ndarray]:
    """The picture, or the next one that can be read, and its index."""
    skipped = []
    while len(skipped) <= _max_unreadable(source):
        index = (wanted + len(skipped)) % len(source)
        try:
            return index, source[index]
        except UnreadableImageError:
            skipped.append(source.name(index))
    raise _too_many_unreadable(source, skipped)


def _eval_example(source: Source, image_size: int, num_examples: int, number: int):
    turn, wanted = divmod(number, len(source))
    index, image = _readable(source, wanted)
    if index != wanted:
        names = source.name(wanted), source.name(index)
        logging.warning("%s cannot be read, and %s takes its place", *names)
    if turn:
        rng = np.random.default_rng((turn, index))
        image = _random_square(image, rng, (0.5, 1.0))
    else:
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        image = image[top : top + side, left : left + side]
    return {
        "image": _resize(image, image_size),
        "index": np.int32(number),
        "weight": np.float32(number < num_examples),
    }


def _random_square(
    image: np.ndarray, rng: np.random.Generator, scale: tuple[float, float]
) -> np.ndarray:
    height, width = image.shape[:2]
    side = max(1, round(rng.uniform(*scale) * min(height, width)))
    top, left = rng.integers((height - side + 1, width - side + 1))
    return image[top : top + side, left : left + side]


def _resize(square: np.ndarray, size: int) -> np.ndarray:
    # INTER_AREA averages when it shrinks, hence no aliasing.
    method = cv2.INTER_AREA if len(square) > size else cv2.INTER_CUBIC
    return cv2.resize(square, (size, size), interpolation=method)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _set_up_opencv(*_: int) -> None:
    """One thread, and no lines on stderr about files that are reported anyway."""
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _max_unreadable(source: Source) -> int:
    return int(_MAX_UNREADABLE * len(source))


def _too_many_unreadable(source: Source, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{len(names)} of the {len(source)} pictures of source cannot be read, over "
        f"{_MAX_UNREADABLE:.0%}; remove or repair them: {', '.join(names[:10])}"
    )


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")


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


class _Span(NamedTuple):
    """Part of a file. Nothing stays open, so that it can be pickled and forked."""

    path: str
    offset: int
    size: int


def _read_span(span: _Span) -> bytes:
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        return file.read(span.size)


def _glob(path: str | os.PathLike[str]) -> list[str]:
    path = os.path.expanduser(path)
    paths = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not paths:
        raise ValueError(f"path must be a tar file or several, there is no {path!r}")
    return paths


def _members(path: str) -> Iterator[tuple[str, _Span]]:
    """Keys and places of the pictures of a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = posixpath.normpath(member.name)
                if member.isreg() and _is_picture(key):
                    yield key, _Span(path, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"path must be an uncompressed, whole tar file, got {path!r}: {error}"
        ) from error


def _image_feature(features: tfds.features.FeaturesDict, name: str) -> str:
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    if "image" in images:
        return "image"
    if len(images) != 1:
        raise ValueError(f"feature must say which picture of {name}: {sorted(images)}")
    return images[0]


def _tfds_records(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[bytes]:
    file_format = builder.info.file_format.value
    if file_format == "array_record":
        return builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
    if file_format == "tfrecord":
        return _TFRecords(builder.info.splits[split].file_instructions)
    raise ValueError(
        f"name: the data set {builder.info.full_name} is prepared as {file_format}; "
        "only array_record and tfrecord can be read"
    )


class _TFRecords(Sequence[bytes]):
    """Random access to TFRecord files, which TFDS itself reads with TensorFlow alone.

    A record is its length (8 bytes), a checksum (4), the data and a checksum (4).
    """

    def __init__(self, instructions: Iterable[Any]):
        self._spans = [
            span
            for part in instructions
            for span in _tfrecord_spans(part.filename)[part.skip :][: part.take]
        ]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        return _read_span(self._spans[index])


def _tfrecord_spans(path: str) -> list[_Span]:
    spans, offset = [], 0
    size = os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        while offset < size:
            file.seek(offset)
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            spans.append(_Span(path, offset + 12, length))
            offset += 12 + length + 4
    if offset != size:
        raise ValueError(f"data_dir: the TFRecord file {path} is cut short or damaged")
    return spans
