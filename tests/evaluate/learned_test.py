import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import masks
from pconv_jax.evaluate import comparison, output
from pconv_jax.evaluate import learned as learned_lib
from pconv_jax.evaluate.learned import LearnedMetrics
from pconv_jax.metrics import inception
from tests.helpers.evaluation import SIZE, FakeMethod, make_eval_set

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_learned_metrics_without_weights_are_left_out(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path))
    for name in ("ALEXNET", "LPIPS_ALEX", "INCEPTION", "VGG16"):
        monkeypatch.delenv(f"PCONV_{name}", raising=False)
    learned = LearnedMetrics(image_size=SIZE)
    evaluation = comparison.compare(
        [FakeMethod("a")], make_eval_set(examples=1), learned=learned, progress=False
    )
    assert evaluation.metrics == ["l1", "l1_hole", "psnr", "ssim"]
    first, second, third = evaluation.left_out
    assert first.startswith("lpips: There is no ") and "PCONV_ALEXNET" in first
    assert second.startswith("fid, inception_score: There is no ")
    assert third.startswith("vgg_distance: There are no VGG16 weights")
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

    def load_vgg():
        return {"gain": np.float32(3)}

    def features_and_logits(params, images):
        blocks = images.reshape(len(images), 4, SIZE // 4, 4, SIZE // 4, 3) / 255.0
        means = blocks.mean((2, 4)).reshape(len(images), -1)
        return means + params["bias"], means[:, :8] * 9

    monkeypatch.setattr(learned_lib, "_FEATURES", 48)
    monkeypatch.setattr(learned_lib, "load_lpips_params", load_lpips)
    monkeypatch.setattr(learned_lib.lpips, "distance", distance)
    monkeypatch.setattr(learned_lib.lpips, "vgg_distance", distance)
    monkeypatch.setattr(learned_lib, "load_vgg_params", load_vgg)
    monkeypatch.setattr(learned_lib, "load_inception_params", load_inception)
    monkeypatch.setattr(
        learned_lib.inception, "features_and_logits", features_and_logits
    )
    learned_lib._compile_distance.cache_clear()
    learned_lib._compile_inception.cache_clear()
    yield distance, features_and_logits
    learned_lib._compile_distance.cache_clear()
    learned_lib._compile_inception.cache_clear()


def test_learned_metrics_compare_the_composites(stand_ins, tmp_path):
    distance, features_and_logits = stand_ins
    half, pairs = FakeMethod("half", lambda image, mask: image // 2), make_eval_set()
    learned = LearnedMetrics(image_size=SIZE)
    evaluate = functools.partial(
        comparison.compare,
        eval_set=pairs,
        learned=learned,
        directory=tmp_path,
        progress=False,
    )
    evaluation = evaluate([half])
    place = {"method": "half", "hole": "30%-40%", "border": True}
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
    found = [e["vgg_distance"] for e in evaluation.select(**place)]
    np.testing.assert_allclose(found, 1.5 * expected, rtol=1e-5)
    assert evaluation.summary()[0]["fid"]["low"] is None
    assert "fid (lower is better)" in str(evaluation.format(markdown=True))
    # One example is no set.
    alone = comparison.compare(
        [half], make_eval_set(examples=1), learned=learned, progress=False
    )
    assert "fid" not in alone.mean(**place) and "lpips" in alone.mean(**place)
    # Features are kept, too.
    again = evaluate([FakeMethod("half", fails=lambda i: "must not be asked again")])
    assert again.sets == evaluation.sets
    output.write_results(tmp_path, again, pairs, [half], about={})
    page = (tmp_path / "report.html").read_text()
    assert page.count('<figure class="plot">') == 8


def test_records_with_other_learned_metrics_are_not_reused(
    stand_ins, tmp_path, monkeypatch
):
    def evaluate(learned):
        half = FakeMethod("half", lambda image, mask: image // 2)
        result = comparison.compare(
            [half],
            make_eval_set(examples=1),
            learned=learned,
            directory=tmp_path,
            progress=False,
        )
        return result, len(half.given)

    without, count = evaluate(None)
    assert count == 12 and "lpips" not in without.metrics
    learned = LearnedMetrics(image_size=SIZE)
    first, count = evaluate(learned)
    assert count == 12 and "lpips" in first.metrics
    # Other weights give other distances.
    monkeypatch.setattr(
        learned_lib, "load_lpips_params", lambda: {"gain": np.float32(4)}
    )
    other, count = evaluate(LearnedMetrics(image_size=SIZE))
    assert count == 12
    for a, b in zip(first.examples, other.examples, strict=True):
        assert b["lpips"] == pytest.approx(2 * a["lpips"], rel=1e-5)
    # The records of all three are still there.
    for networks, expected in ((None, without), (learned, first)):
        again, count = evaluate(networks)
        assert count == 0 and again.examples == expected.examples
