"""Measures the training step of each phase, and lists the kernels that take the time.

    python -m tools.profile_step OUT --config accelerator --config.data.path=PHOTOS \
        --config.vgg=VGG19

For each phase of the experiment: the time to compile, milliseconds a step, images a
second, and, on GPUs, a table of kernels. OUT gets the profiles, for TensorBoard or
Perfetto.
"""

import argparse
import collections
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

from pconv_jax._errors import RunError, UserError
from pconv_jax.cli import config_options
from pconv_jax.runs.config import read_settings
from pconv_jax.train import plan
from pconv_jax.train.experiment import Experiment, open_experiment
from pconv_jax.train.phases import Phase


class Kernel(NamedTuple):
    """A kernel in a profile.

    Attributes:
      name: Its name.
      milliseconds: Time of all its launches.
      launches: Their number.
    """

    name: str
    milliseconds: float
    launches: int


def measure(
    experiment: Experiment, phase: Phase, out: Path, *, calls: int
) -> tuple[float, float, list[Kernel]]:
    """Measure the step of a phase on throwaway states.

    Args:
      experiment: The experiment.
      phase: The phase.
      out: Folder of the profile, which is of one call.
      calls: Number of calls that are timed.

    Returns:
      Seconds until the first call returns, seconds of a step after that, and the
      kernels of a call, the longest first.
    """
    step = experiment.compile_step(phase)
    state, count = experiment.create_state(), experiment.settings.steps_per_call
    with plan.open_calls(experiment, phase, state, step) as call:
        started = time.perf_counter()
        jax.block_until_ready(call())
        first = time.perf_counter() - started
        started = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        seconds = (time.perf_counter() - started) / (calls * count)
        with jax.profiler.trace(str(out)):
            jax.block_until_ready(call())
    return first, seconds, read_kernels(out)


def read_kernels(folder: Path) -> list[Kernel]:
    """Sum the launches of each GPU kernel in a profile, the longest first."""
    total, launches = collections.Counter(), collections.Counter()
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:  # The others repeat them by operation.
                    continue
                for event in line.events:
                    total[event.name] += event.duration_ns / 1e6
                    launches[event.name] += 1
    return [Kernel(name, ms, launches[name]) for name, ms in total.most_common()]


def main() -> None:
    """Measure the experiment that the command line describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the profiles")
    parser.add_argument(
        "--calls", type=int, default=12, help="calls that are timed (default: 12)"
    )
    parser.add_argument(
        "--kernels", type=int, default=25, help="kernels to list (default: 25)"
    )
    config_options.add_config_options(parser, required=False)
    parser.set_defaults(config="accelerator")
    arguments = parser.parse_args()
    try:
        experiment = open_experiment(
            read_settings(config_options.read_config(arguments))
        )
    except (UserError, RunError) as error:
        parser.error(str(error))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    settings = experiment.settings
    for phase in experiment.phases:
        if phase.start == phase.stop:
            continue
        first, seconds, kernels = measure(
            experiment, phase, arguments.out / phase.name, calls=arguments.calls
        )
        print(
            f"{phase.name}: compiled and called in {first:.1f} s; "
            f"{1e3 * seconds:.2f} ms a step, "
            f"{settings.batch_size / seconds:.0f} images a second"
        )
        count, whole = settings.steps_per_call, sum(k.milliseconds for k in kernels)
        if kernels:
            launches = sum(kernel.launches for kernel in kernels) / count
            print(f"  kernels: {whole / count:.2f} ms, {launches:.0f} launches a step")
        for kernel in kernels[: arguments.kernels]:
            print(
                f"  {kernel.milliseconds / count:8.3f} ms "
                f"{kernel.milliseconds / whole:6.1%} "
                f"{kernel.launches / count:6.1f}x  {kernel.name[:100]}"
            )


if __name__ == "__main__":
    main()
