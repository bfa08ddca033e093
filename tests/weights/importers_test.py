import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import save_file

from pconv_jax import layers, ops
from pconv_jax.unet import Stage
from pconv_jax.weights import importers
from pconv_jax.weights.formats.arrays import read_arrays
from tests.helpers import TESTDATA, reference, torch_writer
from tests.helpers.networks import small_mmagic

pytestmark = pytest.mark.usefixtures("fast_compilation")

UNETS = np.load(TESTDATA / "unets.npz")

CRAI = np.load(TESTDATA / "crai" / "golden.npz")

NVIDIA = np.load(TESTDATA / "nvidia_partialconv.npz")


DUMPS = {"zip": torch_writer.dump_zip, "legacy": torch_writer.dump_legacy}


def state_dict(text, by_window, masks=False):
    """Make weights by a recipe, with the names and the form of the original."""
    shapes = [(n, shape) for n, shape in json.loads(str(text))]
    weights = {}
    for name, array in reference.recipe_weights(1, shapes).items():
        if name.endswith("num_batches_tracked"):
            weights[name] = np.array(7, np.int64)
        elif "mask" in name:
            if masks or "1.conv" in name:
                weights[name] = np.ones_like(array)
        elif array.ndim == 4 and by_window:
            weights[name] = array * np.float32(np.prod(array.shape[1:]))
        else:
            weights[name] = array
    return weights


def naoto0804():
    return state_dict(UNETS["naoto0804/state_dict"], by_window=True)


def mmagic():
    return state_dict(UNETS["mmagic/state_dict"], by_window=False)


def crai():
    return state_dict(CRAI["state_dict"], by_window=True, masks=True)


def apply(imported, images, mask):
    return jax.jit(imported.model.apply)(imported.variables, images, mask)


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


# Networks of others.


def check_mmagic(imported):
    """Compare with the original, whose images are BGR."""
    assert imported.project == "open-mmlab/mmagic"
    x, mask = UNETS["x"][..., ::-1], UNETS["mask"].astype(np.float32)
    y, new_mask = apply(imported, x, mask)
    assert relative_error(y[..., ::-1], UNETS["mmagic/y"]) < 1e-5
    assert np.all(new_mask == 1)


def check_naoto0804(imported):
    """Compare with the original, whose images are normalized as ImageNet's."""
    assert imported.project == "naoto0804/pytorch-inpainting-with-partial-conv"
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def to_images(x):
        return ((x * std + mean) * 2 - 1).astype(np.float32)

    mask = UNETS["mask"].astype(np.float32)
    y, _ = apply(imported, to_images(UNETS["x"]), mask)
    assert relative_error(y, to_images(UNETS["naoto0804/y"])) < 1e-5


NETWORKS = {"mmagic": (mmagic, check_mmagic), "naoto0804": (naoto0804, check_naoto0804)}


@pytest.mark.parametrize(
    ("name", "form", "wrap"),
    [
        ("mmagic", "legacy", lambda d: {f"generator.{k}": a for k, a in d.items()}),
        ("naoto0804", "zip", lambda d: {f"module.{k}": a for k, a in d.items()}),
    ],
)
def test_networks_equal_the_originals(name, form, wrap, tmp_path):
    weights, check = NETWORKS[name]
    path = tmp_path / "weights.pth"
    optimizer = {"state": {0: {"exp_avg": np.zeros((2, 3), np.float32)}}}
    checkpoint = {"n_iter": 10, "model": wrap(weights()), "optimizer": optimizer}
    path.write_bytes(DUMPS[form](checkpoint))
    check(importers.import_network(read_arrays(path), path))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_originals_own_input_and_output_from_plain_arrays(name):
    weights, _ = NETWORKS[name]
    imported = importers.import_network(weights(), name, raw=True)
    y, _ = apply(imported, UNETS["x"], UNETS["mask"].astype(np.float32))
    assert relative_error(y, UNETS[f"{name}/y"]) < 1e-5
    assert "as the original does" in imported.notes[0]
    encoder, decoder = imported.model.stages
    assert [stage.features for stage in encoder] == [64, 128, 256] + [512] * 4
    assert [stage.kernel_size for stage in encoder] == [7, 5, 5, 3, 3, 3, 3]
    assert encoder[0] == Stage(64, 7, batch_norm=False)
    assert decoder[0] == Stage(512, 3, negative_slope=0.2)
    assert decoder[-1] == Stage(3, 3, batch_norm=False, negative_slope=None)
    kernel = imported.variables["params"]["pconv8"]["kernel"]
    assert kernel.shape == (3, 3, 1024, 512) and kernel.dtype == np.float32


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_from_files_that_torch_writes(name, legacy, tmp_path):
    torch = pytest.importorskip("torch")
    weights, check = NETWORKS[name]
    tensors = {k: torch.from_numpy(np.array(a)) for k, a in weights().items()}
    path = tmp_path / "weights.pth"
    new = not legacy
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=new)
    check(importers.import_network(read_arrays(path), path))


@pytest.mark.parametrize("form", DUMPS)
def test_climatereconstructionai_equals_the_original(form, tmp_path):
    path = tmp_path / "weights.pth"
    checkpoint = {"labels": ["10", "20"]}
    for label, factor in (("10", np.float32(0)), ("20", np.float32(1))):
        weights = {k: np.asarray(a * factor, a.dtype) for k, a in crai().items()}
        checkpoint[label] = {"n_iter": int(label), "model": weights, "optimizer": {}}
    path.write_bytes(DUMPS[form](checkpoint))
    imported = importers.import_network(read_arrays(path), path)
    assert imported.project == "FREVA-CLINT/climatereconstructionAI"
    assert imported.model.stages[0][0] == Stage(3, 7, batch_norm=False)
    assert imported.model.stages[1][0] == Stage(6, 3, negative_slope=0.01)
    y, _ = apply(imported, CRAI["x"], CRAI["mask"].astype(np.float32))
    assert relative_error(y, CRAI["y"]) < 1e-6


def test_climatereconstructionai_reproduces_its_published_field():
    folder = os.environ.get("PCONV_TEST_WEIGHTS")
    if not folder:
        pytest.skip("PCONV_TEST_WEIGHTS names no folder with the project's files")
    h5py = pytest.importorskip("h5py")
    folder = pathlib.Path(folder) / "crai"
    x, expected = (
        h5py.File(folder / name)["tas"][()][..., None]
        for name in ("tas_hadcrut_187709_189308.nc", "minimum-1_infilled.nc")
    )
    mask = (x < 1e19).astype(np.float32)
    path = folder / "minimum-1.inp.pth"
    imported = importers.import_network(read_arrays(path), path)
    filled = ops.composite(apply(imported, x, mask)[0], x, mask)
    assert (
        np.abs(filled - expected).max() < 1e-7 * np.abs(expected[mask == 0]).max() * 2
    )
    assert np.abs(filled - expected).max() < 2e-9


def keras_weights(width=4, depth=3, first=17):
    """Make weights with the names of Keras, which numbers all layers of a session."""
    rng = np.random.default_rng(0)
    features = [width * 2 ** min(i, 3) for i in range(depth)]
    channels = [3, *features[:-1]]
    features += [*reversed(features[:-1]), 3]
    channels += [
        features[depth + i - 1] + skip
        for i, skip in enumerate(reversed(channels[:depth]))
    ]
    weights = {}

    def add(layer, leaf, array):
        weights[f"{layer}/{layer}/{leaf}:0"] = array.astype(np.float32)

    for i, (c, f) in enumerate(zip(channels, features)):
        k = (7, 5, 5)[i] if i < min(depth, 3) else 3
        kernel = rng.standard_normal((k, k, c, f)) / k
        add(f"p_conv2d_{first + i}", "img_kernel", kernel)
        add(f"p_conv2d_{first + i}", "bias", 0.3 * rng.standard_normal(f))
        if 0 < i < 2 * depth - 1:
            norm = f"EncBN{i}" if i < depth else f"batch_normalization_{i - depth + 9}"
            add(norm, "gamma", rng.uniform(0.5, 1.5, f))
            add(norm, "beta", rng.standard_normal(f))
            add(norm, "moving_mean", rng.standard_normal(f))
            add(norm, "moving_variance", 10 ** rng.uniform(-3, 1, f))
    add("conv2d_3", "kernel", rng.standard_normal((1, 1, 3, 3)) / 10)
    add("conv2d_3", "bias", rng.standard_normal(3))
    return weights


def keras_network(weights, images, mask, depth=3, first=17):
    """MathiasGruber/PConv-Keras, on images in [0, 1]; holes have the bias."""

    def get(layer, leaf):
        return weights[f"{layer}/{layer}/{leaf}:0"]

    def conv(x, kernel, stride):
        pad = [((kernel.shape[0] - 1) // 2,) * 2] * 2
        numbers = ("NHWC", "HWIO", "NHWC")
        return np.asarray(
            lax.conv_general_dilated(
                x.astype(np.float32),
                kernel,
                (stride,) * 2,
                pad,
                dimension_numbers=numbers,
            ),
            np.float64,
        )

    def block(i, x, m, stride, norm, slope):
        kernel = get(f"p_conv2d_{first + i}", "img_kernel")
        total = conv(m, np.ones_like(kernel), stride)
        new_mask = np.clip(total, 0, 1)
        ratio = kernel.shape[0] * kernel.shape[1] / (total + 1e-8) * new_mask
        y = conv(x * m, kernel, stride) * ratio + get(f"p_conv2d_{first + i}", "bias")
        if norm:
            gamma, beta, mean, var = (
                get(norm, n)
                for n in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            y = (y - mean) / np.sqrt(var.astype(np.float64) + 1e-3) * gamma + beta
        return np.where(y > 0, y, slope * y), new_mask

    def up(x):
        return x.repeat(2, axis=1).repeat(2, axis=2)

    h, m = images, np.broadcast_to(mask, images.shape)
    skips = []
    for i in range(depth):
        skips.append((h, m))
        h, m = block(i, h, m, 2, f"EncBN{i}" if i else None, 0.0)
    for i in range(depth, 2 * depth):
        skip, skip_mask = skips.pop()
        h = np.concatenate([skip, up(h)], axis=-1)
        m = np.concatenate([skip_mask, up(m)], axis=-1)
        norm = f"batch_normalization_{i - depth + 9}" if i < 2 * depth - 1 else None
        h, m = block(i, h, m, 1, norm, 0.2)
    y = h @ get("conv2d_3", "kernel")[0, 0] + get("conv2d_3", "bias")
    return 1 / (1 + np.exp(-y)), m


def make_inputs(size=32):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    mask = (rng.uniform(size=(2, size, size, 1)) < 0.7).astype(np.float32)
    mask[:, 4:15, 6:20] = 0
    return images, mask


def test_pconv_keras_equals_the_original():
    weights = keras_weights()
    imported = importers.import_network(weights, "keras.h5")
    assert imported.project == "MathiasGruber/PConv-Keras"
    images, mask = make_inputs()
    y, new_mask = apply(imported, images, mask)
    expected, expected_mask = keras_network(weights, (images + 1) / 2, mask)
    np.testing.assert_array_equal(new_mask, expected_mask[..., :1])
    np.testing.assert_allclose(y, 2 * expected - 1, atol=2e-5)
    assert np.std(expected) > 0.1
    raw = importers.import_network(weights, raw=True)
    y, _ = apply(raw, (images + 1) / 2, mask)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_pconv_keras_names_its_head_in_two_ways():
    weights = keras_weights()
    later = {k.replace("conv2d_3/", "outputs_img/"): a for k, a in weights.items()}
    later = {k.replace("p_outputs_img", "p_conv2d_3"): a for k, a in later.items()}
    assert "outputs_img/outputs_img/kernel:0" in later
    a, b = (importers.import_network(w).variables for w in (weights, later))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_pconv_keras_where_a_hole_stays_open():
    weights = keras_weights()
    imported = importers.import_network(weights, "keras.h5")
    images, mask = make_inputs(64)
    mask[:] = 1
    mask[:, :, 8:] = 0
    y, new_mask = apply(imported, images, mask)
    expected, expected_mask = keras_network(weights, (images + 1) / 2, mask)
    np.testing.assert_array_equal(new_mask, expected_mask[..., :1])
    still_open = new_mask[..., 0] == 0
    assert still_open.any() and not still_open.all()
    np.testing.assert_allclose(y[~still_open], 2 * expected[~still_open] - 1, atol=2e-5)
    assert not np.any(y[still_open])


@pytest.mark.parametrize("prefix", ["", "model_weights/"])
def test_pconv_keras_from_a_file(prefix, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    weights = keras_weights()
    with h5py.File(path, "w") as file:
        file.attrs["backend"] = "tensorflow"
        for name, array in weights.items():
            file[prefix + name] = array
        file["optimizer_weights/training/Adam/iterations:0"] = np.array(7)
    arrays = read_arrays(path)
    np.testing.assert_array_equal(
        arrays[f"{prefix}EncBN1/EncBN1/gamma:0"], weights["EncBN1/EncBN1/gamma:0"]
    )
    a = importers.import_network(arrays, path).variables
    b = importers.import_network(weights, path).variables
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_small_networks_are_recognized():
    imported = importers.import_network(small_mmagic(), "small")
    model = imported.model
    assert [stage.features for stage in model.encoder] == [4, 8]
    assert (model.depth, model.width, model.out_features) == (2, 4, 3)
    images, mask = make_inputs()
    y, _ = apply(imported, images, mask)
    assert y.shape == images.shape


@pytest.mark.parametrize(
    "file",
    [
        "w.pth",
        "w.pt",
        "w.PTH",
        "w.pth.tar",
        "w.ckpt",
        "w.bin",
        "w.npz",
        "w.safetensors",
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_network_from_the_path_of_a_file(file, dtype, tmp_path):
    path = tmp_path / file
    if (file, dtype) == ("w.npz", ml_dtypes.bfloat16):
        pytest.skip("NumPy's files have no bfloat16")
    weights = {k: a.astype(dtype) for k, a in small_mmagic().items()}
    expected = importers.import_network(weights)
    weights["encoder.enc2.bn.num_batches_tracked"] = np.array(5, np.int64)
    if path.suffix == ".npz":
        np.savez(path, **weights)
    elif path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        optimizer = {"param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "foo": None}]}
        path.write_bytes(
            torch_writer.dump_zip(
                {"state_dict": weights, "epoch": 3, "optimizer": optimizer}
            )
        )
    for source in (path, str(path)):
        imported = importers.import_network(source)
        jax.tree.map(
            np.testing.assert_array_equal, imported.variables, expected.variables
        )


def test_a_bias_before_a_normalization():
    """naoto0804's first version has them. A constant only shifts the mean."""
    weights = {
        name.replace("input_conv", "conv2d").replace("mask_conv", "mask2d"): array
        for name, array in naoto0804().items()
    }
    old = {k: v for k, v in weights.items() if "enc_1.conv.conv2d.bias" not in k}
    biases = {
        f"{side}_{level}.conv.conv2d.bias": np.full(
            len(weights[f"{side}_{level}.conv.conv2d.weight"]), 0.25, np.float32
        )
        for side, level in [("enc", 3), ("dec", 4)]
    }
    shifted = dict(old)
    for name in biases:
        mean = name.replace("conv.conv2d.bias", "bn.running_mean")
        shifted[mean] = old[mean] + 0.25
    with_bias = importers.import_network(old | biases, "old").variables
    without = importers.import_network(old, "old").variables
    changed = importers.import_network(shifted | biases, "old").variables
    for number in (3, 11):
        a, b, c = (
            v["batch_stats"][f"bn{number}"]["mean"]
            for v in (with_bias, without, changed)
        )
        np.testing.assert_allclose(a, b - 0.25, atol=1e-6)
        np.testing.assert_allclose(c, b, atol=1e-6)
    assert "bias" not in with_bias["params"]["pconv3"]


# Mistakes.


def test_one_error_lists_all_that_is_wrong():
    weights = small_mmagic()
    del weights["decoder.dec2.bn.running_var"], weights["encoder.enc2.conv.weight"]
    weights["decoder.dec1.conv.bias"] = np.zeros(4, np.float32)
    weights["encoder.enc1.conv.bias"][1] = np.nan
    weights["encoder.enc1.bn2.weight"] = np.zeros(4, np.float32)
    weights["encoder.enc2.conv.weight_mask_updater"] = np.ones((1, 1, 5, 5))
    weights["discriminator.conv.weight"] = np.ones((1, 1, 5, 5))
    prefixed = {f"generator.{name}": array for name, array in weights.items()}
    with pytest.raises(ValueError, match="weights: FILE does not fit") as error:
        importers.import_network(prefixed, "FILE")
    message = str(error.value)
    for part in (
        "generator.decoder.dec2.bn.running_var is missing",
        "generator.encoder.enc2.conv.weight is missing",
        "generator.decoder.dec1.conv.bias is (4,), not (3,)",
        "generator.encoder.enc1.conv.bias is not finite",
        "generator.encoder.enc1.bn2.weight is not known",
        "generator.discriminator.conv.weight is not known",
    ):
        assert part in message, part
    assert "weight_mask_updater" not in message


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("encoder.enc1.conv.weight", np.zeros((4, 3, 7)), r"is \(4, 3, 7\), not"),
        ("encoder.enc1.conv.weight", np.zeros((4, 3, 7, 5)), r"is \(7, 5, 3, 4\), not"),
        ("encoder.enc2.conv.weight", np.zeros((8, 5, 5, 5)), r"not \(5, 5, 4, 8\)"),
        (
            "encoder.enc2.conv.weight",
            np.zeros((0, 4, 5, 5)),
            "impossible|does not fit",
        ),
        (
            "encoder.enc2.conv.weight",
            np.zeros((8, 0, 5, 5)),
            "impossible|does not fit",
        ),
        (
            "encoder.enc2.conv.weight",
            np.zeros((8, 4, 0, 0)),
            "impossible|does not fit",
        ),
        (
            "encoder.enc3.conv.weight",
            np.zeros((8, 8, 3, 3)),
            "enc3.bn.* is missing|dec3",
        ),
        (
            "encoder.enc99.conv.weight",
            np.zeros((8, 8, 3, 3)),
            "is from no known project",
        ),
        ("encoder.enc2.bn.weight", np.full(8, 1e300), "weight is not finite"),
    ],
)
def test_impossible_weights(name, array, problem):
    with pytest.raises(ValueError, match=problem):
        importers.import_network(small_mmagic() | {name: array}, "FILE")


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"conv.weight": np.ones(3)},
        {"encoder.enc0.conv.weight": np.ones((4, 3, 7, 7))},
    ],
)
def test_unknown_weights(arrays):
    with pytest.raises(ValueError, match="FILE is from no known project .*mmagic"):
        importers.import_network(arrays, "FILE")


# Layers.


@pytest.mark.parametrize("index", range(0, 39, 3))
def test_layers_of_nvidia(index):
    case = {
        name.split("/")[1]: NVIDIA[name]
        for name in NVIDIA.files
        if name.startswith(f"{index:03d}/")
    }
    weights = {"block.conv.weight": np.moveaxis(case["kernel"], (-1, -2), (0, 1))}
    if "bias" in case:
        weights["block.conv.bias"] = case["bias"]
    params = importers.import_layers(weights | {"block.bn.weight": np.ones(3)})
    assert list(params) == ["block"] and list(params["block"]) == ["conv"]
    np.testing.assert_array_equal(params["block"]["conv"]["kernel"], case["kernel"])


def test_layers_from_a_file(tmp_path):
    weights = {"conv.weight": np.ones((4, 3, 5, 5), np.float32)}
    (tmp_path / "w.pth").write_bytes(torch_writer.dump_zip({"model": weights}))
    params = importers.import_layers(tmp_path / "w.pth")
    assert params["model"]["conv"]["kernel"].shape == (5, 5, 3, 4)


def test_a_layer_of_nvidia_computes_the_same():
    meta = json.loads(str(NVIDIA["meta"]))
    index = next(i for i, m in enumerate(meta) if m.get("holes") and "2" in str(m))
    case, prefix = meta[index], f"{index:03d}/"
    weights = {
        "weight": np.moveaxis(NVIDIA[prefix + "kernel"], (-1, -2), (0, 1)),
    }
    if prefix + "bias" in NVIDIA:
        weights["bias"] = NVIDIA[prefix + "bias"]
    params = importers.import_layers(weights)
    kernel = params["kernel"]
    layer = layers.PartialConv(
        features=kernel.shape[-1],
        kernel_size=kernel.shape[:-2],
        strides=case.get("stride", 1),
        padding=case.get("padding", 0),
        kernel_dilation=case.get("dilation", 1),
        feature_group_count=case.get("groups", 1),
        use_bias="bias" in params,
    )
    y, _ = layer.apply(
        {"params": params}, NVIDIA[prefix + "x"], NVIDIA[prefix + "mask"]
    )
    assert relative_error(y, NVIDIA[prefix + "y"]) < 1e-5


def test_arrays_of_no_numbers(tmp_path):
    path = tmp_path / "weights.npz"
    weights = small_mmagic()
    name = "encoder.enc1.conv.bias"
    weights[name] = weights[name].astype(ml_dtypes.bfloat16)  # NumPy's has no such.
    np.savez(path, **weights)
    with pytest.raises(ValueError, match=rf"weights.npz does not fit: {name} has typ"):
        importers.import_network(path)
