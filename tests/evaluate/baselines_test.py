import pickle
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import skimage.restoration

from pconv_jax.evaluate.baselines import classical, patchmatch
from pconv_jax.evaluate.baselines.worker import Worker
from tests.helpers import ROOT


def photo(size=64):
    return cv2.resize(skimage.data.coffee()[:, 100:500], (size, size))


def border_mask(size=64):
    """Holes inside and at the border, where OpenCV's methods look at their pixels."""
    mask = np.ones((size, size), np.uint8)
    mask[10:22, 30:50] = mask[40:, :13] = mask[:5, 3:50] = 0
    return mask


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize("method", classical.BASELINES)
def test_filling_ignores_the_pixels_in_the_hole(method):
    image, mask = photo(), border_mask()
    filled = classical.fill(image, mask, method=method)
    assert filled.dtype == np.uint8 and filled.shape == image.shape
    np.testing.assert_array_equal(filled[mask == 1], image[mask == 1])
    rng = np.random.default_rng(0)
    for garbage in (rng.integers(0, 256, image.shape, np.uint8), np.zeros_like(image)):
        other = np.where(mask[..., None] == 1, image, garbage)
        again = classical.fill(other, mask[..., None], method=method)
        np.testing.assert_array_equal(again, filled)
    assert psnr(filled, image) > psnr(image * mask[..., None], image) + 2
    np.testing.assert_array_equal(
        classical.fill(image, np.ones_like(mask), method=method), image
    )


def test_baselines_equal_the_libraries():
    image, mask = photo(), border_mask()
    holed = image * mask[..., None]
    for method, flag in (("telea", cv2.INPAINT_TELEA), ("navier_stokes", 0)):
        np.testing.assert_array_equal(
            classical.fill(image, mask, method=method),
            cv2.inpaint(holed, 1 - mask, 3, flag),
        )
    expected = skimage.restoration.inpaint_biharmonic(image, mask == 0, channel_axis=-1)
    found = classical.fill(image, mask, method="biharmonic") / 255
    np.testing.assert_allclose(found, expected, atol=0.51 / 255)
    mean = classical.fill(image, mask, method="mean")[mask == 0]
    assert np.abs(mean - image[mask == 1].mean(0)).max() <= 0.5


@pytest.mark.parametrize(
    ("image", "mask", "method", "message"),
    [
        (photo(), border_mask(), "magic", "method must be one of mean, telea"),
        (photo() / 255, border_mask(), "mean", "must be uint8 .*float64"),
        (photo(), border_mask(32), "mean", r"mask must be .*\[64, 64, 3\].*\[32, 32\]"),
        (photo(), np.zeros((64, 64)), "telea", "image is all hole"),
        (photo(), np.eye(64), "patchmatch", "patch of 3 x 3 valid pixels"),
    ],
)
def test_mistakes(image, mask, method, message):
    with pytest.raises(ValueError, match=message):
        classical.fill(image, mask, method=method)


def texture(height, width, period=8):
    """A pattern of random colors that repeats itself."""
    tile = np.random.default_rng(0).integers(0, 256, (period, period, 3), np.uint8)
    return np.tile(tile, (-(-height // period), -(-width // period), 1))[
        :height, :width
    ]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 83)])
def test_patchmatch_continues_a_texture(height, width):
    image = texture(height, width)
    hole = np.zeros((height, width), bool)
    hole[20:40, 25:44] = True
    filled = patchmatch.complete(image, hole)
    np.testing.assert_array_equal(filled[~hole], image[~hole])
    assert np.abs(filled.astype(int) - image).max() <= 1
    telea = cv2.inpaint(image, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    assert psnr(telea, image) < 25
    np.testing.assert_array_equal(patchmatch.complete(image, hole), filled)


def test_patchmatch_search_is_nearly_exhaustive():
    """Against all patches of the image, one by one."""
    image = cv2.GaussianBlur(photo(40), (0, 0), 1.0).astype(np.float32)
    hole = np.zeros((40, 40), bool)
    hole[15:22, 12:26] = True
    field = patchmatch._Field(image, hole, 5, np.random.default_rng(0), None)
    for _ in range(4):
        field.search(image)
    wanted = field._gather(image, field._targets).astype(float)
    sources = field._patches[field._sources].astype(float)
    best = np.array([((sources - w) ** 2).sum(1).min() for w in wanted])
    assert (field._distance >= best - 1e-3).all()
    assert field._distance.sum() < 1.1 * best.sum() + 1e-3
    assert (field._distance < best + 1).mean() > 0.4


def test_worker_equals_the_function_and_reports_failures():
    image, mask = photo(), border_mask()
    with Worker("telea", time_budget=30) as worker:
        filled = worker.fill(image, mask)
        expected = classical.fill(image, mask, method="telea")
        np.testing.assert_array_equal(filled.image, expected)
        assert filled.error == "" and 0 < filled.seconds < 1
        failed = worker.fill(image, mask * 0)
        assert failed.image is None and "ValueError: mask must have" in failed.error
        # A crash of compiled code ends the process, and no more than that.
        worker._process.kill()
        worker._process.wait()
        np.testing.assert_array_equal(worker.fill(image, mask).image, expected)
    assert worker._process is None


def test_worker_keeps_to_its_time_budget():
    image, mask = photo(256), np.ones((256, 256), np.uint8)
    mask[20:236, 20:236] = 0
    with Worker("patchmatch", time_budget=0.3) as worker:
        start = time.monotonic()
        late = worker.fill(image, mask)
        assert time.monotonic() - start < 20  # With the start of the process.
        assert late.image is None and late.error == "took over 0.3 s"
        assert worker.fill(photo(16), border_mask(64)[:16, 30:46]).error == ""


def test_a_late_image_is_late_whatever_the_clock_says(monkeypatch):
    image, mask = photo(256), np.ones((256, 256), np.uint8)
    mask[20:236, 20:236] = 0
    with Worker("patchmatch", time_budget=0.3) as worker:
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: 0.0)
            assert worker.fill(image, mask).error == "took over 0.3 s"
        assert worker._process is None


def test_an_answer_just_in_time_counts_and_the_next_image_is_filled(monkeypatch):
    load = pickle.load

    def load_and_wait(file):
        answer = load(file)
        if answer:  # Not that of the start.
            time.sleep(1)
        return answer

    with Worker("telea", time_budget=0.7) as worker:
        with monkeypatch.context() as patch:
            patch.setattr(pickle, "load", load_and_wait)
            assert worker.fill(photo(), border_mask()).error == ""
        assert worker._process is None  # It was killed.
        assert worker.fill(photo(), border_mask()).error == ""


def test_the_worker_starts_without_jax_and_the_packages_of_training():
    code = "import sys, pconv_jax.evaluate.baselines.worker; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "numpy" in imported, done.stderr
    assert not imported & {"jax", "flax", "grain", "orbax", "tensorflow_datasets"}


def test_worker_whose_process_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Worker("mean", time_budget=10) as worker:
        assert worker.fill(photo(), border_mask()).error == "its process crashed"
