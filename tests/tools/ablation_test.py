import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import UserError, ops
from pconv_jax.evaluate import results
from pconv_jax.runs.config import default_config, read_settings
from pconv_jax.train import loop
from pconv_jax.unet import PConvUNet
from tools import ablation

pytestmark = pytest.mark.usefixtures("fast_compilation")


def make_inputs(size=16):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    return images, (rng.random((2, size, size, 1)) > 0.4).astype(np.float32)


def test_version_1_scales_by_the_number_of_valid_inputs():
    """A window by hand: W^T (X * M) / sum(M) + b, with sum(M) over all channels."""
    images, mask = make_inputs()
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(7, 7, 3, 4)), rng.normal(size=4)
    path = (jax.tree_util.DictKey("pconv1"), jax.tree_util.DictKey("kernel"))
    divided = ablation._divide_kernel(path, jnp.asarray(kernel, jnp.float32))
    outputs, _ = ops.partial_conv(images, mask, divided, bias, strides=2, padding=3)
    window, valid = images[0, 3:10, 5:12], mask[0, 3:10, 5:12]
    expected = np.einsum("hwc,hwcf->f", window * valid, kernel) / (3 * valid.sum())
    np.testing.assert_allclose(outputs[0, 3, 4], expected + bias, rtol=1e-4)


def test_version_1_is_another_parametrization_of_version_2():
    images, mask = make_inputs()
    model, v1 = (c(depth=2, width=4) for c in (PConvUNet, ablation.PConvV1))
    variables = jax.jit(v1.init)(jax.random.key(0), images, mask)
    divided = jax.tree.map_with_path(ablation._divide_kernel, variables["params"])
    expected, _ = model.apply(variables | {"params": divided}, images, mask)
    output, _ = jax.jit(v1.apply)(variables, images, mask)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    other, _ = model.apply(variables, images, mask)
    assert np.abs(output - other).max() > 0.1
    assert isinstance(v1.clone(axis_name="batch"), ablation.PConvV1)


def test_mean_filled_network_sees_no_more_of_a_hole_than_the_mean():
    images, mask = make_inputs()
    model = ablation.MeanFilledUNet(depth=2, width=4, conv="standard")
    variables = jax.jit(model.init)(jax.random.key(0), images, mask)
    assert variables["params"]["pconv1"]["kernel"].shape == (7, 7, 5, 4)
    apply = jax.jit(model.apply)
    output, _ = apply(variables, images, mask)
    other = np.where(mask == 1, images, np.nan)
    np.testing.assert_array_equal(apply(variables, other, mask)[0], output)
    means = [x[m[..., 0] == 1].mean(0) for x, m in zip(images, mask)]
    filled = np.where(mask == 1, images, np.stack(means)[:, None, None])
    plain = PConvUNet(depth=2, width=4, conv="standard")
    inputs = np.concatenate([filled, mask], -1)
    expected, _ = plain.apply(variables, inputs, np.ones_like(mask))
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def make_evaluation(values, name="a"):
    place = {"method": name, "hole": "1%-10%", "border": False}
    return results.Evaluation(
        [place | {"index": i, "picture": i, "psnr": v} for i, v in enumerate(values)]
    )


def test_differences_are_of_the_same_seed_and_image():
    rng = np.random.default_rng(0)
    seeds = rng.normal(20, 5, (3, 1)) + rng.normal(0, 5, (3, 30))
    shift = np.array([0.5, 1.0, 1.5])[:, None]
    records = {
        "a": [make_evaluation(v) for v in seeds],
        "b": [make_evaluation(v) for v in seeds + shift],
    }
    rows = ablation.summarize(records)
    (row,) = [r for r in rows if r["variant"] == "b" and r["hole"] is None]
    assert row["mean"] == pytest.approx((seeds + shift).mean())
    assert row["difference"]["mean"] == pytest.approx(1)
    np.testing.assert_allclose(row["difference"]["seeds"], shift[:, 0])
    # Seeds are all that differ: resampled, their mean lies between 0.5 and 1.5.
    assert row["difference"]["low"] == 0.5 and row["difference"]["high"] == 1.5
    assert row["high"] - row["low"] > 2
    # A composite that is perfect has no PSNR, and is left out.
    records["b"][0].examples[4]["psnr"] = None
    (row, *_) = [r for r in ablation.summarize(records) if r["variant"] == "b"]
    assert 0.9 < row["difference"]["mean"] < 1.1


def make_photos(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = rng.integers(0, 256, (24, 24, 3), np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


@pytest.mark.slow
def test_runs_go_on_and_end_in_a_table(tmp_path, monkeypatch):
    config, photos = default_config(), make_photos(tmp_path / "photos", 30)
    config.update_from_flattened_dict(
        {"data.source": "folder", "data.path": (str(photos),)}
        | {"image_size": 16, "batch_size": 4, "model.depth": 2, "model.width": 4}
        | {"masks.kind": "rectangles", "vgg": None, "phase1.steps": 2}
        | {"phase2.steps": 0, "validation_examples": 1, "evaluation_examples": 2}
    )
    settings, variants = read_settings(config), ["pconv_v1"]
    trained, seeds = [], [3]
    train_and_evaluate = loop.train_and_evaluate

    def train(config, workdir, **options):
        trained.append(workdir.name)
        if len(trained) == 1:
            return {"finished": False}  # As if it was asked to stop.
        return train_and_evaluate(config, workdir, **options)

    monkeypatch.setattr(loop, "train_and_evaluate", train)
    assert ablation.run(settings, tmp_path, seeds=seeds, variants=variants) is None
    found = ablation.run(settings, tmp_path, seeds=seeds, variants=variants)
    assert trained == ["pconv_v1-seed3"] * 2
    again = ablation.run(settings, tmp_path, seeds=seeds, variants=variants)
    assert len(trained) == 2 and again == found
    assert json.loads((tmp_path / "ablation.json").read_text()) == json.loads(
        json.dumps(found)
    )
    rows = [r for r in found["results"] if r["hole"] is None]
    assert [r["variant"] for r in rows if r["metric"] == "l1"] == variants
    text = (tmp_path / "ablation.md").read_text()
    assert text.startswith("# Ablation") and "| pconv_v1 |" in text
    assert "seeds [3]" in ablation.describe(found)
    # A run on other images has not finished: training would tell how they differ.
    (photos / "30.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(UserError, match="was trained on other images"):
        ablation.run(settings, tmp_path, seeds=seeds, variants=variants)
    assert trained == ["pconv_v1-seed3"] * 3
