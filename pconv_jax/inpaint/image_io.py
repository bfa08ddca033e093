"""Image files: read and written with their metadata (EXIF, ICC profile, DPI).

An image is a `PIL.Image.Image`. Where Pillow has no mode, as for 16-bit color and for
data from ``.npy`` files, it is an array ``[H, W]`` or ``[H, W, C]``.
"""

import io
import math
import os
import re
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import Image, JpegImagePlugin
from PIL.ExifTags import Base

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax._files import MAX_PIXELS, FileContentError
from pconv_jax.data import tags as tags_lib
from pconv_jax.data.decode import codec_errors, is_whole_png, open_without_limit
from pconv_jax.data.tags import Tags
from pconv_jax.inpaint import parts
from pconv_jax.inpaint.encoding import encode
from pconv_jax.inpaint.formats import check_suffix
from pconv_jax.inpaint.modes import swap_red_and_blue

# Pillow's other formats are not tried: some of them start programs.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000")

# Compressions of TIFF files that keep pixels and suit all images.
_LOSSLESS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate")

_MAX_NAMES = 10  # Of what is left out, in a warning.

# Kinds of files that phones and cameras write.
_HEIC = "it is a HEIC file, which cannot be read; save it as a JPEG, PNG or TIFF file"
_RAW = "it is a camera's raw file; save it as a JPEG, PNG or TIFF file"

# Pillow copies a GIF file's comments once more for each of their blocks.
_MAX_COMMENTS = 2**20

# How an image is turned upright, by its orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Compressions of TIFF files by their numbers.
_UNCOMPRESSED, _DEFLATE = 1, (8, 32946)

# Photometric interpretations: of inks, CMYK or others; and of a camera's sensor, with a
# color filter or without.
_SEPARATED, _SENSOR = 5, (32803, 34892)

# Colors of a pixel in a TIFF file by their photometric interpretation, and the names of
# types by their sample format.
_TIFF_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3, 9: 3}
_SAMPLE_FORMATS = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}


class ImageFile(NamedTuple):
    """The content of an image file.

    Attributes:
      image: The image, upright according to the EXIF orientation; see the module for
        its types.
      info: Metadata: ``icc_profile``, ``exif`` (without the orientation and the
        thumbnail, which would show the old image; in TIFF files, all tags that do not
        describe the layout, such as those of GeoTIFF), ``xmp``, ``dpi``, ``comment``,
        ``photoshop``, and ``text`` and other ``chunks`` (of PNG files, by keyword and
        kind); for JPEG files also ``qtables`` and ``subsampling``, and for TIFF files
        ``compression``. ``lost`` names what cannot be copied; `write` warns of it.
    """

    image: Image.Image | np.ndarray
    info: dict[str, Any]


def read(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read an image file, or data.

    Args:
      path: A PNG, JPEG, TIFF, WebP, BMP, GIF, AVIF, JPEG 2000 or NumPy file. Of several
        frames or pages, the first is read, with a warning.
      max_pixels: Larger images are refused before they are decoded. The default is
        100,000,000.

    Raises:
      UserError: If the file is missing, empty, damaged, too large or not an image, or
        has bands or values that cannot be repaired. The message names the file.
    """
    path = _files.as_path(path)
    try:
        if path.suffix.lower() == ".npy":
            return ImageFile(_read_npy(path, max_pixels), {})
        return _read_image(_files.read_regular(path), path.name, max_pixels)
    except FileNotFoundError as error:
        raise UserError(f"cannot read {path}: there is no such file.") from error
    except (FileContentError, MemoryError, OSError) as error:
        reason = _files.describe_error(error)
        raise UserError(f"cannot read {path}: {reason}.") from error


def write(path: str | os.PathLike[str], file: ImageFile) -> None:
    """Write an image file of the kind that its suffix names, complete or not at all.

    PNG, TIFF, WebP, BMP and JPEG 2000 files keep all pixels exactly; 16-bit channels
    only in PNG and TIFF, CMYK only in TIFF. AVIF changes them by up to 3 of 255, and
    GIF files hold only 256 colors. A JPEG file is compressed by the tables of the file
    that the image came from, which changes the untouched pixels least; without such
    tables, with quality 95 and without subsampling. What a kind of file cannot hold of
    the metadata is left out, with a warning that names it.

    Args:
      path: Path of the file; see `formats.SUFFIXES`.
      file: The image and its metadata.

    Raises:
      UserError: If the suffix is another one, or such a file cannot hold the image, for
        example its transparency.
      RunError: If the file cannot be written.
    """
    path = _files.as_path(path)
    check_suffix(path)
    try:
        data = encode(path.suffix.lower(), *file)
    except FileContentError as error:
        raise UserError(f"cannot write {path}: {error}.") from error
    _files.write_bytes(path, data)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise FileContentError(
            f"it has {width} x {height} pixels, and max_pixels is {max_pixels:,}"
        )


def _read_npy(path: Path, max_pixels: int) -> np.ndarray:
    _files.check_regular(path)
    with codec_errors():
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise FileContentError("it is a .npz file, which may hold several arrays")
    shape = array.shape
    if len(shape) not in (2, 3):
        raise FileContentError(
            f"its shape must be [H, W] or [H, W, C], not {list(shape)}"
        )
    _check_size(shape[1], shape[0], max_pixels)
    with codec_errors():
        return np.load(path, allow_pickle=False)


def _read_image(data: bytes, name: str, max_pixels: int) -> ImageFile:
    """Read an image from the content of its file; warnings name the file."""
    if not data:
        raise FileContentError("it is empty")
    if tags_lib.is_tiff(data):
        return _read_tiff(data, name, max_pixels)
    if data[4:8] == b"ftyp" and re.search(b"hei[cxms]|hev[cxms]", data[8:40]):
        raise FileContentError(_HEIC)
    if data[4:12] == b"ftypcrx ":
        raise FileContentError(_RAW)
    bare, exif = data, None
    if data.startswith(b"\xff\xd8"):  # Pillow would read tags, and not only once.
        bare, exif = parts.split_exif(data)
    if parts.gif_comments(data) > _MAX_COMMENTS:
        raise FileContentError(f"its comments are longer than {_MAX_COMMENTS} bytes")
    with io.BytesIO(bare) as stream:  # Pillow would keep it with the image.
        image = open_without_limit(stream, _FORMATS)
        return _read_opened(image, data, exif, name, max_pixels)


def _read_opened(
    image: Image.Image, data: bytes, exif: bytes | None, name: str, max_pixels: int
) -> ImageFile:
    """Read an opened image, given its file, and its EXIF data if Pillow lacks them."""
    _check_size(*image.size, max_pixels)
    frames = _count_frames(image, data)
    with codec_errors():
        image.load()
    if frames:
        _warn_of_frames(name, frames)
    tags = tags_lib.read(_exif_of(image) if exif is None else exif)
    info = _read_info(image, tags, name)
    info |= _read_parts(image, data)
    orientation = _orientation(tags, image.info.get("xmp"))
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        tables = [np.reshape(t, (8, 8)) for _, t in sorted(image.quantization.items())]
        if orientation > 4:  # Rows become columns.
            tables = [table.T for table in tables]
        info["qtables"] = [table.ravel().tolist() for table in tables]
        info["subsampling"] = max(JpegImagePlugin.get_sampling(image), 0)
    # The header of a PNG file has the depth and the color type.
    clear = image.info.get("transparency")
    if image.format == "PNG" and data[24] == 16 and (data[25] or clear is not None):
        if not is_whole_png(data):
            raise FileContentError("it is truncated or damaged")
        array = _decode_with_opencv(data)
        if array.ndim == 2:  # Gray, with one value that stands for transparency.
            alpha = np.where(array == clear, 0, 65_535).astype(np.uint16)
            array = np.stack([array, array, array, alpha], axis=-1)
        return ImageFile(_turn(array, orientation), info)
    if _is_deep(data):
        warnings.warn(
            f"the channels of {name} have more than 8 bits; 8 are kept.", stacklevel=4
        )
    return ImageFile(_finish(image, orientation, info), info)


def _warn_of_frames(name: str, frames: int | str) -> None:
    warnings.warn(f"{name} has {frames} frames; only the first is taken.", stacklevel=5)


def _read_tiff(data: bytes, name: str, max_pixels: int) -> ImageFile:
    tags = tags_lib.read(data)
    if data[8:10] == b"CR" or _is_raw(tags):
        raise FileContentError(_RAW)
    for width, height in tags_lib.sizes(tags):
        _check_size(width, height, max_pixels)
    samples, kind = _check_samples(tags)
    pages = tags_lib.count_pages(data)
    if pages > 1:
        _warn_of_frames(name, pages)
    # Decoders get no tags that they might not be able to handle.
    data = tags_lib.keep_layout(data)
    if kind in ("float16", "float64") or (
        samples > 1 and kind in ("uint16", "float32")
    ):
        array = _decode_tiff(data, tags, kind)
        info = _read_info(None, tags, name)
        return ImageFile(_turn(array, tags.orientation()), info)
    with io.BytesIO(data) as stream:
        try:
            image = open_without_limit(stream, _FORMATS)
        except FileContentError as error:
            compression = tags.number(Base.Compression)
            raise FileContentError(
                f"it is damaged, or its kind of TIFF is not known: {samples} band(s) "
                f"of {kind}, compression {compression}"
            ) from error
        _check_size(*image.size, max_pixels)
        with codec_errors():
            image.load()
    info = _read_info(image, tags, name)
    compression = image.info.get("compression")
    if compression != "raw":
        known = compression in _LOSSLESS or (
            image.mode == "1" and compression in ("group3", "group4")
        )
        info["compression"] = compression if known else "tiff_adobe_deflate"
    return ImageFile(_finish(image, tags.orientation(), info), info)


def _is_raw(tags: Tags) -> bool:
    """Return whether a TIFF file is a camera's raw file.

    Its first image has the values of the sensor, or is a preview of an image in another
    directory. Other tags of raw files are kept in photos that are made from them.
    """
    if tags.number(Base.PhotometricInterpretation) in _SENSOR:
        return True
    is_preview = bool(tags.number(Base.NewSubfileType, default=0) & 1)
    return is_preview and Base.SubIFDs in tags.directory.keys() | tags.unreadable


def _check_samples(tags: Tags) -> tuple[int, str]:
    """Check the bands and the type of a TIFF file, and return both."""
    samples = tags.number(Base.SamplesPerPixel)
    photometric = tags.number(Base.PhotometricInterpretation)
    colors = _TIFF_COLORS.get(photometric, samples)
    if photometric == _SEPARATED:
        colors = tags.number(Base.NumberOfInks, default=4)
    extra = samples - colors
    if extra > 1 or (extra == 1 and tags.numbers(Base.ExtraSamples)[:1] == (0,)):
        raise FileContentError(
            f"it has {samples} bands: {colors} of color and {extra} of another kind, "
            "and only an alpha band can be kept. Repair the colors alone, or the bands "
            "as .npy files, one by one"
        )
    bits, formats = (
        set(tags.numbers(Base.BitsPerSample, default=(1,))),
        set(tags.numbers(Base.SampleFormat, default=(1,))),
    )
    kinds = sorted(
        f"{_SAMPLE_FORMATS.get(form, 'uint')}{bit}" for form in formats for bit in bits
    )
    known = ("float16", "float32", "float64")
    whole = kinds[0].startswith("uint") and max(bits) <= 16
    if len(kinds) > 1 or (kinds[0] not in known and not whole):
        raise FileContentError(
            f"its values are {' and '.join(kinds)}, which cannot be repaired. Convert "
            "them to float32 or uint16"
        )
    return samples, kinds[0]


def _decode_tiff(data: bytes, tags: Tags, kind: str) -> np.ndarray:
    """Decode a TIFF file that Pillow cannot, to ``[H, W]`` or ``[H, W, C]``."""
    if kind == "uint16" and tags.numbers(Base.ExtraSamples) == (1,):
        raise FileContentError("its 16-bit colors are multiplied by their alpha")
    samples = tags.number(Base.SamplesPerPixel)
    planes = tags.number(Base.PlanarConfiguration) == 2 and samples > 1
    # OpenCV would read a plane as pixels.
    if not planes and kind != "float16":
        return _decode_with_opencv(data)
    compression = tags.number(Base.Compression)
    if compression in _DEFLATE:
        _check_inflated(data, tags)
    elif compression != _UNCOMPRESSED:
        raise FileContentError(
            f"it has {'planes' if planes else 'values'} of {kind} with compression "
            f"{compression}, which cannot be read; save it without compression"
        )
    with codec_errors():
        array = tifffile.imread(io.BytesIO(data), key=0)
    return np.moveaxis(array, 0, -1) if planes else array


def _check_inflated(data: bytes, tags: Tags) -> None:
    """Check that no compressed part of a TIFF file is larger than the image."""
    sides = tags.number(Base.ImageWidth), tags.number(Base.ImageLength)
    depth = tags.number(Base.SamplesPerPixel) * tags.number(Base.BitsPerSample)
    limit = math.prod(sides) * depth // 8 + 2**20
    offsets = tags.numbers(Base.StripOffsets) or tags.numbers(Base.TileOffsets)
    sizes = tags.numbers(Base.StripByteCounts) or tags.numbers(Base.TileByteCounts)
    if not offsets:
        raise FileContentError("it is damaged: the places of its data are missing")
    if len(offsets) != len(sizes):
        raise FileContentError("it is damaged: the sizes of its data are missing")
    for start, size in zip(offsets, sizes):
        inflate = zlib.decompressobj()
        with codec_errors():
            inflate.decompress(data[start : start + size], limit)
        if not inflate.eof:
            raise FileContentError(
                "its compressed data are damaged, or larger than it says"
            )


def _finish(
    image: Image.Image, orientation: int, info: Mapping[str, Any]
) -> Image.Image:
    """Turn an image upright, and let transparency be a channel of it."""
    with codec_errors():
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        # In these modes, transparency is a color that stands for it.
        if image.mode in ("L", "RGB") and "transparency" in image.info:
            image = image.convert("LA" if image.mode == "L" else "RGBA")
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        image.info.pop(name, None)
    image.info |= {name: info[name] for name in ("exif", "xmp") if name in info}
    return image


def _count_frames(image: Image.Image, data: bytes) -> str:
    """Count the frames of an image, in words; empty for one."""
    # A PNG file has the number in its header, and so has a WebP. Those of a GIF must be
    # searched for.
    with codec_errors():
        if not getattr(image, "is_animated", False):
            return ""
        if image.format == "GIF" and len(data) > 2**20:
            return "several"
        return str(getattr(image, "n_frames", 1))


def _is_deep(data: bytes) -> bool:
    """Return whether Pillow drops bits of an AVIF or JPEG 2000 file's channels."""
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        at = data.find(b"av1C") + 4
        flags = data[at + 2 : at + 3] or b"\0"
        return at > 3 and bool(flags[0] & 0x40)
    if data[4:8] == b"jP  ":
        at = data.find(b"ihdr") + 4  # Height, width, number of components, depth.
        depth = data[at + 10 : at + 11]
        return at > 3 and data[at + 8 : at + 10] > b"\0\1" and depth > b"\7"
    return False


def _exif_of(image: Image.Image) -> bytes:
    text = image.info.get("Raw profile type exif")
    if "exif" not in image.info and isinstance(text, str):
        try:  # As ImageMagick writes it: a name, a size, and hexadecimal digits.
            return bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return b"damaged"
    return image.info.get("exif", b"")


def _orientation(tags: Tags, xmp: Any) -> int:
    if tags_lib.ORIENTATION not in tags.directory and isinstance(xmp, bytes):
        if match := re.search(rb"tiff:Orientation(?:=\"|>)([1-8])", xmp):
            return int(match[1])
    return tags.orientation()


def _read_info(image: Image.Image | None, tags: Tags, name: str) -> dict[str, Any]:
    """Collect the metadata of an image, and name what must be left out."""
    source = image.info if image is not None else {}
    kept, lost = tags_lib.split_metadata(tags)
    lost_names = [tags_lib.names(lost)] if lost else []
    resources = kept.get(tags_lib.PHOTOSHOP)
    photoshop = resources.data if resources else b""
    kept = tags_lib.without(kept, {tags_lib.PHOTOSHOP})
    for marker, segment in getattr(image, "applist", ()):
        if marker == "APP13" and segment.startswith(b"Photoshop 3.0\0"):
            photoshop += segment[14:]
        elif segment.startswith(b"http://ns.adobe.com/xmp/extension/"):
            lost_names.append("extended XMP")
    profile, xmp = tags.get(tags_lib.ICC_PROFILE), tags.get(tags_lib.XMP)
    with codec_errors():  # Pillow reads on, up to the end of the file.
        text = getattr(image, "text", {}) if image and image.format == "PNG" else {}
    comment = source.get("comment")
    info = {
        "icc_profile": profile.data if profile else source.get("icc_profile"),
        "dpi": _check_dpi(source.get("dpi") or tags.dpi()),
        "exif": tags_lib.pack(kept),
        "xmp": _clean_xmp(xmp.data if xmp else source.get("xmp")),
        "photoshop": tags_lib.without_thumbnails(photoshop),
        "comment": comment if isinstance(comment, bytes) else None,
        "text": {
            keyword: value
            for keyword, value in text.items()
            if keyword not in ("XML:com.adobe.xmp", "Raw profile type exif")
        },
    }
    if lost_names:
        warnings.warn(
            f"left out of the metadata of {name}, because they are damaged or show the "
            f"old image: {', '.join(dict.fromkeys(lost_names))}.",
            stacklevel=5,
        )
    return {key: value for key, value in info.items() if value}


def _read_parts(image: Image.Image, data: bytes) -> dict[str, Any]:
    """Collect what Pillow drops from a file, and name what cannot be copied."""
    chunks = {}
    if image.format == "PNG":
        chunks, lost = parts.png_chunks(data)
    else:
        lost = parts.dropped_parts(data, image.format or "")
    lost = list(dict.fromkeys(lost))
    if len(lost) > _MAX_NAMES:
        lost = [*lost[:_MAX_NAMES], f"{len(lost) - _MAX_NAMES} more"]
    return {k: v for k, v in {"chunks": chunks, "lost": lost}.items() if v}


def _check_dpi(dpi: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < 65_536 and 0 < y < 65_536 else None


def _clean_xmp(xmp: Any) -> bytes | None:
    """Leave out the orientation, and thumbnails, which would show the old image."""
    if not isinstance(xmp, bytes):
        return None
    xmp = re.sub(
        rb'tiff:Orientation="\d"|<tiff:Orientation>\d</tiff:Orientation>', b"", xmp
    )
    # Behind the last end there is none to look for, from every beginning anew.
    head, end, tail = xmp.rpartition(b"</xmp:Thumbnails>")
    thumbnails = rb"<xmp:Thumbnails>.*?</xmp:Thumbnails>"
    return re.sub(thumbnails, b"", head + end, flags=re.DOTALL) + tail


def _decode_with_opencv(data: bytes) -> np.ndarray:
    """Decode values of more than 8 bits to ``[H, W]`` or ``[H, W, C]``."""
    with codec_errors():
        array = cv2.imdecode(
            np.frombuffer(data, np.uint8),
            cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION,
        )
    if array is None:
        raise FileContentError(
            "it is damaged, or its kind of 16-bit color is not known"
        )
    return array if array.ndim == 2 else swap_red_and_blue(array)


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image upright according to its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)
