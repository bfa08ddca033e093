import contextlib
import csv
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics
from flax import traverse_util
from safetensors.numpy import save_file

from pconv_jax import masks, vgg
from pconv_jax._errors import UserError
from pconv_jax.data import pipeline, sources
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.evaluate import eval_set, examples, methods, output, results, runner
from pconv_jax.evaluate import learned as learned_lib
from pconv_jax.evaluate.eval_set import MASK_CLASSES, EvalSet, draw_masks
from pconv_jax.evaluate.learned import LearnedMetrics
from pconv_jax.evaluate.runner import EvalData
from pconv_jax.evaluate.store import Store
from pconv_jax.metrics import inception, lpips
from pconv_jax.runs import opening
from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.runs.config import default_config, read_settings
from pconv_jax.unet import PConvUNet
from pconv_jax.weights import pretrained
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("fast_compilation")


MODEL = PConvUNet(depth=2, width=4)

SIZE = 32


@pytest.fixture(scope="module")
def variables():
    images = jnp.zeros((1, SIZE, SIZE, 3))
    variables = jax.jit(MODEL.init)(jax.random.key(0), images, images[..., :1] + 1)
    return jax.tree.map(np.asarray, variables)


def bundled():
    return sources.open_source("bundled", split="validation")


def make_eval_set(**options):
    return EvalSet(bundled(), **(dict(image_size=SIZE, examples=5) | options))


@pytest.fixture(scope="module")
def evaluation(variables):
    return runner.evaluate_network(
        MODEL, variables, bundled(), image_size=SIZE, examples=5, progress=False
    )


class Fake:
    """A method that does as it is told, and keeps what it was given."""

    model = None
    description = "A method for tests."

    def __init__(self, name, fill=lambda image, mask: image * mask, fails=lambda i: ""):
        self.name, self.fingerprint = name, name
        self.given, self._fill, self._fails = [], fill, fails

    def fill(self, images, mask):
        start = len(self.given)
        self.given += list(zip(images, mask))
        errors = [self._fails(start + i) for i in range(len(images))]
        filled = np.stack([self._fill(*pair) for pair in zip(images, mask)])
        return methods.InpaintResult(filled, np.full(len(images), 0.5), errors)

    def close(self):
        pass


# The protocol.


def test_every_class_of_masks_has_its_examples(evaluation):
    classes = [(e["hole_bin"], e["border"], e["index"]) for e in evaluation.examples]
    assert classes == [(b, border, i) for b, border in MASK_CLASSES for i in range(5)]
    for example in evaluation.examples:
        low, high = masks.HOLE_BINS[example["hole_bin"]]
        assert low - 0.002 < example["hole_ratio"] <= high + 1e-6
        assert example["picture"] == example["index"] % 2  # There are two.


@pytest.mark.parametrize("border", [False, True])
def test_masks_keep_to_their_class_and_depend_on_the_seed_alone(border):
    index = np.arange(4)
    mask = draw_masks(index, 2, border, SIZE)
    assert (np.asarray(masks.hole_bin(masks.hole_ratio(mask))) == 2).all()
    assert (np.asarray(masks.touches_border(mask)) == border).all()
    bins = np.array([5, 2, 0, 2])
    mixed = draw_masks(index, bins, border, SIZE)
    np.testing.assert_array_equal(mixed[1], mask[1])
    assert masks.hole_bin(masks.hole_ratio(mixed)).tolist() == bins.tolist()
    other = draw_masks(index, 2, border, SIZE, seed=1)
    assert not np.array_equal(other, mask)
    more = draw_masks(np.arange(6), 2, border, SIZE)
    np.testing.assert_array_equal(more[:4], mask)


def test_all_methods_are_given_the_same_pairs():
    a, b = Fake("a"), Fake("b")
    runner.compare([a, b], make_eval_set(), progress=False)
    assert len(a.given) == len(b.given) == 60
    for (image, mask), (other_image, other_mask) in zip(a.given, b.given):
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(mask, other_mask)


def write_mask_folder(folder, classes, size=128, per_class=2):
    """Mask pictures, white = hole, by NVIDIA's numbers; returns them as masks."""
    folder.mkdir()
    written = {}
    for hole_bin, border in classes:
        for i in range(per_class):
            mask = np.ones((size, size, 1), np.uint8)
            # A square in the middle or in a corner.
            side = round(size * (0.1 * hole_bin + 0.06 + 0.02 * i) ** 0.5)
            top = 0 if border else (size - side) // 2
            mask[top : top + side, top : top + side] = 0
            number = 2000 * hole_bin + 1000 * border + i
            cv2.imwrite(str(folder / f"{number:05d}.png"), 255 * (1 - mask))
            written[hole_bin, border, i] = mask
    return written


def test_masks_of_a_folder_fall_into_their_classes(tmp_path):
    written = write_mask_folder(tmp_path / "m", MASK_CLASSES)
    pairs = make_eval_set(mask_folder=MaskFolder(tmp_path / "m"), image_size=128)
    assert pairs.classes == MASK_CLASSES and not pairs.left_out
    for hole_bin, border in MASK_CLASSES:
        drawn = pairs.masks(np.arange(3), hole_bin, border)
        for i in range(3):  # By turns: the third is the first again.
            np.testing.assert_array_equal(drawn[i], written[hole_bin, border, i % 2])
    small = make_eval_set(mask_folder=MaskFolder(tmp_path / "m"))
    assert small.masks(np.arange(1), 3, True).shape == (1, SIZE, SIZE, 1)
    with pytest.raises(UserError, match="none of the 2 masks .* holes really black"):
        write_mask_folder(tmp_path / "other", [(0, False)])
        folder = MaskFolder(tmp_path / "other", hole_color="black")
        make_eval_set(mask_folder=folder)


def test_empty_classes_of_a_folder_are_left_out_and_told_of(tmp_path):
    write_mask_folder(tmp_path / "m", [(0, False), (5, True)], per_class=1)
    pairs = make_eval_set(mask_folder=MaskFolder(tmp_path / "m"))
    evaluation = runner.compare([Fake("a")], pairs, progress=False)
    assert len(evaluation.examples) == 10
    (note,) = evaluation.left_out
    assert note.startswith("10 of 12 classes of masks") and "10%-20%, with" in note
    assert [row["hole"] for row in evaluation.table()] == ["1%-10%", "50%-60%", "all"]
    assert note in str(evaluation)


def test_masks_and_pictures_of_other_shapes(tmp_path):
    (tmp_path / "m").mkdir()
    tall = np.zeros((90, 40), np.uint8)
    tall[40:50, 15:25] = 255  # Of the central square of 40: 100 of 1600 pixels.
    cv2.imwrite(str(tmp_path / "m" / "a.png"), tall)
    pairs = make_eval_set(mask_folder=MaskFolder(tmp_path / "m"))
    assert pairs.classes == ((0, False),)
    assert pairs.masks(np.arange(1), 0, False).shape == (1, SIZE, SIZE, 1)


def test_fingerprints_tell_protocols_apart(tmp_path, monkeypatch):
    write_mask_folder(tmp_path / "m", [(1, False)])
    folder = MaskFolder(tmp_path / "m")
    options = [{}, {"seed": 1}, {"examples": 6}, {"image_size": 16}]
    options += [{"mask_folder": folder}]
    prints = [make_eval_set(**o).fingerprint for o in options]
    train = sources.open_source("bundled", split="train")
    prints += [EvalSet(train, image_size=SIZE, examples=5).fingerprint]
    assert len(set(prints)) == len(prints)
    assert make_eval_set().fingerprint == prints[0]
    # Masks that are drawn in another way are others.
    otherwise = functools.partial(masks.random_mask, kind="rectangles")
    with monkeypatch.context() as patch:
        patch.setattr(masks, "random_mask", otherwise)
        eval_set._draw.clear_cache()
        changed = make_eval_set().fingerprint
    eval_set._draw.clear_cache()
    assert changed != prints[0] == make_eval_set().fingerprint


# Numbers.


def test_numbers_are_those_of_the_examples(evaluation, variables):
    """One example, done again by hand."""
    (example,) = evaluation.select(hole_bin=3, border=True, index=1)
    image = next(pipeline.eval_batches(bundled(), batch_size=2, image_size=SIZE))[
        "image"
    ]
    image = image[1:]
    mask = draw_masks(np.array([1]), 3, True, SIZE)
    truth = (image / 127.5 - 1).astype(np.float32)
    output, _ = jax.jit(MODEL.apply)(variables, truth, mask)
    output = np.rint((np.clip(output, -1, 1) + 1) * 127.5) / 255
    comp, truth = np.where(mask == 1, image / 255, output), image / 255
    for prefix, picture in {"": comp, "output_": output}.items():
        error = np.abs(picture - truth)
        ssim = skimage.metrics.structural_similarity(
            picture[0],
            truth[0],
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        psnr = skimage.metrics.peak_signal_noise_ratio(truth, picture, data_range=1)
        assert example[f"{prefix}l1"] == pytest.approx(100 * error.mean(), rel=1e-4)
        assert example[f"{prefix}psnr"] == pytest.approx(psnr, rel=1e-4)
        assert example[f"{prefix}ssim"] == pytest.approx(ssim, abs=1e-4)
    hole = np.abs(comp - truth)[mask[..., 0] == 0].mean()
    assert example["l1_hole"] == pytest.approx(100 * hole, rel=1e-4)


def test_a_wrong_value_has_the_numbers_of_the_closed_form():
    """Off by 51 of 255 in the hole: all follows from the hole ratio."""
    off = Fake("off", lambda image, mask: np.where(image < 128, image + 51, image - 51))
    evaluation = runner.compare([off], make_eval_set(), progress=False)
    for example in evaluation.examples:
        ratio = example["hole_ratio"]
        assert example["l1_hole"] == pytest.approx(20, rel=1e-4)
        assert example["l1"] == pytest.approx(20 * ratio, rel=1e-4)
        assert example["psnr"] == pytest.approx(-10 * np.log10(0.04 * ratio), rel=1e-4)
        assert "output_l1" not in example  # It is no network.


def test_table_and_means(evaluation):
    table = evaluation.table()
    assert [row["hole"] for row in table[:6]] == [
        "1%-10%", "10%-20%", "20%-30%", "30%-40%", "40%-50%", "50%-60%",
    ]  # fmt: skip
    assert [row["border"] for row in table] == ["no"] * 6 + ["yes"] * 6 + [""]
    chosen = [e["l1"] for e in evaluation.select(hole_bin=5, border=True)]
    assert table[11]["l1 %"] == pytest.approx(np.mean(chosen))
    assert table[-1]["ssim"] == evaluation.mean()["ssim"]
    assert str(evaluation).splitlines()[0].split()[:9] == [
        "hole", "border", "l1", "%", "l1_hole", "%", "psnr", "dB", "ssim",
    ]  # fmt: skip


def test_perfect_composites_are_null_and_left_out_of_means(tmp_path):
    first = [True]

    def fill(image, mask):
        perfect, first[0] = first[0], False
        return image if perfect else image // 2

    pairs = make_eval_set()
    perfect, other = Fake("now_and_then", fill), Fake("always", lambda i, m: i)
    evaluation = runner.compare([perfect, other], pairs, progress=False)
    assert evaluation.examples[0]["psnr"] is None
    assert evaluation.examples[0]["ssim"] == 1
    psnr = [e["psnr"] for e in evaluation.select(method="now_and_then")[1:]]
    assert evaluation.mean(method="now_and_then")["psnr"] == np.mean(psnr)
    assert np.isnan(evaluation.mean(method="always")["psnr"])
    output.write_results(tmp_path, evaluation, pairs, [perfect, other], about={})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "results.json").read_text()
    results = json.loads(text, parse_constant=refuse)  # NaN and Infinity are no JSON.
    assert results["examples"][0]["psnr"] is None
    assert "null if both images are equal" in results["metrics"]["psnr"]["definition"]
    assert results["table"][-1]["psnr dB"] is None
    assert "∞" in (tmp_path / "report.html").read_text()


def make_evaluation(values, pictures, method="a", **more):
    return results.Evaluation(
        [
            {"method": method, "hole_bin": 0, "border": False, "index": i}
            | {"picture": p, "l1": v}
            for i, (v, p) in enumerate(zip(values, pictures))
        ],
        **more,
    )


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = rng.exponential(1.0, 60)
        interval = make_evaluation(values, range(60), seed=trial).intervals()["l1"]
        assert interval.mean == pytest.approx(values.mean())
        hits += interval.low <= 1.0 <= interval.high
    assert 178 <= hits <= 198  # 190, or somewhat fewer as the bootstrap has it.


def test_examples_of_a_picture_are_resampled_together():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    alone = make_evaluation(values, range(40)).intervals()["l1"]
    # Ten copies of each tell nothing new.
    copies = make_evaluation(np.repeat(values, 10), np.repeat(range(40), 10))
    assert copies.intervals()["l1"] == pytest.approx(alone)
    more = make_evaluation(np.repeat(values, 10), range(400)).intervals()["l1"]
    assert more.high - more.low < 0.5 * (alone.high - alone.low)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    ours = make_evaluation(values, range(50)).examples
    theirs = make_evaluation(values[:40] + 0.5, range(40), "b").examples
    both = results.Evaluation([*ours, *theirs])
    difference = both.differences("b", "a")["l1"]
    np.testing.assert_allclose(difference, 0.5)  # However much pictures differ.


# Failures.


def test_a_method_may_fail_and_the_rest_goes_on(tmp_path):
    flaky = Fake("flaky", fails=lambda i: "ValueError: no" if i % 10 == 7 else "")
    pairs = make_eval_set()
    evaluation = runner.compare([flaky, Fake("sure")], pairs, progress=False)
    assert len(evaluation.select(method="sure")) == 60
    assert len(evaluation.select(method="flaky")) == 54
    assert len(evaluation.failures) == 6
    assert evaluation.failures[0]["error"] == "ValueError: no"
    text = str(evaluation)
    assert "flaky failed on 6 of 60 examples" in text and "ValueError: no" in text
    assert [row["failed"] for row in evaluation.overview(["l1"])] == [6, 0]
    assert sum(row["failed"] for row in evaluation.summary()[:6]) == sum(
        not f["border"] for f in evaluation.failures
    )
    rows = list(csv.DictReader(io.StringIO(evaluation.csv())))
    assert len(rows) == 120 and sum(row["error"] != "" for row in rows) == 6
    hopeless = Fake("hopeless", fails=lambda i: "no")
    evaluation = runner.compare([hopeless, flaky], pairs, progress=False)
    output.write_results(tmp_path, evaluation, pairs, [hopeless, flaky], about={})
    assert "hopeless failed on 60 of 60" in (tmp_path / "report.html").read_text()


def test_output_that_is_not_finite_is_a_failure(variables):
    broken = jax.tree.map(np.copy, variables)
    broken["params"]["pconv4"]["bias"][0] = np.nan
    evaluation = runner.evaluate_network(
        MODEL, broken, bundled(), image_size=SIZE, examples=1, progress=False
    )
    assert not evaluation.examples and len(evaluation.failures) == 12
    assert evaluation.mean() == {}
    assert "not finite" in str(evaluation)


def test_sizes_that_do_not_suit_end_in_a_sentence(variables):
    with pytest.raises(ValueError, match="image_size = 34 .* use 32 or 36"):
        runner.evaluate_network(MODEL, variables, bundled(), image_size=34, examples=1)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        make_eval_set(image_size=8)
    with pytest.raises(ValueError, match="examples must be positive, got 0"):
        make_eval_set(examples=0)


# Networks of other people.


def test_metrics_with_networks_are_left_out_where_there_are_no_weights(
    tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path))
    for name in ("ALEXNET", "LPIPS_ALEX", "INCEPTION"):
        monkeypatch.delenv(f"PCONV_{name}", raising=False)
    learned = LearnedMetrics(image_size=SIZE)
    evaluation = runner.compare(
        [Fake("a")], make_eval_set(examples=1), learned=learned, progress=False
    )
    assert evaluation.metrics == ["l1", "l1_hole", "psnr", "ssim"]
    first, second = evaluation.left_out
    assert first.startswith("lpips: There is no ") and "PCONV_ALEXNET" in first
    assert second.startswith("fid, inception_score: There is no ")
    assert first in str(evaluation)
    small = LearnedMetrics(image_size=16)
    assert "lpips: it needs images of at least 31 pixels" in small.left_out[0]


@pytest.fixture
def stand_ins(monkeypatch):
    """Cheap networks in place of AlexNet and Inception."""

    def load_lpips():
        return {"gain": np.float32(2)}

    def load_inception():
        return {"bias": np.float32(1)}

    def distance(params, a, b):
        return params["gain"] * jnp.abs(a - b).max(axis=(1, 2, 3))

    def features_and_logits(params, images):
        blocks = images.reshape(len(images), 4, SIZE // 4, 4, SIZE // 4, 3) / 255.0
        means = blocks.mean((2, 4)).reshape(len(images), -1)
        return means + params["bias"], means[:, :8] * 9

    monkeypatch.setattr(learned_lib, "_FEATURES", 48)
    monkeypatch.setattr(learned_lib, "load_lpips_params", load_lpips)
    monkeypatch.setattr(learned_lib.lpips, "distance", distance)
    monkeypatch.setattr(learned_lib, "load_inception_params", load_inception)
    monkeypatch.setattr(
        learned_lib.inception, "features_and_logits", features_and_logits
    )
    learned_lib._compile_distance.cache_clear()
    learned_lib._compile_inception.cache_clear()
    yield distance, features_and_logits
    learned_lib._compile_distance.cache_clear()
    learned_lib._compile_inception.cache_clear()


def test_metrics_with_networks_are_of_the_composites(stand_ins, tmp_path):
    distance, features_and_logits = stand_ins
    half, pairs = Fake("half", lambda image, mask: image // 2), make_eval_set()
    learned = LearnedMetrics(image_size=SIZE)
    evaluate = functools.partial(
        runner.compare,
        eval_set=pairs,
        learned=learned,
        directory=tmp_path,
        progress=False,
    )
    evaluation = evaluate([half])
    place = {"method": "half", "hole_bin": 3, "border": True}
    given = [
        (image, mask)
        for image, mask in half.given
        if masks.hole_bin(masks.hole_ratio(mask)) == 3 and masks.touches_border(mask)
    ]
    truth = np.stack([image for image, _ in given])
    comp = np.stack([np.where(m == 1, i, i // 2) for i, m in given])
    features, logits = features_and_logits({"bias": 1}, comp)
    fid = inception.frechet_distance(
        features, features_and_logits({"bias": 1}, truth)[0]
    )
    score, _ = inception.inception_score(logits, splits=1)
    mean = evaluation.mean(**place)
    assert mean["fid"] == pytest.approx(fid, abs=1e-3) and fid > 0.1
    assert mean["inception_score"] == pytest.approx(score, rel=1e-4)
    expected = distance({"gain": 2}, comp / 255, truth / 255)
    found = [e["lpips"] for e in evaluation.select(**place)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert evaluation.summary()[0]["fid"]["low"] is None
    assert "fid (lower is better)" in str(evaluation.format(markdown=True))
    # One example is no set.
    alone = runner.compare(
        [half], make_eval_set(examples=1), learned=learned, progress=False
    )
    assert "fid" not in alone.mean(**place) and "lpips" in alone.mean(**place)
    # Features are kept, too.
    again = evaluate([Fake("half", fails=lambda i: "must not be asked again")])
    assert again.sets == evaluation.sets
    output.write_results(tmp_path, again, pairs, [half], about={})
    page = (tmp_path / "report.html").read_text()
    assert page.count('<figure class="plot">') == 7


# Records.


def test_a_store_goes_on_after_a_kill(tmp_path):
    place = {"method": "a", "hole_bin": 0, "border": True}
    store = Store(tmp_path)
    store.open("a", "x")
    store.add("a", [place | {"index": 0, "l1": 0.1}, place | {"index": 1, "l1": 0.2}])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    again = Store(tmp_path)
    again.open("a", "x")
    assert again.has("a", [(0, True, 0)]) and not again.has("a", [(0, True, 1)])
    again.add("a", [place | {"index": 1, "l1": 0.3}])
    third = Store(tmp_path)
    third.open("a", "x")
    keys = [(0, True, 0), (0, True, 1)]
    assert [r["l1"] for r in third.get("a", keys)] == [0.1, 0.3]
    third.open("a", "other pictures")
    assert not third.has("a", keys[:1])


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    first, second = Fake("a"), Fake("a")
    whole = runner.compare([first], make_eval_set(), directory=tmp_path, progress=False)
    again = runner.compare(
        [second], make_eval_set(), directory=tmp_path, progress=False
    )
    assert not second.given and again.examples == whole.examples
    assert again.seconds == whole.seconds
    other = make_eval_set(seed=1)
    runner.compare([second], other, directory=tmp_path, progress=False)
    assert len(second.given) == 60
    # Other code may give other numbers.
    monkeypatch.setattr(runner, "__version__", "0")
    runner.compare([second], other, directory=tmp_path, progress=False)
    assert len(second.given) == 120


# Pictures and the page.


def test_pictures_show_every_bin(variables):
    grid = examples.draw_examples(MODEL, variables, bundled(), image_size=SIZE)
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


def test_best_median_and_worst_are_shown_as_they_were_scored():
    pairs = make_eval_set()
    half = Fake("half", lambda image, mask: image // 2)
    evaluation = runner.compare([half], pairs, progress=False)
    shown = examples.choose_examples(evaluation)
    assert [rank for rank, _ in shown] == ["best", "median", "worst"] * 6
    for b in range(6):
        psnr = sorted(e["psnr"] for e in evaluation.select(hole_bin=b))
        chosen = [e["psnr"] for _, e in shown[3 * b : 3 * b + 3]]
        assert chosen == [psnr[-1], psnr[-len(psnr) // 2 - 1], psnr[0]]
    pictures = examples.fill_examples([half], pairs, [e for _, e in shown])
    for (_, example), columns in zip(shown, pictures):
        assert list(columns) == ["input", "half", "truth"]
        error = (columns["half"] / 255 - columns["truth"] / 255) ** 2
        assert -10 * np.log10(error.mean()) == pytest.approx(example["psnr"], rel=1e-4)


def test_few_examples_are_shown_once_and_failures_not_tried_again():
    pairs = make_eval_set(examples=1)
    first = Fake("first", lambda image, mask: image // 2)
    flaky = Fake("flaky", fails=lambda i: "no" if i == 0 else "")
    evaluation = runner.compare([first, flaky], pairs, progress=False)
    shown = examples.choose_examples(evaluation)
    # There are two in a bin, of which the worse one is the median, too.
    assert len({(e["hole_bin"], e["border"]) for _, e in shown}) == 12 == len(shown)
    pictures = examples.fill_examples(
        [first, flaky],
        pairs,
        [example for _, example in shown],
        failures=evaluation.failures,
    )
    blank = [
        (e["hole_bin"], e["border"])
        for (_, e), p in zip(shown, pictures)
        if p["flaky"] is None
    ]
    assert blank == [(0, False)] and len(flaky.given) == 12 + 11


def test_the_page_needs_nothing_else(tmp_path):
    name = "<b>&"
    pairs, odd = make_eval_set(), Fake(name, lambda image, mask: image // 2)
    evaluation = runner.compare([odd, Fake("b")], pairs, progress=False)
    output.write_results(tmp_path, evaluation, pairs, [odd, Fake("b")], about={})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and name not in page and "&lt;b&gt;&amp;" in page
    links = page.replace("data:image/png;base64", "")
    links = links.replace("data:image/svg+xml;base64", "")
    outside = ("http:", "https:", "src='/", 'src="/', "url(", "@import")
    assert not any(x in links for x in outside)
    assert page.count('<figure class="plot">') == 4  # A plot of each metric.
    assert page.count('<img src="data:image/png') == 18 * 4


# Runs and releases.


def tiny_config():
    config = default_config()
    config.update_from_flattened_dict(
        {"image_size": SIZE, "batch_size": 4, "model.depth": 2, "model.width": 4}
        | {"evaluation_examples": 2}
    )
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, variables):
    workdir = tmp_path_factory.mktemp("run")
    meta = {"config": tiny_config().to_dict(), "warnings": ["a warning"]}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(7, dict(variables) | {"average": {}}, meta=meta)
    return workdir


def test_a_run_is_evaluated_as_it_was_trained(run):
    evaluation = runner.evaluate_run(run, learned=False)
    out = run / "evaluation"
    results = json.loads((out / "results.json").read_text())
    assert results["step"] == 7 and results["warnings"] == ["a warning"]
    assert results["table"] == evaluation.table()
    assert evaluation.methods == ["pconv", "mean", "telea", "navier_stokes"]
    assert len(results["examples"]) == 4 * 24
    assert set(results["metrics"]["l1"]) == {"definition", "unit", "better"}
    assert "difference" in results["summary"][-1]
    page = (out / "report.html").read_text()
    assert "<td>–</td>" in page and '<td class="best">–' not in page
    timing = json.loads((out / "timing.json").read_text())
    assert timing["methods"]["telea"]["pictures"] == 24
    assert "seconds" not in (out / "results.json").read_text()
    files = {path.name for path in out.iterdir()}
    assert files == {
        "results.json", "timing.json", "results.md", "examples.csv", "report.html",
        "pictures.png", "worst.png", "records",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        runner.evaluate_run(run, step=3)


def test_networks_of_releases_beside_each_other(run, variables, tmp_path):
    weights = tmp_path / "net.safetensors"
    pretrained.save_pretrained(weights, MODEL, variables)
    evaluation = runner.evaluate_run(
        weights=str(weights),
        config=tiny_config(),
        methods=["pconv", f"again={run}", f"third={weights}"],
        data=EvalData(examples=1),
        learned=False,
        out=tmp_path / "out",
    )
    assert evaluation.methods == ["pconv", "again", "third"]
    numbers = [evaluation.mean(method=m) for m in evaluation.methods]
    assert numbers[0] == numbers[1] == numbers[2]


def test_a_release_is_evaluated_on_pictures_that_everyone_has(variables, tmp_path):
    config = tiny_config()
    config.data.source, config.data.path = "folder", ("photos/of/whoever/trained/it",)
    weights = tmp_path / "net.safetensors"
    info = {"experiment": config.to_dict()}
    pretrained.save_pretrained(weights, MODEL, variables, info=info)
    options = dict(weights=str(weights), methods=["pconv"], learned=False)
    options["data"] = EvalData(examples=1)
    runner.evaluate_run(**options, out=tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["protocol"]["pictures"]["names"] == ["coffee.png"]
    with pytest.raises(ValueError, match="photos/of/whoever"):
        runner.evaluate_run(**options, config=config)


def test_a_perceptual_distance_by_any_vgg(run, tmp_path):
    params = jax.tree.map(np.asarray, vgg.random_params(jax.random.key(1)))
    weights = tmp_path / "vgg.safetensors"
    save_file(traverse_util.flatten_dict(params, sep="/"), weights)
    evaluation = runner.evaluate_run(
        run,
        methods=["network", "mean"],
        data=EvalData(examples=1),
        learned=False,
        vgg=str(weights),
        out=tmp_path / "out",
    )
    assert evaluation.metrics[:5] == ["l1", "l1_hole", "psnr", "ssim", "vgg_distance"]
    assert evaluation.left_out == []
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["vgg"] == "vgg.safetensors"
    source = opening.get_images(read_settings(tiny_config()).data, "validation")
    protocol = EvalSet(source, image_size=SIZE, examples=1)
    ((index, truth),) = protocol.batches(1)
    mask = protocol.masks(index, 4, True)
    (fill,) = methods.get_methods(["mean"], None, time_budget=9.0)
    with contextlib.closing(fill):
        comp = np.where(mask == 0, fill.fill(truth, mask).images, truth)
    expected = lpips.vgg_distance(
        params, comp / np.float32(255), truth / np.float32(255)
    )
    (found,) = evaluation.select(method="mean", hole_bin=4, border=True)
    assert found["vgg_distance"] == pytest.approx(float(expected[0]), rel=1e-4)
    with pytest.raises(ValueError, match="none.npz"):
        runner.evaluate_run(run, learned=False, vgg="none.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workdir": "nowhere"}, "workdir: there is no checkpoint in"),
        ({}, "give either workdir or weights"),
        ({"weights": "none.safetensors"}, "there is no file none.safetensors"),
        (
            {"workdir": None, "methods": ["tela"]},
            "methods: 'tela' is unknown; use",
        ),
        (
            {"workdir": None, "methods": ["mean", "mean"]},
            "unique, got mean, mean",
        ),
        ({"workdir": None, "methods": []}, "non-empty and unique, got none"),
        ({"workdir": None, "methods": ["a/b=c"]}, "the name in 'a/b=c' may contain"),
        ({"data": EvalData(images="nowhere.tar")}, "there is no 'nowhere.tar'"),
        ({"data": EvalData(masks="nowhere")}, "there is no such folder"),
        ({"data": EvalData(image_size=33)}, "use 32 or 36"),
    ],
)
def test_mistakes_end_in_a_sentence(run, options, message):
    if "workdir" in options or "data" in options:
        options = options | {"workdir": options.get("workdir") or run}
    with pytest.raises(ValueError, match=message):
        runner.evaluate_run(**options, learned=False)


@pytest.mark.slow
def test_the_bundled_network_is_better_than_what_needs_none():
    trained = opening.load_weights("photos")
    names = ["mean", "telea", "navier_stokes"]
    compared = [
        methods.Network("photos", trained.model, trained.variables),
        *methods.get_methods(names, None, time_budget=60.0),
    ]
    try:
        protocol = make_eval_set(image_size=256, examples=2)
        evaluation = runner.compare(compared, protocol, progress=False)
    finally:
        for method in compared:
            method.close()
    assert evaluation.failures == []
    network = evaluation.mean(method="photos")
    fill, *opencv = (evaluation.mean(method=name) for name in names)
    assert network["psnr"] > fill["psnr"] + 5
    assert network["ssim"] > fill["ssim"] + 0.03
    assert network["l1_hole"] < fill["l1_hole"] / 2
    for other in opencv:  # SSIM and l1 are not, on these two photos.
        assert network["psnr"] > other["psnr"] + 0.3


# Real processes.


def write_pictures(folder, count=3, size=48):
    folder.mkdir()
    for i in range(count):
        image = bundled()[i % 2][: 4 * size, i * 40 : i * 40 + 4 * size]
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"{i}.png"), image[..., ::-1])


def command(*arguments):
    return [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]


def environment(devices=1):
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }


def start(devices, *arguments):
    return subprocess.Popen(
        command(*arguments),
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.slow
def test_devices_and_kills_change_nothing_and_opencv_agrees(run, tmp_path):
    """On one device, on four, and on four after a kill; and on other people's code."""
    write_pictures(tmp_path / "photos")
    written = write_mask_folder(tmp_path / "masks", MASK_CLASSES, size=48, per_class=2)
    arguments = [f"--workdir={run}", "--image_size=48", "--examples=3"]
    arguments += [f"--images={tmp_path / 'photos'}", f"--masks={tmp_path / 'masks'}"]
    arguments += ["--nolearned", "--methods=pconv,telea,navier_stokes"]
    one = start(1, *arguments, f"--out={tmp_path / 'one'}")
    killed = start(4, *arguments, f"--out={tmp_path / 'four'}")
    records = tmp_path / "four" / "records"
    deadline = time.monotonic() + 200
    while sum(p.stat().st_size > 0 for p in records.glob("*")) < 3:
        assert killed.poll() is None, killed.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "four" / "results.json").exists()
    done = {p.name: p.read_text() for p in records.glob("*")}
    assert 0 < sum(text.count("\n") for text in done.values()) < 3 * 36
    four = start(4, *arguments, f"--out={tmp_path / 'four'}")
    printed = finish(one)
    finish(four)
    for name, text in done.items():  # It went on, and did not begin again.
        whole = text[: text.rfind("\n") + 1]
        assert (records / name).read_text().startswith(whole)
    results = [(tmp_path / n / "results.json").read_bytes() for n in ("one", "four")]
    assert results[0] == results[1]
    tables = [(tmp_path / n / "examples.csv").read_bytes() for n in ("one", "four")]
    assert tables[0] == tables[1]
    assert "navier_stokes" in printed and "s/image" in printed

    examples = json.loads(results[0])["examples"]
    assert len(examples) == 3 * 36
    opencv = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}
    for e in examples:
        if e["method"] not in opencv:
            continue
        photo = cv2.imread(str(tmp_path / "photos" / f"{e['index']}.png"))
        hole = 1 - written[e["hole_bin"], e["border"], e["index"] % 2]
        filled = cv2.inpaint(photo * (1 - hole), hole, 3, opencv[e["method"]])
        a, b = photo / 255, filled / 255
        assert e["l1"] == pytest.approx(100 * np.abs(a - b).mean(), rel=1e-4)
        psnr = skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1)
        assert e["psnr"] == pytest.approx(psnr, rel=1e-5)
        ssim = skimage.metrics.structural_similarity(
            a, b, data_range=1, channel_axis=-1, gaussian_weights=True,
            use_sample_covariance=False,
        )  # fmt: skip
        assert e["ssim"] == pytest.approx(ssim, abs=1e-5)


def test_a_mistake_on_the_command_line_ends_without_a_traceback(tmp_path):
    process = start(1, f"--workdir={tmp_path}")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    line = output.decode().strip().splitlines()[-1]
    assert line.startswith("eval.py: workdir: there is no checkpoint in")
    assert b"Traceback" not in output
