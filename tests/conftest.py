"""Settings that JAX reads once, when it starts: so they stand before every test."""

import atexit
import collections
import contextlib
import functools
import gc
import os
import shutil
import sys
import tempfile

# Expected numbers, and four devices, are a CPU's, also where there is a GPU; and so are
# those of the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"

# A program is compiled once: tests, and the processes that they start, read what the
# first of them wrote.
if "PYTEST_XDIST_WORKER" not in os.environ:  # Workers inherit the variables.
    _compiled = tempfile.mkdtemp(prefix="pconv-compiled-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    # Any limit makes processes lock the folder, so that none reads half a file.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)

import jax  # noqa: E402
import pytest  # noqa: E402

from pconv_jax import _processes  # noqa: E402

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
    _processes.trim_memory()


@contextlib.contextmanager
def _optimizations(disabled):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", disabled)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def fast_compilation():
    """For modules that compile long and compute little."""
    with _optimizations(disabled=True):
        yield


@pytest.fixture(scope="module")
def fast_computation():
    """For modules that compute long, such as the search for detail."""
    with _optimizations(disabled=False):
        yield


@pytest.fixture
def fast_compilation_once():
    """For a test that compiles long, in a module that is optimized."""
    with _optimizations(disabled=True):
        yield


@pytest.fixture
def fast_computation_once():
    """For a test that computes long, in a module with fast compilation."""
    with _optimizations(disabled=False):
        yield


def pytest_collection_modifyitems(items):
    """Put the longest modules first: the last one keeps a single worker busy."""
    slow = collections.Counter(x.path for x in items if x.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run a module on one worker, so that its fixtures are made once."""
    if config.getoption("dist") == "load":  # What -n means.
        from xdist.scheduler import LoadFileScheduling

        config.option.loadscopereorder = False  # The order of the items stands.
        return LoadFileScheduling(config, log)
