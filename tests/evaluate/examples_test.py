import numpy as np
import pytest

from pconv_jax import masks
from pconv_jax.evaluate import comparison, examples
from pconv_jax.evaluate.eval_set import BINS
from pconv_jax.unet import PConvUNet
from tests.helpers.evaluation import SIZE, FakeMethod, bundled, make_eval_set

pytestmark = pytest.mark.usefixtures("fast_compilation")


MODEL = PConvUNet(depth=2, width=4)


def test_drawn_examples_show_every_bin(variables):
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


def test_best_median_and_worst_examples_match_their_scores():
    pairs = make_eval_set()
    half = FakeMethod("half", lambda image, mask: image // 2)
    evaluation = comparison.compare([half], pairs, progress=False)
    shown = examples.choose_examples(evaluation)
    assert [rank for rank, _ in shown] == ["best", "median", "worst"] * 6
    for b in range(6):
        psnr = sorted(e["psnr"] for e in evaluation.select(hole=BINS[b]))
        chosen = [e["psnr"] for _, e in shown[3 * b : 3 * b + 3]]
        assert chosen == [psnr[-1], psnr[-len(psnr) // 2 - 1], psnr[0]]
    filled = examples.fill_examples([half], pairs, [e for _, e in shown])
    for (_, example), columns in zip(shown, filled):
        assert list(columns) == ["input", "half", "truth"]
        error = (columns["half"] / 255 - columns["truth"] / 255) ** 2
        assert -10 * np.log10(error.mean()) == pytest.approx(example["psnr"], rel=1e-4)


def test_few_examples_are_shown_once_and_failures_are_not_tried_again():
    pairs = make_eval_set(examples=1)
    first = FakeMethod("first", lambda image, mask: image // 2)
    flaky = FakeMethod("flaky", fails=lambda i: "no" if i == 0 else "")
    evaluation = comparison.compare([first, flaky], pairs, progress=False)
    shown = examples.choose_examples(evaluation)
    # There are two in a bin, of which the worse one is the median, too.
    assert len({(e["hole"], e["border"]) for _, e in shown}) == 12 == len(shown)
    filled = examples.fill_examples(
        [first, flaky],
        pairs,
        [example for _, example in shown],
        failures=evaluation.failures,
    )
    blank = [
        (e["hole"], e["border"])
        for (_, e), p in zip(shown, filled)
        if p["flaky"] is None
    ]
    assert blank == [("1%-10%", False)] and len(flaky.given) == 12 + 11
