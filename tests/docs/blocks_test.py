"""Every block of code in the README, the guides and docs, executed as it stands."""

import pathlib
import re
import shlex
import tarfile

import numpy as np
import pytest
from PIL import Image

from pconv_jax import cli
from tests.helpers import ROOT
from tests.helpers.images import photo
from tests.helpers.networks import small_mmagic
from tests.helpers.torch_writer import dump_zip

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compilation")]

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
PAGES += ["pconv_jax/weights/bundled/README.md", "tests/testdata/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"^```(.+)\n((?:.*\n)*?)```$", re.MULTILINE)

# Commands that set up, or that take long: .ci/run and other tests execute them.
ELSEWHERE = re.compile(
    r"(python3 -m venv|source|pip|git clone|cd|pre-commit|sphinx-build"
    r"|python -m pytest)\b"
)

# Scripts that take long. Other tests execute them; here their options are checked.
SCRIPT = re.compile(r"python (?:-m )?((?:benchmarks|tests|tools)[./]\S+)")

# The commands stand in the pages as people type them. Here they do less of the same.
SHORTER = {
    "train": "--config.image_size=16 --config.batch_size=4 --config.model.depth=2 "
    "--config.model.width=4 --config.vgg=none --config.masks.kind=rectangles "
    "--config.phase1.steps=1 --config.phase2.steps=0 --config.validation_examples=1",
    "eval": "--examples=1 --no-learned",
}


def find_blocks(page):
    """Find the language and the text of each block of code."""
    return BLOCK.findall((ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_overlooked(page):
    text = (ROOT / page).read_text()
    assert text.count("```") == 2 * len(find_blocks(page))
    indented = re.search(r"^\n {4}.*\S", BLOCK.sub("", text), re.MULTILINE)
    assert not indented, "blocks must be fenced, or they are not executed"


def run_command(line):
    line = line.replace(".venv/bin/", "")
    line = line.replace("--image-size 256", "--image-size 128")
    words = shlex.split(line, comments=True)
    if not words or ELSEWHERE.match(" ".join(words)):
        return
    if script := SCRIPT.match(" ".join(words)):
        check_options(script[1], words)
        return
    if words[0] == "python":
        assert words[1] in ("train.py", "eval.py"), line
        words[:2] = ["pconv", words[1].removesuffix(".py")]
        words = [re.sub(r"^configs/", f"{ROOT}/configs/", word) for word in words]
    assert words.pop(0) == "pconv", line
    cli.main([*words, *SHORTER.get(words[0], "").split()])


def check_options(script, words):
    """Check that a script exists and has the options of a command."""
    path = ROOT / script.replace(".py", "").replace(".", "/")
    source = path.with_suffix(".py").read_text()
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in source or option.startswith("--config"), option


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
    for name in ("photos.tar", "val.tar"):
        with tarfile.open(name, "w") as archive:
            archive.add("photos")
    return tmp_path


def train_mine():
    run_command(
        "pconv train --config folder --config.data.path=photos --workdir=runs/mine"
    )


@pytest.mark.parametrize("page", [p for p in PAGES if find_blocks(p)])
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
        elif language.startswith("{"):  # A directive of Sphinx.
            continue
        else:
            assert language in ("text", "bibtex"), language
