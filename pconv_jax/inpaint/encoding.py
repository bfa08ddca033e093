"""Encoding of images as files, with their metadata; see `image_io.write`."""

import io
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image, PngImagePlugin, TiffImagePlugin

from pconv_jax._errors import UserError
from pconv_jax.data import tags as tags_lib
from pconv_jax.data.decode import codec_errors
from pconv_jax.inpaint.modes import alpha_of, as_array, swap_red_and_blue, to_array
from pconv_jax.inpaint.values import to_uint8

# Modes that JPEG and BMP files can hold, and suffixes of files without CMYK. Pillow
# itself does the other conversions.
_JPEG_MODES = ("L", "RGB", "CMYK")
_NO_CMYK = (".png", ".webp", ".bmp", ".gif", ".avif", ".jp2")
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif")
_TIFF_SUFFIXES = (".tif", ".tiff")

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

# The longest segment of a JPEG file, less the name of its content.
_MAX_SEGMENT = 65_000


def encode(
    suffix: str, image: Image.Image | np.ndarray, info: Mapping[str, Any]
) -> bytes:
    """Encode an image as a file of the kind that a suffix names.

    Args:
      suffix: One of `formats.SUFFIXES`, in lower case.
      image: See `image_io.ImageFile`.
      info: See there. What the file cannot hold is left out, with a warning.

    Raises:
      UserError: If such a file cannot hold the image.
      FileContentError: If its encoder says so.
    """
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
    _drop_unwritable(suffix, info)
    if suffix in _TIFF_SUFFIXES:
        return _encode_tiff(image, info)
    if suffix == ".png":
        return _encode_png(image, info)
    assert isinstance(image, Image.Image)
    kind, options = Image.registered_extensions()[suffix], _choose_options(suffix, info)
    with codec_errors():
        image.save(file, format=kind, **options)
    return file.getvalue()


def _choose_options(suffix: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the options of Pillow's encoders of other kinds than PNG and TIFF."""
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
    return options


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


def _drop_unwritable(suffix: str, info: dict[str, Any]) -> None:
    """Drop what cannot be copied, or a kind of file cannot hold, with a warning."""
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
        reason = f"the most that {suffix} files hold"
        if suffix in (".png", *_TIFF_SUFFIXES):
            reason = "since 16-bit gray with alpha cannot be written"
        warnings.warn(f"16 bits per channel are rounded to 8, {reason}.", stacklevel=4)
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
    if image.mode == "PA":  # No file holds it.
        image = image.convert("RGBA")
    if image.mode == "CMYK" and suffix in _NO_CMYK:
        warnings.warn(
            "its CMYK colors are converted to RGB, without the color profile: name a "
            ".tif or .jpg file to keep them.",
            stacklevel=4,
        )
        info.pop("icc_profile", None)  # It describes CMYK.
        image = image.convert("RGB")
    if suffix in (".avif", ".jp2") and image.mode not in ("L", "LA", "RGB", "RGBA"):
        alpha = alpha_of(to_array(image)) is not None
        image = image.convert("RGBA" if alpha else "L" if image.mode == "1" else "RGB")
    flat = (*_JPEG_SUFFIXES, ".bmp")
    if suffix in flat and image.mode not in _JPEG_MODES:
        image = _flatten(image, suffix)
    if suffix == ".gif" and image.mode not in ("1", "L", "P"):
        image = _flatten(image, suffix)
        if image.mode == "RGB":
            warnings.warn(
                "its colors are reduced to 256, the most that .gif files hold.",
                stacklevel=4,
            )
    return image, info


def _flatten(image: Image.Image, suffix: str) -> Image.Image:
    """Convert an image to gray or RGB, without the alpha that a file cannot hold."""
    alpha = alpha_of(to_array(image))
    if alpha is not None and alpha.min(initial=255) < 255:
        raise UserError(
            f"{suffix} files cannot hold the image's transparency: name a .png, .tif "
            "or .webp file."
        )
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


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
        with codec_errors():
            image.save(file, "PNG", icc_profile=profile, pnginfo=chunks, **options)
        return _insert_chunks(file.getvalue(), copied)
    if exif:
        chunks.add(b"eXIf", exif.removeprefix(tags_lib.EXIF_HEADER))
    if profile:
        chunks.add(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile))
    if dpi:
        density = (round(float(n) / 0.0254) for n in dpi)
        chunks.add(b"pHYs", struct.pack(">2IB", *density, 1))
    image = swap_red_and_blue(image)
    with codec_errors():
        done, encoded = cv2.imencode(".png", image)
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
        with codec_errors():
            image.save(file, "TIFF", compression=compression, icc_profile=None)
    else:
        color = image.ndim == 3
        with codec_errors():
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
