"""The search for similar patches (PatchMatch), and the vote of what they suggest.

A hole is filled at one scale by two steps, in turn. In the *search*, every patch that
touches the hole (a *target*) looks for the most similar patch that lies outside it. It
tries the matches of its neighbors, and random ones. In the *vote*, every pixel of the
hole becomes the weighted mean of what the patches around it suggest. Here are both, as
compiled functions of arrays; `pconv_jax.inpaint.detail` decides what is compared.

All pixels of an image are numbered along one axis, and the geometry and the number of
targets are dynamic, so that a few lengths P of arrays serve images and holes of any
size, and little is compiled.

References: Barnes et al., "PatchMatch", 2009, for the search; Wexler et al.,
"Space-Time Completion of Video", 2007, for the vote.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pconv_jax.inpaint.progress import Progress, ignore

# Patches are squares of 2 RADIUS + 1 = 5 pixels. Smaller ones copy less structure,
# larger ones fit less well.
RADIUS = 2
SIDE = 2 * RADIUS + 1
_STEPS = np.arange(-RADIUS, RADIUS + 1, dtype=np.int32)
_STRIDES = (8, 4, 2, 1)  # Distances, in pixels, at which neighbors share their matches.
ESTIMATE_WEIGHT = 0.6  # Of differences from the estimate, beside those from the guide.
_CHUNK = 2048  # Patches that are searched at a time: they fit into a CPU's cache.


def find_length(shape: tuple[int, ...]) -> int:
    """Find the length P of the arrays for an image and its smaller scales.

    It is 1.125 times a power of two. So there are few lengths to compile for, and an
    image whose sides are powers of two fits with its border.
    """
    height, width = (n + 2 * RADIUS for n in shape)
    needed = max(height * width, 16384)
    return int(1.125 * 2 ** math.ceil(math.log2(needed / 1.125)))


@dataclasses.dataclass(frozen=True)
class Grid:
    """The pixels of an image with a border of RADIUS, numbered row by row."""

    height: int
    width: int
    length: int  # Of the arrays.

    @property
    def row(self) -> int:
        """The number of pixels in a row."""
        return self.width + 2 * RADIUS

    def number(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the numbers of pixels."""
        return ((rows + RADIUS) * self.row + columns + RADIUS).astype(np.int32)

    def place(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and columns of numbers."""
        return number // self.row - RADIUS, number % self.row - RADIUS

    def flatten(self, image: np.ndarray, *, border: int | None = None) -> np.ndarray:
        """Return values by number, padded to a length: ``[P, ...]``.

        The border has a value, or by default those of the nearest pixels.
        """
        widths = [(RADIUS, RADIUS)] * 2 + [(0, 0)] * (image.ndim - 2)
        if border is None:
            flat = np.pad(image, widths, mode="edge")
        else:
            flat = np.pad(image, widths, constant_values=border)
        flat = flat.reshape(-1, *image.shape[2:])
        rest = self.length - len(flat)
        widths = [(0, rest)] + [(0, 0)] * (flat.ndim - 1)
        return np.pad(flat, widths, constant_values=border or 0)

    def unflatten(self, flat: np.ndarray) -> np.ndarray:
        """Return the image that was flattened, without its border."""
        size = (self.height + 2 * RADIUS) * self.row
        image = flat[:size].reshape(-1, self.row, *flat.shape[1:])
        return image[RADIUS:-RADIUS, RADIUS:-RADIUS]

    def fill_up(self, values: np.ndarray) -> np.ndarray:
        """Repeat the last of the targets' values ``[N]`` up to the length: ``[P]``."""
        return np.pad(values, (0, self.length - len(values)), mode="edge")


class Targets(NamedTuple):
    """The patches that touch the hole, by their centers.

    Arrays ``[P]``, of NumPy outside of compiled functions and of JAX inside;
    `Problem.total` says how many entries are in use.

    Attributes:
      pixel: Number of the center.
      in_hole: Whether the center is in the hole.
      guide_weight: Weight of differences from the guide.
      rim_weight: Weight of the patch's votes.
    """

    pixel: Any
    in_hole: Any
    guide_weight: Any
    rim_weight: Any


class Problem(NamedTuple):
    """What does not change while matches are searched at one scale.

    The last three are int32.

    Attributes:
      low: Float32 ``[P, C]``, the low frequencies of the guide.
      is_center: Bool ``[P]``, whether the patch around a pixel may be copied.
      target_at: Int32 ``[P]``, the target whose center a pixel is, or -1.
      targets: The patches that touch the hole.
      total: Number of targets.
      row: Number of pixels in a row.
      reach: Largest distance of a random jump, in pixels.
    """

    low: Any
    is_center: Any
    target_at: Any
    targets: Targets
    total: Any
    row: Any
    reach: Any


def make_problem(
    grid: Grid,
    rows: np.ndarray,
    columns: np.ndarray,
    *,
    in_hole: np.ndarray,
    guide_weight: np.ndarray,
    rim_weight: np.ndarray,
    low: np.ndarray,
    is_center: np.ndarray,
) -> Problem:
    """Number the pixels of a search, and lengthen its arrays.

    Args:
      grid: The pixels of the image.
      rows: Rows of the centers of the N targets, at least one, ``[N]``.
      columns: Their columns, ``[N]``.
      in_hole: See `Targets`, bool ``[N]``.
      guide_weight: See `Targets`, float32 ``[N]``.
      rim_weight: See `Targets`, float32 ``[N]``.
      low: See `Problem`, float32 ``[H, W, C]``.
      is_center: See `Problem`, bool ``[H, W]``.
    """
    target_at = np.full((grid.height, grid.width), -1, np.int32)
    target_at[rows, columns] = np.arange(len(rows))
    pixel = grid.number(rows, columns)
    # The last target fills them up: its neighbors are pixels, too.
    targets = map(grid.fill_up, (pixel, in_hole, guide_weight, rim_weight))
    return Problem(
        low=grid.flatten(low),
        is_center=grid.flatten(is_center, border=False),
        target_at=grid.flatten(target_at, border=-1),
        targets=Targets(*targets),
        total=np.int32(len(rows)),
        row=np.int32(grid.row),
        reach=np.int32(max(grid.height, grid.width)),
    )


def search_and_vote(
    seed: np.uint32,
    image: np.ndarray,
    match: np.ndarray,
    problem: Problem,
    rounds: int,
    *,
    progress: Progress = ignore,
) -> tuple[np.ndarray, np.ndarray]:
    """Search matches and vote, in turn.

    Args:
      seed: Seed of the random numbers.
      image: Float32 ``[P, C]``, with the current estimate in the hole.
      match: For each target, the center of the patch that is copied, ``[P]``.
      problem: The rest.
      rounds: Number of searches and votes.
      progress: Called with the fraction that is done. By default nothing is reported.

    Returns:
      The image with the new estimate, and the matches ``[P]``.
    """
    state, problem = jax.device_put(((image, match), problem))
    for number in range(rounds):
        state = jax.block_until_ready(_take_turn(seed, number, *state, problem))
        progress((number + 1) / rounds)
    return jax.device_get(state)


@functools.partial(jax.jit, donate_argnames=("image", "match"))
def _take_turn(
    seed: jax.Array, number: int, image: jax.Array, match: jax.Array, problem: Problem
) -> tuple[jax.Array, jax.Array]:
    key_of_round = jax.random.fold_in(jax.random.key(seed), number)
    chunks = -(-problem.total // _CHUNK)
    exists = jnp.arange(len(match)) < problem.total

    def search(chunk: jax.Array, state: Any) -> Any:
        key_of_chunk = jax.random.fold_in(key_of_round, chunk)
        match, distance = state
        start = chunk * _CHUNK
        return _search(key_of_chunk, image, match, distance, start, problem)

    distance = jnp.zeros(len(match), jnp.float32)
    match, distance = lax.fori_loop(0, chunks, search, (match, distance))
    spread = jnp.where(exists, distance, 0).sum() / problem.total + 1
    # The constant lets patches vote where all of them are dissimilar.
    similarity = jnp.exp(-distance / (2 * spread)) + 1e-6
    weight = jnp.where(exists, problem.targets.rim_weight * similarity, 0)
    return vote(image, match, weight, problem), match


def _cut(values: Any, start: jax.Array) -> Any:
    """Cut a chunk of N = _CHUNK values from arrays ``[P, ...]``."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, _CHUNK), values)


def _search(
    key: jax.Array,
    image: jax.Array,
    match: jax.Array,
    distance: jax.Array,
    start: jax.Array,
    problem: Problem,
) -> tuple[jax.Array, jax.Array]:
    """Improve the matches of a chunk of targets, in place in all matches.

    Args:
      key: PRNG key.
      image: Float32 ``[P, C]``, with the current estimate in the hole.
      match: The matches of all targets, ``[P]``.
      distance: The distances of their patches, ``[P]``.
      start: The first target of the chunk.
      problem: The rest.

    Returns:
      The matches and the distances.
    """
    row = problem.row
    targets = _cut(problem.targets, start)
    # The guide is smooth: the center and the corners of a patch stand for all of it.
    points = row * _int32([0, -2, -2, 2, 2]) + _int32([0, -2, 2, -2, 2])
    wanted = _patches(image, targets.pixel, row)
    guide = _take(problem.low, targets.pixel[:, None] + points)

    def measure(center: jax.Array) -> jax.Array:
        detail = jnp.square(wanted - _patches(image, center, row)).sum((1, 2, 3))
        low = _take(problem.low, center[:, None] + points)
        structure = jnp.square(guide - low).sum((1, 2)) * (SIDE**2 / len(points))
        return targets.guide_weight * structure + ESTIMATE_WEIGHT**2 * detail

    def offer(state: Any, center: jax.Array) -> Any:
        match, best = state
        own = _cut(match, start)
        center = jnp.clip(center, 0, len(image) - 1)
        center = jnp.where(_take(problem.is_center, center), center, own)
        new = measure(center)
        own = jnp.where(new < best, center, own)
        match = lax.dynamic_update_slice_in_dim(match, own, start, 0)
        return match, jnp.minimum(new, best)

    def propagate(state: Any, shift: jax.Array) -> Any:
        neighbor = problem.target_at.at[targets.pixel - shift].get(mode="clip")
        center = state[0].at[neighbor].get(mode="clip") + shift
        return offer(state, jnp.where(neighbor >= 0, center, -1)), None

    def jump(state: Any, key: jax.Array, far: jax.Array) -> Any:
        down, right = jax.random.randint(key, (2, _CHUNK), -far, far + 1, jnp.int32)
        return offer(state, _cut(state[0], start) + down * row + right)

    def step(state: Any, stride_and_key: tuple[jax.Array, jax.Array]) -> Any:
        stride, key = stride_and_key
        shifts = stride * (row * _int32([0, 0, 1, -1]) + _int32([1, -1, 0, 0]))
        state, _ = lax.scan(propagate, state, shifts)
        return jump(state, key, jnp.maximum(1, problem.reach * stride // 32)), None

    keys = jax.random.split(key, len(_STRIDES) + 1)
    state = match, measure(_cut(match, start))
    state, _ = lax.scan(step, state, (_int32(_STRIDES), keys[1:]))
    match, best = jump(state, keys[0], problem.reach)
    return match, lax.dynamic_update_slice_in_dim(distance, best, start, 0)


@jax.jit
def vote(
    image: jax.Array, match: jax.Array, weight: jax.Array, problem: Problem
) -> jax.Array:
    """Replace the hole by the weighted mean of what all patches suggest.

    Args:
      image: Float32 ``[P, C]``.
      match: For each target, the center of the patch that is copied, ``[P]``.
      weight: Weight of each target's votes, ``[P]``, 0 where there is no target.
      problem: The rest.

    Returns:
      The image with the new estimate in the hole.
    """

    def add(chunk: jax.Array, new: jax.Array) -> jax.Array:
        targets = _cut(problem.targets, chunk * _CHUNK)
        colors = _average(image, targets, match, weight, problem)
        place = jnp.where(targets.in_hole, targets.pixel, len(image))
        return new.at[place].set(colors, mode="drop")

    return lax.fori_loop(0, -(-problem.total // _CHUNK), add, image)


def _average(
    image: jax.Array,
    targets: Targets,
    match: jax.Array,
    weight: jax.Array,
    problem: Problem,
) -> jax.Array:
    """Average what the patches around a chunk of targets suggest: ``[N, C]``."""
    target_at, row = problem.target_at, problem.row

    def add(state: tuple[jax.Array, jax.Array], offset: jax.Array) -> Any:
        total, votes = state
        voter = target_at.at[targets.pixel - offset].get(mode="clip")
        one = jnp.where(voter >= 0, weight.at[voter].get(mode="clip"), 0)
        color = _take(image, match.at[voter].get(mode="clip") + offset)
        return (total + one, votes + one[:, None] * color), None

    nothing = (
        jnp.full(_CHUNK, 1e-12, image.dtype),
        jnp.zeros((_CHUNK, image.shape[1]), image.dtype),
    )
    offsets = (_STEPS[:, None] * row + _STEPS).ravel()
    (total, votes), _ = lax.scan(add, nothing, offsets)
    return votes / total[:, None]


def _patches(image: jax.Array, center: jax.Array, row: jax.Array) -> jax.Array:
    """Gather the patches around pixels, row by row: ``[N, S, S, C]``."""
    starts = center[:, None] + row * _STEPS - RADIUS
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(2, 3), collapsed_slice_dims=(), start_index_map=(0,)
    )
    shape = (SIDE, image.shape[1])
    return lax.gather(
        image, starts[..., None], numbers, shape, mode="promise_in_bounds"
    )


def _int32(values: Sequence[int]) -> jax.Array:
    """Make numbers of pixels, which have 32 bits even if JAX's default is 64."""
    return jnp.array(values, jnp.int32)


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    return values.at[index].get(mode="promise_in_bounds")
