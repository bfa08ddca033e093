import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.evaluate import results

pytestmark = pytest.mark.usefixtures("fast_compilation")


def make_evaluation(values, images, method="a", **more):
    return results.Evaluation(
        [
            {"method": method, "hole": "1%-10%", "border": False, "index": i}
            | {"picture": p, "l1": v}
            for i, (v, p) in enumerate(zip(values, images))
        ],
        **more,
    )


def test_table_and_means(evaluation):
    table = evaluation.table()
    assert [row["hole"] for row in table[:6]] == [
        "1%-10%", "10%-20%", "20%-30%", "30%-40%", "40%-50%", "50%-60%",
    ]  # fmt: skip
    assert [row["border"] for row in table] == ["no"] * 6 + ["yes"] * 6 + [""]
    chosen = [e["l1"] for e in evaluation.select(hole="50%-60%", border=True)]
    assert table[11]["l1 %"] == pytest.approx(np.mean(chosen))
    assert table[-1]["ssim"] == evaluation.mean()["ssim"]
    assert str(evaluation).splitlines()[0].split()[:9] == [
        "hole", "border", "l1", "%", "l1_hole", "%", "psnr", "dB", "ssim",
    ]  # fmt: skip


def test_intervals_cover_the_true_mean_in_95_percent_of_cases():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = rng.exponential(1.0, 60)
        interval = make_evaluation(values, range(60), seed=trial).intervals()["l1"]
        assert interval.mean == pytest.approx(values.mean())
        hits += interval.low <= 1.0 <= interval.high
    assert 178 <= hits <= 198  # 190, or somewhat fewer as the bootstrap has it.


def test_examples_of_an_image_are_resampled_together():
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
    np.testing.assert_allclose(difference, 0.5)  # However much the images differ.


def test_means_are_those_of_one_method():
    one, other = (
        make_evaluation([v], [0], method=m) for v, m in ((30, "a"), (10, "b"))
    )
    both = results.Evaluation(one.examples + other.examples)
    assert both.mean() == both.mean(method="a") == {"l1": 30}
    assert both.mean(method="b") == {"l1": 10}
    with pytest.raises(UserError, match="examples have no methd; they have border"):
        both.mean(methd="a")
    with pytest.raises(UserError, match="method must be one of a, b, got 'c'"):
        both.intervals(method="c")


def test_the_median_of_uneven_times():
    evaluation = make_evaluation([1, 2, 3], range(3), seconds={"a": [1, 9, 2], "b": []})
    expected = {"median_seconds": 2, "mean_seconds": 4, "examples": 3}
    assert evaluation.timing() == {"a": expected}
    assert evaluation.overview(["l1"])[0]["s/image"] == "2"
