import importlib
import math
import sys
from unittest import mock

import numpy as np
import pytest


@pytest.fixture
def make_golden(monkeypatch):
    """The program, also where there is no PyTorch."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("torch", "torch.nn", "torch.nn.functional"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    monkeypatch.delitem(sys.modules, "tools.make_golden", raising=False)
    yield importlib.import_module("tools.make_golden")
    del sys.modules["tools.make_golden"]


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_what_is_no_number_differs_most(make_golden, order):
    stored = {name: np.array([1.0, 2.0]) for name in order}
    computed = {"a": np.array([1.0, 2.0]), "b": np.array([1.0, 2.5])}
    difference = make_golden._largest_difference(stored, computed)
    assert difference == (0.25, "b")
    computed = {"c": np.array([np.nan, 2.0])} | computed
    computed = {name: computed[name] for name in order}
    difference, name = make_golden._largest_difference(stored, computed)
    assert math.isnan(difference) and name == "c"
    assert not difference <= make_golden.TOLERANCE
