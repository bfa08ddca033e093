"""The page of fifty repairs says what its images show."""

import re
import sys

import pytest
from PIL import Image

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(ROOT / "docs"))
    import drawn_masks
    import make_images

    yield drawn_masks, make_images
    sys.path.remove(str(ROOT / "docs"))
    for name in ("drawn_masks", "make_images"):
        del sys.modules[name]


def test_the_table_counts_the_photos_and_the_failures(modules):
    drawn_masks, make_images = modules
    kinds = drawn_masks.draw().values()
    expected = [(len(k), len(set(k) & set(make_images.FAILED))) for k in kinds]
    page = (ROOT / "docs/fifty.md").read_text()
    table = re.findall(r"^\| .+ \| \**(\d+)\** \| \**(\d+)\** \|$", page, re.M)
    *rows, last = [tuple(map(int, row)) for row in table]
    assert rows == expected
    assert last == tuple(map(sum, zip(*expected)))


def test_each_photo_has_one_mask_of_its_size_and_a_source(modules):
    drawn_masks, make_images = modules
    masks = [item for kind in drawn_masks.draw().values() for item in kind.items()]
    names = [name for name, _ in masks]
    photos = {path.stem for path in make_images.PHOTOS.glob("*.webp")}
    assert sorted(names) == sorted(photos)
    for name, mask in masks:
        with Image.open(make_images.PHOTOS / f"{name}.webp") as photo:
            assert photo.size == mask.size
    sources = (make_images.PHOTOS / "README.md").read_text()
    assert set(re.findall(r"^\| (\w+)\.webp \|", sources, re.M)) == photos
    assert set(make_images.FAILED) | set(make_images.FIRST) <= photos
