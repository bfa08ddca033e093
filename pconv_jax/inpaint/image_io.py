"""Image files: to arrays, and back with their metadata (EXIF, ICC profile, DPI).

An image is a `PIL.Image.Image`. Where Pillow has no mode, as for 16-bit color and for
data from ``.npy`` files, it is an array ``[H, W]`` or ``[H, W, C]``.
"""

import io
import math
import os
import re
import struct
import tokenize
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.data.decode import is_whole_png, open_without_limit
from pconv_jax.inpaint import parts
from pconv_jax.inpaint import tags as tags_lib
from pconv_jax.inpaint.formats import MAX_PIXELS, check_suffix
from pconv_jax.inpaint.tags import Tags
from pconv_jax.inpaint.values import to_uint8

# Pillow's other formats are not tried: some of them start programs.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000")

# What Pillow, OpenCV, tifffile and NumPy raise if a file is damaged, is no image, or is
# of a kind that cannot hold an image, such as a WebP file of more than 16,383 pixels a
# side.
_CODEC_ERRORS = (
    *(cv2.error, struct.error, zlib.error, tokenize.TokenError, EOFError, OSError),
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError),
    *(SyntaxError, SystemError, TypeError, ValueError),
)

# Modes that JPEG and BMP files can hold, and suffixes of files without CMYK. Pillow
# itself does the other conversions.
_JPEG_MODES = ("L", "RGB", "CMYK")
_NO_CMYK = (".png", ".webp", ".bmp", ".gif", ".avif", ".jp2")
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif")
_TIFF_SUFFIXES = (".tif", ".tiff")

# Compressions of TIFF files that keep pixels and suit all images.
_LOSSLESS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate")

# What files hold besides pixels, of `ImageFile.info`.
_EXIF_ICC_XMP = {"exif", "icc_profile", "xmp"}
_HELD: Mapping[str, set[str]] = {
    **dict.fromkeys(_JPEG_SUFFIXES, {*_EXIF_ICC_XMP, "dpi", "comment", "photoshop"}),
    **dict.fromkeys(_TIFF_SUFFIXES, {*_EXIF_ICC_XMP, "dpi", "photoshop"}),
    ".png": {*_EXIF_ICC_XMP, "dpi", "text", "chunks"},
    ".webp": _EXIF_ICC_XMP,
    ".avif": _EXIF_ICC_XMP,
    ".bmp": {"dpi"},
    ".gif": {"comment"},
    ".jp2": {"comment"},
}
_INFO_NAMES = {
    "exif": "EXIF",
    "icc_profile": "ICC profile",
    "xmp": "XMP",
    "comment": "comment",
    "text": "text",
    "photoshop": "Photoshop data",
    "chunks": "PNG chunks",
}

_MAX_NAMES = 10  # Of what is left out, in a warning.

_STRIP = 256  # Rows that are pasted at once: copies of all would take memory.

# The longest segment of a JPEG file, less the name of its content.
_MAX_SEGMENT = 65_000

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
        return _read_image(_files.read_regular(path), max_pixels)
    except _CODEC_ERRORS as error:
        raise UserError(f"cannot read {path}: {_reason(path, error)}") from error


def write(path: str | os.PathLike[str], file: ImageFile) -> None:
    """Write an image file of the kind that its suffix names, complete or not at all.

    PNG, TIFF, WebP, BMP and JPEG 2000 files keep all pixels exactly; 16-bit channels
    only in PNG and TIFF, CMYK only in TIFF. AVIF changes them by up to 3 of 255. A JPEG
    file is compressed by the tables of the file that the image came from, which changes
    the untouched pixels least; without such tables, with quality 95 and without
    subsampling. What a kind of file cannot hold of the metadata is left out, with a
    warning that names it.

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
        data = _encode(path.suffix.lower(), *file)
    except UserError:
        raise
    except _CODEC_ERRORS as error:
        raise UserError(f"cannot write {path}: {error}.") from error
    _files.write_bytes(path, data)


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to gray or RGB values, and alpha if it has any.

    Args:
      image: Image of any mode except Lab and premultiplied alpha.

    Returns:
      ``[H, W]`` or ``[H, W, C]`` with C = 2, 3 or 4: uint8, uint16 or float32.

    Raises:
      UserError: If the image has another mode.
    """
    mode = image.mode
    if mode in ("L", "LA", "RGB", "RGBA", "F"):
        return np.asarray(image)
    if mode == "1":
        return np.asarray(image.convert("L"))
    if mode in ("P", "PA"):
        alpha = mode == "PA" or "transparency" in image.info
        return np.asarray(image.convert("RGBA" if alpha else "RGB"))
    if mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        return np.asarray(image.convert("RGB"))
    if mode == "I" or mode.startswith("I;16"):
        array = np.asarray(image)
        if array.min(initial=0) >= 0 and array.max(initial=0) < 2**16:
            return array.astype(np.uint16)
    raise UserError(
        f"image has Pillow's mode {mode!r}, which cannot be repaired; convert it, "
        "e.g. image.convert('RGB')."
    )


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """Convert an image to an array; see `to_array` for Pillow images."""
    return to_array(image) if isinstance(image, Image.Image) else np.asarray(image)


def alpha_of(array: np.ndarray) -> np.ndarray | None:
    """Get the alpha channel of an image ``[H, W, C]`` with C = 2 or 4, else None."""
    return array[..., -1] if array.shape[2:] in ((2,), (4,)) else None


def paste(image: Image.Image, array: np.ndarray, hole: np.ndarray) -> Image.Image:
    """Copy a Pillow image with other pixels in its hole.

    Args:
      image: The image. The copy has its mode, palette, metadata and other pixels.
      array: New pixels, as from `to_array`. They equal the image's outside the hole.
      hole: Bool ``[H, W]``.
    """
    if image.mode.startswith("I;16"):  # Pillow cannot paste into this mode.
        new = Image.fromarray(np.ascontiguousarray(array))
        new.info = dict(image.info)
        return new
    result = image.copy()
    for top in range(0, image.height, _STRIP):
        part = hole[top : top + _STRIP]
        if part.any():
            new = _to_mode_of(image, array[top : top + _STRIP])
            mask = Image.fromarray(part.astype(np.uint8) * 255)
            result.paste(new, (0, top), mask)
    return result


def _to_mode_of(image: Image.Image, array: np.ndarray) -> Image.Image:
    """Convert values, as from `to_array`, to what can be pasted into an image."""
    if image.mode == "I":
        array = array.astype(np.int32)
    new = Image.fromarray(np.ascontiguousarray(array))
    if image.mode == "1":
        return new.convert("1", dither=Image.Dither.NONE)
    return _to_palette(new, image) if image.mode == "P" else new.convert(image.mode)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image." if path.stat().st_size else "it is empty."
    if isinstance(error, FileNotFoundError):
        return "there is no such file."
    if isinstance(error, MemoryError):
        return "there is not enough memory."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return f"{error}".rstrip(".") + "."


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels, and max_pixels is {max_pixels:,}"
        )


def _read_npy(path: Path, max_pixels: int) -> np.ndarray:
    _files.check_regular(path)
    shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    if len(shape) not in (2, 3):
        raise ValueError(f"its shape must be [H, W] or [H, W, C], not {list(shape)}")
    _check_size(shape[1], shape[0], max_pixels)
    return np.load(path, allow_pickle=False)


def _read_image(data: bytes, max_pixels: int) -> ImageFile:
    if tags_lib.is_tiff(data):
        return _read_tiff(data, max_pixels)
    with io.BytesIO(data) as stream:  # Pillow would keep it with the image.
        return _read_opened(open_without_limit(stream, _FORMATS), data, max_pixels)


def _read_opened(image: Image.Image, data: bytes, max_pixels: int) -> ImageFile:
    _check_size(*image.size, max_pixels)
    frames = _count_frames(image, data)
    image.load()
    if frames:
        warnings.warn(f"it has {frames} frames; only the first is taken.", stacklevel=4)
    tags = tags_lib.read(_exif_of(image))
    info = _read_info(image, tags)
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
            raise ValueError("it is truncated or damaged")
        array = _decode_with_opencv(data)
        if array.ndim == 2:  # Gray, with one value that stands for transparency.
            alpha = np.where(array == clear, 0, 65_535).astype(np.uint16)
            array = np.stack([array, array, array, alpha], axis=-1)
        return ImageFile(_turn(array, orientation), info)
    if _is_deep(data):
        warnings.warn(
            "its channels have more than 8 bits, and 8 are kept.", stacklevel=4
        )
    return ImageFile(_finish(image, orientation, info), info)


def _read_tiff(data: bytes, max_pixels: int) -> ImageFile:
    tags = tags_lib.read(data)
    sides = [(256, 257)]
    if {322, 323} & {*tags.directory}:  # Of its tiles.
        sides.append((322, 323))
    for pair in sides:
        width, height = (tags.numbers(code, default=(0,))[0] for code in pair)
        if not width * height:
            raise ValueError("it is damaged: its width or height is missing")
        _check_size(width, height, max_pixels)
    samples, kind = _check_samples(tags)
    pages = tags_lib.count_pages(data)
    if pages > 1:
        warnings.warn(f"it has {pages} frames; only the first is taken.", stacklevel=4)
    # Decoders get no tags that they might not be able to handle.
    data = tags_lib.keep_layout(data)
    if kind in ("float16", "float64") or (
        samples > 1 and kind in ("uint16", "float32")
    ):
        array = _decode_tiff(data, tags, kind)
        info = _read_info(None, tags)
        return ImageFile(_turn(array, tags.orientation()), info)
    with io.BytesIO(data) as stream:
        try:
            image = open_without_limit(stream, _FORMATS)
        except Image.UnidentifiedImageError as error:
            compression = tags.numbers(259, default=(1,))[0]
            raise ValueError(
                f"it is damaged, or its kind of TIFF is not known: {samples} band(s) "
                f"of {kind}, compression {compression}"
            ) from error
        _check_size(*image.size, max_pixels)
        image.load()
    info = _read_info(image, tags)
    compression = image.info.get("compression")
    if compression != "raw":
        known = compression in _LOSSLESS or (
            image.mode == "1" and compression in ("group3", "group4")
        )
        info["compression"] = compression if known else "tiff_adobe_deflate"
    return ImageFile(_finish(image, tags.orientation(), info), info)


def _check_samples(tags: Tags) -> tuple[int, str]:
    """Check the bands and the type of a TIFF file, and return both."""
    samples = tags.numbers(277, default=(1,))[0]
    photometric = tags.numbers(262, default=(1,))[0]
    colors = _TIFF_COLORS.get(photometric, samples)
    if photometric == 5:  # Not always CMYK.
        colors = tags.numbers(334, default=(4,))[0]
    extra = samples - colors
    if extra > 1 or (extra == 1 and tags.numbers(338)[:1] == (0,)):
        raise ValueError(
            f"it has {samples} bands: {colors} of color and {extra} of another kind, "
            "and only an alpha band can be kept. Repair the colors alone, or the bands "
            "as .npy files, one by one"
        )
    bits, formats = (
        set(tags.numbers(258, default=(1,))),
        set(tags.numbers(339, default=(1,))),
    )
    kinds = sorted(
        f"{_SAMPLE_FORMATS.get(form, 'uint')}{bit}" for form in formats for bit in bits
    )
    known = ("float16", "float32", "float64")
    whole = kinds[0].startswith("uint") and max(bits) <= 16
    if len(kinds) > 1 or (kinds[0] not in known and not whole):
        raise ValueError(
            f"its values are {' and '.join(kinds)}, which cannot be repaired. Convert "
            "them to float32 or uint16"
        )
    return samples, kinds[0]


def _decode_tiff(data: bytes, tags: Tags, kind: str) -> np.ndarray:
    """Decode a TIFF file that Pillow cannot, to ``[H, W]`` or ``[H, W, C]``."""
    if kind == "uint16" and tags.numbers(338) == (1,):
        raise ValueError("its 16-bit colors are multiplied by their alpha")
    samples = tags.numbers(277, default=(1,))[0]
    planes = tags.numbers(284, default=(1,))[0] == 2 and samples > 1
    # OpenCV would read a plane as pixels.
    if not planes and kind != "float16":
        return _decode_with_opencv(data)
    compression = tags.numbers(259, default=(1,))[0]
    if compression in (8, 32946):
        _check_inflated(data, tags)
    elif compression != 1:
        raise ValueError(
            f"it has {'planes' if planes else 'values'} of {kind} with compression "
            f"{compression}, which cannot be read; save it without compression"
        )
    array = tifffile.imread(io.BytesIO(data), key=0)
    return np.moveaxis(array, 0, -1) if planes else array


def _check_inflated(data: bytes, tags: Tags) -> None:
    """Check that no compressed part of a TIFF file is larger than the image."""
    numbers = [tags.numbers(code, default=(1,)) for code in (256, 257, 277, 258)]
    limit = math.prod(values[0] for values in numbers) // 8 + 2**20
    offsets = tags.numbers(273) or tags.numbers(324)
    for start, size in zip(offsets, tags.numbers(279) or tags.numbers(325)):
        inflate = zlib.decompressobj()
        inflate.decompress(data[start : start + size], limit)
        if not inflate.eof:
            raise ValueError("its compressed data are damaged, or larger than it says")


def _finish(
    image: Image.Image, orientation: int, info: Mapping[str, Any]
) -> Image.Image:
    """Turn an image upright, and let transparency be a channel of it."""
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
    # An MPO file is a JPEG with previews. A PNG file has the number in its header, and
    # so has a WebP. Those of a GIF must be searched for.
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return ""
    if image.format == "GIF" and len(data) > 2**20:
        return "several"
    return str(getattr(image, "n_frames", 1))


def _is_deep(data: bytes) -> bool:
    """Return whether Pillow drops bits of an AVIF or JPEG 2000 file's channels."""
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        at = data.find(b"av1C") + 4
        return at > 3 and data[at + 2 : at + 3] >= b"\x40" and bool(data[at + 2] & 0x40)
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


def _read_info(image: Image.Image | None, tags: Tags) -> dict[str, Any]:
    """Collect the metadata of an image, and name what must be left out."""
    source = image.info if image is not None else {}
    kept, lost = tags_lib.split_metadata(tags)
    lost_names = [tags_lib.names(lost)] if lost else []
    resources = kept.get(tags_lib.PHOTOSHOP)
    photoshop = resources.data if resources else b""
    kept = tags_lib.without(kept, {tags_lib.PHOTOSHOP})
    for name, segment in getattr(image, "applist", ()):
        if name == "APP13" and segment.startswith(b"Photoshop 3.0\0"):
            photoshop += segment[14:]
        elif segment.startswith(b"http://ns.adobe.com/xmp/extension/"):
            lost_names.append("extended XMP")
    profile, xmp = tags.get(tags_lib.ICC_PROFILE), tags.get(tags_lib.XMP)
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
            "left out of its metadata, because they are damaged or show the old image: "
            f"{', '.join(dict.fromkeys(lost_names))}.",
            stacklevel=5,
        )
    return {name: value for name, value in info.items() if value}


def _read_parts(image: Image.Image, data: bytes) -> dict[str, Any]:
    """Collect what Pillow drops from a file, and name what cannot be copied."""
    chunks = {}
    if image.format == "PNG":
        chunks, lost = parts.png_chunks(data)
    else:
        segments = getattr(image, "applist", [])
        lost = parts.dropped_parts(data, image.format or "", segments)
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
    xmp = re.sub(rb'tiff:Orientation(="\d"|>\d</tiff:Orientation>)', b"", xmp)
    return re.sub(rb"<xmp:Thumbnails>.*?</xmp:Thumbnails>", b"", xmp, flags=re.DOTALL)


def _decode_with_opencv(data: bytes) -> np.ndarray:
    """Decode values of more than 8 bits to ``[H, W]`` or ``[H, W, C]``."""
    array = cv2.imdecode(
        np.frombuffer(data, np.uint8),
        cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION,
    )
    if array is None:
        raise ValueError("it is damaged, or its kind of 16-bit color is not known")
    return array if array.ndim == 2 else _swap_red_and_blue(array)


def _swap_red_and_blue(array: np.ndarray) -> np.ndarray:
    order = [2, 1, 0, 3][: array.shape[2]]
    return np.ascontiguousarray(array[..., order])


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image upright according to its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def _encode(
    suffix: str, image: Image.Image | np.ndarray, info: dict[str, Any]
) -> bytes:
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, as_array(image))
        return file.getvalue()
    info = dict(info)
    if isinstance(image, np.ndarray) and not _is_deep_color(image, suffix):
        image = _to_pillow(image, suffix)
    if isinstance(image, Image.Image):
        image, info = _convert(image, suffix, info)
    if "exif" in info:
        info["exif"] = _fit_exif(info["exif"], suffix)
    _warn_of_lost(suffix, info)
    if suffix in _TIFF_SUFFIXES:
        return _encode_tiff(image, info)
    if suffix == ".png":
        return _encode_png(image, info)
    assert isinstance(image, Image.Image)
    options = {k: v for k, v in info.items() if k in _HELD.get(suffix, ())}
    if suffix in _JPEG_SUFFIXES:
        names = ("qtables", "subsampling")
        options |= {name: info[name] for name in names if name in info}
        if "qtables" not in info:
            options |= {"quality": 95, "subsampling": 0}
        if resources := options.pop("photoshop", b""):
            segment = b"Photoshop 3.0\0" + resources
            size = struct.pack(">H", len(segment) + 2)
            options["extra"] = b"\xff\xed" + size + segment
    elif suffix == ".webp":
        options |= {"lossless": True, "exact": True}
    elif suffix == ".avif":
        options |= {"quality": 100, "subsampling": "4:4:4"}
    image.save(file, format=Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def _is_deep_color(array: np.ndarray, suffix: str) -> bool:
    """Return whether a file can hold an array that Pillow has no mode for."""
    colors = array.shape[2:] in ((3,), (4,)) and array.size > 0
    if suffix == ".png":
        return colors and array.dtype == np.uint16
    floats = array.dtype in (np.float16, np.float32, np.float64)
    gray = array.ndim == 2 and array.size > 0
    return suffix in _TIFF_SUFFIXES and (
        (colors and array.dtype == np.uint16) or (floats and (colors or gray))
    )


def _fit_exif(exif: bytes, suffix: str) -> bytes:
    """Leave the largest tags out of EXIF data that a JPEG file cannot hold."""
    if suffix not in _JPEG_SUFFIXES or len(exif) <= _MAX_SEGMENT:
        return exif
    exif, lost = tags_lib.pack_within(tags_lib.read(exif), _MAX_SEGMENT)
    warnings.warn(
        f"left out of its metadata, as JPEG files have no room for them: "
        f"{tags_lib.names(lost)}.",
        stacklevel=4,
    )
    return exif


def _warn_of_lost(suffix: str, info: dict[str, Any]) -> None:
    """Drop the metadata that a kind of file cannot hold, with a warning."""
    if lost := info.pop("lost", ()):
        warnings.warn(
            f"left out of its metadata, because it cannot be copied: "
            f"{', '.join(lost)}.",
            stacklevel=4,
        )
    held = _HELD.get(suffix, set())
    lost = [name for name in _INFO_NAMES if info.get(name) and name not in held]
    if suffix in _JPEG_SUFFIXES:
        for name in ("xmp", "comment", "photoshop"):
            if len(info.get(name, b"")) > _MAX_SEGMENT:
                lost.append(name)
    for name in lost:
        del info[name]
    if lost:
        named = ", ".join(_INFO_NAMES[name] for name in lost)
        warnings.warn(
            f"left out of its metadata, as {suffix} files have no room for them: "
            f"{named}.",
            stacklevel=4,
        )


def _to_pillow(array: np.ndarray, suffix: str) -> Image.Image:
    array = array[..., 0] if array.shape[2:] == (1,) else array
    shallow = array.ndim == 3 or suffix not in (".png", *_TIFF_SUFFIXES)
    if array.dtype == np.uint16 and shallow:
        warnings.warn(
            f"16 bits per channel are rounded to 8, the most that {suffix} files hold.",
            stacklevel=4,
        )
        array = to_uint8(array)
    if array.dtype == bool:
        array = to_uint8(array)
    has_mode = array.shape[2:] in ((), (2,), (3,), (4,))
    if array.dtype not in (np.uint8, np.uint16) or not has_mode or not array.size:
        raise UserError(
            f"{array.dtype} data of shape {list(array.shape)} is not an image: name a "
            ".npy file."
        )
    return Image.fromarray(array)


def _convert(
    image: Image.Image, suffix: str, info: dict[str, Any]
) -> tuple[Image.Image, dict[str, Any]]:
    """Convert an image to the nearest mode that a kind of file can hold."""
    if image.mode.startswith("I") and suffix not in (".png", *_TIFF_SUFFIXES):
        image = _to_pillow(to_array(image), suffix)
    if image.mode == "F" and suffix not in _TIFF_SUFFIXES:
        raise UserError("float32 images are written only as .tif or .npy files.")
    if image.mode in ("YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    if image.mode == "CMYK" and suffix in _NO_CMYK:
        info.pop("icc_profile", None)  # It describes CMYK.
        image = image.convert("RGB")
    if suffix in (".avif", ".jp2") and image.mode not in ("L", "LA", "RGB", "RGBA"):
        alpha = alpha_of(to_array(image)) is not None
        image = image.convert("RGBA" if alpha else "L" if image.mode == "1" else "RGB")
    flat = (*_JPEG_SUFFIXES, ".bmp")
    if suffix in flat and image.mode not in _JPEG_MODES:
        alpha = alpha_of(to_array(image))
        if alpha is not None and alpha.min(initial=255) < 255:
            raise UserError(
                f"{suffix} files cannot hold the image's transparency: name a .png, "
                ".tif or .webp file."
            )
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    return image, info


def _encode_png(image: Image.Image | np.ndarray, info: dict[str, Any]) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    if xmp := info.get("xmp"):
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
    for keyword, value in info.get("text", {}).items():
        chunks.add_text(keyword, value, zip=len(value) > 1024)
    exif, profile = info.get("exif", b""), info.get("icc_profile", b"")
    dpi = info.get("dpi")
    copied = [_png_chunk(*chunk) for chunk in info.get("chunks", {}).items()]
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        options = {"dpi": dpi} if dpi else {}
        if exif:
            options["exif"] = exif
        image.save(file, "PNG", icc_profile=profile, pnginfo=chunks, **options)
        return _insert_chunks(file.getvalue(), copied)
    if exif:
        chunks.add(b"eXIf", exif.removeprefix(tags_lib.EXIF_HEADER))
    if profile:
        chunks.add(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile))
    if dpi:
        density = (round(float(n) / 0.0254) for n in dpi)
        chunks.add(b"pHYs", struct.pack(">2IB", *density, 1))
    done, encoded = cv2.imencode(".png", _swap_red_and_blue(image))
    assert done
    extra = [_png_chunk(*chunk[:2]) for chunk in chunks.chunks]
    return _insert_chunks(encoded.tobytes(), copied + extra)


def _insert_chunks(data: bytes, chunks: Sequence[bytes]) -> bytes:
    """Insert chunks into a PNG file after its header, of 13 bytes."""
    return b"".join([data[:33], *chunks, data[33:]]) if chunks else data


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def _encode_tiff(image: Image.Image | np.ndarray, info: dict[str, Any]) -> bytes:
    """Encode the pixels alone, and add the tags without an encoder's help."""
    file = io.BytesIO()
    if isinstance(image, Image.Image):
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            image = image.copy()  # Pillow would hand the file's tags to libtiff.
        compression = info.get("compression", "raw")
        if compression in ("group3", "group4") and image.mode != "1":
            compression = "tiff_adobe_deflate"
        image.save(file, "TIFF", compression=compression, icc_profile=None)
    else:
        color = image.ndim == 3
        tifffile.imwrite(
            file,
            image,
            photometric="rgb" if color else "minisblack",
            extrasamples=["unassalpha"] if color and image.shape[2] == 4 else None,
            metadata=None,
            software=False,
        )
    tags = tags_lib.read(info.get("exif", b""))
    for code, name in [
        (tags_lib.ICC_PROFILE, "icc_profile"),
        (tags_lib.XMP, "xmp"),
        (tags_lib.PHOTOSHOP, "photoshop"),
    ]:
        if info.get(name):
            tags.directory[code] = tags_lib.bytes_tag(info[name])
    dpi = info.get("dpi")
    if dpi and tags_lib.X_RESOLUTION not in tags.directory:
        tags.directory.update(tags_lib.dpi_tags(dpi, tags.order))
    return tags_lib.add_to_tiff(file.getvalue(), tags)


def _to_palette(new: Image.Image, image: Image.Image) -> Image.Image:
    """Convert an image to the nearest colors of another image's palette.

    Only the most opaque colors of the palette are used, so that filled pixels are seen.

    Returns:
      An image of mode L with the indices of the colors.
    """
    palette = np.reshape(image.getpalette("RGB"), (-1, 3)).astype(np.uint8)
    alpha = np.full(len(palette), 255)
    clear = image.info.get("transparency", b"")
    if isinstance(clear, int):
        alpha[clear : clear + 1] = 0  # The index may be beyond the palette.
    else:  # A value for each of the first colors.
        alpha[: len(clear)] = list(clear)[: len(alpha)]
    # Fill all 256 places of a palette: the first colors come again.
    indices = np.resize(np.flatnonzero(alpha == alpha.max()), 256)
    opaque = Image.new("P", (1, 1))
    opaque.putpalette(palette[indices].tobytes())
    nearest = np.asarray(new.convert("RGB").quantize(palette=opaque))
    return Image.fromarray(indices[nearest].astype(np.uint8))
