"""Measures variants in turns, A B A B, each in its own process."""

import json
import pathlib
import select
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.cases import Case, Variant

_ROOT = pathlib.Path(__file__).parent.parent


class WorkerError(Exception):
    """A variant cannot be measured; the message says why."""


class Worker:
    """A process that measures one variant, see `benchmarks.worker`.

    Attributes:
      about: The first answer of the process: versions, device, compilation time and
        memory; empty before `wait`.
    """

    def __init__(self, python: str, variant: Variant, *, timeout: float):
        """Start the process, which imports and compiles; `wait` waits for that."""
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", json.dumps(variant)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=_ROOT,
            text=True,
        )
        assert self._process.stdin and self._process.stdout  # Both are pipes.
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.about: dict[str, Any] = {}

    def wait(self) -> None:
        """Wait until the process can measure."""
        if not self.about:
            self.about = self._read()

    def measure(self, seconds: float) -> dict[str, Any]:
        """Measure for some seconds, and return the answer of the process."""
        try:
            print(seconds, file=self._stdin, flush=True)
        except BrokenPipeError:
            pass  # The process has ended, and _read reports why.
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        # Answers are single lines, so none can be left in a buffer.
        if not select.select([self._stdout], [], [], self._timeout)[0]:
            raise WorkerError(f"no answer within {self._timeout:g} s")
        line = self._stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        reason = lines[-1] if lines and code > 0 else "it was killed"
        raise WorkerError(f"ended with {code}: {reason}")


def compare(
    case: Case,
    results: dict[str, dict[str, Any]],
    *,
    pythons: Mapping[str, str],
    rounds: int,
    seconds: float,
    timeout: float,
    jobs: int = 1,
) -> None:
    """Measure the variants of a case in turns.

    Args:
      case: The case.
      results: Filled in place, so that an interruption loses nothing. Each variant gets
        the answers of its process, the times of each round, and memory; or ``error``,
        the reason why it could not be measured.
      pythons: The Python interpreter of each framework.
      rounds: Number of turns of each variant.
      seconds: Length of a turn, which has at least one call.
      timeout: Seconds that the start of a process or a turn may take.
      jobs: Number of processes that start, and compile, at the same time. The default
        is 1. Turns are never taken at the same time.
    """
    workers: dict[str, Worker] = {}

    def fail(name: str, error: WorkerError) -> None:
        results[name] = {"error": str(error)}
        workers.pop(name).close()

    def start(names: Sequence[str]) -> None:
        for number, name in enumerate(names):
            for other in names[number : number + jobs]:
                if other not in workers:
                    variant = case.variants[other]
                    python = pythons[variant["framework"]]
                    workers[other] = Worker(python, variant, timeout=timeout)
            try:
                workers[name].wait()
            except WorkerError as error:
                fail(name, error)

    def take_turn(name: str) -> None:
        try:
            turn = workers[name].measure(seconds)
        except WorkerError as error:
            fail(name, error)
            return
        times = {k: turn.pop(k) for k in ("wall_s", "cpu_s", "others")}
        result = results.setdefault(name, workers[name].about | {"rounds": []})
        result["rounds"].append(times)
        result |= turn
        if case.large:
            workers.pop(name).close()

    try:
        if jobs > 1 and not case.large:
            start(list(case.variants))
        for _ in range(rounds):
            for name in case.variants:
                if name not in workers and "error" not in results.get(name, {}):
                    start([name])
                if name in workers:
                    take_turn(name)
    finally:
        for worker in workers.values():
            worker.close()


def summarize(
    case: Case, results: dict[str, dict[str, Any]], rates: Mapping[str, float]
) -> None:
    """Add comparable numbers to the results of `compare`.

    Args:
      case: The measured case.
      results: Results of the variants, changed in place.
      rates: Rates of matrix products on this machine, in FLOP/s, by dtype.
    """
    measured = {n: r for n, r in results.items() if "error" not in r}
    for name, result in measured.items():
        rate = rates.get(case.variants[name].get("dtype", "float32"))
        walls = [t for turn in result["rounds"] for t in turn["wall_s"]]
        cpus = [t for turn in result["rounds"] for t in turn["cpu_s"]]
        median = statistics.median(walls)
        result |= {
            "calls": len(walls),
            "median_s": median,
            "fastest_s": min(walls),
            "quartiles_s": _quartiles(walls),
            "cpu_median_s": statistics.median(cpus),
            "others": _largest(turn["others"] for turn in result["rounds"]),
            f"{case.items[1]}_per_s": case.items[0] / median,
        }
        if case.flops:
            result["flops_per_s"] = case.flops / median
        if case.flops and rate:
            result["share_of_matrix_product_rate"] = case.flops / median / rate
    first = measured.get(next(iter(case.variants)))
    if first is None:
        return
    for result in measured.values():
        for key, name in (("wall_s", "relative"), ("cpu_s", "cpu_relative")):
            result[name] = _relative(result["rounds"], first["rounds"], key)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0]] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _relative(
    rounds: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], key: str
) -> dict[str, float]:
    """Compare consecutive turns: slowdowns that affect both cancel out."""
    ratios = [
        statistics.median(a[key]) / statistics.median(b[key])
        for a, b in zip(rounds, others)
    ]
    return {
        "median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }
