import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pconv_jax import UserError
from pconv_jax.runs.checkpoint import restore_network
from pconv_jax.train import loop
from pconv_jax.unet import IMAGENET, Normalization, Stage, paper_stages
from pconv_jax.weights import importers, pretrained
from pconv_jax.weights.formats.arrays import read_arrays
from pconv_jax.weights.network_config import model_config
from tests.helpers import ROOT, file_server
from tests.helpers.networks import make_network, small_mmagic, train_config

INFO = {"origin": "a test", "metrics": {"psnr": 28.5}, "notes": ["é"], "steps": [1, 2]}


STAGES = (
    (Stage(3, 5, padding=("CIRCULAR", (2, 2))), Stage(4, 3, negative_slope=0.1)),
    (Stage(3, 3, batch_norm=False), Stage(1, 3, batch_norm=False, negative_slope=None)),
)


@pytest.mark.parametrize(
    ("fields", "channels"),
    [
        ({}, 3),
        ({"conv": "standard"}, 3),
        ({"normalization": IMAGENET}, 3),
        ({"normalization": Normalization((-1.0,), (2.0,)), "sigmoid_head": True}, 3),
        ({"stages": STAGES}, 1),
        ({"out_features": 2}, 5),
    ],
)
def test_round_trip_bit_for_bit(fields, channels, tmp_path):
    model, variables = make_network(channels, **fields)
    path = tmp_path / "sub" / "model.safetensors"
    pretrained.save_pretrained(path, model, variables, info=INFO)
    assert os.listdir(path.parent) == [path.name]
    read = pretrained.from_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, read.variables, variables)
    assert read.info == INFO
    assert model_config(read.model) == model_config(model)
    sizes = len(model.encoder), model.encoder[0].features, model.decoder[-1].features
    assert (read.model.depth, read.model.width, read.model.out_features) == sizes
    hash(read.model)  # As functools.lru_cache wants it.
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (1, 16, 16, channels)).astype(np.float32)
    mask = (rng.uniform(size=(1, 16, 16, 1)) < 0.7).astype(np.float32)
    a, b = (m.apply(v, images, mask)[0] for m, v in ((model, variables), read[:2]))
    np.testing.assert_array_equal(a, b)
    again = tmp_path / "again.safetensors"
    pretrained.save_pretrained(again, *read[:2], info=read.info)
    assert again.read_bytes() == path.read_bytes()


def test_kernels_in_half_the_bytes(tmp_path):
    model, variables = make_network()
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    pretrained.save_pretrained(whole, model, variables)
    pretrained.save_pretrained(half, model, variables, kernels="float16")
    kernels = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(variables)
        if path[-1].key == "kernel"
    ]
    saved = 2 * sum(kernel.size for kernel in kernels)
    assert whole.stat().st_size - half.stat().st_size == pytest.approx(saved, abs=200)
    read = pretrained.from_pretrained(half).variables
    for (path, a), b in zip(
        jax.tree.leaves_with_path(read), jax.tree.leaves(variables), strict=True
    ):
        assert a.dtype == np.float32
        # float16 has 11 significant bits.
        rtol = 2.0**-11 if path[-1].key == "kernel" else 0
        np.testing.assert_allclose(a, b, rtol=rtol)
    variables["params"]["pconv1"]["kernel"][0, 0, 0, 0] = 7e4
    with pytest.raises(ValueError, match="kernels: there are some beyond 65504"):
        pretrained.save_pretrained(half, model, variables, kernels="float16")
    with pytest.raises(UserError, match="kernels must be .*int8, got 'half'"):
        pretrained.save_pretrained(half, model, variables, kernels="half")


def test_kernels_in_a_quarter_of_the_bytes(tmp_path):
    model, variables = make_network()
    variables["params"]["pconv2"]["kernel"][..., 1] = 0
    path = tmp_path / "int8.safetensors"
    pretrained.save_pretrained(path, model, variables, kernels="int8")
    stored = read_arrays(path)
    read = pretrained.from_pretrained(path).variables
    for (keys, a), b in zip(
        jax.tree.leaves_with_path(read), jax.tree.leaves(variables), strict=True
    ):
        assert a.dtype == np.float32
        if keys[-1].key != "kernel":
            np.testing.assert_array_equal(a, b)
            continue
        kernel = stored["/".join(key.key for key in keys)]
        assert kernel.dtype == np.int8 and kernel.shape == b.shape
        # Half a step of 1/127 of the largest value of the feature, and rounding.
        largest = np.abs(b).max((0, 1, 2))
        assert (np.abs(a - b) <= (0.5 / 127 + 1e-6) * largest).all()
        np.testing.assert_allclose(np.abs(a).max((0, 1, 2)), largest, rtol=1e-6)
    again = tmp_path / "again.safetensors"
    pretrained.save_pretrained(again, model, read, kernels="int8")
    for name, array in read_arrays(again).items():
        np.testing.assert_allclose(array, stored[name], rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        dict(scale=np.ones(5, np.float32)),
        dict(scale=np.ones(4, np.float16)),
        dict(kernel=np.ones((7, 7, 3, 4), np.float32)),
        dict(kernel=None),
        dict(scale=None),
    ],
    ids=["shape", "dtype", "no int8", "no kernel", "no scale"],
)
def test_scales_that_do_not_fit_are_damage(change, tmp_path):
    model, variables = make_network()
    path = tmp_path / "model.safetensors"
    pretrained.save_pretrained(path, model, variables, kernels="int8")
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    arrays = read_arrays(path)
    name = "params/pconv1/kernel"
    assert arrays[name].shape == (7, 7, 3, 4)
    arrays |= {name: change.get("kernel", arrays[name])}
    arrays |= {f"{name}_scale": change.get("scale", arrays[f"{name}_scale"])}
    save_file({n: a for n, a in arrays.items() if a is not None}, path, metadata)
    with pytest.raises(UserError, match="pconv1/kernel and its scale do not fit"):
        pretrained.from_pretrained(path)


def test_what_only_says_how_it_is_computed_is_left_out(tmp_path):
    model, variables = make_network(dtype=jnp.bfloat16, axis_name="batch")
    path = tmp_path / "model.safetensors"
    pretrained.save_pretrained(path, model, variables)
    read = pretrained.from_pretrained(str(path))
    assert read.model.dtype is None and read.model.axis_name is None
    assert read.info == {}


def test_the_metadata_is_plain_json(tmp_path):
    model, variables = make_network()
    path = tmp_path / "model.safetensors"
    pretrained.save_pretrained(path, model, variables, info=INFO)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["pconv_jax"])
        assert "params/pconv1/kernel" in file.keys()
    assert header["format"] == 1 and header["info"] == INFO
    stage = header["model"]["stages"][0][0]
    assert stage["features"] == 4 and stage["kernel_size"] == 7


def test_the_normalization_is_done_and_undone():
    model, variables = make_network()
    normalized = model.clone(normalization=IMAGENET)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    mask = np.ones((1, 16, 16, 1), np.float32)
    mask[:, 4:9, 4:9] = 0
    images[:, 4:9, 4:9] = np.nan
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inside = (((images + 1) / 2 - mean) / std).astype(np.float32)
    expected = (model.apply(variables, inside, mask)[0] * std + mean) * 2 - 1
    actual = normalized.apply(variables, images, mask)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert not np.any(normalized.apply(variables, images, 0 * mask)[0])


# Mistakes.


def test_one_error_lists_all_that_is_wrong_with_variables(tmp_path):
    model, variables = make_network()
    del variables["params"]["pconv2"]
    variables["params"]["pconv1"]["bias"] = np.zeros(5, np.float32)
    variables["params"]["extra"] = {"kernel": np.zeros(5, np.float32)}
    variables["batch_stats"]["bn2"]["mean"][0] = np.nan
    with pytest.raises(ValueError) as error:
        pretrained.save_pretrained(tmp_path / "m.safetensors", model, variables)
    for part in (
        "params/pconv2/kernel is missing",
        "params/pconv1/bias is (5,), not (4,)",
        "params/extra/kernel is not known",
        "batch_stats/bn2/mean is not finite",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved(tmp_path):
    model, variables = make_network()
    half = jax.tree.map(lambda a: a.astype(np.float16), variables)
    path = tmp_path / "m.safetensors"
    with pytest.raises(
        ValueError, match="must be float32, but .*pconv1/kernel is float"
    ):
        pretrained.save_pretrained(path, model, half)
    with pytest.raises(ValueError, match="info must be writable as JSON"):
        pretrained.save_pretrained(path, model, variables, info={"a": np.ones(3)})
    with pytest.raises(
        ValueError, match="a weights file is a .safetensors file, got .*m.pth"
    ):
        pretrained.save_pretrained(tmp_path / "m.pth", model, variables)
    assert not list(tmp_path.iterdir())


def write(path, metadata, arrays=None):
    save_file(arrays or {"a": np.ones(3, np.float32)}, path, metadata)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (None, "is not a weights file of pconv_jax"),
        ({"pconv_jax": "{"}, "is not a weights file of pconv_jax"),
        ({"pconv_jax": "[" * 100_000}, "is not a weights file of pconv_jax"),
        ({"pconv_jax": "[]"}, "weights file of another version"),
        ({"pconv_jax": '{"format": 3}'}, "weights file of another version"),
        ({"pconv_jax": '{"format": 1}'}, "does not describe a network"),
        (
            {"pconv_jax": '{"format": 1, "model": {}}'},
            "does not describe a network",
        ),
    ],
)
def test_files_that_are_no_weights_files(metadata, problem, tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, metadata)
    with pytest.raises(ValueError, match=f"m.safetensors .*{problem}"):
        pretrained.from_pretrained(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"unknown": 1},
        lambda m: m | {"stages": 5},
        lambda m: m | {"stages": [[], []]},
        lambda m: m | {"stages": m["stages"][:1]},
        lambda m: m | {"stages": m["stages"] * 2},
        lambda m: m | {"stages": [m["stages"][0] * 10_000, m["stages"][1] * 10_000]},
        lambda m: m | {"stages": [m["stages"][0][:1], m["stages"][1]]},
        lambda m: m | {"stages": [[{"features": "a", "kernel_size": 3}]] * 2},
        lambda m: m | {"stages": [[{"features": -1, "kernel_size": 3}]] * 2},
        lambda m: m | {"stages": [[{"features": 10**30, "kernel_size": 10**30}]] * 2},
        *(
            lambda m, wrong=wrong: (
                m | {"stages": [[m["stages"][0][0] | wrong], m["stages"][1][-1:]]}
            )
            for wrong in (
                {"kernel_size": 0},
                {"batch_norm": "no"},
                {"negative_slope": "a"},
                {"negative_slope": 10**30},
                {"padding": "a"},
                {"padding": [1]},
                {"padding": [1, [2, 2, 2]]},
                {"padding": 10**30},
                {"padding": 0},
            )
        ),
        lambda m: m | {"conv": "gated"},
        lambda m: m | {"sigmoid_head": 1},
        lambda m: m | {"normalization": {"mean": [1, 2], "std": [1, 2]}},
        lambda m: m | {"normalization": {"mean": "a", "std": [1]}},
        lambda m: m | {"normalization": 3},
    ],
)
def test_configurations_that_make_no_sense(change, tmp_path):
    model, variables = make_network()
    path = tmp_path / "m.safetensors"
    pretrained.save_pretrained(path, model, variables)
    arrays = read_arrays(path)
    header = {"format": 1, "model": change(model_config(model)), "info": {}}
    write(path, {"pconv_jax": json.dumps(header)}, arrays)
    with pytest.raises(ValueError, match="m.safetensors"):
        pretrained.from_pretrained(path)


@pytest.mark.parametrize(
    "info", [5, [1], "text", {"notes": 3}, {"notes": "text"}, {"warnings": [{}]}]
)
def test_info_of_another_form(info, tmp_path):
    model, variables = make_network()
    path = tmp_path / "m.safetensors"
    pretrained.save_pretrained(path, model, variables)
    arrays = read_arrays(path)
    header = {"format": 1, "model": model_config(model), "info": info}
    write(path, {"pconv_jax": json.dumps(header)}, arrays)
    with pytest.raises(UserError, match="m.safetensors is damaged: .* info"):
        pretrained.from_pretrained(path)


def test_damaged_files(tmp_path):
    model, variables = make_network()
    path = tmp_path / "m.safetensors"
    pretrained.save_pretrained(path, model, variables)
    data = path.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="m.safetensors cannot be read"):
            pretrained.from_pretrained(path)
    path.write_bytes(data)
    pretrained.from_pretrained(path)
    path.write_bytes(data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:])
    with pytest.raises(ValueError, match="m.safetensors is damaged"):
        pretrained.from_pretrained(path)


def test_files_without_a_checksum(tmp_path):
    model, variables = make_network()
    path = tmp_path / "m.safetensors"
    pretrained.save_pretrained(path, model, variables)
    header = {"format": 1, "model": model_config(model)}
    write(path, {"pconv_jax": json.dumps(header)}, read_arrays(path))
    read = pretrained.from_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, read.variables, variables)


def test_names_and_paths_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"of that name \(photos\).*pconv convert"):
        pretrained.from_pretrained("places")
    with pytest.raises(ValueError, match="there is no file"):
        pretrained.from_pretrained(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a folder. .*'pconv convert"):
        pretrained.from_pretrained(tmp_path)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match="'pconv convert.* makes one of other"):
        pretrained.from_pretrained(tmp_path / "weights.pth")


# The Hub.


def read_in_a_process(source, address, tmp_path):
    code = f"""
import sys
from pconv_jax.weights import pretrained
try:
    print(pretrained.from_pretrained({source!r}).info)
except ValueError as error:
    sys.exit(str(error))
"""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment | {"HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_repository_on_the_hub(tmp_path):
    model, variables = make_network()
    path = tmp_path / "m.safetensors"
    pretrained.save_pretrained(path, model, variables, info={"origin": "the Hub"})
    data = path.read_bytes()
    files = {
        f"/someone/places/resolve/{revision}/model.safetensors": data
        for revision in ("main", "0" * 40)
    }
    with file_server.serve(files) as (address, log):
        result = read_in_a_process("someone/places", address, tmp_path / "hf")
        assert "the Hub" in result.stdout, result.stderr
        count = len(log)
        result = read_in_a_process("someone/places", address, tmp_path / "hf")
        assert "the Hub" in result.stdout and len(log) == count
        result = read_in_a_process("someone/faces", address, tmp_path / "hf")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "someone/faces/resolve/main/model.safetensors" in result.stderr


# Training.


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation_once")
@pytest.mark.parametrize("normalization", ["none", "imagenet"])
def test_training_goes_on_from_an_imported_network(normalization, tmp_path):
    imported = importers.import_network(small_mmagic(), "small")
    model = imported.model
    if normalization == "imagenet":
        model = model.clone(normalization=IMAGENET)
    # The paper's kernels are 7, 5, 5, 3, ..., and so are these.
    encoder, decoder = paper_stages(depth=2, width=4)
    assert model.stages == (encoder, decoder)
    path = tmp_path / "m.safetensors"
    pretrained.save_pretrained(path, model, imported.variables)
    fields = {"phase2.learning_rate": 1e-9, "model.normalization": normalization}
    workdir = tmp_path / "run"
    loop.train_and_evaluate(train_config(path, **fields), workdir)
    _, items, _ = restore_network(workdir / "checkpoints")
    expected = imported.variables["params"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        items["params"],
        expected,
    )
    changed = jax.tree.map(lambda a, b: np.any(a != b), items["params"], expected)
    assert any(jax.tree.leaves(changed))


@pytest.mark.usefixtures("fast_compilation_once")
@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"model.width": 8}, "other stages than .*2 encoder stages of .4, 8. features"),
        ({"model.normalization": "imagenet"}, "other normalization than"),
        ({"model.conv": "standard"}, "other conv than"),
    ],
)
def test_training_from_another_network(fields, difference, tmp_path):
    model, variables = make_network()
    path = tmp_path / "m.safetensors"
    pretrained.save_pretrained(path, model, variables)
    with pytest.raises(ValueError, match=f"init_from: .*{difference}"):
        loop.train_and_evaluate(train_config(path, **fields), tmp_path / "run")


@pytest.mark.parametrize("name", pretrained.BUNDLED)
def test_bundled_networks_are_whole_and_speak_of_nobodys_machine(name):
    path = pretrained.BUNDLED[name]
    assert path.stat().st_size < 70e6
    network = pretrained.from_pretrained(name)
    info = json.dumps(network.info)
    assert '"/' not in info and "~" not in info  # No path of its makers.
    fields = network.info["experiment"]["model"]
    assert len(network.model.encoder) == network.model.depth == fields["depth"]
    assert network.model.width == fields["width"]
    assert (path.parent / "README.md").is_file()


def test_the_first_bundled_network_is_the_default():
    default = pretrained.from_pretrained()
    assert default.info == pretrained.from_pretrained("photos").info


def test_a_pipe_is_not_a_weights_file(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")  # Opening it would wait forever.
    assert not pretrained.is_weights_file(tmp_path / "a.safetensors")
