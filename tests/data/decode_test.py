import io
import resource
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from pconv_jax.data import decode, pipeline
from pconv_jax.data.decode import UnreadableImageError, decode_gray, decode_image
from pconv_jax.inpaint import image_io
from tests.helpers.images import encode, photo


def encode_16_bits(image, suffix):
    return cv2.imencode(suffix, image[..., ::-1].astype(np.uint16) * 257)[1].tobytes()


def images_of_every_kind():
    rgb = photo()
    image = Image.fromarray(rgb)
    gray = np.asarray(image.convert("L"))
    alpha = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    palette = image.quantize(16)
    gray_rgb = np.dstack([gray] * 3)
    bits = image.convert("1")
    return {
        "png": (encode(rgb), rgb, 0),
        "bmp": (encode(rgb, "BMP"), rgb, 0),
        "tiff": (encode(rgb, "TIFF"), rgb, 0),
        "webp": (encode(rgb, "WEBP", lossless=True), rgb, 0),
        "jpeg": (encode(rgb, "JPEG", quality=95), rgb, 12),
        "progressive": (encode(rgb, "JPEG", quality=95, progressive=True), rgb, 12),
        "gray png": (encode(gray), gray_rgb, 0),
        "gray jpeg": (encode(gray, "JPEG", quality=95), gray_rgb, 4),
        "gray and alpha": (encode(np.dstack([gray, alpha])), gray_rgb, 0),
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
        "16 bits gray": (encode_16_bits(gray_rgb, ".png"), gray_rgb, 0),
        "cmyk": (encode(image.convert("CMYK"), "JPEG", quality=95), rgb, 16),
    }


@pytest.mark.parametrize("kind", images_of_every_kind())
def test_decodes_every_kind_to_rgb(kind):
    content, expected, tolerance = images_of_every_kind()[kind]
    actual = decode_image(content, kind)
    assert actual.dtype == np.uint8 and actual.shape == (40, 60, 3)
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 4


def test_decodes_to_gray():
    gray = photo()[..., 0]
    actual = decode_gray(encode(gray), "x")
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, gray)
    assert decode_gray(encode(photo(), "JPEG"), "x").shape == (40, 60)
    for content in (b"", b"no image", encode(gray)[:99]):
        with pytest.raises(UnreadableImageError, match="cannot read x: "):
            decode_gray(content, "x")


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
def test_truncated_image_is_unreadable(kind, part, capfd):
    options = {"progressive": True} if kind == "progressive" else {}
    # Large enough that libpng would print a line.
    content = encode(photo(400, 600), kind.replace("progressive", "JPEG"), **options)
    decode_image(content, "whole")
    pipeline._set_up_opencv()
    with pytest.raises(UnreadableImageError, match="cannot read a/b.jpg: trunc"):
        decode_image(content[: int(part * len(content))], "a/b.jpg")
    if kind not in ("BMP", "TIFF"):
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_image_whose_end_was_never_written_is_unreadable(kind):
    content = encode(photo(), kind)
    half = len(content) // 2
    with pytest.raises(UnreadableImageError):
        decode_image(content[:half] + bytes(half), "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b"hello" * 99, "not an image"), (bytes(999), "not an im")],
)
def test_what_is_no_image_is_unreadable(content, reason):
    with pytest.raises(UnreadableImageError, match=f"read x.jpg: .*{reason}"):
        decode_image(content, "x.jpg")


def test_trailing_bytes_do_no_harm():
    content = encode(photo(), "JPEG")
    np.testing.assert_array_equal(
        decode_image(content + b"trailer", "x"), decode_image(content, "x")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "progressive", "TIFF", "WEBP", "BMP"])
def test_larger_images_are_not_decoded(kind, monkeypatch):
    options = {"progressive": True} if kind == "progressive" else {}
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    content = encode(photo(), kind.replace("progressive", "JPEG"), exif=exif, **options)
    limit = 40 * 60 - 1
    monkeypatch.setattr(decode, "MAX_PIXELS", limit)
    with pytest.raises(UnreadableImageError, match="x: it has 60 x 40 pixels, and "):
        decode_image(content, "x")
    with pytest.raises(UnreadableImageError, match="60 x 40 pixels"):
        decode_gray(content, "x", max_pixels=limit)


_END = bytes(4) + b"IEND" + struct.pack(">L", zlib.crc32(b"IEND"))


def test_a_chunk_that_is_larger_than_its_file_is_not_read():
    content = encode(photo())
    at = content.index(b"IDAT") - 4
    huge = content[:at] + b"\x5b\0\0\x1f" + content[at + 4 :]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImageError, match="truncated or not an image"):
        decode_image(huge, "x")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000  # Kilobytes; it was 1.5 GB.


def test_a_small_file_of_a_huge_image_is_refused():
    header = struct.pack(">LLBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    chunk = struct.pack(">L", 13) + chunk + struct.pack(">L", zlib.crc32(chunk))
    content = b"\x89PNG\r\n\x1a\n" + chunk + _END
    with pytest.raises(UnreadableImageError, match="30000 x 30000 pixels"):
        decode_image(content, "x")


def test_kinds_that_a_pillow_does_not_know_leave_the_others(monkeypatch):
    monkeypatch.setattr(Image, "init", lambda: True)
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    image = decode_image(encode(photo(), "PPM"), "a.ppm")
    np.testing.assert_array_equal(image, photo())


def test_readers_at_the_same_time_leave_the_limit_of_pillow(tmp_path, monkeypatch):
    path, limit, open_image = tmp_path / "a.webp", Image.MAX_IMAGE_PIXELS, Image.open
    path.write_bytes(encode(photo(), "WEBP", lossless=True))
    second_opens, first_is_done = threading.Event(), threading.Event()

    def open_slowly(*args, **options):
        if threading.current_thread() is threading.main_thread():
            second_opens.wait(0.2)  # It cannot, as long as the first one does.
        else:
            second_opens.set()
            first_is_done.wait(10)
        return open_image(*args, **options)

    monkeypatch.setattr(Image, "open", open_slowly)
    second = threading.Thread(target=image_io.read, args=[path])
    starts = threading.Timer(0.02, second.start)
    starts.start()
    decode_image(path.read_bytes(), "a.webp")
    first_is_done.set()
    starts.join()
    second.join()
    assert Image.MAX_IMAGE_PIXELS == limit


def tiff_with(content, entries):
    """Add tags to a TIFF file: their number, type, count and field."""
    at = struct.unpack_from("<I", content, 4)[0]
    count = struct.unpack_from("<H", content, at)[0]
    old = [content[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    new = sorted([*old, *(struct.pack("<HHII", *entry) for entry in entries)])
    end = len(content) + len(content) % 2
    directory = struct.pack("<H", len(new)) + b"".join(new) + bytes(4)
    head = content[:4] + struct.pack("<I", end) + content[8:]
    return head.ljust(end, b"\0") + directory


def test_tags_of_the_same_bytes_take_little_memory():
    content = encode(photo(), "TIFF") + bytes(2**20)
    entries = [(code, 7, 2**20, 8) for code in range(40_000, 41_000)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.testing.assert_array_equal(
        decode_image(tiff_with(content, entries), "x"), photo()
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000  # Kilobytes; it was 1 GB.


def test_tiles_larger_than_the_image_count(monkeypatch):
    content = tiff_with(encode(photo(), "TIFF"), [(322, 4, 1, 4096), (323, 4, 1, 4096)])
    monkeypatch.setattr(decode, "MAX_PIXELS", 4096**2 - 1)
    with pytest.raises(UnreadableImageError, match="4096 x 4096 pixels"):
        decode_image(content, "x")


def test_comments_of_a_gif_file_are_not_read(monkeypatch):
    content = encode(photo(), "GIF", comment=b"a" * 1000)
    monkeypatch.setattr(Image, "open", None)  # Pillow copies them again and again.
    assert decode_image(content, "x").shape == (40, 60, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 2399)
    with pytest.raises(UnreadableImageError, match="60 x 40 pixels"):
        decode_image(content, "x")
