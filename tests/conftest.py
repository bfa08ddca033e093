"""Settings that JAX reads once, when it starts: so they stand before every test."""

import os

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


@pytest.fixture(scope="module")
def fast_compilation():
    """For tests that compile long and compute little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
