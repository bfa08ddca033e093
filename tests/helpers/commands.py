"""The command pconv in a process."""

import subprocess
import sys

from tests.helpers import ROOT


def pconv(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pconv_jax.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
