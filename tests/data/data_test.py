import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from pconv_jax.data import pipeline, sources, tfrecord
from pconv_jax.data.base import ImageSource, UnreadableImageError, decode_image
from pconv_jax.data.mask_folder import MaskFolder
from tests.helpers import ROOT
from tests.helpers.images import encode, photo, write_tar


def encode_16_bits(image, suffix):
    return cv2.imencode(suffix, image[..., ::-1].astype(np.uint16) * 257)[1].tobytes()


def write_folder(folder, pictures):
    for key, content in pictures.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


class Flat(ImageSource):
    """Picture i has red i and green i + 1; those in `bad` cannot be read."""

    def __init__(self, size, shape=(20, 30), bad=()):
        self.size, self.shape, self.bad = size, shape, bad

    def __len__(self):
        return self.size

    def read(self, index):
        color = np.array([index, index + 1, 7], np.uint8)
        image = np.broadcast_to(color, (*self.shape, 3))
        return b"no picture" if index in self.bad else encode(image.copy())

    def name(self, index):
        return f"flat-{index}"


class Gradient(Flat):
    """Red is the column, green the row."""

    def read(self, index):
        if index in self.bad:
            return b"no picture"
        row, column = np.indices(self.shape)
        return encode(np.stack([column, row, row * 0 + index], -1).astype(np.uint8))


def take(source, count, **options):
    options = {"batch_size": 4, "image_size": 16, "seed": 3} | options
    batches = pipeline.train_batches(source, **options)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def assert_equal_batches(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# Decoding


def pictures_of_every_kind():
    rgb = photo()
    image = Image.fromarray(rgb)
    grey = np.asarray(image.convert("L"))
    alpha = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    palette = image.quantize(16)
    grey_rgb = np.dstack([grey] * 3)
    bits = image.convert("1")
    return {
        "png": (encode(rgb), rgb, 0),
        "bmp": (encode(rgb, "BMP"), rgb, 0),
        "tiff": (encode(rgb, "TIFF"), rgb, 0),
        "webp": (encode(rgb, "WEBP", lossless=True), rgb, 0),
        "jpeg": (encode(rgb, "JPEG", quality=95), rgb, 12),
        "progressive": (encode(rgb, "JPEG", quality=95, progressive=True), rgb, 12),
        "grey png": (encode(grey), grey_rgb, 0),
        "grey jpeg": (encode(grey, "JPEG", quality=95), grey_rgb, 4),
        "grey and alpha": (encode(np.dstack([grey, alpha])), grey_rgb, 0),
        "rgba": (encode(np.dstack([rgb, alpha])), rgb, 0),
        "1 bit": (encode(bits), np.asarray(bits.convert("RGB")), 0),
        "palette": (encode(palette), np.asarray(palette.convert("RGB")), 0),
        "palette and alpha": (
            encode(palette, transparency=3),
            np.asarray(palette.convert("RGB")),
            0,
        ),
        "16 bits png": (encode_16_bits(rgb, ".png"), rgb, 0),
        "16 bits tiff": (encode_16_bits(rgb, ".tif"), rgb, 0),
        "16 bits grey": (encode_16_bits(grey_rgb, ".png"), grey_rgb, 0),
        "cmyk": (encode(image.convert("CMYK"), "JPEG", quality=95), rgb, 16),
    }


@pytest.mark.parametrize("kind", pictures_of_every_kind())
def test_decodes_every_kind_to_rgb(kind):
    content, expected, tolerance = pictures_of_every_kind()[kind]
    actual = decode_image(content, kind)
    assert actual.dtype == np.uint8 and actual.shape == (40, 60, 3)
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_applies_exif_orientation(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photo(), file_format, quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    actual = decode_image(content, "x").astype(int)
    assert actual.shape == (*upright.size[::-1], 3)
    assert np.abs(actual - np.asarray(upright)).max() <= 6


@pytest.mark.parametrize("part", [0.01, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_picture_is_unreadable(kind, part, capfd):
    options = {"progressive": True} if kind == "progressive" else {}
    # So large that libpng would print a line.
    content = encode(photo(400, 600), kind.replace("progressive", "JPEG"), **options)
    decode_image(content, "whole")
    pipeline._set_up_opencv()
    with pytest.raises(UnreadableImageError, match="cannot read a/b.jpg: trunc"):
        decode_image(content[: int(part * len(content))], "a/b.jpg")
    if kind not in ("BMP", "TIFF"):
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_picture_whose_end_was_never_written_is_unreadable(kind):
    content = encode(photo(), kind)
    half = len(content) // 2
    with pytest.raises(UnreadableImageError):
        decode_image(content[:half] + bytes(half), "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b"hello" * 99, "not a picture"), (bytes(999), "not a pic")],
)
def test_no_picture_is_unreadable(content, reason):
    with pytest.raises(UnreadableImageError, match=f"read x.jpg: .*{reason}"):
        decode_image(content, "x.jpg")


def test_trailing_bytes_do_no_harm():
    content = encode(photo(), "JPEG")
    np.testing.assert_array_equal(
        decode_image(content + b"trailer", "x"), decode_image(content, "x")
    )


# Sources


def test_folder_is_sorted_and_knows_suffixes(tmp_path):
    keys = ["b.JPG", "a/2.jpeg", "a/1.png", "a.webp", "z/y/x.TIF", "c.bmp"]
    others = ["notes.txt", "a/._1.png", ".cache/1.png", "jpg", "b.jpg.part"]
    write_folder(tmp_path, dict.fromkeys(keys + others, encode(photo())))
    source = sources.FolderSource(tmp_path)
    assert source.keys == sorted(keys)
    assert len(source) == 6
    assert source.name(0) == str(tmp_path / "a.webp")
    np.testing.assert_array_equal(source[0], photo())


def test_folder_follows_links_to_folders(tmp_path):
    write_folder(tmp_path / "disk", {"1.png": encode(photo())})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "disk")
    assert sources.FolderSource(tmp_path / "photos").keys == ["linked/1.png"]


def test_folder_reads_every_folder_once_where_it_comes_first(tmp_path):
    pictures = {key: encode(photo()) for key in ("1.png", "b/2.png", "b/c/3.png")}
    write_folder(tmp_path, pictures)
    links = {"loop": ".", "a": "b", "b/up": "..", "d": "b/c", "self": "self"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    source = sources.FolderSource(tmp_path)
    assert source.keys == ["1.png", "a/2.png", "a/c/3.png"]
    assert all(source[i].shape == (40, 60, 3) for i in range(3))


@pytest.mark.parametrize("root", [".hidden", ".hidden/below"])
def test_folder_may_be_hidden_itself(tmp_path, root):
    root = write_folder(
        tmp_path / root, dict.fromkeys(["1.png", "a/2.png", ".b/3.png"], b"")
    )
    (root / ".link").symlink_to(root / "a")
    assert sources.FolderSource(root).keys == ["1.png", "a/2.png"]


@pytest.mark.parametrize("source", [sources.FolderSource, sources.TarSource])
def test_missing_or_empty_path_is_an_error(tmp_path, source):
    with pytest.raises(ValueError, match=r"path must be .*nowhere"):
        source(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    if source is sources.FolderSource:
        write_folder(empty, {"readme.txt": b"hello"})
    else:
        write_tar(empty, {"readme.txt": b"hello"})
    with pytest.raises(ValueError, match=r"no picture \(\.jpg, .*empty"):
        source(empty)


def test_file_that_is_gone_is_unreadable(tmp_path):
    write_folder(tmp_path, {"1.png": encode(photo())})
    source = sources.FolderSource(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"1\.png: No such file"):
        source[0]


def test_tar_equals_folder(tmp_path):
    pictures = {f"{n % 2}/{n}.png": encode(photo(seed=n)) for n in range(6)}
    folder = sources.FolderSource(write_folder(tmp_path / "photos", pictures))
    keys = list(pictures)
    write_tar(tmp_path / "1.tar", {f"./{k}": pictures[k] for k in keys[:4]})
    write_tar(
        tmp_path / "2.tar", {k: pictures[k] for k in keys[4:]} | {"x/._1.png": b""}
    )
    for paths in (
        tmp_path / "*.tar",
        [str(tmp_path / "2.tar"), str(tmp_path / "1.tar")],
    ):
        tar = pickle.loads(pickle.dumps(sources.TarSource(paths)))
        assert tar.keys == folder.keys
        assert tar.name(0) == f"{tmp_path / '1.tar'}:0/0.png"
        for index in range(6):
            np.testing.assert_array_equal(tar[index], folder[index])


@pytest.mark.parametrize("damage", ["compressed", "cut", "text"])
def test_damaged_tar_is_an_error(tmp_path, damage):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pictures = {f"{n}.png": encode(noise) for n in range(4)}
    path = tmp_path / "photos.tar"
    if damage == "compressed":
        write_tar(path, pictures, "w:gz")
    elif damage == "cut":
        write_tar(path, pictures)
        path.write_bytes(path.read_bytes()[:30_000])
    else:
        path.write_text("not a tar file" * 100)
    with pytest.raises(ValueError, match=r"path must be an uncompressed, whole tar"):
        sources.TarSource(path)


def test_bundled_photos_are_disjoint_and_decode():
    names = {}
    for split, count in {"train": 3, "validation": 2}.items():
        source = sources.BundledSource(split)
        assert len(source) == count
        names[split] = {source.name(i) for i in range(count)}
        for index in range(count):
            image = source[index]
            assert image.ndim == 3 and min(image.shape[:2]) >= 300
            assert np.ptp(image.astype(int), axis=-1).mean() > 5  # colour
    assert not names["train"] & names["validation"]


# TFDS


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """Made by tests."""

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
    """The same set in TFRecord, which TFDS writes with TensorFlow alone."""
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
        source = tfrecord.TFDSSource("tiny_photos", split, data_dir)
        source = pickle.loads(pickle.dumps(source))
        assert len(source) == size
        assert source.name(1) == f"tiny_photos/1.0.0 {split} record 1"
        pictures = {source[i].tobytes() for i in range(size)}
        assert pictures == {photo(seed=n).tobytes() for n in range(size)}
    part = tfrecord.TFDSSource("tiny_photos", "train[1:4]+validation[2:]", data_dir)
    train = tfrecord.TFDSSource("tiny_photos:1.0.0", "train", str(data_dir))
    validation = tfrecord.TFDSSource("tiny_photos", "validation", data_dir)
    expected = [train[1], train[2], train[3], validation[2]]
    assert len(part) == 4
    for index in range(4):
        np.testing.assert_array_equal(part[index], expected[index])
    depth = tfrecord.TFDSSource("tiny_photos", "train", data_dir, feature="depth")
    assert sorted(depth[i].max() for i in range(7)) == list(range(7))
    (batch,) = take(train, 1)
    assert batch["image"].shape == (4, 16, 16, 3)
    assert "tensorflow" not in sys.modules


def test_tfds_errors(array_record_dir, tfrecord_dir, tmp_path):
    with pytest.raises(ValueError, match="Unknown split 'test'.*'train', 'validation'"):
        tfrecord.TFDSSource("tiny_photos", "test", array_record_dir)
    with pytest.raises(ValueError, match=r"feature must be one of .*'label'.*'photo'"):
        tfrecord.TFDSSource("tiny_photos", "train", array_record_dir, feature="photo")
    folder = tmp_path / "tiny_photos" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (tfrecord_dir / "tiny_photos" / "1.0.0").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(
            content[:-9] if "tfrecord" in path.name else content
        )
    with pytest.raises(ValueError, match="TFRecord file .*00000-of-00002 is cut short"):
        tfrecord.TFDSSource("tiny_photos", "train", tmp_path)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    with pytest.raises(ValueError, match="prepared as riegeli; only array_record"):
        tfrecord.TFDSSource("tiny_photos", "train", tmp_path)


def test_tfds_needs_to_know_the_feature():
    image = tfds.features.Image()
    choose = tfrecord._image_feature
    assert choose({"label": 0, "hr": image}, "x") == "hr"
    assert choose({"image": image, "depth": image}, "x") == "image"
    with pytest.raises(ValueError, match=r"feature must say .*\['hr', 'lr'\]"):
        choose({"lr": image, "hr": image}, "x")


def test_tfds_says_how_to_prepare_and_it_works(tmp_path):
    with pytest.raises(ValueError, match="is not prepared") as error:
        tfrecord.TFDSSource("tiny_photos", "train", tmp_path)
    assert "pip install 'pconv-jax[tfds-prepare]'" in str(error.value)
    command = re.search(r'python -c "(.*)"', str(error.value))[1]
    tfds.disable_progress_bar()
    exec(command, {})
    assert len(tfrecord.TFDSSource("tiny_photos", "train", tmp_path)) == 7


# Opening


def test_hold_out_is_disjoint_complete_and_stable(tmp_path):
    content = encode(photo(4, 4))
    write_folder(tmp_path, {f"{n}.png": content for n in range(200)})

    def names(split):
        source = sources.open_source(
            "folder", split=split, path=tmp_path, validation_fraction=0.1
        )
        return {source.name(i) for i in range(len(source))}

    train, validation = names("train"), names("validation")
    assert not train & validation
    assert len(train) + len(validation) == 200
    assert 8 <= len(validation) <= 35
    write_folder(tmp_path, {f"new/{n}.png": content for n in range(100)})
    assert train < names("train") and validation < names("validation")


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3])
def test_hold_out_leaves_no_side_empty(tmp_path, count, fraction):
    path = write_tar(
        tmp_path / "x.tar", {f"{n}.png": encode(photo()) for n in range(count)}
    )
    sizes = [
        len(
            sources.open_source("tar", split=s, path=path, validation_fraction=fraction)
        )
        for s in ("train", "validation")
    ]
    assert sum(sizes) == count and min(sizes) > 0


def test_hold_out_of_tar_and_folder_agree(tmp_path):
    pictures = {f"{n}.png": encode(photo(4, 4, n)) for n in range(30)}
    folder = write_folder(tmp_path / "photos", pictures)
    tar = write_tar(tmp_path / "photos.tar", pictures)
    one = sources.open_source("folder", split="train", path=folder)
    other = sources.open_source("tar", split="train", path=tar)
    assert len(one) == len(other)
    for index in range(len(one)):
        np.testing.assert_array_equal(one[index], other[index])


def test_only_picture_is_trained_on(tmp_path):
    write_folder(tmp_path, {"1.png": encode(photo())})
    assert len(sources.open_source("folder", split="train", path=tmp_path)) == 1
    with pytest.raises(ValueError, match=r"only one picture, .*give a validation_path"):
        sources.open_source("folder", split="validation", path=tmp_path)


def test_open_other_sources(tmp_path, array_record_dir):
    one = write_folder(tmp_path / "1", {"1.png": encode(photo())})
    two = write_folder(tmp_path / "2", {"2.png": encode(photo())})
    for split, path in {"train": one / "1.png", "validation": two / "2.png"}.items():
        source = sources.open_source(
            "folder", split=split, path=one, validation_path=two
        )
        assert (len(source), source.name(0)) == (1, str(path))
    options = {"name": "tiny_photos", "data_dir": array_record_dir}
    assert len(sources.open_source("tfds", split="train", **options)) == 7
    options |= {"train_split": "train[:2]", "validation_split": "train[2:]"}
    assert len(sources.open_source("tfds", split="train", **options)) == 2
    assert len(sources.open_source("tfds", split="validation", **options)) == 5
    assert len(sources.open_source("bundled", split="validation")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "zip"},
            "kind must be 'bundled', .* or 'tfds', got 'zip'",
        ),
        ({"kind": "bundled", "split": "test"}, "split must be 'train' or 'validation'"),
        ({"kind": "folder"}, "path is needed for kind 'folder'"),
        ({"kind": "tfds"}, "name is needed for kind 'tfds'"),
    ],
)
def test_open_source_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sources.open_source(**{"split": "train"} | arguments)


# Training batches


def test_train_batches_are_plain_arrays():
    (batch,) = take(Flat(9), 1)
    assert {k: (type(v), v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.ndarray, np.uint8, (4, 16, 16, 3)),
        "seed": (np.ndarray, np.uint32, (4,)),
    }


def test_every_epoch_has_every_picture_once_in_another_order():
    batches = take(Flat(12), 6)
    order = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    one, two = order[:12], order[12:]
    assert sorted(one) == sorted(two) == list(range(12))
    assert list(one) != list(two)
    seeds = np.concatenate([batch["seed"] for batch in batches])
    assert len(set(seeds)) == 24
    other = take(Flat(12), 3, seed=4)
    assert list(one) != list(np.concatenate([b["image"][:, 0, 0, 0] for b in other]))


def test_crop_is_a_square_of_the_scale_asked_for():
    size = 128
    images = np.concatenate(
        [
            batch["image"].astype(float)
            for batch in take(
                Gradient(8, (100, 200)), 64, image_size=size, scale=(0.4, 0.8)
            )
        ]
    )
    # A crop of side s that starts at column x holds the values x ... x + s - 1.
    left, right = images[:, 64, 0, 0], images[:, 64, -1, 0]
    top, bottom = images[:, 0, 64, 1], images[:, -1, 64, 1]
    width, height = np.abs(right - left) + 1, bottom - top + 1
    assert np.all(np.abs(width - height) <= 2)
    assert 38 <= height.min() < 44 and 76 < height.max() <= 82
    assert abs(height.mean() - 60) < 3
    mirrored = np.mean(right < left)
    assert 0.4 < mirrored < 0.6
    start = np.minimum(left, right)
    assert start.min() < 8 and np.max(start + width) > 192
    assert top.min() < 4 and bottom.max() > 95


def test_no_flip_and_whole_square():
    for batch in take(
        Gradient(8, (50, 50)), 8, image_size=50, scale=(1, 1), flip=False
    ):
        np.testing.assert_array_equal(
            batch["image"][..., 0], np.broadcast_to(np.arange(50), (4, 50, 50))
        )


def test_shrinking_averages():
    class Stripes(Flat):
        def read(self, index):
            stripes = np.zeros((64, 64, 3), np.uint8)
            stripes[:, ::4] = 200
            return encode(stripes)

    (batch,) = take(Stripes(4), 1, image_size=16, scale=(1, 1), flip=False)
    np.testing.assert_array_equal(batch["image"], 50)


def test_resume_equals_dropping_batches():
    source = Flat(10)
    assert_equal_batches(take(source, 3, start_step=4), take(source, 7)[4:])


def test_processes_share_the_global_batch():
    source = Gradient(10, (30, 40))
    whole = take(source, 3, start_step=1)
    parts = [
        take(source, 3, start_step=1, process_index=i, process_count=2)
        for i in range(2)
    ]
    for step in range(3):
        for key in ("image", "seed"):
            joined = np.stack([part[step][key] for part in parts], 1)
            joined = joined.reshape(whole[step][key].shape)
            np.testing.assert_array_equal(joined, whole[step][key])


class Failing(Gradient):
    """Reads 80 pictures in a process, then no more."""

    left = 80

    def read(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyError("the source's own error")
        return super().read(index)


def test_workers_change_nothing_and_their_end_is_an_error():
    options = {"batch_size": 4, "image_size": 16, "seed": 3}
    expected = take(Gradient(60, (30, 40), bad=(5, 11)), 7)
    for workers in (1, 2):
        source = Failing(60, (30, 40), bad=(5, 11))
        batches = pipeline.train_batches(source, workers=workers, **options)
        assert_equal_batches([next(batches) for _ in range(7)], expected)
        if workers == 1:
            with pytest.raises(KeyError, match="the source's own error"):
                for _ in range(100):
                    next(batches)
        else:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="exit code -9") as error:
                for _ in range(100):
                    next(batches)
            assert "enough memory" in "".join(error.value.__notes__)
        batches.close()
        assert not multiprocessing.active_children()


def test_script_with_workers_ends_quietly(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pconv_jax.data import pipeline, sources\n"
        "def main():\n"
        "    global batches\n"
        "    batches = pipeline.train_batches(\n"
        "        sources.BundledSource('train'), batch_size=2,\n"
        "        image_size=128, seed=0, workers=1)\n"
        "    print(next(batches)['image'].shape)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "(2, 128, 128, 3)\n"


def test_masks_come_from_a_folder_and_leave_the_images_alone(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        mask = np.zeros((64, 64), np.uint8)
        top, left = rng.integers(8, 32, 2)
        mask[top : top + 20, left : left + 20] = 255
        write_folder(tmp_path, {f"{number}.png": encode(mask)})
    folder = MaskFolder(tmp_path)
    batches = take(Gradient(10), 3, mask_folder=folder)
    for batch in batches:
        assert batch["mask"].dtype == np.uint8
        assert batch["mask"].shape == (4, 16, 16, 1)
        assert set(np.unique(batch["mask"])) == {0, 1}
    assert len({mask.tobytes() for batch in batches for mask in batch["mask"]}) > 6
    later = take(Gradient(10), 1, mask_folder=folder, start_step=2)
    assert_equal_batches(later, batches[2:])
    for batch in batches:
        del batch["mask"]
    assert_equal_batches(batches, take(Gradient(10), 3))


def test_unreadable_pictures_are_skipped_named_and_counted(tmp_path, caplog):
    pictures = {f"{n:02}.png": encode(photo(seed=n)) for n in range(40)}
    pictures["07.png"] = pictures["07.png"][:200]
    pictures["08.png"] = b""
    write_folder(tmp_path, pictures)
    source = sources.FolderSource(tmp_path)
    bad = {str(tmp_path / "07.png"), str(tmp_path / "08.png")}
    with caplog.at_level(logging.WARNING):
        batches = pipeline.train_batches(source, batch_size=8, image_size=16, seed=0)
        for _ in range(15):  # three epochs
            assert next(batches)["image"].shape == (8, 16, 16, 3)
        batches.close()
    assert set(batches.unreadable) == bad and len(batches.unreadable) == 2
    skipped = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(skipped) == 2
    assert {line.split(" cannot")[0] for line in skipped} == bad
    assert skipped[1].endswith("(2 of 40 pictures so far)")


def test_next_readable_picture_takes_the_place():
    batches = take(Flat(40, bad=(38, 39)), 10)
    seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    assert sorted(seen) == [0, 0, 0, *range(1, 38)]


@pytest.mark.parametrize("bad", [(0, 13, 26), (7, 8, 9), range(40)])
def test_too_many_unreadable_pictures_are_an_error(bad):
    message = r"3 of the 40 pictures of source cannot be read, over 5%.*flat-\d+, flat"
    with pytest.raises(ValueError, match=message):
        take(Flat(40, bad=bad), 20)


def test_enlarging_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        take(Flat(8), 4, image_size=19, scale=(0.5, 0.9))
        take(Flat(8), 4, image_size=10, scale=(0.5, 0.9))
    (line,) = [r.getMessage() for r in caplog.records]
    assert re.match(r"flat-\d is enlarged: its crop is smaller than image_size", line)


def test_batches_cannot_be_had_after_close():
    batches = pipeline.train_batches(Flat(4), batch_size=2, image_size=8, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="these batches are closed"):
        next(batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"image_size": -1}, "image_size must be positive, got -1"),
        ({"process_count": 3}, r"multiple of process_count \(=3\), got 4"),
        ({"process_index": 1}, r"process_index must be in \[0, 1\), got 1"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"start_step": -1}, "start_step and workers must not be negative"),
        ({"scale": (0.0, 1.0)}, r"scale must be 0 < low <= high <= 1, got \(0.0"),
        ({"scale": (0.5, 1.5)}, r"scale must be 0 < low <= high <= 1"),
    ],
)
def test_train_batches_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        take(Flat(4), 1, **arguments)


# Evaluation batches


def evaluate(source, **options):
    return list(
        pipeline.eval_batches(source, **{"batch_size": 4, "image_size": 16} | options)
    )


def test_eval_batches_are_central_squares_of_every_picture():
    batches = evaluate(Gradient(6, (20, 31)), image_size=20)
    assert [{k: (v.dtype, v.shape) for k, v in b.items()} for b in batches] == [
        {
            "image": (np.uint8, (4, 20, 20, 3)),
            "index": (np.int32, (4,)),
            "weight": (np.float32, (4,)),
        }
    ] * 2
    images, index, weight = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("image", "index", "weight")
    )
    np.testing.assert_array_equal(weight, [1] * 6 + [0] * 2)
    np.testing.assert_array_equal(index[:6], range(6))
    np.testing.assert_array_equal(images[:6, 3, 3, 2], range(6))
    # Columns 5 ... 24 of 31.
    np.testing.assert_array_equal(
        images[:6, ..., 0], np.broadcast_to(np.arange(5, 25), (6, 20, 20))
    )


def test_eval_repeats_are_other_crops_and_always_the_same():
    source = Gradient(3, (40, 60))
    batches = evaluate(source, num_examples=10)
    images = np.concatenate([batch["image"] for batch in batches])[:10]
    assert len({image.tobytes() for image in images}) == 10
    np.testing.assert_array_equal(images[:, 0, 0, 2], np.arange(10) % 3)
    assert_equal_batches(evaluate(source, num_examples=10), batches)
    once = np.concatenate([batch["image"] for batch in evaluate(source)])
    np.testing.assert_array_equal(images[:3], once[:3])
    assert sum(b["weight"].sum() for b in evaluate(source, num_examples=2)) == 2


def test_eval_takes_the_next_picture_for_one_that_cannot_be_read(caplog):
    batches = evaluate(Flat(50, bad=(2,)))
    red = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    np.testing.assert_array_equal(red[:50], [0, 1, 3, *range(3, 50)])
    assert "flat-2 cannot be read, and flat-3 takes its place" in caplog.text
    with pytest.raises(ValueError, match="2 of the 39 pictures .* flat-2, flat-3"):
        evaluate(Flat(39, bad=(2, 3)))


def test_eval_errors():
    with pytest.raises(ValueError, match="num_examples must be positive, got 0"):
        evaluate(Flat(3), num_examples=0)
