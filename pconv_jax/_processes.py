"""Processes that end with the process that started them."""

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
