"""Files that are made to do harm: valid ones, changed at random."""

import io
import json
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image
from safetensors.numpy import save

from pconv_jax._errors import RunError, UserError
from pconv_jax.data import sources
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.evaluate.store import Store
from pconv_jax.inpaint import image_io
from pconv_jax.inpaint.hole import hole_from_mask
from pconv_jax.train import workdir
from pconv_jax.weights import importers, pretrained
from pconv_jax.weights.formats.arrays import read_arrays
from tests.helpers import torch_writer
from tests.helpers.images import encode, photo
from tests.helpers.networks import make_network, small_mmagic


class Reader(NamedTuple):
    """What reads files of others.

    Attributes:
      name: Name of the file that it reads.
      read: Reads the file at a path.
      seeds: Contents of valid files.
    """

    name: str
    read: Callable[[Path], object]
    seeds: list[bytes]


def _repair(path):
    """Read an image and write it, as a repair does."""
    file = image_io.read(path, max_pixels=10_000_000)
    for suffix in (path.suffix, ".png", ".tif"):
        if suffix != ".npy":
            image_io.write(path.with_name(f"out{suffix}"), file)


def _exif():
    exif = Image.Exif()
    exif.update({271: "Maker", 282: 72.0, 306: "2020:01:01", 33432: "(c)"})
    exif.get_ifd(34665)[37500] = b"note" * 9
    exif.get_ifd(34853)[1] = "N"
    return exif


def _images():
    image = Image.fromarray(photo(24, 32))
    options = {"exif": _exif(), "icc_profile": bytes(200)}
    yield ".png", encode(image, "PNG", **options)
    yield ".png", encode(image.quantize(8), "PNG", transparency=3)
    yield ".jpg", encode(image, "JPEG", xmp=b"<x/>", comment=b"hello", **options)
    yield ".webp", encode(image, "WEBP", **options)
    yield ".bmp", encode(image, "BMP")
    yield ".gif", encode(image, "GIF", save_all=True, append_images=[image])
    yield ".gif", encode(image, "GIF", comment=b"hello" * 99)
    yield ".jpg", encode(image, "MPO", save_all=True, append_images=[image], **options)
    yield ".avif", encode(image, "AVIF")
    yield ".avif", encode(image, "AVIF", **options)
    yield ".jp2", encode(image, "JPEG2000")
    for compression in (None, "tiff_lzw", "jpeg", "tiff_adobe_deflate"):
        yield ".tif", encode(image, "TIFF", compression=compression, exif=_exif())
    for dtype in (np.uint16, np.float32, np.float64, np.int16):
        file = io.BytesIO()
        array = np.asarray(image).astype(dtype)
        tags = [
            (33550, "d", 3, (1.0, 1.0, 0.0), True),
            (50706, "B", 4, b"\1\4\0\0", True),
        ]
        tifffile.imwrite(
            file,
            array,
            photometric="rgb",
            metadata=None,
            compression="zlib",
            extratags=tags,
            planarconfig="contig",
            bigtiff=dtype == np.float64,
        )
        yield ".tif", file.getvalue()
    file = io.BytesIO()
    np.save(file, np.zeros((5, 6, 3), np.float32))
    yield ".npy", file.getvalue()


def _masks():
    labels = np.kron(
        np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((8, 8), np.uint8)
    )
    for array in (labels, labels * 50, np.dstack([labels * 50] * 4)):
        yield encode(array, "PNG")


def _tar():
    import tarfile

    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for key in ("a.png", "b" * 90 + ".png"):
                content = encode(photo(8, 8))
                member = tarfile.TarInfo(key)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        yield file.getvalue()


def _read_source(path):
    source = sources.open_images(path)
    for index in range(min(len(source), 4)):
        source[index]


def _read_mask_folder(path):
    folder = MaskFolder(path.parent)
    folder.sample(np.random.default_rng(0), 16)


def _weights_files():
    model, variables = make_network()
    with tempfile.TemporaryDirectory() as folder:
        for kernels in ("float32", "int8"):
            path = Path(folder, "a.safetensors")
            pretrained.save_pretrained(
                path, model, variables, info={"notes": ["a"]}, kernels=kernels
            )
            yield path.read_bytes()


def _h5():
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        h5.create_group("a/b/c")["kernel"] = np.ones((3, 3, 2, 4), np.float32)
        h5["a/bias"] = np.ones(4, np.float32)
        h5.attrs["layer_names"] = [b"a", b"b"]
    return file.getvalue()


def _npz():
    for write in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        write(file, a=np.ones((3, 4), np.float32), b=np.arange(5))
        yield file.getvalue()


def _read_records(path):
    store = Store(path.parent)
    store.open("a", "x")
    digest = store._paths["a"]
    path.replace(digest)
    store.open("a", "x")


def _records():
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.open("a", "x")
        place = {"method": "a", "hole": "1%-10%", "border": True, "psnr": 25.0}
        store.add("a", [place | {"index": i} for i in range(5)])
        return store._paths["a"].read_bytes()


def _read_config(path):
    from pconv_jax.runs.config import read_settings
    from tests.helpers.networks import train_config

    workdir.check_workdir(path.parent, read_settings(train_config(None)))


def _config():
    from pconv_jax.runs.config import read_settings
    from tests.helpers.networks import train_config

    return json.dumps(read_settings(train_config(None)).to_dict()).encode()


def readers() -> dict[str, Reader]:
    """Make every reader of files of others, by name."""
    images = {}
    for suffix, data in _images():
        images.setdefault(suffix, []).append(data)
    network = small_mmagic()
    torch = [
        dump(network)
        for dump in (
            torch_writer.dump_zip,
            torch_writer.dump_legacy,
            torch_writer.dump_tar,
        )
    ]
    weights = list(_weights_files())
    result = {
        f"image{suffix}": Reader(f"a{suffix}", _repair, seeds)
        for suffix, seeds in images.items()
    }
    masks = list(_masks())
    return result | {
        "mask": Reader(
            "a.png", lambda p: hole_from_mask(image_io.read(p).image), masks
        ),
        "mask folder": Reader("a.png", _read_mask_folder, masks),
        "training image": Reader(
            "a.png",
            lambda path: sources.FolderSource(path.parent)[0],
            [data for seeds in images.values() for data in seeds[:2]],
        ),
        "tar": Reader("a.tar", _read_source, list(_tar())),
        "weights file": Reader("a.safetensors", pretrained.from_pretrained, weights),
        "safetensors": Reader(
            "a.safetensors", read_arrays, [save({"a": np.ones((3, 4), np.float32)})]
        ),
        "npz": Reader("a.npz", read_arrays, list(_npz())),
        "h5": Reader("a.h5", read_arrays, [_h5()]),
        "pth": Reader("a.pth", importers.import_network, torch),
        "config.json": Reader("config.json", _read_config, [_config()]),
        "records": Reader("a.jsonl", _read_records, [_records()]),
    }


# Numbers at which sizes overflow, or turn negative.
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a file at random: bytes, numbers, parts, its end."""
    if data[:2] == b"PK" and rng.random() < 0.3:
        return _mutate_zip(rng, data)
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        # Most of what matters is at the beginning.
        end = len(changed) if rng.random() < 0.5 else min(len(changed), 300)
        at = int(rng.integers(max(end, 1)))
        match rng.integers(7):
            case 0:
                changed[at : at + 1] = rng.bytes(1)
            case 1:
                form = ("<", ">")[rng.integers(2)] + "BHI"[rng.integers(3)]
                size = struct.calcsize(form)
                number = int(rng.choice(_NUMBERS)) & (256**size - 1)
                changed[at : at + size] = struct.pack(form, number)
            case 2:
                del changed[at : at + int(rng.integers(1, 40))]
            case 3:
                part = bytes(changed[at : at + int(rng.integers(1, 60))])
                to = int(rng.integers(len(changed) + 1))
                changed[to:to] = part * int(rng.choice([1, 1, 1, 50]))
            case 4:
                del changed[at:]
            case 5:
                changed[at : at + 4] = rng.bytes(4)
            case 6:
                changed[at : at + 1] = rng.choice([b"[", b"{", b'"', b"9", b"\0"])
    return bytes(changed)


def _mutate_zip(rng, data):
    """Change the content of an archive's members, and keep the archive whole."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if rng.random() < 0.5 and content:
                content = mutate(rng, content)
            new.writestr(member.filename, content, compress_type=member.compress_type)
    return file.getvalue()


def attempt(reader: Reader, seed: int, folder: Path) -> tuple[bytes, str | None]:
    """Read a changed file.

    Returns:
      The file, and the error, if it is another one than a sentence for people.
    """
    rng = np.random.default_rng(seed)
    data = mutate(rng, reader.seeds[rng.integers(len(reader.seeds))])
    path = folder / reader.name
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader.read(path)
        except (UserError, RunError) as error:
            str(error).encode()  # It can be printed.
        except Exception as error:
            return data, f"{type(error).__name__}: {error}"
    return data, None


def flatten(tree) -> dict[str, np.ndarray]:
    """Flatten nested dicts to arrays by path."""
    import jax

    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in paths
    }
