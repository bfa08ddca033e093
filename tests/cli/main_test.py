import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pconv_jax import cli
from pconv_jax._errors import RunError, UserError
from tests.helpers import ROOT
from tests.helpers.commands import pconv


def test_mistakes_end_without_a_traceback(tmp_path):
    result = pconv("convert", tmp_path / "none.pth", tmp_path / "out.safetensors")
    assert result.returncode == 1
    assert result.stderr.startswith("pconv: SOURCE: there is no file or folder")
    assert len(result.stderr.splitlines()) == 1
    assert not os.listdir(tmp_path)


def test_help(capsys):
    for arguments in (["--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 0
    assert "open-mmlab/mmagic" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2
    assert "repair an image" in capsys.readouterr().err
    # The settings of a config are listed once, not in the usage as well.
    for command in ("train", "eval"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        help_ = capsys.readouterr().out
        assert help_.startswith(f"usage: pconv {command} ")
        assert help_.count("--config.model.depth VALUE") == 1


def test_values_that_belong_to_no_option():
    with pytest.raises(SystemExit, match="b.jpg. An option takes one value"):
        cli.main(["inpaint", "--image", "a.jpg", "b.jpg", "--output", "out"])


def test_names_of_options_may_have_underscores(tmp_path):
    photo, mask, output = (tmp_path / name for name in ("a.png", "m.png", "o.png"))
    Image.new("RGB", (8, 8)).save(photo)
    Image.new("L", (8, 8)).save(mask)
    command = ["inpaint", "--image", str(photo), "--mask", str(mask)]
    with pytest.raises(SystemExit, match="max_pixels"):
        cli.main([*command, "--output", str(output), "--max_pixels=-1_0"])
    # What follows "--" is no option.
    with pytest.raises(SystemExit, match="no file or folder --a_b.pth"):
        cli.main(["convert", "--", "--a_b.pth", str(tmp_path / "out.safetensors")])


@pytest.mark.parametrize("error", [UserError("a mistake"), RunError("a full disk")])
def test_user_and_run_errors_become_one_sentence(error, monkeypatch):
    monkeypatch.setattr(cli.masks, "_check", fail_with(error))
    with pytest.raises(SystemExit, match=f"^pconv: {error}$"):
        cli.main(["masks", "--output", "masks"])


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), KeyError(1)])
def test_bugs_keep_their_traceback(error, monkeypatch):
    monkeypatch.setattr(cli.masks, "_check", fail_with(error))
    with pytest.raises(type(error)) as raised:
        cli.main(["masks", "--output", "masks"])
    assert raised.value is error


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "pconv"],
        ["eval", "--workdir", "run"],
        ["convert", ".", "run.safetensors"],
    ],
)
def test_commands_say_which_extra_they_need(arguments):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("ml_collections", "grain", "orbax")))
from pconv_jax import cli
cli.main({arguments})
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "pip install 'pconv-jax[train]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def fail_with(error):
    def fail(*_):
        raise error

    return fail


# What commands import. flax itself imports absl.

TRAINING = (
    *("optax", "orbax", "grain", "tensorflow_datasets", "ml_collections", "skimage"),
    *("tensorboardX", "torch", "tensorflow", "matplotlib", "gradio"),
)


def imported_by(code):
    """Run code in a process; return the names of all modules that it imports."""
    code += "\nimport sys\nsys.stderr.write('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stderr.splitlines())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["inpaint", "--help"], ["masks", "--help"]]
)
def test_help_imports_nothing_heavy(arguments):
    modules = imported_by(f"""
from pconv_jax import cli
try:
    cli.main({arguments})
except SystemExit as error:
    assert error.code == 0
""")
    heavy = {"jax", "flax", "numpy", "cv2", "PIL", "tqdm", "tifffile", *TRAINING}
    assert "pconv_jax.cli.inpaint" in modules and not heavy & modules


def test_a_repair_imports_nothing_of_training(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(image + 200).save(tmp_path / "image.png")
    image[4:8, 4:8] = 255
    Image.fromarray(image).save(tmp_path / "mask.png")
    arguments = ["inpaint"]
    for name in ("image", "mask", "output"):
        arguments += [f"--{name}", str(tmp_path / f"{name}.png")]
    modules = imported_by(f"from pconv_jax import cli\ncli.main({arguments})")
    assert (tmp_path / "output.png").is_file()
    assert "pconv_jax.inpaint.inpainter" in modules and not set(TRAINING) & modules


def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious.png").write_bytes(b"precious")
    for name in ("a.png", "a.pth"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=f"a file {tmp_path}/precious.png already"):
        cli.main(["inpaint", "--image=~/a.png", "--output=~/precious.png"])
    with pytest.raises(SystemExit, match=f"a file {tmp_path}/precious.png already"):
        cli.main(["convert", "~/a.pth", "~/precious.png"])
    cli.main(["masks", "--output=~/masks", "--count=1", "--size=8"])
    assert os.listdir(tmp_path / "masks") == ["mask_00000.png"]
    with pytest.raises(SystemExit, match=f"no checkpoint in {tmp_path}/run/"):
        cli.main(["eval", "--workdir=~/run"])
    with pytest.raises(SystemExit, match=f"of step 1 in {tmp_path}/checkpoints"):
        cli.main(["convert", "--step=1", "~/", "out.safetensors"])
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "precious.png").read_bytes() == b"precious"
