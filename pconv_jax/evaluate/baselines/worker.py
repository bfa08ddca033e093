"""A process that fills images one at a time, on one core, within a time budget.

Other libraries' compiled code cannot be interrupted and may crash. In its own process
it can be killed without harm to the evaluation. The process imports neither JAX nor
the program's main module.
"""

import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time
from typing import IO, NamedTuple, Self

import numpy as np

from pconv_jax.evaluate.baselines import classical

# Libraries would use all cores otherwise.
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


class WorkerResult(NamedTuple):
    """The result for one image.

    Attributes:
      image: uint8 ``[H, W, 3]``, or None if the method failed.
      seconds: Time of the method, without the start of the process.
      error: Why the method failed, or ``''``.
    """

    image: np.ndarray | None
    seconds: float
    error: str


class Worker:
    """Runs one method of `classical.BASELINES` in a process; a context manager."""

    def __init__(self, method: str, *, time_budget: float):
        """Create a worker; its process starts with the first image.

        Args:
          method: Name of the method.
          time_budget: Seconds that an image may take.
        """
        self._method = method
        self._budget = time_budget
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if it has been started."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def fill(self, image: np.ndarray, mask: np.ndarray) -> WorkerResult:
        """Fill an image as `classical.fill` does; report failures in the result."""
        timer, late = None, threading.Event()
        start = time.perf_counter()
        try:
            process = self._start()
            timer = threading.Timer(self._budget, _kill_late, (process, late))
            start = time.perf_counter()
            timer.start()
            requests, answers = _pipes(process)
            pickle.dump((image, mask), requests)
            requests.flush()
            return WorkerResult(*pickle.load(answers))
        except (EOFError, OSError, pickle.UnpicklingError):
            seconds = time.perf_counter() - start
            self.close()
            error = "its process crashed"
            if late.is_set():
                error = f"took over {self._budget:g} s"
            return WorkerResult(None, seconds, error)
        finally:
            if timer:
                timer.cancel()
                timer.join()
            if late.is_set():  # Even if the answer came just before.
                self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process, unless it is running, and wait until it is ready."""
        if self._process and self._process.poll() is None:
            return self._process
        self.close()
        path = [str(pathlib.Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]
        environment = os.environ | _ONE_THREAD
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pconv_jax.evaluate.baselines.worker", self._method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        _, answers = _pipes(self._process)
        pickle.load(answers)  # It sends this when everything is imported.
        return self._process


def _kill_late(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    """Kill a process that is over its budget, and note why."""
    late.set()
    process.kill()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin and process.stdout  # Both were opened as pipes.
    return process.stdin, process.stdout


def _serve(method: str) -> None:
    """Answer requests from standard input until it ends."""
    # Output of libraries must not get into the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import cv2

    cv2.setNumThreads(1)
    # The first call imports libraries, which must not count as time of an image.
    mask = np.ones((32, 32), np.uint8)
    mask[15:17, 15:17] = 0
    classical.fill(np.zeros((32, 32, 3), np.uint8), mask, method=method)
    answer = None
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            image, mask = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        start = time.perf_counter()
        try:
            filled, error = classical.fill(image, mask, method=method), ""
        # Broad on purpose: whatever a library raises on one image is reported as that
        # image's failure, and the next image may succeed.
        except Exception as failure:
            filled, error = None, f"{type(failure).__name__}: {failure}"
        answer = filled, time.perf_counter() - start, error


if __name__ == "__main__":
    try:
        _serve(sys.argv[1])
    except (BrokenPipeError, KeyboardInterrupt):  # The evaluation has ended.
        os._exit(1)
