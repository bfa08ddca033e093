"""The process that measures one variant of a case, on request.

    python -m benchmarks.worker '{"framework": "jax", "program": ...}'

It builds the program, compiles it, calls it once and answers with a line of JSON on
stdout. Then it reads lines from stdin, each with the number of seconds to measure, and
answers each with the times of the calls. It ends when stdin ends.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pconv_jax import _processes

_MAX_CALLS = 1000


class Program(NamedTuple):
    """The program of a variant.

    Attributes:
      call: Does the work once, and returns when it is done.
      compile_s: Seconds that compilation took; None if nothing is compiled.
    """

    call: Callable[[], None]
    compile_s: float | None = None


def measure(call: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Call a function repeatedly for some time, at least once.

    Args:
      call: The function.
      seconds: The time to measure.

    Returns:
      ``wall_s`` and ``cpu_s``, the seconds of each call; and ``others``, the share of
      all cores that other processes used meanwhile, or None if it is unknown. If there
      are three calls or more, the first is left out: its caches and threads are cold,
      and data may have been prefetched since the last turn.
    """
    walls, cpus = [], []
    end = _now() + seconds
    start, busy, own = _now(), _busy_seconds(), _cpu_seconds()
    while not walls or len(walls) < _MAX_CALLS and _now() + walls[-1] < end:
        wall, cpu = _now(), _cpu_seconds()
        call()
        walls.append(_now() - wall)
        cpus.append(_cpu_seconds() - cpu)
    others = None
    busy_after = _busy_seconds()
    if busy is not None and busy_after is not None:
        own = _cpu_seconds() - own
        others = busy_after - busy - own
        others = max(0.0, others / (_now() - start) / (os.cpu_count() or 1))
    first = 1 if len(walls) >= 3 else 0
    return {"wall_s": walls[first:], "cpu_s": cpus[first:], "others": others}


def peak_memory() -> int:
    """Get the peak resident memory of this process, in bytes.

    On Linux, it is the peak since `reset_peak_memory`.
    """
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Reset `peak_memory`, if the system supports it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _busy_seconds() -> float | None:
    """Get the busy time of all cores together since the system started."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(
                int, file.readline().split()[1:9]
            )
    except OSError:
        return None
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_seconds() -> float:
    """Get the CPU time of this process, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _now() -> float:
    return time.perf_counter()


def main() -> None:
    """Build the variant of the first argument, and answer requests."""
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    settings = json.loads(sys.argv[1])
    framework = importlib.import_module(
        f"benchmarks.{settings.pop('framework')}_programs"
    )
    about = framework.describe()
    imported = peak_memory()
    program = framework.build(**settings)
    program.call()
    answer(
        **about,
        compile_s=program.compile_s,
        imported_bytes=imported,
        peak_bytes=peak_memory(),
    )
    _processes.trim_memory()  # What a compiler has freed is not part of a call.
    reset_peak_memory()
    for line in sys.stdin:
        times = measure(program.call, float(line))
        device = framework.peak_device_memory()
        answer(**times, running_bytes=peak_memory(), device_bytes=device)


if __name__ == "__main__":
    main()
