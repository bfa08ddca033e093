"""Batches of NumPy arrays for training and evaluation."""

import functools
import os
import weakref
from collections.abc import Iterator

import cv2
import grain
import numpy as np
from absl import flags, logging

from pconv_jax.data.base import ImageSource
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.data.transforms import (
    TrainTransform,
    eval_example,
    max_unreadable,
    too_many_unreadable,
)


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """Endless training batches; made by `train_batches`.

    Attributes:
      unreadable: Names of the pictures that could not be read so far. Each was logged
        once and another took its place. On several hosts, each knows its own share.
    """

    def __init__(self, source: ImageSource, dataset: grain.IterDataset):
        self.unreadable: list[str] = []
        self._source = source
        self._unreadable: set[int] = set()
        self._enlarged = False
        # Closed and dropped before the interpreter goes, or workers make noise then.
        self._batches = [iter(dataset)]
        self._close = weakref.finalize(self, _close_all, self._batches)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._batches:
            raise ValueError("these batches are closed; call train_batches again")
        try:
            # Copied out of the memory that is shared with the worker, if there is one:
            # on CPU, JAX would hold on to it.
            batch = {k: np.array(v) for k, v in next(self._batches[0]).items()}
        except RuntimeError as error:
            error.add_note(
                "If a worker process ended: was there enough memory, in a container "
                "also in /dev/shm? Is the script under `if __name__ == '__main__'`?"
            )
            raise
        self._report(batch.pop("wanted"), batch.pop("used"), batch.pop("enlarged"))
        return batch

    def close(self) -> None:
        """Stops threads and worker processes. No batch can be had afterwards."""
        self._close()

    def _report(self, wanted: np.ndarray, used: np.ndarray, enlarged: np.ndarray):
        size = len(self._source)
        for first, last in zip(wanted.tolist(), used.tolist(), strict=True):
            for index in range(first, first + (last - first) % size):
                self._skip(index % size)
        if enlarged.any() and not self._enlarged:
            self._enlarged = True
            logging.warning(
                "%s is enlarged: its crop is smaller than image_size. Others may be "
                "too; this is said once.",
                self._source.name(int(used[enlarged.argmax()])),
            )

    def _skip(self, index: int):
        if index in self._unreadable:
            return
        self._unreadable.add(index)
        self.unreadable.append(self._source.name(index))
        logging.warning(
            "%s cannot be read and is skipped (%d of %d pictures so far)",
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
    """Endless batches of random crops, reshuffled every epoch.

    A picture that cannot be read is replaced by the next one that can, named once in
    the log, and counted in `TrainBatches.unreadable`.

    Sets OpenCV to one thread, since pictures are already worked on in parallel.

    Args:
      source: The pictures.
      batch_size: Global number of pictures in a batch, over all processes.
      image_size: Side S of the crops, in pixels.
      seed: Of everything random here, in [0, 2**32).
      start_step: Number of batches to leave out, to resume.
      process_index: Which process of a multi-host run this is.
      process_count: Number of processes; each gets its share of every batch.
      workers: Worker processes. With 0, threads of this process read ahead, one a core
        and up to eight, which is faster until Python itself is the limit. Workers take
        seconds to start, and the script needs its `if __name__ == '__main__'`.
      scale: Range of the side of the crop, a square, over the picture's short side.
      flip: Whether to mirror half of the crops, left to right.
      mask_folder: Masks to draw from. If None, there is no 'mask' in the batches.

    Returns:
      Iterator, to be closed, of dicts with 'image', uint8 `[B, S, S, 3]`; 'seed',
      uint32 `[B]`, a random number for each record; and with a `mask_folder` 'mask',
      uint8 `[B, S, S, 1]`, 1 = valid. B is `batch_size // process_count`.

    Raises:
      ValueError: If an argument is out of range; while iterating, if over 5 % of the
        pictures cannot be read.
      RuntimeError: While iterating, if a worker process dies.
    """
    _check_positive(
        batch_size=batch_size, image_size=image_size, process_count=process_count
    )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size is global and must be a multiple of process_count "
            f"(={process_count}), got {batch_size}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in [0, {process_count}), got {process_index}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if start_step < 0 or workers < 0:
        raise ValueError(
            f"start_step and workers must not be negative, got {start_step}, {workers}"
        )
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be 0 < low <= high <= 1, got {scale}")

    _set_up_opencv()
    transform = TrainTransform(source, image_size, tuple(scale), flip, mask_folder)
    records = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    # Sliced last: the randomness of a record must not depend on who makes it.
    records = records.random_map(transform)
    records = records[start_step * batch_size + process_index :: process_count]
    batches = records.batch(batch_size // process_count)
    if not workers:
        return TrainBatches(source, batches.to_iter_dataset(_READ_OPTIONS))
    if not flags.FLAGS.is_parsed():  # outside of absl.app; grain asks its own flags
        flags.FLAGS.mark_as_parsed()
    dataset = batches.to_iter_dataset(grain.ReadOptions(1, 2)).mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
        worker_init_fn=_set_up_opencv,
    )
    return TrainBatches(source, dataset)


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    num_examples: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every picture once, the same on every call.

    Example j is picture `j % len(source)`: its central square the first time round,
    fixed but different squares of it after that. A picture that cannot be read is
    replaced by the next one that can, and named in the log.

    Args:
      source: The pictures.
      batch_size: Number of examples in a batch.
      image_size: Side S of the squares, in pixels.
      num_examples: Number of examples, even more than there are pictures. None = one
        for each picture.

    Returns:
      Iterator of dicts with 'image', uint8 `[B, S, S, 3]`; 'index', int32 `[B]`, the
      number of the example; and 'weight', float32 `[B]`, 1, or 0 for what fills up the
      last batch.

    Raises:
      ValueError: If an argument is out of range; while iterating, if over 5 % of the
        pictures cannot be read.
    """
    num_examples = len(source) if num_examples is None else num_examples
    _check_positive(
        batch_size=batch_size, image_size=image_size, num_examples=num_examples
    )
    _set_up_opencv()
    example = functools.partial(eval_example, source, image_size, num_examples)
    padded = num_examples + -num_examples % batch_size
    batches = grain.MapDataset.range(padded).map(example).batch(batch_size)
    return iter(batches.to_iter_dataset(_READ_OPTIONS))


# Decoding leaves the GIL, so as many threads as cores are fastest: 1560 crops of 256 px
# a second on two cores, 840 with one thread, 1080 with two worker processes. The buffer
# counts whole batches; grain's default of 500 would fill the memory.
_THREADS = min(os.cpu_count() or 1, 8)
_READ_OPTIONS = grain.ReadOptions(_THREADS, prefetch_buffer_size=_THREADS + 2)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _set_up_opencv(*_: int) -> None:
    """One thread, and no lines on stderr about files that are reported anyway."""
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
