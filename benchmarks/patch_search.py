"""Compares the search for patches, which is written in JAX, with one in Numba.

    python -m benchmarks.patch_search

The photo is repaired once, and what `search_and_vote` is called with is recorded: once
for each hole and scale. Then the forms compute these calls again, in turns. They make
the same proposals, but Numba visits one patch after the other: a patch profits at once
from its neighbors, and a distance is no longer summed when it is too large. The photo
comes with scikit-image, a dependency of training.
"""

import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import cv2
import jax
import numpy as np
import skimage.data

from pconv_jax.inpaint import detail, patch_search
from pconv_jax.inpaint.inpainter import Inpainter

# Other layers spin while they wait, which slows all that shares the machine.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
try:
    import numba
except ModuleNotFoundError:
    sys.exit("benchmarks.patch_search needs Numba: pip install numba.")

_TURNS = 7  # Besides the first one.
_STEPS = np.arange(-patch_search.RADIUS, patch_search.RADIUS + 1)
_FASTMATH = {"contract", "nsz", "reassoc"}  # Distances may start at infinity.
_CHANNELS = 3  # A constant, so that the loops over a patch are vectorized.


class _Call(NamedTuple):
    """What `search_and_vote` is called with."""

    seed: np.uint32
    image: np.ndarray
    match: np.ndarray
    problem: patch_search.Problem
    rounds: int


_Form = Callable[[_Call], tuple[np.ndarray, np.ndarray]]


def main() -> None:
    """Measure all forms at two tasks, and print a table for each."""
    names = ("jax", "jaxlib", "numba", "llvmlite")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    sizes = (f"{name} {_megabytes(name):.0f} MB" for name in names)
    print(f"installed: {', '.join(sizes)}; {os.cpu_count()} cores")
    discs, wide = np.zeros((2, 512, 512), np.uint8)
    for y, x in np.ndindex(3, 3):
        cv2.circle(discs, (86 + 170 * x, 86 + 170 * y), 30, 1, -1)
    wide[156:356, 156:356] = 1
    for task, hole in (("nine holes of 61 pixels", discs), ("one hole of 200", wide)):
        calls = _record(hole > 0)
        patches = sum(call.problem.total for call in calls)
        print(f"\n512 x 512, {task}: {hole.mean():.1%} missing")
        print(f"{len(calls)} searches, {patches} patches")
        _compare(calls)


def _megabytes(package: str) -> float:
    files = importlib.metadata.files(package) or []
    return sum(file.size or 0 for file in files) / 1e6


def _record(hole: np.ndarray) -> list[_Call]:
    """Repair the photo, and record the calls of the search."""
    calls: list[_Call] = []

    def record(*arguments: Any, progress: Any) -> tuple[np.ndarray, np.ndarray]:
        del progress
        calls.append(_Call(*arguments))
        return patch_search.search_and_vote(*arguments)

    with mock.patch.object(detail, "search_and_vote", record):
        Inpainter.from_pretrained()(skimage.data.astronaut(), hole)
    return calls


def _compare(calls: list[_Call]) -> None:
    jax.clear_caches()  # Both are compiled in the first turn.
    forms: dict[str, _Form] = {"JAX": _search_by_jax}
    for threads in sorted({1, os.cpu_count() or 1}):
        forms[f"Numba, threads: {threads}"] = _compile(threads)
    walls: dict[str, list[float]] = {name: [] for name in forms}
    cpus: dict[str, list[float]] = {name: [] for name in forms}
    distances: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(_TURNS + 1):
        calls = [c._replace(seed=c.seed + np.uint32(turn)) for c in calls]
        for name, form in forms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results = [form(call) for call in calls]
            cpus[name].append(time.process_time() - cpu)
            walls[name].append(time.perf_counter() - wall)
            distances[name].append(_distance(calls, results))
    print(f"load {os.getloadavg()[0]:.1f}; ratios are to JAX, of the same turn")
    print(" " * 21 + "first: wall, CPU s   later: wall, CPU s, ratios; distance")
    for name in forms:
        measured = walls, cpus
        columns = [f"{times[name][0]:8.2f}" for times in measured]
        columns += [f"{statistics.median(times[name][1:]):8.2f}" for times in measured]
        columns += [_ratio(times[name][1:], times["JAX"][1:]) for times in measured]
        distance = statistics.mean(distances[name])
        print(f"{name:20}{''.join(columns)}{distance:9.0f}")


def _ratio(times: list[float], others: list[float]) -> str:
    ratios = [a / b for a, b in zip(times, others)]
    return f"{statistics.median(ratios):8.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def _distance(
    calls: list[_Call], results: list[tuple[np.ndarray, np.ndarray]]
) -> float:
    """Compute the mean squared distance of all patches to their matches."""
    total = 0.0
    for call, (image, match) in zip(calls, results):
        count = call.problem.total
        offsets = (_STEPS[:, None] * call.problem.row + _STEPS).ravel()
        own = image[call.problem.targets.pixel[:count, None] + offsets]
        total += np.square(own - image[match[:count, None] + offsets]).sum()
    return total / sum(call.problem.total for call in calls)


def _search_by_jax(call: _Call) -> tuple[np.ndarray, np.ndarray]:
    return patch_search.search_and_vote(*call)


def _compile(threads: int) -> _Form:
    """Define the search anew, so that it is compiled at its first call."""
    jit = numba.njit(fastmath=_FASTMATH, inline="always")
    ratio = np.float32(len(_STEPS) ** 2 / 5)  # 5 points for a patch.
    estimate_weight = np.float32(patch_search.ESTIMATE_WEIGHT**2)

    @jit
    def measure(image, problem, guide_weight, own, other, least):
        """Compute the distance of two patches, or a number of at least `least`."""
        row, low = problem.row, problem.low
        structure = np.float32(0)
        for point in (0, -2 * row - 2, -2 * row + 2, 2 * row - 2, 2 * row + 2):
            for c in range(_CHANNELS):
                structure += (low[own + point, c] - low[other + point, c]) ** 2
        distance = guide_weight * ratio * structure
        for y in range(-2, 3):
            if distance >= least:
                break
            a, b = own + y * row - 2, other + y * row - 2
            line = np.float32(0)
            for x in range(5):
                for c in range(_CHANNELS):
                    line += (image[a + x, c] - image[b + x, c]) ** 2
            distance += estimate_weight * line
        return distance

    @jit
    def offer(image, problem, guide_weight, own, state, other):
        match, least = state
        if other != match and 0 <= other < len(image) and problem.is_center[other]:
            new = measure(image, problem, guide_weight, own, other, least)
            if new < least:
                return other, new
        return match, least

    @jit
    def jump(image, problem, guide_weight, own, state, far):
        down, right = np.random.randint(-far, far + 1), np.random.randint(-far, far + 1)
        other = state[0] + down * problem.row + right
        return offer(image, problem, guide_weight, own, state, other)

    @jit
    def search(image, match, problem, targets, target):
        row, own = problem.row, np.int64(targets.pixel[target])
        guide_weight = targets.guide_weight[target]
        first = np.int64(match[target])
        least = measure(image, problem, guide_weight, own, first, np.float32(np.inf))
        state = first, least
        for stride in (8, 4, 2, 1):
            for shift in (stride, -stride, stride * row, -stride * row):
                place = min(max(own - shift, 0), len(image) - 1)
                neighbor = problem.target_at[place]
                if neighbor >= 0:
                    other = match[neighbor] + shift
                    state = offer(image, problem, guide_weight, own, state, other)
            far = max(1, problem.reach * stride // 32)
            state = jump(image, problem, guide_weight, own, state, far)
        state = jump(image, problem, guide_weight, own, state, problem.reach)
        match[target] = state[0]
        return state[1]

    @jit
    def vote(image, match, weight, problem, own):
        """Write a pixel of the hole; only pixels outside of it are read."""
        total = np.float32(1e-12)
        red = green = blue = np.float32(0)
        for y in range(-2, 3):
            for x in range(-2, 3):
                offset = y * problem.row + x
                voter = problem.target_at[own - offset]
                if voter >= 0:
                    place = match[voter] + offset
                    total += weight[voter]
                    red += weight[voter] * image[place, 0]
                    green += weight[voter] * image[place, 1]
                    blue += weight[voter] * image[place, 2]
        image[own, 0], image[own, 1] = red / total, green / total
        image[own, 2] = blue / total

    @numba.njit(fastmath=_FASTMATH, parallel=True)
    def search_and_vote(image, match, problem, targets):
        total = problem.total
        distance = np.empty(total, np.float32)
        # A thread may read a neighbor's match before or after another one writes it.
        for target in numba.prange(total):
            distance[target] = search(image, match, problem, targets, target)
        spread = distance.mean() + 1
        weight = np.exp(-distance / (2 * spread)) + np.float32(1e-6)
        weight *= targets.rim_weight[:total]
        for target in numba.prange(total):
            if targets.in_hole[target]:
                vote(image, match, weight, problem, targets.pixel[target])

    def refine(call: _Call) -> tuple[np.ndarray, np.ndarray]:
        numba.set_num_threads(threads)
        image, match = call.image.copy(), call.match.copy()
        # Numba's parallel loops take no tuple in a tuple.
        problem, targets = call.problem._replace(targets=0), call.problem.targets
        for _ in range(call.rounds):
            search_and_vote(image, match, problem, targets)
        return image, match

    return refine


if __name__ == "__main__":
    main()
