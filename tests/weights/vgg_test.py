import hashlib
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save, save_file

from pconv_jax import UserError, vgg
from pconv_jax.weights import vgg as vgg_weights
from pconv_jax.weights.vgg import load_vgg_params, write_cache
from tests.helpers import ROOT, file_server, torch_writer

pytestmark = pytest.mark.usefixtures("fast_compilation")


BLOCKS = {"VGG16": (2, 2, 3), "VGG19": (2, 2, 4)}

REVISION = "3394518cba29aee1ea82a49d971be90d2dd1dab7"
HUB_PATH = f"/timm/vgg16.tv_in1k/resolve/{REVISION}/model.safetensors"


def make_arrays(kind="VGG16"):
    """Make arrays up to pool3, ``{'conv1_1': (kernel, bias)}``."""
    rng = np.random.default_rng(0)
    arrays, channels = {}, 3
    for block, convs in enumerate(BLOCKS[kind], 1):
        for conv in range(1, convs + 1):
            features = 64 * 2 ** (block - 1)
            shape = (3, 3, channels, features)
            kernel = rng.standard_normal(shape, np.float32) * (2 / channels / 9) ** 0.5
            bias = rng.standard_normal(features, np.float32) / 10
            arrays[f"conv{block}_{conv}"] = kernel, bias
            channels = features
    return arrays


def torch_arrays(kind="VGG16"):
    """Make arrays with the names of torchvision and timm, and some unused ones."""
    arrays, index = {}, 0
    pairs = iter(make_arrays(kind).values())
    for convs in BLOCKS[kind]:
        for _ in range(convs):
            kernel, bias = next(pairs)
            kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
            arrays[f"features.{index}.weight"] = kernel
            arrays[f"features.{index}.bias"] = bias
            index += 2
        index += 1
    last = 34 if kind == "VGG19" else 28
    arrays[f"features.{last}.weight"] = np.ones((8, 512, 3, 3), np.float32)
    arrays["classifier.6.weight"] = np.ones((1000, 512), np.float32)
    return arrays


def keras_arrays(style, kind="VGG16"):
    arrays = {}
    for name, (kernel, bias) in make_arrays(kind).items():
        layer = f"block{name[4]}_conv{name[6]}"
        if style == "keras 1":
            arrays[f"{layer}/{layer}_W_1:0"] = kernel
            arrays[f"{layer}/{layer}_b_1:0"] = bias
        else:
            arrays[f"{layer}/{layer}/kernel:0"] = kernel
            arrays[f"{layer}/{layer}/bias:0"] = bias
    return arrays


def assert_same(params, kind="VGG16"):
    expected = make_arrays(kind)
    assert sorted(params) == sorted(expected)
    for name, (kernel, bias) in expected.items():
        np.testing.assert_array_equal(params[name]["kernel"], kernel, strict=True)
        np.testing.assert_array_equal(params[name]["bias"], bias, strict=True)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PCONV_VGG16", raising=False)


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    params = jax.device_get(vgg.random_params(jax.random.key(0)))
    arrays = traverse_util.flatten_dict(params, sep="/")
    monkeypatch.setattr(vgg_weights, "download_vgg16", lambda: arrays)
    jax.tree.map(np.testing.assert_array_equal, load_vgg_params(), params)
    assert "not kept for the next time" in caplog.text


# Files.


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_torchvision(form, kind, tmp_path):
    dump = {"zip": torch_writer.dump_zip, "legacy": torch_writer.dump_legacy}[form]
    data = dump(torch_arrays(kind))
    digest = hashlib.sha256(data).hexdigest()[:8]
    path = tmp_path / f"vgg-{digest}.pth"
    path.write_bytes(data)
    assert_same(load_vgg_params(str(path)), kind)


@pytest.mark.parametrize("kind", BLOCKS)
def test_timm(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(torch_arrays(kind), path)
    params = load_vgg_params(str(path))
    assert_same(params, kind)
    features = vgg.apply_features_for(params)
    pools = features(params, np.zeros((1, 8, 8, 3), np.float32))
    assert [pool.shape[-1] for pool in pools] == [64, 128, 256]


@pytest.mark.parametrize("separator", ["_", ".", "/"])
def test_our_own_names(separator, tmp_path):
    path = tmp_path / "vgg.npz"
    arrays = {}
    for name, (kernel, bias) in make_arrays().items():
        arrays[f"{name}{separator}kernel"] = kernel
        arrays[f"{name}{separator}bias"] = bias.astype(np.float64)
    np.savez(path, **arrays)
    assert_same(load_vgg_params(str(path)))


def caffe_features(arrays, images):
    """Compute the features of Keras' network, which takes BGR minus the mean."""
    x = (images[..., ::-1] + 1) * 127.5 - np.array([103.939, 116.779, 123.68])
    x = x.astype(np.float32)
    pools = []
    for block, convs in enumerate(BLOCKS["VGG16"], 1):
        for conv in range(1, convs + 1):
            kernel, bias = arrays[f"conv{block}_{conv}"]
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers
            )
            x = jax.nn.relu(x + bias)
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
        pools.append(x)
    return pools


@pytest.mark.parametrize("style", ["keras 1", "keras 2"])
def test_keras(style, tmp_path, caplog):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "vgg16_notop.h5"
    with h5py.File(path, "w") as file:
        for name, array in keras_arrays(style).items():
            file[name] = array
    with caplog.at_level(logging.WARNING):
        params = load_vgg_params(str(path))
    assert "converted from BGR" in caplog.text
    images = np.random.default_rng(1).uniform(-1, 1, (1, 64, 64, 3))
    images = images.astype(np.float32)
    actual = vgg.vgg16_features(params, images)
    expected = caffe_features(make_arrays(), images)
    for a, b in zip(actual, expected, strict=True):
        scale = np.abs(b).max()
        # At the border, the zeros of the padding have another color.
        inside = np.s_[:, 8:-8, 8:-8] if a.shape[1] > 16 else np.s_[:, 3:-3, 3:-3]
        assert np.abs(a[inside] - b[inside]).max() < 2e-6 * scale
        assert np.abs(a - b).max() < 1e-2 * scale


def test_the_imagenet_weights_of_caffe():
    folder = os.environ.get("PCONV_TEST_WEIGHTS")
    if not folder:
        pytest.skip("PCONV_TEST_WEIGHTS names no folder with them")
    stored = np.load(pathlib.Path(folder) / "vgg16_bgr_to_conv2_2.npz")
    arrays = make_arrays() | {
        name: (stored[f"{name}_kernel"], stored[f"{name}_bias"])
        for name in ("conv1_1", "conv1_2", "conv2_1", "conv2_2")
    }
    from pconv_jax.weights import vgg as vgg_weights

    named = {}
    for name, (kernel, bias) in arrays.items():
        named[f"block{name[4]}_conv{name[6]}/kernel:0"] = kernel
        named[f"block{name[4]}_conv{name[6]}/bias:0"] = bias
    params = vgg_weights._to_params(vgg_weights._rename(named, "Caffe"), "Caffe")
    images = np.random.default_rng(1).uniform(-1, 1, (1, 32, 32, 3))
    actual = vgg.vgg16_features(params, images.astype(np.float32))[:2]
    for a, b in zip(actual, caffe_features(arrays, images)[:2], strict=True):
        assert np.abs(a - b)[:, 3:-3, 3:-3].max() < 1e-5 * np.abs(b).max()


# Mistakes.


def test_one_error_lists_all_that_is_wrong(tmp_path):
    arrays = torch_arrays()
    del arrays["features.2.bias"], arrays["features.5.weight"]
    arrays["features.7.bias"] = np.zeros(64, np.float32)
    arrays["features.10.weight"][0, 0, 0, 0] = np.inf
    path = tmp_path / "vgg.safetensors"
    save_file(arrays, path)
    with pytest.raises(ValueError) as error:
        load_vgg_params(str(path))
    for part in (
        f"{path} does not fit",
        "conv1_2/bias is missing",
        "conv2_1/kernel is missing",
        "conv2_2/bias is (64,), not (128,)",
        "conv3_1/kernel is not finite",
    ):
        assert part in str(error.value)


def test_no_vgg_at_all(tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_file({"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}, path)
    with pytest.raises(ValueError, match="resnet.safetensors does not fit: conv1_1"):
        load_vgg_params(str(path))


def test_the_environment_variable_comes_first(tmp_path, monkeypatch):
    save_file(torch_arrays(), tmp_path / "a.safetensors")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "vgg16.safetensors").write_bytes(b"broken")
    monkeypatch.setenv("PCONV_VGG16", str(tmp_path / "a.safetensors"))
    assert_same(load_vgg_params())
    monkeypatch.setenv("PCONV_VGG16", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="there is no file .*none.pth"):
        load_vgg_params()
    monkeypatch.setenv("PCONV_VGG16", "")
    with pytest.raises(ValueError, match="vgg16.safetensors cannot be read"):
        load_vgg_params()


def test_a_damaged_cache_is_noticed(tmp_path):
    path = tmp_path / "cache" / "vgg16.safetensors"
    arrays = {}
    for name, (kernel, bias) in make_arrays().items():
        arrays |= {f"{name}/kernel": kernel, f"{name}/bias": bias}
    write_cache(path, arrays)
    assert os.listdir(path.parent) == [path.name]
    assert_same(load_vgg_params())
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged; delete it"):
        load_vgg_params()


# The Hub.


def load_in_a_process(address, tmp_path, **environment):
    """Load 'imagenet' in a process from a Hub at an address."""
    code = """
import sys
from pconv_jax.weights.vgg import load_vgg_params
try:
    params = load_vgg_params()
except ValueError as error:
    sys.exit(str(error))
print(sorted(params), params["conv3_3"]["kernel"].shape)
"""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=os.environ
        | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_takes_no_more_than_it_needs(ranges, tmp_path):
    arrays = torch_arrays()
    arrays["pre_logits.fc1.weight"] = np.ones((4096, 512, 2, 2), np.float32)
    data = save(arrays)
    with file_server.serve({HUB_PATH: data}, ranges) as (address, log):
        result = load_in_a_process(address, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "(3, 3, 256, 256)" in result.stdout
    needed = sum(k.nbytes + b.nbytes for k, b in make_arrays().values())
    fetched = sum(size for _, _, size in log)
    assert fetched < needed + 10_000 if ranges else fetched == len(data)
    assert_same(load_vgg_params())
    assert len(load_file(tmp_path / "cache" / "vgg16.safetensors")) == 14


def test_a_later_download_must_be_the_first_one(tmp_path):
    arrays = torch_arrays()
    first = {HUB_PATH: save(arrays)}
    newest = HUB_PATH.replace(REVISION, "main")
    with file_server.serve(first) as (address, _):
        assert load_in_a_process(address, tmp_path).returncode == 0
    remembered = json.loads((tmp_path / "cache" / "downloads.json").read_text())
    (entry,) = remembered.values()
    assert entry["revision"] == REVISION and len(entry["sha256"]) == 14
    (tmp_path / "cache" / "vgg16.safetensors").unlink()
    # The same again, of the same revision, whatever is the newest one.
    arrays["features.0.bias"] = arrays["features.0.bias"] + 1
    files = {newest: save(arrays), HUB_PATH: first[HUB_PATH]}
    with file_server.serve(files) as (address, log):
        result = load_in_a_process(address, tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path for path, *_ in log} == {HUB_PATH}
    (tmp_path / "cache" / "vgg16.safetensors").unlink()
    with file_server.serve({HUB_PATH: save(arrays)}) as (address, _):
        result = load_in_a_process(address, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "features.0.bias differ from the first download" in result.stderr
    (tmp_path / "cache" / "downloads.json").write_text("[")
    with file_server.serve({HUB_PATH: save(arrays)}) as (address, _):
        result = load_in_a_process(address, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "downloads.json cannot be read" in result.stderr


def test_the_revision_is_the_one_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(file_server, "revision_of", lambda path: "0" * 40)
    with file_server.serve({HUB_PATH: save(torch_arrays())}) as (address, _):
        result = load_in_a_process(address, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"the Hub gave revision {'0' * 40}, not {REVISION}" in result.stderr


@pytest.mark.parametrize("case", ["html", "lies", "short", "half", "nothing", "closed"])
def test_a_download_that_fails(case, tmp_path):
    arrays = torch_arrays()
    if case == "lies":
        arrays["features.0.weight"] = np.ones((64, 4, 3, 3), np.float32)
    if case == "half":
        arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    data = save(arrays)
    if case == "html":
        data = b"<html>" * 100
    if case == "short":
        data = data[:100_000]
    files = {} if case == "nothing" else {HUB_PATH: data}
    with file_server.serve(files) as (address, _):
        if case != "closed":
            result = load_in_a_process(address, tmp_path)
    if case == "closed":
        result = load_in_a_process(address, tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    if case == "lies":
        assert "conv1_1/kernel is (3, 3, 4, 64), not (3, 3, 3, 64)" in result.stderr
    else:
        assert "There are no VGG16 weights" in result.stderr
        assert str(tmp_path / "cache" / "vgg16.safetensors") in result.stderr
        assert f"huggingface.co{HUB_PATH}" in result.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["block1_conv1_W", "features.0.weight", "conv1_1_W"])
def test_arrays_of_texts(name, tmp_path):
    path = tmp_path / "vgg.npz"
    bias = {"block1_conv1_b": np.full(64, "b")}
    np.savez(path, **{name: np.full((3, 3, 3, 64), "a")}, **bias)
    with pytest.raises(UserError, match="vgg.npz does not fit: conv1_1/"):
        load_vgg_params(path)
