"""Processes that end with the one that started them, and give back memory."""

import contextlib
import ctypes
import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process when the one that started it ends, however that ends."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # Python's resource tracker then frees the shared memory.


def keep_memory_small() -> None:
    """Let the C library give back what will be freed, where it is glibc.

    By default it keeps hundreds of megabytes for later: the network's activations,
    while the search for detail takes as much.
    """
    trim_threshold = -1  # M_TRIM_THRESHOLD of malloc.h.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(trim_threshold, 2**20)


def trim_memory() -> None:
    """Let the C library give back what is free now, where it is glibc.

    That is much after a compilation: its small blocks are scattered among those in use,
    where no threshold applies.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
