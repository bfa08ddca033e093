import json
import re

import numpy as np
import pytest
from PIL import Image

from pconv_jax.evaluate import comparison, examples, output
from pconv_jax.evaluate.eval_set import BINS
from tests.helpers.evaluation import SIZE, FakeMethod, make_eval_set

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_perfect_composites_are_null_in_json_and_left_out_of_means(tmp_path):
    first = [True]

    def fill(image, mask):
        perfect, first[0] = first[0], False
        return image if perfect else image // 2

    pairs = make_eval_set()
    perfect = FakeMethod("now_and_then", fill)
    other = FakeMethod("always", lambda image, mask: image)
    evaluation = comparison.compare([perfect, other], pairs, progress=False)
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


def test_the_page_is_self_contained(tmp_path):
    name = "<b>&"
    pairs, odd = make_eval_set(), FakeMethod(name, lambda image, mask: image // 2)
    evaluation = comparison.compare([odd, FakeMethod("b")], pairs, progress=False)
    output.write_results(tmp_path, evaluation, pairs, [odd, FakeMethod("b")], about={})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and name not in page and "&lt;b&gt;&amp;" in page
    links = page.replace("data:image/png;base64", "")
    links = links.replace("data:image/svg+xml;base64", "")
    outside = ("http:", "https:", "src='/", 'src="/', "url(", "@import")
    assert not any(x in links for x in outside)
    assert page.count('<figure class="plot">') == 4  # A plot of each metric.
    assert page.count('<img src="data:image/png') == 18 * 4


def change_by(error):
    """Make a method whose every value in a hole is wrong by this much."""
    return lambda image, mask: np.where(image < 128, image + error, image - error)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The results of a bad method and a good one, and the folder of their files."""
    folder = tmp_path_factory.mktemp("graded")
    both = [FakeMethod("bad", change_by(51)), FakeMethod("good", change_by(5))]
    pairs = make_eval_set()
    evaluation = comparison.compare(both, pairs, progress=False)
    output.write_results(folder, evaluation, pairs, both, about={})
    return evaluation, folder


def test_the_page_marks_the_better_method(graded):
    _, folder = graded
    page = (folder / "report.html").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    best = {
        name: [row.count('class="best"') for row in rows if f"{name}</th>" in row]
        for name in ("bad", "good")
    }
    # All four metrics in the first table; then, for each, all bins by border.
    assert best == {"bad": [0] * 9, "good": [4] + [6] * 8}


def test_captions_have_psnr_and_ssim(graded):
    evaluation, folder = graded
    page = (folder / "report.html").read_text()
    for name in ("bad", "good"):
        records = {
            (e["hole"], e["border"], e["index"]): e
            for e in evaluation.select(method=name)
        }
        shown = [record for _, record in examples.choose_examples(evaluation)]
        scores = [records[e["hole"], e["border"], e["index"]] for e in shown]
        assert re.findall(rf"{name}<br><small>(.*?)</small></figcaption>", page) == [
            f"{e['psnr']:.2f} / {e['ssim']:.3f}" for e in scores
        ]


@pytest.mark.parametrize(("name", "place"), [("pictures", 4), ("worst", 0)])
def test_pictures_show_the_median_and_the_worst_example(graded, name, place):
    evaluation, folder = graded
    grid = np.asarray(Image.open(folder / f"{name}.png"))
    captions, step = 18, SIZE + 2
    assert grid.shape == (captions + 6 * step - 2, 4 * step - 2, 3)
    for row, hole in enumerate(BINS):
        strip = grid[captions + row * step :][:SIZE] / 255
        _, bad, _, truth = (strip[:, i * step :][:, :SIZE] for i in range(4))
        scores = sorted(e["psnr"] for e in evaluation.select(method="bad", hole=hole))
        assert len(scores) == 10
        shown = -10 * np.log10(((bad - truth) ** 2).mean())
        assert shown == pytest.approx(scores[place], rel=1e-4)
