"""Every block of code in the README, the guides and docs, executed as it stands."""

import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from pconv_jax import cli
from tests.helpers import ROOT
from tests.helpers.images import photo
from tests.helpers.networks import small_mmagic
from tests.helpers.torch_writer import dump_zip

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compilation")]

PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]

# Commands that set up, or that take long: .ci/run and other tests execute them.
ELSEWHERE = re.compile(
    r"(python3 -m venv|pip|git clone|cd|pre-commit|sphinx-build|tensorboard"
    r"|python -m pytest|python -m benchmarks\.run|python tools/\w+\.py)\b"
)

# The commands stand in the pages as people type them. Here they do less of the same.
SHORTER = {
    "train": "--config.image_size=16 --config.batch_size=4 --config.model.depth=2 "
    "--config.model.width=4 --config.vgg=none --config.masks.kind=rectangles "
    "--config.phase1.steps=1 --config.phase2.steps=0 --config.validation_examples=1",
    "eval": "--examples=1 --no-learned",
}


def find_blocks(page):
    """Yield the language and the text of each block of code."""
    text = (ROOT / page).read_text()
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_command(line):
    words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
    if not words or ELSEWHERE.match(" ".join(words)):
        return
    if words[0] == "python":
        assert words[1] in ("train.py", "eval.py"), line
        words[:2] = ["pconv", words[1].removesuffix(".py")]
        words = [re.sub(r"^configs/", f"{ROOT}/configs/", word) for word in words]
    assert words.pop(0) == "pconv", line
    cli.main([*words, *SHORTER.get(words[0], "").split()])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(photo(48, 64))
    image.save("photo.jpg")
    hole = Image.fromarray(np.pad(np.full((9, 20), 255, np.uint8), 10))
    mask = Image.new("L", image.size)
    mask.paste(hole)
    mask.save("mask.png")
    Image.composite(Image.new("RGB", image.size, "#ff00ff"), image, mask).save(
        "painted.png"
    )
    image.putalpha(mask.point(lambda value: 255 - value))
    image.save("erased.png")
    for name in ("photos", "masks"):
        pathlib.Path(name).mkdir()
    for seed in range(6):  # One of them is held out.
        Image.fromarray(photo(48, 64, seed)).save(f"photos/{seed}.png")
        mask.save(f"masks/{seed}.png")
    return tmp_path


def train_mine():
    run_command(
        "pconv train --config folder --config.data.path=photos --workdir=runs/mine"
    )


@pytest.mark.parametrize("page", [p for p in PAGES if any(find_blocks(p))])
def test_blocks_run(page, folder):
    if page == "docs/evaluate.md":
        train_mine()
    if page == "docs/networks.md":
        weights = dump_zip({"state_dict": small_mmagic()})
        pathlib.Path("pconv_places.pth").write_bytes(weights)
    namespace = {}
    for language, block in find_blocks(page):
        if language == "python":
            exec(compile(block, page, "exec"), namespace)
        elif language == "sh":
            for line in block.replace("\\\n", "").splitlines():
                for output in re.findall(r"--output (\S+\.png)", line):
                    pathlib.Path(output).unlink(missing_ok=True)
                run_command(line)
        else:
            assert language in ("text", "bibtex"), language
