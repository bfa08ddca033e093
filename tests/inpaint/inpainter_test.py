import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pconv_jax
from pconv_jax import UserError
from pconv_jax.inpaint import detail, fill
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.unet import Normalization, PConvUNet, Stage, fill_depth
from pconv_jax.weights import pretrained, project_names
from tests.helpers.networks import make_network

pytestmark = pytest.mark.usefixtures("fast_computation")


def averaging_network(depth=2, channels=3):
    """A network whose every layer gives the mean of the valid values that it sees."""
    kernels = [7, 5, 5, 3, 3, 3, 3, 3][:depth]
    encoder = tuple(Stage(channels, k, batch_norm=False) for k in kernels)
    decoder = tuple(Stage(channels, 3, batch_norm=False) for _ in kernels)
    # From [-1, 1] to [0, 1], where a ReLU does nothing, and back.
    normalization = Normalization((-1.0,) * channels, (2.0,) * channels)
    model = PConvUNet(stages=(encoder, decoder), normalization=normalization)
    params = {}
    for i, stage in enumerate((*encoder, *decoder), 1):
        sources = 1 if i <= depth else 2
        k = stage.kernel_size
        kernel = np.concatenate([np.eye(channels)] * sources) / (sources * k * k)
        kernel = np.broadcast_to(kernel, (k, k, *kernel.shape)).astype(np.float32)
        params[f"pconv{i}"] = {
            "kernel": kernel.copy(),
            "bias": np.zeros(channels, np.float32),
        }
    return model, {"params": params}


@pytest.fixture(scope="module")
def averaging():
    return Inpainter(*averaging_network())


@pytest.fixture(scope="module")
def inpainter():
    return Inpainter(*make_network())


def photo(height=90, width=70, channels=3, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    shape = (height, width) if channels == 0 else (height, width, channels)
    if np.dtype(dtype) == bool:
        return rng.uniform(size=shape) < 0.5
    if np.issubdtype(dtype, np.floating):
        return rng.uniform(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def hole_of(shape, top=20, left=30, size=12):
    hole = np.zeros(shape[:2], bool)
    hole[top : top + size, left : left + size] = True
    return hole


# Results.


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float16, bool])
@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
def test_arrays_come_back_as_they_came(dtype, channels, inpainter):
    if dtype is bool and channels in (2, 4):
        pytest.skip("has no alpha")
    image = photo(channels=channels, dtype=dtype)
    hole = hole_of(image.shape)
    before = image.copy()
    result = inpainter(image, hole)
    assert result.dtype == image.dtype and result.shape == image.shape
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(result[~hole], image[~hole])
    colors = np.s_[:] if channels in (0, 1, 3) else np.s_[..., :-1]
    assert np.mean(result[hole][colors] != image[hole][colors]) > 0.2
    if channels in (2, 4):
        np.testing.assert_array_equal(result[..., -1], image[..., -1])


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "F"]
    + ["I;16", "I;16B", "I"],
)
def test_pillow_images_come_back_as_they_came(mode, inpainter):
    array = photo(dtype={"I": np.uint16, "F": np.float32}.get(mode[0], np.uint8))
    if mode[0] in "IF":
        image = Image.fromarray(array[..., 0])
        if mode == "I;16B":
            image = Image.frombytes(
                mode, image.size, array[..., 0].byteswap().tobytes()
            )
        image = image.convert(mode) if mode == "I" else image
    else:
        image = Image.fromarray(array).convert(mode)
    image.info["comment"] = "of the camera"
    hole = hole_of(array.shape)
    result = inpainter(image, Image.fromarray(hole))
    assert result.mode.removesuffix("B") == image.mode.removesuffix("B")
    assert result.size == image.size and result.info == image.info
    a, b = np.asarray(image), np.asarray(result)
    np.testing.assert_array_equal(a[~hole], b[~hole])
    assert np.any(a[hole] != b[hole])


def test_jax_arrays_and_batches(inpainter):
    images = np.stack([photo(seed=i) for i in range(3)])
    holes = np.stack([hole_of(images[0].shape, top=10 * i) for i in range(3)])
    each = [inpainter(x, h) for x, h in zip(images, holes)]
    for result in (
        inpainter(images, holes[..., None]),
        inpainter(images, holes),
        inpainter(list(images), list(holes)),
        inpainter(tuple(map(Image.fromarray, images)), list(holes)),
    ):
        np.testing.assert_array_equal(np.stack(result), each)
    result = inpainter(jnp.asarray(images), jnp.asarray(holes)[..., None])
    assert isinstance(result, jax.Array)
    np.testing.assert_array_equal(result, each)
    results, depths = inpainter(images, holes[0], return_depth=True)
    np.testing.assert_array_equal(results[1], inpainter(images[1], holes[0]))
    assert depths.shape == (3, 90, 70)
    np.testing.assert_array_equal(np.stack(inpainter(list(images), holes)), each)
    for two in (list(holes[:2]), holes[:2]):
        for several in (list(images), images):
            with pytest.raises(ValueError, match="one for each of 3 images, got 2"):
                inpainter(several, two)


def test_files(inpainter, tmp_path):
    image = photo()
    hole = hole_of(image.shape)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    result = inpainter(str(tmp_path / "a.png"), tmp_path / "mask.png")
    assert isinstance(result, Image.Image)
    np.testing.assert_array_equal(result, inpainter(image, hole))
    with pytest.raises(ValueError, match="cannot read .*none.png: there is no such"):
        inpainter(tmp_path / "none.png", hole)


def test_from_pretrained(tmp_path, monkeypatch):
    path = tmp_path / "tiny.safetensors"
    model, variables = make_network()
    pretrained.save_pretrained(path, model, variables, info={"origin": "a test"})
    image, hole = photo(), hole_of((90, 70))
    expected = Inpainter(model, variables)(image, hole)
    inpainter = pconv_jax.Inpainter.from_pretrained(path)
    assert inpainter.info["origin"] == "a test"
    np.testing.assert_array_equal(inpainter(image, hole), expected)
    monkeypatch.setattr(pretrained, "BUNDLED", {"tiny": path})
    np.testing.assert_array_equal(Inpainter.from_pretrained()(image, hole), expected)


def test_the_package_exports_it_but_imports_it_late():
    assert pconv_jax.Inpainter is Inpainter and "Inpainter" in dir(pconv_jax)
    with pytest.raises(AttributeError, match="no attribute 'Painter'"):
        _ = pconv_jax.Painter
    code = "import pconv_jax, sys; assert 'PIL' not in sys.modules; "
    code += "from pconv_jax import Inpainter"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Holes and masks.


@pytest.mark.parametrize("content", [0, 255])
def test_the_content_of_a_hole_does_not_matter(content, inpainter):
    image = photo(150, 140)
    hole = hole_of(image.shape, size=60)  # Wider than the network closes.
    other = image.copy()
    other[hole] = content
    np.testing.assert_array_equal(inpainter(other, hole), inpainter(image, hole))
    data = image.astype(np.float32) / 255
    expected = inpainter(data, hole)
    data[hole] = np.nan
    np.testing.assert_array_equal(inpainter(data, hole), expected)
    np.testing.assert_array_equal(inpainter(data), expected)


def test_pixels_outside_the_image_do_not_matter():
    """An image gives the same as one with an unknown margin."""
    inpainter = Inpainter(*make_network(), detail=False)  # A margin moves the search.
    image, hole = photo(90, 70), hole_of((90, 70))
    wider = np.full((100, 110, 3), np.nan, np.float32)
    wider[:90, :70] = image / np.float32(255)
    # Transparent: neither valid nor to be filled.
    alpha = np.isfinite(wider[..., :1])
    wider = np.concatenate([np.nan_to_num(wider, nan=0.7), alpha], axis=-1)
    result = inpainter(wider, np.pad(hole, ((0, 10), (0, 40))))
    expected = inpainter(image / np.float32(255), hole)
    np.testing.assert_allclose(result[:90, :70, :3], expected, atol=1e-6)
    assert np.all(result[:, 70:, :3] == np.float32(0.7))


@pytest.mark.parametrize(
    "shape",
    [(1, 9), (9, 2), (3, 700), (1300, 5)]
    + [pytest.param(s, marks=pytest.mark.slow) for s in ((257, 255), (150, 1100))],
)
def test_a_plain_image_becomes_whole(shape, averaging):
    """At any size, and however wide the hole is: no gray, no seam, no rim."""
    image = np.broadcast_to(np.uint8([200, 30, 90]), (*shape, 3)).copy()
    hole = np.zeros(shape, bool)
    hole[shape[0] // 8 :, shape[1] // 4 :] = True
    hole[0, 0] = False
    damaged = np.where(hole[..., None], 0, image).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "..% of the image", UserWarning)
        result, depth = averaging(damaged, hole, return_depth=True)
    np.testing.assert_array_equal(result, image)
    np.testing.assert_array_equal(depth > 0, hole)


def test_a_slope_is_continued():
    averaging = Inpainter(*averaging_network(), detail=False)
    y, x = np.mgrid[:400, :500]
    image = np.stack([x / 500, y / 400, (x + y) / 900], axis=-1).astype(np.float32)
    hole = np.zeros(x.shape, bool)
    hole[100:300, 120:360] = True
    result, depth = averaging(image, hole, return_depth=True)
    assert depth.max() > 2 + 3  # Halved again and again.
    # As good as the mean over what is around can be: the middle is exact, by symmetry.
    error = np.abs(result - image)[hole]
    assert error.max() < 0.25 and error.mean() < 0.08
    # Without a seam: no step is much larger than those of the slope.
    assert np.abs(np.diff(result, axis=0))[110:290, 130:350].max() < 0.03
    assert np.abs(np.diff(result, axis=1))[110:290, 130:350].max() < 0.03


def test_masks_are_white_where_to_fill_unless_inverted(inpainter):
    image = photo()
    hole = hole_of(image.shape)
    expected = inpainter(image, hole)
    for mask in (
        hole.astype(np.uint8),
        hole.astype(np.uint8) * 255,
        hole.astype(np.uint16) * 65535,
        hole.astype(np.float32),
        hole[..., None],
        np.stack([hole * 255] * 3, axis=-1),
        Image.fromarray(hole),
    ):
        np.testing.assert_array_equal(inpainter(image, mask), expected)
    result = inpainter(image, ~hole, invert_mask=True)
    np.testing.assert_array_equal(result, expected)


def test_dilate_and_resize(inpainter):
    image = photo(80, 60)
    hole = hole_of(image.shape, size=10)
    wider = inpainter(image, hole, dilate=3)
    assert np.any(wider[17, 35] != image[17, 35]) and np.all(wider[16] == image[16])
    small = hole[::2, ::2]
    with pytest.raises(ValueError, match="mask has 30 x 40 pixels, .* has 60 x 80"):
        inpainter(image, small)
    result = inpainter(image, small, resize_mask=True)
    np.testing.assert_array_equal(result, inpainter(image, hole))


def test_transparent_pixels_are_filled_without_a_mask(inpainter):
    image = photo(channels=4)
    image[..., 3] = 255
    hole = hole_of(image.shape)
    image[hole] = 0
    image[hole_of(image.shape, 2, 2, 3), 3] = 200
    result = inpainter(image)
    assert np.all(result[hole, 3] == 255) and np.all(result[3, 3, 3] == 200)
    expected = inpainter(image[..., :3], hole)
    np.testing.assert_array_equal(result[..., :3], expected)
    np.testing.assert_array_equal(inpainter(Image.fromarray(image)), result)
    with pytest.raises(ValueError, match="mask is needed"):
        inpainter(image[..., :3])


def test_colors_of_transparent_pixels_do_not_matter(inpainter):
    image = photo(channels=4)
    image[..., 3] = 255
    image[:, 45:, 3] = 0
    other = image.copy()
    other[:, 45:, :3] = 99
    hole = hole_of(image.shape)
    a, b = inpainter(image, hole), inpainter(other, hole)
    seen = hole & (image[..., 3] > 0)
    np.testing.assert_array_equal(a[seen], b[seen])


def test_data_that_are_not_images():
    model, variables = averaging_network(channels=1)
    model = model.clone(normalization=Normalization((-400.0,), (1.0,)))
    data = np.full((72, 72), 273.15, np.float64)
    data[10:30, 20:50] = np.nan
    inpainter = Inpainter(model, variables, value_range=None)
    result = inpainter(data)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, 273.15, rtol=1e-6)


def test_networks_of_fields_are_refused():
    model, variables = averaging_network(channels=1)
    info = {"origin": project_names.CLIMATE_RECONSTRUCTION_AI}
    for value_range in ((0, 1), None):
        with pytest.raises(UserError, match="FREVA-CLINT.* fills fields of measurem"):
            Inpainter(model, variables, info=info, value_range=value_range)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_a_masked_array_masks_is_filled(inpainter, dtype):
    image, hole = photo(40, 40, dtype=dtype), hole_of((40, 40))
    masked = np.ma.MaskedArray(image, np.zeros(image.shape, bool), fill_value=7)
    masked[hole, 1] = np.ma.masked
    masked.data[hole] = 99  # Which may be out of range.
    expected = inpainter(image, hole)
    result = inpainter(masked)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, expected)
    # It adds to a mask.
    part = hole.copy()
    part[:, 20:] = False
    np.testing.assert_array_equal(inpainter(masked, part), expected)
    mask = np.ma.MaskedArray(np.ones((40, 40), bool), ~hole)
    np.testing.assert_array_equal(inpainter(image, mask), expected)
    mask = np.ma.MaskedArray(np.zeros((40, 40), np.uint8), ~hole)
    np.testing.assert_array_equal(inpainter(image, mask, invert_mask=True), expected)


@pytest.mark.parametrize("missing", [1e19, 1e20, -9.96921e36, 3e38])
def test_large_numbers_are_missing_values(missing):
    inpainter = Inpainter(*averaging_network(channels=1), value_range=None)
    data = np.full((40, 40), 273.15, np.float32)
    data[0, 0] = missing
    with pytest.raises(UserError, match=r"1e\+19 and more, which stand for missing"):
        inpainter(data, hole_of((40, 40)))
    with pytest.raises(UserError, match=r"1e\+19 and more, which stand for missing"):
        inpainter(data)  # Otherwise, they would come back as if they were values.
    data[hole_of((40, 40))] = missing
    data[0, 0] = 273.15
    inpainter(data, hole_of((40, 40)))  # What is in the hole does not matter.


def test_one_channel_has_no_alpha(tmp_path):
    inpainter = Inpainter(*averaging_network(channels=1), value_range=None)
    for dtype in (np.float32, np.uint8):
        with pytest.raises(UserError, match=r"\[H, W, 1\] for this network, "):
            inpainter(np.ones((20, 20, 2), dtype), np.eye(20))


def test_ranges_of_floats():
    network = averaging_network()
    image = np.full((40, 40, 3), 80.0, np.float32)
    hole = hole_of(image.shape)
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got 80 to 80; set"):
        Inpainter(*network)(image, hole)
    inpainter = Inpainter(*network, value_range=(0, 255))
    np.testing.assert_allclose(inpainter(image, hole), image, rtol=1e-5)
    image[hole] = np.nan
    np.testing.assert_allclose(inpainter(image), 80, rtol=1e-5)


# Any size, in a handful of compilations.


def test_floats_of_sixteen_bits(inpainter):
    image, mask = photo(20, 20, dtype=np.float32), np.zeros((20, 20), np.float32)
    mask[5:9, 5:9] = 1
    half = jnp.asarray(image, jnp.bfloat16)
    result = inpainter(half, jnp.asarray(mask, jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    expected = inpainter(np.asarray(half, np.float32), mask)
    np.testing.assert_array_equal(result, expected.astype(jnp.bfloat16))


def test_rounding_is_no_value_out_of_range(inpainter):
    image, mask = photo(20, 20, dtype=np.float32), np.zeros((20, 20), bool)
    mask[5:9, 5:9] = True
    image[0, 0] = [1 + 1e-6, -1e-9, 1]
    np.testing.assert_array_equal(inpainter(image, mask)[0, 0], image[0, 0])


def test_an_alpha_that_is_not_a_number_is_transparent(inpainter):
    image = photo(20, 20, channels=4, dtype=np.float32)
    image[..., 3], image[5:9, 5:9] = 1, np.nan
    result, depth = inpainter(image, return_depth=True)
    np.testing.assert_array_equal(depth > 0, np.isnan(image[..., 3]))
    assert np.isfinite(result).all() and np.all(result[..., 3] == 1)


def test_no_images(inpainter):
    image = np.zeros((0, 20, 20, 3), np.uint8)
    result, depth = inpainter(image, np.zeros((20, 20)), return_depth=True)
    assert (result.shape, depth.shape) == (image.shape, (0, 20, 20))
    assert inpainter([], np.zeros((20, 20)), return_depth=True) == ([], [])


@pytest.mark.slow
def test_fifty_sizes_compile_a_handful_of_times():
    compilations = []
    inpainter = Inpainter(*make_network(depth=1, width=2))
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 2), (2, 1), (1, 3000), (2000, 1), (7, 1500), (3000, 2000)]
    sizes += [tuple(s) for s in np.exp(rng.uniform(0, 7, (43, 2))).astype(int)]
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda event, *_, **__: compilations.append(event)
    )
    try:
        for i, (height, width) in enumerate(sizes):
            image = photo(height, width, seed=i)
            hole = np.zeros((height, width), bool)
            top, left = rng.integers(0, (height, width))
            hole[top : top + 60, left : left + 30] = True
            if hole.all():
                with pytest.raises(ValueError, match="no valid pixel is left"):
                    inpainter(image, hole)
                continue
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "..% of the image", UserWarning)
                result = inpainter(image, hole)
            assert result.shape == image.shape
            np.testing.assert_array_equal(result[~hole], image[~hole])
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    backend = [e for e in compilations if e.endswith("backend_compile_duration")]
    assert 1 <= len(backend) <= 6, len(backend)


def test_instances_share_what_is_compiled(monkeypatch):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(fill._run.__wrapped__)
    monkeypatch.setattr(fill, "_run", jax.jit(traced, static_argnums=0))
    image, (model, variables) = photo(40, 40), averaging_network()
    results = []
    for factor in (1, 0.9, 1):
        scaled = jax.tree.map(lambda x, factor=factor: factor * x, variables)
        instance = Inpainter(model, scaled, detail=False)
        results.append(instance(image, hole_of(image.shape)))
    np.testing.assert_array_equal(results[0], results[2])
    assert np.any(results[0] != results[1])


@pytest.mark.slow
def test_memory_for_a_large_image():
    """The paper's network, and 6 million pixels with a few small holes."""
    code = """
import resource, jax, numpy as np
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.unet import PConvUNet

model = PConvUNet()
images = jax.ShapeDtypeStruct((1, 256, 256, 3), "float32")
mask = jax.ShapeDtypeStruct((1, 256, 256, 1), "float32")
shapes = jax.eval_shape(model.init, jax.random.key(0), images, mask)
variables = jax.tree.map(lambda s: np.full(s.shape, 0.01, s.dtype), shapes)
image = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), np.uint8)
hole = np.zeros(image.shape[:2], bool)
for top, left in [(100, 100), (1000, 1500), (1900, 2900)]:
    hole[top : top + 40, left : left + 60] = True
result = Inpainter(model, variables)(image, hole)
assert np.array_equal(result[~hole], image[~hole])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=300
    )
    assert int(result.stdout) * 1024 < 3e9


# The fill depth.


def test_fill_depth_is_that_of_the_paper():
    """A hole narrower than 7, 15, 31, 47 pixels is closed after layer 1, 2, 3, 4."""
    model = PConvUNet(depth=4)
    closed = {}
    for width in (5, 7, 13, 15, 29, 31, 45, 47):
        mask = np.ones((1, 160, 160, 1))
        mask[0, 80 - width // 2 :][:width, 80 - width // 2 :, 0][:, :width] = 0
        depth = np.asarray(fill_depth(model, mask))[0]
        np.testing.assert_array_equal(depth > 0, mask[0, ..., 0] == 0)
        closed[width] = depth.max()
    assert [closed[w] for w in (5, 13, 29, 45)] == [1, 2, 3, 4]
    assert all(closed[w] <= n + 1 for w, n in zip((7, 15, 31, 47), (1, 2, 3, 4)))


@pytest.mark.slow
def test_fill_depth_is_where_the_network_has_a_mask():
    model, variables = make_network(depth=3)
    rng = np.random.default_rng(0)
    mask = np.ones((1, 128, 128, 1))
    for top, left, size in rng.integers((0, 0, 3), (128, 128, 30), (20, 3)):
        mask[:, top : top + size, left : left + size] = 0
    mask[:, 40:110, 30:110] = 0
    _, new_mask = jax.jit(model.apply)(variables, np.zeros((1, 128, 128, 3)), mask)
    depth = np.asarray(fill_depth(model, mask))
    assert np.all(np.asarray(new_mask)[..., 0][depth <= 3] == 1)
    inpainter = Inpainter(model, variables)
    image = photo(128, 128)
    _, depths = inpainter(image, mask[0, ..., 0] == 0, return_depth=True)
    assert depths.dtype == np.uint8
    # What the innermost layer alone would close is taken from half the size.
    np.testing.assert_array_equal(depths[depth[0] <= 2], depth[0][depth[0] <= 2])
    assert np.all(depths[depth[0] > 2] > 2)


# Mistakes.


def test_nothing_to_fill_and_nothing_to_go_by(inpainter):
    image = photo()
    with pytest.warns(UserWarning, match="nothing to fill"):
        result = inpainter(image, np.zeros((90, 70), bool))
    np.testing.assert_array_equal(result, image)
    with pytest.raises(ValueError, match="no valid pixel is left"):
        inpainter(image, np.ones((90, 70), bool))
    with pytest.warns(UserWarning, match="70% of the image is filled"):
        inpainter(image, hole_of(image.shape, 0, 0, 90) & (np.arange(90) < 63)[:, None])


@pytest.mark.parametrize(
    ("image", "mask", "problem"),
    [
        (np.zeros((8, 8, 5), np.uint8), np.eye(8), r"image must have .*\[H, W, 3\]"),
        (
            None,
            np.eye(8),
            "a path, a Pillow image or an array, got .* NoneType",
        ),
        (b"image", np.eye(8), "must be a path, .*, got an object of type bytes"),
        (np.zeros((8, 0, 3), np.uint8), np.eye(8), "image must have the shape"),
        (np.zeros((8, 8, 3), np.int64), np.eye(8), "got int64"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros(8), "mask must have the shape"),
        (255 * np.ones((8, 8, 4)), np.eye(8), "an alpha in .0, 1. .* got 255 to 255"),
        (np.zeros((8, 8, 3), np.uint8), 3 * np.eye(8), "floats in .* from 0.0 to 3.0"),
        (np.zeros((8, 8, 3), np.uint8), np.eye(9), "mask has 9 x 9 pixels"),
        (Image.new("LAB", (8, 8)), np.eye(8), "mode 'LAB'"),
    ],
)
def test_what_cannot_be_repaired(image, mask, problem, inpainter):
    with pytest.raises(ValueError, match=problem):
        inpainter(image, mask)


def test_options_of_a_mask_need_one(inpainter):
    for option in ("invert_mask", "resize_mask"):
        with pytest.raises(ValueError, match=f"mask is needed for {option}"):
            inpainter(photo(channels=4), **{option: True})


def test_networks_that_cannot_repair():
    with pytest.raises(ValueError, match="takes 5 and gives 2"):
        Inpainter(*make_network(5, out_features=2))
    with pytest.raises(ValueError, match="value_range must be"):
        Inpainter(*averaging_network(), value_range=(1, 1))


def test_networks_of_standard_convolutions():
    inpainter = Inpainter(*make_network(conv="standard"))
    image = photo()
    hole = hole_of(image.shape, size=40)
    result, depth = inpainter(image, hole, return_depth=True)
    np.testing.assert_array_equal(result[~hole], image[~hole])
    assert depth.max() > 2


def test_an_oriented_pillow_image_is_taken_as_its_pixels_lie(inpainter):
    image = Image.fromarray(photo(90, 70))
    exif = Image.Exif()
    exif[274] = 6
    image.info["exif"] = exif.tobytes()
    hole = hole_of((90, 70))
    result = inpainter(image, hole)
    assert result.size == image.size and result.getexif()[274] == 6
    with pytest.raises(ValueError, match="exif_transpose turns the image upright"):
        inpainter(image, hole.T)
    with pytest.raises(ValueError, match="turn the mask by 90 degrees"):
        inpainter(np.asarray(image), hole.T)


def test_with_sharp_wide_holes_are_filled_with_pieces():
    """A network that knows nothing, and an image that repeats itself."""
    tile = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    image, hole = np.tile(tile, (12, 10, 1)), hole_of((96, 100), size=30)
    inpainter = Inpainter(*make_network())
    soft, sharp = (inpainter(image, hole, sharp=s) for s in (False, True))
    np.testing.assert_array_equal(sharp[~hole], image[~hole])
    errors = [np.abs(x[hole].astype(float) - image[hole]).mean() for x in (soft, sharp)]
    assert errors[1] < 1 < errors[0]
    np.testing.assert_array_equal(inpainter(image, hole), soft)
    smooth = Inpainter(*make_network(), detail=False)
    np.testing.assert_array_equal(smooth(image, hole, sharp=True), smooth(image, hole))


@pytest.mark.parametrize("detail", [True, False])
def test_progress_of_a_batch_rises_to_one(detail):
    """The first hole is too wide for the network's small depth: it is halved."""
    images = np.stack([photo(), photo(seed=1)])
    masks = np.stack([hole_of((90, 70), size=36), hole_of((90, 70))])
    instance = Inpainter(*make_network(), detail=detail)
    fractions = []
    filled = instance(images, masks, progress=fractions.append)
    np.testing.assert_array_equal(filled, instance(images, masks))
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert min(fractions) > 0 and 0.5 in fractions  # One of two images is done.
    assert len(fractions) > (20 if detail else 4)


def test_exclude_is_white_where_not_to_copy_whatever_the_mask_is():
    """An inverted or smaller mask, a batch, and a hole that is transparent."""
    inpainter = Inpainter(*averaging_network())
    image, hole = photo(64, 96), hole_of((64, 96), 20, 20, 30)
    exclude = np.zeros((64, 96), bool)
    exclude[:, 60:] = True
    expected = inpainter(image, hole, exclude=exclude)
    assert (expected != inpainter(image, hole)).any()

    def check(result):
        np.testing.assert_array_equal(result, expected)

    check(inpainter(image, ~hole, exclude=exclude, invert_mask=True))
    check(inpainter(image[None], hole[None], exclude=exclude[None])[0])
    check(inpainter(image, hole, exclude=exclude[::2, ::2], resize_mask=True))
    rgba = np.dstack([image, np.where(hole, 0, 255).astype(np.uint8)])
    result = inpainter(rgba, exclude=exclude[::2, ::2], resize_mask=True)
    check(result[..., :3])
    with pytest.raises(UserError, match="exclude must be one, or one for each of 2"):
        inpainter([image] * 2, hole, exclude=[exclude] * 3)


def test_pieces_need_surroundings_of_which_little_is_missing(monkeypatch):
    """All holes count, and what is excluded."""
    monkeypatch.setattr(detail, "_SHARP_DEPTH", 4)
    inpainter = Inpainter(*averaging_network())
    image, one = photo(128, 128), hole_of((128, 128), 50, 50, 40)
    others = hole_of((128, 128), 0, 0, 34) | hole_of((128, 128), 0, 94, 34)
    others |= hole_of((128, 128), 94, 0, 34) | hole_of((128, 128), 94, 94, 34)
    calls = []

    def note(scale, rng, *, progress):
        calls.append(np.count_nonzero(scale.hole))

    monkeypatch.setattr("pconv_jax.inpaint.shift_map.fill_with_pieces", note)
    inpainter(image, one, sharp=True)
    assert calls == [1600]
    inpainter(image, one | others, sharp=True)
    inpainter(image, one, sharp=True, exclude=others)
    assert calls == [1600]


def test_nothing_to_fill_in_an_image_without_a_valid_pixel(inpainter):
    image = np.zeros((40, 40, 4), np.uint8)  # Transparent everywhere.
    with pytest.warns(UserWarning, match="There is nothing to fill"):
        result = inpainter(image, np.zeros((40, 40), bool))
    np.testing.assert_array_equal(result, image)


def test_mistakes_in_numbers(inpainter):
    image, hole = photo(40, 40), hole_of((40, 40))
    with pytest.raises(UserError, match="seed must not be negative, got -1"):
        inpainter(image, hole, seed=-1)
    for value_range in ((0, np.inf), (np.nan, 1), (1, 1)):
        with pytest.raises(UserError, match="value_range must be .low, high., both f"):
            Inpainter(*averaging_network(), value_range=value_range)
