"""Commands in processes."""

import os
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


def training_environment(devices=1):
    """Get variables for processes that train or evaluate, and so compile long."""
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
