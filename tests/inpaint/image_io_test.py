import io
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from pconv_jax._errors import UserError
from pconv_jax.inpaint import image_io, modes
from pconv_jax.inpaint.image_io import ImageFile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def smooth(height=40, width=60):
    y, x = np.mgrid[:height, :width]
    return np.stack([50 + 2 * x, 200 - 2 * y, 70 + x + y], axis=-1).astype(np.uint8)


def camera_exif(orientation=1):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    exif.get_ifd(0x8825)[1] = "N"
    return exif


def round_trip(path, file):
    image_io.write(path, file)
    return image_io.read(path)


# Files.


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".bmp"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pixels_come_back_bit_for_bit(suffix, mode, tmp_path):
    image = Image.fromarray(noise(9, 7, 3 if mode == "P" else 4)).convert(mode)
    path = tmp_path / f"a{suffix}"
    if suffix == ".bmp" and mode in ("LA", "RGBA"):
        with pytest.raises(ValueError, match="cannot hold the image's transparency"):
            image_io.write(path, ImageFile(image, {}))
        return
    read = round_trip(path, ImageFile(image, {})).image
    np.testing.assert_array_equal(read.convert("RGBA"), image.convert("RGBA"))
    if suffix in (".png", ".tif"):
        assert read.mode == mode


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3), (9, 7, 4)])
def test_16_bits_come_back_bit_for_bit(suffix, shape, tmp_path):
    array = noise(*shape, dtype=np.uint16)
    info = {"icc_profile": SRGB, "dpi": (300, 300), "exif": camera_exif().tobytes()}
    path = tmp_path / f"a{suffix}"
    read = round_trip(path, ImageFile(array, info))
    np.testing.assert_array_equal(read.image, array)
    if len(shape) == 2:
        assert read.image.mode == "I;16"
    else:
        assert read.image.dtype == np.uint16
    with Image.open(path) as image:
        assert image.info["icc_profile"] == SRGB
        assert image.getexif()[0x010F] == "Maker"
        assert suffix == ".png" or image.info["dpi"] == (300, 300)
    again = round_trip(path, read)
    np.testing.assert_array_equal(again.image, array)
    assert again.info["icc_profile"] == SRGB


def test_16_bit_images_of_other_programs(tmp_path):
    color, gray = noise(5, 6, 3, dtype=np.uint16), noise(5, 6, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "cv.png"), color[..., ::-1])
    tifffile.imwrite(tmp_path / "a.tif", color, photometric="rgb", byteorder=">")
    tifffile.imwrite(tmp_path / "gray.tif", gray, byteorder=">")
    for name, expected in [("cv.png", color), ("a.tif", color), ("gray.tif", gray)]:
        image = image_io.read(tmp_path / name).image
        array = image if isinstance(image, np.ndarray) else modes.to_array(image)
        assert array.dtype == np.uint16
        np.testing.assert_array_equal(array, expected)


def test_16_bit_planes_and_premultiplied_colors(tmp_path, caplog):
    color, path = noise(5, 6, 3, dtype=np.uint16), tmp_path / "a.tif"
    planes = np.moveaxis(color, -1, 0)
    options = dict(photometric="rgb", software="Scanner")
    tifffile.imwrite(path, planes, planarconfig="separate", **options)
    read = image_io.read(path)
    np.testing.assert_array_equal(read.image, color)
    np.testing.assert_array_equal(round_trip(path, read).image, color)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].software == "Scanner"
    assert not caplog.messages
    alpha = noise(5, 6, 4, dtype=np.uint16)
    tifffile.imwrite(path, alpha, photometric="rgb", extrasamples=["assocalpha"])
    with pytest.raises(ValueError, match="a.tif: .* multiplied by their alpha"):
        image_io.read(path)


def test_a_lossy_tiff_file_becomes_lossless(tmp_path):
    path = tmp_path / "a.tif"
    for compression in ("jpeg", "tiff_lzw"):
        Image.fromarray(smooth()).save(path, compression=compression)
        read = image_io.read(path)
        np.testing.assert_array_equal(round_trip(path, read).image, read.image)
        with Image.open(path) as image:
            kept = {"jpeg": "tiff_adobe_deflate"}.get(compression, compression)
            assert image.info["compression"] == kept


@pytest.mark.parametrize(("mode", "key"), [("L", 9), ("RGB", (255, 0, 255))])
def test_a_color_that_stands_for_transparency(mode, key, tmp_path):
    image = Image.new(mode, (6, 5), 200 if mode == "L" else (10, 20, 30))
    image.putpixel((2, 1), key)
    image.save(tmp_path / "a.png", transparency=key)
    read = image_io.read(tmp_path / "a.png").image
    alpha = np.full((5, 6), 255)
    alpha[1, 2] = 0
    np.testing.assert_array_equal(modes.to_array(read)[..., -1], alpha)
    assert read.mode == mode + "A"


def test_a_value_of_16_bits_that_stands_for_transparency(tmp_path):
    gray = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000
    Image.fromarray(gray).save(tmp_path / "a.png", transparency=16_000)
    read = image_io.read(tmp_path / "a.png")
    np.testing.assert_array_equal(read.image[..., :3], np.stack([gray] * 3, axis=-1))
    np.testing.assert_array_equal(read.image[..., 3], 65_535 * (gray != 16_000))
    written = round_trip(tmp_path / "b.png", read)
    np.testing.assert_array_equal(written.image, read.image)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.gif"])
def test_an_image_does_not_keep_its_file(name, tmp_path):
    image = Image.fromarray(noise(300, 300, 3))
    image.save(tmp_path / name)
    size = (tmp_path / name).stat().st_size
    image_io.read(tmp_path / name)
    tracemalloc.start()
    try:
        read = image_io.read(tmp_path / name)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < size / 2 and read.image.copy().size == (300, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_images_are_upright(orientation, deep, tmp_path):
    path = tmp_path / "a.png"
    image = Image.fromarray(noise(4, 6, 3))
    expected = ImageOps.exif_transpose(_with_exif(image, orientation))
    exif = camera_exif(orientation).tobytes()
    array = np.asarray(image)
    if deep:
        array = array.astype(np.uint16) * 257
        expected = np.asarray(expected).astype(np.uint16) * 257
    image_io.write(path, ImageFile(array, {"exif": exif}))
    read = image_io.read(path)
    np.testing.assert_array_equal(read.image, expected)
    # What is written is not turned a second time.
    again = round_trip(tmp_path / "b.png", read)
    np.testing.assert_array_equal(again.image, expected)
    with Image.open(tmp_path / "b.png") as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010F] == "Maker"


def _with_exif(image, orientation):
    file = io.BytesIO()
    image.save(file, "PNG", exif=camera_exif(orientation))
    return Image.open(file)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_metadata_of_the_camera_are_kept(suffix, tmp_path):
    source = tmp_path / "source.jpg"
    exif = camera_exif(6)
    Image.fromarray(smooth()).save(
        source, exif=exif, icc_profile=SRGB, dpi=(240, 240), quality=90
    )
    read = image_io.read(source)
    assert read.image.size == (40, 60)
    image_io.write(tmp_path / f"out{suffix}", read)
    with Image.open(tmp_path / f"out{suffix}") as image:
        assert image.info["icc_profile"] == SRGB
        tags = image.getexif()
        assert tags[0x010F] == "Maker" and tags.get(0x0112, 1) == 1
        assert tags.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
        assert tags.get_ifd(0x8825)[1] == "N"
        if suffix != ".webp":
            assert round(float(image.info["dpi"][0])) == 240


def test_the_thumbnail_of_the_old_image_is_dropped(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG")
    thumbnail = file.getvalue()
    # A directory with the make, and a second one with the thumbnail, as cameras write.
    second = 8 + 2 + 12 + 4
    data = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 1)
    data += struct.pack("<HHL4s", 0x010F, 2, 4, b"Abc\0") + struct.pack("<L", second)
    start = second + 2 + 2 * 12 + 4
    data += struct.pack("<H", 2)
    data += struct.pack("<HHLL", 0x0201, 4, 1, start)
    data += struct.pack("<HHLL", 0x0202, 4, 1, len(thumbnail)) + struct.pack("<L", 0)
    data += thumbnail
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth()).save(path, exif=data)
    assert thumbnail in path.read_bytes()
    file = image_io.read(path)
    image_io.write(path, file)
    assert thumbnail not in path.read_bytes()
    assert image_io.read(path).image.getexif()[0x010F] == "Abc"


@pytest.mark.parametrize("quality", [60, 95])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_file_is_compressed_as_it_was(
    quality, subsampling, orientation, tmp_path
):
    path = tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    image = np.clip(smooth(64, 64) + rng.normal(0, 5, (64, 64, 3)), 0, 255)
    image = Image.fromarray(image.astype(np.uint8))
    exif = camera_exif(orientation)
    image.save(path, quality=quality, subsampling=subsampling, exif=exif)
    file = image_io.read(path)
    again = round_trip(tmp_path / "b.jpg", file).image
    difference = np.abs(np.asarray(again, int) - np.asarray(file.image, int))
    # Compressed by the same tables it hardly changes, however coarse they are.
    assert difference.mean() < (0.1 if subsampling == 0 else 0.3)
    size = path.stat().st_size
    assert abs((tmp_path / "b.jpg").stat().st_size - size) < 0.05 * size


def test_other_images_are_compressed_little(tmp_path):
    image = smooth()
    read = round_trip(tmp_path / "c.jpg", ImageFile(Image.fromarray(image), {})).image
    assert np.abs(np.asarray(read, int) - image).max() <= 3


def test_kinds_of_file_that_cannot_hold_the_image(tmp_path):
    deep = noise(5, 5, dtype=np.uint16)
    with pytest.warns(UserWarning, match="rounded to 8, .* .jpg files"):
        read = round_trip(
            tmp_path / "a.jpg", ImageFile(Image.fromarray(deep), {})
        ).image
    assert np.abs(np.asarray(read, int) - deep // 257).mean() < 6
    color = noise(5, 5, 3, dtype=np.uint16)
    with pytest.warns(UserWarning, match="rounded to 8, .* .webp files"):
        read = round_trip(tmp_path / "a.webp", ImageFile(color, {})).image
    np.testing.assert_array_equal(read, np.rint(color / 257))
    opaque = Image.new("RGBA", (4, 4), (9, 9, 9, 255))
    assert round_trip(tmp_path / "b.jpg", ImageFile(opaque, {})).image.mode == "RGB"
    opaque.putpixel((1, 1), (9, 9, 9, 254))
    with pytest.raises(ValueError, match="name a .png"):
        image_io.write(tmp_path / "b.jpg", ImageFile(opaque, {}))
    cmyk = Image.fromarray(noise(8, 8, 3)).convert("CMYK")
    assert round_trip(tmp_path / "c.jpg", ImageFile(cmyk, {})).image.mode == "CMYK"
    with pytest.warns(UserWarning, match="CMYK colors are converted to RGB, without"):
        read = round_trip(tmp_path / "c.png", ImageFile(cmyk, {"icc_profile": SRGB}))
    assert read.image.mode == "RGB" and "icc_profile" not in read.info
    with pytest.raises(ValueError, match="is not an image: name a .npy file"):
        image_io.write(tmp_path / "d.png", ImageFile(np.zeros((4, 4)), {}))
    for shape in ((4, 4, 5), (0, 4, 3)):
        for name in ("d.png", "d.tif", "d.webp"):
            with pytest.raises(ValueError, match="is not an image: name a .npy file"):
                image_io.write(
                    tmp_path / name, ImageFile(np.zeros(shape, np.uint8), {})
                )
    with pytest.raises(ValueError, match="must end in .png, .* or .npy"):
        image_io.write(tmp_path / "d.xyz", ImageFile(cmyk, {}))


def test_data(tmp_path):
    array = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    for name in ("a.npy", "a.tif"):
        read = round_trip(tmp_path / name, ImageFile(array, {})).image
        np.testing.assert_array_equal(read, array)
    np.save(tmp_path / "b.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.zeros(4))
    with pytest.raises(ValueError, match="cannot read .*b.npy"):
        image_io.read(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"c.npy: its shape must be \[H, W\]"):
        image_io.read(tmp_path / "c.npy")


def test_files_that_are_no_images(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(noise(50, 50, 3)).save(whole, "PNG")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("Hello")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    (tmp_path / "folder.png").mkdir()
    # Pillow would run a program for it.
    (tmp_path / "script.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"
    )
    for name, problem in [
        ("empty.png", "it is empty"),
        ("text.png", "it is not an image"),
        ("script.png", "it is not an image"),
        ("cut.png", "truncated"),
        ("folder.png", "Is a directory"),
        ("none.png", "there is no such file"),
    ]:
        with pytest.raises(ValueError, match=f"cannot read .*{name}: .*{problem}"):
            image_io.read(tmp_path / name)


def test_files_of_phones_and_cameras_are_named(tmp_path):
    heic = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99)
    (tmp_path / "a.heic").write_bytes(heic)
    (tmp_path / "a.cr2").write_bytes(b"II*\0\x10\0\0\0CR\2\0" + bytes(99))
    (tmp_path / "a.cr3").write_bytes(b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99))
    preview, sensor = noise(8, 8, 3), noise(16, 16, 1)[..., 0]
    filters = [(33421, "H", 2, (2, 2)), (33422, "B", 4, (0, 1, 1, 2))]
    tifffile.imwrite(tmp_path / "a.dng", sensor, photometric="cfa", extratags=filters)
    with tifffile.TiffWriter(tmp_path / "a.nef") as file:
        file.write(preview, photometric="rgb", subfiletype=1, subifds=1)
        file.write(sensor, photometric="cfa", extratags=filters)
    for name, problem in [
        *(("a.heic", "it is a HEIC file"), ("a.cr2", "a camera's raw file")),
        *((f"a.{suffix}", "a camera's raw file") for suffix in ("cr3", "dng", "nef")),
    ]:
        with pytest.raises(ValueError, match=f"cannot read .*{name}: .*{problem}"):
            image_io.read(tmp_path / name)


def test_photos_that_were_made_from_raw_files_are_read(tmp_path):
    photo = noise(8, 8, 3)
    version = (50706, "B", 4, (1, 4, 0, 0))  # Of the DNG file.
    tifffile.imwrite(tmp_path / "a.tif", photo, photometric="rgb", extratags=[version])
    np.testing.assert_array_equal(
        np.asarray(image_io.read(tmp_path / "a.tif").image), photo
    )


def test_images_over_the_limit_are_not_decoded(tmp_path):
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", check)

    # Of 40,000 x 40,000 pixels, in a few bytes.
    header = struct.pack(">LLBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="bomb.png: .*40000 x 40000 pixels, .* is 1"):
        image_io.read(tmp_path / "bomb.png")
    # Pillow's own limit does not count, and is left as it is.
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="bomb.png: (?!.*pixels)"):
        image_io.read(tmp_path / "bomb.png", max_pixels=10**10)
    assert Image.MAX_IMAGE_PIXELS == limit
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((20, 30)))
    for name in ("a.png", "a.npy"):
        with pytest.raises(ValueError, match=f"{name}: .*30 x 20 pixels, .* is 599"):
            image_io.read(tmp_path / name, max_pixels=599)
        image_io.read(tmp_path / name, max_pixels=600)


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.fromarray(noise(5, 5, seed=i)) for i in range(3)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="3 frames; only the first is taken"):
        image = image_io.read(path).image
    np.testing.assert_array_equal(image.convert("L"), frames[0])


def test_filled_pixels_of_a_palette_are_never_transparent():
    image = Image.fromarray(smooth()).quantize(16)
    clear = int(np.asarray(image)[10, 10])
    image.info["transparency"] = clear
    hole = np.zeros((40, 60), bool)
    hole[5:20, 5:20] = True
    result = modes.paste(image, modes.to_array(image), hole)
    assert result.mode == "P" and not np.any(np.asarray(result)[hole] == clear)
    np.testing.assert_array_equal(np.asarray(result)[~hole], np.asarray(image)[~hole])


def test_a_palette_may_lack_its_transparent_color():
    image = Image.fromarray(smooth()).quantize(4)
    image.putpalette(image.getpalette()[:12])
    image.info["transparency"] = 255  # As a GIF may have it.
    hole = np.zeros((40, 60), bool)
    hole[5:20, 5:20] = True
    result = modes.paste(image, 255 - modes.to_array(image), hole)
    assert np.asarray(result).max() < 4
    np.testing.assert_array_equal(np.asarray(result)[~hole], np.asarray(image)[~hole])


def test_filled_pixels_of_a_palette_with_alpha_are_opaque():
    image = Image.fromarray(smooth()).quantize(16)
    image.info["transparency"] = bytes([0, 128, 255, 254, 90])
    hole = np.zeros((40, 60), bool)
    hole[5:20, 5:20] = True
    result = modes.paste(image, modes.to_array(image), hole)
    alpha = modes.to_array(result)[..., 3]
    assert np.all(alpha[hole] == 255) and len(np.unique(np.asarray(result)[hole])) > 2
    np.testing.assert_array_equal(np.asarray(result)[~hole], np.asarray(image)[~hole])


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".jpg"])
def test_images_that_are_too_large_for_a_kind_of_file(suffix, tmp_path):
    file = ImageFile(Image.new("L", (70_000, 1)), {})
    with pytest.raises(UserError, match=f"cannot write .*a{suffix}: "):
        image_io.write(tmp_path / f"a{suffix}", file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_bugs_are_not_reported_as_damaged_files(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"a{suffix}"
    image_io.write(path, ImageFile(Image.new("L", (4, 4)), {}))

    def fail(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(image_io, "_check_dpi", fail)
    with pytest.raises(TypeError, match="a bug"):
        image_io.read(path)
    monkeypatch.setattr("pconv_jax.inpaint.encoding._drop_unwritable", fail)
    with pytest.raises(TypeError, match="a bug"):
        image_io.write(path, ImageFile(Image.new("L", (4, 4)), {}))


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "RGBA"])
def test_gif_files_have_few_colors(mode, tmp_path):
    image = Image.fromarray(noise(40, 60, 3)).convert(mode)
    with pytest.warns(UserWarning) as caught:
        image_io.write(tmp_path / "a.gif", ImageFile(image, {}))
    messages = [str(warning.message) for warning in caught]
    assert "colors are reduced to 256, the most that" in messages[-1]
    assert len(messages) == 1 + (mode == "CMYK")
    read = image_io.read(tmp_path / "a.gif").image
    assert read.size == image.size and len(read.convert("RGB").getcolors()) <= 256


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA"])
def test_gif_files_keep_gray_and_palettes(mode, tmp_path):
    image = Image.fromarray(smooth()).convert("P" if mode == "P" else "L").convert(mode)
    image_io.write(tmp_path / "a.gif", ImageFile(image, {}))
    read = image_io.read(tmp_path / "a.gif").image
    np.testing.assert_array_equal(read.convert("RGB"), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_gif_files_hold_no_alpha(mode, tmp_path):
    image = (
        Image.fromarray(smooth()).quantize(8)
        if mode == "PA"
        else Image.new(mode, (6, 5))
    )
    image = image.convert(mode)
    image.putalpha(Image.new("L", image.size, 128))
    with pytest.raises(UserError, match=".gif files cannot hold the image's transp"):
        image_io.write(tmp_path / "a.gif", ImageFile(image, {}))


def test_a_palette_with_alpha_becomes_color(tmp_path):
    image = Image.fromarray(smooth()).quantize(8).convert("PA")
    image.putalpha(Image.new("L", image.size, 128))
    for name in ("a.png", "a.tif", "a.webp"):
        image_io.write(tmp_path / name, ImageFile(image, {}))
        read = image_io.read(tmp_path / name).image
        np.testing.assert_array_equal(read, image.convert("RGBA"))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_gray_with_alpha_of_16_bits_becomes_8(suffix, tmp_path):
    array = noise(5, 6, 2, dtype=np.uint16)
    with pytest.warns(UserWarning, match="to 8, since 16-bit gray with alpha cannot"):
        image_io.write(tmp_path / f"a{suffix}", ImageFile(array, {}))
    read = np.asarray(image_io.read(tmp_path / f"a{suffix}").image)
    np.testing.assert_array_equal(read, np.rint(array / 257))


def test_several_arrays_are_no_image(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, a=np.zeros((4, 4)))
    with pytest.raises(UserError, match="a.npy: it is a .npz file"):
        image_io.read(tmp_path / "a.npy")
