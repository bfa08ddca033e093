"""Injects faults, and prints a table of what they cost: ``python -m tests.faults``.

Every fault is injected as often as the table of docs/reliability.md says, or until its
share of ``--minutes`` is over. With ``--record FILE``, the next run continues there.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.weights import pretrained
from tests.helpers import ROOT, hostile
from tests.helpers.commands import training_environment
from tests.helpers.networks import make_network

_KILLS = 4  # Of one run.
_TOGETHER = 500  # Files that one process reads.
_UPLOADS = 20  # At once.

# What a file of less than 16 MB may cost.
_MAX_SECONDS = 10
_MAX_GROWTH = 1e9

_STEPS = 60
_TRAIN = {
    **{"image_size": 16, "batch_size": 4, "model.depth": 2, "model.width": 4},
    **{"masks.kind": "rectangles", "vgg": "none", "validation_examples": 1},
    **{"evaluation_examples": 1, "checkpoint_every": 2, "log_every": 3},
    **{"picture_every": 1000, "validate_every": 20},
    **{"phase1.steps": _STEPS, "phase2.steps": 0},
}


class Fault(NamedTuple):
    """A kind of fault.

    Attributes:
      name: What happens.
      injection: How it is injected.
      many: How often in the long form.
      few: How often in the short form.
      inject: Injects it, given an empty folder and the numbers (the seeds) of the
        injections. Yields how many are done since it last yielded, and what was lost.
    """

    name: str
    injection: str
    many: int
    few: int
    inject: Callable[[Path, range], Iterator[tuple[int, list[str]]]]


def _train(workdir: Path) -> subprocess.Popen[bytes]:
    flags = [f"--config.{name}={value}" for name, value in _TRAIN.items()]
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--config", ROOT / "configs" / "pconv.py"]
        + [*flags, f"--workdir={workdir}"],
        env=training_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def _lines(workdir: Path) -> list[dict[str, float]]:
    """Read the log of a run, without what depends on the time of day."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    measured = ("time", "train/images_per_second")
    return [
        {k: v for k, v in json.loads(line).items() if k not in measured}
        for line in lines
    ]


def _read_params(workdir: Path) -> dict[str, np.ndarray]:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        restored = checkpoints.restore(["params", "opt_state"])
    assert restored
    return hostile.flatten(restored[1])


def _kill_training(folder: Path, numbers: range) -> Iterator[tuple[int, list[str]]]:
    whole = folder / "whole"
    _finish(_train(whole))
    expected, lines = _read_params(whole), _lines(whole)
    for first in numbers[::_KILLS]:
        workdir, lost, chance = folder / "broken", [], random.Random(first)
        for _ in range(_KILLS):  # Then it may come to its end.
            process = _train(workdir)
            while process.poll() is None and not (workdir / "metrics.jsonl").exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 2))
            process.kill()
            process.communicate()
        _finish(_train(workdir))
        actual = _read_params(workdir)
        if any(not np.array_equal(actual[name], expected[name]) for name in expected):
            lost.append("other weights")
        if _lines(workdir) != lines:
            lost.append("another log")
        if any(workdir.rglob("*.partial")):
            lost.append("a half-written file")
        shutil.rmtree(workdir)
        yield _KILLS, lost


def _damage_checkpoints(
    folder: Path, numbers: range
) -> Iterator[tuple[int, list[str]]]:
    rng = np.random.default_rng(0)
    arrays = {s: rng.normal(size=(40, 5)).astype(np.float32) for s in (1, 2)}
    with Checkpoints(folder / "intact") as checkpoints:
        for step, array in arrays.items():
            items = {"params": {"a": array, "b": array[0]}, "opt_state": {"m": array}}
            checkpoints.save(step, items, meta={"step": step})
    files = [path for path in (folder / "intact" / "2").rglob("*") if path.is_file()]
    for number in numbers:
        rng, lost = np.random.default_rng(number), []
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        shutil.copytree(folder / "intact", folder / "damaged")
        chosen = files[rng.integers(len(files))].relative_to(folder / "intact")
        path = folder / "damaged" / chosen
        if rng.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(hostile.mutate(rng, path.read_bytes()))
        with Checkpoints(folder / "damaged") as checkpoints:
            restored = checkpoints.restore(["params", "opt_state"])
            assert restored
            step, items, meta = restored
            values = hostile.flatten(items)
            right = meta == {"step": step} and all(
                np.array_equal(values[f"params/{name}"], expected)
                for name, expected in (("a", arrays[step]), ("b", arrays[step][0]))
            )
            if not right or not np.array_equal(values["opt_state/m"], arrays[step]):
                lost.append(f"wrong values after a change of {chosen}")
            checkpoints.save(3, items)
        kept = {path.name for path in (folder / "damaged").iterdir()}
        if not kept >= {"1", "3"} or not kept & {"2", "2.unreadable"}:
            lost.append(f"a step was deleted after a change of {chosen}")
        yield 1, lost


def _read_hostile_files(
    folder: Path, numbers: range
) -> Iterator[tuple[int, list[str]]]:
    names = list(hostile.readers())
    # One process reads several files of a kind; kinds take turns.
    each = min(_TOGETHER, -(-numbers.stop // len(names)))
    for first in numbers[::each]:
        turn, kind = divmod(first // each, len(names))
        arguments = ["--reader", names[kind], "--first", str(turn * each)]
        child = subprocess.run(
            [sys.executable, "-m", "tests.faults", *arguments, "--count", str(each)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=_MAX_SECONDS * each + 60,
        )
        lost = [f"{names[kind]}, seeds from {turn * each} on: exit {child.returncode}"]
        if not child.returncode:
            lost = json.loads(child.stdout.splitlines()[-1])
        yield each, lost


def _read_some(name: str, first: int, count: int) -> list[str]:
    """Read changed files of one kind, in a process of its own."""
    logging.disable(logging.CRITICAL)
    reader = hostile.readers()[name]
    lost, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            start = time.monotonic()
            _, error = hostile.attempt(reader, seed, Path(folder))
            if error:
                lost.append(f"{name}, seed {seed}: {error}")
            if (seconds := time.monotonic() - start) > _MAX_SECONDS:
                lost.append(f"{name}, seed {seed}: {seconds:.0f} s")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if growth > _MAX_GROWTH:
        lost.append(f"{name}, seeds from {first} on: {growth / 1e9:.1f} GB")
    return lost


def _write_network(folder: Path) -> Path:
    path = folder / "network.safetensors"
    pretrained.save_pretrained(path, *make_network())
    return path


def _kill_repairs(folder: Path, numbers: range) -> Iterator[tuple[int, list[str]]]:
    rng = np.random.default_rng(0)
    hole = np.zeros((64, 64), bool)
    hole[20:40, 20:40] = True
    Image.fromarray(hole).save(folder / "mask.png")
    (folder / "photos").mkdir()
    for i in range(40):
        image = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(image).save(folder / "photos" / f"{i}.png")
    command = [sys.executable, "-m", "pconv_jax.cli", "inpaint"]
    command += ["--weights", _write_network(folder), "--image", folder / "photos"]
    command += ["--mask", folder / "mask.png", "--output"]

    def start(output: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, output],
            cwd=ROOT,
            env=training_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def read(output: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in output.iterdir()}

    _finish(start(folder / "whole"))
    expected = read(folder / "whole")
    for first in numbers[::_KILLS]:
        output, lost, chance = folder / "broken", [], random.Random(first)
        for _ in range(_KILLS):
            process = start(output)
            while process.poll() is None and not output.exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))
            process.kill()
            process.communicate()
            present = read(output) if output.exists() else {}
            for name in present.keys() & expected.keys():
                if present[name] != expected[name]:
                    lost.append(f"half of {name}")
        if any(output.glob(".pconv-*")):  # Else, a kill came too late.
            _finish(start(output))
        finished = {k: v for k, v in read(output).items() if not k.startswith(".")}
        if finished != expected:
            lost.append("other results")
        shutil.rmtree(output)
        yield _KILLS, lost


@contextlib.contextmanager
def _serve_page(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "pconv_jax.cli", "demo", "--port", str(port)]
        + ["--weights", _write_network(folder)],
        cwd=ROOT,
        env=training_environment() | {"TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        yield process, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _abort_uploads(folder: Path, numbers: range) -> Iterator[tuple[int, list[str]]]:
    with _serve_page(folder) as (process, port):
        for _ in numbers[::_UPLOADS]:
            connections, lost = [], []
            for _ in range(_UPLOADS):
                connection = socket.create_connection(("127.0.0.1", port))
                head = 'Content-Disposition: form-data; name="files"; filename="a.png"'
                connection.sendall(
                    "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n"
                    "Content-Type: multipart/form-data; boundary=X\r\n"
                    f"Content-Length: 900000\r\n\r\n--X\r\n{head}\r\n\r\n".encode()
                )
                connection.sendall(bytes(200_000))
                connections.append(connection)
            for connection in connections:
                connection.close()
            kept = []
            for _ in range(100):
                uploads = folder.glob("pconv-*/tmp*")
                if not (kept := [path for path in uploads if path.is_file()]):
                    break
                time.sleep(0.1)
            lost += [f"{path.name} stays on the disk" for path in kept]
            if process.poll() is not None:
                lost.append("the page has ended")
            yield _UPLOADS, lost


FAULTS = {
    "training": Fault(
        "A training process is killed",
        "SIGKILL at a random time, four times a run; weights, optimizer and log are "
        "compared with those of a run that was never killed",
        40,
        4,
        _kill_training,
    ),
    "checkpoints": Fault(
        "A checkpoint is damaged",
        "a file of the newest step is changed at random, cut or deleted, and the run "
        "goes on",
        3352,
        20,
        _damage_checkpoints,
    ),
    "files": Fault(
        "A file of others is hostile",
        "valid files of 20 kinds are changed at random and read, with limits of 10 s "
        "and 1 GB",
        200_000,
        200,
        _read_hostile_files,
    ),
    "repairs": Fault(
        "The repair of a folder is killed",
        "SIGKILL at a random time, four times a folder of 40 images; the same command "
        "finishes it, and the results are compared",
        40,
        4,
        _kill_repairs,
    ),
    "uploads": Fault(
        "Uploads to the page are broken off",
        "20 connections at once are closed in the middle of an upload",
        200,
        20,
        _abort_uploads,
    ),
}
"""Every fault of the table, by its name for ``--only``."""


class Result(NamedTuple):
    """How often a fault was injected, and what was lost."""

    times: int
    lost: list[str]


def inject(
    fault: Fault, before: Result, *, count: int, seconds: float
) -> Iterator[Result]:
    """Inject a fault until it was injected ``count`` times, or the time is over.

    Args:
      fault: The fault.
      before: The result of earlier runs.
      count: How often to inject it, earlier runs included.
      seconds: Limit of time.

    Yields:
      The result so far.
    """
    end, (times, lost) = time.monotonic() + seconds, before
    with tempfile.TemporaryDirectory() as folder:
        for more, lost_now in fault.inject(Path(folder), range(times, count)):
            times, lost = times + more, lost + lost_now
            for line in lost_now:
                print(f"{fault.name}: {line}", file=sys.stderr, flush=True)
            yield Result(times, lost)
            if time.monotonic() > end:
                break


def format_table(results: Mapping[str, Result]) -> str:
    """Format results by the names of their faults as a table in Markdown."""
    rows = ["| Fault | How | Times | Lost |", "|---|---|--:|---|"]
    for name, (times, lost) in results.items():
        what = f"{len(lost)}: {lost[0]}" if lost else "nothing"
        rows.append(
            f"| {FAULTS[name].name} | {FAULTS[name].injection} | {times:,} | {what} |"
        )
    return "\n".join(rows)


def _read_record(path: Path | None) -> dict[str, Result]:
    if path is None or not path.exists():
        return {}
    return {
        name: Result(*result) for name, result in json.loads(path.read_text()).items()
    }


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="limit of time (default: none)")
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--only", choices=FAULTS, help="one fault (default: all)")
    parser.add_argument("--count", type=int, help="how often (default: see the table)")
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        help="keep the results there, and continue what an earlier run has begun",
    )
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        lost = _read_some(arguments.reader, arguments.first, arguments.count)
        print(json.dumps(lost))
        return
    logging.disable(logging.WARNING)
    names = [arguments.only] if arguments.only else list(FAULTS)
    results = _read_record(arguments.record)
    for name in names:
        fault = FAULTS[name]
        count = arguments.count or (fault.few if arguments.short else fault.many)
        before = results.setdefault(name, Result(0, []))
        seconds = (arguments.minutes or 1e9) * 60 / len(names)
        for result in inject(fault, before, count=count, seconds=seconds):
            results[name] = result
            if arguments.record:
                arguments.record.write_text(json.dumps(results))
    print(format_table(results))
    sys.exit(any(result.lost for result in results.values()))


if __name__ == "__main__":
    main()
