"""Images of TensorFlow Datasets, read without TensorFlow."""

import os
import struct
from collections.abc import Iterable
from typing import Any, Protocol, cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.file_adapters import FileFormat

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.data.base import ImageSource, Span, read_span


class _Records(Protocol):
    """Encoded examples of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


class TFDSSource(ImageSource):
    """The images of a prepared TensorFlow Datasets data set, read without TensorFlow.

    Nothing is ever downloaded. If a data set is not prepared, the error says how to
    prepare it.

    Args:
      name: Name of the data set, such as ``'celeb_a_hq/256'`` or
        ``'imagenet2012:5.1.0'``.
      split: Split, such as ``'train'`` or ``'train[:90%]'``.
      data_dir: Folder of the data sets. None (the default) is
        ``~/tensorflow_datasets``.
      feature: Name of the image feature. None (the default) is ``'image'`` if there is
        one, else the only image feature.

    Raises:
      UserError: If there is no such data set, split or feature, or if the data set is
        prepared in a format other than ArrayRecord and TFRecord.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | os.PathLike[str] | None = None,
        *,
        feature: str | None = None,
    ):
        builder = _open_builder(name, data_dir)
        features = cast(tfds.features.FeaturesDict, builder.info.features)
        self._feature = feature or _image_feature(features, name)
        if self._feature not in features:
            raise UserError(
                f"feature must be one of {sorted(features)} of {name}, got {feature!r}."
            )
        # The other features are not parsed, since some need TensorFlow.
        self._features = tfds.features.FeaturesDict(
            {self._feature: features[self._feature]}
        )
        self._name = f"{builder.info.full_name} {split}"
        self._records = _open_records(builder, split)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> bytes:
        """See base class."""
        # The decoder of TFDS ignores EXIF, keeps alpha, and fails on truncated files.
        skip = {self._feature: tfds.decode.SkipDecoding()}
        record = self._records[index]
        example = self._features.deserialize_example_np(record, decoders=skip)
        return cast(dict[str, bytes], example)[self._feature]

    def name(self, index: int) -> str:
        """See base class."""
        return f"{self._name} record {index}"


def _open_builder(
    name: str, data_dir: str | os.PathLike[str] | None
) -> tfds.core.DatasetBuilder:
    try:
        return read_only_builder.builder_from_files(
            name, data_dir=data_dir and str(_files.as_path(data_dir))
        )
    except tfds.core.DatasetNotFoundError as error:
        place = None if data_dir is None else os.fspath(data_dir)
        raise UserError(
            f"name: the data set {name!r} is not prepared in "
            f"{place or '~/tensorflow_datasets'}. To prepare it, once:\n"
            "  pip install tensorflow-cpu importlib-resources\n"
            '  python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({name!r}, data_dir={place!r}, "
            "file_format='array_record').download_and_prepare()\""
        ) from error


def _image_feature(features: tfds.features.FeaturesDict, name: str) -> str:
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    if "image" in images:
        return "image"
    if len(images) != 1:
        raise UserError(
            f"feature must name one of the image features of {name}: {sorted(images)}."
        )
    return images[0]


def _open_records(builder: tfds.core.DatasetBuilder, split: str) -> _Records:
    info = builder.info
    if info.file_format not in (FileFormat.ARRAY_RECORD, FileFormat.TFRECORD):
        raise UserError(
            f"name: the data set {info.full_name} is prepared as "
            f"{info.file_format and info.file_format.value}; only array_record and "
            "tfrecord can be read."
        )
    try:
        instructions = info.splits[split].file_instructions
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"split: {error}") from error
    try:
        if info.file_format is FileFormat.TFRECORD:
            return _TFRecords(instructions)
        # A decorator of TFDS hides the signature from pyright.
        records = builder.as_data_source(
            split,  # pyright: ignore[reportCallIssue]
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
        return cast(_Records, records)
    except OSError as error:
        raise UserError(f"data_dir: cannot read {info.full_name}: {error}.") from error


class _TFRecords:
    """Random access to TFRecord files, which TFDS itself can only read with TensorFlow.

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

    def __getitem__(self, index: int, /) -> bytes:
        return read_span(self._spans[index])


def _tfrecord_spans(path: str) -> list[Span]:
    spans, offset = [], 0
    size = os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        while offset < size:
            file.seek(offset)
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            spans.append(Span(path, offset + 12, length))
            offset += 12 + length + 4
    if offset != size:
        raise UserError(f"data_dir: the TFRecord file {path} is cut short or damaged.")
    return spans
