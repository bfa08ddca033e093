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
