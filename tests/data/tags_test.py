import io
import struct

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pconv_jax.data import tags
from pconv_jax.data.tags import Tag

SHAPES = {1: "5B", 3: "3H", 4: "2I", 5: "4I", 9: "3i", 10: "2i", 11: "2f", 12: "2d"}


def every_type(order):
    """A tag of each type, with directories inside."""
    numbers = {
        60_000 + kind: Tag(kind, struct.pack(order + form, *range(1, 1 + int(form[0]))))
        for kind, form in SHAPES.items()
    }
    numbers[60_050] = Tag(2, b"caf\xe9 and no zero at the end")
    numbers[60_051] = Tag(7, b"ab")
    gps = {1: Tag(2, b"N\0"), 2: Tag(5, struct.pack(order + "6I", *range(6)))}
    exif = {36867: Tag(2, b"2020:01:02\0"), 40965: {1: Tag(2, b"R98\0")}}
    return tags.Tags(order, {**numbers, 34665: exif, 34853: gps}, set())


@pytest.mark.parametrize("order", "<>")
def test_tags_come_back_byte_for_byte(order):
    written = every_type(order)
    data = tags.pack(written)
    assert tags.read(data) == written
    # Pillow reads the same.
    exif = Image.Exif()
    exif.load(data)
    assert exif[60_003] == (1, 2, 3) and exif[60_012] == (1.0, 2.0)
    assert exif.get_ifd(34853)[1] == "N" and exif.get_ifd(34665)[36867] == "2020:01:02"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("byteorder", "<>")
def test_tags_are_added_to_a_file_of_either_byte_order(order, byteorder):
    file = io.BytesIO()
    array = np.arange(60, dtype=np.uint16).reshape(4, 5, 3)
    tifffile.imwrite(file, array, photometric="rgb", byteorder=byteorder, metadata=None)
    data = tags.add_to_tiff(file.getvalue(), every_type(order))
    read = tags.read(data)
    expected = every_type(byteorder).directory
    assert {code: read.directory[code] for code in expected} == expected
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(data)), array)
    # A decoder gets what it needs, and nothing else.
    bare = tags.keep_layout(data)
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(bare)), array)
    assert tags.read(bare).directory.keys() <= tags.LAYOUT


def test_pages_are_counted_without_reading_them():
    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=True) as writer:
        for _ in range(3):
            writer.write(np.zeros((2, 2), np.uint8), metadata=None)
    assert tags.count_pages(file.getvalue()) == 3
    # 40,000 pages, and pages in a ring.
    pages = [struct.pack("<HI", 0, 8 + 6 * (i + 1)) for i in range(40_000)]
    head = b"II*\0" + struct.pack("<I", 8)
    assert tags.count_pages(head + b"".join(pages)) == 1000
    assert tags.count_pages(head + struct.pack("<HI", 0, 8)) == 1


def test_overlapping_values_stay_small():
    # 5000 tags of the same 60 kB.
    entries = b"".join(
        struct.pack("<HHII", code, 7, 60_000, 8) for code in range(1, 5001)
    )
    data = b"II*\0" + struct.pack("<IH", 8, 5000) + entries + b"\0" * 4
    read = tags.read(data)
    assert sum(len(tag.data) for tag in read.directory.values()) <= len(data)
    assert len(read.unreadable) > 4990


def test_largest_tags_make_room():
    written = every_type("<")
    written.directory[60_100] = Tag(7, b"x" * 70_000)
    data, lost = tags.pack_within(written, 65_000)
    assert lost == {60_100} and tags.read(data) == every_type("<")


def test_thumbnails_of_photoshop():
    def resource(code, name, data):
        head = b"8BIM" + struct.pack(">HB", code, len(name)) + name
        head += b"\0" * (len(head) % 2)
        return head + struct.pack(">I", len(data)) + data + b"\0" * (len(data) % 2)

    caption, path = resource(1028, b"", b"abc"), resource(2000, b"path", b"1234")
    data = caption + resource(1036, b"", b"JPEG!") + path + resource(1033, b"x", b"")
    assert tags.without_thumbnails(data) == caption + path


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_tags_are_never_an_error(data):
    order = data.draw(st.sampled_from("<>"))
    whole = bytearray(tags.pack(every_type(order)).removeprefix(tags.EXIF_HEADER))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    read = tags.read(damaged)
    read.orientation(), read.dpi(), tags.names(read.unreadable)
    tags.without_thumbnails(damaged), tags.count_pages(damaged)
    kept, _ = tags.split_metadata(read)
    again = tags.read(tags.pack(kept))
    assert not again.unreadable and again.directory == kept.directory


def test_directories_that_hold_each_other():
    # Each of 60,000 tags is a directory of 60,000 tags.
    entries = struct.pack("<HHII", 34665, 4, 1, 8) * 60_000
    data = b"II*\0" + struct.pack("<IH", 8, 60_000) + entries
    read = tags.read(data)
    assert tags.pack(read) and 34665 in read.unreadable


def test_values_that_two_tags_share_are_kept():
    # As some programs write both resolutions.
    entries = [(282, 5, 1, 38), (283, 5, 1, 38)]
    data = b"II*\0" + struct.pack("<IH", 8, 2)
    data += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    read = tags.read(data + struct.pack("<II", 72, 1))
    assert read.dpi() == (72, 72) and not read.unreadable


def test_many_tags_make_room():
    directory = {code: Tag(7, bytes(50 + 2 * (code % 50))) for code in range(1, 20_000)}
    data, lost = tags.pack_within(tags.Tags("<", directory, set()), 65_000)
    assert 64_900 < len(data) <= 65_000
    smallest = max(len(directory[code].data) for code in directory.keys() - lost)
    assert all(len(directory[code].data) >= smallest for code in lost)


def test_a_number_without_values():
    tag = Tag(3, b"")
    empty = tags.Tags("<", dict.fromkeys((tags.RESOLUTION_UNIT, 274), tag), set())
    assert empty.dpi() is None and empty.orientation() == 1


@pytest.mark.parametrize("mark", [b"II*\0", b"II\0*"])
def test_exif_inside_a_file(mark):
    def exif(count, size):
        entries = (struct.pack("<HHII", 40_000 + i, 3, size, 8) for i in range(count))
        return mark + struct.pack("<IH", 8, count) + b"".join(entries) + bytes(1000)

    tags.check_exif_inside(b"0123456789" + exif(3, 150) + b"the rest")
    tags.check_exif_inside(exif(3, 2**31))  # Cannot be read.
    with pytest.raises(ValueError, match="its EXIF data are damaged"):
        tags.check_exif_inside(b"0123456789" + exif(3, 200) + b"the rest")
    tags.check_exif_inside(mark * 16)
    with pytest.raises(ValueError, match="its EXIF data are damaged"):
        tags.check_exif_inside(mark * 17)
