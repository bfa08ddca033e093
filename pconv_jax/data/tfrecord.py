"""Images of TensorFlow Datasets, read without TensorFlow."""

import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow_datasets as tfds

from pconv_jax.data.base import ImageSource, Span, read_span


class TFDSSource(ImageSource):
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
        raise ValueError(f"data_dir: the TFRecord file {path} is cut short or damaged")
    return spans
