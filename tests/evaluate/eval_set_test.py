import pathlib

import cv2
import numpy as np
import pytest

from pconv_jax import masks
from pconv_jax._errors import UserError
from pconv_jax.data import sources
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.evaluate import eval_set
from pconv_jax.evaluate.eval_set import (
    BIN_CLASSES,
    BINS,
    SHAPE_CLASSES,
    EvalSet,
    draw_masks,
)
from tests.helpers.evaluation import SIZE, make_eval_set, write_mask_folder

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.mark.parametrize("border", [False, True])
def test_drawn_masks_belong_to_their_class_and_depend_only_on_the_seed(border):
    index = np.arange(4)
    mask = draw_masks(index, BINS[2], border, SIZE)
    assert (np.asarray(masks.hole_bin(masks.hole_ratio(mask))) == 2).all()
    assert (np.asarray(masks.touches_border(mask)) == border).all()
    bins = np.array([5, 2, 0, 2])
    mixed = draw_masks(index, [BINS[b] for b in bins], border, SIZE)
    np.testing.assert_array_equal(mixed[1], mask[1])
    assert masks.hole_bin(masks.hole_ratio(mixed)).tolist() == bins.tolist()
    other = draw_masks(index, BINS[2], border, SIZE, seed=1)
    assert not np.array_equal(other, mask)
    more = draw_masks(np.arange(6), BINS[2], border, SIZE)
    np.testing.assert_array_equal(more[:4], mask)


@pytest.mark.parametrize("hole", ["thin", "wide"])
def test_thin_and_wide_masks_are_those_of_random_mask(hole):
    index = np.arange(4)
    mask = draw_masks(index, hole, None, 64)
    ratio = np.asarray(masks.hole_ratio(mask))
    low, high = masks.HOLE_RATIOS[hole]
    assert (low - 1 / 64**2 < ratio).all() and (ratio <= high).all()
    # The widest square that fits into a hole: thin lines have none of 8 pixels.
    depth = [cv2.distanceTransform(1 - m, cv2.DIST_C, 3).max() for m in mask]
    assert (np.array(depth) < 8).all() if hole == "thin" else min(depth) > 3
    other = draw_masks(index, hole, None, 64, seed=1)
    assert not np.array_equal(other, mask)
    more = draw_masks(np.arange(6), hole, None, 64)
    np.testing.assert_array_equal(more[:4], mask)


def test_masks_of_a_folder_are_sorted_into_their_classes(tmp_path):
    written = write_mask_folder(tmp_path / "m", BIN_CLASSES)
    pairs = make_eval_set(mask_folder=MaskFolder(tmp_path / "m"), image_size=128)
    assert pairs.classes == BIN_CLASSES and not pairs.left_out
    assert pairs.describe()["masks"]["hole_color"] == "white"
    for hole, border in BIN_CLASSES:
        drawn = pairs.masks(np.arange(3), hole, border)
        for i in range(3):  # Cyclically: the third is the first again.
            np.testing.assert_array_equal(drawn[i], written[hole, border, i % 2])
    small = make_eval_set(mask_folder=MaskFolder(tmp_path / "m"))
    assert small.masks(np.arange(1), BINS[3], True).shape == (1, SIZE, SIZE, 1)
    with pytest.raises(UserError, match="none of the 2 masks .* holes really black"):
        write_mask_folder(tmp_path / "other", [(BINS[0], False)])
        folder = MaskFolder(tmp_path / "other", hole_color="black")
        make_eval_set(mask_folder=folder)


def test_masks_of_any_shape_become_squares(tmp_path):
    (tmp_path / "m").mkdir()
    tall = np.zeros((90, 40), np.uint8)
    tall[40:50, 15:25] = 255  # Of the central square of 40: 100 of 1600 pixels.
    cv2.imwrite(str(tmp_path / "m" / "a.png"), tall)
    pairs = make_eval_set(mask_folder=MaskFolder(tmp_path / "m"))
    assert pairs.classes == ((BINS[0], False),)
    assert pairs.masks(np.arange(1), BINS[0], False).shape == (1, SIZE, SIZE, 1)


def write_photos(folder, count, damaged):
    folder.mkdir()
    for i in range(count):
        path = folder / f"{i:02}.png"
        cv2.imwrite(str(path), np.full((16, 16, 3), 5 * i, np.uint8))
    (folder / f"{damaged:02}.png").write_bytes(b"no image")
    return sources.open_images(str(folder))


def test_an_image_in_the_place_of_an_unreadable_one_counts_as_itself(tmp_path):
    source = write_photos(tmp_path / "photos", 20, damaged=3)

    def make(examples=4, source=source):
        one = BIN_CLASSES[:1]
        return EvalSet(source, image_size=16, examples=examples, classes=one)

    for read_first in (False, True):
        pairs = make()
        shown = [image.mean() / 5 for _, x in pairs.batches(4) for image in x]
        assert shown == [0, 1, 2, 4]
        pairs = pairs if read_first else make()
        assert [pairs.image_index(i) for i in range(4)] == shown
        assert pairs.image_index(24) == 4
        about = pairs.describe()["pictures"]
        assert about["names"] == ["00.png", "01.png", "02.png", "04.png"]
    # Two examples show the same image, which counts once.
    assert [make(5).image_index(i) for i in (3, 4)] == [4, 4]
    assert make(5).describe()["pictures"]["count"] == 4
    before = make().fingerprint
    (tmp_path / "photos/04.png").write_bytes((tmp_path / "photos/07.png").read_bytes())
    after = make().fingerprint
    (tmp_path / "photos/05.png").write_bytes(b"not shown")
    assert before != after == make().fingerprint


def test_too_many_unreadable_images_have_no_fingerprint(tmp_path):
    source = write_photos(tmp_path / "photos", 20, damaged=3)
    for path in pathlib.Path(tmp_path / "photos").glob("0[456].png"):
        path.write_bytes(b"no image")
    pairs = EvalSet(source, image_size=16, examples=5)
    with pytest.raises(UserError, match="of 20 images cannot be read"):
        pairs.fingerprint  # noqa: B018


@pytest.mark.slow
def test_different_eval_sets_have_different_fingerprints(tmp_path, monkeypatch):
    write_mask_folder(tmp_path / "m", [(BINS[1], False)])
    folder = MaskFolder(tmp_path / "m")
    options = [{}, {"seed": 1}, {"examples": 6}, {"image_size": 16}]
    options += [{"mask_folder": folder}, {"classes": BIN_CLASSES + SHAPE_CLASSES}]
    prints = [make_eval_set(**o).fingerprint for o in options]
    train = sources.open_source("bundled", split="train")
    prints += [EvalSet(train, image_size=SIZE, examples=5).fingerprint]
    assert len(set(prints)) == len(prints)
    assert make_eval_set().fingerprint == prints[0]
    # Masks that are drawn in another way are others.
    random_mask = masks.random_mask

    def otherwise(*args, **options):
        return random_mask(*args, **options | {"kind": "rectangles"})

    with monkeypatch.context() as patch:
        patch.setattr(masks, "random_mask", otherwise)
        eval_set._draw.clear_cache()
        changed = make_eval_set().fingerprint
    eval_set._draw.clear_cache()
    assert changed != prints[0] == make_eval_set().fingerprint
