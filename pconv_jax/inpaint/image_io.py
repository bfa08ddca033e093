"""People's pictures and masks: files to arrays, and back with all that came along.

A picture is a `PIL.Image.Image`; or an array ``[H, W]`` or ``[H, W, C]`` where Pillow
has no mode for it, which is 16-bit colour, and data from ``.npy`` files.

In a picture of a mask **white means: fill this**. A *hole* is a bool array ``[H, W]``,
True where it is to be filled: the reverse of the masks of the network.
"""

import io
import os
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from pconv_jax import _files
from pconv_jax._errors import RunError

MAX_PIXELS = 100_000_000
"""How many pixels a picture may have, unless one says otherwise."""

SUFFIXES: tuple[str, ...] = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".npy"),
)
"""Of the files that can be read and written."""

# Pillow's others are not asked: some of them start programs.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")

# Modes that a kind of file can hold, less those that Pillow itself knows to convert.
_JPEG_MODES = ("L", "RGB", "CMYK")
_NO_CMYK = (".png", ".webp", ".bmp", ".gif")

# Of TIFF files, whose pixels would not come back.
_LOSSY = ("jpeg", "tiff_jpeg", "webp")

# Pillow's limit of a picture's size is a global variable.
_PILLOW_LIMIT = threading.Lock()

# Tags that tell how pixels lie in a TIFF file, or where its other parts are.
_LAYOUT_TAGS = frozenset(
    [*range(254, 267), 273, *range(277, 282), 284, 317, *range(320, 348), 700]
    + [*range(512, 533), 33723, 34377, 34675]
)
_TEXT_TAGS = (270, 271, 272, 306, 315, 33432)
_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


class Picture(NamedTuple):
    """What a file holds.

    Attributes:
      image: upright, as the EXIF orientation says; see the module for its types.
      info: what comes along, as Pillow's ``save`` takes it: ``icc_profile``, ``exif``
        (less the orientation and the thumbnail, which would show the old picture),
        ``dpi``; of a JPEG file also the ``qtables`` and ``subsampling``.
    """

    image: Image.Image | np.ndarray
    info: dict[str, Any]


def read(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Reads a picture, or data.

    Args:
      path: of a PNG, JPEG, TIFF, WebP, BMP, GIF or NumPy file; of several frames or
        pages, the first is taken.
      max_pixels: of larger pictures not a pixel is decoded.

    Raises:
      ValueError: naming the file, if it is missing, empty, damaged, larger than that
        or no picture.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix.lower() == ".npy":
            return Picture(_read_npy(path, max_pixels), {})
        return _read_picture(path.read_bytes(), max_pixels)
    except Exception as error:  # Damaged files raise errors of every kind.
        raise ValueError(f"cannot read {path}: {_reason(path, error)}") from error


def write(path: str | os.PathLike[str], picture: Picture) -> None:
    """Writes a picture as its file's suffix says, complete or not at all.

    PNG, TIFF, WebP and BMP give back the very pixels; of 16 bits a channel PNG and
    TIFF alone, of CMYK TIFF alone. A JPEG file is compressed by the tables of the one
    that the picture came from, by which what was not touched changes least, or else
    with quality 95 and without subsampling.

    Args:
      path: of the file; see `SUFFIXES`.
      picture: what to write.

    Raises:
      ValueError: if it has transparency and the file cannot; if the file is of another
        kind, or cannot be written.
    """
    path = Path(path).expanduser()
    check_suffix(path)
    try:
        _files.write_bytes(path, _encode(path.suffix.lower(), *picture))
    except RunError as error:
        raise ValueError(str(error)) from error


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Checks that a file's suffix is one of `SUFFIXES`.

    Raises:
      ValueError: if it is not.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: pictures are written as {', '.join(SUFFIXES)} files alone."
        )


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the grey or red, green and blue of a Pillow image, and its alpha.

    Args:
      image: of any mode but Lab and premultiplied ones.

    Returns:
      ``[H, W]`` or ``[H, W, C]`` with C = 2, 3 or 4: uint8, uint16 or float32.

    Raises:
      ValueError: if it is of another mode.
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
    raise ValueError(
        f"image is of Pillow's mode {mode!r}, which cannot be repaired; convert it, "
        "e.g. image.convert('RGB')."
    )


def paste(image: Image.Image, array: np.ndarray, hole: np.ndarray) -> Image.Image:
    """Returns a copy of a Pillow image with other pixels in its hole.

    Args:
      image: it is the copy's mode, palette and information, and its other pixels.
      array: as `to_array` gives it, with the same pixels where there is no hole.
      hole: bool ``[H, W]``.
    """
    mode = image.mode
    if mode == "I":
        array = array.astype(np.int32)
    new = Image.fromarray(np.ascontiguousarray(array))
    if mode == "1":
        new = new.convert("1", dither=Image.Dither.NONE)
    elif mode == "P":
        new = _to_palette(new, image)
    elif mode.startswith("I;16"):  # Into which Pillow does not paste.
        new.info = dict(image.info)
        return new
    else:
        new = new.convert(mode)
    result = image.copy()
    result.paste(new, mask=Image.fromarray(hole.astype(np.uint8) * 255))
    return result


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is empty." if not path.stat().st_size else "it is no picture."
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
        raise ValueError(f"it must be of shape [H, W] or [H, W, C], not {list(shape)}")
    _check_size(shape[1], shape[0], max_pixels)
    return np.load(path, allow_pickle=False)


def _read_picture(data: bytes, max_pixels: int) -> Picture:
    image = _open(data)
    _check_size(*image.size, max_pixels)
    frames = getattr(image, "n_frames", 1)
    image.load()
    if frames > 1 and image.format != "MPO":  # Which is a JPEG with previews.
        warnings.warn(f"it has {frames} frames; only the first is taken.", stacklevel=3)
    exif = image.getexif()
    info = {
        "icc_profile": image.info.get("icc_profile"),
        "dpi": image.info.get("dpi"),
        "exif": _keep_exif(exif),
    }
    info = {name: value for name, value in info.items() if value}
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    if hasattr(image, "quantization"):
        tables = [np.reshape(t, (8, 8)) for _, t in sorted(image.quantization.items())]
        if orientation > 4:  # Rows become columns.
            tables = [table.T for table in tables]
        info["qtables"] = [table.ravel().tolist() for table in tables]
        info["subsampling"] = max(JpegImagePlugin.get_sampling(image), 0)
    if _has_16_bit_colour(image, data):
        return Picture(_turn(_decode_16_bits(image, data), orientation), info)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB") and "transparency" in image.info:  # A colour.
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    return Picture(image, info)


def _open(data: bytes) -> Image.Image:
    """Opens a picture of any size, without decoding it: there is a limit here, too."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _has_16_bit_colour(image: Image.Image, data: bytes) -> bool:
    """Whether Pillow has dropped half of each channel's bits."""
    if image.format == "PNG":  # Its header has the depth, and the kind of colour.
        return data[24] == 16 and data[25] != 0
    if image.format == "TIFF":
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,))
        return len(bits) > 1 and max(bits) == 16
    return False


def _decode_16_bits(image: Image.Image, data: bytes) -> np.ndarray:
    """Returns what Pillow would halve, uint16 ``[H, W, C]``."""
    if image.format == "TIFF":
        if image.tag_v2.get(ExifTags.Base.ExtraSamples) == (1,):
            raise ValueError("its 16-bit colours are multiplied by their alpha")
        if image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == 2:
            # OpenCV would take a plane for pixels.
            return np.moveaxis(tifffile.imread(io.BytesIO(data), key=0), 0, -1)
    array = cv2.imdecode(
        np.frombuffer(data, np.uint8),
        cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION,
    )
    if array is None:
        raise ValueError("its kind of 16-bit colour is not known")
    return _swap_red_and_blue(array)


def _swap_red_and_blue(array: np.ndarray) -> np.ndarray:
    order = [2, 1, 0, 3][: array.shape[2]]
    return np.ascontiguousarray(array[..., order])


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Does what an EXIF orientation asks for."""
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


def _encode(suffix: str, image: Image.Image | np.ndarray, info: dict) -> bytes:
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, _array_of(image))
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
            f"16 bits a channel are rounded to 8, which is what {suffix} files hold.",
            stacklevel=4,
        )
        array = np.rint(array / 257).astype(np.uint8)
    if array.dtype == np.float32 and array.ndim == 2 and suffix in (".tif", ".tiff"):
        return Image.fromarray(array)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    has_mode = array.shape[2:] in ((), (2,), (3,), (4,))
    if array.dtype not in (np.uint8, np.uint16) or not has_mode or not array.size:
        raise ValueError(
            f"{array.dtype} data of shape {list(array.shape)} is no picture: name a "
            ".npy file."
        )
    return Image.fromarray(array)


def _convert(
    image: Image.Image, suffix: str, info: dict
) -> tuple[Image.Image, dict[str, Any]]:
    """Returns the nearest to an image that a kind of file can hold."""
    if image.mode.startswith("I") and suffix not in (".png", ".tif", ".tiff"):
        image = _to_pillow(to_array(image), suffix)
    if image.mode == "F" and suffix not in (".tif", ".tiff"):
        raise ValueError("float32 pictures are written as .tif or .npy files alone.")
    if image.mode in ("YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    if image.mode == "CMYK" and suffix in _NO_CMYK:
        info.pop("icc_profile", None)  # It is of CMYK.
        image = image.convert("RGB")
    if suffix in (".jpg", ".jpeg", ".bmp") and image.mode not in _JPEG_MODES:
        alpha = _alpha(to_array(image))
        if alpha is not None and alpha.min(initial=255) < 255:
            raise ValueError(
                f"{suffix} files cannot hold the picture's transparency: name a .png, "
                ".tif or .webp file."
            )
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    return image, info


def _encode_png(array: np.ndarray, info: dict) -> bytes:
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


def _encode_tiff(array: np.ndarray, info: dict) -> bytes:
    exif = Image.Exif()
    exif.load(info.get("exif", b""))
    dpi = tuple(map(float, info.get("dpi", ())))
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        array,
        photometric="rgb",
        extrasamples=["unassalpha"] if array.shape[2] == 4 else None,
        iccprofile=info.get("icc_profile"),
        resolution=dpi or None,
        resolutionunit="INCH" if dpi else None,
        metadata=None,
        software=str(exif.get(ExifTags.Base.Software, "")) or False,
        extratags=[(t, "s", 0, str(exif[t]), True) for t in _TEXT_TAGS if t in exif],
    )
    return file.getvalue()


def _to_palette(new: Image.Image, image: Image.Image) -> Image.Image:
    """Returns the indices of the nearest colours in the palette of another image.

    What is filled is seen: colours of the palette that are not opaque are left out.
    """
    palette = np.reshape(image.getpalette("RGB"), (-1, 3)).astype(np.uint8)
    alpha = np.full(len(palette), 255)
    clear = image.info.get("transparency", b"")
    if isinstance(clear, int):
        alpha[clear : clear + 1] = 0  # Which may be none of its colours.
    else:  # A value for each of the first colours.
        alpha[: len(clear)] = list(clear)[: len(alpha)]
    # All 256 places are taken: the last ones by the first colours once more.
    indices = np.resize(np.flatnonzero(alpha == alpha.max()), 256)
    opaque = Image.new("P", (1, 1))
    opaque.putpalette(palette[indices].tobytes())
    nearest = np.asarray(new.convert("RGB").quantize(palette=opaque))
    return Image.fromarray(indices[nearest].astype(np.uint8))


def _array_of(image: Image.Image | np.ndarray) -> np.ndarray:
    return to_array(image) if isinstance(image, Image.Image) else np.asarray(image)


def _alpha(array: np.ndarray) -> np.ndarray | None:
    return array[..., -1] if array.shape[2:] in ((2,), (4,)) else None


def _as_fraction(array: np.ndarray) -> np.ndarray:
    """Returns float32, from 0 to 1 if it is of integers of 8 or 16 bits."""
    top = {np.dtype(np.uint16): 65535}.get(array.dtype, 255)
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        top = 1
    return np.nan_to_num(array.astype(np.float32)) / top
