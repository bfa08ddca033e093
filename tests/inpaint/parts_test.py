import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pconv_jax._errors import UserError
from pconv_jax.inpaint import image_io, parts
from tests.helpers.images import encode, photo

COLORS = photo(8, 9)


def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(array, kind, data):
    file = encode(array, "PNG")
    return file[:33] + chunk(kind, data) + file[33:]


def round_trip(tmp_path, data, suffix):
    """Write an image again; return the file, and the warnings."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = image_io.read(path)
        assert not caught  # A mask is read, too, and its metadata are not written.
        image_io.write(path, file)
    return path.read_bytes(), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"gAMA", struct.pack(">I", 100_000)),
        (b"cHRM", struct.pack(">8I", *range(8))),
        (b"sRGB", b"\0"),
        (b"cICP", b"\x09\x10\0\1"),
        (b"mDCV", bytes(24)),
        (b"vpAg", bytes(9)),  # Safe to copy, as its last letter says.
    ],
)
def test_colors_of_png_files_are_kept(tmp_path, kind, data, dtype):
    array = COLORS.astype(dtype)
    encoded = png(array, kind, data) if dtype == np.uint8 else _png16(kind, data)
    new, messages = round_trip(tmp_path, encoded, ".png")
    assert new.count(chunk(kind, data)) == 1 and not messages


def _png16(kind, data):
    path = io.BytesIO()
    image = Image.fromarray(COLORS[..., 0].astype(np.uint16))
    image.save(path, "PNG")
    return path.getvalue()[:33] + chunk(kind, data) + path.getvalue()[33:]


def segment(number, data):
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


def box(kind, data):
    return struct.pack(">I", len(data) + 8) + kind + data


def others():
    jpeg, jp2 = encode(COLORS, "JPEG"), encode(COLORS, "JPEG2000")
    at = jp2.index(b"jp2c") - 4
    webp = encode(COLORS, "WEBP", lossless=True)[8:] + b"C2PA\4\0\0\0abcd"
    bmp = encode(COLORS, "BMP")
    return [
        (png(COLORS, b"caBX", b"c2pa"), ".png", "chunk caBX"),
        (png(COLORS, b"tIME", bytes(7)), ".png", "chunk tIME"),
        (jpeg[:2] + segment(11, b"JP\0\1rest") + jpeg[2:], ".jpg", "APP11 (JP)"),
        (jpeg[:2] + segment(0, b"JFXX\0\x13") + jpeg[2:], ".jpg", "APP0 (JFXX)"),
        (jpeg + b"ftypmp42", ".jpg", "data after the image"),
        (jp2[:at] + box(b"uuid", bytes(20)) + jp2[at:], ".jp2", "box uuid"),
        (jp2.replace(b"colr\1", b"colr\2"), ".jp2", "ICC profile"),
        (
            b"RIFF" + struct.pack("<I", len(webp)) + webp,
            ".webp",
            "chunk C2PA",
        ),
        (bmp, ".bmp", None),
    ]


@pytest.mark.parametrize(("data", "suffix", "name"), others())
def test_what_cannot_be_copied_is_named(tmp_path, data, suffix, name):
    _, messages = round_trip(tmp_path, data, suffix)
    expected = f"left out of its metadata, because it cannot be copied: {name}."
    assert messages == ([expected] if name else [])


def test_names_of_many_parts_are_few(tmp_path):
    kinds = [bytes([97, 98, 65 + i // 26, 65 + i % 26]) for i in range(40)]
    data = encode(COLORS, "PNG")
    data = data[:33] + b"".join(chunk(kind, b"") for kind in kinds) + data[33:]
    _, (message,) = round_trip(tmp_path, data, ".png")
    assert message.endswith("chunk abAJ, 30 more.")


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("GIF", b"GIF89a!\xff\x0bXMP DataXMP", ["XMP"]),
        ("BMP", bytes(14) + b"\x7c" + bytes(55) + b"DEBM", ["ICC profile"]),
        ("JPEG2000", b"\xff\x4f\xff\x51", []),  # Not in a file of boxes.
        ("JPEG2000", box(b"jP  ", b"") + b"\0\0\0\0jp2c", []),
        ("TIFF", b"", []),
    ],
)
def test_marks(kind, data, expected):
    assert parts.dropped_parts(data, kind) == expected


@pytest.mark.parametrize(
    "between",
    [b"", b"\xff", b"\0junk", b"\xff\0", b"\xff\xd9", b"\xff\xf0", b"\xff\xc8"],
)
def test_exif_is_split_off_wherever_pillow_finds_it(between):
    data, exif = with_exif(between)
    with (
        pytest.warns(UserWarning, match="malformed MPO"),
        Image.open(io.BytesIO(data)) as image,
    ):
        assert image.info["exif"] == exif and image.getexif()[271] == "Maker"
    without, found = parts.split_exif(data)
    assert found == exif and b"Exif" not in without and b"MPF" not in without


def with_exif(between):
    """Make a JPEG file with EXIF data in two segments."""
    tags = Image.Exif()
    tags[271] = "Maker"
    exif = tags.tobytes()
    bare = encode(photo(24, 32), "JPEG")
    index = segment(2, b"MPF\0" + exif.removeprefix(b"Exif\0\0"))
    data = bare[:2] + segment(1, exif[:20]) + between + index + between
    return data + segment(1, b"Exif\0\0" + exif[20:]) + bare[2:], exif


def test_pillow_reads_no_exif(monkeypatch, tmp_path):
    # It would read every tag, and tags may share their bytes.
    monkeypatch.setattr(Image.Exif, "load", None)
    data, exif = with_exif(b"")
    (tmp_path / "a.jpg").write_bytes(data)
    assert image_io.read(tmp_path / "a.jpg").info["exif"] == exif


def test_segments_without_a_length():
    data = encode(photo(24, 32), "JPEG")
    changed = data[:2] + b"\xff\xe5\0\0" + data[2:]
    assert parts.split_exif(changed) == (changed, b"")
    for end in (2, 3, 4, 5, 30):
        assert parts.split_exif(data[:end]) == (data[:end], b"")


def test_many_segments(tmp_path):
    data = encode(photo(24, 32), "JPEG")
    path = tmp_path / "a.jpg"
    for count, allowed in [(9_000, True), (11_000, False)]:
        path.write_bytes(data[:2] + segment(5, b"") * count + data[2:])
        if allowed:
            image_io.read(path)
        else:
            with pytest.raises(UserError, match="a.jpg: it has more than 10000 segm"):
                image_io.read(path)


def test_long_comments_of_a_gif_file(tmp_path):
    data = encode(Image.fromarray(photo(24, 32)), "GIF", comment=b"abc" * 100)
    assert parts.gif_comments(data) == 305  # With what is around two blocks.
    at = data.index(b"!\xfe")
    long = b"!\xfe" + (b"\xff" + b"a" * 255) * 4200 + b"\0"
    (tmp_path / "a.gif").write_bytes(data[:at] + long + data[at:])
    with pytest.raises(UserError, match="its comments are longer than 1048576 bytes"):
        image_io.read(tmp_path / "a.gif")
    (tmp_path / "a.gif").write_bytes(data)
    assert image_io.read(tmp_path / "a.gif").info["comment"] == b"abc" * 100


@pytest.mark.parametrize(
    ("rest", "count"), [(b"", 0), (bytes(7), 0), (bytes(7) + b"!\xfe\xff", 259)]
)
def test_the_beginning_of_a_gif_file(rest, count):
    """A block that is cut off counts as long as it says."""
    assert parts.gif_comments(b"GIF89a" + rest) == count
