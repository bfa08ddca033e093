"""Batches of NumPy arrays for training and evaluation."""

import collections
import concurrent.futures
import functools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from absl import flags, logging

from pconv_jax import _processes
from pconv_jax._errors import RunError, UserError
from pconv_jax.data.base import ImageSource
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.data.transforms import (
    TrainTransform,
    eval_example,
    max_unreadable,
    too_many_unreadable,
)

if TYPE_CHECKING:
    import grain


# Decoding releases the GIL, so as many threads as cores are fastest: on two cores, 1560
# crops of 256 pixels per second, against 840 with one thread and 1080 with two worker
# processes.
_THREADS = min(os.cpu_count() or 1, 8)


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """Endless training batches, made by `train_batches`.

    Attributes:
      unreadable: Names of the images that could not be read so far. Each was logged
        once and replaced by another. On several hosts, each host lists its own share.
    """

    def __init__(self, source: ImageSource, dataset: "grain.IterDataset"):
        self.unreadable: list[str] = []
        self._source = source
        self._unreadable: set[int] = set()
        self._enlarged = False
        # Closed and dropped before the interpreter exits; otherwise workers print
        # errors.
        self._batches = [iter(dataset)]
        self._close = weakref.finalize(self, _close_all, self._batches)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._batches:
            raise ValueError("these batches are closed; call train_batches again.")
        try:
            # Copied out of the memory that a worker may share with this process: on
            # CPU, JAX would hold on to it.
            batch = {k: np.array(v) for k, v in next(self._batches[0]).items()}
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise RunError(
                f"{error} Was there enough memory, in a container also in /dev/shm? Is "
                "the script under `if __name__ == '__main__'`?"
            ) from error
        self._report(batch.pop("wanted"), batch.pop("used"), batch.pop("enlarged"))
        return batch

    def close(self) -> None:
        """Stop threads and worker processes. There are no more batches afterwards."""
        self._close()

    def _report(
        self, wanted: np.ndarray, used: np.ndarray, enlarged: np.ndarray
    ) -> None:
        size = len(self._source)
        for first, last in zip(wanted.tolist(), used.tolist(), strict=True):
            for index in range(first, first + (last - first) % size):
                self._skip(index % size)
        if enlarged.any() and not self._enlarged:
            self._enlarged = True
            logging.warning(
                "%s is enlarged: its crop is smaller than image_size. This is logged "
                "once; other images may be enlarged too.",
                self._source.name(int(used[enlarged.argmax()])),
            )

    def _skip(self, index: int) -> None:
        if index in self._unreadable:
            return
        self._unreadable.add(index)
        self.unreadable.append(self._source.name(index))
        logging.warning(
            "%s cannot be read and is skipped (%d of %d images so far)",
            self.unreadable[-1],
            len(self.unreadable),
            len(self._source),
        )
        if len(self.unreadable) > max_unreadable(self._source):
            raise too_many_unreadable(self._source, self.unreadable)


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
    mask_folder: MaskFolder | None = None,
) -> TrainBatches:
    """Iterate over endless batches of random crops, reshuffled every epoch.

    An image that cannot be read is replaced by the next readable one, named once in the
    log, and listed in `TrainBatches.unreadable`.

    This sets OpenCV to one thread and silences its log for the whole process, since
    images are already processed in parallel and unreadable ones reported.

    Args:
      source: The images.
      batch_size: Global number of images in a batch, over all processes.
      image_size: Side S of the crops in pixels.
      seed: Seed of all randomness here, in [0, 2**32).
      start_step: Number of batches to skip, to resume. The default is 0.
      process_index: Index of this process in a multi-host run. The default is 0.
      process_count: Number of processes; each gets its share of every batch. The
        default is 1.
      workers: Number of worker processes. With 0, the default, threads of this process
        read ahead, one for each core and up to eight, which is faster until Python
        itself is the limit. Workers take seconds to start, and the script needs
        ``if __name__ == '__main__'``.
      scale: Range of the side of the square crop, relative to the short side of the
        image. The default is (0.5, 1.0).
      flip: Whether to mirror half of the crops, left to right. The default is True.
      mask_folder: Masks to draw from. With None, the default, batches have no
        ``'mask'``.

    Returns:
      An iterator, to be closed, over dicts with ``'image'``, uint8 ``[B, S, S, 3]``;
      ``'seed'``, uint32 ``[B]``, a random number for each record; and, with a
      ``mask_folder``, ``'mask'``, uint8 ``[B, S, S, 1]``, 1 = valid. B is
      ``batch_size // process_count``.

    Raises:
      UserError: If an argument is out of range; while iterating, if more than 5 % of
        the images cannot be read.
      RunError: While iterating, if a worker process dies.
    """
    _check_positive(
        batch_size=batch_size, image_size=image_size, process_count=process_count
    )
    if batch_size % process_count:
        raise UserError(
            f"batch_size is global and must be a multiple of process_count "
            f"(={process_count}), got {batch_size}."
        )
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index must be in [0, {process_count}), got {process_index}."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in [0, 2**32), got {seed}.")
    if start_step < 0 or workers < 0:
        raise UserError(
            f"start_step and workers must not be negative, got {start_step}, {workers}."
        )
    low, high = scale
    if not 0 < low <= high <= 1:
        raise UserError(f"scale must be 0 < low <= high <= 1, got {scale}.")

    import grain  # Evaluation and cached images do without it.

    _set_up_opencv()
    transform = TrainTransform(source, image_size, (low, high), flip, mask_folder)
    # Without an end, and Grain's numbers would not fit for batches of one.
    epochs = 2**60 // len(source)
    records = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(epochs)
    # Sliced last: the randomness of a record must not depend on who makes it.
    records = records.random_map(transform)
    records = records[start_step * batch_size + process_index :: process_count]
    batches = records.batch(batch_size // process_count)
    if not workers:
        # The buffer counts whole batches. Grain's default of 500 would fill the memory.
        options = grain.ReadOptions(_THREADS, prefetch_buffer_size=_THREADS + 2)
        return TrainBatches(source, batches.to_iter_dataset(options))
    # mp_prefetch reads absl flags of Grain's own, which is an error before flags are
    # parsed. Outside of absl.app.run, as in a notebook, nobody parses them; this gives
    # them their defaults.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = batches.to_iter_dataset(grain.ReadOptions(1, 2)).mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
        worker_init_fn=_set_up_worker,
    )
    return TrainBatches(source, dataset)


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    num_examples: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over every image once, the same on every call.

    Example j is image ``j % len(source)``: its central square in the first round, and
    fixed but different squares in later rounds. An image that cannot be read is
    replaced by the next readable one and named in the log.

    This sets OpenCV to one thread and silences its log, as `train_batches` does.

    Args:
      source: The images.
      batch_size: Number of examples in a batch.
      image_size: Side S of the squares in pixels.
      num_examples: Number of examples, which may exceed the number of images. None, the
        default, is one example for each image.

    Returns:
      An iterator over dicts with ``'image'``, uint8 ``[B, S, S, 3]``; ``'index'``,
      int32 ``[B]``, the number of the example; and ``'weight'``, float32 ``[B]``, which
      is 1, or 0 for examples that fill up the last batch.

    Raises:
      UserError: If an argument is out of range; while iterating, if more than 5 % of
        the images cannot be read.
    """
    num_examples = len(source) if num_examples is None else num_examples
    _check_positive(
        batch_size=batch_size, image_size=image_size, num_examples=num_examples
    )
    _set_up_opencv()
    example = functools.partial(eval_example, source, image_size, num_examples)
    padded = num_examples + -num_examples % batch_size
    examples = read_ahead(example, range(padded))
    return map(_stack, zip(*[examples] * batch_size))


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([x[name] for x in examples]) for name in examples[0]}


def read_ahead(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """Apply a function to numbers in threads, a little ahead of what is taken."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for number in numbers:
                pending.append(pool.submit(function, number))
                if len(pending) > 4 * _THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _close_all(iterators: "list[grain.DatasetIterator]") -> None:
    while iterators:
        iterators.pop().close()


def _set_up_worker(*_: int) -> None:
    """Prepare a worker process, which must not outlive the one that started it."""
    _set_up_opencv()
    _processes.end_with_parent()


def _set_up_opencv() -> None:
    """Set OpenCV to one thread and silence its log, for the whole process.

    Its threads would compete with the threads and workers here, and its log repeats
    which files cannot be read.
    """
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise UserError(f"{name} must be positive, got {value}.")
