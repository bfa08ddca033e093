"""The tags of TIFF files and of EXIF data, copied byte for byte.

EXIF data are a TIFF file without an image. What a tag means matters to few programs,
and a library that converts it to a Python value and back may fail, or even crash. So
tags stay as they are in the file: a type and bytes.
"""

import re
import struct
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, TypeAlias

from PIL import ExifTags
from PIL.ExifTags import Base

from pconv_jax._files import FileContentError

EXIF_HEADER = b"Exif\0\0"

ORIENTATION = 274
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
XMP, IPTC, PHOTOSHOP, ICC_PROFILE = 700, 33723, 34377, 34675

# Tags about the layout of the pixels in a TIFF file, or the position of other parts.
LAYOUT = frozenset(
    [*range(254, 267), 273, *range(277, 282), 284, 288, 289, 292, 293, 317]
    + [*range(320, 333), 334, 335, *range(338, 348), *range(512, 533), 559]
    + [*range(32995, 32999)]
)

# Those that decoders need.
DECODED = frozenset(
    [*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320]
    + [*range(322, 326), 332, 334, 338, 339, 347, *range(512, 522), *range(529, 533)]
)

_IMAGE_SIDES = (Base.ImageWidth, Base.ImageLength)
_TILE_SIDES = (Base.TileWidth, Base.TileLength)

# Layers and smaller copies of the image show what was there before. The last two are
# Photoshop's ImageSourceData and DNG's ExtraCameraProfiles.
_OLD_IMAGES = frozenset([Base.SubIFDs, 37724, 50933])

# Directories that a directory may hold, by its depth: EXIF and GPS; Interoperability.
_DIRECTORIES = ((34665, 34853), (40965,), ())

# Bytes of a value, and of what is turned around in the other byte order, by type.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_UNITS = _SIZES | {5: 4, 10: 4}
_LONG, _RATIONAL, _BYTES = 4, 5, 7

# Types of whole numbers, for `struct`. The last is that of places in files of more than
# 4 GB; no metadata have it.
_WHOLE = {1: "B", 3: "H", 4: "I", 16: "Q"}
_BIG_SIZES = _SIZES | {16: 8}

_MAX_PAGES = 1000

# What EXIF data begin with, for Pillow; and how often that is found in good files.
_MARKS = re.compile(rb"II\*\0|MM\0\*|II\0\*|MM\*\0|II\+\0|MM\0\+")
_MAX_MARKS = 16


class Tag(NamedTuple):
    """A tag as it is in a file.

    Attributes:
      kind: The number of its type.
      data: Its values.
    """

    kind: int
    data: bytes


class _Entry(NamedTuple):
    """A tag whose values stay where they are in a file."""

    kind: int
    length: int
    field: bytes


Directory: TypeAlias = "dict[int, Tag | Directory]"


class Tags(NamedTuple):
    """The tags of a file's first image.

    Attributes:
      order: Byte order of the values, ``'<'`` or ``'>'``.
      directory: Tags by number. EXIF and GPS tags are in directories of their own.
      unreadable: Numbers of tags that are damaged, or of an unknown type.
    """

    order: str
    directory: Directory
    unreadable: set[int]

    def get(self, code: int) -> Tag | None:
        """Get a tag of the first directory, or None."""
        tag = self.directory.get(code)
        return tag if isinstance(tag, Tag) else None

    def numbers(self, code: int, *, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Get the values of a tag of whole numbers, or a default."""
        tag = self.get(code)
        if tag is None or tag.kind not in _WHOLE:
            return default
        count = len(tag.data) // _BIG_SIZES[tag.kind]
        form = f"{self.order}{count}{_WHOLE[tag.kind]}"
        return struct.unpack(form, tag.data) or default

    def number(self, code: int, *, default: int = 1) -> int:
        """Get the first value of a tag of whole numbers, or a default."""
        return self.numbers(code, default=(default,))[0]

    def orientation(self) -> int:
        """Get the orientation, 1 to 8; 1 if there is none."""
        value = self.number(ORIENTATION)
        return value if value in range(1, 9) else 1

    def dpi(self) -> tuple[float, float] | None:
        """Get the horizontal and the vertical resolution, or None."""
        unit = {2: 1.0, 3: 2.54}.get(self.number(RESOLUTION_UNIT, default=2))
        values = []
        for code in (X_RESOLUTION, Y_RESOLUTION):
            tag = self.get(code)
            if not unit or tag is None or tag.kind != _RATIONAL or len(tag.data) != 8:
                return None
            above, below = struct.unpack(f"{self.order}2I", tag.data)
            values.append(unit * above / below if below else 0.0)
        return values[0], values[1]


def is_tiff(data: bytes) -> bool:
    """Return whether data begin as a TIFF file does."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read(data: bytes) -> Tags:
    """Read the tags of a TIFF file, or of EXIF data.

    Nothing is an error: what cannot be read is left out, and named in the result.
    """
    data = data.removeprefix(EXIF_HEADER)
    order = _order(data)
    unreadable: set[int] = set()
    directory: Directory = {}
    if is_tiff(data):
        # Tags and directories may overlap, so that a small file becomes large.
        budget = [len(data)]
        at = _first_directory(data)
        directory = _read_directory(data, order, at, 0, unreadable, budget)
    elif data:
        unreadable.add(0x8769)
    return Tags(order, directory, unreadable)


def _read_directory(
    data: bytes,
    order: str,
    at: int,
    depth: int,
    unreadable: set[int],
    budget: list[int],
) -> Directory:
    directory: Directory = {}
    big = _is_big(data) and not depth
    for code, kind, count, field in _entries(data, at):
        budget[0] -= 8 + len(field)
        sizes = _BIG_SIZES if big and code in LAYOUT else _SIZES
        size = count * sizes.get(kind, 0)
        value = field[:size]
        if size > len(field):
            offset = _number(field, order)
            value = data[offset : offset + size] if size <= budget[0] else b""
            budget[0] -= len(value)
        if budget[0] < 0:
            unreadable.add(code)
        elif code in _DIRECTORIES[depth]:
            inside = _number(field, order)
            directory[code] = _read_directory(
                data, order, inside, depth + 1, unreadable, budget
            )
        elif kind in sizes and len(value) == size:
            directory[code] = Tag(kind, value)
        else:
            unreadable.add(code)
    return directory


def _entries(
    data: bytes | memoryview, at: int
) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the number, type, count and field of the tags of a directory."""
    order = _order(data)
    big = _is_big(data)
    form = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    start = at + (8 if big else 2)
    count = _number(data[at:start], order)
    whole = (len(data) - start) // form.size  # The directory may be cut short.
    for i in range(max(min(count, whole, 65_535), 0)):
        yield form.unpack_from(data, start + i * form.size)


def without(tags: Tags, dropped: Collection[int]) -> Tags:
    """Leave out tags of the first directory."""
    kept = {code: tag for code, tag in tags.directory.items() if code not in dropped}
    return tags._replace(directory=kept)


def split_metadata(tags: Tags) -> tuple[Tags, set[int]]:
    """Split off the tags that describe an image and not its layout.

    The orientation is left out, as images are turned upright; and so are the ICC
    profile and XMP, which have places of their own in other files.

    Returns:
      The tags, and the numbers of those that are left out though they describe the
      image: they are damaged, or show the image as it was.
    """
    places = {ORIENTATION, XMP, ICC_PROFILE}
    kept = without(tags, LAYOUT | _OLD_IMAGES | places)
    lost = (tags.unreadable - LAYOUT - places) | (_OLD_IMAGES & {*tags.directory})
    return kept, lost - {Base.SubIFDs}


def pack(tags: Tags) -> bytes:
    """Write EXIF data; empty if there is no tag."""
    if not tags.directory:
        return b""
    mark = b"MM\0*" if tags.order == ">" else b"II*\0"
    head = mark + struct.pack(f"{tags.order}I", 8)
    return EXIF_HEADER + head + _pack_directory(tags.directory, tags.order, 8)


def pack_within(tags: Tags, limit: int) -> tuple[bytes, set[int]]:
    """Write EXIF data of a limited size, without the largest tags if need be.

    Returns:
      The data, and the numbers of the tags that are left out.
    """
    costs = {code: _size(tag) for code, tag in tags.directory.items()}
    excess, lost = len(pack(tags)) - limit, set()
    for code in sorted(costs, key=costs.__getitem__, reverse=True):
        if excess <= 0:
            break
        excess -= costs[code]
        lost.add(code)
    return pack(without(tags, lost)), lost


def add_to_tiff(data: bytes, tags: Tags) -> bytes:
    """Add tags to those of a TIFF file's first image, which becomes the only one."""
    order = _order(data)
    directory = _in_order(tags.directory, order, swap=order != tags.order)
    return _replace_directory(data, {**_placed(data), **directory})


def keep_layout(data: bytes, *, orientation: bool = False) -> bytes:
    """Reduce a TIFF file to its first image, without metadata, for decoders.

    Args:
      data: The file.
      orientation: Whether to keep the orientation. The default is False.
    """
    codes = DECODED | ({ORIENTATION} if orientation else set())
    kept = {c: e for c, e in _placed(data).items() if c in codes}
    return _replace_directory(data, kept)


def sizes(tags: Tags) -> list[tuple[int, int]]:
    """Get the width and height of a TIFF file's image, and of its tiles, if any.

    Raises:
      FileContentError: If a size is missing, or a tag that decoders need cannot be
        read.
    """
    sides: list[tuple[int, int]] = [_IMAGE_SIDES]
    codes = {*tags.directory} | tags.unreadable
    if set(_TILE_SIDES) & codes:
        sides.append(_TILE_SIDES)
    found = []
    for pair in sides:
        width, height = (tags.number(code, default=0) for code in pair)
        if not width * height:
            raise FileContentError("it is damaged: its width or height is missing")
        found.append((width, height))
    if damaged := tags.unreadable & DECODED:
        raise FileContentError(f"it is damaged: {names(damaged)} cannot be read")
    return found


def count_pages(data: bytes) -> int:
    """Count the images of a TIFF file, up to 1000."""
    order = _order(data)
    big = _is_big(data)
    head, entry, tail = (8, 20, 8) if big else (2, 12, 4)
    at, seen = _first_directory(data), set()
    while 0 < at < len(data) and at not in seen and len(seen) < _MAX_PAGES:
        seen.add(at)
        end = at + head + entry * _number(data[at : at + head], order)
        at = _number(data[end : end + tail], order)
    return len(seen)


def check_exif_inside(data: bytes) -> None:
    """Check EXIF data anywhere in a file, for programs that read all of its tags.

    Raises:
      FileContentError: If their values are larger than the file in all, so that they
        overlap.
    """
    view = memoryview(data)
    for number, mark in enumerate(_MARKS.finditer(data)):
        inside, total = view[mark.start() :], 0
        for _, kind, count, _ in _entries(inside, _first_directory(inside)):
            size = count * _BIG_SIZES.get(kind, 8)
            total += size if size <= len(inside) else 0  # Else, it cannot be read.
        if total > len(data) or number == _MAX_MARKS:
            raise FileContentError("its EXIF data are damaged")


def names(codes: Collection[int]) -> str:
    """Format the names of tags."""
    return ", ".join(str(ExifTags.TAGS.get(code, code)) for code in sorted(codes))


def _order(data: bytes | memoryview) -> str:
    """Get the byte order of a file, as `struct` names it."""
    return ">" if data[:2] == b"MM" else "<"


def _is_big(data: bytes | memoryview) -> bool:
    return data[:4] in (b"II+\0", b"MM\0+")


def _first_directory(data: bytes | memoryview) -> int:
    order = _order(data)
    return _number(data[8:16] if _is_big(data) else data[4:8], order)


def _number(field: bytes | memoryview, order: str) -> int:
    return int.from_bytes(field, "big" if order == ">" else "little")


def _placed(data: bytes) -> dict[int, _Entry]:
    entries = _entries(data, _first_directory(data))
    return {code: _Entry(kind, n, field) for code, kind, n, field in entries}


def _replace_directory(data: bytes, directory: dict[int, Any]) -> bytes:
    """Write another first directory at the end of a TIFF file."""
    order = _order(data)
    at = len(data) + len(data) % 2
    padding = b"\0" * (at - len(data))
    if not _is_big(data):
        head = data[:4] + struct.pack(f"{order}I", at)
        tail = _pack_directory(directory, order, at)
        return b"".join([head, data[8:], padding, tail])
    head = data[:8] + struct.pack(f"{order}Q", at)
    tail = [struct.pack(f"{order}Q", len(directory))]
    for code, entry in sorted(directory.items()):
        tail.append(struct.pack(f"{order}HHQ8s", code, *entry))
    return b"".join([head, data[16:], padding, *tail, bytes(8)])


def _in_order(directory: Directory, order: str, *, swap: bool) -> Directory:
    """Turn the values of all tags around, if the byte order changes."""
    return {
        code: _in_order(tag, order, swap=swap)
        if isinstance(tag, dict)
        else tag._replace(data=_swap(tag.data, _UNITS[tag.kind]) if swap else tag.data)
        for code, tag in directory.items()
    }


def _swap(data: bytes, unit: int) -> bytes:
    return b"".join(data[i : i + unit][::-1] for i in range(0, len(data), unit))


def _pack_directory(directory: dict[int, Any], order: str, at: int) -> bytes:
    """Write a directory that begins at an offset, and the values of its tags."""
    head = [struct.pack(f"{order}H", len(directory))]
    values, end = [], at + 2 + 12 * len(directory) + 4
    for code, tag in sorted(directory.items()):
        if isinstance(tag, _Entry):
            kind, count, field = tag
        else:
            if isinstance(tag, dict):
                kind, count, value = _LONG, 1, _pack_directory(tag, order, end)
                field = struct.pack(f"{order}I", end)
            else:
                kind, value = tag
                count, field = len(value) // _SIZES[kind], value
            if len(field) > 4 or isinstance(tag, dict):
                field = struct.pack(f"{order}I", end)
                value += b"\0" * (len(value) % 2)
                values.append(value)
                end += len(value)
        head.append(
            struct.pack(f"{order}HHI", code, kind, count) + field.ljust(4, b"\0")
        )
    return b"".join([*head, b"\0\0\0\0", *values])


def _size(tag: Any) -> int:
    """Count the bytes of a tag, or of a directory, where it is written."""
    if isinstance(tag, dict):
        return 12 + 6 + sum(map(_size, tag.values()))
    values = len(tag.data) if len(tag.data) > 4 else 0
    return 12 + values + values % 2


def bytes_tag(data: bytes) -> Tag:
    """Make a tag of plain bytes, such as an ICC profile."""
    return Tag(_BYTES, data)


def dpi_tags(dpi: tuple[float, float], order: str) -> Directory:
    """Make the tags of a resolution."""
    x, y = (struct.pack(f"{order}2I", round(float(n) * 1000), 1000) for n in dpi)
    return {
        X_RESOLUTION: Tag(_RATIONAL, x),
        Y_RESOLUTION: Tag(_RATIONAL, y),
        RESOLUTION_UNIT: Tag(3, struct.pack(f"{order}H", 2)),
    }


def without_thumbnails(resources: bytes) -> bytes:
    """Leave the thumbnails out of Photoshop's image resources.

    A resource is ``8BIM``, a number, a name and data, each padded to even length.
    """
    kept, at = [], 0
    while resources[at : at + 4] == b"8BIM" and at + 7 <= len(resources):
        size_at = at + 6 + 1 + resources[at + 6]
        size_at += size_at % 2 != at % 2
        end = size_at + 4 + _number(resources[size_at : size_at + 4], ">")
        end += end % 2 != at % 2
        if _number(resources[at + 4 : at + 6], ">") not in (1033, 1036):
            kept.append(resources[at:end])
        at = end
    return b"".join(kept)
