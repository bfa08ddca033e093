import io
import json
import pickle
import re
import shutil
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pconv_jax import UserError
from pconv_jax.data import pipeline, sources, tfds_source
from tests.helpers.images import encode, photo


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """A data set with two image features."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES = {"train": 7, "validation": 3}

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "depth": tfds.features.Image(shape=(None, None, 1)),
            "label": np.int64,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {k: self._generate_examples(n) for k, n in self.SIZES.items()}

    def _generate_examples(self, count):
        for n in range(count):
            image, depth = photo(seed=n), np.full((8, 8), n, np.uint8)
            yield (
                n,
                {
                    "image": io.BytesIO(encode(image)),
                    "depth": io.BytesIO(encode(depth)),
                    "label": n,
                },
            )


def crc32c(content):
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tfrecord_bytes(content):
    def checksum(part):
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(content))
    return length + checksum(length) + content + checksum(content)


@pytest.fixture(scope="module")
def array_record_dir(tmp_path_factory):
    tfds.disable_progress_bar()
    folder = tmp_path_factory.mktemp("array_record")
    TinyPhotos(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def tfrecord_dir(array_record_dir, tmp_path_factory):
    """The same data set as TFRecord, which TFDS can only write with TensorFlow."""
    assert crc32c(b"123456789") == 0xE3069283
    folder = tmp_path_factory.mktemp("tfrecord")
    origin = array_record_dir / "tiny_photos" / "1.0.0"
    target = folder / "tiny_photos" / "1.0.0"
    target.mkdir(parents=True)
    (target / "features.json").write_bytes((origin / "features.json").read_bytes())
    info = json.loads((origin / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        records = list(
            tfds.builder_from_directory(origin).as_data_source(
                split["name"],
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            )
        )
        shards = records[:2], records[2:]
        split["shardLengths"] = [str(len(shard)) for shard in shards]
        for number, shard in enumerate(shards):
            name = f"tiny_photos-{split['name']}.tfrecord-{number:05}-of-00002"
            (target / name).write_bytes(b"".join(map(tfrecord_bytes, shard)))
    (target / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_is_read_without_tensorflow(request, file_format):
    data_dir = request.getfixturevalue(f"{file_format}_dir")
    for split, size in TinyPhotos.SIZES.items():
        source = tfds_source.TFDSSource("tiny_photos", split, data_dir)
        source = pickle.loads(pickle.dumps(source))
        assert len(source) == size
        assert source.name(1) == f"tiny_photos/1.0.0 {split} record 1"
        images = {source[i].tobytes() for i in range(size)}
        assert images == {photo(seed=n).tobytes() for n in range(size)}
    part = tfds_source.TFDSSource("tiny_photos", "train[1:4]+validation[2:]", data_dir)
    train = tfds_source.TFDSSource("tiny_photos:1.0.0", "train", str(data_dir))
    validation = tfds_source.TFDSSource("tiny_photos", "validation", data_dir)
    expected = [train[1], train[2], train[3], validation[2]]
    assert len(part) == 4
    for index in range(4):
        np.testing.assert_array_equal(part[index], expected[index])
    depth = tfds_source.TFDSSource("tiny_photos", "train", data_dir, feature="depth")
    assert sorted(depth[i].max() for i in range(7)) == list(range(7))
    options = {"batch_size": 4, "image_size": 16, "seed": 3}
    batches = pipeline.train_batches(train, **options)
    assert next(batches)["image"].shape == (4, 16, 16, 3)
    batches.close()
    assert "tensorflow" not in sys.modules


def test_tfds_errors(array_record_dir, tfrecord_dir, tmp_path):
    with pytest.raises(UserError, match="Unknown split 'test'.*'train', 'validation'"):
        tfds_source.TFDSSource("tiny_photos", "test", array_record_dir)
    with pytest.raises(UserError, match=r"feature must be one of .*'label'.*'photo'"):
        tfds_source.TFDSSource(
            "tiny_photos", "train", array_record_dir, feature="photo"
        )
    folder = tmp_path / "tiny_photos" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (tfrecord_dir / "tiny_photos" / "1.0.0").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(
            content[:-9] if "tfrecord" in path.name else content
        )
    with pytest.raises(UserError, match="TFRecord file .*00000-of-00002 is cut short"):
        tfds_source.TFDSSource("tiny_photos", "train", tmp_path)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    with pytest.raises(UserError, match="prepared as riegeli; only array_record"):
        tfds_source.TFDSSource("tiny_photos", "train", tmp_path)


def test_tfds_needs_to_know_the_feature():
    image = tfds.features.Image()
    choose = tfds_source._image_feature
    assert choose({"label": 0, "hr": image}, "x") == "hr"
    assert choose({"image": image, "depth": image}, "x") == "image"
    with pytest.raises(UserError, match=r"feature must name one of .*\['hr', 'lr'\]"):
        choose({"lr": image, "hr": image}, "x")


def test_tfds_says_how_to_prepare_and_it_works(tmp_path):
    with pytest.raises(UserError, match="is not prepared") as error:
        tfds_source.TFDSSource("tiny_photos", "train", tmp_path)
    assert "pip install tensorflow-cpu importlib-resources" in str(error.value)
    command = re.search(r'python -c "(.*)"', str(error.value))[1]
    tfds.disable_progress_bar()
    exec(command, {})
    assert len(tfds_source.TFDSSource("tiny_photos", "train", tmp_path)) == 7


def test_open_source_opens_the_splits_of_a_data_set(array_record_dir):
    options = {"name": "tiny_photos", "data_dir": array_record_dir}
    assert len(sources.open_source("tfds", split="train", **options)) == 7
    options |= {"train_split": "train[:2]", "validation_split": "train[2:]"}
    assert len(sources.open_source("tfds", split="train", **options)) == 2
    assert len(sources.open_source("tfds", split="validation", **options)) == 5


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("split", ["test", "train[", "train[:x]", ""])
def test_a_wrong_split_is_the_users_mistake(request, file_format, split):
    data_dir = request.getfixturevalue(f"{file_format}_dir")
    with pytest.raises(UserError, match="split: "):
        tfds_source.TFDSSource("tiny_photos", split, data_dir)


def test_a_missing_file_is_the_users_mistake(tfrecord_dir, tmp_path):
    shutil.copytree(tfrecord_dir, tmp_path / "copy")
    next((tmp_path / "copy").rglob("*train.tfrecord*")).unlink()
    with pytest.raises(UserError, match="data_dir: cannot read tiny_photos/1.0.0: "):
        tfds_source.TFDSSource("tiny_photos", "train", tmp_path / "copy")
