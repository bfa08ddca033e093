"""Parts of image files that Pillow drops: some are copied, and the others are named."""

from collections.abc import Iterator

from pconv_jax._files import FileContentError

# Chunks of a PNG file that say what its colors are.
_COLOR_CHUNKS = frozenset([b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI"])

# Those that Pillow reads, or that are not metadata.
_READ_CHUNKS = frozenset(
    [b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf", b"pHYs", b"hIST"]
    + [b"tEXt", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT", b"iDOT"]
)

# By the marker of a JPEG segment: EXIF, XMP, ICC profiles, Photoshop data, and what
# describes the encoding. The extension of XMP is named elsewhere.
_APP0 = 0xE0
_READ_SEGMENTS = {
    _APP0: (b"JFIF\0",),
    _APP0 + 1: (b"Exif\0", b"http://ns.adobe.com/"),
    _APP0 + 2: (b"ICC_PROFILE\0",),
    _APP0 + 13: (b"Photoshop 3.0\0",),
    _APP0 + 14: (b"Adobe",),
}

# Markers of JPEG files that begin no segment, at least for Pillow.
_WITHOUT_CONTENT = frozenset([0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)])

_MAX_SEGMENTS = 10_000

# Segments with tags: EXIF data, and the index of a file of several images.
_EXIF, _INDEX = b"Exif\0\0", b"MPF\0"

_READ_BOXES = frozenset([b"jP  ", b"ftyp", b"jp2h", b"jp2c", b"rreq"])
_READ_RIFF = frozenset(
    [b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP "]
)


def png_chunks(data: bytes) -> tuple[dict[bytes, bytes], list[str]]:
    """Find the chunks of a PNG file that Pillow drops.

    Returns:
      The chunks to copy, by their kind: those of color, and those whose name says that
      they stay right if the pixels change. And the names of the others.
    """
    kept, lost = {}, []
    for kind, chunk in _split_png(data):
        safe = len(kind) == 4 and bool(kind[3] & 0x20)
        if kind in _COLOR_CHUNKS or (safe and kind not in _READ_CHUNKS):
            kept[kind] = chunk
        elif kind not in _READ_CHUNKS:
            lost.append(f"chunk {_text(kind)}")
    return kept, lost


def split_exif(data: bytes) -> tuple[bytes, bytes]:
    """Split the EXIF data off a JPEG file.

    Returns:
      The file without EXIF data, and without the index of other images in it; and the
      EXIF data, which may be in several segments.

    Raises:
      FileContentError: If it has too many segments.
    """
    kept, exif, end = [], [_EXIF], 0
    for marker, start, stop in _split_jpeg(data):
        content = data[start + 4 : start + 10]
        is_exif = marker == _APP0 + 1 and content == _EXIF
        if is_exif or (marker == _APP0 + 2 and content.startswith(_INDEX)):
            kept.append(data[end:start])
            end = stop
        if is_exif:
            exif.append(data[start + 10 : stop])
    return b"".join([*kept, data[end:]]), b"".join(exif) if len(exif) > 1 else b""


def gif_comments(data: bytes) -> int:
    """Count the bytes of the comments before the first image of a GIF file."""
    if not data.startswith((b"GIF87a", b"GIF89a")):
        return 0
    colors = 3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0
    at, total = 13 + colors, 0
    while at + 1 < len(data) and data[at] != ord(","):
        if data[at] != ord("!"):
            at += 1  # Pillow skips what is between.
            continue
        start, is_comment = at, data[at + 1] == 0xFE
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        total += (at - start) * is_comment
    return total


def dropped_parts(data: bytes, kind: str) -> list[str]:
    """Name the metadata that Pillow drops from a file.

    Args:
      data: The file.
      kind: Pillow's name of its format.
    """
    if kind == "JPEG":
        lost = [
            f"APP{marker - _APP0} ({_text(data[start + 4 : min(stop, start + 16)])})"
            for marker, start, stop in _split_jpeg(data)
            if _APP0 <= marker < _APP0 + 16
            and not data.startswith(_READ_SEGMENTS.get(marker, ()), start + 4, stop)
        ]
        whole = data.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
        return lost if whole else [*lost, "data after the image"]
    if kind == "JPEG2000" and data[4:8] == b"jP  ":
        boxes = [name for name in _split_boxes(data) if name not in _READ_BOXES]
        profile = ["ICC profile"] * (b"colr\2" in data[: data.find(b"jp2c")])
        return profile + [f"box {_text(name)}" for name in boxes]
    if kind == "WEBP":
        parts = [name for name in _split_riff(data) if name not in _READ_RIFF]
        return [f"chunk {_text(name)}" for name in parts]
    if kind == "GIF":
        known = ((b"XMP DataXMP", "XMP"), (b"ICCRGBG1012", "ICC profile"))
        return [name for mark, name in known if mark in data]
    if kind == "BMP":  # The fifth version of its header may have a profile.
        return ["ICC profile"] * (data[14] == 124 and data[70:74] in (b"DEBM", b"KNIL"))
    return []


def _split_jpeg(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, start and end of a JPEG file's segments before its pixels.

    They are those that Pillow finds, whatever is between them.

    Raises:
      FileContentError: If there are more than a camera or a program writes.
    """
    at, count = 2, 0
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:
            at += 1
        elif marker in _WITHOUT_CONTENT:
            at += 2
        elif marker == 0xDA:  # The pixels.
            return
        else:
            stop = at + 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
            yield marker, at, stop
            at, count = stop, count + 1
            if count > _MAX_SEGMENTS:
                raise FileContentError(f"it has more than {_MAX_SEGMENTS} segments")


def _split_png(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def _split_boxes(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        yield name
        at += max(size, 8) if size else len(data)


def _split_riff(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        yield data[at : at + 4]
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2


def _text(name: bytes) -> str:
    name = name.partition(b"\0")[0]
    return name.decode("ascii", "backslashreplace").strip() or "?"
