import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pconv_jax import _conv, _window
from tests.helpers.cases import mostly_slow


def make_case(spatial, size, *, channels=4, features=6):
    """Make random inputs and a random kernel."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *spatial, channels), np.float32)
    return x, rng.standard_normal((*size, channels, features), np.float32)


def make_window(spatial, size, *, strides=1, padding="SAME", kernel_dilation=1):
    return _window.make_window(spatial, size, strides, padding, kernel_dilation)


def convolve(x, kernel, *, window):
    return _conv.convolve([x], kernel, window, groups=1, precision=None)


def reference(x, kernel, *, window):
    """Compute the convolution with one call of XLA."""
    axes = "DHW"[-len(window.size) :]
    return jax.lax.conv_general_dilated(
        _conv._continue(x, window),
        kernel,
        window.strides,
        window.zeros,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )


def assert_close(actual, expected, tolerance=1e-5):
    """Compare trees, each array relative to its largest value."""
    chex.assert_trees_all_equal_shapes(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("spatial", "size", "options"),
    [
        ((2, 2), (3, 3), dict(padding=1)),
        ((4, 4), (3, 3), dict(padding=1, strides=2)),
        ((5, 6), (7, 5), dict(padding=((4, 2), "CIRCULAR"), strides=(3, 2))),
        ((6, 4), (3, 2), dict(padding=((2, -1), (0, 1)), kernel_dilation=(3, 2))),
        ((3,), (4,), dict()),
        ((2, 3, 2), (3, 3, 3), dict(padding="SAME", strides=(1, 2, 1))),
    ],
    ids=str,
)
def test_maps_smaller_than_the_kernel_are_a_matrix_product(spatial, size, options):
    x, kernel = make_case(spatial, size)
    window = make_window(spatial, size, **options)
    ours = functools.partial(convolve, window=window)
    y, pull_back = jax.vjp(ours, x, kernel)
    expected, expected_pull_back = jax.vjp(
        functools.partial(reference, window=window), x, kernel
    )
    chex.assert_equal_shape([y, expected])
    assert_close(y, expected)
    assert_close(pull_back(jnp.sin(y)), expected_pull_back(jnp.sin(y)))
    lowered = jax.jit(jax.grad(lambda *a: ours(*a).sum())).lower(x, kernel).as_text()
    assert "stablehlo.convolution" not in lowered


GEOMETRIES = pytest.mark.parametrize(
    ("spatial", "size", "options"),
    mostly_slow(
        [
            ((9, 8), (3, 3), dict()),
            ((9, 8), (5, 5), dict(padding=2, strides=2)),
            ((8, 9), (7, 5), dict(padding=((4, 2), "CIRCULAR"), strides=(3, 2))),
            ((9, 8), (3, 2), dict(padding=((2, -1), (0, 1)), kernel_dilation=(3, 2))),
            ((13, 14), (3, 4), dict(strides=(4, 6), kernel_dilation=(2, 4))),
            ((9, 9), (1, 1), dict(strides=3)),
            ((2, 20), (2, 2), dict(strides=(5, 1), padding=((4, 0), (0, 0)))),
            ((30,), (5,), dict(strides=2)),
            ((6, 5, 7), (3, 3, 3), dict(strides=(1, 2, 1))),
        ],
        every=3,
    ),
    ids=str,
)


@pytest.mark.slow
@GEOMETRIES
@pytest.mark.parametrize("most_copied", [1, 2**21])
def test_gradients(monkeypatch, spatial, size, options, most_copied):
    monkeypatch.setattr(_conv, "_MOST_COPIED", most_copied)
    primals = make_case(spatial, size)
    tangents = tuple(map(np.cos, primals))
    window = make_window(spatial, size, **options)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(convolve, primals, tangents):
        def loss(x, kernel):
            y = convolve(x, kernel, window=window)
            return jnp.sin(y).sum(), y

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        # Of the outputs, and of the gradients, i.e. second derivatives of the loss.
        return jax.jvp(gradient, primals, tangents)

    assert_close(
        derivatives(convolve, primals, tangents),
        derivatives(reference, primals, tangents),
    )


@pytest.mark.slow
@GEOMETRIES
def test_gradients_in_float64(monkeypatch, spatial, size, options):
    monkeypatch.setattr(_conv, "_MOST_COPIED", 1)
    window = make_window(spatial, size, **options)
    with jax.enable_x64(True):
        primals = [np.float64(a) for a in make_case(spatial, size)]

        @functools.partial(jax.jit, static_argnums=0)
        def gradients(convolve, x, kernel):
            apply = functools.partial(convolve, window=window)
            y, pull_back = jax.vjp(apply, x, kernel)
            return pull_back(jnp.sin(y))

        actual, expected = (gradients(f, *primals) for f in (convolve, reference))
    chex.assert_trees_all_equal_dtypes(actual, tuple(primals))
    assert_close(actual, expected, 1e-14)


def test_gradients_of_mapped_convolutions():
    x, kernel = make_case((9, 8), (5, 5))
    kernels = jnp.stack([kernel, np.cos(kernel)])
    window = make_window((9, 8), (5, 5), strides=2)

    def gradients(convolve, x, kernel):
        _, pull_back = jax.vjp(functools.partial(convolve, window=window), x, kernel)
        return pull_back(jnp.ones((len(x), 5, 4, 6), x.dtype))

    actual, expected = (
        jax.vmap(functools.partial(gradients, f), (None, 0))(x, kernels)
        for f in (convolve, reference)
    )
    assert_close(actual, expected)


CONVOLUTION, SPARSE, LOOP, PRODUCT = (
    "stablehlo.convolution",
    "te = [2, 2]",
    "stablehlo.while",
    "stablehlo.dot_general",
)


@pytest.mark.parametrize(
    ("operand", "side", "on_cpus", "elsewhere"),
    [
        # The convolution itself, one for each of the four phases, and the strips.
        (jnp.asarray, 12, [5, 0, 1, 1], [3, 2, 0, 0]),
        # Fewer outputs than taps.
        (jnp.asarray, 8, [0, 0, 0, 3], [3, 2, 0, 0]),
        (_conv.Upsampled, 12, [0, 0, 0, 3], [0, 0, 0, 3]),
    ],
    ids=["large map", "small map", "upsampled"],
)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_gradients_are_chosen_for_the_platform_that_a_program_is_made_for(
    platform, operand, side, on_cpus, elsewhere
):
    x, kernel = make_case((side, side), (5, 5))
    upsampled = operand is _conv.Upsampled
    window = make_window((side, side), (5, 5), strides=1 if upsampled else 2)

    def loss(x, kernel):
        return jnp.sin(convolve(operand(x), kernel, window=window)).sum()

    def count(f, *arguments):
        exported = export.export(jax.jit(f), platforms=[platform])(*arguments)
        text = exported.mlir_module()
        return [text.count(s) for s in (CONVOLUTION, SPARSE, LOOP, PRODUCT)]

    gradient = jax.grad(loss, argnums=(0, 1))
    expected = on_cpus if platform == "cpu" else elsewhere
    assert count(gradient, x, kernel) == expected
    # The derivatives that JAX takes of its own convolution.
    if platform != "cpu" and not upsampled:
        plain = functools.partial(reference, window=window)
        assert expected == count(
            jax.grad(lambda *a: jnp.sin(plain(*a)).sum(), argnums=(0, 1)), x, kernel
        )


@pytest.mark.parametrize(
    ("spatial", "size", "options"),
    mostly_slow(
        [
            ((5, 6), (3, 3), dict()),
            ((5, 4), (5, 4), dict()),
            ((4, 5), (4, 3), dict(padding=((3, 0), (0, 2)))),
            ((5, 4), (3, 2), dict(kernel_dilation=(2, 3))),
            ((5, 4), (1, 3), dict()),
            ((9,), (27,), dict()),
            ((3, 4, 2), (3, 3, 3), dict()),
        ],
        every=3,
    ),
    ids=str,
)
def test_forms_of_the_convolution_of_upsampled_features(spatial, size, options):
    primals = make_case(spatial, size)
    window = make_window([2 * n for n in spatial], size, **options)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(form, x, kernel):
        y, pull_back = jax.vjp(lambda *a: form(*a, window, None), x, kernel)
        return y, pull_back(jnp.sin(y))

    def repeated(x, *others):
        return _conv._conv_by_xla(_conv.upsample(x), *others)

    expected = derivatives(repeated, *primals)
    assert _conv._stays_small(_conv.Upsampled(primals[0]), window, 1)
    for form in (_conv._conv_taps, _conv._conv_narrow_taps):
        assert_close(derivatives(form, *primals), expected)


def test_bfloat16_is_multiplied_in_strips_on_cpus(monkeypatch):
    monkeypatch.setattr(_conv, "_MOST_COPIED", 2**16)
    rng = np.random.default_rng(0)
    # Products and sums of these integers are exact in float32.
    x = rng.integers(-8, 9, (2, 24, 20, 32)).astype(jnp.bfloat16)
    kernel = rng.integers(-8, 9, (3, 5, 32, 4)).astype(jnp.bfloat16)
    window = make_window((24, 20), (3, 5), strides=(1, 2), padding="SAME")

    def compute(x, kernel):
        return convolve(x, kernel, window=window)

    wide = reference(x.astype(np.float32), kernel.astype(np.float32), window=window)
    outputs = jax.jit(compute)(x, kernel)
    np.testing.assert_array_equal(outputs, wide.astype(jnp.bfloat16))
    for platform, (convolution, product) in {"cpu": (0, 1), "cuda": (1, 0)}.items():
        exported = export.export(jax.jit(compute), platforms=[platform])(x, kernel)
        text = exported.mlir_module()
        assert (text.count(CONVOLUTION), text.count(PRODUCT)) == (convolution, product)


def test_a_program_for_several_platforms_computes_the_same():
    x, kernel = make_case((12, 12), (5, 5))
    window = make_window((12, 12), (5, 5), strides=2)

    def loss(x, kernel):
        return jnp.sin(convolve(x, kernel, window=window)).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    exported = export.export(gradient, platforms=["cpu", "cuda", "tpu"])(x, kernel)
    assert_close(exported.call(x, kernel), gradient(x, kernel))


def test_gradient_of_a_kernel_keeps_no_windows(monkeypatch):
    x, kernel = make_case((64, 64), (5, 5))
    window = make_window((64, 64), (5, 5))

    def temporary(most_copied):
        monkeypatch.setattr(_conv, "_MOST_COPIED", most_copied)
        jax.clear_caches()

        def loss(x, kernel):
            return jnp.sin(convolve(x, kernel, window=window)).sum()

        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(x, kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    windows = 2 * 64 * 64 * kernel[..., 0].nbytes
    assert temporary(2**24) > windows > 4 * temporary(2**16)


def test_strips_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(_conv, "_MOST_COPIED", 1)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0.5, 1, (1, 400, 4, 1)), jnp.bfloat16)
    window = make_window((400, 4), (1, 1))

    def total(kernel):
        return convolve(x, kernel, window=window).sum()

    gradient = jax.jit(jax.grad(total))(jnp.ones((1, 1, 1, 1), x.dtype))
    assert gradient.dtype == x.dtype
    # Sums of four numbers, each rounded by at most 1/512, then rounded once more.
    np.testing.assert_allclose(gradient, np.float64(x).sum(), rtol=1 / 256)
