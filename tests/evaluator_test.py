import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import config as experiment
from pconv_jax import data, evaluator, masks, parallel, steps
from pconv_jax.checkpoint import Checkpoints
from pconv_jax.unet import PConvUNet

pytestmark = pytest.mark.usefixtures("fast_compilation")

MODEL = PConvUNet(depth=2, width=4)
SIZE = 32


@pytest.fixture(scope="module")
def variables():
    images = jnp.zeros((1, SIZE, SIZE, 3))
    return jax.jit(MODEL.init)(jax.random.key(0), images, images[..., :1] + 1)


def evaluate(variables, **options):
    options = dict(image_size=SIZE, batch_size=4, examples=5) | options
    source = data.open_source("bundled", split="validation")
    return evaluator.evaluate(MODEL, variables, source, progress=False, **options)


@pytest.fixture(scope="module")
def evaluation(variables):
    return evaluate(variables)


def test_every_class_of_masks_has_its_examples(evaluation):
    classes = [(e["hole_bin"], e["border"], e["index"]) for e in evaluation.examples]
    expected = [
        (b, border, i) for b, border in evaluator.MASK_CLASSES for i in range(5)
    ]
    assert sorted(classes) == sorted(expected)
    for example in evaluation.examples:
        low, high = masks.HOLE_BINS[example["hole_bin"]]
        assert low - 0.002 < example["hole_ratio"] <= high + 1e-6


@pytest.mark.parametrize("border", [False, True])
def test_masks_keep_to_their_class_and_depend_on_the_seed_alone(border):
    index = np.arange(4)
    mask = evaluator.draw_masks(index, 2, border, 64)
    assert (np.asarray(masks.hole_bin(masks.hole_ratio(mask))) == 2).all()
    assert (np.asarray(masks.touches_border(mask)) == border).all()
    bins = np.array([5, 2, 0, 2])
    mixed = evaluator.draw_masks(index, bins, border, 64)
    np.testing.assert_array_equal(mixed[1], mask[1])
    assert masks.hole_bin(masks.hole_ratio(mixed)).tolist() == bins.tolist()
    assert not np.array_equal(evaluator.draw_masks(index, 2, border, 64, seed=1), mask)


def test_numbers_are_those_of_the_examples(evaluation, variables):
    """One example, done again by hand."""
    (example,) = [
        e
        for e in evaluation.examples
        if (e["hole_bin"], e["border"], e["index"]) == (3, True, 1)
    ]
    source = data.open_source("bundled", split="validation")
    image = next(data.eval_batches(source, batch_size=2, image_size=SIZE))["image"][1:]
    mask = evaluator.draw_masks(np.array([1]), 3, True, SIZE)
    truth = image / 127.5 - 1
    output, _ = MODEL.apply(variables, truth.astype(np.float32), mask)
    comp = np.where(mask == 1, truth, np.clip(output, -1, 1))
    error = np.abs(comp - truth) / 2
    assert example["l1"] == pytest.approx(100 * error.mean(), rel=1e-3)
    assert example["l1_hole"] == pytest.approx(
        100 * error[mask[..., 0] == 0].mean(), rel=1e-3
    )
    assert example["psnr"] == pytest.approx(-10 * np.log10((error**2).mean()), rel=1e-3)


def test_table_and_means(evaluation):
    table = evaluation.table()
    assert [row["hole"] for row in table[:6]] == [
        "1%-10%", "10%-20%", "20%-30%", "30%-40%", "40%-50%", "50%-60%",
    ]  # fmt: skip
    assert [row["border"] for row in table] == ["no"] * 6 + ["yes"] * 6 + [""]
    chosen = [
        e["l1"] for e in evaluation.examples if e["hole_bin"] == 5 and e["border"]
    ]
    assert table[11]["l1 %"] == pytest.approx(np.mean(chosen))
    assert table[-1]["ssim"] == evaluation.mean()["ssim"]
    assert str(evaluation).splitlines()[0].split() == [
        "hole", "border", "l1", "%", "l1_hole", "%", "psnr", "dB", "ssim",
    ]  # fmt: skip


def test_perfect_examples_do_not_make_the_mean_infinite(evaluation):
    perfect = dict(evaluation.examples[0], psnr=float("inf"))
    with_one = evaluator.Evaluation([*evaluation.examples, perfect])
    assert with_one.mean()["psnr"] == evaluation.mean()["psnr"]


def test_one_device_finds_what_four_find(evaluation, variables, monkeypatch):
    monkeypatch.setattr(parallel, "compile_eval_step", jax.jit)
    evaluator._compile.cache_clear()
    one = evaluate(variables)
    evaluator._compile.cache_clear()
    for a, b in zip(one.examples, evaluation.examples, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_batch_size_does_not_matter(evaluation, variables):
    other = evaluate(variables, batch_size=8)
    assert other.mean() == pytest.approx(evaluation.mean(), rel=1e-4)
    with pytest.raises(ValueError, match="batch_size = 3 .* 4 devices: use 4"):
        evaluate(variables, batch_size=3)


def test_pictures_show_every_bin(variables):
    source = data.open_source("bundled", split="validation")
    grid = evaluator.draw_pictures(MODEL, variables, source, image_size=SIZE)
    assert grid.shape[1] == 4 * SIZE + 3 * 2
    rows = [grid[18 + i * (SIZE + 2) :][:SIZE] for i in range(6)]
    whites = [(row[:, :SIZE] == 255).all(-1).mean() for row in rows]
    for white, (low, high) in zip(whites, masks.HOLE_BINS):
        assert low - 0.002 < white < high + 0.05  # A photo may have white of its own.
    for row in rows:
        shown, truth = row[:, :SIZE], row[:, -SIZE:]
        composite = row[:, 2 * (SIZE + 2) :][:, :SIZE]
        valid = (shown != 255).any(-1)
        np.testing.assert_array_equal(composite[valid], truth[valid])


def test_a_run_is_evaluated_as_it_was_trained(tmp_path, variables):
    config = experiment.paper()
    config.update_from_flattened_dict(
        {"image_size": SIZE, "batch_size": 4, "model.depth": 2, "model.width": 4}
        | {"evaluation_examples": 5}
    )
    meta = {"config": config.to_dict(), "warnings": ["a warning"]}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, dict(variables), meta=meta)
    evaluation = evaluator.evaluate_run(tmp_path)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["step"] == 7 and results["warnings"] == ["a warning"]
    assert results["table"] == evaluation.table()
    assert len(results["examples"]) == 60
    assert (tmp_path / "evaluation" / "pictures.png").exists()
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        evaluator.evaluate_run(tmp_path, step=3)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="workdir: there is no checkpoint in"):
        evaluator.evaluate_run(tmp_path / "nowhere")


def test_eval_step_is_in_steps():
    assert evaluator._compile(MODEL) is evaluator._compile(PConvUNet(depth=2, width=4))
    assert callable(steps.eval_step)
