"""Trains an inpainting network.

    python train.py --config configs/pconv.py:quickstart

Started again with the same workdir, it goes on where it stopped. Fields of the
experiment can be set here: --config.batch_size=2 --config.phase1.steps=1000

All GPUs of a machine are used. For several machines, start one process on each, on a
common file system, with --distributed; where JAX cannot find out about the others by
itself, also with --coordinator_address, --num_processes and --process_id.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pconv_jax.runs import parallel, settings
from pconv_jax.train import loop

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, in configs/."
)

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; by default runs/ and the experiment's name."
)

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several.")

_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "Host and port of number 0."
)

_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")

_PROCESS = flags.DEFINE_integer("process_id", None, "The number of this one.")


def main(_):
    """Runs the experiment, and says how it ended."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = _WORKDIR.value or loop.default_workdir(name)
    others = {
        "coordinator_address": _ADDRESS.value,
        "num_processes": _PROCESSES.value,
        "process_id": _PROCESS.value,
    }
    try:
        if _DISTRIBUTED.value:
            parallel.initialize(**others)
        elif any(value is not None for value in others.values()):
            raise ValueError("what is said of other processes needs --distributed.")
        summary = loop.train_and_evaluate(_CONFIG.value, workdir)
    except (OSError, ValueError, loop.TrainingDivergedError) as error:
        logging.debug("", exc_info=True)  # For --verbosity=1.
        sys.exit(f"train.py: {error}")
    print(loop.format_summary(summary, workdir))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=settings.parse_flags)
