"""Settings that JAX reads once, when it starts: so they stand before every test."""

import os

import jax
import pytest

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
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
