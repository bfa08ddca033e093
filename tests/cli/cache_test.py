"""The compilation cache of the commands."""

import os
import subprocess
import sys

from pconv_jax.cli import _cache
from tests.helpers import ROOT

SCRIPT = """
import argparse
import jax
from pconv_jax.cli import _cache

_cache._MIN_SECONDS = 0.0
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
_cache.use_cache(argparse.Namespace(no_cache={no_cache}))
{fault}
assert jax.jit(lambda x: 2 * x + 1)(3) == 7
print(sum(event.endswith("cache_hits") for event in hits))
"""

# As on a full disk, no file can be written.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))"


def run(home, *, no_cache=False, fault="", **variables):
    """Compile in a process of its own; return the number of programs that were kept."""
    names = [name for name in os.environ if name.startswith("JAX_")]
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"JAX_PLATFORMS": "cpu", "PCONV_CACHE": str(home), **variables}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c"]
        + [SCRIPT.format(no_cache=no_cache, fault=fault)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    return int(result.stdout)


def programs(folder):
    return [path.name for path in folder.rglob("*-cache")]


def test_the_next_run_reads_what_the_first_compiled(tmp_path):
    assert run(tmp_path) == 0
    folder = tmp_path / "compiled"
    kept = programs(folder)
    assert kept and programs(tmp_path) == kept
    assert folder.stat().st_mode & 0o777 == 0o700
    assert run(tmp_path) >= 1
    assert run(tmp_path, no_cache=True) == 0
    assert programs(folder) == kept


def test_the_folder_of_the_user_goes_first(tmp_path):
    own = tmp_path / "own"
    minimum = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(own), **minimum)
    assert programs(own) and not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_used_breaks_nothing(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    assert run(file) == 0
    assert run(tmp_path / "full", fault=FULL) == 0


def test_programs_of_others_and_full_disks_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path))
    assert _cache._find_folder() == tmp_path / "compiled"
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        assert _cache._find_folder() is None
    monkeypatch.setattr(_cache, "_MAX_BYTES", 2**62)
    assert _cache._find_folder() is None
