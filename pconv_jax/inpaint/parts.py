"""Parts of image files that Pillow drops: some are copied, and the others are named."""

from collections.abc import Iterator

# Chunks of a PNG file that say what its colors are.
_COLOR_CHUNKS = frozenset([b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI"])

# Those that Pillow reads, or that are no metadata.
_READ_CHUNKS = frozenset(
    [b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf", b"pHYs", b"hIST"]
    + [b"tEXt", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT", b"iDOT"]
)

# By the start of a JPEG segment: EXIF, XMP, ICC profiles, Photoshop data, and what
# describes the encoding. The extension of XMP is named elsewhere.
_READ_SEGMENTS = {
    "APP0": (b"JFIF\0",),
    "APP1": (b"Exif\0", b"http://ns.adobe.com/"),
    "APP2": (b"ICC_PROFILE\0",),
    "APP13": (b"Photoshop 3.0\0",),
    "APP14": (b"Adobe",),
}

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


def dropped_parts(
    data: bytes, kind: str, segments: list[tuple[str, bytes]]
) -> list[str]:
    """Name the metadata that Pillow drops from a file.

    Args:
      data: The file.
      kind: Pillow's name of its format.
      segments: The application segments of a JPEG file, else empty.
    """
    if kind in ("JPEG", "MPO"):
        lost = [
            f"{name} ({_text(segment[:12].partition(bytes(1))[0])})"
            for name, segment in segments
            if name.startswith("APP")
            and not segment.startswith(_READ_SEGMENTS.get(name, ()))
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
    return name.decode("ascii", "backslashreplace").strip() or "?"
