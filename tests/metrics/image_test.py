import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from pconv_jax import metrics

pytestmark = pytest.mark.usefixtures("fast_compilation")


ALL = {
    "l1": metrics.l1,
    "l1_hole": lambda a, b: metrics.l1_hole(a, b, np.zeros((*a.shape[:3], 1))),
    "psnr": metrics.psnr,
    "ssim": metrics.ssim,
}


def images(shape=(3, 24, 31, 3), seed=0):
    rng = np.random.default_rng(seed)
    a = rng.random(shape, np.float32)
    b = np.clip(a + rng.normal(0, 0.2, shape), 0, 1).astype(np.float32)
    return a, b


def photos():
    """Pair a photo with blurred, noisy and locally flattened versions of it."""
    a = skimage.data.astronaut()[:200, 100:260].astype(np.float32) / 255
    noisy = np.clip(a + np.random.default_rng(0).normal(0, 0.05, a.shape), 0, 1)
    blurred = (a + np.roll(a, 1, 0) + np.roll(a, 1, 1)) / 3
    holed = a.copy()
    holed[60:120, 40:100] = 0.97
    flat = np.full_like(a, 0.97)
    b = np.stack([noisy, blurred, holed, flat]).astype(np.float32)
    return np.stack([a] * 4), b


def reference_ssim(a, b, **options):
    return skimage.metrics.structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=-1,
        **options,
    )


@pytest.mark.parametrize("a, b", [images(), images((1, 11, 12, 1)), photos()])
def test_ssim_equals_skimage(a, b):
    expected = [reference_ssim(x, y, data_range=1) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.ssim(a, b), expected, atol=1e-5)


def test_ssim_equals_skimage_on_nearly_flat_bright_images():
    a, b = images()
    a, b = 0.98 + 0.002 * a, 0.98 + 0.002 * b
    expected = [reference_ssim(x, y, data_range=1) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.ssim(a, b), expected, atol=1e-5)


def test_psnr_equals_skimage():
    a, b = photos()
    expected = [
        skimage.metrics.peak_signal_noise_ratio(x, y, data_range=1)
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(metrics.psnr(a, b), expected, rtol=1e-5)


def test_ranges_other_than_one_scale_out():
    a, b = images()
    for metric in (metrics.psnr, metrics.ssim):
        np.testing.assert_allclose(
            metric(255 * a, 255 * b, max_val=255), metric(a, b), rtol=1e-4
        )


def test_closed_forms():
    a = np.zeros((2, 16, 16, 3), np.float32)
    b = np.stack([a[0] + 0.1, a[0] + 1])
    np.testing.assert_allclose(metrics.l1(a, b), [0.1, 1], rtol=1e-5)
    np.testing.assert_allclose(metrics.psnr(a, b), [20, 0], atol=1e-4)
    # Flat images differ in luminance only: c1 / (x^2 + c1).
    expected = [1e-4 / (0.01 + 1e-4), 1e-4 / (1 + 1e-4)]
    np.testing.assert_allclose(metrics.ssim(a, b), expected, atol=1e-6)


def test_ssim_of_opposite_patterns_is_close_to_minus_one():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, (1, 32, 32, 1)).astype(np.float32)
    assert -1 <= metrics.ssim(a, 1 - a)[0] < -0.9


def test_equal_images():
    a, _ = images()
    np.testing.assert_array_equal(metrics.l1(a, a), [0, 0, 0])
    np.testing.assert_array_equal(metrics.psnr(a, a), [np.inf] * 3)
    np.testing.assert_allclose(metrics.ssim(a, a), [1, 1, 1], atol=1e-6)


def test_ssim_has_finite_gradients_on_flat_images():
    a = jnp.full((1, 16, 16, 3), 0.5)
    gradient = jax.grad(lambda x: metrics.ssim(x, a).sum())(a)
    chex.assert_tree_all_finite(gradient)


def test_l1_hole_uses_holes_only():
    a, b = images()
    mask = np.ones((3, 24, 31, 1), np.float32)
    mask[0, 3:9, 4:20] = 0
    mask[1] = 0
    valid = np.broadcast_to(mask == 1, a.shape)
    b[valid] = np.nan
    expected = [np.abs(a - b)[0, 3:9, 4:20].mean(), np.abs(a - b)[1].mean(), 0]
    np.testing.assert_allclose(metrics.l1_hole(a, b, mask), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_one_value_per_image_the_same_under_jit(name):
    a, b = images()
    values = ALL[name](a, b)
    chex.assert_shape(values, (3,))
    chex.assert_type(values, jnp.float32)
    np.testing.assert_allclose(jax.jit(ALL[name])(a, b), values, rtol=1e-5)
    for i in range(3):
        alone = ALL[name](a[i : i + 1], b[i : i + 1])
        np.testing.assert_allclose(alone, values[i : i + 1], rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_measured_in_float32(name):
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in images())
    expected = ALL[name](a.astype(jnp.float32), b.astype(jnp.float32))
    np.testing.assert_array_equal(ALL[name](a, b), expected)


@pytest.mark.parametrize("name", ALL)
def test_metrics_refuse(name):
    a, b = images()
    with pytest.raises(ValueError, match=r"same shape \[N, H, W, C\]"):
        ALL[name](a, b[:1])
    with pytest.raises(ValueError, match=r"same shape \[N, H, W, C\]"):
        ALL[name](a[0], b[0])
    with pytest.raises(ValueError, match="divide uint8 images by 255"):
        ALL[name](a.astype(np.uint8), b)


def test_l1_hole_refuses_a_mask_that_would_broadcast():
    a, b = images()
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 24, 31, 1\)"):
        metrics.l1_hole(a, b, np.ones((1, 24, 31, 1)))


def test_ssim_refuses_small_images():
    a, b = images((1, 10, 40, 3))
    with pytest.raises(ValueError, match="at least 11 pixels.*10x40"):
        metrics.ssim(a, b)


def test_a_mask_of_0_and_255_is_that_of_0_and_1():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 3, 16, 16, 3)).astype(np.float32)
    mask = (rng.uniform(size=(3, 16, 16, 1)) > 0.5).astype(np.uint8)
    expected = metrics.l1_hole(a, b, mask)
    np.testing.assert_array_equal(metrics.l1_hole(a, b, 255 * mask), expected)
