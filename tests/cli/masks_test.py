import warnings

import numpy as np
import pytest

from pconv_jax import cli, masks
from pconv_jax.cli import masks as masks_command
from pconv_jax.inpaint import image_io
from pconv_jax.inpaint.hole import hole_from_mask

pytestmark = pytest.mark.usefixtures("fast_compilation")


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def test_example_masks(tmp_path, capsys):
    out = tmp_path / "masks"
    arguments = ("masks", "--output", out, "--count", 2, "--size", "48x32", "--seed", 1)
    run(*arguments, "--ratio", "0.2", "0.3", "--no-border")
    assert "2 masks" in capsys.readouterr().out
    files = sorted(out.iterdir())
    assert [path.name for path in files] == ["mask_00000.png", "mask_00001.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        holes = [hole_from_mask(image_io.read(path).image) for path in files]
    for hole in holes:
        assert hole.shape == (32, 48) and 0.2 < hole.mean() <= 0.3
        assert not masks.touches_border(~hole[..., None])
    assert np.any(holes[0] != holes[1])
    with pytest.raises(SystemExit, match="already; --force replaces it"):
        run(*arguments)
    before = files[0].read_bytes()
    run(*arguments, "--ratio", "0.2", "0.3", "--no-border", "--force")
    assert files[0].read_bytes() == before
    for wrong, problem in [
        (("--count", 0), "--count must be 1 or more"),
        (("--ratio", "0.3", "0.2"), "--ratio must be"),
        (("--seed", 2**32), r"--seed must be in \[0, 2\*\*32\)"),
    ]:
        with pytest.raises(SystemExit, match=problem):
            run("masks", "--output", tmp_path / "other", *wrong)
    with pytest.raises(SystemExit) as error:
        run("masks", "--output", out, "--size", "big")
    assert error.value.code == 2


def test_the_kinds_are_those_that_can_be_drawn():
    assert masks_command.KINDS == masks.KINDS


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--ratio", "0", "2"), "--ratio must be LOW HIGH with 0 < LOW"),
        (("--ratio", "0.9", "0.95", "--no-border"), "there is room for"),
    ],
)
def test_holes_that_cannot_be_drawn(arguments, problem, tmp_path):
    with pytest.raises(SystemExit, match=f"pconv: .*{problem}"):
        run("masks", "--output", tmp_path / "other", *arguments)
    assert not (tmp_path / "other").exists()


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="pconv: cannot write .* is not a folder"):
        cli.main(["masks", "--output", str(tmp_path / "file"), "--count", "1"])
