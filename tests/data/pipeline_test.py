import contextlib
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pconv_jax import RunError, UserError
from pconv_jax.data import pipeline, sources
from pconv_jax.data.base import ImageSource
from pconv_jax.data.mask_folder import MaskFolder
from tests.helpers import ROOT
from tests.helpers.images import encode, photo, write_folder


class Flat(ImageSource):
    """Image i has red i and green i + 1; those in `bad` cannot be read."""

    def __init__(self, size, shape=(20, 30), bad=()):
        self.size, self.shape, self.bad = size, shape, bad

    def __len__(self):
        return self.size

    def read(self, index):
        color = np.array([index, index + 1, 7], np.uint8)
        image = np.broadcast_to(color, (*self.shape, 3))
        return b"no image" if index in self.bad else encode(image.copy())

    def name(self, index):
        return f"flat-{index}"


class Gradient(Flat):
    """Red is the column, green is the row, blue is the index."""

    def read(self, index):
        if index in self.bad:
            return b"no image"
        row, column = np.indices(self.shape)
        return encode(np.stack([column, row, row * 0 + index], -1).astype(np.uint8))


def take(source, count, **options):
    options = {"batch_size": 4, "image_size": 16, "seed": 3} | options
    batches = pipeline.train_batches(source, **options)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def assert_equal_batches(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# Training batches.


def test_train_batches_are_plain_arrays():
    (batch,) = take(Flat(9), 1)
    assert {k: (type(v), v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.ndarray, np.uint8, (4, 16, 16, 3)),
        "seed": (np.ndarray, np.uint32, (4,)),
    }


def test_every_epoch_has_every_image_once_in_another_order():
    batches = take(Flat(12), 6)
    order = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    one, two = order[:12], order[12:]
    assert sorted(one) == sorted(two) == list(range(12))
    assert list(one) != list(two)
    seeds = np.concatenate([batch["seed"] for batch in batches])
    assert len(set(seeds)) == 24
    other = take(Flat(12), 3, seed=4)
    assert list(one) != list(np.concatenate([b["image"][:, 0, 0, 0] for b in other]))


def test_crop_is_a_square_of_the_scale_asked_for():
    size = 128
    images = np.concatenate(
        [
            batch["image"].astype(float)
            for batch in take(
                Gradient(8, (100, 200)), 64, image_size=size, scale=(0.4, 0.8)
            )
        ]
    )
    # A crop of side s that starts at column x holds the values x ... x + s - 1.
    left, right = images[:, 64, 0, 0], images[:, 64, -1, 0]
    top, bottom = images[:, 0, 64, 1], images[:, -1, 64, 1]
    width, height = np.abs(right - left) + 1, bottom - top + 1
    assert np.all(np.abs(width - height) <= 2)
    assert 38 <= height.min() < 44 and 76 < height.max() <= 82
    assert abs(height.mean() - 60) < 3
    mirrored = np.mean(right < left)
    assert 0.4 < mirrored < 0.6
    start = np.minimum(left, right)
    assert start.min() < 8 and np.max(start + width) > 192
    assert top.min() < 4 and bottom.max() > 95


def test_no_flip_and_whole_square():
    for batch in take(
        Gradient(8, (50, 50)), 8, image_size=50, scale=(1, 1), flip=False
    ):
        np.testing.assert_array_equal(
            batch["image"][..., 0], np.broadcast_to(np.arange(50), (4, 50, 50))
        )


def test_shrinking_averages():
    class Stripes(Flat):
        def read(self, index):
            stripes = np.zeros((64, 64, 3), np.uint8)
            stripes[:, ::4] = 200
            return encode(stripes)

    (batch,) = take(Stripes(4), 1, image_size=16, scale=(1, 1), flip=False)
    np.testing.assert_array_equal(batch["image"], 50)


def test_resume_equals_dropping_batches():
    source = Flat(10)
    assert_equal_batches(take(source, 3, start_step=4), take(source, 7)[4:])


def test_processes_share_the_global_batch():
    source = Gradient(10, (30, 40))
    whole = take(source, 3, start_step=1)
    parts = [
        take(source, 3, start_step=1, process_index=i, process_count=2)
        for i in range(2)
    ]
    for step in range(3):
        for key in ("image", "seed"):
            joined = np.stack([part[step][key] for part in parts], 1)
            joined = joined.reshape(whole[step][key].shape)
            np.testing.assert_array_equal(joined, whole[step][key])


class Failing(Gradient):
    """Reads 80 images in a process, then no more."""

    left = 80

    def read(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyError("the source's own error")
        return super().read(index)


def test_workers_change_nothing_and_their_end_is_an_error():
    options = {"batch_size": 4, "image_size": 16, "seed": 3}
    expected = take(Gradient(60, (30, 40), bad=(5, 11)), 7)
    for workers in (1, 2):
        source = Failing(60, (30, 40), bad=(5, 11))
        batches = pipeline.train_batches(source, workers=workers, **options)
        assert_equal_batches([next(batches) for _ in range(7)], expected)
        if workers == 1:
            with pytest.raises(KeyError, match="the source's own error"):
                for _ in range(100):
                    next(batches)
        else:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            with pytest.raises(RunError, match="exit code -9.* enough memory"):
                for _ in range(100):
                    next(batches)
        batches.close()
        assert not multiprocessing.active_children()


def test_script_with_workers_ends_quietly(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pconv_jax.data import pipeline, sources\n"
        "def main():\n"
        "    global batches\n"
        "    batches = pipeline.train_batches(\n"
        "        sources.BundledSource('train'), batch_size=2,\n"
        "        image_size=128, seed=0, workers=1)\n"
        "    print(next(batches)['image'].shape)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "(2, 128, 128, 3)\n"


def test_masks_come_from_a_folder_and_leave_the_images_alone(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        mask = np.zeros((64, 64), np.uint8)
        top, left = rng.integers(8, 32, 2)
        mask[top : top + 20, left : left + 20] = 255
        write_folder(tmp_path, {f"{number}.png": encode(mask)})
    folder = MaskFolder(tmp_path)
    batches = take(Gradient(10), 3, mask_folder=folder)
    for batch in batches:
        assert batch["mask"].dtype == np.uint8
        assert batch["mask"].shape == (4, 16, 16, 1)
        assert set(np.unique(batch["mask"])) == {0, 1}
    assert len({mask.tobytes() for batch in batches for mask in batch["mask"]}) > 6
    later = take(Gradient(10), 1, mask_folder=folder, start_step=2)
    assert_equal_batches(later, batches[2:])
    for batch in batches:
        del batch["mask"]
    assert_equal_batches(batches, take(Gradient(10), 3))


def test_unreadable_images_are_skipped_named_and_counted(tmp_path, caplog):
    images = {f"{n:02}.png": encode(photo(seed=n)) for n in range(40)}
    images["07.png"] = images["07.png"][:200]
    images["08.png"] = b""
    write_folder(tmp_path, images)
    source = sources.FolderSource(tmp_path)
    bad = {str(tmp_path / "07.png"), str(tmp_path / "08.png")}
    with caplog.at_level(logging.WARNING):
        batches = pipeline.train_batches(source, batch_size=8, image_size=16, seed=0)
        for _ in range(15):  # Three epochs.
            assert next(batches)["image"].shape == (8, 16, 16, 3)
        batches.close()
    assert set(batches.unreadable) == bad and len(batches.unreadable) == 2
    skipped = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(skipped) == 2
    assert {line.split(" cannot")[0] for line in skipped} == bad
    assert skipped[1].endswith("(2 of 40 images so far)")


def test_next_readable_image_takes_the_place():
    batches = take(Flat(40, bad=(38, 39)), 10)
    seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    assert sorted(seen) == [0, 0, 0, *range(1, 38)]


@pytest.mark.parametrize("bad", [(0, 13, 26), (7, 8, 9), range(40)])
def test_too_many_unreadable_images_are_an_error(bad):
    message = r"3 of 40 images cannot be read, and the limit is 5%.*flat-\d+, flat"
    with pytest.raises(UserError, match=message):
        take(Flat(40, bad=bad), 20)


def test_enlarging_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING):
        take(Flat(8), 4, image_size=19, scale=(0.5, 0.9))
        take(Flat(8), 4, image_size=10, scale=(0.5, 0.9))
    (line,) = [r.getMessage() for r in caplog.records]
    assert re.match(r"flat-\d is enlarged: its crop is smaller than image_size", line)


def test_closed_batches_are_an_error():
    batches = pipeline.train_batches(Flat(4), batch_size=2, image_size=8, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="these batches are closed"):
        next(batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"image_size": -1}, "image_size must be positive, got -1"),
        ({"process_count": 3}, r"multiple of process_count \(=3\), got 4"),
        ({"process_index": 1}, r"process_index must be in \[0, 1\), got 1"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"start_step": -1}, "start_step and workers must not be negative"),
        ({"scale": (0.0, 1.0)}, r"scale must be 0 < low <= high <= 1, got \(0.0"),
        ({"scale": (0.5, 1.5)}, r"scale must be 0 < low <= high <= 1"),
    ],
)
def test_train_batches_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        take(Flat(4), 1, **arguments)


# Evaluation batches.


def evaluate(source, **options):
    return list(
        pipeline.eval_batches(source, **{"batch_size": 4, "image_size": 16} | options)
    )


def test_eval_batches_are_central_squares_of_every_image():
    batches = evaluate(Gradient(6, (20, 31)), image_size=20)
    assert [{k: (v.dtype, v.shape) for k, v in b.items()} for b in batches] == [
        {
            "image": (np.uint8, (4, 20, 20, 3)),
            "index": (np.int32, (4,)),
            "weight": (np.float32, (4,)),
        }
    ] * 2
    images, index, weight = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("image", "index", "weight")
    )
    np.testing.assert_array_equal(weight, [1] * 6 + [0] * 2)
    np.testing.assert_array_equal(index[:6], range(6))
    np.testing.assert_array_equal(images[:6, 3, 3, 2], range(6))
    # Columns 5 ... 24 of 31.
    np.testing.assert_array_equal(
        images[:6, ..., 0], np.broadcast_to(np.arange(5, 25), (6, 20, 20))
    )


def test_eval_repeats_are_other_crops_and_always_the_same():
    source = Gradient(3, (40, 60))
    batches = evaluate(source, num_examples=10)
    images = np.concatenate([batch["image"] for batch in batches])[:10]
    assert len({image.tobytes() for image in images}) == 10
    np.testing.assert_array_equal(images[:, 0, 0, 2], np.arange(10) % 3)
    assert_equal_batches(evaluate(source, num_examples=10), batches)
    once = np.concatenate([batch["image"] for batch in evaluate(source)])
    np.testing.assert_array_equal(images[:3], once[:3])
    assert sum(b["weight"].sum() for b in evaluate(source, num_examples=2)) == 2


def test_eval_takes_the_next_image_for_one_that_cannot_be_read(caplog):
    batches = evaluate(Flat(50, bad=(2,)))
    red = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    np.testing.assert_array_equal(red[:50], [0, 1, 3, *range(3, 50)])
    assert "flat-2 cannot be read, and flat-3 takes its place" in caplog.text
    with pytest.raises(UserError, match="2 of 39 images .* flat-2, flat-3"):
        evaluate(Flat(39, bad=(2, 3)))


def test_eval_errors():
    with pytest.raises(UserError, match="num_examples must be positive, got 0"):
        evaluate(Flat(3), num_examples=0)


_WORKERS = """
import sys
from pconv_jax.data import pipeline, sources

if __name__ == "__main__":
    source = sources.FolderSource(sys.argv[1])
    batches = pipeline.train_batches(
        source, batch_size=8, image_size=256, seed=0, workers=2
    )
    for _ in batches:
        print("batch", flush=True)
"""


def _children(pid):
    threads = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for path in threads for child in path.read_text().split()]
    return found + [below for child in found for below in _children(child)]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="only Linux has /proc")
def _mapped():
    """Find the names of shared memory that processes use."""
    names = set()
    for maps in pathlib.Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/(\S+)$", maps.read_text(), re.M))
    return names


def test_nothing_outlives_a_process_that_is_killed(tmp_path):
    write_folder(tmp_path / "photos", {"a.png": encode(photo(300, 300))})
    (tmp_path / "script.py").write_text(_WORKERS)
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "photos"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        for _ in range(3):
            assert process.stdout.readline()
        children = _children(process.pid)
        assert len(children) >= 2
        process.kill()

    def left():
        alive = [child for child in children if os.path.exists(f"/proc/{child}/exe")]
        # Other tests, which run beside this one, use what they make.
        return alive, set(os.listdir("/dev/shm")) - before - _mapped()

    for _ in range(200):
        if left() == ([], set()):
            break
        time.sleep(0.1)
    assert left() == ([], set())
