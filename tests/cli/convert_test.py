import json

import jax
import numpy as np
import pytest

from pconv_jax import __version__, cli
from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.weights import pretrained
from tests.helpers import torch_writer
from tests.helpers.commands import pconv
from tests.helpers.networks import make_network, small_mmagic, train_config


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(torch_writer.dump_zip({"state_dict": small_mmagic()}))
    return path


def test_convert_weights_of_another_project(weights, tmp_path):
    out = tmp_path / "out.safetensors"
    result = pconv("convert", weights, out)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Recognized: open-mmlab/mmagic."
    assert lines[1] == (
        "Note: It was trained on BGR in [-1, 1], and takes RGB in [-1, 1] here."
    )
    table = [line.split() for line in lines[3:-1]]
    assert [row[0] for row in table] == [
        *("stage", "pconv1", "pconv2", "pconv3", "pconv4", "total")
    ]
    assert table[1][1:] == "encoder 7 x 7 x 3 x 4 0 592".split()
    network = pretrained.from_pretrained(out)
    parameters = sum(a.size for a in jax.tree.leaves(network.variables["params"]))
    assert table[-1][1] == f"{parameters:,}"
    assert network.info["origin"] == "open-mmlab/mmagic"
    assert len(network.info["notes"]) == 1


def test_convert_a_run(tmp_path, capsys):
    workdir, out = tmp_path / "run", tmp_path / "out.safetensors"
    _, variables = make_network()
    meta = {"config": train_config("").to_dict(), "warnings": ["Oh!"]}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        zeros = jax.tree.map(np.zeros_like, variables)
        items = {"opt_state": {}, "average": {}}
        checkpoints.save(1, zeros | items, meta=meta)
        # The averaged network is the run's.
        checkpoints.save(2, zeros | items | {"average": variables}, meta=meta)
    row = {"hole": "all", "psnr dB": 12.5}
    (workdir / "evaluation").mkdir()
    results = workdir / "evaluation" / "results.json"
    results.write_text(json.dumps({"step": 2, "table": [row]}))
    cli.main(["convert", str(workdir), str(out)])
    printed = capsys.readouterr().out
    recognized = f"Recognized: pconv_jax {__version__}, step 2."
    assert recognized in printed and "Note: Oh!" in printed
    network = pretrained.from_pretrained(out)
    jax.tree.map(np.testing.assert_array_equal, network.variables, variables)
    assert network.info["training_data"]["source"] == "bundled"
    assert network.info["metrics"] == [row]
    assert [s.features for s in network.model.encoder] == [4, 8]
    cli.main(["convert", str(workdir), str(out), "--step", "1", "--force"])
    first = pretrained.from_pretrained(out)
    assert not any(np.any(a) for a in jax.tree.leaves(first.variables))
    assert "metrics" not in first.info
    # A weights file can be copied.
    again = tmp_path / "again.safetensors"
    cli.main(["convert", str(out), str(again)])
    assert again.read_bytes() == out.read_bytes()


def test_what_cannot_be_converted(weights, tmp_path):
    out = tmp_path / "out.safetensors"
    (tmp_path / "evil.pth").write_bytes(
        torch_writer.zip_bytes(
            torch_writer.pickled(torch_writer.call("os", "system", "true")), {}
        )
    )
    for arguments, problem in [
        ((tmp_path / "none.pth", out), "there is no file .*none.pth"),
        ((tmp_path, out), "there is no checkpoint in"),
        ((tmp_path / "evil.pth", out), "it asks for 'os.system'"),
        ((weights, tmp_path / "out.pth"), "OUT must be a .safetensors file"),
        ((weights, weights), "there is a file .* already; --force replaces it"),
        ((weights, out, "--step", "3"), "--step requires a run"),
    ]:
        with pytest.raises(SystemExit, match=f"pconv: .*{problem}"):
            cli.main(["convert", *map(str, arguments)])
    assert not out.exists()


def test_force(weights, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    cli.main(["convert", str(weights), str(out), "--force"])
    assert pretrained.is_weights_file(out)


def test_files_that_cannot_be_written(weights, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="pconv: cannot write .* is not a folder"):
        cli.main(["convert", str(weights), str(tmp_path / "file" / "out.safetensors")])
