import pathlib
import sys

import pytest

from pconv_jax import _processes

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Only glibc keeps what is freed."
)


def resident_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_memory_that_was_freed_in_small_blocks_is_given_back():
    blocks = [bytes(range(256)) * 250 for _ in range(2000)]  # 128 MB.
    del blocks[:-1]  # The last one keeps the heap from shrinking.
    before = resident_bytes()
    _processes.trim_memory()
    assert before - resident_bytes() > 100e6
