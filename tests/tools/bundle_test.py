import sys

import jax
import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.train import export
from pconv_jax.weights.formats.arrays import read_arrays
from pconv_jax.weights.pretrained import from_pretrained, save_pretrained
from tests.helpers.networks import make_network
from tools import bundle


def test_parts_of_a_run_become_one_file(tmp_path, monkeypatch, capsys):
    model, variables = make_network()
    data = {"path": ["/photos/a.tar", "b.tar"], "scale": [0.5, 1.0]}
    info = {"step": 7, "experiment": {"data": data, "vgg": None}, "config": {"x": 1}}
    whole = tmp_path / "whole" / "weights.safetensors"
    save_pretrained(whole, model, variables, info=info, kernels="float16")
    export.split(whole, tmp_path, 3000)
    source, out = tmp_path / "weights.safetensors", tmp_path / "out.safetensors"
    command = ["bundle", str(source), str(out), "--trusted-depth", "3"]
    monkeypatch.setattr(sys, "argv", command)
    bundle.main()
    assert f"{out}: 0.0 MB" in capsys.readouterr().out
    read = from_pretrained(out)
    assert read.info.pop("origin").endswith(", step 7")
    short = {"path": ["a.tar", "b.tar"], "scale": [0.5, 1.0]}
    assert read.info == {
        "step": 7,
        "training_data": short,
        "experiment": {"data": short, "vgg": None},
        "trusted_depth": 3,
    }
    assert read_arrays(out)["params/pconv1/kernel"].dtype == np.int8
    for a, b in zip(jax.tree.leaves(read.variables), jax.tree.leaves(variables)):
        np.testing.assert_allclose(a, b, atol=np.abs(b).max() / 200)


def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "m.safetensors"
    save_pretrained(path, *make_network())
    with pytest.raises(UserError, match="has no description of a run: .*step"):
        bundle.bundle(path, tmp_path / "out.safetensors")
    command = ["bundle", str(tmp_path / "none.safetensors"), str(path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        bundle.main()
    assert "there is no part none.safetensors.1" in capsys.readouterr().err
