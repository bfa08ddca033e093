"""Image files: to arrays, and back with their metadata (EXIF, ICC profile, DPI).

An image is a `PIL.Image.Image`. Where Pillow has no mode, as for 16-bit color and for
data from ``.npy`` files, it is an array ``[H, W]`` or ``[H, W, C]``.
"""

import io
import os
import struct
import threading
import tokenize
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, TiffImagePlugin

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.inpaint.formats import MAX_PIXELS, check_suffix
from pconv_jax.inpaint.values import to_uint8

# Pillow's other formats are not tried: some of them start programs.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")

# What Pillow, OpenCV, tifffile and NumPy raise if a file is damaged or is no image.
_DECODER_ERRORS = (
    *(cv2.error, struct.error, zlib.error, tokenize.TokenError, EOFError, OSError),
    *(ArithmeticError, AttributeError, LookupError, MemoryError, SyntaxError),
    *(TypeError, ValueError),
)

# What Pillow raises if a kind of file cannot hold an image, such as one of more than
# 16,383 pixels a side in a WebP file.
_ENCODER_ERRORS = (OSError, ValueError, struct.error)

# Modes that JPEG and BMP files can hold, and suffixes of files without CMYK. Pillow
# itself does the other conversions.
_JPEG_MODES = ("L", "RGB", "CMYK")
_NO_CMYK = (".png", ".webp", ".bmp", ".gif")

# Compressions of TIFF files that change pixels.
_LOSSY = ("jpeg", "tiff_jpeg", "webp")

# Guards Pillow's limit of an image's size, which is a global variable.
_PILLOW_LIMIT = threading.Lock()

# Tags about the layout of the pixels in a TIFF file, or the position of other parts.
_LAYOUT_TAGS = frozenset(
    [*range(254, 267), 273, *range(277, 282), 284, 317, *range(320, 348), 700]
    + [*range(512, 533), 33723, 34377, 34675]
)
_TEXT_TAGS = (270, 271, 272, 306, 315, 33432)
_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


class ImageFile(NamedTuple):
    """The content of an image file.

    Attributes:
      image: The image, upright according to the EXIF orientation; see the module for
        its types.
      info: Metadata, as Pillow's ``save`` takes it: ``icc_profile``, ``exif`` (without
        the orientation and the thumbnail, which would show the old image), ``dpi``; for
        JPEG files also ``qtables`` and ``subsampling``.
    """

    image: Image.Image | np.ndarray
    info: dict[str, Any]


def read(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read an image file, or data.

    Args:
      path: A PNG, JPEG, TIFF, WebP, BMP, GIF or NumPy file. Of several frames or pages,
        the first is read, with a warning.
      max_pixels: Larger images are refused before they are decoded. The default is
        100,000,000.

    Raises:
      UserError: If the file is missing, empty, damaged, too large or not an image. The
        message names the file.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix.lower() == ".npy":
            return ImageFile(_read_npy(path, max_pixels), {})
        return _read_image(path.read_bytes(), max_pixels)
    except _DECODER_ERRORS as error:
        raise UserError(f"cannot read {path}: {_reason(path, error)}") from error


def write(path: str | os.PathLike[str], file: ImageFile) -> None:
    """Write an image file of the kind that its suffix names, complete or not at all.

    PNG, TIFF, WebP and BMP files keep all pixels exactly; 16-bit channels only in PNG
    and TIFF, CMYK only in TIFF. A JPEG file is compressed by the tables of the file
    that the image came from, which changes the untouched pixels least; without such
    tables, with quality 95 and without subsampling.

    Args:
      path: Path of the file; see `formats.SUFFIXES`.
      file: The image and its metadata.

    Raises:
      UserError: If the suffix is another one, or such a file cannot hold the image, for
        example its transparency.
      RunError: If the file cannot be written.
    """
    path = Path(path).expanduser()
    check_suffix(path)
    try:
        data = _encode(path.suffix.lower(), *file)
    except UserError:
        raise
    except _ENCODER_ERRORS as error:
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
    mode = image.mode
    if mode == "I":
        array = array.astype(np.int32)
    new = Image.fromarray(np.ascontiguousarray(array))
    if mode == "1":
        new = new.convert("1", dither=Image.Dither.NONE)
    elif mode == "P":
        new = _to_palette(new, image)
    elif mode.startswith("I;16"):  # Pillow cannot paste into this mode.
        new.info = dict(image.info)
        return new
    else:
        new = new.convert(mode)
    result = image.copy()
    result.paste(new, mask=Image.fromarray(hole.astype(np.uint8) * 255))
    return result


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image." if path.stat().st_size else "it is empty."
    if isinstance(error, FileNotFoundError):
        return "there is no such file."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return f"{error}".rstrip(".") + "."


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels, and max_pixels is {max_pixels:,}"
        )


def _read_npy(path: Path, max_pixels: int) -> np.ndarray:
    shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    if len(shape) not in (2, 3):
        raise ValueError(f"its shape must be [H, W] or [H, W, C], not {list(shape)}")
    _check_size(shape[1], shape[0], max_pixels)
    return np.load(path, allow_pickle=False)


def _read_image(data: bytes, max_pixels: int) -> ImageFile:
    image = _open(data)
    _check_size(*image.size, max_pixels)
    frames = getattr(image, "n_frames", 1)
    image.load()
    if frames > 1 and image.format != "MPO":  # An MPO file is a JPEG with previews.
        warnings.warn(f"it has {frames} frames; only the first is taken.", stacklevel=3)
    exif = image.getexif()
    info: dict[str, Any] = {
        "icc_profile": image.info.get("icc_profile"),
        "dpi": image.info.get("dpi"),
        "exif": _keep_exif(exif),
    }
    info = {name: value for name, value in info.items() if value}
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        tables = [np.reshape(t, (8, 8)) for _, t in sorted(image.quantization.items())]
        if orientation > 4:  # Rows become columns.
            tables = [table.T for table in tables]
        info["qtables"] = [table.ravel().tolist() for table in tables]
        info["subsampling"] = max(JpegImagePlugin.get_sampling(image), 0)
    if _has_16_bit_color(image, data):
        return ImageFile(_turn(_decode_16_bits(image, data), orientation), info)
    image = ImageOps.exif_transpose(image)
    # In these modes, transparency is a color that stands for it.
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    return ImageFile(image, info)


def _open(data: bytes) -> Image.Image:
    """Open an image of any size without decoding it; the caller checks the size."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _has_16_bit_color(image: Image.Image, data: bytes) -> bool:
    """Return whether Pillow has dropped half the bits of each channel."""
    if image.format == "PNG":  # The header has the depth and the color type.
        return data[24] == 16 and data[25] != 0
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,))
        return len(bits) > 1 and max(bits) == 16
    return False


def _decode_16_bits(image: Image.Image, data: bytes) -> np.ndarray:
    """Decode 16-bit color, which Pillow cannot, to uint16 ``[H, W, C]``."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.tag_v2.get(ExifTags.Base.ExtraSamples) == (1,):
            raise ValueError("its 16-bit colors are multiplied by their alpha")
        if image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == 2:
            # OpenCV would read a plane as pixels.
            return np.moveaxis(tifffile.imread(io.BytesIO(data), key=0), 0, -1)
    array = cv2.imdecode(
        np.frombuffer(data, np.uint8),
        cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION,
    )
    if array is None:
        raise ValueError("its kind of 16-bit color is not known")
    return _swap_red_and_blue(array)


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


def _keep_exif(source: Image.Exif) -> bytes:
    exif = Image.Exif()
    dropped = {*_LAYOUT_TAGS, *_IFDS, ExifTags.Base.Orientation}
    exif.update({tag: value for tag, value in source.items() if tag not in dropped})
    for ifd in _IFDS:
        tags = source.get_ifd(ifd)
        if tags:
            exif.get_ifd(ifd).update(tags)
    return exif.tobytes() if len(exif) or any(map(exif.get_ifd, _IFDS)) else b""


def _encode(
    suffix: str, image: Image.Image | np.ndarray, info: dict[str, Any]
) -> bytes:
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, as_array(image))
        return file.getvalue()
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint16 and image.ndim == 3 and image.shape[2] > 2:
            if suffix == ".png":
                return _encode_png(image, info)
            if suffix in (".tif", ".tiff"):
                return _encode_tiff(image, info)
        image = _to_pillow(image, suffix)
    image, info = _convert(image, suffix, dict(info))
    if suffix in (".jpg", ".jpeg"):
        if "qtables" not in info:
            info |= {"quality": 95, "subsampling": 0}
    else:
        info = {k: v for k, v in info.items() if k not in ("qtables", "subsampling")}
    if suffix == ".webp":
        info |= {"lossless": True, "exact": True}
    if suffix in (".tif", ".tiff") and image.info.get("compression") in _LOSSY:
        info["compression"] = "tiff_deflate"
    image.save(file, format=Image.registered_extensions()[suffix], **info)
    return file.getvalue()


def _to_pillow(array: np.ndarray, suffix: str) -> Image.Image:
    array = array[..., 0] if array.shape[2:] == (1,) else array
    shallow = array.ndim == 3 or suffix not in (".png", ".tif", ".tiff")
    if array.dtype == np.uint16 and shallow:
        warnings.warn(
            f"16 bits per channel are rounded to 8, the most that {suffix} files hold.",
            stacklevel=4,
        )
        array = to_uint8(array)
    if array.dtype == np.float32 and array.ndim == 2 and suffix in (".tif", ".tiff"):
        return Image.fromarray(array)
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
    if image.mode.startswith("I") and suffix not in (".png", ".tif", ".tiff"):
        image = _to_pillow(to_array(image), suffix)
    if image.mode == "F" and suffix not in (".tif", ".tiff"):
        raise UserError("float32 images are written only as .tif or .npy files.")
    if image.mode in ("YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    if image.mode == "CMYK" and suffix in _NO_CMYK:
        info.pop("icc_profile", None)  # It describes CMYK.
        image = image.convert("RGB")
    if suffix in (".jpg", ".jpeg", ".bmp") and image.mode not in _JPEG_MODES:
        alpha = alpha_of(to_array(image))
        if alpha is not None and alpha.min(initial=255) < 255:
            raise UserError(
                f"{suffix} files cannot hold the image's transparency: name a .png, "
                ".tif or .webp file."
            )
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    return image, info


def _encode_png(array: np.ndarray, info: dict[str, Any]) -> bytes:
    known = {
        cv2.IMAGE_METADATA_EXIF: info.get("exif", b"").removeprefix(b"Exif\0\0"),
        cv2.IMAGE_METADATA_ICCP: info.get("icc_profile", b""),
    }
    known = {
        kind: np.frombuffer(data, np.uint8) for kind, data in known.items() if data
    }
    _, data = cv2.imencodeWithMetadata(
        ".png", _swap_red_and_blue(array), list(known), list(known.values())
    )
    return data.tobytes()


def _encode_tiff(array: np.ndarray, info: dict[str, Any]) -> bytes:
    exif = Image.Exif()
    exif.load(info.get("exif", b""))
    dpi = None
    if "dpi" in info:
        horizontal, vertical = info["dpi"]
        dpi = float(horizontal), float(vertical)
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        array,
        photometric="rgb",
        extrasamples=["unassalpha"] if array.shape[2] == 4 else None,
        iccprofile=info.get("icc_profile"),
        resolution=dpi,
        resolutionunit="INCH" if dpi else None,
        metadata=None,
        software=str(exif.get(ExifTags.Base.Software, "")) or False,
        extratags=[(t, "s", 0, str(exif[t]), True) for t in _TEXT_TAGS if t in exif],
    )
    return file.getvalue()


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
