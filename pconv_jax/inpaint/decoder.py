"""A process that reads files first, because they may crash a decoder.

``python -m pconv_jax.inpaint.decoder`` is that process. It is not one of
`multiprocessing`, which would import the program that serves the page once more.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence

_COMMAND = (sys.executable, "-m", "pconv_jax.inpaint.decoder")


class Decoder:
    """Tries files in another process, which starts at the first one."""

    def __init__(self, command: Sequence[str] = _COMMAND):
        """Prepare the process.

        Args:
          command: Starts a process that reads a line for each file, and answers by a
            line. By default this module's.
        """
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def survives(self, path: str, *, max_pixels: int) -> bool:
        """Return whether a process can read a file, or refuse it, without a crash.

        Args:
          path: Path of the file.
          max_pixels: Larger images are refused.
        """
        with self._lock:
            # The system may have ended an idle process.
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin and process.stdout
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps([path, max_pixels]) + "\n")
                process.stdin.flush()
            if process.stdout.readline():
                return True
            # Python ends with 1 at an error of this package, which is not a crash.
            return self._end(process) == 1

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        atexit.register(self._end, process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> int:
        """Let a process end, and return its status."""
        self._process = None
        process.communicate()
        atexit.unregister(self._end)
        return process.returncode


def main() -> None:
    """Read the files that standard input names, until it ends."""
    from pconv_jax._errors import UserError
    from pconv_jax.inpaint import image_io

    # The parent process ends, and then this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        path, max_pixels = json.loads(line)
        with contextlib.suppress(UserError):
            image_io.read(path, max_pixels=max_pixels)
        print(flush=True)


if __name__ == "__main__":
    main()
