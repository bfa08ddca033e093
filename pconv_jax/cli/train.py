"""``pconv train``: trains an inpainting network."""

import argparse
import sys
from typing import Any

from pconv_jax._errors import UserError
from pconv_jax.cli import config_options
from pconv_jax.cli._cache import add_cache, use_cache
from pconv_jax.cli._options import Subparsers, expand

_DESCRIPTION = """\
Trains an inpainting network.

If it is interrupted, the same command resumes it. All GPUs of a machine are used. To
use several machines, start one process on each with --distributed, on a common file
system. If JAX cannot find the other processes by itself, also set
--coordinator-address, --num-processes and --process-id.
"""

_EXAMPLES = """\
examples:
  pconv train --config pconv:quickstart
  pconv train --config folder --config.data.path=photos/
  pconv train --config pconv --config.batch_size=2 --config.phase1.steps=1000
"""


def add(commands: Subparsers) -> None:
    """Add the command to those of ``pconv``."""
    command = commands.add_parser(
        "train",
        help="train a network",
        usage="%(prog)s --config NAME [--config.FIELD VALUE ...] [--workdir DIR] "
        "[options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "--workdir",
        metavar="DIR",
        type=expand,
        help="folder of the run (default: runs/ and the config's name)",
    )
    command.add_argument(
        "--allow-other-images",
        action="store_true",
        help="resume a run even if its images have changed",
    )
    processes = command.add_argument_group("several processes")
    processes.add_argument(
        "--distributed", action="store_true", help="this is one process of several"
    )
    processes.add_argument(
        "--coordinator-address",
        metavar="HOST:PORT",
        help="host and port of process number 0",
    )
    processes.add_argument(
        "--num-processes", metavar="N", type=int, help="number of processes"
    )
    processes.add_argument(
        "--process-id", metavar="N", type=int, help="index of this process"
    )
    add_cache(command)
    config_options.add_config_options(command, required=True)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    with config_options.importing_training():
        from pconv_jax.runs import config as config_lib
        from pconv_jax.runs import logs, parallel
        from pconv_jax.train import loop

    use_cache(arguments)
    logs.log_to_stderr()
    sys.unraisablehook = _report_unraisable
    config = config_options.read_config(arguments)
    workdir = arguments.workdir or config_lib.default_workdir(arguments.config)
    others = {
        "coordinator_address": arguments.coordinator_address,
        "num_processes": arguments.num_processes,
        "process_id": arguments.process_id,
    }
    if arguments.distributed:
        parallel.initialize(**others)
    elif any(value is not None for value in others.values()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UserError(f"{names}: each of these needs --distributed.")
    summary = loop.train_and_evaluate(
        config, workdir, allow_other_images=arguments.allow_other_images
    )
    print(loop.format_summary(summary, workdir))


def _report_unraisable(unraisable: Any) -> None:
    """Report what a thread could not raise, except for an echo of another error.

    If one of several arrays cannot be written, Orbax closes the event loop under the
    threads that write the others.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
