"""Settings that JAX reads once, when it starts: so they stand before every test."""

import contextlib
import ctypes
import functools
import gc
import os
import sys

# Expected numbers, and four devices, are a CPU's, also where there is a GPU; and so are
# those of the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402

# On a busy machine devices that share a core can wait long for each other. XLA's limit
# of 40 seconds ends the whole process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="module", autouse=True)
def release_memory():
    """Forget what a module compiled: hardly anything serves the next one."""
    yield
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("pconv_jax", "tests"):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Where the C library is GNU's:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # it keeps freed memory otherwise.


@pytest.fixture(scope="module")
def fast_compilation():
    """For tests that compile long and compute little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
