import fcntl
import glob
import io
import json
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import termios
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from pconv_jax.train.loggers import MetricWriter, Progress, announce_compilation
from tests.helpers import ROOT


def read_lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    events = []
    for path in glob.glob(f"{workdir}/tensorboard/*"):
        file = io.BytesIO(pathlib.Path(path).read_bytes())
        # A record: length, its checksum, data, their checksum.
        while header := file.read(12):
            (length,) = struct.unpack("<Q", header[:8])
            events.append(Event.FromString(file.read(length)))
            file.read(4)
    return sorted(events, key=lambda event: event.wall_time)


def make_image(height=6, width=5):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_scalars_are_in_the_file_as_soon_as_they_are_written(tmp_path):
    before = time.time()
    with MetricWriter(tmp_path / "new" / "run") as writer:
        writer.write_scalars(1, {"train/loss": 2.5, "train/psnr": jnp.asarray(0.5)})
        writer.write_scalars(
            np.int64(2), {"a": math.nan, "b": -math.inf, "c": np.float32(0.25)}
        )
        lines = read_lines(tmp_path / "new" / "run")
    for line in lines:
        assert before <= line.pop("time") <= time.time()
    assert lines == [
        {"step": 1, "train/loss": 2.5, "train/psnr": 0.5},
        {"step": 2, "a": None, "b": None, "c": 0.25},
    ]


def test_tensorboard_has_the_same(tmp_path, caplog):
    written = make_image()
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(7, {"train/loss": 2.5, "train/bad": math.nan})
        writer.write_image(7, "samples", written)
    events = read_events(tmp_path)
    values = [(event.step, v) for event in events for v in event.summary.value]
    (step, scalar), (image_step, image) = values
    assert (step, scalar.tag, scalar.simple_value) == (7, "train/loss", 2.5)
    assert (image_step, image.tag) == (7, "samples")
    decoded = Image.open(io.BytesIO(image.image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(decoded), written)
    assert not caplog.records


def test_images_are_read_back_as_they_were(tmp_path):
    written = make_image()
    with MetricWriter(tmp_path) as writer:
        writer.write_image(12, "validation/samples", written[::-1])
        writer.write_image(12, "validation/samples", written)
    (path,) = (path for path in (tmp_path / "pictures").rglob("*") if path.is_file())
    assert path == tmp_path / "pictures" / "validation" / "samples_0000012.png"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), written)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3)), np.zeros((1, 4, 4, 3), np.uint8)]
)
def test_only_uint8_images_are_written(tmp_path, image):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"uint8 of shape \[H, W, 3\], got"):
            writer.write_image(1, "samples", image)
    assert not (tmp_path / "pictures").exists()


def test_a_resumed_run_has_each_step_once(tmp_path):
    with MetricWriter(tmp_path, first_step=1) as writer:
        for step in range(1, 7):
            writer.write_scalars(step, {"run": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "ti')
    with MetricWriter(tmp_path, first_step=4) as writer:
        assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]
        for step in range(4, 6):
            writer.write_scalars(step, {"run": 2})
    lines = [(line["step"], line["run"]) for line in read_lines(tmp_path)]
    assert lines == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "tensorboard",
    }
    events = read_events(tmp_path)
    (restart,) = (e for e in events if e.HasField("session_log") and e.step == 4)
    # TensorBoard forgets what has this step or a later one and is older.
    assert restart.session_log.status == restart.session_log.START
    steps = [e.step for e in events if e.summary.value]
    assert steps == [1, 2, 3, 4, 5, 6, 4, 5]


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "time": 1.0', '{"step": 3, "time": 1.0}', "\0" * 40, '"']
)
def test_a_torn_line_is_dropped_and_nothing_else(tmp_path, torn):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_scalars(2, {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(3, {"loss": 3.0})
    assert [line["loss"] for line in read_lines(tmp_path)] == [1.0, 2.0, 3.0]


def test_other_hosts_write_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", enabled=False) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_image(1, "samples", make_image())
    assert not (tmp_path / "run").exists()


def test_a_log_file_gets_a_line_for_each_postfix(capsys):
    with Progress(1000, 100) as bar:
        for step in range(1, 201):
            bar.update()
            if step % 100 == 0:
                bar.set_postfix({"loss": 1 / 3, "images/s": 1234.5678})
        bar.write("saved")
    out, err = capsys.readouterr()
    first, second, message = err.splitlines()
    assert out == ""
    assert first.startswith("train: 200/1000 [00:00<")
    assert first.endswith(", loss=0.3333, images/s=1235]")
    assert second.startswith("train: 300/1000 [")
    assert message == "saved"


def test_no_progress_of_other_hosts(capsys):
    with Progress(10, enabled=False) as bar:
        bar.update()
        bar.set_postfix({"loss": 1.0})
        bar.write("saved")
    assert capsys.readouterr() == ("", "")


def test_compiling_is_announced_once(capsys):
    calls = []
    announced = announce_compilation(lambda *x: calls.append(x) or x, "phase1")
    assert announced(1, 2) == (1, 2)
    out, err = capsys.readouterr()
    before, after = err.splitlines()
    assert (out, before) == ("", "phase1: compiling")
    assert re.fullmatch(r"phase1: compiled and called in \d+\.\d s", after)
    assert announced(3) == (3,) and calls == [(1, 2), (3,)]
    assert announce_compilation(lambda x: x, "phase1", enabled=False)(4) == 4
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_messages_on_lines_of_their_own():
    script = """if True:
    from pconv_jax.train.loggers import Progress

    with Progress(10, 5) as bar:
        bar.update(3)
        bar.set_postfix({"loss": 0.5})
        bar.write("saved")
    """
    terminal, stderr = os.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", script]
    subprocess.run(command, stderr=stderr, env=environment, check=True, timeout=60)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    pieces = [piece.strip() for piece in shown.replace("\r", "\n").splitlines()]
    pieces = [piece for piece in pieces if piece]
    assert "saved" in pieces
    assert pieces[0].startswith("train:  50%|")
    assert pieces[-1].startswith("train:  80%|")
    assert "8/10" in pieces[-1] and "loss=0.5" in pieces[-1]


def test_nothing_imports_pytorch_where_it_is_installed(tmp_path):
    """tensorboardX does; it takes seconds and half a gigabyte."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = f"""
import sys
import pconv_jax
for name in pconv_jax.__all__:
    getattr(pconv_jax, name)
from pconv_jax.train.loggers import MetricWriter
with MetricWriter({str(tmp_path / "run")!r}) as writer:
    writer.write_scalars(1, {{"loss": 1.0}})
assert "torch" not in sys.modules
import torch
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (1, "torch was imported\n")
