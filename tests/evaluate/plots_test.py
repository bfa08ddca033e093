import math
from xml.etree import ElementTree

from pconv_jax.evaluate import plots
from pconv_jax.evaluate.bootstrap import Interval

NAN = math.nan


def plot(lines):
    styles = {name: plots.line_style(i) for i, name in enumerate(lines)}
    return plots.plot_intervals(lines, styles, ticks=["a", "b"], joined=2, xlabel="x")


def test_equal_plots_are_equal_files():
    lines = {"one": [Interval(1, 0, 2), None], "<&>": [Interval(3, NAN, NAN)] * 2}
    svg = plot(lines)
    assert svg == plot(lines)
    texts = [element.text for element in ElementTree.fromstring(svg).iter()]
    assert {"a", "b", "x"} <= set(texts)


def test_a_plot_without_values_is_none():
    assert plot({"one": [None, Interval(NAN, NAN, NAN)]}) is None
    assert plot({}) is None


def test_the_first_24_styles_are_different():
    assert len({plots.line_style(number) for number in range(24)}) == 24
