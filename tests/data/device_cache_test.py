import functools

import cv2
import jax
import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.data import device_cache
from pconv_jax.data.device_cache import DeviceCache, IndexBatches
from pconv_jax.data.sources import FolderSource

pytestmark = pytest.mark.usefixtures("fast_compilation")


def write_folder(folder, images):
    for number, image in enumerate(images):
        path = folder / f"{number:02d}.png"
        cv2.imwrite(str(path), image[..., ::-1])  # From RGB.
    return FolderSource(folder)


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def test_images_of_several_sizes_are_in_one_array(tmp_path):
    small, large, panorama = noise(20, 25), noise(96, 128), noise(32, 100)
    upright = noise(32, 24)
    source = write_folder(tmp_path, [small, large, panorama, upright])
    cache, unreadable = device_cache.read_cache(source, side=32)
    assert unreadable == [] and cache.images.dtype == np.uint8
    sizes = [[20, 25], [32, 43], [32, 48], [24, 32]]
    np.testing.assert_array_equal(cache.sizes, sizes)
    assert cache.images.shape == (4, 32, 48, 3)
    np.testing.assert_array_equal(cache.turned, [False, False, False, True])
    np.testing.assert_array_equal(cache.images[3, :24, :32], upright.swapaxes(0, 1))
    np.testing.assert_array_equal(cache.images[0, :20, :25], small)
    # Smaller images repeat their rim, so that a crop has no dark one.
    np.testing.assert_array_equal(cache.images[0, 20:, :25], small[-1:].repeat(12, 0))
    np.testing.assert_array_equal(cache.images[0, :20, 30], small[:, -1])
    expected = cv2.resize(large, (43, 32), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(cache.images[1, :, :43], expected)
    np.testing.assert_array_equal(cache.images[2], panorama[:, 26:74])


def test_unreadable_images_are_left_out_and_named(tmp_path):
    source = write_folder(tmp_path, [noise(16, 16, n) for n in range(41)])
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "07.png").write_bytes(b"no image")
    cache, unreadable = device_cache.read_cache(source, side=16)
    assert unreadable == [source.name(3), source.name(7)]
    np.testing.assert_array_equal(cache.images[3], noise(16, 16, 4))
    (tmp_path / "09.png").write_bytes(b"")
    with pytest.raises(UserError, match="3 of 41 images cannot be read"):
        device_cache.read_cache(source, side=16)


@functools.cache
def ramps():
    """Three images whose red is the column and whose green is the row, times 2.

    The last is upright.
    """
    images, sizes = np.zeros((3, 72, 96, 3), np.uint8), np.array([[72, 96], [40, 60]])
    sizes, turned = sizes[[0, 1, 1]], np.array([False, False, True])
    images[..., 0] = 2 * np.arange(96)
    images[..., 1] = 2 * np.arange(72)[:, None]
    images[2, ..., :2] = images[2, ..., 1::-1]
    for image, (height, width) in zip(images, sizes):
        image[height:], image[:, width:] = 255, 255  # No crop may reach here.
    return DeviceCache(images, sizes.astype(np.int32), turned)


@pytest.mark.parametrize(
    ("size", "scale", "rim"), [(24, (0.5, 1.0), 4), (64, (0.4, 0.7), 9)]
)
def test_crops_are_squares_of_the_asked_size_anywhere_in_the_image(size, scale, rim):
    cache, keys = ramps(), jax.random.split(jax.random.key(0), 400)
    crop = functools.partial(device_cache.random_crop, size=size, scale=scale)
    crops = jax.vmap(crop, (0, None, None))
    for index, (height, width) in enumerate(np.array(cache.sizes)):
        if cache.turned[index]:
            height, width = width, height
        result = np.asarray(crops(keys, cache, index))
        assert result.shape == (400, size, size, 3) and result.dtype == np.uint8
        # A ramp stays a ramp, whose slope tells the side. Kernels may leave the image
        # at the rim.
        inner = result[:, rim:-rim, rim:-rim].astype(float) / 2
        assert (result[:, rim:-rim, rim:-rim, 2] == 0).all()
        columns, rows = inner[..., 0].mean(1), inner[..., 1].mean(2)
        flipped = columns[:, -1] < columns[:, 0]
        assert 0.4 < flipped.mean() < 0.6
        columns[flipped] = columns[flipped, ::-1]
        steps = size - 2 * rim - 1
        slope = (rows[:, -1] - rows[:, 0]) / steps
        np.testing.assert_allclose(
            (columns[:, -1] - columns[:, 0]) / steps, slope, atol=1.1 / steps
        )
        side = slope * size
        short = min(height, width)
        error = 0.6 * size / steps
        assert scale[0] * short - error < side.min() < scale[0] * short + 4
        assert scale[1] * short - 4 < side.max() < scale[1] * short + error
        # The middle of pixel 0 is half a step from the side of the square.
        for first, room in ((columns[:, 0], width), (rows[:, 0], height)):
            start = first + 0.5 - (rim + 0.5) * slope
            assert start.min() > -1 and (start + side).max() < room + 1
            free = (start + 0.5) / (room - side + 1)
            assert free.min() < 0.1 and free.max() > 0.9
            assert 0.4 < free.mean() < 0.6


def test_a_crop_of_the_whole_image_is_the_image():
    image = noise(32, 32)
    sizes = np.array([[32, 32]], np.int32)
    cache = DeviceCache(image[None], sizes, np.array([False]))
    crop = functools.partial(device_cache.random_crop, size=32, scale=(1.0, 1.0))
    keys = jax.random.split(jax.random.key(0), 8)
    for result in np.asarray(jax.vmap(crop, (0, None, None))(keys, cache, 0)):
        same, mirrored = (np.array_equal(result, x) for x in (image, image[:, ::-1]))
        assert same != mirrored


def test_shrinking_averages():
    """A checkerboard of single pixels becomes gray, not a moire pattern."""
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    images, sizes = np.stack([board] * 3, -1)[None], np.array([[64, 64]])
    cache = DeviceCache(images, sizes, np.array([False]))
    crop = device_cache.random_crop(
        jax.random.key(0), cache, 0, size=16, scale=(1.0, 1.0)
    )
    assert np.abs(np.asarray(crop[2:-2, 2:-2], float) - 127.5).max() < 4


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    batches = take(IndexBatches(10, batch_size=4, seed=3), 10)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    seeds = np.concatenate([batch["seed"] for batch in batches])
    assert seeds.dtype == np.uint32 and len(set(seeds)) == 40


def test_batches_follow_from_seed_and_step_on_any_number_of_processes():
    make = functools.partial(IndexBatches, 10, batch_size=4, seed=3)
    whole = take(make(), 9)
    for a, b in zip(take(make(start_step=4), 5), whole[4:]):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    shares = [take(make(process_index=n, process_count=2), 9) for n in range(2)]
    for first, second, both in zip(*shares, whole):
        for name in both:
            np.testing.assert_array_equal(first[name], both[name][::2])
            np.testing.assert_array_equal(second[name], both[name][1::2])
    other = next(IndexBatches(10, batch_size=4, seed=4))
    assert not np.array_equal(other["seed"], whole[0]["seed"])
