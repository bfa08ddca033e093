"""A process that fills pictures, one at a time, on one core and within a time budget.

Compiled code of others cannot be interrupted, and may crash: in a process of its own
it is ended, and takes nothing with it. The process imports neither JAX nor this
program's main module.
"""

import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time
from typing import NamedTuple, Self

import numpy as np

from pconv_jax.evaluate.baselines import classical

# For libraries that would use all cores.
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


class WorkerResult(NamedTuple):
    """What became of a picture.

    Attributes:
      image: uint8 ``[H, W, 3]``, or None if the method failed.
      seconds: that the method took, without the start of the process.
      error: why it failed, or ''.
    """

    image: np.ndarray | None
    seconds: float
    error: str


class Worker:
    """Runs one method of `classical.METHODS`; a context manager."""

    def __init__(self, method: str, *, time_budget: float):
        """Does nothing yet: the process starts with the first picture.

        Args:
          method: its name.
          time_budget: seconds a picture may take.
        """
        self._method = method
        self._budget = time_budget
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def fill(self, image: np.ndarray, mask: np.ndarray) -> WorkerResult:
        """Fills a picture, see `classical.fill`; no failure is raised."""
        timer = None
        start = time.perf_counter()
        try:
            process = self._running()
            timer = threading.Timer(self._budget, process.kill)
            timer.start()
            start = time.perf_counter()
            pickle.dump((image, mask), process.stdin)
            process.stdin.flush()
            return WorkerResult(*pickle.load(process.stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            seconds = time.perf_counter() - start
            self.close()
            late = seconds >= self._budget
            error = f"took over {self._budget:g} s" if late else "its process crashed"
            return WorkerResult(None, seconds, error)
        finally:
            if timer:
                timer.cancel()

    def _running(self) -> subprocess.Popen:
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
        pickle.load(self._process.stdout)  # Ready, with all that it imports.
        return self._process


def _serve(method: str) -> None:
    # What a library prints must not get into the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import cv2

    cv2.setNumThreads(1)
    # The first call imports: its time is nobody's.
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
        except Exception as failure:  # Whatever it is, the next picture may do.
            filled, error = None, f"{type(failure).__name__}: {failure}"
        answer = filled, time.perf_counter() - start, error


if __name__ == "__main__":
    try:
        _serve(sys.argv[1])
    except (BrokenPipeError, KeyboardInterrupt):  # Nobody waits for an answer.
        os._exit(1)
