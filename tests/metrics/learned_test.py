import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from safetensors.numpy import save_file

from pconv_jax import vgg
from pconv_jax.metrics import inception, lpips
from pconv_jax.weights import hub
from pconv_jax.weights import lpips as lpips_weights
from pconv_jax.weights.inception import load_inception_params
from pconv_jax.weights.lpips import load_lpips_params
from tests.helpers import ROOT, file_server, learned_golden, torch_writer

VARIABLES = {
    "alex": ("PCONV_ALEXNET", "PCONV_LPIPS_ALEX"),
    "vgg": ("PCONV_VGG16", "PCONV_LPIPS_VGG"),
}


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable in ("PCONV_INCEPTION", *sum(VARIABLES.values(), ())):
        monkeypatch.delenv(variable, raising=False)


@functools.cache
def golden():
    with np.load(learned_golden.PATH) as arrays:
        return dict(arrays)


def weights(name):
    return learned_golden.recipe(name, json.loads(str(golden()[f"{name}/shapes"])))


def lpips_files(net, folder):
    """Write files in the formats of torchvision and of the lpips project."""
    arrays = weights(net)
    heads = {name: a for name, a in arrays.items() if name.startswith("lin")}
    trunk = {name: a for name, a in arrays.items() if name not in heads}
    trunk["classifier.1.weight"] = np.zeros((2, 3), np.float32)
    data = torch_writer.dump_zip(trunk)
    paths = (
        folder / f"trunk-{hashlib.sha256(data).hexdigest()[:8]}.pth",
        folder / "h.pth",
    )
    paths[0].write_bytes(data)
    paths[1].write_bytes(torch_writer.dump_legacy(heads))
    return paths


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips_params(request, tmp_path_factory, fast_compilation):
    files = lpips_files(request.param, tmp_path_factory.mktemp("lpips"))
    with pytest.MonkeyPatch.context() as patch:
        for variable, path in zip(VARIABLES[request.param], files, strict=True):
            patch.setenv(variable, str(path))
        return request.param, load_lpips_params(request.param)


compiled_distance = jax.jit(lpips.distance)

compiled_inception = jax.jit(inception.features_and_logits)


# LPIPS.


def test_lpips_equals_the_lpips_project(lpips_params):
    net, params = lpips_params
    expected = golden()[f"{net}/depths"]
    a, b = learned_golden.pairs()
    actual = compiled_distance(params, a, b)
    chex.assert_type(actual, jnp.float32)
    np.testing.assert_allclose(actual, expected.sum(axis=0), rtol=1e-5)
    for depth in range(5):
        alone = {k: 0 * v if k.startswith("lin") else v for k, v in params.items()}
        alone[f"lin{depth}"] = params[f"lin{depth}"]
        actual = compiled_distance(alone, a, b)
        np.testing.assert_allclose(actual, expected[depth], rtol=1e-5)


def test_lpips_is_zero_for_equal_images_and_symmetric(lpips_params):
    _, params = lpips_params
    a, b = learned_golden.pairs()
    np.testing.assert_array_equal(compiled_distance(params, a, a), [0, 0])
    there, back = compiled_distance(params, a, b), compiled_distance(params, b, a)
    np.testing.assert_allclose(there, back, rtol=1e-6)
    assert (there > 0).all()
    assert there[0] > there[1]  # A part of the former is gray.


def test_lpips_has_finite_gradients_where_no_feature_is_active():
    x = jnp.zeros((1, 2, 2, 5)).at[0, 0, 0, 0].set(3)
    gradient = jax.grad(lambda x: jnp.sum(lpips._to_unit_length(x) * jnp.arange(5)))(x)
    chex.assert_tree_all_finite(gradient)
    np.testing.assert_allclose(gradient[0, 0, 0], jnp.arange(5) / 3, rtol=1e-6)


@pytest.mark.parametrize("net, size", [("alex", 31), ("vgg", 16)])
def test_lpips_of_the_smallest_images(net, size):
    def shape(size):
        image = jnp.zeros((1, size, size + 9, 3))
        variables = jax.eval_shape(
            lpips.LPIPS(net).init, jax.random.key(0), image, image
        )
        return jax.eval_shape(lpips.distance, variables["params"], image, image).shape

    assert shape(size) == (1,)
    with pytest.raises(ValueError, match=f"at least {size} x {size} pixels"):
        shape(size - 1)


@pytest.mark.slow
def test_vgg_distance_is_the_formula_of_lpips_without_weights():
    # 26 is not a multiple of 8: the pools are of 13, 6 and 3 pixels.
    a, b = np.random.default_rng(0).random((2, 3, 26, 16, 3), np.float32)
    params = vgg.random_params(jax.random.key(0))
    expected = np.zeros(3)
    for x, y in zip(
        vgg.vgg16_features(params, 2 * a - 1), vgg.vgg16_features(params, 2 * b - 1)
    ):
        x, y = (np.asarray(f, np.float64) for f in (x, y))
        cosine = (
            (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        )
        expected += (2 - 2 * cosine).mean((1, 2))
    actual = lpips.vgg_distance(params, a, b)
    lowered = jax.jit(lpips.vgg_distance).lower(params, a, b).as_text()
    convs = lowered.count("stablehlo.convolution(")
    assert convs == 7 and lowered.count("precision HIGHEST") == 2 * convs
    chex.assert_shape(actual, (3,))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    np.testing.assert_array_equal(lpips.vgg_distance(params, a, a), np.zeros(3))
    with pytest.raises(ValueError, match="same shape"):
        lpips.vgg_distance(params, a, b[:1])


def test_lpips_refuses():
    x = np.zeros((2, 32, 32, 3), np.float32)
    for a, b, match in (
        (x, x[:1], "same shape"),
        (x[..., :1], x[..., :1], "must be RGB"),
        (x.astype(np.uint8), x, "divide uint8 images"),
    ):
        with pytest.raises(ValueError, match=match):
            lpips.distance({}, a, b)
    with pytest.raises(ValueError, match="net must be 'alex' or 'vgg', got 'squeeze'"):
        load_lpips_params("squeeze")


def test_lpips_names_all_that_is_wrong_with_a_file(tmp_path, monkeypatch):
    arrays = weights("alex")
    del arrays["features.3.bias"]
    arrays["features.10.weight"] = arrays["features.0.weight"]
    arrays["lin2.model.1.weight"] *= np.nan
    for variable in VARIABLES["alex"]:
        monkeypatch.setenv(variable, str(tmp_path / "all.safetensors"))
    save_file(arrays, tmp_path / "all.safetensors")
    with pytest.raises(ValueError) as error:
        load_lpips_params()
    assert "conv2/bias is missing" in str(error.value)
    assert "conv5/kernel is (11, 11, 3, 64), not (3, 3, 256, 256)" in str(error.value)
    arrays |= weights("alex") | {"lin2.model.1.weight": arrays["lin2.model.1.weight"]}
    save_file(arrays, tmp_path / "all.safetensors")
    with pytest.raises(ValueError, match="does not fit: lin2 is not finite.$"):
        load_lpips_params()


# Inception.


@pytest.fixture(scope="module")
def inception_params(tmp_path_factory, fast_compilation):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(weights("inception"), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCONV_INCEPTION", str(path))
        return load_inception_params()


@pytest.mark.slow
def test_inception_equals_pytorch_fid(inception_params):
    outputs = [
        compiled_inception(inception_params, learned_golden.make_images(shape, seed))
        for seed, shape in enumerate(learned_golden.INCEPTION_SHAPES)
    ]
    for actual, name in zip(zip(*outputs, strict=True), ("features", "logits")):
        expected = golden()[f"inception/{name}"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.concatenate(actual), expected, atol=5e-6 * scale)


def test_inception_takes_uint8(inception_params):
    shape = learned_golden.INCEPTION_SHAPES[0]
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    features, _ = compiled_inception(inception_params, images)
    expected, _ = compiled_inception(inception_params, images / np.float32(255))
    chex.assert_type(features, jnp.float32)
    np.testing.assert_allclose(features, expected, atol=5e-6 * expected.max())


@pytest.mark.parametrize("images", [np.zeros((2, 9, 9)), np.zeros((1, 9, 9, 3), int)])
def test_inception_refuses(images):
    with pytest.raises(ValueError, match="images must be"):
        inception.features_and_logits({}, images)


def test_inception_names_what_is_wrong_in_the_files_own_words(tmp_path, monkeypatch):
    arrays = weights("inception")
    del arrays["Mixed_7c.branch_pool.bn.running_var"]
    arrays["fc.weight"] = arrays["fc.weight"][:1000]
    monkeypatch.setenv("PCONV_INCEPTION", str(tmp_path / "torchvision.safetensors"))
    save_file(arrays, tmp_path / "torchvision.safetensors")
    with pytest.raises(ValueError) as error:
        load_inception_params()
    assert "Mixed_7c.branch_pool.bn.running_var is missing" in str(error.value)
    assert "fc.weight is (2048, 1000), not (2048, 1008)" in str(error.value)


# Fréchet distance.


def gaussian(n, mean, covariance, seed=0):
    """Make samples with exactly this mean and covariance."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x = np.linalg.qr(x - x.mean(axis=0))[0] * np.sqrt(n - 1)
    return x @ np.linalg.cholesky(covariance).T + mean


def covariance(d, seed):
    x = np.random.default_rng(seed).standard_normal((2 * d, d))
    return x.T @ x / d


def test_frechet_distance_of_gaussians():
    # Diagonal covariances: |m_a - m_b|^2 + sum of (s_a - s_b)^2.
    a = gaussian(50, np.array([0.0, 1, 2]), np.diag([1.0, 4, 9]))
    b = gaussian(80, np.array([3.0, 1, -2]), np.diag([4.0, 4, 25]), seed=1)
    expected = 25 + 1 + 0 + 4
    np.testing.assert_allclose(inception.frechet_distance(a, b), expected, rtol=1e-12)
    # Equal covariances: only the distance of the means remains.
    c = covariance(7, 0)
    a, b = gaussian(30, np.zeros(7), c), gaussian(40, np.ones(7), c, seed=1)
    np.testing.assert_allclose(inception.frechet_distance(a, b), 7, rtol=1e-12)
    assert inception.frechet_distance(a, a[::-1]) < 1e-12


def test_frechet_distance_equals_that_of_a_matrix_root():
    a = gaussian(100, np.arange(20) / 10, covariance(20, 0))
    b = gaussian(90, np.ones(20), covariance(20, 1), seed=1)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    offset = a.mean(axis=0) - b.mean(axis=0)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = offset @ offset + np.trace(ca + cb - 2 * root)
    np.testing.assert_allclose(inception.frechet_distance(a, b), expected, rtol=1e-10)


def test_frechet_distance_of_fewer_samples_than_features(caplog):
    """Singular covariances, by the eigenvalues of C_a^(1/2) C_b C_a^(1/2)."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((10, 40)), 2 * rng.standard_normal((15, 40)) + 1
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(ca)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cb @ root).clip(0)).sum()
    offset = a.mean(axis=0) - b.mean(axis=0)
    expected = offset @ offset + np.trace(ca + cb) - 2 * cross
    with caplog.at_level(logging.WARNING):
        actual = inception.frechet_distance(a, b)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert "10 samples of 40 features" in caplog.text
    # Rotating and moving both sets does not change the distance.
    turn = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    moved = inception.frechet_distance(a @ turn + 5, b @ turn + 5)
    np.testing.assert_allclose(moved, actual, rtol=1e-7)


def test_frechet_distance_takes_jax_arrays_of_small_differences():
    a = jnp.asarray(gaussian(60, np.full(5, 100.0), covariance(5, 0)), jnp.float32)
    np.testing.assert_allclose(inception.frechet_distance(a, a + 1), 5, rtol=1e-5)


@pytest.mark.parametrize(
    "a, b, match",
    [
        (np.ones((3, 2)), np.ones((3, 4)), "same number of features"),
        (np.ones((1, 2)), np.ones((3, 2)), "features_a must be"),
        (np.ones((3, 2)), np.full((3, 2), np.nan), "features_b must be finite"),
    ],
)
def test_frechet_distance_refuses(a, b, match):
    with pytest.raises(ValueError, match=match):
        inception.frechet_distance(a, b)


# Inception Score.


def test_inception_score_closed_forms():
    # No information on any image; and each image certain, among k classes.
    np.testing.assert_allclose(inception.inception_score(np.ones((40, 9))), (1, 0))
    for k in (2, 8):
        sure = np.tile(1000 * np.eye(8)[:k], (10, 1))
        np.testing.assert_allclose(inception.inception_score(sure), (k, 0), atol=1e-9)
    # Half the probability for a class of its own, half for one that all share.
    p = np.array([[0.5, 0, 0.5], [0, 0.5, 0.5]]).clip(1e-300)
    score = inception.inception_score(np.log(p), splits=1)
    np.testing.assert_allclose(score, (2**0.5, 0), rtol=1e-12)


def test_inception_score_splits():
    logits = np.random.default_rng(0).normal(0, 3, (23, 6))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for part in (p[:7], p[7:15], p[15:]):
        divergence = (part * np.log(part / part.mean(axis=0))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    actual = inception.inception_score(logits + 700, splits=3)
    np.testing.assert_allclose(actual, (np.mean(scores), np.std(scores)), rtol=1e-10)


def test_inception_score_refuses():
    for logits, splits, match in (
        (np.ones((5, 3)), 6, "splits must be between 1 and .* 5, got 6"),
        (np.ones(5), 1, "logits must be"),
    ):
        with pytest.raises(ValueError, match=match):
            inception.inception_score(logits, splits=splits)


# Locations of weights.


def find_published(address, name="weights.pth"):
    file = hub.Published(f"{address}/v1/weights.pth", name, "PCONV_X")
    (path,) = hub.find_published(file)
    return path


def test_a_published_file_is_fetched_once(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(100_000)
    name = f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    with file_server.serve({"/v1/weights.pth": data}) as (address, log):
        paths = [find_published(address, name) for _ in range(2)]
    assert paths == [tmp_path / "cache" / name] * 2
    assert paths[0].read_bytes() == data
    assert len(log) == 1
    assert os.listdir(tmp_path / "cache") == [name]
    monkeypatch.setenv("PCONV_X", "~/other.pth")
    assert find_published(address) == pathlib.Path.home() / "other.pth"


@pytest.mark.parametrize("case", ["nothing", "damaged", "closed"])
def test_a_published_file_that_cannot_be_fetched(case, tmp_path):
    files = {} if case == "nothing" else {"/v1/weights.pth": b"<html>"}
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(file_server.serve(files))
        if case == "closed":
            stack.close()
        with pytest.raises(ValueError) as error:
            find_published(address, "weights-00000000.pth")
    path = tmp_path / "cache" / "weights-00000000.pth"
    message = str(error.value)
    assert message.startswith(f"There is no {path.name}, and it cannot be downloaded (")
    assert message.endswith(
        f"fetch {address}/v1/weights.pth and put it here as {path}, or name it in "
        "PCONV_X."
    )
    assert "\n" not in message
    assert not path.parent.exists() or not os.listdir(path.parent)


def test_without_a_network_a_line_says_what_to_put_where(tmp_path):
    code = """
from pconv_jax.weights.inception import load_inception_params
from pconv_jax.weights import lpips as lpips_weights
from pconv_jax.weights.lpips import load_lpips_params
loads = load_lpips_params, lambda: load_lpips_params("vgg"), load_inception_params
for load in loads:
    try:
        load()
    except ValueError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        # A missing proxy, so that tests download nothing.
        env=os.environ | {"https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    alex, vgg, fid = result.stdout.splitlines()
    for line, *names in (
        (alex, "lpips_alex-df73285e.pth", "alexnet-owt-7be5be79.pth"),
        (vgg, "lpips_vgg-a78928a0.pth", "vgg16-397923af.pth"),
        (fid, "pt_inception-2015-12-05-6726825d.pth"),
    ):
        assert line.startswith(f"There is no {names[0]}, and it cannot be downloaded")
        for name in names:
            assert f" and put it here as {tmp_path / 'cache' / name}, or name" in line


# The other projects, if they are installed.


def test_golden_arrays_are_what_the_other_projects_compute():
    pytest.importorskip("lpips")
    pytest.importorskip("pytorch_fid")
    for net in ("alex", "vgg"):
        depths, shapes = learned_golden.lpips_golden(net)
        np.testing.assert_allclose(depths, golden()[f"{net}/depths"], rtol=1e-9)
        assert json.dumps(shapes) == str(golden()[f"{net}/shapes"])
    features, logits, shapes = learned_golden.inception_golden()
    np.testing.assert_allclose(features, golden()["inception/features"], rtol=1e-6)
    np.testing.assert_allclose(logits, golden()["inception/logits"], rtol=1e-6)
    assert json.dumps(shapes) == str(golden()["inception/shapes"])


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_trained_heads_of_the_lpips_project(net, tmp_path, monkeypatch):
    folder = pathlib.Path(pytest.importorskip("lpips").__file__).parent
    heads = folder / "weights" / "v0.1" / f"{net}.pth"
    (tmp_path / "cache").mkdir()
    target = lpips_weights._PUBLISHED[net][0].name  # It contains the hash of the file.
    (tmp_path / "cache" / target).write_bytes(heads.read_bytes())
    monkeypatch.setenv(VARIABLES[net][0], str(lpips_files(net, tmp_path)[0]))
    params = load_lpips_params(net)
    for name, array in learned_golden.read_torch(heads).items():
        np.testing.assert_array_equal(params[name.split(".")[0]], array.reshape(-1))
