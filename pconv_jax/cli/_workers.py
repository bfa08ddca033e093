"""Repair of the images of a folder in a process that may crash or be killed.

A decoder may crash at a damaged file, or the system may end a process that takes too
much memory. Then a new process goes on after the image at which that happened.
"""

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from pconv_jax import _processes
from pconv_jax._errors import RunError, UserError

Pairs = Sequence[tuple[Path, Path]]


class Outcome(NamedTuple):
    """What became of images.

    Attributes:
      failed: How many were not repaired.
      filled: Whether one of them had a hole.
      kept: How many were kept of an interrupted run.
    """

    failed: int = 0
    filled: bool = False
    kept: int = 0


Repair = Callable[[argparse.Namespace, Pairs, int], Iterator[tuple[int, Outcome]]]


def run_all(repair: Repair, arguments: argparse.Namespace, pairs: Pairs) -> Outcome:
    """Repair images in a process; in another one if that is killed.

    Args:
      repair: Repairs the images from a number on. Before each, and at the end, it
        yields how many were done, and what became of them.
      arguments: Given to it.
      pairs: The images, and the files to write.

    Raises:
      UserError: If ``repair`` raises it, like RunError.
      RunError: If a process is killed before its first image.
    """
    failed, filled, kept, first = 0, False, 0, 0
    while True:
        number, outcome, status = _run_once(repair, arguments, pairs, first)
        failed, filled = failed + outcome.failed, filled or outcome.filled
        kept += outcome.kept
        if number == len(pairs):
            return Outcome(failed, filled, kept)
        if status > 0:  # A bug, whose traceback is on the terminal.
            sys.exit(status)
        name = signal.Signals(-status).name if status else "no signal"
        if number < 0:
            raise RunError(f"the process that repairs images was ended by {name}.")
        print(
            f"pconv: {pairs[number][0].name}: the process that repaired it was ended "
            f"by {name}.",
            file=sys.stderr,
            flush=True,
        )
        failed, first = failed + 1, number + 1


def _run_once(
    repair: Repair, arguments: argparse.Namespace, pairs: Pairs, first: int
) -> tuple[int, Outcome, int]:
    """Run a process; return the last image's number, the outcome and exit status."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(sender, repair, arguments, pairs, first), daemon=True
    )
    process.start()
    sender.close()  # The process has its own, whose end is the end of the messages.
    number, outcome = -1, Outcome()
    with receiver:
        try:
            while True:
                message = receiver.recv()
                if isinstance(message, Exception):
                    raise message
                number, outcome = message
        except EOFError:
            pass
    process.join()
    return number, outcome, process.exitcode or 0


def _work(
    sender: Connection,
    repair: Repair,
    arguments: argparse.Namespace,
    pairs: Pairs,
    first: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The first process ends this one,
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which then tidies up.
    _processes.end_with_parent()
    try:
        for message in repair(arguments, pairs, first):
            sender.send(message)
    except (RunError, UserError) as error:
        sender.send(error)
