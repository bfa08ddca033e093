import json

import numpy as np
import pytest

from pconv_jax.evaluate import comparison, output
from tests.helpers.evaluation import FakeMethod, make_eval_set

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
