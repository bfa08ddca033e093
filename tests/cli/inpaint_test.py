import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from pconv_jax import cli
from pconv_jax._errors import UserError
from pconv_jax.inpaint import files
from pconv_jax.inpaint.files import Journal, repair_file
from pconv_jax.inpaint.hole import resize_hole
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.weights import pretrained
from tests.helpers import ROOT
from tests.helpers.commands import pconv
from tests.helpers.networks import make_network

pytestmark = pytest.mark.usefixtures("fast_computation")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    model, variables = make_network()
    pretrained.save_pretrained(path, model, variables)
    return path


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def inpaint(network, *arguments):
    run("inpaint", "--weights", network, *arguments)


def photo(seed=0, size=(30, 40)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


HOLE = np.zeros((30, 40), bool)

HOLE[5:15, 10:30] = True


@pytest.fixture
def folder(tmp_path):
    """Three images, a mask for each, and files that are not images."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    for i, name in enumerate(["a.png", "b.webp", "c.tif"]):
        Image.fromarray(photo(i)).save(tmp_path / "photos" / name, lossless=True)
        mask = Image.fromarray(np.roll(HOLE, i, axis=0))
        mask.save(tmp_path / "masks" / f"{name[0]}.png")
    (tmp_path / "photos" / "notes.txt").write_text("Hello")
    (tmp_path / "photos" / "._a.png").write_text("of macOS")
    return tmp_path


def test_one_image(network, folder):
    out = folder / "new" / "out.png"
    result = pconv(
        *("inpaint", "--weights", network, "--image", folder / "photos" / "a.png"),
        *("--mask", folder / "masks" / "a.png", "--output", out),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr and not result.stdout
    expected = Inpainter.from_pretrained(network)(photo(0), HOLE)
    np.testing.assert_array_equal(Image.open(out), expected)
    assert os.listdir(out.parent) == ["out.png"]


class Terminal(io.StringIO):
    """Standard error, shown to a person."""

    def isatty(self):
        return True


@pytest.mark.parametrize("names", [("photos/a.png", "a.png"), ("photos", "results")])
def test_a_terminal_shows_progress_within_an_image(network, folder, monkeypatch, names):
    monkeypatch.setattr(sys, "stderr", Terminal())
    eager = functools.partialmethod(tqdm.__init__, mininterval=0, miniters=0)
    monkeypatch.setattr(tqdm, "__init__", eager)
    image, output = (folder / name for name in names)
    mask = folder / "masks" / "a.png"
    inpaint(network, "--image", image, "--mask", mask, "--output", output)
    shown = [int(n) for n in re.findall(r"(\d+)%", sys.stderr.getvalue())]
    assert shown == sorted(shown) and (shown[0], shown[-1]) == (0, 100)
    assert len(set(shown)) > 10


def test_folders(network, folder, capsys):
    photos, out = folder / "photos", folder / "out"
    inpaint(network, "--image", photos, "--mask", folder / "masks", "--output", out)
    assert sorted(os.listdir(out)) == ["a.png", "b.webp", "c.tif"]
    inpainter = Inpainter.from_pretrained(network)
    for i, path in enumerate(sorted(out.iterdir())):
        expected = inpainter(photo(i), np.roll(HOLE, i, axis=0))
        np.testing.assert_array_equal(Image.open(path), expected)
    assert not capsys.readouterr().err


def test_one_mask_for_all_and_its_options(network, folder):
    photos, mask, out = folder / "photos", folder / "mask.png", folder / "out"
    Image.fromarray(~HOLE[::2, ::2]).save(mask)
    inpaint(
        network,
        *("--image", photos, "--mask", mask, "--output", out),
        *("--invert-mask", "--resize-mask", "--dilate", "2"),
    )
    hole = resize_hole(HOLE[::2, ::2], HOLE.shape)
    inpainter = Inpainter.from_pretrained(network)
    for i, path in enumerate(sorted(out.iterdir())):
        expected = inpainter(photo(i), hole, dilate=2)
        np.testing.assert_array_equal(Image.open(path), expected)


def test_a_bad_file_is_named_and_the_rest_goes_on(network, folder, capsys):
    photos, out = folder / "photos", folder / "out"
    (photos / "d.png").write_text("Hello")
    Image.fromarray(photo(4)).save(photos / "e.png")
    Image.fromarray(photo(5, (8, 8))).save(photos / "f.png")
    Image.fromarray(HOLE).save(folder / "masks" / "f.png")
    Image.fromarray(photo(6)).save(photos / "g.png")
    Image.fromarray(HOLE & False).save(folder / "masks" / "g.png")
    with pytest.raises(SystemExit, match="3 of 7 images were not repaired") as error:
        inpaint(network, "--image", photos, "--mask", folder / "masks", "--output", out)
    assert isinstance(error.value.code, str)  # Which ends a process with 1.
    assert sorted(os.listdir(out)) == ["a.png", "b.webp", "c.tif", "g.png"]
    lines = capsys.readouterr().err.splitlines()
    assert "d.png: cannot read" in lines[0] and "it is not an image" in lines[0]
    assert "e.png: there must be one mask e.* in" in lines[1] and "none" in lines[1]
    assert "f.png: mask has 40 x 30 pixels, and the image has 8 x 8" in lines[2]
    assert "g.png: There is nothing to fill." in lines[3]
    # Existing files are left, unless one says so.
    before = (out / "a.png").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="7 of 7"):
        inpaint(network, "--image", photos, "--mask", folder / "masks", "--output", out)
    assert (out / "a.png").stat().st_mtime_ns == before
    assert "a.png already; --force replaces it" in capsys.readouterr().err
    arguments = ("--image", photos / "a.png", "--mask", folder / "masks" / "b.png")
    inpaint(network, *arguments, "--output", out, "--force")
    assert (out / "a.png").stat().st_mtime_ns != before


def test_holes_that_the_image_shows(network, folder):
    inpainter = Inpainter.from_pretrained(network)
    expected = inpainter(photo(0), HOLE)
    marked = photo(0) // 2
    marked[HOLE] = (255, 0, 255)
    Image.fromarray(marked).save(folder / "marked.png")
    out = folder / "out.png"
    arguments = ("--output", out, "--force")
    inpaint(
        network, "--image", folder / "marked.png", "--mask-color", "#ff00ff", *arguments
    )
    np.testing.assert_array_equal(Image.open(out), inpainter(photo(0) // 2, HOLE))
    clear = np.dstack([photo(0), np.where(HOLE, 0, 255).astype(np.uint8)])
    Image.fromarray(clear).save(folder / "clear.png")
    inpaint(network, "--image", folder / "clear.png", *arguments)
    result = np.asarray(Image.open(out))
    np.testing.assert_array_equal(result[..., :3], expected)
    assert np.all(result[..., 3] == 255)
    with pytest.raises(SystemExit, match="mask is needed"):
        inpaint(network, "--image", folder / "photos" / "a.png", *arguments)


def test_data(tmp_path):
    model, variables = make_network(channels=1, out_features=1)
    network = tmp_path / "one.safetensors"
    pretrained.save_pretrained(network, model, variables)
    data = 250 + photo(0)[..., 0].astype(np.float32)
    data[HOLE] = np.nan
    np.save(tmp_path / "a.npy", data)
    arguments = ("--image", tmp_path / "a.npy", "--output", tmp_path / "out.npy")
    with pytest.raises(SystemExit, match=r"floats in \[0, 1\], got 250 to"):
        inpaint(network, *arguments)
    inpaint(network, *arguments, "--raw")
    result = np.load(tmp_path / "out.npy")
    assert result.dtype == np.float32 and np.isfinite(result).all()
    np.testing.assert_array_equal(result[~HOLE], data[~HOLE])
    inpaint(network, *arguments, "--value-range", "250", "505", "--force")
    assert np.load(tmp_path / "out.npy").max() <= 505


def test_what_cannot_be_repaired(network, folder):
    image, mask = folder / "photos" / "a.png", folder / "masks" / "a.png"
    out = folder / "out.png"
    (folder / "empty").mkdir()
    for arguments, problem in [
        (
            ("--image", folder / "none", "--output", folder / "new"),
            "--image: there is no file or folder .*none",
        ),
        (
            ("--image", folder / "photos", "--output", image),
            "--output must be a folder",
        ),
        (("--image", folder / "empty", "--output", out), "no image in the folder"),
        (("--image", image, "--mask", mask, "--output", mask), "already; --force"),
        (
            ("--image", image, "--output", "a.doc"),
            "cannot write a.doc: its name must end in .png, ",
        ),
        (
            ("--image", image, "--mask", mask, "--output", folder / "new"),
            "--output must be a file, such as .*new.png, or a folder that exists",
        ),
        (("--image", image, "--output", out, "--invert-mask"), "mask is needed for"),
        (
            ("--image", image, "--mask", mask, "--output", out, "--max-pixels", 9),
            "a.png: it has 40 x 30 pixels, and max_pixels is 9",
        ),
        (
            ("--image", image, "--mask-color", "pinkish", "--output", out),
            "color must be a CSS color",
        ),
        (
            ("--image", image, "--mask", mask, "--output", out, "--tolerance", 5),
            "--tolerance requires --mask-color",
        ),
        (
            ("--image", image, "--mask-color", "red", "--output", out, "--resize-mask"),
            "--resize-mask requires --mask, ",
        ),
    ]:
        with pytest.raises(SystemExit, match=f"pconv: .*{problem}"):
            inpaint(network, *arguments)
    assert not out.exists()


def test_names_that_are_too_long_are_no_files(network, folder):
    name, image = "a" * 300, folder / "photos" / "a.png"
    for arguments, problem in [
        (("--image", name, "--output", "b.png"), "--image: there is no file or folder"),
        (
            ("--image", image, "--mask", folder / "masks" / "a.png")
            + ("--output", f"{name}.png"),
            "File name too long",
        ),
        (("--image", image, "--mask", name, "--output", "b.png"), "cannot read aaa"),
    ]:
        with pytest.raises(SystemExit, match=f"pconv: .*{problem}"):
            inpaint(network, *arguments)
    with pytest.raises(SystemExit, match="weights: there is no file aaa"):
        run("inpaint", f"--image={image}", "--output=b.png", f"--weights={name}")
    with pytest.raises(SystemExit, match="SOURCE: there is no file or folder aaa"):
        run("convert", name, "b.safetensors")


def test_warnings_name_their_file(network, folder, capsys):
    image, mask = folder / "photos" / "a.png", folder / "mask.gif"
    hole = Image.open(folder / "masks" / "a.png").convert("L")
    hole.save(mask, save_all=True, append_images=[hole.point(lambda x: 255 - x)])
    inpaint(network, "--image", image, "--mask", mask, "--output", folder / "b.png")
    assert "a.png: mask.gif has 2 frames; only the first" in capsys.readouterr().err


def test_the_color_of_all_pixels_inverted(network, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="all pixels have the color red"):
        inpaint(
            network,
            *("--image", tmp_path / "a.png", "--output", tmp_path / "b.png"),
            *("--mask-color", "red", "--invert-mask"),
        )


def test_the_same_run_is_not_started_twice(network, folder):
    out = folder / "out"
    with Journal(out, "run"):
        with pytest.raises(UserError, match="another process is writing the same res"):
            Journal(out, "run")
        with Journal(out, "another run") as other:
            other.finish()
    with Journal(out, "run") as journal:  # It was not finished, but has ended.
        journal.finish()
    assert not os.listdir(out)


@pytest.mark.parametrize("command", ["inpaint", "masks", "demo"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        run(command, "--help")
    assert error.value.code == 0
    printed = capsys.readouterr().out
    assert "--output" in printed or "127.0.0.1" in printed
    if command == "inpaint":
        assert "WHITE IS FILLED" in printed and "examples:" in printed


def test_variants_detail_and_exclude(network, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    hole = np.zeros((64, 64), np.uint8)
    hole[20:46, 20:46] = 255
    left = np.zeros((64, 64), np.uint8)
    left[:, :20] = 255
    for name, array in {"i": image, "m": hole, "x": left}.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")

    def repair(name, *options):
        files = (
            f"--{o}={tmp_path / f}.png" for o, f in (("image", "i"), ("mask", "m"))
        )
        output = tmp_path / f"{name}.png"
        inpaint(network, *files, f"--output={output}", *options)
        return np.asarray(Image.open(output))

    first = repair("a", "--variants=2")
    second = np.asarray(Image.open(tmp_path / "a-2.png"))
    np.testing.assert_array_equal(repair("b", "--seed=1"), second)
    results = [first, second, repair("c", "--no-detail"), repair("e", "--no-sharp")]
    results += [repair("d", f"--exclude={tmp_path / 'x.png'}")]
    inpainter = Inpainter.from_pretrained(network)
    for result, options in (first, {"sharp": True}), (results[3], {}):
        np.testing.assert_array_equal(result, inpainter(image, hole, **options))
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result[hole == 0], image[hole == 0])
        for other in results[:number]:
            assert (result != other).any()


def test_a_file_that_appears_meanwhile_is_kept(network, folder):
    image, out = folder / "photos" / "a.png", folder / "out.png"
    with pytest.raises(UserError, match="there is a file .*out.png already"):
        repair_file(
            Inpainter.from_pretrained(network),
            *(image, out),
            mask=folder / "masks" / "a.png",
            progress=lambda fraction: out.write_text("Hello"),
        )
    assert out.read_text() == "Hello"


def test_variants_of_two_images_never_get_one_name(network, folder):
    os.rename(folder / "photos" / "b.webp", folder / "photos" / "a-2.png")
    with pytest.raises(SystemExit, match="a-2.png and a.png.*same name, a-2.png"):
        inpaint(
            network,
            *("--image", folder / "photos", "--mask", folder / "masks" / "a.png"),
            *("--output", folder / "results", "--variants=2", "--force"),
        )
    assert not (folder / "results").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants=0"], "--variants must be at least 1, got 0"),
        (["--seed=-1"], "--seed must not be negative, got -1"),
        (["--no-detail", "--variants=2"], "--variants and --exclude require --detail"),
    ],
)
def test_options_of_detail_that_make_no_sense(network, folder, options, message):
    files = (f"--image={folder}", f"--output={folder / 'out'}")
    with pytest.raises(SystemExit, match=message):
        inpaint(network, *files, *options)


def test_what_is_skipped_is_counted_and_named(network, folder, capsys):
    photos = folder / "photos"
    (photos / "nested").mkdir()
    (photos / "phone.heic").write_bytes(b"an image of another kind")
    os.mkfifo(photos / "d.png")
    Image.fromarray(photo(3)).save(photos / "e.jfif", "JPEG")
    Image.fromarray(photo(4)).save(photos / "f.avif")
    Image.fromarray(HOLE).save(folder / "mask.png")
    arguments = ("--image", photos, "--mask", folder / "mask.png")
    with pytest.raises(SystemExit, match="1 of 6 images were not repaired"):
        inpaint(network, *arguments, "--output", folder / "out")
    lines = capsys.readouterr().err.splitlines()
    assert "d.png: cannot read" in lines[0] and "a pipe" in lines[0]
    assert lines[1].startswith("pconv: 2 skipped") and lines[1].endswith(
        "nested/, phone.heic."
    )
    assert sorted(os.listdir(folder / "out")) == [
        *("a.png", "b.webp", "c.tif", "e.jfif", "f.avif")
    ]


def test_names_match_in_every_unicode_form(network, folder):
    photos = folder / "names"
    photos.mkdir()
    Image.fromarray(photo()).save(photos / "u\u0308ber.png")
    Image.fromarray(HOLE).save(folder / "masks" / "\u00fcber.png")
    out = folder / "out"
    inpaint(network, "--image", photos, "--mask", folder / "masks", "--output", out)
    assert os.listdir(out) == ["u\u0308ber.png"]


def test_a_run_that_fills_nothing_fails(network, folder):
    photos, out = folder / "photos", folder / "out"
    black, white = folder / "black.png", folder / "white.png"
    Image.fromarray(HOLE & False).save(black)
    Image.fromarray(HOLE | True).save(white)
    arguments = ("--image", photos, "--output", out, "--force")
    with pytest.raises(SystemExit, match="filled: no mask has a white pixel"):
        inpaint(network, *arguments, "--mask", black)
    with pytest.raises(SystemExit, match="filled: no mask has a black pixel"):
        inpaint(network, *arguments, "--mask", white, "--invert-mask")
    with pytest.raises(SystemExit, match="no pixel has the color #123456; .*tolerance"):
        inpaint(network, *arguments, "--mask-color", "#123456")
    assert len(os.listdir(out)) == 3
    single = ("--image", photos / "a.png", "--output", folder / "a.png")
    with pytest.raises(SystemExit, match="filled: no mask has a white pixel"):
        inpaint(network, *single, "--mask", black)
    assert not (folder / "a.png").exists()


def test_a_label_is_the_hole(network, folder):
    labels = HOLE * 2 + np.eye(30, 40, dtype=int)
    Image.fromarray(labels.astype(np.uint8)).save(folder / "mask.png")
    arguments = ("--image", folder / "photos" / "a.png", "--mask", folder / "mask.png")
    out = folder / "out.png"
    with pytest.raises(SystemExit, match="the values 0, 1, 2, 3.* with --mask-label"):
        inpaint(network, *arguments, "--output", out)
    inpaint(network, *arguments, "--output", out, "--mask-label", "2")
    expected = Inpainter.from_pretrained(network)(photo(0), labels == 2)
    np.testing.assert_array_equal(Image.open(out), expected)
    with pytest.raises(SystemExit, match="--mask-label requires --mask"):
        inpaint(network, *arguments[:2], "--output", out, "--mask-label", "2")


def test_a_folder_that_was_interrupted_is_finished(
    network, folder, monkeypatch, capsys
):
    photos, out = folder / "photos", folder / "out"
    arguments = ("--image", photos, "--mask", folder / "masks", "--output", out)
    calls = []

    def killed(*given, **options):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return repair_file(*given, **options)

    monkeypatch.setattr(files, "repair_file", killed)
    with pytest.raises(SystemExit, match="interrupted"):
        inpaint(network, *arguments)
    monkeypatch.undo()
    before = {name: (out / name).stat().st_mtime_ns for name in ("a.png", "b.webp")}
    # With other options it would be another run.
    with pytest.raises(SystemExit, match="2 of 3 images were not repaired"):
        inpaint(network, *arguments, "--dilate", "1")
    (out / "c.tif").unlink()
    (out / f".{'0123' * 8}.partial").touch()
    inpaint(network, *arguments)
    assert "Kept 2 files of the same run" in capsys.readouterr().out
    after = {name: (out / name).stat().st_mtime_ns for name in before}
    assert after == before and sorted(os.listdir(out)) == [*before, "c.tif"]
    with pytest.raises(SystemExit, match="3 of 3"):  # Now it has come to its end.
        inpaint(network, *arguments)


@pytest.mark.slow
def test_an_image_that_kills_its_process_does_not_end_the_run(network, folder):
    photos, out = folder / "photos", folder / "out"
    # Its repair takes long enough to be found.
    Image.fromarray(photo(size=(900, 900))).save(photos / "b.webp")
    hole = np.zeros((900, 900), bool)
    hole[100:800, 100:800] = True
    Image.fromarray(hole).save(folder / "masks" / "b.png")
    command = [sys.executable, "-m", "pconv_jax.cli", "inpaint", "--weights", network]
    command += ["--image", photos, "--mask", folder / "masks", "--output", out]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def started():
        return sum(len(path.read_bytes().split()) for path in out.glob(".pconv-*"))

    while process.poll() is None and started() < 2:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    for child in map(int, children.split()):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert "pconv: b.webp: the process that repaired it was ended by SIGKILL" in errors
    assert "pconv: 1 of 3 images were not repaired." in errors
    assert process.returncode == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.tif"]
