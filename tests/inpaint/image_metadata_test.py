"""What an image file holds besides the pixels, and kinds of pixels that are rare."""

import contextlib
import io
import itertools
import os
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from pconv_jax._errors import UserError
from pconv_jax.data import tags
from pconv_jax.data.decode import UnreadableImageError, decode_image
from pconv_jax.data.tags import Tag
from pconv_jax.inpaint import image_io, modes
from pconv_jax.inpaint.image_io import ImageFile

COLORS = (np.arange(32 * 32 * 3) % 251).astype(np.uint8).reshape(32, 32, 3)

# Tags on which Pillow or libtiff failed, or killed the process; and those of GeoTIFF,
# with any number of values of any type.
TAGS = [
    285,
    290,
    291,
    297,
    301,
    318,
    319,
    336,
    33421,
    33422,
    33432,
    33550,
    33922,
    34264,
]
TAGS += [34264, 34735, 34736, 34737, 42112, 42113, 50341, 50706, 50707, 50708]
TAGS += [50721, 50727, 50730, 50778, 50781, 51023, 65000]
VALUES = [("B", 1, 7), ("B", 4, (1, 2, 3, 4)), ("s", 0, "abc"), ("H", 1, 5)]
VALUES += [
    ("H", 3, (1, 2, 3)),
    ("I", 1, 70_000),
    ("h", 1, -3),
    ("d", 3, (1.0, 1.0, 0.0)),
]
VALUES += [("2I", 1, (72, 1)), ("s", 0, b"caf\xe9\0")]


def tiff(array=COLORS, compression=None, extratags=(), **options):
    file = io.BytesIO()
    options = {"photometric": "rgb", "metadata": None, "software": False} | options
    extratags = [(*tag, True) for tag in extratags]
    tifffile.imwrite(
        file, array, compression=compression, extratags=extratags, **options
    )
    return file.getvalue()


def round_trip(path, data, suffix=None):
    path.write_bytes(data)
    out = path.with_suffix(suffix or path.suffix)
    image_io.write(out, image_io.read(path))
    return out.read_bytes()


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tags_of_a_tiff_file_are_kept_byte_for_byte(compression, dtype, tmp_path):
    array = COLORS.astype(dtype)
    for form, count, value in VALUES:
        data = tiff(array, compression, [(t, form, count, value) for t in TAGS])
        out = round_trip(tmp_path / "a.tif", data)
        before, after = (tags.read(d).directory for d in (data, out))
        assert {code: after[code] for code in TAGS} == {c: before[c] for c in TAGS}
        read = image_io.read(tmp_path / "a.tif").image
        np.testing.assert_array_equal(modes.as_array(read), array)


def test_positions_and_layers_of_the_old_file_are_left_out(tmp_path):
    layers = (37724, "B", 4, (1, 2, 3, 4))
    data = tiff(
        extratags=[(288, "I", 1, 9), (289, "I", 1, 9), layers], compression="zlib"
    )
    with pytest.warns(UserWarning, match="left out .* old image: 37724"):
        out = round_trip(tmp_path / "a.tif", data)
    assert not {288, 289, 37724} & {*tags.read(out).directory}


# Types and values that Pillow cannot write back, or takes for others.
ODD = [Tag(1, b"\1"), Tag(2, b"1\0"), Tag(2, b"ab\xe9\xff\0"), Tag(2, b"")]
ODD += [Tag(3, b"\5\0"), Tag(3, b"\1\0\2\0\3\0"), Tag(5, b"\0" * 8), Tag(7, b"0230")]
ODD += [Tag(5, b"\xff" * 4 + b"\1\0\0\0"), Tag(10, struct.pack("<2i", -1, 3))]
ODD += [Tag(12, struct.pack("<d", 1.5)), Tag(9, struct.pack("<i", -3))]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_exif_of_any_type_is_kept(suffix, tmp_path):
    image = Image.fromarray(COLORS)
    for odd in ODD:
        directory = {code: odd for code in (270, 271, 282, 305, 306, 0x4746, 0xC4A5)}
        directory |= {34665: {36864: odd, 37500: odd}, 34853: {0: odd, 5: odd, 6: odd}}
        written = tags.Tags("<", directory, set())
        exif = tags.pack(written._replace(directory={**directory, 274: odd}))
        image.save(tmp_path / "a.jpg", exif=exif)
        out = round_trip(tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes(), suffix)
        if suffix == ".tif":
            read = tags.read(out).directory
            assert {code: read[code] for code in directory} == directory
        else:
            with Image.open(io.BytesIO(out)) as again:
                again.load()
                assert tags.read(again.info["exif"]).directory == directory


def test_damaged_exif_is_named(tmp_path):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 271, 2, 99, 10_000)
    Image.fromarray(COLORS).save(tmp_path / "a.jpg", exif=exif + b"\0" * 8)
    with pytest.warns(UserWarning, match="out of the metadata of a.jpg, .*: Make"):
        image_io.read(tmp_path / "a.jpg")


def test_exif_that_a_jpeg_file_has_no_room_for(tmp_path):
    data = tiff(extratags=[(65000, "B", 70_000, bytes(70_000)), (271, "s", 0, "Maker")])
    with pytest.warns(UserWarning, match="JPEG files have no room for them: 65000"):
        round_trip(tmp_path / "a.tif", data, ".jpg")
    assert image_io.read(tmp_path / "a.jpg").image.getexif()[271] == "Maker"


def photoshop(code, data):
    resource = b"8BIM" + struct.pack(">HHI", code, 0, len(data)) + data
    segment = b"Photoshop 3.0\0" + resource
    return resource, b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment


def test_xmp_comments_and_photoshop_data(tmp_path):
    xmp = b'<x tiff:Orientation="1"/><xmp:Thumbnails>old</xmp:Thumbnails>'
    caption, extra = photoshop(1028, b"caption!")
    _, thumbnail = photoshop(1036, b"old image")
    Image.fromarray(COLORS).save(
        tmp_path / "a.jpg", xmp=xmp, comment=b"hello", extra=extra + thumbnail
    )
    data = (tmp_path / "a.jpg").read_bytes()
    assert b"old image" in data
    out = round_trip(tmp_path / "a.jpg", data)
    assert b"<x />" in out and b"hello" in out and caption in out and b"old" not in out
    with pytest.warns(UserWarning, match=r"\.png files .*: comment, Photo"):
        out = round_trip(tmp_path / "a.jpg", data, ".png")
    assert b"<x />" in out
    with pytest.warns(UserWarning, match=r"\.tif files have no room .*: comment"):
        out = round_trip(tmp_path / "a.jpg", data, ".tif")
    assert tags.read(out).get(tags.PHOTOSHOP).data == caption
    with pytest.warns(UserWarning, match=r"\.bmp files .*: XMP, comment, Photo"):
        round_trip(tmp_path / "a.jpg", data, ".bmp")


def test_the_orientation_is_left_out_of_xmp_in_both_forms(tmp_path):
    xmp = b"<x><tiff:Orientation>6</tiff:Orientation><y/></x>"
    Image.fromarray(COLORS).save(tmp_path / "a.jpg", xmp=xmp)
    out = round_trip(tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes())
    assert b"<x><y/></x>" in out
    assert image_io.read(tmp_path / "a.jpg").image.size == COLORS.shape[:2]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_text_of_a_png_file(dtype, tmp_path):
    info = {"text": {"Author": "Ada", "Title": "Ä", "Long": "x" * 2000}, "xmp": b"<x/>"}
    path = tmp_path / "a.png"
    image_io.write(path, ImageFile(COLORS.astype(dtype), info | {"dpi": (300, 300)}))
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert image.text | info["text"] == image.text and image.info["xmp"] == b"<x/>"
        assert round(image.info["dpi"][0]) == 300
    read = image_io.read(path)
    assert read.info["text"] == info["text"] and read.info["xmp"] == b"<x/>"


@pytest.mark.parametrize(("bands", "extra"), [(4, [0]), (5, [0, 0]), (5, [2, 0])])
def test_bands_that_would_be_dropped_are_refused(bands, extra, tmp_path):
    array = np.zeros((8, 9, bands), np.uint8)
    (tmp_path / "a.tif").write_bytes(tiff(array, extrasamples=extra))
    with pytest.raises(UserError, match=f"it has {bands} bands: 3 of color"):
        image_io.read(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3), (9, 7, 4), (3, 9, 7)])
def test_floats_come_back_in_their_type(kind, shape, compression, tmp_path):
    array = np.random.default_rng(0).normal(size=shape).astype(kind)
    options = {"photometric": "minisblack"} if len(shape) == 2 else {}
    if shape[0] == 3:
        options["planarconfig"] = "separate"
    if shape[-1] == 4:
        options["extrasamples"] = ["unassalpha"]
    (tmp_path / "a.tif").write_bytes(tiff(array, compression, **options))
    expected = np.moveaxis(array, 0, -1) if shape[0] == 3 else array
    for _ in range(2):
        file = image_io.read(tmp_path / "a.tif")
        read = modes.as_array(file.image)
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == kind
        image_io.write(tmp_path / "a.tif", file)


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "uint32", "complex64"])
def test_other_types_are_named(kind, tmp_path):
    array = np.zeros((9, 7), kind)
    (tmp_path / "a.tif").write_bytes(tiff(array, photometric="minisblack"))
    with pytest.raises(UserError, match=f"a.tif: its values are {kind}, which cannot"):
        image_io.read(tmp_path / "a.tif")


def test_compressed_planes_may_not_be_larger_than_the_image(tmp_path):
    planes = np.zeros((3, 2000, 2000), np.uint16)
    data = tiff(planes, "zlib", planarconfig="separate", rowsperstrip=2000)
    small = data
    for kind in (3, 4):  # Types that the height may have.
        heights = (struct.pack("<HHII", 257, kind, 1, n) for n in (2000, 2))
        small = small.replace(*heights)
    assert small != data
    (tmp_path / "a.tif").write_bytes(small)
    with pytest.raises(UserError, match="damaged, or larger than it says"):
        image_io.read(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".jp2"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "CMYK"])
def test_jfif_avif_and_jpeg_2000(suffix, mode, tmp_path):
    image = Image.fromarray(COLORS).convert(mode)
    loses_cmyk = mode == "CMYK" and suffix != ".jfif"
    with pytest.warns(match="CMYK") if loses_cmyk else contextlib.nullcontext():
        image_io.write(tmp_path / f"a{suffix}", ImageFile(image, {}))
    read = image_io.read(tmp_path / f"a{suffix}").image
    difference = np.asarray(read.convert("RGB"), int) - np.asarray(image.convert("RGB"))
    assert np.abs(difference).max() <= {".jp2": 0, ".avif": 3, ".jfif": 30}[suffix]


def test_pipes_and_devices_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.npy")
    for path in (tmp_path / "pipe.png", tmp_path / "pipe.npy", "/dev/zero"):
        with pytest.raises(UserError, match="a pipe, a socket or a device"):
            image_io.read(path)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_decoders_get_no_metadata_of_large_tiff_files(tmp_path, compression):
    values = [(code, *VALUES[2], True) for code in TAGS]
    file = io.BytesIO()
    tifffile.imwrite(
        *(file, COLORS),
        bigtiff=True,
        compression=compression,
        photometric="rgb",
        metadata=None,
        software=False,
        extratags=values,
    )
    kept = tags.read(tags.keep_layout(file.getvalue())).directory
    assert kept and not {*TAGS} & {*kept}
    out = tags.read(round_trip(tmp_path / "a.tif", file.getvalue())).directory
    assert {*out} >= {33421, 42113, 65000}
    read = image_io.read(tmp_path / "a.tif").image
    np.testing.assert_array_equal(modes.as_array(read), COLORS)


@pytest.mark.parametrize("kind", [8, 9, 16])
def test_a_size_that_libtiff_alone_can_read_is_refused(tmp_path, kind):
    data = tiff()
    for code in (256, 257):
        head, mark, tail = data.partition(struct.pack("<HH", code, 4))
        assert mark
        data = head + struct.pack("<HH", code, kind) + tail
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(UserError, match="its width or height is missing"):
        image_io.read(tmp_path / "a.tif")


def test_places_of_eight_bytes(tmp_path):
    """Bands of a large file are checked like those of another."""
    bands = np.zeros((2000, 2000), np.float16)
    file = io.BytesIO()
    tifffile.imwrite(file, bands, bigtiff=True, compression="zlib", rowsperstrip=2000)
    (tmp_path / "a.tif").write_bytes(file.getvalue())
    np.testing.assert_array_equal(image_io.read(tmp_path / "a.tif").image, bands)
    heights = (struct.pack("<HHQI", 257, 4, 1, n) for n in (2000, 2))
    small = file.getvalue().replace(*heights)
    (tmp_path / "a.tif").write_bytes(small)
    with pytest.raises(UserError, match="damaged, or larger than it says"):
        image_io.read(tmp_path / "a.tif")


def test_tiles_whose_size_libtiff_alone_can_read(tmp_path):
    data = tiff(np.zeros((64, 64, 3), np.uint8), "zlib", tile=(64, 64))
    for code, kind in itertools.product((322, 323), (3, 4)):
        data = data.replace(*(struct.pack("<HH", code, k) for k in (kind, 16)))
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(UserError, match="its width or height is missing"):
        image_io.read(tmp_path / "a.tif")


def test_a_tag_of_the_layout_that_cannot_be_read(tmp_path):
    data = tiff()
    changed = data.replace(struct.pack("<HH", 258, 3), struct.pack("<HH", 258, 99))
    assert changed != data
    (tmp_path / "a.tif").write_bytes(changed)
    with pytest.raises(UserError, match="it is damaged: BitsPerSample cannot be read"):
        image_io.read(tmp_path / "a.tif")


def test_thumbnails_of_xmp_that_do_not_end(tmp_path):
    begin, end = b"<xmp:Thumbnails>", b"</xmp:Thumbnails>"
    xmp = b"a" + begin + b"b" + end + b"c" + begin * 30_000
    Image.fromarray(COLORS).save(tmp_path / "a.webp", xmp=xmp)
    assert image_io.read(tmp_path / "a.webp").info["xmp"] == b"ac" + begin * 30_000


def test_avif_files_whose_tags_share_their_bytes(tmp_path, monkeypatch):
    codes = range(40_000, 40_100)
    entries = b"".join(struct.pack(">HHII", code, 3, 500, 8) for code in codes)
    exif = b"MM\0*" + struct.pack(">IH", 8, 100) + entries + bytes(4)
    mark = Image.Exif()
    mark[271] = "x" * len(exif)
    file = io.BytesIO()
    Image.fromarray(COLORS).save(file, "AVIF", exif=mark)
    at = file.getvalue().index(b"MM\0*")
    assert file.getvalue()[at:].count(b"x") >= len(exif)
    data = file.getvalue()[:at] + exif + file.getvalue()[at + len(exif) :]
    (tmp_path / "a.avif").write_bytes(data)
    monkeypatch.setattr(Image, "open", None)  # It would read all of them.
    with pytest.raises(UserError, match="a.avif: its EXIF data are damaged"):
        image_io.read(tmp_path / "a.avif")
    with pytest.raises(UnreadableImageError):
        decode_image(data, "a.avif")
